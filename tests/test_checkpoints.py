# SPDX-License-Identifier: MIT
"""What can go wrong in a run, done to it: it is killed, resumed with something changed, its disk is full, its reward
fails, its gradient is not finite. In the folder of every test are model/, data.jsonl, runs/whole, a run of 4 steps to
which nothing has happened, and runs/half, the same one stopped after 2; a test's own run is runs/a."""

import contextlib
import math
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import grpo
import helpers.runs
import ppo
from helpers.runs import Forked, assert_same_run, command, curves, finish, make_folder, saved, variety

CHECKPOINT, ASIDE, HALF = map(Path, ("runs/a/checkpoint.pt", "runs/a/checkpoint.aside", "runs/half/checkpoint.pt"))
arguments = partial(helpers.runs.arguments, eval_every=2)
only_grpo = pytest.mark.parametrize("prepared", [grpo], indirect=True)


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


def run(script, **args: object) -> None:
    script.main(arguments(script, **args))


@pytest.mark.slow
def test_main_killed_again_and_again_ends_as_never_killed(script):
    """Before the first checkpoint, between saves and inside them: the checkpoint and the curves have the same bits."""
    kills, inside = 10, 0
    args = dict(num_steps=2 * kills + 2, save_every=1, eval_every=3, beta=0.05)
    args |= dict(adaptive_kl_target=0.01, value_warmup_steps=5) if script is ppo else dict(ref_refresh_every=4)
    run(script, run_name="never_killed", **args)
    time_of_save = lambda: CHECKPOINT.stat().st_mtime_ns if CHECKPOINT.exists() else 0
    again = command(script.__name__, run_name="a", resume=True, **args)
    for kill in range(kills):
        with Forked(again) as process:
            process.wait_until(Path("runs/a").exists)
            if kill:  # the first one comes before there is a checkpoint
                before = time_of_save()
                process.wait_until(lambda before=before: time_of_save() != before)
            if kill % 2:  # inside a save
                process.wait_until(ASIDE.exists)
            time.sleep(random.choice([0, 0.001, 0.1]))
            process.kill()
            inside += ASIDE.exists()
    finish(Forked(again))
    assert inside, "no kill came inside a save"
    assert_same_run("never_killed", "a")


def test_log_is_on_disk_before_the_checkpoint_of_its_step(script, monkeypatch):
    """A kill between the two left a hole in the curves."""
    append, save, on_disk = LocalFileSystem.append, torch.save, []
    # TensorBoard writes in a thread of its own, which falls behind here.
    monkeypatch.setattr(LocalFileSystem, "append", lambda *args, **more: time.sleep(0.005) or append(*args, **more))
    monkeypatch.setattr(torch, "save", lambda *args, **how: on_disk.append(curves("a")) or save(*args, **how))
    run(script, num_steps=3, save_every=1, eval_every=0)
    assert [{*map(len, points.values())} for points in on_disk] == [set(), {1}, {2}, {3}]  # every curve has all steps


def test_rollout_draws_other_numbers_in_each_step_and_process(script, monkeypatch):
    """Both of two processes would sample the same completions of one prompt. The reward draws, too."""
    draws, pairs = [], [([1, 2, 3], {})] * 2
    generate = lambda *inputs: draws.extend([torch.rand(()).item(), random.random()]) or 1 / 0
    monkeypatch.setattr(script, "generate_completions", generate)
    for step, rank in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        monkeypatch.setattr(script, "world", lambda rank=rank: (rank, 2))
        with pytest.raises(ZeroDivisionError):
            script.rollout(None, pairs, step, script.Args(), None, torch.tensor([0]))
    assert len(set(draws)) == 2 * 4


def test_train_that_stops_after_every_step_ends_with_the_same_bits(script, monkeypatch, capsys):
    """As one that never stopped. Through the value warm-up, in which the policy's optimizer has no state yet; beta and
    the reference move, the sampler is a copy, and the reward draws random numbers."""
    monkeypatch.setattr(script, "reward", lambda *texts: variety(*texts) + random.random() / 100)
    options = dict(dtype="bfloat16", beta=0.05)
    if script is ppo:
        options |= dict(value_warmup_steps=2, adaptive_kl_target=0.01, penalty_kl_target=1.0)
    else:
        options |= dict(ref_refresh_every=2, update_epochs=2)
    run(script, run_name="never_stopped", **options)
    for n in (1, 2, 3, 4):
        run(script, num_steps=n, save_every=1, resume=True, **options)
        assert f"step {n - 1} of {n}, in " in capsys.readouterr().err
    assert_same_run("never_stopped", "a")
    betas = saved("a")["betas"]
    assert script is grpo or (betas["ref"] != 0.05 and betas["old"] != 1.0)


@only_grpo
def test_save_before_the_first_update(script, monkeypatch):
    """AdamW has no state yet. torch's get_state_dict made one, which counted a step that never was."""
    monkeypatch.setattr(script, "reward", lambda *texts: 1.0)
    run(script, num_steps=2, beta=0)  # no reward is better than another, so there is no gradient, and no update
    monkeypatch.setattr(script, "reward", variety)
    run(script, resume=True, beta=0)
    assert {state["step"].item() for state in saved("a")["policy"][1]["state"].values()} == {2}


def test_load_of_a_parameter_that_never_has_a_gradient(script, monkeypatch):
    """AdamW has no state for it, which torch refused to load."""
    load = script.load_policy

    def with_unused(*args):
        policy = load(*args)
        policy.unused = torch.nn.Parameter(torch.ones(2))
        return policy

    monkeypatch.setattr(script, "load_policy", with_unused)
    run(script, num_steps=2)
    run(script, resume=True)
    assert curves("a") == curves("whole")


def test_load_says_which_flags_differ_and_goes_on(script, capsys):
    """The model may lie elsewhere now. A changed learning rate was listed, but the checkpoint's was used."""
    Path("model").rename("moved")
    run(script, run_name="half", resume=True, model="moved", micro_batch_tokens=20, num_steps=3, learning_rate=0.002)
    said = capsys.readouterr().err
    flags = "model (was model), num_steps (was 2), learning_rate (was 0.001), micro_batch_tokens (was 8192)"
    assert f"with other flags: {flags}" in said
    assert "learning rate 0.002, step 2 of 3" in said


def test_load_refuses_another_model_and_half_a_file_and_nothing_is_written_over(script, monkeypatch):
    monkeypatch.setattr(script, "rollout", None)  # whoever trains fails
    whole_file = HALF.read_bytes()
    for family, content, resume, says in [
        ("gpt2", whole_file, True, "checkpoint.pt cannot be loaded: it belongs to another model"),
        ("qwen2", whole_file, True, "checkpoint.pt cannot be loaded: it belongs to another model"),  # has more weights
        ("llama", whole_file[:-1], True, "checkpoint.pt cannot be loaded: "),
        ("llama", whole_file, False, "runs/half (to go on with a run: --resume): "),
    ]:
        make_folder(Path(), family)
        HALF.write_bytes(content)
        with pytest.raises(SystemExit) as error:
            run(script, run_name="half", resume=resume)
        assert says in error.value.code
        assert HALF.read_bytes() == content


WRONG = [  # what compute_rewards returns or raises for n completions, and what the run ends with
    (lambda n: 1 / 0, ZeroDivisionError, "division by zero"),
    (lambda n: sys.exit(), RuntimeError, "compute_rewards called for an exit"),
    (lambda n: [math.nan] * n, ValueError, r"must return [58] finite numbers, got \[nan"),
    (lambda n: [-1e39] * n, ValueError, r"must return [58] finite numbers, got \[-inf"),  # in float32
    (lambda n: [1.0] * (n + 1), ValueError, "must return [58] finite numbers"),
]


def write_half(content: dict, path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("first_wrong", [1, 2], ids=["evaluation", "training"])  # an evaluation calls for them twice
def test_a_run_whose_reward_fails_or_whose_disk_is_full_goes_on_from_its_checkpoint(script, monkeypatch, first_wrong):
    """Code that the reward ran called exit(): the run ended with exit code 0, and nothing was said."""
    compute, before = script.compute_rewards, HALF.read_bytes()
    for wrong, error, says in WRONG:
        calls = iter([compute] * first_wrong + [lambda texts, problems, wrong=wrong: wrong(len(texts))])
        monkeypatch.setattr(script, "compute_rewards", lambda *inputs, calls=calls: next(calls)(*inputs))
        with pytest.raises(error, match=says):
            run(script, run_name="half", resume=True, save_every=3)
    monkeypatch.setattr(script, "compute_rewards", compute)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_half)
        with pytest.raises(OSError, match="No space left on device"):
            run(script, run_name="half", resume=True)
    assert HALF.read_bytes() == before
    run(script, run_name="half", resume=True)
    assert_same_run("whole", "half")


def test_optimizer_step_skips_a_gradient_that_is_not_finite_and_log_step_says_so(script, monkeypatch, capsys):
    """Two updates a step: the first one of step 1 and both of step 2 are spoiled."""
    loss, model = ("grpo_loss", "policy") if script is grpo else ("value_loss", "value_model")
    compute, factors = getattr(script, loss), iter([1, 1, math.nan, 1, math.inf, math.nan, 1, 1])

    def spoiled(*args) -> tuple:
        loss, per_token = compute(*args)
        return loss * next(factors), per_token

    monkeypatch.setattr(script, loss, spoiled)
    run(script, num_minibatches=2, update_epochs=1)
    said = capsys.readouterr().err
    for step, skipped in enumerate([0, 1, 2, 0]):
        assert (f"step {step}: the gradient was not finite, so its update was skipped" in said) == (skipped > 0)
        assert curves("a")[f"{model.partition('_')[0]}/skipped"][step] == (step, skipped)
    weights, optimizer = saved("a")[model]
    assert all(value.isfinite().all() for value in weights.values())
    assert {state["step"].item() for state in optimizer["state"].values()} == {8 - 3}


# ----- Signals, in a process of its own (see also test_training.py). The text is the same in both scripts. -----


@pytest.mark.slow
@only_grpo
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_main_leaves_at_once_at_a_second_signal(script, number):
    step_of_minutes = "script.reward = lambda *texts: print('rewarding', flush=True) or time.sleep(60)"
    with Forked(command("grpo", step_of_minutes, run_name="a")) as process:
        for text in ("rewarding", "finishing this step, then saving; a second signal exits at once"):
            process.wait_until(lambda text=text: text in process.output.read_text())
            assert process.is_alive()
            os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode == -number


@pytest.mark.slow
@only_grpo
def test_main_lets_a_process_that_a_reward_forks_be_terminated(script):
    """It had inherited the handler of SIGTERM, which asks a run to finish its step: join() hung for ever."""
    runs_code = """
import multiprocessing
def reward(completion, problem):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.join(0.2)
    child.terminate()
    child.join(20)
    child.kill()
    assert child.exitcode == -signal.SIGTERM
    return 0.0
script.reward = reward
"""
    finish(helpers.runs.start(command("grpo", runs_code, run_name="a", num_prompts=1, num_steps=1)))
