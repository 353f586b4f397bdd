# SPDX-License-Identifier: MIT
"""Training end to end, in both scripts: the tiny model that comes with them, for a few steps."""

import dataclasses
import itertools
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
from helpers.runs import SCRIPTS, TWINS, curves, make_folder, saved, weights
from helpers.tiny_models import make_model, tokens_of

TINY = grpo.Args.model
SMALL = dict(
    data="data.jsonl", num_prompts=4, group_size=4, max_new_tokens=24, num_steps=3, eval_every=0, save_every=0,

)  # fmt: skip
TAGS = {
    "reward/mean", "reward/std", "completion/length", "completion/truncated", "policy/kl", "policy/entropy",
    "policy/ratio_max", "policy/clip_frac", "policy/approx_kl", "policy/grad_norm", "policy/loss", "policy/skipped",
    "policy/sampler_gap", "eval/greedy", "eval/sampled", "eval/length",
}  # fmt: skip
ONE_UPDATE = dict(num_steps=1, update_epochs=1, num_minibatches=1)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> None:
    """The current one, with a few problems."""
    monkeypatch.chdir(tmp_path)
    lines = Path(grpo.Args.data).read_text().splitlines(keepends=True)[:40]
    Path("data.jsonl").write_text("".join(lines))


def small(script, run_name: str, **args: object) -> grpo.Args | ppo.Args:
    # PPO's first steps train the value model only: these runs are shorter than that.
    return script.Args(run_name=run_name, **SMALL | (dict(value_warmup_steps=0) if script is ppo else {}) | args)


def variety(completion: str, problem: dict) -> float:
    """A reward that differs between the completions of every group."""
    return len(set(completion)) / 10 + len(completion) / 100


def moved(before: dict, after: dict) -> bool:
    return any(not torch.equal(before[name], value) for name, value in after.items())


def record(monkeypatch, script, name: str, what) -> list:
    """A list that gets something of the arguments and the result of every call of a function."""
    function, records = getattr(script, name), []

    def recorded(*given: object, **options: object) -> object:
        result = function(*given, **options)
        records.append(what(given, result))
        return result

    monkeypatch.setattr(script, name, recorded)
    return records




@pytest.mark.slow
@SCRIPTS
def test_one_seed_gives_one_result_and_another_seed_another(script):
    first, again, other = (weights(script.train(small(script, f"{i}", seed=i // 2, num_steps=1))) for i in range(3))
    assert not moved(first, again)
    assert moved(first, other)
    assert curves("0") == curves("1") != curves("2")


CHOICES = {
    grpo: [
        dict(loss_average="token", clip_eps_high=0.28, beta=0.0, mask_truncated=True),  # DAPO
        dict(loss_average="constant", advantage_scale="none", beta=0.0),  # Dr. GRPO
        dict(advantage_baseline="leave_one_out", advantage_scale="none", kl_placement="reward", kl_estimator="k1"),
        dict(ratio_level="sequence", clip_eps=3e-4, clip_eps_high=4e-4, update_epochs=2, num_minibatches=2),  # GSPO
        dict(kl_importance_weight=True, update_epochs=2, ref_refresh_every=1),
        dict(advantage_scale="batch"),
    ],
    ppo: [
        dict(adaptive_kl_target=0.1, entropy_coef=0.01, whiten_rewards=True),
        dict(penalty_kl_target=0.01, kl_placement="loss", kl_estimator="k2", update_epochs=3),
        dict(early_stop_kl=1e-9, value_warmup_steps=1, beta=0.0, whiten_advantages=False, loss_average="token"),
    ],
}


@pytest.mark.slow
@SCRIPTS
def test_every_choice_trains_and_makes_a_difference(script, monkeypatch):
    monkeypatch.setattr(script, "reward", variety)
    plain = weights(script.train(small(script, "plain")))
    for i, choices in enumerate(CHOICES[script]):
        chosen = weights(script.train(small(script, f"{i}", **choices)))
        assert all(value.isfinite().all() for value in chosen.values()), choices
        assert moved(weights(TINY), chosen), choices
        assert moved(plain, chosen), choices


@SCRIPTS
def test_help_shows_every_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(script.Args, description=script.__doc__, args=["--help"])
    said = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in said for field in dataclasses.fields(script.Args))
    assert "(default: 0.2)" in said


# ----- What is learned from -----


@pytest.mark.parametrize("best", [0, 3])
def test_without_a_kl_every_group_whose_rewards_differ_is_trained(best, monkeypatch):
    """Whichever of its completions earns more. The gradient of the others is exactly 0."""
    numbers, pays = itertools.count(), {best, 4 + best}  # one completion of the first two groups of four
    monkeypatch.setattr(grpo, "reward", lambda *_: float(next(numbers) in pays))
    advantages = record(monkeypatch, grpo, "grpo_loss", lambda given, _: given[3][:, 0])
    grpo.train(small(grpo, "a", beta=0.0, num_steps=1))
    of_each_group = torch.cat(advantages).view(4, 4)
    assert sorted(of_each_group.ne(0).all(1).tolist()) == [False, False, True, True]
    assert sorted(of_each_group.eq(0).all(1).tolist()) == [False, False, True, True]




NOTHING_TO_LEARN = {
    "grpo, equal rewards": (grpo, dict(beta=0.0), lambda *_: 0.5),
    "grpo, all truncated": (grpo, dict(max_new_tokens=1, mask_truncated=True), lambda *_: torch.rand(()).item()),
    "ppo, no rewards": (ppo, dict(beta=0.0), lambda *_: 0.0),
}


@pytest.mark.parametrize("case", NOTHING_TO_LEARN)
def test_train_goes_on_where_there_is_nothing_to_learn(case, monkeypatch):
    """Advantages of 0 have a variance of 0, by which whitening divides. A gradient of 0 is no update, yet none that was
    skipped because it was not finite."""
    script, options, reward = NOTHING_TO_LEARN[case]
    monkeypatch.setattr(script, "reward", reward)
    assert not moved(weights(TINY), weights(script.train(small(script, "a", **options))))
    found = curves("a")
    for tag, points in found.items():
        assert [step for step, _ in points] == [0, 1, 2], tag
        assert all(torch.tensor(value).isfinite() for _, value in points), tag
    assert found["policy/grad_norm"] == found["policy/skipped"] == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert found["completion/truncated"][0][1] == 1 or "truncated" not in case


@pytest.mark.parametrize("options", [{}, dict(max_new_tokens=1), dict(num_prompts=1, group_size=1, num_minibatches=1)])
def test_returns_without_a_spread_have_nothing_to_explain(options, monkeypatch):
    """Every completion earned the same, and the curve showed a prediction millions of times worse than a constant. Of
    one completion a step there was a warning, and a curve of NaN."""
    monkeypatch.setattr(ppo, "reward", lambda completion, problem: 1.0)
    ppo.train(small(ppo, "a", beta=0.0, gae_lambda=1.0, **options))
    found = curves("a")
    assert found["value/explained_variance"] == found["reward/std"] == [(0, 0.0), (1, 0.0), (2, 0.0)]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_the_reference_becomes_the_policy_of_the_step_that_was_asked_for(every, monkeypatch):
    monkeypatch.setattr(grpo, "reward", variety)
    copy_of = lambda policy: {name: value.clone() for name, value in policy.state_dict().items()}
    policies = record(monkeypatch, grpo, "refresh_sampler", lambda given, _: copy_of(given[1]))
    grpo.train(small(grpo, "a", ref_refresh_every=every, num_steps=4))
    reference = saved("a")["ref_policy"][0]
    assert moved(policies[0], policies[2])
    assert moved(policies[2], policies[3])
    assert not moved(reference, policies[{0: 0, 1: 3, 2: 2}[every]])
    zero_at = {0: [0], 1: [0, 1, 2, 3], 2: [0, 2]}[every]
    assert [step for step, kl in curves("a")["policy/kl"] if kl < 1e-9] == zero_at


# ----- Stopping -----




@TWINS
def test_a_run_in_a_thread_ends_when_asked_and_sets_no_signal_handlers(script, monkeypatch):
    """As in a notebook. The step under way is finished."""
    stop, before = threading.Event(), (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    monkeypatch.setattr(script, "reward", lambda *texts: stop.set() or variety(*texts))
    thread = threading.Thread(target=script.train, args=(small(script, "a"), stop))
    thread.start()
    thread.join()
    assert saved("a")["step"] == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ----- What must reach the update as it was sampled, and the curves as it was trained -----




@SCRIPTS
def test_train_rewards_every_completion_with_the_problem_of_its_prompt(script, monkeypatch):
    """A group is compared within itself: the answer of another prompt would make it a comparison of prompts."""
    sampled = record(monkeypatch, script, "generate_completions", lambda given, result: (*given[1:3], *result[:2]))
    rewarded = record(monkeypatch, script, "compute_rewards", lambda given, _: given)
    script.train(small(script, "a", num_steps=1))
    (texts, problems), (*prompts, ids, mask) = rewarded[-1], sampled[-1]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompts = tokenizer.batch_decode(tokens_of(*prompts))
    assert [problem["prompt"] for problem in problems] == [prompt for prompt in prompts for _ in range(4)]
    assert texts == tokenizer.batch_decode(tokens_of(ids, mask), skip_special_tokens=True)


@SCRIPTS
def test_train_trains_the_very_ids_that_were_sampled(script, monkeypatch):
    """Decoded and encoded again, 1 and 2 would become 12, which the policy has not written."""
    vocab = {name: i for i, name in enumerate(["<end>", *"0123456789+=#(", "12", "34", "++"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("1", "2"), ("3", "4"), ("+", "+")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained("model")
    special = dict(vocab_size=len(vocab), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    make_model("llama", torch.float32, **special).save_pretrained("model")

    sampled = record(monkeypatch, script, "generate_completions", lambda _, result: tokens_of(*result[:2]))
    scored = record(monkeypatch, script, "completion_logprobs", lambda given, result: (given[1], *result))
    script.train(small(script, "a", model="model", **ONE_UPDATE))
    trained = [part for part, logprobs, _ in scored if logprobs.requires_grad]
    trained = [tokens_of(part.completion_ids, part.completion_mask) for part in trained]
    assert sorted(itertools.chain(*trained)) == sorted(sampled[-1])
    again = [tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids for ids in sampled[-1]]
    assert again != sampled[-1], "no text has shorter ids: this shows nothing"


@SCRIPTS
def test_train_logs_means_over_all_tokens_of_all_minibatches(script, monkeypatch):
    """Neither over the padding, which is longest where answers are short, nor of the last minibatch alone."""
    scored = record(monkeypatch, script, "completion_logprobs", lambda given, result: (given[1], *result))
    monkeypatch.setattr(script, "kl_estimate", lambda logprobs, *_: (logprobs != 0).float())  # one nat a token
    script.train(small(script, "a", **ONE_UPDATE | dict(num_minibatches=2, micro_batch_tokens=60)))
    entropies = [entropy[part.completion_mask] for part, logprobs, entropy in scored if logprobs.requires_grad]
    assert len(entropies) >= 4
    found = curves("a")
    assert found["policy/entropy"][0][1] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
    assert found["policy/kl"][0][1] == pytest.approx(1.0)




@SCRIPTS
def test_load_policy_keeps_weights_that_a_step_of_one_millionth_moves(script, monkeypatch):
    """Weights of 0.3 in bfloat16 are 0.002 apart: every update at the default learning rate would be rounded away."""
    make_folder(Path())
    AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16).save_pretrained("model")
    before = weights("model")
    monkeypatch.setattr(script, "reward", variety)
    after = weights(script.train(small(script, "a", model="model", num_steps=1, learning_rate=1e-6, dtype="bfloat16")))
    assert torch.cat([(after[name] != value).flatten() for name, value in before.items()]).float().mean() > 0.9


@SCRIPTS
def test_optimizer_step_clips_by_the_global_norm_and_the_norm_before_is_logged(script, monkeypatch):
    """One bad batch must not end a run, and its norm must show. Clipped one by one, parameters would change the
    direction of the gradient."""
    norms = []

    def note_norm(optimizer, *_: object) -> None:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())

    monkeypatch.setattr(script, "reward", variety)
    with register_optimizer_step_pre_hook(note_norm):
        script.train(small(script, "a", max_grad_norm=1e-3, **ONE_UPDATE))
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * (1 if script is grpo else 2)
    for tag in ("policy/grad_norm", *(["value/grad_norm"] if script is ppo else [])):
        assert curves("a")[tag][0][1] > 1e-2
