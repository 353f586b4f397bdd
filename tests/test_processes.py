# SPDX-License-Identifier: MIT
"""Several processes, as torchrun starts them, on the CPU with gloo and FSDP2: they train as one would, and end
together. Most tests start them without torchrun: then each has an output and an exit code of its own."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fully_shard
from transformers import AutoModelForCausalLM

import grpo
import ppo
from helpers.runs import SMALL, Forked, command, curves, finish, make_folder, saved, start, weights
from tools import sweep_families

pytestmark = pytest.mark.slow

COMMON = SMALL | dict(
    num_prompts=6, group_size=4, micro_batch_tokens=30, update_epochs=2, num_minibatches=1, eval_data="held_out.jsonl"
)  # fmt: skip
TRAIN = COMMON | dict(num_steps=3, eval_every=3)
OWN = {grpo: dict(ref_refresh_every=2), ppo: dict(value_warmup_steps=1, adaptive_kl_target=0.01)}
CASES = {  # several micro-batches a process, where not even one group fits into one
    "several": {},
    "minibatches": dict(micro_batch_tokens=40, num_minibatches=2, num_prompts=12, kl_placement="reward", beta=1.0),
    "token": dict(micro_batch_tokens=1, share_prompt=False, loss_average="token", gradient_checkpointing=True),
    "constant": dict(model="gpt2", loss_average="constant"),
}
CASES = {
    grpo: CASES | dict(few_teach=dict(beta=0.0, group_size=2), none_teaches=dict(beta=0.0, max_new_tokens=1)),
    ppo: CASES | dict(no_kl=dict(beta=0.0)),
}
OF_THREE = ["several", "minibatches"]  # the cases that three processes try, too


class Enough(Exception):
    pass


def some_pay(completion: str, problem: dict) -> float:
    """Many pay alike here, so that there are groups whose gradient is 0."""
    return float(len(completion) > 1 and "1" in completion)


def work(number: int) -> None:
    """All that one, two and three processes must do alike, in one launch.

    gradients    one step of every case, up to the first update of the policy, whose gradient is written down
    together     3 steps
    half         2 steps, with which another number of processes goes on
    unnamed      a run without a name; each process writes down what it returns
    """
    torch.set_num_threads(1)
    _fully_shard._init_default_mesh = None  # with a GPU it would be that of CUDA, whatever --device says
    for module in (grpo, ppo):
        module.reward, update, script = some_pay, module.optimizer_step, module.__name__
        for name, choices in CASES[module].items():
            if number < 3 or name in OF_THREE:
                own = dict(value_warmup_steps=0) if module is ppo else {}
                module.optimizer_step, gradients = recorder(module)
                with contextlib.suppress(Enough):
                    module.train(module.Args(**COMMON | own | choices, run_name=f"{script}_{name}_{number}"))
                if module.world()[0] == 0:
                    torch.save(gradients, f"{script}_{name}_{number}.pt")
        module.optimizer_step = update
        args = TRAIN | OWN[module]
        module.train(module.Args(**args, run_name=f"{script}_together_{number}"))
        if number < 3:
            module.train(module.Args(**args | dict(num_steps=2), run_name=f"{script}_half_{number}"))
        if number == 2:
            module.train(module.Args(**args, run_name=f"{script}_half_1", resume=True))
            folder = module.train(module.Args(**COMMON | dict(num_steps=1)))
            Path(f"{script}_unnamed_{module.world()[0]}").write_text(str(folder))


def recorder(module) -> tuple:
    """In place of `optimizer_step`, and where it writes the gradients that come to it: the policy's come last."""
    gradients = {}

    def record(model, optimizer, max_grad_norm):
        gradients.update({f"{len(gradients)} {n}": module.full_tensor(p.grad) for n, p in model.named_parameters()})
        if hasattr(model, "lm_head"):
            raise Enough

    return record, gradients


def processes(*commands: list[str], number: int = 0) -> list[Forked]:
    """One for each command: all of them, or the first of this number."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    common["WORLD_SIZE"] = str(number or len(commands))
    return [Forked(x, RANK=str(i), LOCAL_RANK=str(i), **common) for i, x in enumerate(commands)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder in which one process and several have done the same."""
    folder = tmp_path_factory.mktemp("processes")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        make_folder(folder, "gpt2")
        Path("model").rename("gpt2")
        make_folder(folder)
        held_out = Path("data.jsonl").read_text().splitlines(keepends=True)[:25]  # one more than in a batch
        Path("held_out.jsonl").write_text("".join(held_out))
        for module in (grpo, ppo):
            for name in ("reward", "optimizer_step"):
                patch.setattr(module, name, getattr(module, name))  # `work` changes them
        work(1)
        for number in (2, 3):
            # The steps that were broken off leave FSDP's threads behind.
            Path("work.py").write_text(f"import os, test_processes\ntest_processes.work({number})\nos._exit(0)")
            for process in processes(*[[sys.executable, "work.py"]] * number):
                finish(process)
        time.sleep(1)  # TensorBoard orders the files of a run by the second in their names
        for module in (grpo, ppo):
            args = TRAIN | OWN[module]
            module.train(module.Args(**args, run_name=f"{module.__name__}_half_2", resume=True))
    return folder


@pytest.fixture
def in_trained(trained, monkeypatch):
    monkeypatch.chdir(trained)


both = pytest.mark.parametrize("script", ["grpo", "ppo"])
all_cases = [(number, module.__name__, case) for module in (grpo, ppo) for number in (2, 3)
             for case in (CASES[module] if number == 2 else OF_THREE)]  # fmt: skip


@pytest.mark.parametrize(("number", "script", "case"), all_cases)
def test_the_gradient_is_that_of_one_process(in_trained, number, script, case):
    """Of two and of three processes, at the policy's first update, up to rounding. `work` has written the files."""
    one, all_of_them = (torch.load(f"{script}_{case}_{n}.pt", weights_only=True) for n in (1, number))
    assert one.keys() == all_of_them.keys()
    largest = max(gradient.abs().max() for gradient in one.values())
    assert largest == 0 if case == "none_teaches" else largest > 1e-3
    for name, gradient in one.items():
        torch.testing.assert_close(all_of_them[name], gradient, rtol=1e-5, atol=1e-5 * float(largest))


@both
@pytest.mark.parametrize("run", ["together_2", "together_3", "half_1", "half_2"])
def test_training_goes_as_in_one_process_also_where_another_number_goes_on(in_trained, script, run):
    first, second = f"{script}_together_1", f"{script}_{run}"
    before, one, two = weights("model"), weights(f"runs/{first}/policy"), weights(f"runs/{second}/policy")
    for name, value in one.items():
        assert (value - before[name]).abs().max() > 1e-3, name
        # Where a gradient is 0 but for rounding, AdamW's step is its sign.
        assert ((two[name] - value).abs() > 1e-5).float().mean() < 0.02, name
    one, two = curves(first), curves(second)
    assert one.keys() == two.keys()
    for tag, points in one.items():
        assert [step for step, _ in points] == [step for step, _ in two[tag]], tag
        assert [value for _, value in two[tag]] == pytest.approx([v for _, v in points], rel=1e-3, abs=1e-4), tag


@both
def test_it_is_logged_evaluated_and_saved_once_in_a_folder_that_all_know(in_trained, script):
    """A run without a name was trained by two processes: in one, `train` returned a folder that is not there."""
    one, two = (Path(f"runs/{script}_together_{number}") for number in (1, 2))
    assert len([*two.glob("events*")]) == 1
    assert [step for step, _ in curves(two.name)["reward/mean"]] == [0, 1, 2]
    assert [step for step, _ in curves(two.name)["eval/greedy"]] == [0, 3]
    assert saved(two.name)["step"] == 3
    assert json.loads((two / "policy/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert {path.name for path in (two / "policy").iterdir()} == {path.name for path in (one / "policy").iterdir()}
    first, second = (Path(f"{script}_unnamed_{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert Path(first, "model.safetensors").exists()


# ----- They end together. The plumbing of ppo.py is the same text. -----


@pytest.fixture
def folder(tmp_path, monkeypatch) -> None:
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)


def assert_refused_once(started: list[Forked]) -> str:
    """All end with exit code 2, and together they say one sentence, which is returned."""
    said = "".join(finish(process, code=2) for process in started)
    sentences = [line for line in said.splitlines() if line.startswith("grpo.py: ")]
    assert len(sentences) == 1, said
    assert "Traceback" not in said
    return sentences[0]


def test_processes_that_were_given_different_things_are_refused(folder):
    """Two hosts had different files under one name: each process scored the other's completions behind its own
    prompts, or trained a mixture of two models."""
    shutil.copytree("model", "other/model")
    other = AutoModelForCausalLM.from_pretrained("model")
    other.lm_head.weight.data[0, 0] += 0.001
    other.save_pretrained("other/model")
    Path("other/data.jsonl").write_text(Path("data.jsonl").read_text().replace('"prompt": "', '"prompt": "1'))
    there = command("grpo", "os.chdir('other')", run_name="a", temperature=0.5)
    sentence = assert_refused_once(processes(command("grpo", run_name="a"), there))
    names = "hash of the held-out problems, hash of the model, hash of the problems, temperature"
    assert f"the processes do not agree on: {names}" in sentence
    assert not [*Path().rglob("checkpoint.pt")]


def test_what_one_process_finds_wrong_all_end_with(folder):
    """A host lacked a file, or the name of a run was taken: one process said so, and the others failed for reasons of
    their own, with a traceback."""
    run, lacking = command("grpo", run_name="a"), command("grpo", run_name="a", data="nothing.jsonl")
    assert "cannot read nothing.jsonl" in assert_refused_once(processes(run, lacking))
    Path("runs/a").mkdir(parents=True)
    assert "cannot write the run to runs/a" in assert_refused_once(processes(run, run))


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_a_model_whose_layers_share_weights_is_trained_by_several_processes_or_refused(folder, family):
    """Zamba's layers hold layers that are shared: sharding them one by one was a TypeError."""
    sweep_families.make_model(family, 0.1, {}).save_pretrained("model")
    started = processes(*[command("grpo", run_name="a", num_steps=2)] * 2)
    said = "".join(process.communicate(timeout=300)[0] for process in started)
    assert {process.returncode for process in started} in ({0}, {2}), said
    assert "Traceback" not in said


def test_a_process_that_waits_for_the_others_says_so_and_can_be_ended(folder):
    """The variables of torchrun were left in a shell: nothing was printed, and Ctrl-C did nothing."""
    run = command("grpo", run_name="a")
    for number in (signal.SIGINT, signal.SIGTERM):
        (process,) = processes(run, number=2)
        with process:
            process.wait_until_it_says("waiting for 2 processes at 127.0.0.1:")
            time.sleep(1)
            os.kill(process.pid, number)
            process.join(10)
        assert process.exitcode == -number


def test_a_process_gives_up_waiting_for_the_others_in_a_sentence(folder):
    """It waited for two hours for a process that had never been started."""
    soon = """
from datetime import timedelta
script.timedelta = lambda **time: timedelta(seconds=3) if timedelta(**time) < timedelta(hours=1) else timedelta(**time)
"""
    sentence = assert_refused_once(processes(command("grpo", soon, run_name="a"), number=2))
    assert "cannot join the other processes, which torchrun starts: " in sentence


SLOW = "script.reward = lambda completion, problem: time.sleep(0.1) or len(set(completion)) / 10"
# In the third step, as 8 completions a step are 4 for each process. The first takes its time to save: when one process
# has left, torchrun kills the others.
FAILS = """
import itertools
calls, good, sync = itertools.count(), script.reward, os.fsync
script.reward = lambda *texts: {fail} if os.environ["RANK"] == "{rank}" and next(calls) == 10 else good(*texts)
os.fsync = lambda file: time.sleep(1) or sync(file)
"""


@pytest.mark.parametrize(("rank", "fail"), [(0, "1 / 0"), (1, "1 / 0"), (1, "sys.exit()")])
def test_a_reward_that_fails_in_one_process_ends_all_when_they_have_saved(folder, rank, fail):
    """sys.exit() in the reward of one of two processes: the other one ended in a traceback of gloo."""
    started = processes(*[command("grpo", FAILS.format(rank=rank, fail=fail), run_name="a")] * 2)
    wait([process.sentinel for process in started], timeout=100)
    assert saved("a")["step"] == 2, "the first to leave left before all was saved"
    other, failed = finish(started[1 - rank], code=2), finish(started[rank], code=1)
    assert ("the reward failed in another process" in other) == (rank == 1)  # process 0 says what all end with
    assert ("SystemExit" if "exit" in fail else "ZeroDivisionError: division by zero") in failed
    assert "gloo" not in other + failed


def test_a_signal_to_one_process_lets_all_finish_the_step_and_save(folder):
    each = command("grpo", SLOW, run_name="a", num_steps=1000)
    first, second = processes(each, each)
    first.wait_until(lambda: Path("runs/a").exists() and "reward/mean" in curves("a"))
    os.kill(second.pid, signal.SIGTERM)
    said = finish(first) + finish(second)
    assert said.count("to resume, run the same command with --run-name a --resume auto") == 1
    assert [step for step, _ in curves("a")["reward/mean"]] == [*range(saved("a")["step"])]


def test_when_one_process_is_killed_the_other_does_not_wait_for_ever(folder):
    killed = "script.optimizer_step = lambda *args: os.kill(os.getpid(), signal.SIGKILL)"
    first, second = processes(command("grpo", run_name="a"), command("grpo", killed, run_name="a"))
    finish(second, code=-signal.SIGKILL)
    first.join(100)
    assert first.exitcode == 1


def test_under_torchrun_an_error_of_one_process_ends_all_and_is_shown(folder):
    raises = """
def step(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")
if os.environ["RANK"] == "1":
    script.optimizer_step = step
"""
    said = finish(start(command("grpo", raises, processes=2, run_name="a")), code=1)
    assert "torch.OutOfMemoryError: CUDA out of memory" in said


def test_two_hosts_train_together_until_sigterm_finishes_the_step_and_saves(folder):
    """torchrun kills its processes 30 seconds after it was told to end: the step had not been saved."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    run = command("grpo", SLOW, processes=1, run_name="a", num_steps=1000, eval_every=1000)
    run[run.index("--standalone")] = f"--rdzv-endpoint={endpoint}"
    run[3:3] = ["--nnodes=2", "--rdzv-backend=c10d"]
    with start(run) as first, start(run) as second:
        while not Path("runs/a/completions.jsonl").exists() or len(curves("a").get("reward/mean", [])) < 2:
            time.sleep(0.1)
            assert first.poll() is second.poll() is None
        for host in (first, second):
            host.send_signal(signal.SIGTERM)
        said = "".join(host.communicate(timeout=100)[0] for host in (first, second))
    assert "finishing this step, then saving" in said
    assert "--shutdown-timeout" in said
    assert said.count("to resume, run the same command with --run-name a --resume auto") == 1
    assert [step for step, _ in curves("a")["eval/greedy"]] == [0]
    assert [step for step, _ in curves("a")["reward/mean"]] == [*range(saved("a")["step"])]
