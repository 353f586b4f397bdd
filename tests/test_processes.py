# SPDX-License-Identifier: MIT
"""Several processes, as torchrun starts them, on the CPU with gloo and FSDP2: they train as one would, and end
together. The later tests start them without torchrun: then each has an output and an exit code of its own."""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import grpo
import ppo
from helpers.runs import SMALL, Forked, arguments, command, curves, finish, leaves, make_folder, saved, start, weights
from tools import sweep_families

pytestmark = pytest.mark.slow
both = pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
COMMON = SMALL | dict(num_prompts=6, group_size=4, micro_batch_tokens=30, num_minibatches=1, eval_data="held_out.jsonl")
CASES = {  # several micro-batches a process, where not even one group fits into one
    "several": {},
    "minibatches": dict(micro_batch_tokens=40, num_minibatches=2, num_prompts=12, beta=1.0),
    "token": dict(micro_batch_tokens=1, share_prompt=False, loss_average="token"),
    "constant": dict(model="gpt2", loss_average="constant"),
}
TRAIN = COMMON | dict(eval_every=1, micro_batch_tokens=60, update_epochs=2)
OWN = {grpo: dict(ref_refresh_every=2), ppo: dict(value_warmup_steps=1, adaptive_kl_target=0.01)}


# ----- One, two and three processes do the same -----


def work(number: int) -> None:
    """What one, two and three processes must do alike: `one` trains for 3 steps in one process. `chain` does its first
    step in two processes, the second in three, the last in one. Of every case the first gradients are written down."""
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    if number == 2:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpo.time, "strftime", lambda form: rank)  # as if the clocks differed
            Path(f"folder_{rank}").write_text(str(grpo.train(grpo.Args(**SMALL | dict(num_steps=1)))))
    for script in (grpo, ppo):
        train_on(script, "one" if number == 1 else "chain", {1: 3, 2: 1, 3: 2}[number])
        for case, choices in CASES.items():
            gradients, run = [], f"{script.__name__}_{case}_{number}"
            with same_completions(script) as patch:
                patch.setattr(script, "optimizer_step", partial(keep_gradient, gradients))
                script.train(arguments(script, **COMMON | choices | dict(num_steps=1, update_epochs=1, run_name=run)))
            torch.save(gradients, f"{run}_{rank}.pt")


def train_on(script, name: str, num_steps: int) -> None:
    """From the last checkpoint, if there is one."""
    args = TRAIN | OWN[script] | dict(num_steps=num_steps, run_name=f"{script.__name__}_{name}", resume=True)
    with same_completions(script):
        script.train(script.Args(**args))


def keep_gradient(gradients: list[dict], model: torch.nn.Module, *others: object) -> torch.Tensor:
    """In place of `optimizer_step`."""
    gradients.append({name: grpo.full_tensor(x.grad) for name, x in model.named_parameters()})
    model.zero_grad()
    return torch.ones(())


@contextlib.contextmanager
def same_completions(script) -> Iterator[pytest.MonkeyPatch]:
    """What one process samples in a step, several take their shares of: alone, each has random numbers of its own. Many
    completions earn the same."""
    rollout, generate = script.rollout, script.generate_completions

    def same_rollout(sampler, pairs, step, args, *others) -> tuple:
        file = Path(f"{script.__name__}_{Path(args.model).name}_{args.num_prompts}_{step}.pt")

        def given(*inputs) -> tuple:
            if script.world()[1] == 1 and not file.exists():
                torch.save(generate(*inputs), file)
            ids, mask, logprobs = map(script.own_share, torch.load(file))                   # (N', T), each
            T = int(mask.sum(1).max())
            return ids[:, :T], mask[:, :T], logprobs[:, :T]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "generate_completions", given)
            return rollout(sampler, pairs, step, args, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "rollout", same_rollout)
        patch.setattr(script, "reward", lambda text, problem: float(len(text) > 1 and "1" in text))
        yield patch


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[None]:
    """In the folder in which one process and several have done the same."""
    with contextlib.chdir(tmp_path_factory.mktemp("processes")):
        make_folder(Path(), "gpt2")
        Path("model").rename("gpt2")
        make_folder(Path())
        lines = Path("data.jsonl").read_text().splitlines(keepends=True)
        Path("held_out.jsonl").write_text("".join(lines[:25]))  # one more than in a batch
        work(1)
        for number in (2, 3):
            before = f"sys.path = {sys.path}\nimport test_processes\ntest_processes.work({number})\nsys.exit()"
            Path(f"said_{number}").write_text(finish(start(command("grpo", before, number))))
        train_on(grpo, "chain", 3)
        train_on(ppo, "chain", 3)
        yield


@both
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_train_in_several_processes_has_the_gradients_of_one(trained, script, number, case):
    """Those of every model and minibatch, up to rounding."""
    one, several = (torch.load(f"{script.__name__}_{case}_{n}_0.pt") for n in (1, number))
    for first, second in zip(one, several, strict=True):
        assert first.keys() == second.keys()
        largest = max(gradient.abs().max().item() for gradient in first.values())
        assert largest > 1e-3
        for name, gradient in first.items():
            torch.testing.assert_close(second[name], gradient, rtol=1e-5, atol=1e-5 * largest)


@both
def test_train_goes_as_in_one_process_also_where_another_number_goes_on(trained, script):
    before, (one, chain) = weights("model"), (f"{script.__name__}_{name}" for name in ("one", "chain"))
    after, other = weights(f"runs/{one}/policy"), weights(f"runs/{chain}/policy")
    for name, value in after.items():
        assert (value - before[name]).abs().max() > 1e-3, name
        # Where a gradient is 0 but for rounding, AdamW's step is its sign.
        assert ((other[name] - value).abs() > 1e-5).float().mean() < 0.02, name
    drawn = ("eval/sampled", "eval/length")  # from numbers that each process draws
    points, others = ({tag: x for tag, x in curves(run).items() if tag not in drawn} for run in (one, chain))
    assert leaves(others) == pytest.approx(leaves(points), rel=1e-3, abs=1e-4)


def test_train_in_several_processes_has_one_folder_and_no_warning_of_fsdp(trained):
    """Each process had a folder of its own, or printed "FSDP2-wrapped module returned a view tensor"."""
    assert len({Path(f"folder_{rank}").read_text() for rank in (0, 1)}) == 1
    for number in (2, 3):
        said = Path(f"said_{number}").read_text()
        assert f"trained model after {number - 1} steps: {Path.cwd()}/runs/ppo_chain/policy" in said
        assert "FSDP" not in said
        assert "Warning" not in said


# ----- They end together. The text is the same in both scripts. -----


def processes(*commands: list[str]) -> list[Forked]:
    """One for each command, started as torchrun does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(len(commands)))
    return [Forked(x, RANK=str(i), LOCAL_RANK=str(i), **common) for i, x in enumerate(commands)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> None:
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_shard_keeps_weights_that_layers_within_layers_share(folder, family):
    """Sharding the outer ones first was a TypeError; the inner ones first, what was shared became two parameters."""
    sweep_families.make_model(family, 0.1, {}).save_pretrained("model")
    for process in processes(*[command("grpo", run_name="a", num_steps=1, share_prompt=False)] * 2):
        finish(process)
    saved("a")


def test_load_of_a_checkpoint_that_one_process_cannot_see_ends_all(folder):
    """runs/ was not shared: one process loaded the checkpoint, the other began anew, and both waited for ever."""
    finish(Forked(command("grpo", run_name="a", num_steps=1)))
    args = dict(run_name="a", resume=True, model=Path("model").absolute(), data=Path("data.jsonl").absolute())
    first, second = processes(command("grpo", **args), command("grpo", "os.chdir('model')", **args))
    assert "model/runs/a/checkpoint.pt cannot be loaded" in finish(second, code=1)
    finish(first, code=1)


def test_evaluate_and_save_ends_the_run_of_all_processes_if_one_has_a_signal(folder):
    first, second = processes(*[command("grpo", run_name="a", num_steps=1000)] * 2)
    first.wait_until(lambda: Path("runs/a").exists() and "reward/mean" in curves("a"))
    os.kill(second.pid, signal.SIGTERM)
    said = finish(first) + finish(second)
    assert said.count("trained model after") == 1
    assert [step for step, _ in curves("a")["reward/mean"]] == [*range(saved("a")["step"])]


@pytest.mark.parametrize(("fails", "code"), [("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL), ("1 / 0", 1)])
def test_main_does_not_wait_for_ever_for_a_process_that_failed(folder, fails, code):
    failing = command("grpo", f"script.optimizer_step = lambda *args: {fails}", run_name="a")
    first, second = processes(command("grpo", run_name="a"), failing)
    assert "ZeroDivisionError" in finish(second, code) or code < 0
    finish(first, code=1)
