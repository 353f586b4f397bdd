# SPDX-License-Identifier: MIT
"""The scripts train on CUDA, or without a GPU on a device that refuses what CUDA refuses, see helpers/fake_cuda.py.
torch takes one such device for a process, so a process of its own does the work: the tests look at what it left."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import grpo
import ppo
from helpers.runs import ROOT, SCRIPTS, SMALL, curves, finish, leaves, make_folder, saved, start, weights

pytestmark = pytest.mark.slow

TRAIN = SMALL | dict(
    group_size=4, max_new_tokens=9, num_steps=3, eval_every=2, save_every=1, update_epochs=1, num_minibatches=2,
    temperature=0.9,
)  # fmt: skip
OWN = {grpo: dict(ref_refresh_every=2), ppo: dict(value_warmup_steps=1, adaptive_kl_target=0.01)}
WORK = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nimport test_device\ntest_device.work()"
SAMPLING = "generate_completions", "sample_tokens", "next_logits", "run_prompts"  # where a token could wait


def train(script, run_name: str, **choices) -> None:
    script.reward = lambda completion, problem: len(set(completion)) / 10
    script.train(script.Args(**TRAIN | OWN[script] | choices, run_name=f"{script.__name__}_{run_name}"))


def observe(script) -> dict:
    """Train on the device in two parts, the second from the checkpoint of the first, and count."""
    from helpers.fake_cuda import waits

    sharing, can_share_prompt = [], script.can_share_prompt
    script.can_share_prompt = lambda *args: sharing.append(can_share_prompt(*args)) or sharing[-1]
    kept, next_logits = [], script.Decoder.next_logits

    def observed(decoder: object, ids: torch.Tensor, running: torch.Tensor) -> tuple:
        rows, logits = next_logits(decoder, ids, running)
        kept.append(len(rows) / len(ids))
        return rows, logits

    script.Decoder.next_logits = observed
    waits.clear()
    train(script, "device", num_steps=2)
    train(script, "device", resume=True)
    return dict(sharing=sharing, kept=kept, waits=dict(waits))


def work() -> None:
    """All that is done on the device. The last line of the output is what was found."""
    from helpers import fake_cuda

    fake_cuda.use()
    device = torch.accelerator.current_accelerator(check_available=True)
    assert device.type == fake_cuda.NAME
    found = {"refused": [name for name, case in [*REFUSED.items(), *ALLOWED.items()] if refuses(case, device)]}
    for script in (grpo, ppo):
        found[script.__name__] = observe(script)
        bfloat16 = dict(dtype="bfloat16", gradient_checkpointing=True, eval_every=0, num_steps=2)
        train(script, "bfloat16", **bfloat16)
    print("\n" + json.dumps(found))


ON = lambda device, *size: torch.ones(size, device=device)
INDEX = lambda device="cpu": torch.zeros(1, 1, dtype=torch.long, device=device)
REFUSED = {
    "add": lambda d: ON(d, 2) + torch.ones(2),
    "a number of the device": lambda d: torch.ones(2) * ON(d),
    "where": lambda d: torch.where(torch.ones(2) > 0, ON(d, 2), 0.0),
    "gather": lambda d: ON(d, 1, 2).gather(1, INDEX()),
    "scatter": lambda d: ON(d, 1, 2).scatter(1, INDEX(d), torch.ones(1, 1)),
    "index_select": lambda d: ON(d, 2).index_select(0, INDEX()[0]),
    "embedding": lambda d: nn.functional.embedding(INDEX(), ON(d, 2, 2)),
    "linear": lambda d: nn.functional.linear(torch.ones(2), ON(d, 2, 2)),
    "matmul": lambda d: ON(d, 2, 2) @ torch.ones(2, 2),
    "isin": lambda d: torch.isin(INDEX(d), INDEX()),
    "searchsorted": lambda d: torch.searchsorted(ON(d, 2), torch.ones(2)),
    "index of the device": lambda d: torch.ones(2)[INDEX(d)],
    "numpy": lambda d: ON(d, 2).numpy(),
}
ALLOWED = {
    "number": lambda d: ON(d, 2) + torch.ones(()),
    "index": lambda d: ON(d, 2)[INDEX()],
    "mask": lambda d: ON(d, 2)[torch.ones(2) > 0],
    "assign": lambda d: ON(d, 2).index_put_((INDEX(),), torch.ones(())),
    "copy": lambda d: ON(d, 2).copy_(torch.ones(2)),
}


def refuses(case, device: torch.device) -> bool:
    try:
        case(device)
    except (RuntimeError, TypeError) as error:
        return "device" in str(error)
    return False


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Iterator[dict]:
    """What `work` found; the current folder has its runs, and the same of the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("device"))
        make_folder(Path())
        with start([sys.executable, "-c", WORK]) as process:
            for script in (grpo, ppo):
                patch.setattr(script, "reward", script.reward)  # `train` changes it
                train(script, "cpu")
            yield json.loads(finish(process).splitlines()[-1])


def test_the_device_refuses_what_cuda_refuses_and_nothing_else(found):
    assert found["refused"] == [*REFUSED]


@SCRIPTS
def test_a_run_on_the_device_learns_what_one_on_the_cpu_learns(found, script):
    """All of its checkpoint and its curves; where prompts were shared, and completions that had ended were dropped."""
    name = script.__name__
    on_device, on_cpu = leaves(saved(f"{name}_device")), leaves(saved(f"{name}_cpu"))
    assert on_device.keys() == on_cpu.keys()
    gaps = {key: (on_device[key] - x).abs().max().item() for key, x in on_cpu.items() if isinstance(x, torch.Tensor)}
    assert max(gaps.values()) < 1e-5, gaps
    before, after = weights("model"), weights(f"runs/{name}_cpu/policy")
    assert max((value - before[key]).abs().max() for key, value in after.items()) > 1e-3
    assert leaves(curves(f"{name}_device")) == pytest.approx(leaves(curves(f"{name}_cpu")), abs=1e-4)
    assert found[name]["sharing"][:2] == [True, True]
    assert any(0 < part < 1 for part in found[name]["kept"])


@SCRIPTS
def test_a_run_on_the_device_is_in_bfloat16(found, script):
    gaps = [gap for _, gap in curves(f"{script.__name__}_bfloat16")["policy/sampler_gap"]]
    assert len(gaps) == 2
    assert 1e-4 < min(gaps) <= max(gaps) < 0.02


@SCRIPTS
def test_no_token_waits_for_the_device_but_for_one_test_of_the_end_in_several(found, script):
    waits, tokens = found[script.__name__]["waits"], len(found[script.__name__]["kept"])
    sampling = {line: n for line, n in waits.items() if line.endswith(SAMPLING)}
    assert max(sampling.values()) < tokens / 3, sampling
    at_the_end = {line: n for line, n in waits.items() if line.endswith("next_logits")}
    assert 0 < max(at_the_end.values()) <= tokens / script.STOP_TEST_EVERY, at_the_end
