# SPDX-License-Identifier: MIT
"""What connects the formulas: `train` of both scripts against the algorithm in plain words, helpers/plain_*.py, with
every flag that reaches the mathematics: if nothing reads it, that makes a difference."""

import functools
import itertools
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

import grpo
import ppo
from helpers.plain_grpo import plain_grpo
from helpers.plain_ppo import plain_ppo

SCRIPTS = pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
END = 0
CONFIG = GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=END, eos_token_id=END)
PAIRS = [([5, 6], {"line": line}) for line in range(4)]  # four problems with one prompt
# What three steps sampled: two groups (q, [o_1 .. o_3], [r_1 .. r_3]). In the first step two completions are cut off
# after six tokens, in the others all end by the fourth.
ROLLOUTS = [
    [([5, 6], [[3, 4, 1, 7, 2, 2], [1, 0], [0]], [1.0, 0.0, 0.5]),
     ([1, 2, 3], [[2, 0], [6, 6, 5, 0], [4, 3, 7, 1, 1, 5]], [0.0, 2.0, -0.7])],
    [([7], [[2, 2, 0], [4, 0], [6, 5, 0]], [1.0, 0.2, 0.0]),
     ([3, 1, 2, 2], [[7, 0], [0], [1, 3, 5, 0]], [0.0, 1.0, 1.5])],
    [([4], [[4, 6, 0], [3, 0], [2, 7, 0]], [0.5, -0.5, 0.1]), ([2], [[1, 1, 0], [5, 3, 0], [6, 0]], [0.0, 0.0, 1.0])],
]  # fmt: skip
# Two updates in a step, the first so large that ratios and values are clipped in the second. A micro-batch holds two
# completions or three.
BASE = dict(
    num_prompts=2, group_size=3, max_new_tokens=6, num_steps=2, update_epochs=1, num_minibatches=2, learning_rate=0.05,
    micro_batch_tokens=24, dtype="float32", seed=4,
)  # fmt: skip
# The flags of a case, alone and where two meet.
FOR_BOTH = [
    {}, dict(beta=0.3), dict(beta=0.0), dict(learning_rate=0.01), dict(max_grad_norm=0.1), dict(update_epochs=2),
    dict(clip_eps_high=0.4, update_epochs=2), dict(clip_eps=0.4, clip_eps_high=0.2, update_epochs=2),
    dict(num_minibatches=1), dict(temperature=0.7), dict(loss_average="token"), dict(loss_average="constant"),
    dict(loss_average="constant", max_new_tokens=9), dict(update_epochs=2, num_minibatches=1),
]  # fmt: skip
CASES = {
    grpo: [
        *FOR_BOTH, dict(kl_estimator="k1"), dict(kl_estimator="k2"), dict(kl_importance_weight=True),
        dict(num_steps=3, ref_refresh_every=1), dict(num_steps=3, ref_refresh_every=2), dict(ratio_level="sequence"),
        dict(advantage_scale="none"), dict(advantage_baseline="leave_one_out"), dict(mask_truncated=True),
        dict(mask_truncated=True, loss_average="token"), dict(mask_truncated=True, loss_average="constant"),
        dict(kl_importance_weight=True, kl_estimator="k1", update_epochs=2, beta=0.5),
        dict(kl_importance_weight=True, ratio_level="sequence", temperature=1.3),
        dict(advantage_scale="none", advantage_baseline="leave_one_out", loss_average="constant"),
    ],
    ppo: [
        *FOR_BOTH, dict(kl_estimator="k2"), dict(kl_estimator="k3"), dict(gamma=0.8), dict(gamma=0.0),
        dict(gae_lambda=0.5), dict(gae_lambda=0.0), dict(gamma=0.9, gae_lambda=0.6, whiten_advantages=False),
        dict(whiten_advantages=False), dict(value_clip_eps=0.02), dict(value_learning_rate=0.01),
        dict(value_warmup_steps=1), dict(entropy_coef=0.1), dict(entropy_coef=0.1, loss_average="token"),
        dict(penalty_kl_target=0.1), dict(penalty_kl_target=100.0, value_warmup_steps=1),
        dict(adaptive_kl_target=0.42, kl_estimator="k3", beta=0.5),
        dict(num_steps=3, adaptive_kl_target=0.42, beta=0.5, value_warmup_steps=1),
        dict(penalty_kl_target=0.04, adaptive_kl_target=0.1, beta=0.5, update_epochs=2),
    ],
}  # fmt: skip


def arguments(script, flags: dict) -> grpo.Args | ppo.Args:
    own = dict(value_learning_rate=0.05, value_warmup_steps=0) if script is ppo else {}
    return script.Args(**BASE | own | flags)


def label(flags: dict) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items()) or "no flag"


@pytest.fixture
def in_float64(monkeypatch):
    """All that `train` computes: two ways to one number then agree in 9 digits. In float32, rounding would decide the
    sign of a tiny gradient, of which Adam makes a whole step."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_policy() -> nn.Module:
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(CONFIG)
    for parameter in policy.parameters():
        parameter.data.normal_(0, 0.4)
    return policy.to(torch.get_default_dtype()).eval()


def given_rollout(script, sampler: nn.Module, pairs: list, step: int, args: grpo.Args | ppo.Args, *_: object) -> tuple:
    """Stands for `rollout`: gives ROLLOUTS[step]. The padding holds a token like any other."""
    assert pairs == script.next_problems(PAIRS, step, args.num_prompts, args.seed), f"other problems in step {step}"
    completions = [torch.tensor(o) for _, group, _ in ROLLOUTS[step] for o in group]
    ids = pad_sequence(completions, batch_first=True, padding_value=3)                      # (N, T)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(o)] for o in completions])       # (N, T)
    prompts = script.pad_prompts([q for q, _, _ in ROLLOUTS[step]], torch.device("cpu"))    # (B, P), twice
    rewards = torch.tensor([r for _, _, rewards in ROLLOUTS[step] for r in rewards])        # (N,)
    ended = torch.tensor([o[-1].item() == END for o in completions])                        # (N,)
    return script.Batch(*prompts, ids, mask, torch.zeros(mask.shape)), rewards, ended


class Run:
    """Stands for `Run` of the scripts: keeps models and curves, writes no file."""

    def __init__(self, args, tokenizer, eos_ids, held_out, sampler, models, betas, stop):
        self.models, self.curves, self.folder, self.bar = models, [], Path(), range(args.num_steps + 1)
        Run.latest = self

    def evaluate_and_save(self, step: int) -> bool:
        return step == self.bar[-1]

    def log_step(self, metrics: dict) -> None:
        self.curves.append({name: float(value) for name, value in metrics.items()})


def spy(monkeypatch, script, name: str, note: Callable = lambda *args: args) -> list:
    """A list that gets (note(*arguments), result) of every call of a function; noted before the call."""
    function, calls = getattr(script, name), []

    def noting(*args: object, **options: object) -> object:
        noted = note(*args)
        calls.append((noted, function(*args, **options)))
        return calls[-1][1]

    monkeypatch.setattr(script, name, noting)
    return calls


def train(script, monkeypatch, flags: dict) -> Run:
    """The real `train`, of a policy built in code, on ROLLOUTS."""
    monkeypatch.setattr(script, "load_policy", lambda *_: make_policy())
    monkeypatch.setattr(script, "load_problems", lambda *_: (None, torch.tensor([END]), PAIRS, []))
    monkeypatch.setattr(script, "check_policy", lambda *_: None)
    monkeypatch.setattr(script, "rollout", functools.partial(given_rollout, script))
    monkeypatch.setattr(script, "Run", Run)
    script.train(arguments(script, flags))
    return Run.latest


@functools.cache
def plain(script, **flags: object) -> tuple[dict, list]:
    """The plain loops: by its name in the curves, each model and its updates; and numbers of every step."""
    policy, args = make_policy(), arguments(script, flags)
    rollouts = ROLLOUTS[: args.num_steps]
    if script is grpo:
        return {"policy": (policy, plain_grpo(policy, rollouts, args, eos_ids=[END]))}, []
    flat = [[(q, o, r) for q, *pairs in groups for o, r in zip(*pairs, strict=True)] for groups in rollouts]
    value_model, updates, value_updates, steps = plain_ppo(policy, flat, args)
    return {"policy": (policy, updates), "value": (value_model, value_updates)}, steps


def same(first: Iterable[Tensor], second: Iterable[Tensor], tolerance: float) -> bool:
    """Whether there are as many numbers, and none differs by more than a part of the largest one."""
    one, two = (torch.cat([x.flatten() for x in tensors]) for tensors in (first, second))
    return len(one) == len(two) and bool((one - two).abs().max() <= tolerance * one.abs().max())


def check(holds: bool, flags: dict, sentence: str) -> None:
    """Fail with a sentence that names the flags, and no table of numbers."""
    if not holds:
        pytest.fail(f"{label(flags)}: {sentence}", pytrace=False)


@pytest.mark.parametrize(
    ("script", "flags"), [pytest.param(s, x, id=f"{s.__name__} {label(x)}") for s in CASES for x in CASES[s]]
)
def test_train_goes_where_the_plain_loops_go(script, flags, in_float64, monkeypatch):
    """The same losses, gradients and weights, the same KLs and betas; and every flag makes a difference here."""
    gradient = lambda model, *_: (model, [parameter.grad.clone() for parameter in model.parameters()])
    updates = spy(monkeypatch, script, "optimizer_step", gradient)
    controllers = {name: spy(monkeypatch, ppo, name) for name in ("penalty_beta", "adaptive_beta")}
    run, args, (models, steps) = train(script, monkeypatch, flags), arguments(script, flags), plain(script, **flags)
    check((run.models["ref_policy"][0] is None) == (args.beta == 0), flags, "a reference policy")
    for name, (plain_model, plain_updates) in models.items():
        model, _ = run.models["policy" if name == "policy" else "value_model"]
        gradients = [gradient for (updated, gradient), _ in updates if updated is model]
        check(len(gradients) == len(plain_updates), flags, f"{len(gradients)} updates of {name}")
        for k, (_, expected, _) in enumerate(plain_updates):
            check(same(expected, gradients[k], 1e-9), flags, f"another gradient of {name} in update {k}")
        check(same(plain_model.parameters(), model.parameters(), 1e-9), flags, f"other weights of {name}")
        loss = fmean(curves[f"{name}/loss"] for curves in run.curves if f"{name}/loss" in curves)
        check(abs(loss - fmean(loss for loss, *_ in plain_updates)) < 1e-9, flags, f"another loss of {name}")
    for step, expected in enumerate(steps):
        for name in ("policy/kl", "policy/beta") if args.beta else ():
            check(abs(run.curves[step][name] - expected[name]) < 1e-9, flags, f"another {name} in step {step}")
    for name, calls in controllers.items():
        expected = [step[name] for step in steps if name in step]
        check([kl for (_, kl, _), _ in calls] == pytest.approx(expected, rel=1e-9), flags, f"another KL in {name}")
    for name in flags.keys() - {"num_steps"}:  # else nobody would see that `train` ignores it
        others, _ = plain(script, **{other: value for other, value in flags.items() if other != name})
        every = lambda updates: [g for _, gradient, _ in updates for g in gradient]
        differs = any(not same(every(models[x][1]), every(others[x][1]), 1e-3) for x in models)
        check(differs, flags, f"--{name.replace('_', '-')} makes no difference here")


@pytest.fixture
def random_rewards(monkeypatch) -> None:
    for script in (grpo, ppo):
        monkeypatch.setattr(script, "decode", lambda tokenizer, ids, *_: [""] * len(ids))
        monkeypatch.setattr(script, "compute_rewards", lambda texts, _: [random.random() for _ in texts])


@SCRIPTS
def test_rollout_draws_other_numbers_for_every_seed_step_and_process(script, random_rewards, monkeypatch):
    """Else steps or processes would sample the same completions of a prompt. A reward may draw, too."""
    calls, drawn = spy(monkeypatch, script, "generate_completions", lambda *args: args[3:6]), []
    for seed, step, rank in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (1, 0, 0)]:
        monkeypatch.setattr(script, "world", lambda rank=rank: (rank, 2))
        args = arguments(script, dict(seed=seed, temperature=0.7))
        batch, rewards, _ = script.rollout(make_policy(), PAIRS[:2], step, args, None, torch.tensor([END]))
        drawn.append((batch.completion_ids.tolist(), rewards.tolist()))
    assert drawn.pop() == drawn[0]
    for what in zip(*drawn, strict=True):
        assert all(one != two for one, two in itertools.combinations(what, 2))
    assert calls[0][0] == (3, 6, 0.7)  # G, --max-new-tokens, --temperature


@SCRIPTS
def test_evaluate_takes_current_weights_and_always_the_same_numbers(script, random_rewards, monkeypatch, tmp_path):
    """Greedy is temperature 0, sampled is --temperature."""
    note = lambda policy, *given: (policy.lm_head.weight[0, 0].item(), given[3:5], torch.get_rng_state().tolist())
    calls = spy(monkeypatch, script, "generate_completions", note)
    run, policy, logged = object.__new__(script.Run), make_policy(), []
    vars(run).update(
        args=arguments(script, dict(temperature=0.7)), eos_ids=torch.tensor([END]), held_out=PAIRS[:2], step=3,
        tokenizer=SimpleNamespace(decode=str), sampler=make_policy(), policy=policy, folder=tmp_path, log=logged.append,
    )  # fmt: skip
    for weight in (0.5, 0.25):
        policy.lm_head.weight.data[0, 0] = weight           # the sampler has another one until it is refreshed
        torch.manual_seed(random.getrandbits(60))           # as training leaves it: anything
        run.evaluate()
    weights, temperatures, states = zip(*(noted for noted, _ in calls), strict=True)
    assert weights == (0.5, 0.5, 0.25, 0.25)
    assert temperatures == ((6, 0.0), (6, 0.7), (6, 0.0), (6, 0.7))  # and --max-new-tokens
    assert states[1] == states[3]
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()][2:4]  # sampled
    for name, curve in (("reward", "eval/sampled"), ("length", "eval/length")):
        assert logged[0][curve] == pytest.approx(fmean(line[name] for line in lines)), curve


@SCRIPTS
def test_the_curves_are_means_over_the_tokens_or_the_completions_of_the_step(script, in_float64, monkeypatch):
    """Of one step with two updates of each token, on ROLLOUTS[0]."""
    mean = lambda tokens: torch.cat(list(tokens)).mean().item()
    monkeypatch.setattr(nn.init, "zeros_", nn.init.ones_)   # of the value model's head: V is not 0
    losses = spy(monkeypatch, script, "grpo_loss" if script is grpo else "policy_loss")
    scores = spy(monkeypatch, script, "completion_logprobs", lambda _, part, *__: part.completion_mask)
    values = spy(monkeypatch, script, "value_loss") if script is ppo else []
    curves = train(script, monkeypatch, dict(num_steps=1, update_epochs=2, max_grad_norm=1e-3)).curves[0]
    rewards, at = [1.0, 0.0, 0.5, 0.0, 2.0, -0.7], 4 if script is grpo else 3  # `at` which argument is the mask
    std = stdev(rewards) if script is ppo else (stdev(rewards[:3]) + stdev(rewards[3:])) / 2  # of the groups
    expected = {"reward/mean": fmean(rewards), "reward/std": std}
    expected |= {"completion/length": 3.5, "completion/truncated": 2 / 6}
    expected["policy/entropy"] = mean(entropy[mask] for mask, (logp, entropy) in scores if logp.requires_grad)
    for name in losses[0][1][1]:                            # clip_frac, approx_kl, ratio, and GRPO's kl
        expected[f"policy/{name}"] = mean(metrics[name][args[at]] for args, (_, metrics) in losses)
    if script is ppo:
        expected["value/clip_frac"] = mean(clipped[args[at]] for args, (_, clipped) in values)
        old_values, returns = (torch.cat([args[i][args[at]] for args, _ in values]) for i in (1, 2))
        expected["value/explained_variance"] = 1 - ((returns - old_values).var() / returns.var()).item()
    for name, value in expected.items():
        assert curves[name] == pytest.approx(value), name
    assert curves["policy/grad_norm"] > 0.01              # before it is clipped: a bad batch must show


def test_train_of_ppo_says_that_the_policy_will_not_learn(monkeypatch):
    said = spy(monkeypatch, ppo, "say")
    runs = [train(ppo, monkeypatch, dict(num_steps=2, value_warmup_steps=steps)) for steps in (1, 2)]
    assert len(said) == len(runs) - 1  # where all steps train the value model alone


@SCRIPTS
def test_train_computes_in_the_dtype_of_the_flag(script, monkeypatch):
    scores = spy(monkeypatch, script, "completion_logprobs", lambda *_: torch.is_autocast_enabled("cpu"))
    samplers = spy(monkeypatch, script, "refresh_sampler", lambda sampler, _: next(sampler.parameters()).dtype)
    train(script, monkeypatch, dict(dtype="bfloat16", num_steps=1))
    assert samplers[0][0] == torch.bfloat16
    assert all(is_autocast for is_autocast, _ in scores)
