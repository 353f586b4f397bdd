# SPDX-License-Identifier: MIT
"""The README's evidence, from real runs of grpo.py and ppo.py.

    python tests/bench/evidence.py runs --only learning                  a hundred steps: where it ends
    python tests/bench/evidence.py runs --only learning --steps 20       the first steps, evaluated every other one
    python tests/bench/evidence.py runs --only variants group_size --steps 10
    python tests/bench/evidence.py runs --only kl --steps 40
    python tests/bench/evidence.py sums                                  writes sums_train.jsonl and sums_test.jsonl
    python tests/bench/evidence.py runs --only pretrained --steps 40     a real model, in folder smollm2, learns them
    python tests/bench/evidence.py tables --only kl --steps 40           the README's tables, in markdown
    python tests/bench/evidence.py pictures --steps 20                   .github/learning-light.svg and -dark.svg

Pictures want tests/bench/requirements-evidence.txt. Each group of experiments has a file GROUP-STEPS.csv in --csv; its
first lines say how to repeat it. A run that stands there is not run again, so what was stopped goes on with the same
command; one whose flags have changed below is run anew. Runs live in runs/evidence/.

Columns: reward, length (tokens) and kl (nats a token, as the run estimates it) of the completions sampled in a step;
greedy, sampled (mean rewards), eval_length and exact_kl (nats a token, whatever the run estimates; tiny model only), on
the held-out problems after it; completion_tokens sampled, and seconds of sampling and updating, of all steps so far.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "evidence"
LOADING = threading.Lock()  # transformers loads one model at a time
COMPLETIONS = 256  # a step, in every experiment with the tiny model
VARIANTS = {  # name: command
    "GRPO": "grpo.py",
    "Dr. GRPO": "grpo.py --advantage-scale none --loss-average constant --beta 0",
    "DAPO": "grpo.py --loss-average token --clip-eps-high 0.28 --beta 0 --mask-truncated --num-minibatches 4",
    "GSPO": "grpo.py --ratio-level sequence --clip-eps 3e-4 --clip-eps-high 4e-4 --update-epochs 2 --num-minibatches 2",
    "RLOO": "grpo.py --advantage-baseline leave_one_out --advantage-scale none --loss-average constant",
    "importance-weighted KL": "grpo.py --kl-importance-weight --update-epochs 2",
    "PPO": "ppo.py",
}
KL = "grpo.py --update-epochs 2 --beta 1"  # more than the default of 0.04, so that the estimators can be told apart
KLS = {
    "no KL": "grpo.py --update-epochs 2 --beta 0",
    **{f"{k} in the loss": f"{KL} --kl-estimator {k}" for k in ("k1", "k2", "k3")},
    "weighted k3 in the loss": f"{KL} --kl-importance-weight",
}
SIZES = {f"G = {g}": f"grpo.py --group-size {g} --num-prompts {COMPLETIONS // g}" for g in (2, 4, 8, 16, 32)}
SUMS = "--model ../../smollm2 --data sums_train.jsonl --eval-data sums_test.jsonl --max-new-tokens 8"
SUMS += " --learning-rate 1e-5 --dtype bfloat16"
PRETRAINED = {"GRPO": f"grpo.py {SUMS} --num-prompts 16", "PPO": f"ppo.py {SUMS} --num-prompts 16 --group-size 8"}
EXPERIMENTS = {"learning": {"GRPO": "grpo.py", "PPO": "ppo.py"}, "variants": VARIANTS, "kl": KLS, "group_size": SIZES}
EXPERIMENTS |= {"pretrained": PRETRAINED}
COLUMNS = {  # of a file: (curve of the run, format in the tables, axis of its panel)
    "reward": ("reward/mean", "", "mean reward, 0 to 1"),
    "length": ("completion/length", "", "completion length, tokens"),
    "kl": ("policy/kl", ".3f", "KL from the reference, nats a token"),
    "greedy": ("eval/greedy", ".3f", "held-out reward, greedy, 0 to 1"),
    "sampled": ("eval/sampled", ".3f", ""),
    "eval_length": ("eval/length", ".1f", ""),
    "exact_kl": ("", ".3f", ""),
    "completion_tokens": ("", ",.0f", ""),
    "seconds": ("", ".0f", ""),
}
COLOURS = {"GRPO": "#1f7fc4", "PPO": "#d55e00"}  # told apart by every eye; contrast above 3.8 on white and near-black


def csv_of(group: str, args: argparse.Namespace) -> Path:
    return args.csv / f"{group}-{args.steps}.csv"


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The comments and the rows of a file; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [x for x in lines if x.startswith("# ")], [*csv.DictReader(x for x in lines if not x.startswith("# "))]


def write(path: Path, head: list[str], rows: list[dict[str, str]]) -> None:
    """The whole file, aside and renamed: who is stopped here loses nothing."""
    order, seeds = [*EXPERIMENTS[path.stem.rpartition("-")[0]]], sorted({int(row["seed"]) for row in rows})
    rows.sort(key=lambda row: (order.index(row["name"]), int(row["seed"])))
    lines = [*head, f"# seeds: {' '.join(map(str, seeds))}", ",".join(rows[0]), *(",".join(x.values()) for x in rows)]
    (aside := path.with_suffix(".aside")).write_text("\n".join([*lines, ""]))
    aside.replace(path)


def header(group: str, args: argparse.Namespace) -> list[str]:
    """How to repeat a file."""
    scripts = [ROOT / name for name in ("grpo.py", "ppo.py", "advantage.py", "kl.py")]
    git = lambda *words: subprocess.check_output(["git", *words, "--", *scripts], cwd=ROOT, text=True).strip()
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    import torch

    gpu = f", one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    options = f"--steps {args.steps} --jobs {args.jobs} --threads {args.threads} --seeds SEEDS"
    return [
        f"# command: python tests/bench/evidence.py runs --only {group} {options}",
        f"# one run: python COMMAND --seed SEED --num-steps {args.steps}",
        f"# commit: {git('log', '-1', '--format=%h')}{' with changes' if git('status', '--porcelain') else ''}",
        f"# machine: {os.cpu_count()} cores of {cpu}, torch {version('torch')}" + gpu,
    ]


def one_run(group: str, name: str, seed: int, steps: int) -> list[dict[str, str]]:
    """Train in a process of its own. Returns the rows of the run, to four digits: more than the seeds agree in."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command, folder = EXPERIMENTS[group][name], WORK / "runs" / re.sub(r"\W+", "-", f"{group}-{name}-{seed}")
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was stopped
    script, *words = f"{command} --seed {seed} --num-steps {steps} --run-name {folder.name}".split()
    words += ["--eval-every", str(steps // 10 if group == "learning" else steps), "--save-every", "0"]
    process = subprocess.run([sys.executable, ROOT / script, *words], cwd=WORK, capture_output=True, text=True)
    if process.returncode or f"trained model after {steps} steps" not in process.stderr:
        sys.exit(f"{script} {' '.join(words)} failed or was stopped:\n{process.stderr[-2000:]}")
    events = EventAccumulator(str(folder)).Reload()
    curve = lambda tag: {event.step: event.value for event in events.Scalars(tag)}
    found = {column: curve(tag) for column, (tag, *_) in COLUMNS.items() if tag}
    if re.search("--beta 0( |$)", command):
        found["kl"] = {}  # without a reference it is not measured
    seconds = curve("time/step")
    done = [step + 1 for step in seconds]
    found["seconds"] = dict(zip(done, np.cumsum([*seconds.values()]), strict=True))
    completions = 16 * 8 if group == "pretrained" else COMPLETIONS
    found["completion_tokens"] = dict(zip(done, completions * np.cumsum([*found["length"].values()]), strict=True))
    for column in ("reward", "length", "kl"):  # of the completions of a step, which the last evaluation comes after
        found[column] |= {steps: found[column][steps - 1]} if found[column] else {}
    found["exact_kl"] = {steps: exact_kl(folder / "policy")} if group != "pretrained" else {}
    row = {"name": name, "seed": str(seed), "command": command}
    show = lambda x: "" if x is None else f"{float(f'{x:.4g}'):g}"
    points = sorted({*range(0, steps, -(-steps // 50)), *found["greedy"]})
    points = points if group in ("learning", "pretrained") else [steps]
    return [row | {"step": str(i), **{column: show(found[column].get(i)) for column in COLUMNS}} for i in points]


def exact_kl(folder: Path) -> float:
    """KL[policy, reference], summed over the vocabulary, a mean over the tokens of completions to held-out problems."""
    import torch

    import grpo
    import kl

    args, cpu = grpo.check_args(grpo.Args()), torch.device("cpu")
    with LOADING:  # and one draws random numbers at a time
        policy, ref_policy = (grpo.load_policy(str(x), cpu) for x in (folder, grpo.TINY))
        _, eos_ids, _, held_out = grpo.load_problems(args, policy)
        prompts = grpo.pad_prompts([ids for ids, _ in held_out], cpu)
        torch.manual_seed(0)
        completions = grpo.generate_completions(policy, *prompts, 1, args.max_new_tokens, args.temperature, eos_ids)
    batch = grpo.Batch(*prompts, *completions)
    with torch.no_grad():
        logits = [grpo.predict_completions(x, batch)[batch.completion_mask] for x in (policy, ref_policy)]
        return kl.exact_kl(*logits).mean().item()


def runs(args: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of every run, and here: torch is imported below
    sys.path.insert(0, str(ROOT))
    import grpo

    todo, heads, files, lock = [], {}, {}, threading.Lock()
    for group in args.only:
        heads[group], (head, rows) = header(group, args), read(csv_of(group, args))
        if head and head[:-1] != heads[group]:
            sys.exit(f"{csv_of(group, args)} is of other options, commit or machine: remove it, or take another --csv")
        files[group] = [row for row in rows if EXPERIMENTS[group].get(row["name"]) == row["command"]]
        done = {(group, row["name"], int(row["seed"])) for row in files[group]}
        seeds = args.seeds or range(1, 11 if group == "learning" else 4)
        todo += [job for seed in seeds for name in EXPERIMENTS[group] if (job := (group, name, seed)) not in done]
    WORK.mkdir(parents=True, exist_ok=True)
    args.csv.mkdir(parents=True, exist_ok=True)
    os.chdir(WORK)
    grpo.transformers_logging.disable_progress_bar()
    sums(args)

    def keep(job: tuple[str, str, int]) -> None:
        group, rows = job[0], one_run(*job, args.steps)
        with lock:
            files[group] += rows
            write(csv_of(group, args), heads[group], files[group])
            print(f"{group}:", ", ".join(f"{column} {value}" for column, value in rows[-1].items()), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        [*pool.map(keep, todo)]  # a run that fails or is stopped ends them all; what is done is kept


def sums(_: argparse.Namespace) -> None:
    """Sums of two numbers up to 25 as JSON lines, after two examples, without which the model hardly answers. The pairs
    of the examples are left out, and b + a goes where a + b goes: into the training data or among the held-out."""
    rng, examples = random.Random(0), ((3, 4), (5, 12))
    ask = lambda a, b: {"role": "user", "content": f"{a} + {b} ="}
    shown = [turn for a, b in examples for turn in (ask(a, b), {"role": "assistant", "content": f"#### {a + b}"})]
    pairs = [(a, b) for a in range(1, 26) for b in range(a, 26) if (a, b) not in examples]
    rng.shuffle(pairs)
    for path, part in (("sums_train.jsonl", pairs[:200]), ("sums_test.jsonl", pairs[200:])):
        both = [pair for a, b in part for pair in sorted({(a, b), (b, a)})]
        lines = [json.dumps({"prompt": [*shown, ask(a, b)], "answer": str(a + b)}) for a, b in both]
        Path(path).write_text("\n".join([*lines, ""]))


def tables(args: argparse.Namespace) -> None:
    """Mean and range over the seeds; before training, where that was measured, and after it. The runs of pretrained one
    by one, with the 95 % interval of Wilson for its 236 held-out problems."""
    forms = {column: form for column, (_, form, _) in COLUMNS.items() if form}
    cell = lambda x, form: f"{np.mean(x):{form}} ({min(x):{form}} to {max(x):{form}})" if x else ""
    for group in args.only:
        head, rows = read(csv_of(group, args))
        print("", *head, "", f"| | {' | '.join(forms)} |", "|---" * (len(forms) + 1) + "|", sep="\n")
        for name, step in [("before", "0"), *((name, str(args.steps)) for name in EXPERIMENTS[group])]:
            found = [row for row in rows if row["step"] == step and name in ("before", row["name"])]
            cells = [cell([float(row[column]) for row in found if row[column]], forms[column]) for column in forms]
            if found:
                print(re.sub(r"(\S+) \(\1 to \1\)", r"\1", f"| {name} | {' | '.join(cells)} |"))  # all seeds agree
        for row in rows if group == "pretrained" else ():
            for column in ("greedy", "sampled") if row["greedy"] else ():
                p, z = float(row[column]), 1.96**2 / 236
                middle, half = (p + z / 2) / (1 + z), (z * (p * (1 - p) + z / 4)) ** 0.5 / (1 + z)
                found = f"{column} {p:.3f} ({middle - half:.3f} to {middle + half:.3f})"
                print(f"{row['name']}, seed {row['seed']}, step {row['step']}: {found}")


def pictures(args: argparse.Namespace) -> None:
    """A thin line: a seed. A thick one: their mean. The band: one standard deviation up and down."""
    from matplotlib import pyplot

    _, rows = read(csv_of("learning", args))
    for theme, text in (("light", "#1f2328"), ("dark", "#f0f6fc")):
        style = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), text)
        style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2}
        with pyplot.rc_context(style | {"svg.fonttype": "none", "svg.hashsalt": "evidence"}):
            figure, panels = pyplot.subplots(2, 2, figsize=(9, 5.6), layout="constrained", sharex=True)
            for axes, (column, (*_, label)) in zip(panels.flat, COLUMNS.items(), strict=False):  # the first four
                for name, colour in COLOURS.items():
                    found = [row for row in rows if row["name"] == name and row[column]]
                    steps = sorted({int(row["step"]) for row in found})
                    seeds = np.array([float(row[column]) for row in found]).reshape(-1, len(steps)).T  # (steps, seeds)
                    mean, spread = seeds.mean(1), seeds.std(1, ddof=1)
                    axes.plot(steps, seeds, color=colour, linewidth=0.6, alpha=0.35)
                    axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
                    axes.plot(steps, mean, color=colour, linewidth=2.2, label=f"{name}, {seeds.shape[1]} seeds")
                axes.set(ylabel=label, ylim=(0, None), xlabel="step" if axes in panels[1] else "")
                axes.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True))
            panels[0, 0].legend(frameon=False, loc="lower right")
            figure.savefig(path := args.csv.parent / f"learning-{theme}.svg", transparent=True, metadata={"Date": None})
        # A hundredth of a point will do, but not in texts, such as the ticks of an axis.
        path.write_text(re.sub(r">[^<]*<|(\d\.\d\d)\d+", lambda found: found[1] or found[0], path.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("runs", "tables", "pictures", "sums"))
    every = [group for group in EXPERIMENTS if group != "pretrained"]  # which must be asked for
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=every, help="groups of experiments")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default 1 to 10 for learning, else 1 to 3")
    parser.add_argument("--steps", type=int, default=100, help="of every run; fewer for a trial")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; jobs x threads above the cores cost seconds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every run")
    parser.add_argument("--csv", type=lambda x: Path(x).resolve(), default=ROOT / ".github/evidence", help="the folder")
    args = parser.parse_args()
    {"runs": runs, "tables": tables, "pictures": pictures, "sums": sums}[args.what](args)
