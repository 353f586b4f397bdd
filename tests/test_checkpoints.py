# SPDX-License-Identifier: MIT
"""What can go wrong in a run, done to it: it is killed, its disk is full, its checkpoint is damaged, its reward
fails, its gradient is not finite. Nothing that was learned and kept may be lost, and a sentence says what happened.
"""

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import grpo
import ppo
from helpers.runs import SMALL, assert_same_run, command, curves, finish, make_folder, saved, start, weights

CHECKPOINT, ASIDE = Path("runs/a/checkpoint.pt"), Path("runs/a/checkpoint.aside")


@pytest.fixture(params=[grpo, pytest.param(ppo, marks=pytest.mark.slow)], ids=["grpo", "ppo"])
def script(request, monkeypatch, folder):
    """One of the scripts, in a folder with a model and problems, with a reward that a random model can earn."""
    monkeypatch.setattr(request.param, "reward", variety)
    return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)


def variety(completion: str, problem: dict) -> float:
    return len(set(completion)) / 10


def arguments(script, **args: object) -> grpo.Args | ppo.Args:
    return script.Args(**SMALL | dict(run_name="a") | (dict(value_warmup_steps=0) if script is ppo else {}) | args)


def run(script, capsys, code: int = 0, **args: object) -> str:
    """What `main` says on its way to this exit code."""
    capsys.readouterr()
    assert script.main(arguments(script, **args)) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# ----- SIGKILL at any moment -----

# A supervisor, which starts the run again whenever it was killed. It has imported all already: a new run takes no time.
SUPERVISOR = """
import torch.distributed.checkpoint.state_dict, torch.utils.tensorboard, transformers.models.llama.modeling_llama

while child := os.fork():
    with open("pid_", "w") as file:
        file.write(str(child))
    os.replace("pid_", "pid")
    _, status = os.waitpid(child, 0)
    if status != signal.SIGKILL:
        os._exit(os.waitstatus_to_exitcode(status))
"""


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end


def saves() -> int:
    """Changes with every save."""
    return CHECKPOINT.stat().st_mtime_ns if CHECKPOINT.exists() else 0


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_never_killed(script, capsys):
    kills, seed = 18, random.randrange(1000)
    moments, pid, inside = random.Random(seed), "", 0
    args = dict(num_steps=3 * kills + 2, save_every=1, eval_every=3, beta=0.05)
    args |= dict(adaptive_kl_target=0.01, value_warmup_steps=5) if script is ppo else dict(ref_refresh_every=4)
    run(script, capsys, run_name="whole", **args)
    with start(command(script.__name__, SUPERVISOR, run_name="a", resume="auto", **args)) as process:
        for kill in range(kills):
            wait_until(lambda: Path("pid").exists() and Path("pid").read_text() != pid)  # noqa: B023
            pid = Path("pid").read_text()
            for _ in range(moments.randint(1, 3) if kill else 0):  # the first one before there is a checkpoint
                before = saves()
                wait_until(lambda: saves() != before)  # noqa: B023
            if kill % 3 == 0:
                time.sleep(moments.uniform(0, 0.1))
            elif kill % 3 == 1:  # inside a save, while the file is being written
                wait_until(ASIDE.exists)
                time.sleep(moments.choice([0, 0, 0.001]))
            os.kill(int(pid), signal.SIGKILL)  # kill % 3 == 2: inside a save, while policy/ is being written
            wait_until(lambda: not Path(f"/proc/{pid}").exists())  # noqa: B023
            inside += ASIDE.exists()
        finish(process)
    assert inside, f"no kill of seed {seed} came inside a save"
    assert_same_run("whole", "a")
    assert [step for step, _ in curves("a")["reward/mean"]] == [*range(args["num_steps"])]
    assert not ASIDE.exists(), "what a killed save leaves behind is written over"


def test_the_points_of_a_step_are_on_disk_before_its_checkpoint(script, capsys, monkeypatch):
    append, save, seen = LocalFileSystem.append, torch.save, []
    # TensorBoard writes in a thread of its own, which falls behind here.
    monkeypatch.setattr(LocalFileSystem, "append", lambda *args, **more: time.sleep(0.005) or append(*args, **more))
    monkeypatch.setattr(torch, "save", lambda *args, **how: seen.append(curves("a")) or save(*args, **how))
    run(script, capsys, num_steps=3, save_every=1)
    assert [len(points.get("reward/mean", [])) for points in seen] == [0, 1, 2, 3]
    assert seen[-1] == curves("a")


# ----- Exact resume -----


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_run_can_stop_after_any_step_and_end_with_the_same_bits(script, capsys, kept):
    # Through the value warm-up, in which the policy's optimizer has no state yet; beta and the reference move.
    choices = dict(value_warmup_steps=2, adaptive_kl_target=0.01, penalty_kl_target=0.01) if script is ppo else dict(
        ref_refresh_every=2, update_epochs=2)
    run(script, capsys, run_name="whole", eval_every=2, beta=0.05, **choices)
    run(script, capsys, num_steps=kept, eval_every=2, beta=0.05, **choices)
    assert saved("a")["step"] == kept
    run(script, capsys, resume="auto", eval_every=2, beta=0.05, **choices)
    assert_same_run("whole", "a")
    beta = saved("a")["betas"]
    assert script is grpo or (beta["ref"] != 0.05 and beta["old"] != 1.0)


def test_a_model_with_a_parameter_that_never_has_a_gradient_is_resumed(script, capsys, monkeypatch):
    load = script.load_policy

    def with_unused(*args):
        policy = load(*args)
        policy.base_model.unused = torch.nn.Parameter(torch.ones(2))
        return policy

    monkeypatch.setattr(script, "load_policy", with_unused)
    run(script, capsys, run_name="whole", num_steps=3)
    run(script, capsys, num_steps=2)
    run(script, capsys, num_steps=3, resume="auto")
    first, second = weights("runs/whole/policy"), weights("runs/a/policy")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_how_often_a_run_is_saved_does_not_change_it(script, capsys):
    options = dict(value_warmup_steps=2) if script is ppo else {}
    run(script, capsys, run_name="often", save_every=1, **options)
    run(script, capsys, run_name="once", save_every=0, **options)
    assert_same_run("often", "once")


def test_a_finished_run_that_is_resumed_stays_as_it_is(script, capsys):
    run(script, capsys, eval_every=2)
    shutil.copytree("runs/a", "runs/before")
    run(script, capsys, eval_every=2, resume="auto")
    assert_same_run("before", "a")
    assert [step for step, _ in curves("a")["eval/greedy"]] == [0, 2, 4]


def test_a_checkpoint_may_begin_another_run(script, capsys):
    run(script, capsys, run_name="whole")
    run(script, capsys, num_steps=2)
    before = CHECKPOINT.read_bytes()
    assert "resuming from runs/a/checkpoint.pt" in run(script, capsys, run_name="b", resume=str(CHECKPOINT))
    assert CHECKPOINT.read_bytes() == before
    first, second = weights("runs/whole/policy"), weights("runs/b/policy")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [step for step, _ in curves("b")["reward/mean"]] == [2, 3]


def test_a_run_is_not_written_over(script, capsys):
    run(script, capsys, num_steps=2)
    before = CHECKPOINT.read_bytes()
    refused = "cannot write the run to runs/a (to resume a run: --resume auto): [Errno 17] File exists"
    assert refused in run(script, capsys, 2)
    assert refused in run(script, capsys, 2, resume=str(CHECKPOINT))
    assert CHECKPOINT.read_bytes() == before


@pytest.mark.slow
def test_two_processes_do_not_resume_one_run_at_the_same_time(script, capsys):
    run(script, capsys, num_steps=1)
    slow = "script.reward = lambda completion, problem: time.sleep(0.1) or len(set(completion)) / 10"
    more = dict(value_warmup_steps=0) if script is ppo else {}
    with start(command(script.__name__, slow, run_name="a", num_steps=1000, resume="auto", **more)) as process:
        wait_until(lambda: len(curves("a")["reward/mean"]) > 1)
        said = run(script, capsys, 2, resume="auto")
        assert "runs/a (to resume a run: --resume auto): another process is training in it" in said
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        run(script, capsys, num_steps=2, resume="auto")  # a kill opens the lock


def test_runs_without_a_name_never_collide(script, capsys):
    said = [run(script, capsys, run_name=None, num_steps=1, device="cpu") for _ in range(2)]
    assert len({*Path("runs").iterdir()}) == 2, said


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(script, capsys):
    run(script, capsys)
    other = {grpo: ppo, ppo: grpo}[script]
    said = run(script, capsys, 2, resume="auto", temperature=0.5, max_new_tokens=7)
    assert "--max-new-tokens was 6, is 7, --temperature was 1.0, is 0.5\n" in said
    assert f"script was {script.__name__}, is {other.__name__}, " in run(other, capsys, 2, resume="auto")
    Path("data.jsonl").write_text(Path("data.jsonl").read_text().replace('"0"', '"1"'))
    assert "hash of the held-out problems was" in run(script, capsys, 2, resume="auto")


def test_what_only_the_machine_needs_may_change_on_the_way(script, capsys):
    run(script, capsys, num_steps=2)
    less = dict(micro_batch_tokens=20, gradient_checkpointing=True, eval_every=1, save_every=1)
    run(script, capsys, resume="auto", num_steps=3, **less)
    assert saved("a")["step"] == 3


# ----- SIGTERM and SIGINT (see also test_training.py) -----

SLOW_STEPS = "script.reward = lambda completion, problem: time.sleep(60)"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(folder, number):
    with start(command("grpo", SLOW_STEPS, run_name="a")) as process:
        wait_until(lambda: [*Path("runs").glob("a/events*")])
        time.sleep(1)
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None, "the first one lets the step finish"
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)  # the step would take minutes
    assert process.returncode == -number, said
    assert "a second signal exits at once" in said


# ----- A full disk, a folder that cannot be written -----


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes: writing more fails, as on a full disk, with OSError (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [50_000, 250_000])
def test_a_full_disk_at_the_last_save_keeps_the_checkpoint_before(script, capsys, size):
    run(script, capsys, run_name="whole")
    run(script, capsys, num_steps=2)
    before = CHECKPOINT.read_bytes()
    assert len(before) > 250_000
    with full_disk(size):
        said = run(script, capsys, 2, resume="auto")
    assert "runs/a could not be saved: " in said
    assert CHECKPOINT.read_bytes() == before
    run(script, capsys, resume="auto")
    assert_same_run("whole", "a")


def test_a_run_that_is_stopped_and_cannot_be_saved_says_so(script):
    stop = threading.Event()
    stop.set()
    with full_disk(50_000), pytest.raises(script.UserError, match=r"^runs/a could not be saved: "):
        script.train(arguments(script), stop)


def test_a_save_that_failed_leaves_nothing_behind_on_the_full_disk(script, capsys):
    with full_disk(50_000):
        run(script, capsys, 2)
    assert not ASIDE.exists()


def test_a_full_disk_at_a_save_on_the_way_does_not_end_the_run(script, capsys, monkeypatch):
    # Full in the second and third step, as the reward sees them: then somebody makes room.
    calls = itertools.count()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(completion: str, problem: dict) -> float:
        step = next(calls) // 8
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if step in (1, 2) else before[0], before[1]))
        return variety(completion, problem)

    run(script, capsys, run_name="whole")
    monkeypatch.setattr(script, "reward", filling)
    with full_disk(before[0]):
        said = run(script, capsys, save_every=1)
    assert said.count("runs/a could not be saved: ") == 2  # after two and after three steps
    assert_same_run("whole", "a")
    assert not ASIDE.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_ends_the_curves_not_the_run(script, capsys, monkeypatch):
    # As if the curves were on a disk of their own: only what TensorBoard writes fails, in the second step.
    writes = itertools.count()
    append = LocalFileSystem.append

    def failing(*args, **kwargs):
        if next(writes) > 20:
            raise OSError(28, "No space left on device")
        return append(*args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "append", failing)
    said = run(script, capsys, num_steps=6, save_every=2)
    assert said.count("the curves end here, the run goes on: [Errno 28] No space left on device") == 1
    assert saved("a")["step"] == 6


@pytest.mark.parametrize("place", ["a file", pytest.param("no permission", marks=pytest.mark.skipif(
    os.getuid() == 0, reason="root may write anywhere"))])
def test_a_folder_that_cannot_be_written_is_told_before_training(script, capsys, monkeypatch, place):
    monkeypatch.setattr(script, "next_problems", None)  # whoever trains fails
    Path("runs").write_text("") if place == "a file" else Path("runs").mkdir(mode=0o500)
    assert "cannot write the run to runs/a (to" in run(script, capsys, 2)


# ----- Damaged checkpoints -----


def largest_tensor(content: bytes) -> int:
    """A place in the middle of the first tensor's numbers, which stand uncompressed in the file."""
    numbers = torch.load(CHECKPOINT, weights_only=True)["policy"][0]["model.layers.0.mlp.up_proj.weight"]
    place = content.index(numbers.numpy().tobytes())
    return place + numbers.nbytes // 2


def altered(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


DAMAGES = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "one bit of a tensor": lambda content: altered(content, largest_tensor(content)),
    # 38 bytes into an entry of the zip file's directory stand the attributes: with this bit it is a folder.
    "one bit of the directory": lambda content: altered(content, content.index(b"PK\x01\x02") + 38, bit=4),
    "no checkpoint": lambda content: b"text" * 100,
    "nothing that it should hold": lambda content: Path("other.pt").read_bytes(),
}


def test_a_damaged_checkpoint_is_refused(script, capsys, monkeypatch):
    run(script, capsys, num_steps=2)
    torch.save({"a": 1}, "other.pt")
    good = CHECKPOINT.read_bytes()
    monkeypatch.setattr(script, "next_problems", None)  # whoever trains fails
    for name, damage in DAMAGES.items():
        CHECKPOINT.write_bytes(good)
        bad = damage(good)
        CHECKPOINT.unlink()
        if bad is not None:
            CHECKPOINT.write_bytes(bad)
        for args in [dict(resume=str(CHECKPOINT), run_name="b"), *([dict(resume="auto")] if bad is not None else [])]:
            said = run(script, capsys, 2, num_steps=3, **args)
            assert said.startswith(f"{script.__name__}.py: runs/a/checkpoint.pt cannot be loaded: "), name
            assert ("is damaged" in said) == name.startswith("one bit"), said
        assert not Path("runs/b").exists(), name
        assert bad is None or CHECKPOINT.read_bytes() == bad, name


def test_a_bit_altered_anywhere_is_refused_or_changes_nothing(script, capsys):
    """What no checksum covers holds nothing that is read: names twice, padding, dates."""
    run(script, capsys, run_name="whole", num_steps=2)
    run(script, capsys, num_steps=1)
    good, moments, refused = CHECKPOINT.read_bytes(), random.Random(0), 0
    for _ in range(settings().max_examples // 2):
        CHECKPOINT.write_bytes(altered(good, moments.randrange(len(good)), moments.randrange(8)))
        capsys.readouterr()
        code = script.main(arguments(script, resume="auto", num_steps=2))
        said = capsys.readouterr().err
        refused += code == 2 and "cannot be loaded: " in said and "Traceback" not in said
        if code != 2:
            assert_same_run("whole", "a")
    assert refused > settings().max_examples // 4


# ----- A reward that fails -----

WRONG = {
    "raises": ("1 / 0", ZeroDivisionError, "division by zero"),
    "nan": ("float('nan')", ValueError, "the reward is nan, not a number below 1e15, for '"),
    "infinite": ("float('inf')", ValueError, "the reward is inf, not a number below 1e15, for '"),
    "list": ("[1.0]", TypeError, "not 'list'"),
    "none": ("None", TypeError, "not 'NoneType'"),
}


@pytest.mark.parametrize(
    "wrong", ["raises", "nan", *(pytest.param(name, marks=pytest.mark.slow) for name in [*WRONG][2:])]
)
@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_a_wrong_reward_stops_the_run_and_keeps_what_was_learned(script, capsys, monkeypatch, wrong, when):
    text, error, says = WRONG[wrong]
    run(script, capsys, run_name="whole", eval_every=2)
    # 8 completions in a step, 5 + 5 in an evaluation: 10, 8, 8, 10, 8, 8, 10
    calls, bad = itertools.count(), {"evaluation": 10 + 8 + 8 + 3, "training": 10 + 8 + 8 + 10 + 3}[when]

    def failing(completion: str, problem: dict) -> float:
        return variety(completion, problem) if next(calls) != bad else eval(text)

    monkeypatch.setattr(script, "reward", failing)
    with pytest.raises(error, match=says) as raised:
        script.main(arguments(script, eval_every=2))
    names = [frame.name for frame in traceback.extract_tb(raised.tb)]
    assert "failing" in names if wrong == "raises" else names[-1] in ("guard", "<listcomp>")
    assert saved("a")["step"] == 2
    monkeypatch.setattr(script, "reward", variety)
    run(script, capsys, eval_every=2, resume="auto")
    assert_same_run("whole", "a")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_the_line_of_a_wrong_reward_is_named(folder, name):
    wrong = "\ndef reward(completion, problem):\n    return 1 / 0  # this line\nscript.reward = reward"
    said = finish(start(command(name, wrong, run_name="a")), code=1)
    assert "return 1 / 0  # this line" in said
    assert said.rstrip().endswith("ZeroDivisionError: division by zero")
    assert saved("a")["step"] == 0


# ----- A gradient that is not finite -----

LOSSES = {grpo: ["grpo_loss"], ppo: ["policy_loss", "value_loss"]}


@pytest.mark.parametrize("value", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("script", "loss"), [(grpo, 0), (ppo, 0), (ppo, 1)], indirect=["script"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(script, loss, value, capsys, monkeypatch):
    """Two updates a step: the first one of step 1 and both of step 2 are spoiled."""
    name, prefix = LOSSES[script][loss], ["policy", "value"][loss]
    compute, update, calls, norms, models = getattr(script, name), script.optimizer_step, itertools.count(), [], []

    def spoiled(*args, **kwargs):
        loss, per_token = compute(*args, **kwargs)
        return loss * (value if next(calls) in (2, 4, 5) else 1.0), per_token

    def recorded(model, *args):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        norm = update(model, *args)
        if hasattr(model, "lm_head") == (prefix == "policy"):
            norms.append(float(norm))
            models.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
        return norm

    monkeypatch.setattr(script, name, spoiled)
    monkeypatch.setattr(script, "optimizer_step", recorded)
    said = run(script, capsys, num_minibatches=2, update_epochs=1)
    assert models == [True, True, False, True, False, False, True, True]
    for step in range(4):
        assert (f"step {step}: the gradient was not finite, so its update was skipped" in said) == (step in (1, 2))
    found = curves("a")
    assert found[f"{prefix}/skipped"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 0.0)]
    means = [sum(norms[:2]) / 2, norms[3], 0.0, sum(norms[6:]) / 2]
    assert [norm for _, norm in found[f"{prefix}/grad_norm"]] == pytest.approx(means)
    checkpoint = saved("a")
    state = checkpoint["policy"][1]["state"].values()
    assert all(torch.as_tensor(x).isfinite().all() for moments in state for x in moments.values())
    assert all(x.isfinite().all() for x in checkpoint["policy"][0].values())
