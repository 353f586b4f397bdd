# SPDX-License-Identifier: MIT
"""Several processes under torchrun, on the CPU with gloo and FSDP2: they train as one would, and end together."""

import contextlib
import json
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fully_shard

import grpo
import ppo
from helpers.runs import SMALL, command, curves, finish, make_folder, saved, start, weights

pytestmark = pytest.mark.slow

SEVERAL = dict(micro_batch_tokens=30)  # less than a group takes
CASES = {  # name: (script, folder of the model, arguments)
    "several": ("both", "model", SEVERAL),
    "one_micro_batch": ("both", "model", {}),
    "alone": ("both", "model", dict(micro_batch_tokens=1, share_prompt=False)),
    "token": ("both", "model", SEVERAL | dict(loss_average="token", gradient_checkpointing=True)),
    "constant": ("both", "gpt2", SEVERAL | dict(loss_average="constant")),
    "few_teach": ("grpo", "model", SEVERAL | dict(beta=0.0, group_size=2)),
    "none_teaches": ("grpo", "model", SEVERAL | dict(beta=0.0, max_new_tokens=1)),
    "no_kl": ("ppo", "model", SEVERAL | dict(beta=0.0)),
    "minibatches": ("both", "model", dict(num_minibatches=2, num_prompts=12, kl_placement="reward", beta=1.0)),
}
COMMON = SMALL | dict(num_prompts=6, group_size=4, micro_batch_tokens=40, update_epochs=2, num_minibatches=1)
COMMON |= dict(eval_data="held_out.jsonl")
TRAIN = COMMON | dict(eval_every=2)
OWN = {grpo: dict(ref_refresh_every=2), ppo: dict(value_warmup_steps=1, adaptive_kl_target=0.01)}


class Enough(Exception):
    pass


def some_pay(completion: str, problem: dict) -> float:
    """Many pay alike here, so that there are groups whose gradient is 0."""
    return float(len(completion) > 1 and "1" in completion)


def work(number: int) -> None:
    """All that needs several processes and no fault, in one launch: starting them costs more than what they do.

    gradients    one step of every case, up to the first update of the policy, whose gradient is written down
    together     4 steps
    half         2 steps, with which another number of processes goes on
    """
    torch.set_num_threads(1)
    _fully_shard._init_default_mesh = None  # with a GPU it would be that of CUDA, whatever --device says
    for module in (grpo, ppo):
        module.reward, update = some_pay, module.optimizer_step
        for name, (only, model, choices) in CASES.items():
            if only in (module.__name__, "both"):
                own = dict(value_warmup_steps=0) if module is ppo else {}
                args = COMMON | dict(model=model, run_name=f"{module.__name__}_{name}_{number}") | own | choices
                module.optimizer_step, gradients = recorder(module)
                with contextlib.suppress(Enough):
                    module.train(module.Args(**args))
                if module.world()[0] == 0:
                    torch.save(gradients, f"{module.__name__}_{name}_{number}.pt")
        module.optimizer_step = update
        args = TRAIN | OWN[module]
        for name, steps in (("together", 4), ("half", 2)):
            module.train(module.Args(**args | dict(run_name=f"{module.__name__}_{name}_{number}", num_steps=steps)))
        if number == 2:
            module.train(module.Args(**args, run_name=f"{module.__name__}_half_1", resume="auto"))


def recorder(module) -> tuple:
    """In place of `optimizer_step`, and where it writes the gradients that come to it: the policy's come last."""
    gradients = {}

    def record(model, optimizer, max_grad_norm):
        gradients.update({f"{len(gradients)} {n}": module.full_tensor(p.grad) for n, p in model.named_parameters()})
        if hasattr(model, "lm_head"):
            raise Enough

    return record, gradients


WORK = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_processes

if __name__ == "__main__":
    test_processes.work(int(os.environ["WORLD_SIZE"]))
    os._exit(0)  # the steps that were broken off leave FSDP's threads behind
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """The folder in which one process and several have done the same."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder, "gpt2")
        (folder / "model").rename("gpt2")
        make_folder(folder)
        held_out = (folder / "data.jsonl").read_text().splitlines(keepends=True)[:25]  # one more than in a batch
        (folder / "held_out.jsonl").write_text("".join(held_out))
        for module in (grpo, ppo):
            for name in ("reward", "optimizer_step"):
                patch.setattr(module, name, getattr(module, name))  # `work` changes them
        work(1)
        for processes in (2, 3):
            run = command("grpo", WORK, processes=processes)
            finish(start(run[: 1 + next(i for i, part in enumerate(run) if part.startswith("driver"))]))
        time.sleep(1)  # TensorBoard orders the files of a run by the second in their names
        for module in (grpo, ppo):
            args = TRAIN | OWN[module]
            module.train(module.Args(**args, run_name=f"{module.__name__}_half_2", resume="auto"))
    return folder


@pytest.fixture
def there(found, monkeypatch):
    monkeypatch.chdir(found)


both = pytest.mark.parametrize("name", ["grpo", "ppo"])
all_cases = [(name, case) for case, (only, *_) in CASES.items() for name in ("grpo", "ppo") if only in (name, "both")]


@pytest.mark.parametrize(("name", "case"), all_cases)
@pytest.mark.parametrize("processes", [2, 3])
def test_the_gradient_is_that_of_one_process(there, name, case, processes):
    one, all_of_them = (torch.load(f"{name}_{case}_{number}.pt", weights_only=True) for number in (1, processes))
    assert one.keys() == all_of_them.keys()
    largest = max(gradient.abs().max() for gradient in one.values())
    assert largest == 0 if case == "none_teaches" else largest > 1e-3
    for parameter, gradient in one.items():
        torch.testing.assert_close(all_of_them[parameter], gradient, rtol=1e-5, atol=1e-5 * float(largest))


def assert_trained_alike(first: str, second: str) -> None:
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
@pytest.mark.parametrize("processes", [2, 3])
def test_training_goes_as_in_one_process(there, name, processes):
    assert_trained_alike(f"{name}_together_1", f"{name}_together_{processes}")


@both
def test_it_is_logged_evaluated_and_saved_once(there, name):
    run_name = f"{name}_together_2"
    assert len(list(Path(f"runs/{run_name}").glob("events*"))) == 1
    assert [step for step, _ in curves(run_name)["reward/mean"]] == [0, 1, 2, 3]
    assert [step for step, _ in curves(run_name)["eval/greedy"]] == [0, 2, 4]
    assert saved(run_name)["step"] == 4
    config = json.loads(Path(f"runs/{run_name}/policy/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    files = {path.name for path in Path(f"runs/{name}_together_1/policy").iterdir()}
    assert {path.name for path in Path(f"runs/{run_name}/policy").iterdir()} == files


@both
@pytest.mark.parametrize("began", [1, 2])
def test_another_number_of_processes_goes_on(there, name, began):
    assert_trained_alike(f"{name}_together_1", f"{name}_half_{began}")


# ----- They end together -----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)


RANK = "int(os.environ['RANK'])"
# 8 completions a step, half of them for each process: the third step.
REWARD = """
import itertools
calls, good = itertools.count(), script.reward
script.reward = lambda *texts: 1 / 0 if {RANK} == {rank} and next(calls) == 10 else good(*texts)
"""
UPDATE = """
update = script.optimizer_step
def step(*args):
    if {RANK} == 1:
        {fail}
    return update(*args)
script.optimizer_step = step
"""
# The process that writes takes its time: when one of several has left, torchrun kills the others within 30 s.
SLOW_SAVE = """
sync, leave, show = os.fsync, os._exit, sys.excepthook
# In one write, because both processes write to one pipe.
there = lambda: os.write(1, f"left before the checkpoint: {not os.path.exists('runs/a/checkpoint.pt')}\\n".encode())
os.fsync = lambda file: (time.sleep(1), sync(file))
os._exit = lambda code: (there(), leave(code))
sys.excepthook = lambda *error: (there(), show(*error))
"""
FAILS = {
    # One of them finds a reward that fails: all keep what was learned.
    "reward of the first": REWARD.format(RANK=RANK, rank=0) + SLOW_SAVE,
    "reward of the second": REWARD.format(RANK=RANK, rank=1) + SLOW_SAVE,
    # One of them fails in another way, or is killed: the others do not wait for it for ever.
    "raises": UPDATE.format(RANK=RANK, fail="raise torch.OutOfMemoryError('CUDA out of memory')"),
    "killed": UPDATE.format(RANK=RANK, fail="os.kill(os.getpid(), signal.SIGKILL)"),
}


# The plumbing of ppo.py is the same text.
@pytest.mark.parametrize("fails", FAILS)
def test_when_one_process_fails_all_end(folder, fails):
    began = time.monotonic()
    said = finish(start(command("grpo", FAILS[fails], processes=2, run_name="a")), code=1)
    assert time.monotonic() - began < 150
    if "reward" in fails:
        assert "ZeroDivisionError: division by zero" in said
        assert "the reward failed in another process" in said
        assert saved("a")["step"] == 2
        assert said.count("left before the checkpoint: False") == 2
    if fails == "raises":
        assert "torch.OutOfMemoryError: CUDA out of memory" in said


SLOW = "script.reward = lambda completion, problem: time.sleep(0.05) or len(set(completion)) / 10"


def test_sigterm_to_torchrun_finishes_the_step_and_saves(folder):
    with start(command("grpo", SLOW, processes=2, run_name="a", num_steps=1000, save_every=1)) as process:
        while not Path("runs/a/policy/model.safetensors").exists():
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=100)
    assert "finishing this step, then saving" in said
    assert "to resume, run the same command with --run-name a --resume auto" in said
    assert [step for step, _ in curves("a")["reward/mean"]] == [*range(saved("a")["step"])]


def test_two_hosts_train_together(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    run = command("grpo", processes=1, run_name="a", num_steps=2, eval_every=1)
    hosts = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    run = [part for part in run if part != "--standalone"]
    run[3:3] = hosts
    first, second = start(run), start(run)
    said = finish(first) + finish(second)
    assert said.count("trained model after 2 steps: runs/a/policy") == 1
    assert [step for step, _ in curves("a")["eval/greedy"]] == [0, 1, 2]
