# SPDX-License-Identifier: MIT
"""Training end to end, in both scripts: real runs of a few steps, real processes, real signals."""

import ctypes
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import ppo

ROOT = Path(__file__).parents[1]
SMALL = dict(num_prompts=4, max_new_tokens=12, num_steps=3, eval_every=0, save_every=0)
TAGS = {
    "reward/mean", "reward/std", "completion/length", "completion/truncated", "policy/kl", "policy/entropy",
    "policy/ratio_max", "policy/clip_frac", "policy/grad_norm", "policy/loss", "time/sample", "time/update",
    "time/tokens_per_second",
}  # fmt: skip


@pytest.fixture(params=[grpo, ppo], ids=["grpo", "ppo"])
def script(request, monkeypatch, tmp_path, tiny_runs):
    """One of the scripts, in a folder of its own with a tiny model that was pretrained for a moment."""
    for module in (grpo, ppo):
        monkeypatch.setattr(module, "TINY_STEPS", 60)
        monkeypatch.setattr(module, "TINY_HELD_OUT", 64)
        # After so short a pretraining no sum is ever right: a reward that differs between completions instead.
        monkeypatch.setattr(module, "reward", lambda completion, answer: len(set(completion)) / 10)
    # PPO's first steps train the value model only: these runs are shorter than that.
    monkeypatch.setattr(ppo, "Args", functools.partial(ppo.Args, value_warmup_steps=0))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for folder in tiny_runs.iterdir():
        (tmp_path / "runs" / folder.name).symlink_to(folder)
    return request.param


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """A runs/ folder that holds the tiny model after 60 steps of pretraining, shared by all tests."""
    folder = tmp_path_factory.mktemp("tiny")
    code = "import grpo; grpo.TINY_STEPS, grpo.TINY_HELD_OUT = 60, 64; grpo.tiny_policy()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return folder / "runs"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def curves(run_name: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(f"runs/{run_name}")
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_leaves_a_trained_model_a_checkpoint_and_every_curve(script):
    args = script.Args(run_name="a", **SMALL | dict(eval_every=2))
    folder = script.train(args)
    assert folder == Path("runs/a/policy")
    before, after = weights(script.tiny_policy()), weights(folder)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("1+2=").input_ids) == "1+2="
    assert [path.name for path in Path("runs/a").glob("step_*")] == ["step_000003"]
    found = curves("a")
    more = {"value/loss", "value/explained_variance"} if script is ppo else set()
    assert found.keys() >= TAGS | more | {"eval/accuracy", "eval/sampled"}
    assert [step for step, _ in found["reward/mean"]] == [1, 2, 3]
    assert [step for step, _ in found["eval/accuracy"]] == [0, 2, 3]
    assert not list(Path("runs/a").glob(".*"))


def test_one_seed_gives_one_result_and_another_seed_another(script):
    folders = [script.train(script.Args(run_name=f"{i}", seed=seed, **SMALL)) for i, seed in enumerate((1, 1, 2))]
    first, again, other = map(weights, folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_resumed_run_ends_with_the_same_bits(script):
    whole = script.train(script.Args(run_name="whole", **SMALL | dict(num_steps=4)))
    script.train(script.Args(run_name="parts", **SMALL | dict(num_steps=2)))
    time.sleep(1.1)  # TensorBoard orders the files of a run by the second in their names
    parts = script.train(script.Args(run_name="parts", resume="auto", **SMALL | dict(num_steps=4)))
    first, second = weights(whole), weights(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole_curves, parts_curves = curves("whole"), curves("parts")
    for tag in TAGS - {"time/sample", "time/update", "time/tokens_per_second"}:
        assert whole_curves[tag] == parts_curves[tag]


def test_the_first_ratio_is_exactly_1_and_the_first_kl_exactly_0(script):
    # Pitfall 8, Property 5: old and new log-probabilities come from the same forward on the same shapes.
    single = dict(update_epochs=1, num_minibatches=1)
    script.train(script.Args(run_name="a", **SMALL | dict(num_steps=1) | single))
    found = curves("a")
    assert found["policy/ratio_max"] == [(1, 1.0)]
    assert found["policy/kl"] == [(1, 0.0)]
    assert found["policy/clip_frac"] == [(1, 0.0)]
    assert found["policy/approx_kl"] == [(1, 0.0)]


def test_the_step_does_not_depend_on_micro_batches_or_on_sharing_the_prompt(script):
    alone = dict(share_prompt=False)
    options = [{}, dict(micro_batch_tokens=40), alone, dict(micro_batch_tokens=1) | alone]
    common = SMALL | dict(num_steps=1, group_size=3, update_epochs=1, num_minibatches=1)
    results = [weights(script.train(script.Args(run_name=f"{i}", **common | o))) for i, o in enumerate(options)]
    before = weights(script.tiny_policy())
    for result in results[1:]:
        for name, value in result.items():
            change, expected = value - before[name], results[0][name] - before[name]
            # AdamW's first step is the sign of the gradient: entries that are 0 but for rounding may differ.
            assert ((change - expected).abs() > 1e-5).float().mean() < 0.02, name


GRPO_CHOICES = [
    dict(loss_average="token", clip_eps_high=0.28, beta=0.0, mask_truncated=True),  # DAPO
    dict(loss_average="constant", advantage_scale="none", beta=0.0),  # Dr. GRPO
    dict(advantage_baseline="leave_one_out", advantage_scale="none", kl_placement="reward", kl_estimator="k1"),  # RLOO
    dict(ratio_level="sequence", clip_eps=3e-4, clip_eps_high=4e-4, update_epochs=2, num_minibatches=2),  # GSPO
    dict(kl_importance_weight=True, update_epochs=2, ref_refresh_every=1),
    dict(advantage_scale="batch"),
    dict(process_supervision=True),
]
PPO_CHOICES = [
    dict(group_size=4, adaptive_kl_target=0.1, entropy_coef=0.01, whiten_rewards=True),
    dict(penalty_kl_target=0.01, kl_placement="loss", kl_estimator="k2", update_epochs=3),
    dict(early_stop_kl=1e-9, value_warmup_steps=1, beta=0.0, whiten_advantages=False, loss_average="token"),
]


@pytest.mark.parametrize("choices", GRPO_CHOICES, ids=lambda choices: next(iter(choices)))
def test_every_choice_of_grpo_trains(script, choices):
    if script is grpo:
        folder = grpo.train(grpo.Args(run_name="a", **SMALL | choices))
        assert all(value.isfinite().all() for value in weights(folder).values())


@pytest.mark.parametrize("choices", PPO_CHOICES, ids=lambda choices: next(iter(choices)))
def test_every_choice_of_ppo_trains(script, choices):
    if script is ppo:
        folder = ppo.train(ppo.Args(run_name="a", **SMALL | choices))
        assert all(value.isfinite().all() for value in weights(folder).values())


def test_groups_of_equal_rewards_are_left_out_only_where_that_is_exact(script, monkeypatch):
    # All rewards equal: without a KL nothing moves, with one the policy may.
    if script is grpo:
        monkeypatch.setattr(grpo, "reward", lambda completion, answer: 0.5)
        before = weights(grpo.tiny_policy())
        still = weights(grpo.train(grpo.Args(run_name="a", beta=0.0, **SMALL)))
        assert all(torch.equal(before[name], still[name]) for name in before)


def test_a_batch_whose_every_completion_is_left_out_moves_nothing_and_has_finite_curves(script):
    # DAPO's overlong filtering, where no completion ends within its one token.
    if script is grpo:
        before, args = weights(grpo.tiny_policy()), SMALL | dict(max_new_tokens=1, mask_truncated=True)
        after = weights(grpo.train(grpo.Args(run_name="a", **args)))
        assert all(torch.equal(before[name], after[name]) for name in before)
        found = curves("a")
        assert found["completion/truncated"] == [(1, 1.0), (2, 1.0), (3, 1.0)]
        assert all(torch.tensor(value).isfinite() for points in found.values() for _, value in points)


def test_the_end_token_is_trained_when_pad_is_the_end_token(script, monkeypatch):
    # Pitfall 1. Reward short completions: the policy must learn to stop, and can only by its end token.
    _, policy, _ = script.load_policy("tiny", torch.device("cpu"))
    assert policy.config.pad_token_id == policy.config.eos_token_id
    monkeypatch.setattr(script, "reward", lambda completion, answer: -float(len(completion)))
    common = dict(num_prompts=16, group_size=4, max_new_tokens=24, num_steps=12, eval_every=0, beta=0.0)
    script.train(script.Args(run_name="a", **common))
    lengths = [value for _, value in curves("a")["completion/length"]]
    assert sum(lengths[-3:]) < 0.7 * sum(lengths[:3])


def test_help_shows_every_flag_with_its_default(script):
    result = subprocess.run([sys.executable, ROOT / f"{script.__name__}.py", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for field in dataclasses.fields(script.Args()):
        assert f"--{field.name.replace('_', '-')}" in result.stdout
    assert "DeepSeekMath" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_leaves(script, number):
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), "--model", str(script.tiny_policy()), "--data", "d"]
    flags = "--num-prompts 4 --max-new-tokens 12 --num-steps 100000 --eval-every 0 --save-every 0 --run-name a"
    Path("d").write_text('{"prompt": "07+85=", "answer": "92"}\n{"prompt": "10+85=", "answer": "95"}\n' * 20)
    with subprocess.Popen([*command, *flags.split()], stderr=subprocess.PIPE, text=True) as process:
        while not list(Path("runs/a").glob("events*")):
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "--run-name a --resume auto" in said
    assert "Traceback" not in said
    assert len(list(Path("runs/a").glob("step_*"))) == 1
    assert AutoModelForCausalLM.from_pretrained("runs/a/policy")


GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
HELD = """
import sys, torch
sys.path.insert(0, {root!r})
import grpo
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20  # MiB
{call}
before, tensors = resident(), [torch.ones(2**20) for _ in range(100)]  # 400 MiB
del tensors
print(resident() - before)
"""


@pytest.mark.skipif(not GLIBC, reason="this is about glibc's malloc")
@pytest.mark.parametrize(("call", "kept"), [("", False), ("grpo.keep_memory()", True)])
def test_the_memory_of_a_step_stays_with_the_process_for_the_next(call, kept):
    code = HELD.format(root=str(ROOT), call=call)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (float(said) > 300) == kept
