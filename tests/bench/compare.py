# SPDX-License-Identifier: MIT
"""grpo.py against TRL's GRPOTrainer: the same model, prompts, group size, lengths, loss, dtype and threads.

    python -m venv bench-env && bench-env/bin/pip install -r tests/bench/requirements.txt
    bench-env/bin/python tests/bench/compare.py --model smollm2 --data gsm8k_train.jsonl
    bench-env/bin/python tests/bench/compare.py --shape qwen2.5-0.5b --data gsm8k_train.jsonl --device cuda \
        --case 8x8x256-kl-bf16

tests/tools/prepare_smollm2.py makes the folder smollm2. A case is named BxGxT: B prompts, G completions, T new tokens.
"tiny-": the model of tests/tiny. "-kl": beta 0.04 and a reference policy, else beta 0. "-bf16": bfloat16 computation
over float32 weights, else float32. "-natural": completions may end by themselves, else all N x T tokens must be made.

A case runs ours, TRL, ours, TRL ... each in a process of its own. Printed for each side, medians over its runs:
    s/step      seconds per step, the first left out: sample + update. Loading, logging and saving are no part of it
    sample      ours: completions, their texts and rewards. TRL: the call of `generate` alone
    update      all else: scoring under the policy and the reference, loss, backward, optimizer step
    tokens/s    completion tokens per second of s/step
    memory      peak resident memory less that before the model is loaded; on CUDA the peak allocated
then min, median and max over the pairs of TRL's seconds per completion token, and memory, as multiples of ours.

TRL has one micro-batch and one optimizer step per batch, so it neither accumulates nor scores the old policy; float32
weights, under autocast in a -bf16 case; no gradient checkpointing, no vLLM; AdamW fused at a constant rate; loss_type
"grpo", its KL without importance weight. Two things that make it slow where it need not be, and flags against them:
    --trl-compact       Off CUDA, TRL 1.16 projects prompts on the vocabulary too. This replaces the function of it that
                        says so: completions only, as on CUDA and as ours.
    --trl-bf16-weights  In a -bf16 case TRL samples under autocast, which rounds all weights again for every token; ours
                        keeps a rounded copy. This loads bfloat16 weights: quicker, but no longer the same training.
"""

import argparse
import collections
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "qwen2.5-0.5b": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
}  # fmt: skip
CASES = [a + b + c for a in ("4x8x48", "2x16x64", "tiny-64x8x4") for b in ("", "-kl") for c in ("", "-bf16")]
CASES.append("4x8x256-kl-natural")
COLUMNS = ("s/step", "sample", "update", "tokens/s", "memory")
SEED, LEARNING_RATE = 1, 1e-6
Case = collections.namedtuple("Case", "name tiny num_prompts group_size max_new_tokens beta dtype natural")


def parse_case(name: str) -> Case:
    size, *flags = name.removeprefix("tiny-").split("-")
    num_prompts, group_size, max_new_tokens = map(int, size.split("x"))
    if not set(flags) <= {"kl", "bf16", "natural"}:
        raise ValueError(name)
    beta, dtype = 0.04 if "kl" in flags else 0.0, "bfloat16" if "bf16" in flags else "float32"
    return Case(name, "tiny-" in name, num_prompts, group_size, max_new_tokens, beta, dtype, "natural" in flags)


# ----- In a process of its own: the model and the prompts, then one side -----


def random_model(folder: Path, shape: dict, tokenizer_of: str | None) -> str:
    """Random weights of the given shape, with the tokenizer of a model or else one that reads bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    if tokenizer_of:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    else:
        names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
        bytes_only = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
        bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bytes_only.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, **ends), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepare(job: dict, case: Case) -> dict:
    """The folder of the model, and a file with the prompts of all steps: the first ones of --data."""
    from transformers import AutoTokenizer

    import grpo

    os.chdir(job["cwd"])  # models that are made here stay in its runs/
    folder = Path("runs") / f"{job['shape']}-{Path(job['model'] or 'bytes').name}"
    if job["shape"] and not folder.exists():
        random_model(folder, SHAPES[job["shape"]], job["model"])
    model = str(grpo.TINY if case.tiny else folder if job["shape"] else job["model"])
    lines = Path(grpo.Args.data if case.tiny or not job["data"] else job["data"]).read_text().splitlines()
    prompts = [grpo.read_prompt(json.loads(line)) for line in lines]
    prompts = [*itertools.islice(itertools.cycle(prompts), case.num_prompts * (job["steps"] + 1))]
    if AutoTokenizer.from_pretrained(model).chat_template:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    Path(job["prompts"]).write_text("".join(json.dumps({"prompt": p, "answer": "0"}) + "\n" for p in prompts))
    return {"model": os.path.abspath(model) if os.path.exists(model) else model}


def peak_memory(device: str) -> float:
    """In MiB: on CUDA the most that was allocated, else the most that was resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def train_ours(job: dict, case: Case) -> dict:
    """Run grpo.train as it is, but for these: no token ends a completion, no checkpoint is written, and the rewards are
    0, 1, 2 ..., so that every group has something to teach."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import grpo

    load, rollout, rewards, sample = grpo.load_problems, grpo.rollout, itertools.count(), []

    def timed_rollout(*given):
        started = time.perf_counter()
        result = rollout(*given)
        sample.append(time.perf_counter() - started)
        return result

    def load_problems(*which):
        tokenizer, ends, *problems = load(*which)
        return tokenizer, ends if case.natural else torch.full_like(ends[:1], -1), *problems

    grpo.load_problems, grpo.rollout = load_problems, timed_rollout
    grpo.reward = lambda completion, problem: float(next(rewards))
    grpo.Run.save = lambda *_: None
    before = peak_memory(job["device"])
    options = {name: getattr(case, name) for name in ("num_prompts", "group_size", "max_new_tokens", "beta", "dtype")}
    options |= {name: job[name] for name in ("model", "micro_batch_tokens")}
    options |= dict(data=job["prompts"], eval_data=job["prompts"], run_name="bench", eval_every=0, save_every=0)
    grpo.train(grpo.Args(num_steps=job["steps"] + 1, learning_rate=LEARNING_RATE, seed=SEED, **options))
    memory = peak_memory(job["device"]) - before
    events = EventAccumulator("runs/bench").Reload()
    step, length = ([event.value for event in events.Scalars(tag)] for tag in ("time/step", "completion/length"))
    update = [whole - part for whole, part in zip(step, sample, strict=True)]
    tokens = [mean * case.num_prompts * case.group_size for mean in length]
    return {"sample": sample, "update": update, "tokens": tokens, "memory": memory}


def train_trl(job: dict, case: Case) -> dict:
    import torch
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import grpo

    if job["trl_compact"]:
        trl.trainer.utils._use_triton = lambda device: True  # in this module: what is projected, not how
    num_rows, num_steps = case.num_prompts * case.group_size, job["steps"] + 1
    rows_at_once = job["trl_micro_batch"] or num_rows
    records = [json.loads(line) for line in Path(job["prompts"]).read_text().splitlines()]
    steps = [grpo.next_problems(records, step, case.num_prompts, SEED) for step in range(num_steps)]
    config = GRPOConfig(
        output_dir="trl", max_steps=num_steps, learning_rate=LEARNING_RATE, beta=case.beta, seed=SEED,
        num_generations=case.group_size, max_completion_length=case.max_new_tokens,
        per_device_train_batch_size=rows_at_once, gradient_accumulation_steps=num_rows // rows_at_once,
        loss_type="grpo", use_bias_correction_kl=False, temperature=1.0, top_k=0, top_p=1.0, shuffle_dataset=False,
        generation_kwargs=None if case.natural else {"eos_token_id": -1},
        bf16=case.dtype == "bfloat16", use_cpu=job["device"] == "cpu", gradient_checkpointing=False,
        model_init_kwargs={"dtype": "bfloat16" if job["trl_bf16_weights"] else "float32"},
        optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="constant",
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    sample, whole, tokens, rewards = [], [], [], itertools.count()

    def clock() -> float:
        torch.cuda.synchronize() if job["device"] == "cuda" else None
        return time.perf_counter()

    class Clock(TrainerCallback):
        on_step_begin = staticmethod(lambda *_, **__: whole.append(-clock()))
        on_step_end = staticmethod(lambda *_, **__: whole.append(whole.pop() + clock()))

    def reward(completion_ids, **_):
        tokens.append(sum(map(len, completion_ids)))
        return [float(next(rewards)) for _ in completion_ids]

    before = peak_memory(job["device"])
    prompts = [{"prompt": record["prompt"]} for step in steps for record in step]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    trainer = GRPOTrainer(job["model"], reward, config, Dataset.from_list(prompts), processing_class=tokenizer)
    if not case.natural:
        trainer.eos_token_ids = [-1]  # else completions would be cut behind an end token that did not end them
    generate, tokenize = trainer.model.generate, trainer._tokenize_prompts

    def timed_generate(*inputs, **options):
        started = clock()
        output = generate(*inputs, **options)
        sample.append(clock() - started)
        return output

    def checked_tokenize(prompts):
        found = tokenize(prompts)
        expected = [grpo.encode_prompt(tokenizer, row["prompt"]) for row in steps[len(sample)]]
        assert found[0] == [ids for ids in expected for _ in range(case.group_size)], "TRL sees other prompts than ours"
        return found

    trainer.model.generate, trainer._tokenize_prompts = timed_generate, checked_tokenize
    trainer.add_callback(Clock())
    trainer.train()
    update = [total - part for total, part in zip(whole, sample, strict=True)]
    return {"sample": sample, "update": update, "tokens": tokens, "memory": peak_memory(job["device"]) - before}


# ----- The pairs and the table. This process stays small: a child's peak memory starts with its parent's -----


def in_a_process(task: str, job: dict, case: str, script: str = __file__) -> dict:
    """What `task` of the script found, run in a fresh process and a fresh folder; of the timed steps, the mean."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    threads = {"OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}
    command = [sys.executable, os.path.abspath(script), "--in-a-process", task, json.dumps(job), case]
    with tempfile.TemporaryDirectory() as cwd:
        env = os.environ | threads | {"PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": ""} if job["device"] == "cpu" else {}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{task} of {case} failed:\n{done.stdout}{done.stderr}")
    found, case = json.loads(done.stdout.splitlines()[-1]), parse_case(case)
    if "tokens" in found:
        full = case.num_prompts * case.group_size * case.max_new_tokens
        assert all(len(found[name]) == job["steps"] + 1 for name in ("sample", "update", "tokens")), found
        assert case.natural or set(found["tokens"]) == {full}, f"{task} made {found['tokens']} tokens, not {full}"
        found |= {name: statistics.mean(found[name][1:]) for name in ("sample", "update", "tokens")}
        found["s/step"] = found["sample"] + found["update"]
        found["tokens/s"], found["seconds"] = found["tokens"] / found["s/step"], found["s/step"] / found["tokens"]
    return found


def child(tasks: dict) -> None:
    task, job, case = sys.argv[2:]
    print("\n" + json.dumps(tasks[task](json.loads(job), parse_case(case))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id; with --shape only its tokenizer is used")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of those of --model")
    parser.add_argument("--data", help="the prompts, as for grpo.py; without it, two-digit sums")
    parser.add_argument("--case", nargs="+", type=parse_case, default=[*map(parse_case, CASES)])
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after one that is left out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="ours")
    parser.add_argument("--trl-micro-batch", type=int, help="completions in a pass of TRL; default: all")
    parser.add_argument("--trl-compact", action="store_true")
    parser.add_argument("--trl-bf16-weights", action="store_true")
    parser.add_argument("--out", help="append every run to this file, a JSON object a line")
    args = parser.parse_args()
    if not (args.model or args.shape or all(case.tiny for case in args.case)):
        parser.error("all cases but the tiny ones need --model or --shape")
    versions = [f"{name} {version(name)}," for name in ("torch", "transformers", "trl")]
    print(*versions, args.device, args.threads, "threads")
    print(f"{'case':22}{'side':5}", *(f"{name:>10}" for name in COLUMNS))
    with tempfile.TemporaryDirectory() as work:
        for case in args.case:
            job = vars(args) | {"case": case.name, "cwd": os.getcwd(), "prompts": f"{work}/prompts.jsonl"}
            job |= in_a_process("prepare", job, case.name)
            runs = {"ours": [], "TRL": []}
            for _, side in itertools.product(range(args.pairs), runs):
                runs[side].append(in_a_process(side, job, case.name))
                if args.out:
                    with open(args.out, "a") as file:
                        file.write(json.dumps(job | {"side": side} | runs[side][-1]) + "\n")
            for side, found in runs.items():
                medians = [statistics.median(run[name] for run in found) for name in COLUMNS]
                print(f"{case.name:22}{side:5}", *(f"{value:10.4g}" for value in medians))
            for what in ("seconds", "memory"):
                ratios = [trl[what] / ours[what] for ours, trl in zip(*runs.values(), strict=True)]
                shown = f"min {min(ratios):.2f}, median {statistics.median(ratios):.2f}, max {max(ratios):.2f}"
                print(f"{'':22}TRL / ours, {what}: {shown}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-a-process"]:
        child({"prepare": prepare, "ours": train_ours, "TRL": train_trl})
    else:
        main()
