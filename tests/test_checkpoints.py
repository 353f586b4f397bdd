# SPDX-License-Identifier: MIT
"""What can go wrong in a run, done to it: it is killed, resumed with something changed, its disk is full, its
checkpoint damaged, its reward fails, its gradient is not finite. Nothing that was learned and kept may be lost, and a
sentence says what happened. In the folder of every test are model/, data.jsonl, runs/whole, a run of 4 steps to which
nothing has happened, and runs/half, the same one stopped after 2; a test's own run is runs/a.
"""

import contextlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import helpers.runs
import ppo
from helpers.runs import Forked, assert_same, assert_same_run, command, curves, finish, make_folder, saved, variety

CHECKPOINT, ASIDE, HALF = map(Path, ("runs/a/checkpoint.pt", "runs/a/checkpoint.aside", "runs/half/checkpoint.pt"))
arguments = partial(helpers.runs.arguments, eval_every=2)


@pytest.fixture(scope="module", params=[grpo, pytest.param(ppo, marks=pytest.mark.slow)], ids=["grpo", "ppo"])
def prepared(request, tmp_path_factory) -> tuple:
    """One of the scripts, and a folder with what every test begins with."""
    script, folder = request.param, tmp_path_factory.mktemp("prepared")
    make_folder(folder)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "reward", variety)
        script.train(arguments(script, run_name="whole"))
        script.train(arguments(script, run_name="half", num_steps=2))
    return script, folder


@pytest.fixture
def script(prepared, tmp_path, monkeypatch):
    script, folder = prepared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "reward", variety)
    return script


@pytest.fixture
def run(script, capsys) -> Callable[..., str]:
    def run(code: int = 0, **args: object) -> str:
        """What `main` says on its way to this exit code; it is one sentence if it is 2."""
        capsys.readouterr()
        assert script.main(arguments(script, **args)) == code, capsys.readouterr().err
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.count(f"{script.__name__}.py: ") == (code == 2), said
        return said

    return run


def evaluated() -> Counter:
    """How many completions of each step are kept; an evaluation has 5 + 5."""
    lines = Path("runs/a/completions.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["step"] for line in lines)


# ----- SIGKILL at any moment -----


def time_of_save() -> int:
    return CHECKPOINT.stat().st_mtime_ns if CHECKPOINT.exists() else 0


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_never_killed(script, run):
    """Before the first checkpoint, between saves and inside them: the checkpoint and the curves have the same bits."""
    kills, seed, inside = 10, random.randrange(1000), 0
    moments = random.Random(seed)
    args = dict(num_steps=2 * kills + 2, save_every=1, eval_every=3, beta=0.05)
    args |= dict(adaptive_kl_target=0.01, value_warmup_steps=5) if script is ppo else dict(ref_refresh_every=4)
    run(run_name="never_killed", **args)
    again = command(script.__name__, run_name="a", resume="auto", **args)
    for kill in range(kills):
        with Forked(again) as process:
            process.wait_until(Path("runs/a").exists)
            for _ in range(moments.randint(1, 2) if kill else 0):  # the first one before there is a checkpoint
                before = time_of_save()
                process.wait_until(lambda: time_of_save() != before)  # noqa: B023
            if kill % 3 == 0:
                time.sleep(moments.uniform(0, 0.1))
            elif kill % 3 == 1:  # inside a save, while the file is being written
                process.wait_until(ASIDE.exists)
                time.sleep(moments.choice([0, 0, 0.001]))
            process.kill()  # kill % 3 == 2: inside a save, while policy/ is being written
            inside += ASIDE.exists()
    finish(Forked(again))
    assert inside, f"no kill of seed {seed} came inside a save"
    assert_same_run("never_killed", "a")
    assert [step for step, _ in curves("a")["reward/mean"]] == [*range(args["num_steps"])]
    assert set(evaluated().values()) == {10}
    assert not ASIDE.exists(), "what a killed save leaves behind is written over"


def test_the_points_of_a_step_are_on_disk_before_its_checkpoint(run, monkeypatch):
    append, save, on_disk = LocalFileSystem.append, torch.save, []
    # TensorBoard writes in a thread of its own, which falls behind here.
    monkeypatch.setattr(LocalFileSystem, "append", lambda *args, **more: time.sleep(0.005) or append(*args, **more))
    monkeypatch.setattr(torch, "save", lambda *args, **how: on_disk.append(curves("a")) or save(*args, **how))
    run(num_steps=3, save_every=1, eval_every=0)
    assert [len(points.get("reward/mean", [])) for points in on_disk] == [0, 1, 2, 3]
    assert on_disk[-1] == curves("a")


# ----- Exact resume -----


def test_a_run_that_stops_after_every_step_ends_with_the_same_bits(script, run, monkeypatch):
    """As one that never stopped. Through the value warm-up, in which the policy's optimizer has no state yet; beta and
    the reference move, the sampler is a copy, and the reward draws random numbers."""
    monkeypatch.setattr(script, "reward", lambda *texts: variety(*texts) + random.random() / 100)
    options = dict(dtype="bfloat16", beta=0.05)
    options |= dict(value_warmup_steps=2, adaptive_kl_target=0.01, penalty_kl_target=0.01) if script is ppo else dict(
        ref_refresh_every=2, update_epochs=2)
    run(run_name="never_stopped", **options)
    for n in (1, 2, 3, 4):
        said = run(num_steps=n, save_every=1, resume="auto", **options)
        assert f"step {n - 1} of {n}, in runs/a" in said
        assert ("resuming from runs/a/checkpoint.pt" in said) == (n > 1)
        assert ("the policy will not learn" in said) == (script is ppo and n <= 2)
        assert saved("a")["step"] == n
    assert_same_run("never_stopped", "a")
    betas = saved("a")["betas"]
    assert script is grpo or (betas["ref"] != 0.05 and betas["old"] != 1.0)


def test_a_model_with_a_parameter_that_never_has_a_gradient_is_resumed(script, run, monkeypatch):
    load = script.load_policy

    def with_unused(*args):
        policy = load(*args)
        policy.base_model.unused = torch.nn.Parameter(torch.ones(2))
        return policy

    monkeypatch.setattr(script, "load_policy", with_unused)
    run(num_steps=2)
    run(resume="auto")
    trained = torch.load(CHECKPOINT, weights_only=True)["policy"][0]
    del trained["model.unused"]
    assert_same(saved("whole")["policy"][0], trained)


def test_a_finished_run_that_is_resumed_stays_as_it_is(run):
    """With --eval-every 1, its last evaluation stood in completions.jsonl twice."""
    shutil.copytree("runs/whole", "runs/a")
    run(resume="auto", eval_every=1)
    assert_same_run("whole", "a")
    assert [step for step, _ in curves("a")["eval/greedy"]] == [0, 2, 4]
    assert evaluated() == {0: 10, 2: 10, 4: 10}


def test_a_run_that_was_interrupted_after_an_evaluation_writes_it_once(script, run, monkeypatch):
    """Resumed, the evaluations since the last checkpoint stood twice in completions.jsonl."""
    log_step = script.Run.log_step

    def interrupted(run: object, metrics: dict) -> None:
        log_step(run, metrics)
        if run.step == 1:
            raise KeyboardInterrupt  # as by Ctrl-C in a notebook

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "log_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.train(arguments(script, eval_every=1, save_every=4))
    assert saved("a")["step"] == 0
    assert evaluated() == {0: 10, 1: 10}
    with Path("runs/a/completions.jsonl").open("a") as file:
        file.write('{"step": 0, "ki')  # a kill may cut a line
    run(resume="auto", eval_every=1)
    assert evaluated() == dict.fromkeys(range(5), 10)
    assert [step for step, _ in curves("a")["eval/greedy"]] == [0, 1, 2, 3, 4]
    assert_same(saved("whole"), saved("a"))


def test_a_checkpoint_begins_another_run_wherever_its_model_and_data_lie_now(run):
    """The folder was renamed, or --model was completed with a slash by the shell: the run could not be resumed."""
    before = HALF.read_bytes()
    Path("link").symlink_to("model")
    shutil.copytree("model", "elsewhere/other")
    shutil.copy("data.jsonl", "elsewhere/lines.jsonl")
    places = {"model/": "./data.jsonl", "link": "data.jsonl", "elsewhere/other": "elsewhere/lines.jsonl"}
    places[str(Path("model").resolve())] = str(Path("data.jsonl").resolve())
    for number, (model, data) in enumerate(places.items()):
        said = run(run_name=f"{number}", resume=str(HALF), model=model, data=data)
        assert f"resuming from {HALF}" in said
        assert f"step 2 of 4, in runs/{number}" in said
        assert_same(saved("whole"), saved(f"{number}"))
    assert [step for step, _ in curves("0")["reward/mean"]] == [2, 3]
    assert HALF.read_bytes() == before


def test_what_only_the_machine_needs_may_change_on_the_way(run):
    less = dict(micro_batch_tokens=20, gradient_checkpointing=True, device="auto", eval_every=1, save_every=1)
    assert "step 2 of 3, in runs/half" in run(run_name="half", resume="auto", num_steps=3, **less)
    assert saved("half")["step"] == 3


def test_a_run_goes_on_although_the_chat_template_writes_the_date(run, monkeypatch):
    """Llama 3's template writes today's date into every prompt: no run could be resumed on the next day."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = "{{ strftime_now('%d') }}+{{ messages[0].content }}"
    tokenizer.save_pretrained("model")
    for day in (1, 2):
        clock = SimpleNamespace(now=lambda day=day: datetime(2025, 1, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        assert f"step {day - 1} of {day}, in runs/a" in run(num_steps=day, resume="auto")


# ----- Refused -----


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(script, run, capsys):
    """Other weights were put where the model was: the reference, and what was trained so far, are of the first one."""
    half = dict(run_name="half", resume="auto")
    changed = dict(seed=7, learning_rate=0.5, temperature=0.9, max_new_tokens=3, kl_estimator="k2")
    said = run(2, **half, **changed, eval_data="data.jsonl")  # what was held out would be trained on
    assert f"{HALF} cannot be loaded: it belongs to a run with other arguments: --" in said
    flags, *hashes = said.split("other arguments: ")[1].split(", hash of ")
    assert set(f", {flags}".split(", --")[1:]) == {
        "max-new-tokens was 6, is 3", "temperature was 1.0, is 0.9", "learning-rate was 0.001, is 0.5",
        f"kl-estimator was {script.Args.kl_estimator}, is k2", "seed was 1, is 7",
    }  # fmt: skip
    assert [text.partition(" was ")[0] for text in hashes] == ["the problems", "the held-out problems"]
    with pytest.raises(script.UserError, match="other arguments: --new was None, is 1"):
        script.Run.load(SimpleNamespace(fixed={"--new": 1}), HALF)
    other = {grpo: ppo, ppo: grpo}[script]
    assert other.main(arguments(other, **half)) == 2
    assert f"script was {script.__name__}, is {other.__name__}, " in capsys.readouterr().err
    Path("data.jsonl").write_text(Path("data.jsonl").read_text().replace('"answer": "', '"answer": "1'))
    said = run(2, **half)
    assert "other arguments: hash of the problems was " in said
    assert ", hash of the held-out problems was " in said
    make_folder(Path())
    model = AutoModelForCausalLM.from_pretrained("model")
    model.lm_head.weight.data += 0.1
    model.save_pretrained("model")
    assert "other arguments: hash of the model was " in run(2, **half)


def test_a_run_is_neither_written_over_nor_begun_beyond_its_last_step(script, run, monkeypatch):
    """--num-steps counts from the beginning, also in a run that begins with a checkpoint: a model was promised that
    was never written."""
    monkeypatch.setattr(script, "next_problems", None)  # whoever trains fails
    files = lambda: {path: path.is_file() and path.read_bytes() for path in Path("runs").rglob("*")}
    before = files()
    for resume in (None, str(HALF)):
        said = run(2, run_name="half", resume=resume)
        assert "cannot write the run to runs/half (to resume a run: --resume auto, once at a time): " in said
    for args in (dict(resume=str(HALF)), dict(resume="auto", run_name="half")):
        assert "it is at step 2, beyond --num-steps 1" in run(2, num_steps=1, **args)
    assert files() == before
    shutil.rmtree("runs")
    Path("runs").touch()
    assert "cannot write the run to runs/a (to resume a run: --resume auto, once at a time): " in run(2)


def test_runs_without_a_name_never_collide(run):
    for _ in range(2):
        run(run_name=None, num_steps=1)
    assert len([*Path("runs").iterdir()]) == 4


@pytest.mark.slow
def test_two_processes_do_not_resume_one_run_at_the_same_time(script, run):
    slow = "script.reward = lambda completion, problem: time.sleep(0.01) or len(set(completion)) / 10"
    warmup = dict(value_warmup_steps=0) if script is ppo else {}
    again = command(script.__name__, slow, run_name="half", num_steps=1000, resume="auto", **warmup)
    with Forked(again) as process:
        process.wait_until_it_says("in runs/half")
        said = run(2, run_name="half", resume="auto")
        assert "runs/half (to resume a run: --resume auto, once at a time): The file lock" in said
    run(run_name="half", num_steps=3, resume="auto")  # a kill opens the lock


# ----- SIGTERM and SIGINT (see also test_training.py) -----


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [grpo], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(script, number):
    step_of_minutes = "script.reward = lambda *texts: print('rewarding', flush=True) or time.sleep(60)"
    with Forked(command("grpo", step_of_minutes, run_name="a")) as process:
        for text in ("rewarding", "finishing this step, then saving; a second signal exits at once"):
            process.wait_until_it_says(text)
            assert process.is_alive()
            os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode == -number


# ----- A full disk -----


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[Callable[[int], None]]:
    """No file can grow beyond `size` bytes: writing more fails, as on a full disk, with OSError (EFBIG). Gives a
    function that sets another size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    allow = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    allow(size)
    try:
        yield allow
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_at_the_last_save_keeps_the_checkpoint_before(script, run):
    before = HALF.read_bytes()
    for size in (50_000, 250_000):
        assert size < len(before)
        with full_disk(size):
            assert "runs/half could not be saved: " in run(2, run_name="half", resume="auto")
        assert HALF.read_bytes() == before
        assert not HALF.with_suffix(".aside").exists(), "half of a file would only fill the disk"
    run(run_name="half", resume="auto")
    assert_same_run("whole", "half")
    with full_disk(50_000), pytest.raises(script.UserError, match=r"^runs/a could not be saved: "):
        script.train(arguments(script), SimpleNamespace(is_set=lambda: True))  # a run that is stopped


def test_a_full_disk_at_a_save_on_the_way_does_not_end_the_run(script, run, monkeypatch):
    """Full in the second and third step, as the reward sees them: then somebody makes room."""
    sizes = (50_000 if call // 8 in (1, 2) else 2**40 for call in itertools.count())
    with full_disk(2**40) as allow:
        monkeypatch.setattr(script, "reward", lambda *texts: allow(next(sizes)) or variety(*texts))
        said = run(save_every=1, eval_every=0)
    assert said.count("runs/a could not be saved: ") == 2  # after two and after three steps
    assert_same(saved("whole"), saved("a"))
    assert [step for step, _ in curves("a")["reward/mean"]] == [0, 1, 2, 3]
    assert not ASIDE.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_disk_that_is_full_once_the_checkpoint_is_written_does_not_end_the_run(run, monkeypatch, what):
    """The disk held the checkpoint but not the export beside it: what writes it has errors of its own."""
    sync, tokenizer = os.fsync, json.loads(Path("model/tokenizer.json").read_text())
    if what == "tokenizer":  # larger than the checkpoint
        tokenizer["model"]["vocab"] |= {f"word {i}": i for i in range(15, 40_000)}
        Path("model/tokenizer.json").write_text(json.dumps(tokenizer))
    size = Path("runs/whole/checkpoint.pt").stat().st_size + 1000
    with full_disk(size) as allow, monkeypatch.context() as patch:
        if what == "weights":
            patch.setattr(os, "fsync", lambda file: sync(file) or allow(1_000))
        said = run(2, save_every=2, eval_every=0)
    assert said.count("runs/a could not be saved: ") == 3, said  # at steps 0 and 2, and the sentence at the end
    run(resume="auto")
    assert_same(saved("whole"), saved("a"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_ends_the_curves_not_the_run(run, monkeypatch):
    """As if the curves were on a disk of their own: only what TensorBoard writes fails, in the second step."""
    writes, append = itertools.count(), LocalFileSystem.append

    def failing(*args, **kwargs):
        if next(writes) > 20:
            raise OSError(28, "No space left on device")
        return append(*args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "append", failing)
    said = run(save_every=2, eval_every=0)
    assert said.count("the curves end here, the run goes on: [Errno 28] No space left on device") == 1
    assert_same(saved("whole"), saved("a"))


# ----- Damaged checkpoints -----


def altered(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def middles() -> dict[str, int]:
    """A place in the middle of every file within the zip file that a checkpoint is."""
    content, places = HALF.read_bytes(), {}
    for file in zipfile.ZipFile(HALF).infolist():
        sizes = struct.unpack_from("<HH", content, file.header_offset + 26)  # of its name and of what else is there
        places[file.filename] = file.header_offset + 30 + sum(sizes) + file.file_size // 2
    return places


def test_a_damaged_checkpoint_is_refused(script, run, monkeypatch):
    monkeypatch.setattr(script, "next_problems", None)  # whoever trains fails
    torch.save({"step": 1}, "other.pt")
    torch.save(torch.ones(3), "tensor.pt")
    for path in ("nothing.pt", "model", ".", "data.jsonl", "other.pt", "tensor.pt", "model/model.safetensors"):
        assert f"{path} cannot be loaded: " in run(2, resume=path)
    good = HALF.read_bytes()
    damaged = {
        "empty": b"", "half": good[: len(good) // 2], "a byte short": good[:-1], "text": b"text" * 100,
        "one bit of a tensor": altered(good, middles()["archive/data/0"]),
        # 38 bytes into an entry of the zip file's directory stand the attributes: with this bit it is a folder.
        "one bit of the directory": altered(good, good.index(b"PK\x01\x02") + 38, bit=4),
    }  # fmt: skip
    for name, bad in damaged.items():
        HALF.write_bytes(bad)
        for args in (dict(resume=str(HALF)), dict(resume="auto", run_name="half")):
            said = run(2, **args)
            assert said.startswith(f"{script.__name__}.py: {HALF} cannot be loaded: "), name
            assert ("is damaged" in said) == name.startswith("one bit"), said
        assert HALF.read_bytes() == bad, name
    assert not Path("runs/a").exists()


def test_a_bit_altered_anywhere_is_refused_or_changes_nothing(script):
    """What no checksum covers holds nothing that is read: names that stand twice, padding, dates."""
    good, content, moments = HALF.read_bytes(), torch.load(HALF, weights_only=True), random.Random(0)
    within, anywhere = [*middles().values()], [moments.randrange(len(good)) for _ in range(settings().max_examples)]
    run, refused = SimpleNamespace(models={}, betas={}, fixed={}, args=arguments(script)), set()
    script.Run.load(run, HALF)
    for place in within + anywhere:
        HALF.write_bytes(altered(good, place, moments.randrange(8)))
        try:
            script.Run.load(run, HALF)
            assert_same(content, torch.load(HALF, weights_only=True))
        except script.UserError:
            refused.add(place)
    assert len(within) > 40
    assert {*within} <= refused
    assert len(refused) > len(within) + len(anywhere) // 2


# ----- A reward that fails -----


def good_rewards_until(call: int, wrong: object) -> Callable[[str, dict], float]:
    """A reward whose call of this number, counted from 0, raises or returns what is wrong."""
    calls = itertools.count()

    def failing(*texts: object) -> object:
        if next(calls) != call:
            return variety(*texts)
        if isinstance(wrong, type):
            raise wrong
        return wrong

    return failing


TOO_LARGE = "the reward is {}, not a number below 1e15, for '"
WRONG = [  # what the reward raises or returns, and what the run ends with
    (ZeroDivisionError, ZeroDivisionError, None),
    (SystemExit, RuntimeError, "compute_rewards ended the program"),
    (KeyboardInterrupt, KeyboardInterrupt, None),  # in a notebook
    (math.nan, ValueError, TOO_LARGE.format("nan")),
    (math.inf, ValueError, TOO_LARGE.format("inf")),
    (-1e39, ValueError, TOO_LARGE.format("-1e[+]39")),  # infinite in float32
    (1e20, ValueError, TOO_LARGE.format("1e[+]20")),  # infinite in float32 when it is squared
    ([1.0], TypeError, None),
    (None, TypeError, None),
]


@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_a_wrong_reward_stops_the_run_and_keeps_what_was_learned(script, run, monkeypatch, when):
    """Code that the reward ran called exit(): the run ended with exit code 0, nothing said and nothing saved. Or a
    reward was finite as Python counts, but not its square in float32, and no update was ever made."""
    for wrong, error, says in WRONG if when == "training" else WRONG[:2]:
        # An evaluation has 5 + 5 completions, a step 8: before the third step, or in it.
        call = {"evaluation": 3, "training": 10 + 3}[when] + (0 if CHECKPOINT.exists() else 10 + 8 + 8)
        monkeypatch.setattr(script, "reward", good_rewards_until(call, wrong))
        before = time_of_save()
        with pytest.raises(error, match=says) as raised:
            script.main(arguments(script, resume="auto"))
        shown = [frame.name for frame in raised.traceback] + [type(raised.value.__cause__)]
        assert not isinstance(wrong, type) or "failing" in shown or wrong in shown, wrong
        assert time_of_save() != before, wrong
        assert saved("a")["step"] == 2, wrong
    monkeypatch.setattr(script, "reward", variety)
    run(resume="auto")
    assert_same_run("whole", "a")


def test_a_reward_that_changes_the_folder_does_not_change_where_the_run_is_kept(script, run, monkeypatch, tmp_path):
    """A reward ran code in a folder of its own: the curves ended there, and nothing could be saved at the end."""
    Path("sandbox").mkdir()
    monkeypatch.setattr(script, "reward", lambda *texts: os.chdir(tmp_path / "sandbox") or variety(*texts))
    run()
    os.chdir(tmp_path)
    assert not [*Path("sandbox").iterdir()]
    assert_same_run("whole", "a")


# ----- A gradient that is not finite -----


def test_an_update_that_is_not_finite_is_skipped_and_counted(script, run, monkeypatch):
    """Two updates a step. Of the policy, the first one of step 1 and both of step 2 are spoiled; of the value model
    those of step 3."""
    norms, update = {"policy": [], "value": []}, script.optimizer_step

    def spoil(name: str, factors: dict[int, float]) -> None:
        compute, calls = getattr(script, name), itertools.count()

        def spoiled(*args, **options) -> tuple:
            loss, per_token = compute(*args, **options)
            return loss * factors.get(next(calls), 1.0), per_token

        monkeypatch.setattr(script, name, spoiled)

    def recorded(model, *args) -> torch.Tensor:
        norm = update(model, *args)
        norms["policy" if hasattr(model, "lm_head") else "value"].append(float(norm))
        return norm

    monkeypatch.setattr(script, "optimizer_step", recorded)
    spoil("grpo_loss" if script is grpo else "policy_loss", {2: math.nan, 4: math.inf, 5: math.nan})
    if script is ppo:
        spoil("value_loss", {6: math.inf, 7: math.nan})
    said, found = run(num_minibatches=2, update_epochs=1), curves("a")
    for step, is_skipped in enumerate([False, True, True, script is ppo]):
        assert (f"step {step}: the gradient was not finite, so its update was skipped" in said) == is_skipped
    for prefix, skipped in {"policy": [0, 1, 2, 0], "value": [0, 0, 0, 2]}.items():
        if script is ppo or prefix == "policy":
            assert [count for _, count in found[f"{prefix}/skipped"]] == skipped
            finite = [[x for x in norms[prefix][i : i + 2] if math.isfinite(x)] for i in (0, 2, 4, 6)]
            means = [sum(x) / max(1, len(x)) for x in finite]
            assert [norm for _, norm in found[f"{prefix}/grad_norm"]] == pytest.approx(means)
    assert all(value.isfinite().all() for value in saved("a")["policy"][0].values())
