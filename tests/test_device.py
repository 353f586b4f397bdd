# SPDX-License-Identifier: MIT
"""The scripts train on CUDA, or without a GPU on a device that refuses what CUDA refuses, see helpers/fake_cuda.py.
torch takes one such device for a process, so a process of its own does the work: the tests look at what it left."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import grpo
import ppo
from helpers.runs import ROOT, SMALL, curves, finish, leaves, make_folder, saved, start, weights

pytestmark = pytest.mark.slow

TRAIN = SMALL | dict(
    group_size=4, max_new_tokens=9, num_steps=3, eval_every=1, save_every=1, update_epochs=1, num_minibatches=2,
    temperature=0.9,
)  # fmt: skip
OWN = {grpo: dict(ref_refresh_every=2), ppo: dict(value_warmup_steps=1, adaptive_kl_target=0.01)}
WORK = "import test_device\ntest_device.work()"
BFLOAT16 = dict(dtype="bfloat16", gradient_checkpointing=True, eval_every=0)
SAMPLING = "generate_completions", "sample_tokens", "next_logits", "run_prompts"  # where a token could wait
both = pytest.mark.parametrize("script", [grpo, ppo])


def variety(completion: str, problem: dict) -> float:
    return len(set(completion)) / 10


def train(script, run_name: str, **choices) -> None:
    script.train(script.Args(**TRAIN | OWN[script] | choices, run_name=f"{script.__name__}_{run_name}"))


def observe(script) -> dict:
    """Train on the device in two parts, the second from the checkpoint of the first, and count."""
    from helpers.fake_cuda import waits

    script.reward, sharing, tokens = variety, [], []
    record(script, "can_share_prompt", sharing)
    record(script, "sample_tokens", tokens)
    waits.clear()
    train(script, "there", device="auto", num_steps=2)
    train(script, "there", device="auto", resume="auto")
    return {"sharing": [*sharing], "tokens": len(tokens), "waits": dict(waits)}


def record(script, name: str, results: list) -> None:
    """Collect what a function of the script returns."""
    function = getattr(script, name)

    def recorded(*args: object) -> object:
        results.append(function(*args))
        return results[-1]

    setattr(script, name, recorded)


def work() -> None:
    """All that is done on the device. The last line of its output is what was seen."""
    from helpers import fake_cuda

    fake_cuda.use()
    device = torch.accelerator.current_accelerator(check_available=True)
    told = {"refused": [name for name, case in [*REFUSED.items(), *ALLOWED.items()] if refuses(case, device)]}
    for script in (grpo, ppo):
        told[script.__name__] = observe(script)
        train(script, "bfloat16", device="auto", num_steps=2, **BFLOAT16)
    print("\n" + json.dumps(told | {"device": device.type, "name": fake_cuda.NAME}))


ON = lambda device, *size: torch.ones(size, device=device)
INDEX = lambda device="cpu": torch.zeros(1, 1, dtype=torch.long, device=device)
REFUSED = {
    "add": lambda d: ON(d, 2) + torch.ones(2),
    "a number of the device": lambda d: torch.ones(2) * ON(d),
    "in place": lambda d: torch.ones(2).add_(ON(d, 2)),
    "into a number": lambda d: torch.ones(()).add_(ON(d)),
    "cat": lambda d: torch.cat([ON(d, 2), torch.ones(2)]),
    "stack": lambda d: torch.stack([ON(d), torch.ones(())]),
    "where": lambda d: torch.where(torch.ones(2) > 0, ON(d, 2), 0.0),
    "masked_fill": lambda d: ON(d, 2).masked_fill(torch.ones(2) > 0, 0.0),
    "masked_scatter": lambda d: ON(d, 2).masked_scatter(torch.ones(2) > 0, ON(d, 2)),
    "gather": lambda d: ON(d, 1, 2).gather(1, INDEX()),
    "scatter": lambda d: ON(d, 1, 2).scatter(1, INDEX(d), torch.ones(1, 1)),
    "index_select": lambda d: ON(d, 2).index_select(0, INDEX()[0]),
    "embedding": lambda d: nn.functional.embedding(INDEX(), ON(d, 2, 2)),
    "linear": lambda d: nn.functional.linear(torch.ones(2), ON(d, 2, 2)),
    "matmul": lambda d: ON(d, 2, 2) @ torch.ones(2, 2),
    "isin": lambda d: torch.isin(INDEX(d), INDEX()),
    "searchsorted": lambda d: torch.searchsorted(ON(d, 2), torch.ones(2)),
    "index of the device": lambda d: torch.ones(2)[INDEX(d)],
    "assigned values": lambda d: ON(d, 2).index_put_((INDEX(),), torch.ones(1, 1)),
    "numpy": lambda d: ON(d, 2).numpy(),
}
ALLOWED = {
    "number": lambda d: ON(d, 2) + torch.ones(()),
    "where of numbers": lambda d: torch.where(ON(d, 2) > 0, ON(d, 2), torch.ones(())),
    "index": lambda d: ON(d, 2)[INDEX()],
    "mask": lambda d: ON(d, 2)[torch.ones(2) > 0],
    "assign": lambda d: ON(d, 2).index_put_((INDEX(),), torch.ones(())),
    "copy": lambda d: ON(d, 2).copy_(torch.ones(2)),
    "copy back": lambda d: torch.ones(2).copy_(ON(d, 2)),
}


def refuses(case, device: torch.device) -> bool:
    try:
        case(device)
    except (RuntimeError, TypeError) as error:
        return "device" in str(error)
    return False


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Iterator[dict]:
    """What the process told; the tests are in its folder."""
    folder = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder)
        paths = [str(ROOT), str(ROOT / "tests")]
        with start([sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{WORK}"]) as process:
            for script in (grpo, ppo):
                patch.setattr(script, "reward", variety)
                train(script, "here")
            yield json.loads(finish(process).splitlines()[-1])


def test_the_device_refuses_what_cuda_refuses_and_nothing_else(told):
    assert told["device"] == told["name"]
    assert told["refused"] == [*REFUSED]


@both
def test_a_run_there_learns_what_one_on_the_cpu_learns(told, script):
    there, here = (leaves(saved(f"{script.__name__}_{name}")) for name in ("there", "here"))
    assert there.keys() == here.keys()
    gaps = {name: (there[name] - x).abs().max().item() for name, x in here.items() if isinstance(x, torch.Tensor)}
    print(f"\n{script.__name__}: largest difference {max(gaps.values()):.1e}")
    assert max(gaps.values()) < 1e-5, gaps
    before, after = weights("model"), weights(f"runs/{script.__name__}_here/policy")
    assert max((value - before[name]).abs().max() for name, value in after.items()) > 1e-3
    there, here = (leaves(curves(f"{script.__name__}_{name}")) for name in ("there", "here"))
    assert there == pytest.approx(here, abs=1e-4)


def waits_in(code: str, told: dict, script) -> int:
    """How often the three lines of the script that begin with this code waited."""
    lines = Path(script.__file__).read_text().splitlines()
    (first,) = [number for number, line in enumerate(lines, start=1) if code in line]
    at = tuple(f"{script.__name__}.py:{first + i} " for i in range(3))
    return sum(n for line, n in told[script.__name__]["waits"].items() if line.rpartition("< ")[2].startswith(at))


@both
def test_several_completions_shared_a_prompt_there_and_finished_ones_left(told, script):
    assert told[script.__name__]["sharing"] == [True, True]
    assert waits_in("kept, self.graph_step = kept.nonzero()", told, script) > 0


@both
def test_it_runs_in_bfloat16(told, script):
    gaps = [gap for _, gap in curves(f"{script.__name__}_bfloat16")["policy/sampler_gap"]]
    assert len(gaps) == 2
    assert 1e-4 < min(gaps) <= max(gaps) < 0.02


@both
def test_no_token_waits_for_the_device_but_for_one_test_of_the_end_in_several(told, script):
    """All waits are shown with pytest -s."""
    counted = told[script.__name__]
    sampling = Counter({line: n for line, n in counted["waits"].items() if line.endswith(SAMPLING)})
    print(f"\n{script.__name__}: {sampling.total()} waits in sampling, to sample {counted['tokens']} times")
    print("\n".join(f"{number:6} {line}" for line, number in sampling.most_common()))
    assert max(sampling.values()) < counted["tokens"] / 3
    assert waits_in("output = self.policy(tokens[:, None]", told, script) == 0
    assert 0 < waits_in("num_kept = int(", told, script) <= counted["tokens"] / script.STOP_TEST_EVERY
