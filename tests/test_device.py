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
from helpers.runs import ROOT, SCRIPTS, SMALL, curves, finish, leaves, make_folder, saved, start, variety, weights

pytestmark = pytest.mark.slow

TRAIN = SMALL | dict(
    group_size=4, max_new_tokens=9, num_steps=3, eval_every=2, save_every=1, update_epochs=1, num_minibatches=2,
    temperature=0.9,
)  # fmt: skip
OWN = {grpo: dict(ref_refresh_every=2), ppo: dict(value_warmup_steps=1, adaptive_kl_target=0.01)}
WORK = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nimport test_device\ntest_device.work()"


def train(script, run_name: str, device: str, stop_test_every: int = 99, **choices) -> None:
    """With 99, no row leaves: a recorded step keeps other rows than one on the CPU, which get other random numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "start", lambda args: torch.device(device))
        patch.setattr(script, "reward", variety)
        patch.setattr(script, "STOP_TEST_EVERY", stop_test_every)
        script.train(script.Args(**TRAIN | OWN[script] | choices, run_name=f"{script.__name__}_{run_name}"))


def work() -> None:
    """All that is done on the device: train in two parts, the second from the checkpoint of the first, then in bfloat16
    with rows that leave. The last line of the output is what was found."""
    from helpers.fake_cuda import NAME, use, waits

    use()
    found = {"refused": [name for name, case in [*REFUSED.items(), *ALLOWED.items()] if refuses(case, NAME)]}
    for script in (grpo, ppo):
        train(script, "device", NAME, num_steps=2)
        train(script, "device", NAME, resume=True)
        waits.clear()
        train(script, "bfloat16", NAME, stop_test_every=4, dtype="bfloat16", eval_every=0, num_steps=2)
        found[script.__name__] = dict(waits)
    print("\n" + json.dumps(found))


def on(device: str, *size: int) -> torch.Tensor:
    return torch.ones(size, device=device)


INDEX = torch.zeros(1, 1, dtype=torch.long)
REFUSED = {
    "add": lambda d: on(d, 2) + torch.ones(2),
    "a number of the device": lambda d: torch.ones(2) * on(d),
    "gather": lambda d: on(d, 1, 2).gather(1, INDEX),
    "embedding": lambda d: nn.functional.embedding(INDEX, on(d, 2, 2)),
    "isin": lambda d: torch.isin(INDEX.to(d), INDEX),
    "index of the device": lambda d: torch.ones(2)[INDEX.to(d)],
    "numpy": lambda d: on(d, 2).numpy(),
}
ALLOWED = {
    "number": lambda d: on(d, 2) + torch.ones(()),
    "index": lambda d: on(d, 2)[INDEX],
}


def refuses(case, device: str) -> bool:
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
                train(script, "cpu", "cpu")
            yield json.loads(finish(process).splitlines()[-1])


def test_the_device_refuses_what_cuda_refuses_and_nothing_else(found):
    assert found["refused"] == [*REFUSED]


@SCRIPTS
def test_a_run_on_the_device_learns_what_one_on_the_cpu_learns(found, script):
    """All of its checkpoint and its curves."""
    name = script.__name__
    on_device, on_cpu = leaves(saved(f"{name}_device")), leaves(saved(f"{name}_cpu"))
    assert on_device.keys() == on_cpu.keys()
    gaps = {key: (on_device[key] - x).abs().max().item() for key, x in on_cpu.items() if isinstance(x, torch.Tensor)}
    assert max(gaps.values()) < 1e-5, gaps
    before, after = weights("model"), weights(f"runs/{name}_cpu/policy")
    assert max((value - before[key]).abs().max() for key, value in after.items()) > 1e-3
    assert leaves(curves(f"{name}_device")) == pytest.approx(leaves(curves(f"{name}_cpu")), abs=1e-4)


@SCRIPTS
def test_a_run_on_the_device_is_in_bfloat16(found, script):
    gaps = [gap for _, gap in curves(f"{script.__name__}_bfloat16")["policy/sampler_gap"]]
    assert len(gaps) == 2
    assert 1e-4 < min(gaps) <= max(gaps) < 0.02


@SCRIPTS
@pytest.mark.skipif(torch.cuda.is_available(), reason="what waits for CUDA is not counted")
def test_no_token_waits_for_the_device_but_for_one_test_of_the_end_in_several(found, script):
    """In check_policy and two steps, of 8, 9 and 9 tokens. What has ended leaves; that waits, too."""
    waits = found[script.__name__]
    assert not [line for line in waits if line.endswith((" next_logits", " sample_tokens"))]
    assert waits["_local_scalar_dense in generate_completions"] == 2 * 3
    assert 5 <= waits["nonzero in running_rows"] <= 2 + 3 + 3
    assert waits["_local_scalar_dense in running_rows"] > 0
