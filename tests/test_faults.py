# SPDX-License-Identifier: MIT
"""What can go wrong in a run, done to it: it is killed, its disk is full, its files are damaged, its reward
fails, its gradient is not finite, its memory ends. Nothing that was learned and kept may be lost, and a sentence says
what happened.
"""

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import grpo
import ppo
from running import CI, SMALL, command, curves, finish, make_folder, same_bits, slow, start, steps, weights


@pytest.fixture(params=[grpo, ppo], ids=["grpo", "ppo"])
def script(request, monkeypatch, folder):
    """One of the scripts, in a folder with a model and problems, with a reward that a random model can earn."""
    monkeypatch.setattr(request.param, "reward", variety)
    return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)


def variety(completion: str, answer: str) -> float:
    return len(set(completion)) / 10


def run(script, capsys, code: int = 0, **args: object) -> str:
    """What `main` says on its way to this exit code."""
    if script is ppo:
        args = dict(value_warmup_steps=0) | args
    capsys.readouterr()
    assert script.main(script.Args(**SMALL | args)) == code
    return capsys.readouterr().err


# ----- SIGKILL at any moment -----


@pytest.mark.parametrize(("name", "kills"), [("grpo", 20 if CI else 3), pytest.param("ppo", 8, marks=slow)])
def test_a_run_killed_again_and_again_ends_as_one_never_killed(name, kills, folder):
    seed = random.randrange(1000)
    moments = random.Random(seed)
    args = dict(num_steps=5 * kills + 2, save_every=1, eval_every=3, eval_data="held_out.jsonl")
    Path("held_out.jsonl").write_text("".join(Path("data.jsonl").read_text().splitlines(keepends=True)[:4]))
    finish(start(command(name, run_name="whole", **args)))

    inside_a_save = 0
    again = command(name, run_name="a", resume="auto", **args)
    for kill in range(kills):
        with start(again) as process:
            before = newest_step()
            wanted = before + moments.randint(1, 4) if kill else 0  # the first one before there is a checkpoint
            while process.poll() is None and (newest_step() < wanted or not list(Path("runs").glob("a/events*"))):
                time.sleep(0.001)
            if kill % 2:
                while process.poll() is None and not list(Path("runs/a").glob(".step_*")):
                    pass
            else:
                time.sleep(moments.uniform(0, 0.1))
            process.kill()
        assert process.returncode == -signal.SIGKILL, f"kill {kill} of seed {seed} came too late"
        inside_a_save += bool(list(Path("runs/a").glob(".step_*")))
    finish(start(again))

    assert inside_a_save
    assert same_bits("runs/whole/policy", "runs/a/policy"), f"seed {seed}"
    assert curves("a") == curves("whole"), f"seed {seed}"
    assert [step for step, _ in curves("a")["reward/mean"]] == [*range(1, args["num_steps"] + 1)]
    assert steps("a") == steps("whole")
    assert not list(Path("runs/a").glob(".*")), "what a killed save leaves behind is cleared away"


def newest_step() -> int:
    return max((int(name[5:]) for name in steps("a")), default=0)


# ----- Exact resume -----


@pytest.mark.parametrize("kept", [1, pytest.param(2, marks=slow), pytest.param(3, marks=slow)])
def test_a_run_can_stop_after_any_step_and_end_with_the_same_bits(script, capsys, kept):
    # Through the value warm-up, in which the policy's optimizer has no state yet; beta moves.
    choices = dict(value_warmup_steps=2, adaptive_kl_target=0.01, beta=0.05) if script is ppo else dict(
        ref_refresh_every=2, update_epochs=2)
    run(script, capsys, run_name="whole", eval_every=2, **choices)
    run(script, capsys, run_name="a", num_steps=kept, eval_every=2, **choices)
    time.sleep(1.1)  # TensorBoard orders the files of a run by the second in their names
    run(script, capsys, run_name="a", resume="auto", eval_every=2, **choices)
    assert same_bits("runs/whole/policy", "runs/a/policy")
    whole, parts = curves("whole"), curves("a")
    for tag in whole.keys() - {"eval/accuracy", "eval/sampled", "eval/length"}:  # the first part had a last evaluation
        assert whole[tag] == parts[tag], tag


def test_how_often_a_run_is_saved_does_not_change_it(script, capsys):
    run(script, capsys, run_name="often", save_every=1, **(dict(value_warmup_steps=2) if script is ppo else {}))
    run(script, capsys, run_name="once", save_every=0, **(dict(value_warmup_steps=2) if script is ppo else {}))
    assert same_bits("runs/often/policy", "runs/once/policy")


def test_a_finished_run_that_is_resumed_stays_as_it_is(script, capsys):
    run(script, capsys, run_name="a", eval_every=2)
    before, drawn = weights("runs/a/policy"), curves("a")
    time.sleep(1.1)
    run(script, capsys, run_name="a", eval_every=2, resume="auto")
    after = weights("runs/a/policy")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert curves("a") == drawn
    assert drawn["eval/accuracy"][-1][0] == SMALL["num_steps"]


def test_the_last_two_checkpoints_stay(script, capsys):
    run(script, capsys, run_name="a", save_every=1)
    assert steps("a") == ["step_000003", "step_000004"]
    names = {path.name for path in Path("runs/a/step_000004").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "state.pt", "sha256.json"}
    state = torch.load("runs/a/step_000004/state.pt", weights_only=True)
    assert state["step"] == 4
    assert state["args"]["num_prompts"] == 4


def test_a_checkpoint_of_other_arguments_is_refused(script, capsys):
    run(script, capsys, run_name="a")
    said = run(script, capsys, 2, run_name="a", resume="auto", temperature=0.5, max_new_tokens=7)
    assert "--max-new-tokens was 6, is 7" in said
    assert "--temperature was 1.0, is 0.5" in said


def test_a_tokenizer_with_files_in_folders_can_be_saved_and_resumed(script, capsys):
    # Several chat templates are saved in a folder of their own.
    tokenizer = grpo.AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "{{ messages[0]['content'] }}"}
    tokenizer.save_pretrained("model")
    run(script, capsys, run_name="a", num_steps=2)
    inner = [*Path("runs/a/step_000002").glob("*/*")]
    assert inner
    run(script, capsys, run_name="a", num_steps=3, resume="auto")
    inner[0].write_text("x")
    assert f"{inner[0].name} is damaged" in run(
        script, capsys, 2, run_name="b", num_steps=3, resume="runs/a/step_000002")


# ----- SIGTERM and SIGINT (see also test_train.py) -----

SLOW_STEPS = "import time; script.reward = lambda completion, answer: time.sleep(0.2) or len(set(completion)) / 10"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=slow)])
def test_a_second_signal_leaves_at_once(folder, number):
    with start(command("grpo", SLOW_STEPS.replace("0.2", "60"), run_name="a", num_steps=100)) as process:
        while not list(Path("runs").glob("a/events*")):
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None, "the first one lets the step finish"
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)  # the step would take minutes
    assert process.returncode == -number, said
    assert "once more to leave at once" in said


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


def test_a_full_disk_at_the_last_save_keeps_the_checkpoint_before(script, capsys):
    run(script, capsys, run_name="a", num_steps=2)
    with full_disk(50_000):  # the weights are larger
        said = run(script, capsys, 2, run_name="a", num_steps=4, resume="auto")
    assert "runs/a/step_000004 could not be saved" in said
    assert "Traceback" not in said
    assert steps("a") == ["step_000002"]
    assert not list(Path("runs/a").glob(".*"))
    run(script, capsys, run_name="a", num_steps=4, resume="auto")
    run(script, capsys, run_name="whole", num_steps=4)
    assert same_bits("runs/whole/policy", "runs/a/policy")


def test_a_full_disk_at_a_save_on_the_way_does_not_end_the_run(script, capsys, monkeypatch):
    # Full in steps 2 and 3, as the reward sees them: then somebody makes room.
    calls = itertools.count()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(completion: str, answer: str) -> float:
        step = next(calls) // 8
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if step in (1, 2) else before[0], before[1]))
        return variety(completion, answer)

    monkeypatch.setattr(script, "reward", filling)
    with full_disk(before[0]):
        said = run(script, capsys, run_name="a", save_every=1)
    for step in (2, 3):
        assert f"runs/a/step_00000{step} could not be saved" in said
    assert said.count("the run goes on") == 2
    assert steps("a") == ["step_000001", "step_000004"]
    assert not list(Path("runs/a").glob(".*"))
    monkeypatch.setattr(script, "reward", variety)
    run(script, capsys, run_name="whole")
    assert same_bits("runs/whole/policy", "runs/a/policy")


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
    said = run(script, capsys, run_name="a", num_steps=6, save_every=2)
    assert "the curves end here, the run goes on: [Errno 28] No space left on device" in said
    assert steps("a") == ["step_000004", "step_000006"]


def test_too_little_room_is_told_before_training(script, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    said = run(script, capsys, 2, run_name="a")
    assert "the run cannot be kept in runs/a: three checkpoints need" in said
    assert steps("a") == []


def test_a_folder_that_cannot_be_written_is_told_before_training(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "generate_completions", None)  # whoever samples fails
    monkeypatch.setattr(script, "sharing_is_exact", lambda *_: False)
    Path("runs").write_text("a file")
    said = run(script, capsys, 2, run_name="a")
    assert "the run cannot be kept in runs/a: " in said
    assert "Traceback" not in said
    monkeypatch.setattr(script, "TINY_STEPS", 2)
    said = run(script, capsys, 2, model="tiny", data=None, eval_data=None, num_prompts=4, max_new_tokens=8)
    assert "could not be saved" in said


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told_before_training(script, capsys):
    Path("runs").mkdir(mode=0o500)
    assert "the run cannot be kept in runs/a: " in run(script, capsys, 2, run_name="a")


# ----- Damaged checkpoints -----


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, altered, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(script, capsys, damage):
    run(script, capsys, run_name="whole", num_steps=3)
    run(script, capsys, run_name="kept", num_steps=2, save_every=1)
    newest = Path("runs/kept/step_000002")
    names = sorted(path.name for path in newest.iterdir())
    assert {"model.safetensors", "state.pt", "tokenizer.json", "config.json", "sha256.json"} < {*names}
    for name in names if CI else ["model.safetensors", "state.pt"][script is ppo :]:
        for place in ("runs/a", "runs/b"):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree("runs/kept", "runs/a", copy_function=shutil.copy2)
        damage(Path("runs/a/step_000002", name))
        said = run(script, capsys, 2, run_name="b", num_steps=3, resume="runs/a/step_000002")
        assert "runs/a/step_000002 cannot be loaded: " in said, name
        assert name in said or name == "sha256.json", said  # which says what is damaged, or is itself
        assert "no checkpoint that can be loaded; there is also runs/a/step_000001" in said
        said = run(script, capsys, run_name="a", num_steps=3, resume="auto")
        assert "runs/a/step_000002 cannot be loaded: " in said, name
        assert "going on from runs/a/step_000001" in said
        assert same_bits("runs/whole/policy", "runs/a/policy"), name
        assert "step_000003" in steps("a")


def test_when_no_checkpoint_is_good_the_run_does_not_start_anew(script, capsys):
    run(script, capsys, run_name="a", num_steps=2, save_every=1)
    for folder in Path("runs/a").glob("step_*"):
        truncated(folder / "state.pt")
    said = run(script, capsys, 2, run_name="a", num_steps=3, resume="auto")
    assert said.count("cannot be loaded: state.pt is damaged") == 2
    assert "--resume auto: no checkpoint that can be loaded" in said


# ----- A reward that fails -----

WRONG = {
    "raises": (ValueError("no"), "raised ValueError('no')"),
    "nan": (float("nan"), "returned nan"),
    "list": ([1.0], "raised TypeError"),
    "none": (None, "raised TypeError"),
    "infinite": (float("inf"), "returned inf"),
}


@pytest.mark.parametrize("wrong", ["raises", "nan", *(pytest.param(name, marks=slow) for name in [*WRONG][2:])])
@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_a_wrong_reward_stops_the_run_and_keeps_what_was_learned(script, capsys, monkeypatch, wrong, when):
    value, says = WRONG[wrong]
    run(script, capsys, run_name="whole", num_steps=4, eval_every=2)
    training = itertools.count()  # 8 completions in a step, 5 + 5 in an evaluation: 10, 8, 8, 10, 8, 8, 10
    bad = 10 + 8 + 8 + 3 if when == "evaluation" else 10 + 8 + 8 + 10 + 3

    def failing(completion: str, answer: str) -> float:
        if next(training) != bad:
            return variety(completion, answer)
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(script, "reward", failing)
    said = run(script, capsys, 2, run_name="a", num_steps=4, eval_every=2)
    assert f"the reward {says}" in said
    assert "2 steps are kept: go on with --run-name a --resume auto" in said
    assert "Traceback" not in said
    assert steps("a") == ["step_000002"]
    monkeypatch.setattr(script, "reward", variety)
    run(script, capsys, run_name="a", num_steps=4, eval_every=2, resume="auto")
    assert same_bits("runs/whole/policy", "runs/a/policy")


def test_a_wrong_reward_in_the_first_evaluation_is_a_sentence(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "reward", lambda completion, answer: None)
    said = run(script, capsys, 2, run_name="a", eval_every=2)
    assert "the reward raised TypeError" in said
    assert "is no finite number" in said


# ----- A gradient that is not finite -----


def spoil(monkeypatch, script, name: str, bad_steps) -> list:
    """Make the loss of that name NaN in those steps (counted from 1), and return the policies after every update."""
    policies, loss, update = [], getattr(script, name), script.optimizer_step
    step = itertools.count(1)
    current = [0]

    def counted(*args, **kwargs):
        current[0] = next(step)
        return seeded(*args, **kwargs)

    def spoiled(*args, **kwargs):
        value, per_token = loss(*args, **kwargs)
        return value * (torch.nan if current[0] in bad_steps else 1.0), per_token

    def recorded(model, *args):
        norm = update(model, *args)
        policies.append((current[0], [parameter.detach().clone() for parameter in model.parameters()]))
        return norm

    seeded = script.seed_step
    monkeypatch.setattr(script, "seed_step", counted)
    monkeypatch.setattr(script, name, spoiled)
    monkeypatch.setattr(script, "optimizer_step", recorded)
    return policies


LOSSES = {grpo: ["grpo_loss"], ppo: ["policy_loss", "value_loss"]}


@pytest.mark.parametrize("place", [0, 1], ids=["policy", "value"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(script, capsys, monkeypatch, place):
    if place and script is grpo:
        pytest.skip("has no value model")
    policies = spoil(monkeypatch, script, LOSSES[script][place], bad_steps={2})
    one_update = dict(num_minibatches=1, update_epochs=1)
    said = run(script, capsys, run_name="a", **one_update)
    assert said.count("step 2: the gradient was not finite") == 1
    prefix = "value" if place else "policy"
    assert curves("a")[f"{prefix}/skipped"] == [(1, 0.0), (2, 1.0), (3, 0.0), (4, 0.0)]
    if script is ppo:  # its value model is updated first, each time
        policies = policies[(1 - place) :: 2]
    _, second, third = (after for _, after in policies[:3])
    first = policies[0][1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(value.isfinite().all() for value in weights("runs/a/policy").values())


@pytest.mark.parametrize("place", [0, 1], ids=["policy", "value"])
def test_many_such_updates_in_a_row_stop_the_run_with_the_last_good_state(script, capsys, monkeypatch, place):
    if place and script is grpo:
        pytest.skip("has no value model")
    spoil(monkeypatch, script, LOSSES[script][place], bad_steps={2, 4, 5, 6, 7, 8})
    said = run(script, capsys, 2, run_name="a", num_steps=20)
    assert "the gradient was not finite in 5 steps in a row" in said
    assert "8 steps are kept: go on with --run-name a --resume auto" in said
    assert "Traceback" not in said
    assert steps("a") == ["step_000008"]
    assert all(value.isfinite().all() for value in weights("runs/a/step_000008").values())
    state = torch.load("runs/a/step_000008/state.pt", weights_only=True)
    moments = [x for s in state["optimizer"]["state"].values() for x in s.values()]
    assert all(torch.as_tensor(x).isfinite().all() for x in moments)


# ----- Memory -----


def test_out_of_memory_names_the_flags_that_help(script, capsys, monkeypatch):
    update, calls = script.optimizer_step, itertools.count()

    def full(*args):
        if next(calls) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return update(*args)

    monkeypatch.setattr(script, "optimizer_step", full)
    said = run(script, capsys, 2, run_name="a", save_every=1, num_steps=20)
    for flag in ("--micro-batch-tokens", "--num-prompts", "--group-size", "--gradient-checkpointing"):
        assert flag in said
    assert "Traceback" not in said
    kept = steps("a")[-1]
    monkeypatch.setattr(script, "optimizer_step", update)
    # Those that do not change the result may be lowered on the way.
    lower = dict(micro_batch_tokens=20, gradient_checkpointing=True)
    said = run(script, capsys, run_name="a", resume="auto", num_steps=12, **lower)
    assert f"going on from runs/a/{kept}" in said
