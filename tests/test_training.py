# SPDX-License-Identifier: MIT
"""Training end to end, in both scripts: the tiny model that comes with them, for a few steps."""

import dataclasses
import itertools
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import tyro
from tokenizers import Tokenizer, decoders, models
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import grpo
import ppo
from helpers.runs import MEASURED, curves, make_folder, saved, weights
from helpers.tiny_models import make_model

TINY = grpo.Args.model
SMALL = dict(
    data="data.jsonl", num_prompts=4, group_size=4, max_new_tokens=24, num_steps=3, eval_every=0, save_every=0,
    device="cpu",
)  # fmt: skip
TAGS = {
    "reward/mean", "reward/std", "completion/length", "completion/truncated", "policy/kl", "policy/entropy",
    "policy/ratio_max", "policy/clip_frac", "policy/approx_kl", "policy/grad_norm", "policy/loss", "policy/skipped",
    "policy/sampler_gap",
}  # fmt: skip


@pytest.fixture(params=[grpo, ppo], ids=["grpo", "ppo"])
def script(request, monkeypatch, tmp_path):
    """One of the scripts, in a folder of its own with a few problems."""
    monkeypatch.chdir(tmp_path)
    lines = Path(grpo.Args.data).read_text().splitlines(keepends=True)[:40]
    Path("data.jsonl").write_text("".join(lines))
    return request.param


def small(script, run_name: str, **args: object) -> grpo.Args | ppo.Args:
    # PPO's first steps train the value model only: these runs are shorter than that.
    return script.Args(run_name=run_name, **SMALL | (dict(value_warmup_steps=0) if script is ppo else {}) | args)


def variety(completion: str, problem: dict) -> float:
    """A reward that differs between the completions of every group."""
    return len(set(completion)) / 10 + len(completion) / 100


def moved(before: dict, after: dict) -> bool:
    return any(not torch.equal(before[name], value) for name, value in after.items())


def test_a_run_leaves_a_trained_model_a_checkpoint_and_every_curve(script):
    folder = script.train(small(script, "a", eval_every=2))
    assert folder == Path("runs/a/policy")
    assert moved(weights(TINY), weights(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("1+2=").input_ids) == "1+2="
    assert saved("a")["step"] == 3
    found = curves("a")
    own = {"value/loss", "value/grad_norm", "value/skipped", "value/clip_frac", "value/explained_variance"}
    own |= {"policy/beta", *(f"policy/{name}_epoch_{k}" for name in ("clip_frac", "approx_kl") for k in (1, 2))}
    evaluation = {"eval/greedy", "eval/sampled", "eval/length"}
    assert found.keys() == TAGS | evaluation | (own if script is ppo else set())
    for tag, points in found.items():
        assert [step for step, _ in points] == ([0, 2, 3] if tag in evaluation else [0, 1, 2]), tag
        assert torch.tensor([value for _, value in points]).isfinite().all(), tag
    if script is ppo:  # both epochs see the same tokens
        whole, *epochs = (found[f"policy/approx_kl{epoch}"][-1][1] for epoch in ("", "_epoch_1", "_epoch_2"))
        assert 0 < whole == pytest.approx(sum(epochs) / 2, rel=1e-3)


@pytest.mark.parametrize("script", [grpo], indirect=True)
def test_the_kl_in_the_reward_is_taken_off_before_the_advantage(script, monkeypatch):
    """Of whole completions, and from the rewards as they are. `group_advantages` gets the difference."""
    rewards, kls, groups = [], [], []
    keep(monkeypatch, script, "compute_rewards", rewards, lambda _, result: torch.tensor(result))
    keep(monkeypatch, script, "kl_estimate", kls, lambda _, result: result.sum(-1))
    keep(monkeypatch, script, "group_advantages", groups, lambda arguments, _: arguments[0])
    monkeypatch.setattr(script, "reward", variety)
    script.train(small(script, "a", kl_placement="reward", kl_estimator="k1", beta=0.5))
    plain, groups = groups[::2], groups[1::2]  # once of the rewards as they are, once with the KL taken off
    assert len(groups) == len(rewards) == 3
    assert torch.equal(torch.stack(plain).flatten(), torch.stack(rewards).flatten())
    assert torch.equal(groups[0].flatten(), rewards[0])  # the policy is still the reference
    assert (groups[-1].flatten() - rewards[-1]).abs().max() > 1e-3
    of_the_batch = [kl for kl in kls if kl.shape == rewards[-1].shape]
    assert any(torch.allclose(groups[-1].flatten(), rewards[-1] - 0.5 * kl) for kl in of_the_batch)


@pytest.mark.parametrize("script", [grpo], indirect=True)
@pytest.mark.parametrize("best", [0, 3])
def test_without_a_kl_every_group_whose_rewards_differ_is_trained(script, best, monkeypatch):
    """Whichever of its completions earns more. The gradient of the others is exactly 0."""
    numbers, advantages = itertools.count(), []
    keep(monkeypatch, script, "grpo_loss", advantages, lambda arguments, _: arguments[3][:, 0])
    pays = {best, 4 + best}  # one completion of the first two groups of four
    monkeypatch.setattr(script, "reward", lambda *_: float(next(numbers) in pays))
    script.train(small(script, "a", beta=0.0, num_steps=1))
    by_group = torch.cat(advantages).view(4, 4)
    assert sorted(by_group.ne(0).all(1).tolist()) == [False, False, True, True]
    assert sorted(by_group.eq(0).all(1).tolist()) == [False, False, True, True]


def keep(monkeypatch, script, name: str, kept: list, what) -> None:
    """Keep something of the arguments and the result of every call of a function."""
    function = getattr(script, name)

    def kept_of(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        kept.append(what(arguments, result))
        return result

    monkeypatch.setattr(script, name, kept_of)


def test_the_seconds_of_a_step_and_its_tokens_per_second_are_logged(script, monkeypatch):
    logged, log = [], script.Run.log

    def keep(run, metrics):
        logged.append(metrics)
        log(run, metrics)

    monkeypatch.setattr(script.Run, "log", keep)
    scalars = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", lambda _, *point: scalars.append(point))
    script.train(small(script, "a", eval_every=2))
    assert ["time/sample" in metrics for metrics in logged] == [False, True, True, False, True, False]  # 3 evaluations
    steps = [metrics for metrics in logged if "time/update" in metrics]
    speeds = [value for tag, value, _ in scalars if tag == MEASURED[2]]
    expected = [4 * 4 * x["completion/length"] / (x["time/sample"] + x["time/update"]) for x in steps]
    assert speeds == pytest.approx([float(x) for x in expected])


@pytest.mark.slow
def test_one_seed_gives_one_result_and_another_seed_another(script):
    folders = [script.train(small(script, f"{i}", seed=seed)) for i, seed in enumerate((1, 1, 2))]
    first, again, other = map(weights, folders)
    assert not moved(first, again)
    assert moved(first, other)
    assert curves("0") == curves("1") != curves("2")


def test_the_first_ratio_is_exactly_1_and_the_first_kl_exactly_0(script):
    # Old and new log-probabilities come from the same forward on the same shapes.
    for name, options in (("one", dict(update_epochs=1, num_minibatches=1)), ("two", dict(num_minibatches=2))):
        # One update, or updates so small that the policy stays where it is.
        rate = {} if name == "one" else dict(learning_rate=1e-12)
        script.train(small(script, name, micro_batch_tokens=60, num_steps=1, **options | rate))
        found = curves(name)
        exact = dict(ratio_max=1.0, clip_frac=0.0, approx_kl=0.0, kl=0.0)
        for tag, value in exact.items() if name == "one" else [("clip_frac", 0.0)]:
            assert found[f"policy/{tag}"] == [(0, value)]
        assert found["policy/ratio_max"][0][1] == pytest.approx(1.0, abs=1e-6)
        assert 0 < found["policy/sampler_gap"][0][1] < 1e-5


@pytest.mark.slow
def test_the_step_does_not_depend_on_micro_batches_or_on_sharing_the_prompt(script, monkeypatch):
    monkeypatch.setattr(script, "reward", variety)
    alone = dict(share_prompt=False)
    options = [{}, dict(micro_batch_tokens=60), alone, dict(micro_batch_tokens=1) | alone]
    common = dict(num_steps=1, update_epochs=1, num_minibatches=1)
    options.append(dict(gradient_checkpointing=True))
    results = [weights(script.train(small(script, f"{i}", **common | o))) for i, o in enumerate(options)]
    before = weights(TINY)
    for i, result in enumerate(results[1:], start=1):
        for tag, points in curves("0").items():
            assert curves(f"{i}")[tag][0][1] == pytest.approx(points[0][1], rel=1e-4, abs=1e-5), tag
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
]
PPO_CHOICES = [
    dict(adaptive_kl_target=0.1, entropy_coef=0.01, whiten_rewards=True),
    dict(penalty_kl_target=0.01, kl_placement="loss", kl_estimator="k2", update_epochs=3),
    dict(early_stop_kl=1e-9, value_warmup_steps=1, beta=0.0, whiten_advantages=False, loss_average="token"),
]
CHOICES = [*((grpo, choices) for choices in GRPO_CHOICES), *((ppo, choices) for choices in PPO_CHOICES)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "choices"), CHOICES, indirect=["script"], ids=lambda x: getattr(x, "__name__", None) or next(iter(x))
)
def test_every_choice_trains_and_makes_a_difference(script, choices, monkeypatch):
    monkeypatch.setattr(script, "reward", variety)
    plain, chosen = (script.train(small(script, n, **c)) for n, c in (("a", {}), ("b", choices)))
    assert all(value.isfinite().all() for value in weights(chosen).values())
    assert moved(weights(TINY), weights(chosen))
    assert moved(weights(plain), weights(chosen))


@pytest.mark.parametrize("script", [grpo], indirect=True)
def test_groups_of_equal_rewards_move_nothing_without_a_kl(script, monkeypatch):
    monkeypatch.setattr(grpo, "reward", lambda completion, problem: 0.5)
    assert not moved(weights(TINY), weights(grpo.train(small(grpo, "a", beta=0.0))))
    assert curves("a")["policy/grad_norm"] == [(0, 0.0), (1, 0.0), (2, 0.0)]


@pytest.mark.parametrize("script", [grpo], indirect=True)
def test_a_batch_whose_every_completion_is_left_out_moves_nothing_and_has_finite_curves(script):
    # DAPO's overlong filtering, where no completion ends within its one token.
    after = weights(grpo.train(small(grpo, "a", max_new_tokens=1, mask_truncated=True)))
    assert not moved(weights(TINY), after)
    found = curves("a")
    assert found["completion/truncated"] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert all(torch.tensor(value).isfinite() for points in found.values() for _, value in points)


@pytest.mark.parametrize("script", [grpo], indirect=True)
@pytest.mark.parametrize("every", [0, 1, 2])
def test_the_reference_becomes_the_policy_of_the_step_that_was_asked_for(script, every, monkeypatch):
    monkeypatch.setattr(grpo, "reward", variety)
    policies, refresh = [], grpo.refresh_sampler

    def keep(sampler, policy):
        policies.append({name: value.clone() for name, value in policy.state_dict().items()})
        refresh(sampler, policy)

    monkeypatch.setattr(grpo, "refresh_sampler", keep)
    grpo.train(small(grpo, "a", ref_refresh_every=every, num_steps=4))
    reference = saved("a")["ref_policy"][0]
    assert moved(policies[0], policies[2])
    assert moved(policies[2], policies[3])
    assert not moved(reference, policies[{0: 0, 1: 3, 2: 2}[every]])
    zero_at = {0: [0], 1: [0, 1, 2, 3], 2: [0, 2]}[every]
    assert [step for step, kl in curves("a")["policy/kl"] if kl < 1e-9] == zero_at


def test_the_end_token_is_trained_when_pad_is_the_end_token(script, monkeypatch):
    # Reward short completions: the policy must learn to stop, and can only by its end token.
    assert AutoTokenizer.from_pretrained(TINY).pad_token_id == AutoTokenizer.from_pretrained(TINY).eos_token_id
    monkeypatch.setattr(script, "reward", lambda completion, problem: -float(len(completion)))
    script.train(small(script, "a", num_prompts=16, num_steps=12, beta=0.0, learning_rate=2e-3))
    lengths = [value for _, value in curves("a")["completion/length"]]
    assert sum(lengths[-3:]) < 0.7 * sum(lengths[:3])


def test_help_shows_every_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(script.Args, description=script.__doc__, args=["--help"])
    said = capsys.readouterr().out
    for field in dataclasses.fields(script.Args()):
        assert f"--{field.name.replace('_', '-')}" in said
    assert "(default: 0.2)" in said
    assert "DeepSeekMath" in said


# ----- Stopping -----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_leaves(script, number, monkeypatch, capfd):
    calls = []

    def signalling(completion: str, problem: dict) -> float:
        calls.append(completion)
        if len(calls) == 16 + 3:  # in the second step
            os.kill(os.getpid(), number)
        return variety(completion, problem)

    monkeypatch.setattr(script, "reward", signalling)
    assert script.main(small(script, "a", num_steps=100)) == 0
    said = capfd.readouterr().err
    assert "finishing this step, then saving; a second signal exits at once" in said
    assert "to resume, run the same command with --run-name a --resume auto" in said
    assert len(calls) == 32
    assert saved("a")["step"] == 2
    assert [step for step, _ in curves("a")["reward/mean"]] == [0, 1]


def test_a_run_in_another_thread_or_a_notebook_sets_no_signal_handlers(script):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: script.train(small(script, "a")))
    thread.start()
    thread.join()
    assert saved("a")["step"] == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_stop_ends_a_run_after_the_step_under_way(script, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(script, "reward", lambda *texts: stop.set() or variety(*texts))
    script.train(small(script, "a"), stop)
    assert saved("a")["step"] == 1


# ----- What must reach the update as it was sampled, and the curves as it was trained -----


def rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The ids where the mask is true."""
    return [row[counted].tolist() for row, counted in zip(ids, mask, strict=True)]


def test_train_samples_scores_and_updates_at_one_temperature(script):
    """Log-probabilities at another temperature are those of another policy than the one that sampled."""
    script.train(small(script, "a", temperature=0.6, num_steps=1, num_minibatches=2, learning_rate=1e-12))
    found = curves("a")
    assert found["policy/ratio_max"][0][1] == pytest.approx(1.0, abs=1e-6)
    assert 0 < found["policy/sampler_gap"][0][1] < 1e-5


def test_train_has_a_ratio_of_exactly_1_for_as_long_as_the_policy_stays(script):
    """PPO Eq. 6: log-probabilities from other shapes, or from the sampler, would round otherwise."""
    # AdamW divides such gradients by its eps of 1e-8: its steps are too short to change a weight.
    still = dict(update_epochs=2, num_minibatches=2, learning_rate=1e-12, max_grad_norm=1e-12)
    script.train(small(script, "a", num_steps=1, micro_batch_tokens=200, **still))
    assert curves("a")["policy/ratio_max"] == [(0, 1.0)]
    assert curves("a")["policy/approx_kl"] == [(0, 0.0)]


def test_train_rewards_every_completion_with_the_problem_of_its_prompt(script, monkeypatch):
    """A group is compared within itself: the answer of another prompt would make it a comparison of prompts."""
    sampled, rewarded, tokenizer = [], [], AutoTokenizer.from_pretrained(TINY)
    keep(monkeypatch, script, "generate_completions", sampled, lambda given, result: (*given[1:3], *result[:2]))
    keep(monkeypatch, script, "compute_rewards", rewarded, lambda given, _: given)
    script.train(small(script, "a", num_steps=1))
    (texts, problems), (*prompts, ids, mask) = rewarded[-1], sampled[-1]
    prompts = tokenizer.batch_decode(rows(*prompts))
    assert [problem["prompt"] for problem in problems] == [prompt for prompt in prompts for _ in range(4)]
    assert texts == tokenizer.batch_decode(rows(ids, mask), skip_special_tokens=True)


def test_train_trains_the_very_ids_that_were_sampled(script, monkeypatch):
    """Decoded and encoded again, 1 and 2 would become 12, which the policy has not written."""
    vocab = {name: i for i, name in enumerate(["<end>", *"0123456789+=#(", "12", "34", "++"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("1", "2"), ("3", "4"), ("+", "+")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained("model")
    special = dict(vocab_size=len(vocab), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    make_model("llama", torch.float32, **special).save_pretrained("model")
    sampled, scored = [], []
    keep(monkeypatch, script, "generate_completions", sampled, lambda _, result: rows(*result[:2]))

    def trained(given: tuple, result: tuple) -> list[list[int]]:
        return rows(given[1].completion_ids, given[1].completion_mask) if result[0].requires_grad else []

    keep(monkeypatch, script, "completion_logprobs", scored, trained)
    script.train(small(script, "a", model="model", num_steps=1, update_epochs=1, num_minibatches=1))
    assert sorted(itertools.chain(*scored)) == sorted(sampled[-1])
    again = [tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids for ids in sampled[-1]]
    assert again != sampled[-1], "no text has shorter ids: this shows nothing"


@pytest.mark.parametrize("script", [ppo], indirect=True)
def test_train_goes_on_where_there_is_nothing_to_learn(script, monkeypatch):
    """Advantages of 0 have a variance of 0, by which whitening divides."""
    monkeypatch.setattr(script, "reward", lambda completion, problem: 0.0)
    assert not moved(weights(TINY), weights(script.train(small(script, "a", beta=0.0))))
    for tag, points in curves("a").items():
        assert [step for step, _ in points] == [0, 1, 2], tag
        assert all(torch.tensor(value).isfinite() for _, value in points), tag


def test_train_logs_means_over_all_tokens_of_all_minibatches(script, monkeypatch):
    """Neither over the padding, which is longest where answers are short, nor of the last minibatch alone."""
    entropies = []

    def trained(given: tuple, result: tuple) -> torch.Tensor:
        return result[1].detach()[given[1].completion_mask] if result[0].requires_grad else torch.empty(0)

    keep(monkeypatch, script, "completion_logprobs", entropies, trained)
    # One nat for every token that was scored.
    monkeypatch.setattr(script, "kl_estimate", lambda logprobs, *rest: (logprobs != 0).float())
    script.train(small(script, "a", num_steps=1, update_epochs=1, num_minibatches=2, micro_batch_tokens=60))
    assert len([x for x in entropies if len(x)]) >= 4
    found = curves("a")
    assert found["policy/entropy"][0][1] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
    assert found["policy/kl"][0][1] == pytest.approx(1.0)


def test_load_policy_turns_dropout_off_and_it_stays_off(script, monkeypatch):
    """With it a ratio is noise, and so is the difference between two passes of one model."""
    make_folder(Path(), "gpt2")
    kept = []
    keep(monkeypatch, script, "prepare", kept, lambda given, _: [given[1], *given[2]])
    monkeypatch.setattr(script, "reward", variety)
    script.train(small(script, "a", model="model", num_steps=1))
    (policy, *others), ids = kept[0], torch.arange(1, 9)[None]
    assert policy.config.resid_pdrop > 0
    assert len(others) == (1 if script is grpo else 2)
    for model in (policy, *others):
        first, second = (model(input_ids=ids).logits for _ in range(2))
        assert first.ne(0).any()
        assert torch.equal(first, second)


def test_load_policy_keeps_weights_that_a_step_of_one_millionth_moves(script, monkeypatch):
    """Weights of 0.3 in bfloat16 are 0.002 apart: every update at the default learning rate would be rounded away."""
    make_folder(Path())
    AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16).save_pretrained("model")
    before = weights("model")
    monkeypatch.setattr(script, "reward", variety)
    after = weights(script.train(small(script, "a", model="model", num_steps=1, learning_rate=1e-6, dtype="bfloat16")))
    assert torch.cat([(after[name] != value).flatten() for name, value in before.items()]).float().mean() > 0.9


def test_optimizer_step_clips_by_the_global_norm_and_the_norm_before_is_logged(script, monkeypatch):
    """One bad batch must not end a run, and its norm must show. Clipped one by one, parameters would change the
    direction of the gradient."""

    def note(optimizer, *_: object) -> None:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())

    norms = []
    monkeypatch.setattr(script, "reward", variety)
    with register_optimizer_step_pre_hook(note):
        script.train(small(script, "a", max_grad_norm=1e-3, num_steps=1, update_epochs=1, num_minibatches=1))
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * (1 if script is grpo else 2)
    for tag in ("policy/grad_norm", *(["value/grad_norm"] if script is ppo else [])):
        assert curves("a")[tag][0][1] > 1e-2
