# SPDX-License-Identifier: MIT
"""The gradient of an update is that of its minibatch, however this is cut, ordered, padded and packed. `train` itself
runs, in both scripts, and the gradients of all parameters are caught where the optimizer would step.

And the identities of the first step: what was sampled and what is scored again agree, the ratio is 1 and the KL is 0.
"""

import contextlib
import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import grpo
import ppo
from helpers.runs import SCRIPTS
from helpers.tiny_models import SHARING, VOCAB, make_model, with_copies
from kl import kl_estimate

CHARACTERS = "0123456789+=;#~ abc"
EOS_IDS = torch.arange(0, len(CHARACTERS), 4)  # many, so that rows end at different times
PROMPTS = ["1+2=", "17+5=", "9=", "abc 12+34=", "4+4;", "a=b+c+7="]  # 4 for every step, of the 5 not held out
COMMON = dict(
    data="data.jsonl", num_prompts=4, group_size=4, max_new_tokens=8, temperature=0.8, beta=0.5,
    eval_every=0, save_every=0, device="cpu", dtype="float32",
)  # fmt: skip
PADDING = 3  # columns
STEP_SIZE = 0.02
RUNS = itertools.count()


# ----- A run whose gradients are caught -----


@pytest.fixture(scope="module")
def family(request, tmp_path_factory) -> Path:
    """A folder with a random model that reads characters, whose pad is its end token, and ragged prompts."""
    folder, end = tmp_path_factory.mktemp(request.param) / request.param, CHARACTERS.index("~")
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(CHARACTERS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~", pad_token="~").save_pretrained(folder)
    ends = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    special = SHARING[request.param] | dict(vocab_size=len(CHARACTERS)) | ends
    make_model(request.param, torch.float32, **special).save_pretrained(folder)
    records = [json.dumps({"prompt": prompt, "answer": str(i)}) for i, prompt in enumerate(PROMPTS)]
    (folder / "data.jsonl").write_text("\n".join(records))
    return folder


class ValueModelWithViews(ppo.ValueModel):
    """Not 0 everywhere, where no gradient would reach the transformer."""

    def __init__(self, policy: nn.Module):
        super().__init__(policy)
        self.head.weight.data = torch.linspace(-0.1, 0.1, self.head.in_features)[None].to(policy.dtype)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@functools.cache
def loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


Variant = Callable[[pytest.MonkeyPatch, ModuleType], None]


def updates(
    script: ModuleType, family: Path, options: dict, vary: Variant | None = None, step_size: float = STEP_SIZE
) -> tuple[list, list[Tensor], list]:
    """The completions of a run, in any order; the gradient of each of its updates, all parameters in one tensor; and
    how they were computed: the ids of each pass of the update and, as None, each pass of one layer.

    gpt2 is float64 throughout; llama is float32, as in a real run."""
    dtype = {"gpt2": torch.float64, "llama": torch.float32}[family.name]
    completions, gradients, passes = [], [], []
    policy = copy.deepcopy(loaded(family)).to(dtype)
    policy.register_forward_pre_hook(  # in sampling the ids have no name
        lambda _, __, inputs: passes.extend(inputs[name].tolist() for name in inputs if name == "input_ids"),
        with_kwargs=True,
    )
    layer = next(module for name, module in policy.named_modules() if name.endswith("mlp"))
    layer.register_forward_pre_hook(lambda *_: passes.append(None))
    load_problems = script.load_problems

    def reward(completion: str, problem: dict) -> float:
        completions.append((completion, problem["answer"]))
        return len(set(completion)) / (3 + int(problem["answer"]))

    def with_these_ends(*args) -> tuple:
        tokenizer, _, problems, held_out = load_problems(*args)
        return tokenizer, EOS_IDS, problems, held_out

    def plain_gradient_descent(model: nn.Module, *_) -> Tensor:
        """A step that is proportional to the gradient; the next update's ratios are not 1."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        for p in parameters:
            p.data -= step_size * p.grad
            p.grad = None
        return gradients[-1].norm()

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(family)
        patch.setattr(script, "load_problems", with_these_ends)
        patch.setattr(script, "load_policy", lambda *_: policy)
        patch.setattr(script, "reward", reward)
        patch.setattr(script, "optimizer_step", plain_gradient_descent)
        patch.setattr(script, "check_models", lambda *_: None)
        patch.setattr(script, "can_share_prompt", lambda *x: x[2].share_prompt and not x[2].gradient_checkpointing)
        patch.setattr(script.Run, "save", lambda *_: None)
        patch.setattr("torch.utils.tensorboard.SummaryWriter", Mock())
        patch.setattr(ppo, "ValueModel", ValueModelWithViews)
        if vary:
            vary(patch, script)
        more = dict(value_warmup_steps=0) if script is ppo else {}
        with default_dtype(dtype):
            script.train(script.Args(model=".", run_name=f"{next(RUNS)}", **COMMON | more | options))
    return sorted(completions), gradients, passes


# ----- What must change nothing -----


def in_another_order(patch: pytest.MonkeyPatch, script: ModuleType) -> None:
    """The prompts of each minibatch, and the completions of each prompt, change places; each samples what it did."""
    next_problems, generate = script.next_problems, script.generate_completions
    prompts, within = torch.tensor([1, 0, 3, 2]), torch.tensor([1, 3, 0, 2])

    def shuffled_problems(*args):
        batch = next_problems(*args)
        return [batch[i] for i in prompts]

    def shuffled_completions(policy, prompt_ids, prompt_mask, *args):
        back = prompts.argsort()
        sampled = generate(policy, prompt_ids[back], prompt_mask[back], *args)
        return tuple(x.unflatten(0, (4, 4))[prompts][:, within].flatten(0, 1) for x in sampled)

    patch.setattr(script, "next_problems", shuffled_problems)
    patch.setattr(script, "generate_completions", shuffled_completions)


def in_other_micro_batch_rows(patch: pytest.MonkeyPatch, script: ModuleType) -> None:
    """The last micro-batch first, and its last row first."""
    split_minibatch = script.split_minibatch

    def backwards(*args):
        return [index.flip(0) for index in reversed(split_minibatch(*args))]

    patch.setattr(script, "split_minibatch", backwards)


def with_more_padding(patch: pytest.MonkeyPatch, script: ModuleType) -> None:
    """Columns of other tokens left of the prompts, and of end tokens right of the completions; the same in the padding
    that was there."""
    pad_prompts, generate = script.pad_prompts, script.generate_completions

    def wider_prompts(*args):
        ids, mask = (nn.functional.pad(x, (PADDING, 0)) for x in pad_prompts(*args))
        return ids.where(mask, 5), mask

    def wider_completions(*args):
        ids, mask, logprobs = (nn.functional.pad(x, (0, PADDING)) for x in generate(*args))
        return ids.where(mask, 8), mask, logprobs.where(mask, torch.nan)

    patch.setattr(script, "pad_prompts", wider_prompts)
    patch.setattr(script, "generate_completions", wider_completions)


def with_few_logits_at_once(patch: pytest.MonkeyPatch, script: ModuleType) -> None:
    patch.setattr(script, "max_logits", lambda device: 30 * len(CHARACTERS))


# Flags that must change no gradient, and what is done to the functions of a script.
VARIANTS: dict[str, tuple[dict, Variant | None]] = {
    "one completion at a time": (dict(micro_batch_tokens=1), None),
    "two completions at a time": (dict(micro_batch_tokens=40), None),
    "other micro-batch rows": (dict(micro_batch_tokens=60), in_other_micro_batch_rows),
    "more padding": ({}, with_more_padding),
    "few logits at once": ({}, with_few_logits_at_once),
    "gradient checkpointing": (dict(gradient_checkpointing=True), None),
    "another order": ({}, in_another_order),
    "a prompt for every completion": (dict(share_prompt=False), None),
    "one at a time with its prompt": (dict(share_prompt=False, micro_batch_tokens=1), None),
}
# Two updates each, so that the second one has a KL, and in the second epoch ratios that are not 1.
AVERAGES = ("sequence", "token", "constant")
SETTINGS = {average: dict(loss_average=average, num_steps=2) for average in AVERAGES}
SETTINGS |= {f"{average}, two epochs": dict(loss_average=average, update_epochs=2) for average in AVERAGES}
SETTINGS |= {"other choices": dict(update_epochs=2), "two minibatches": dict(num_minibatches=2)}
CHOICES = {  # whatever else takes a mean over the batch or over a completion
    grpo: dict(
        mask_truncated=True, advantage_scale="batch", advantage_baseline="leave_one_out", kl_placement="reward",
        kl_estimator="k1", ratio_level="sequence",
    ),
    ppo: dict(
        whiten_rewards=True, entropy_coef=0.1, kl_placement="loss", kl_estimator="k2", penalty_kl_target=0.01,
        gae_lambda=0.5,
    ),
}  # fmt: skip
CASES = [("gpt2", setting, variant) for setting in SETTINGS for variant in VARIANTS]
CASES += [("llama", "sequence, two epochs", variant) for variant in VARIANTS]  # float64 says more
# Quick: each variant in some settings.
CASES = [
    case if (i + i // len(VARIANTS)) % 6 == 0 else pytest.param(*case, marks=pytest.mark.slow)
    for i, case in enumerate(CASES)
]


@functools.cache
def plain_updates(script: ModuleType, family: Path, setting: str) -> tuple[list, list[Tensor], list]:
    return updates(script, family, options_of(script, setting))


def options_of(script: ModuleType, setting: str) -> dict:
    """With one micro-batch for every minibatch, the plainest way."""
    choices = CHOICES[script] if setting == "other choices" else {}
    plain = dict(micro_batch_tokens=10**6, num_steps=1, update_epochs=1, num_minibatches=1)
    return plain | SETTINGS[setting] | choices


@SCRIPTS
@pytest.mark.parametrize(("family", "setting", "variant"), CASES, indirect=["family"])
def test_the_gradient_of_the_update_does_not_depend_on_how_the_batch_is_computed(script, family, setting, variant):
    """In float64 to 1e-10, and in float32 to 1e-4, relative to the gradient of each update."""
    options, vary = VARIANTS[variant]
    expected_completions, expected, plain_passes = plain_updates(script, family, setting)
    completions, gradients, passes = updates(script, family, options_of(script, setting) | options, vary)
    assert completions == expected_completions
    assert passes != plain_passes or variant == "more padding"  # tokens are the same, once the gaps are closed
    for found, gradient in zip(gradients, expected, strict=True):
        assert (found - gradient).norm() <= (1e-10 if family.name == "gpt2" else 1e-4) * gradient.norm()


@SCRIPTS
@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gradients_that_are_compared_are_not_all_the_same(script, family, setting):
    """Of 16 completions of several lengths a step; no gradient is 0, and the second update is not the first again."""
    completions, gradients, passes = plain_updates(script, family, setting)
    assert len(completions) == 16 * options_of(script, setting)["num_steps"]
    assert len({len(text) for text, _ in completions}) > 3
    # Plainly computed: all prompts of a minibatch in one pass, and all their completions in another.
    assert {len(ids) for ids in passes if ids} == {n // options_of(script, setting)["num_minibatches"] for n in (4, 16)}
    assert len(gradients) == 2 * (2 if script is ppo else 1)
    assert all(gradient.norm() > 1e-3 for gradient in gradients)
    for first, second in itertools.combinations(gradients, 2):
        assert first.shape != second.shape or (first - second).norm() > 1e-2 * first.norm()


@SCRIPTS
@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
@pytest.mark.parametrize("average", AVERAGES)
def test_the_gradients_of_the_minibatches_have_the_gradient_of_the_batch_as_their_mean(script, family, average):
    """With steps of length 0, between which the ratio stays 1."""
    options = options_of(script, average) | dict(num_steps=1)
    _, expected, _ = updates(script, family, options)
    _, found, _ = updates(script, family, options | dict(num_minibatches=2), step_size=0.0)
    models = len(expected)  # ppo has the value model's before the policy's
    for i, gradient in enumerate(expected):
        first, second = found[i::models]
        assert (first - second).norm() > 0.1 * gradient.norm()
        assert ((first + second) / 2 - gradient).norm() <= 1e-10 * gradient.norm()


def equal_in_the_second_step(patch: pytest.MonkeyPatch, script: ModuleType) -> None:
    """Rewards of 0.1, a number that is not exact, after the 16 of the first step."""
    reward, calls = script.reward, itertools.count()
    patch.setattr(script, "reward", lambda *given: reward(*given) if next(calls) < 16 else 0.1)


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_of_equal_rewards_leave_a_gradient_of_exactly_0_without_a_kl(family, baseline, scale):
    """DeepSeekMath 4.1.2: their advantages are 0. With a KL there is something to learn, once the policy has moved."""
    options = options_of(grpo, "sequence") | dict(advantage_baseline=baseline, advantage_scale=scale)
    for beta in (0.0, 0.5):
        _, (first, second), _ = updates(grpo, family, options | dict(beta=beta), equal_in_the_second_step)
        assert first.norm() > 1e-3
        assert second.ne(0).any() == (beta > 0)


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
@pytest.mark.parametrize("average", AVERAGES)
def test_truncated_completions_stay_whole_and_weigh_nothing(family, average):
    """DAPO's overlong filtering is a matter of the loss alone; its means count the tokens of the others."""
    parts, micro_batches = [], grpo.micro_batches

    def kept(patch: pytest.MonkeyPatch, script: ModuleType) -> None:
        patch.setattr(script, "micro_batches", lambda *args: parts.extend(micro_batches(*args)) or parts)

    updates(grpo, family, options_of(grpo, average) | dict(mask_truncated=True, num_steps=1, max_new_tokens=4), kept)
    (batch,) = parts
    ended = (torch.isin(batch.completion_ids, EOS_IDS) & batch.completion_mask).any(1)
    truncated = ~ended
    assert 0 < truncated.sum() < 16
    assert batch.completion_mask[truncated].all()
    assert (ended & batch.completion_mask.all(1)).any()  # as long, but not truncated
    expected = grpo.loss_weights(batch.completion_mask & ended[:, None], average, 4)
    assert expected[truncated].eq(0).all()
    assert torch.equal(batch.weights, expected)


# ----- The step of the optimizer -----


@SCRIPTS
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -torch.inf, 1e38])
def test_there_is_no_step_where_the_norm_is_0_or_not_finite(script, bad):
    """Only AdamW's momentum would move the weights; NaN would stay in it for good. The norm of 1e38s overflows."""
    weight = torch.nn.Parameter(torch.ones(100))
    module, optimizer = nn.ParameterList([weight]), torch.optim.AdamW([weight], lr=0.1)
    step = lambda gradient: script.optimizer_step(module, optimizer, max_grad_norm=1.0)
    weight.grad = torch.ones(100)
    step(weight)
    before, momentum = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    assert (before < 1).all()
    weight.grad = torch.zeros(100) if bad in (0.0, 1e38) else torch.ones(100)
    weight.grad[:50] = bad
    step(weight)
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["exp_avg"], momentum)
    weight.grad = torch.ones(100)
    step(weight)
    assert (weight < before).all()


# ----- The first step: what was sampled is what is scored -----

ENDS = torch.arange(0, VOCAB, 6)  # many, and the pad id 0 is one of them
IDS = [[5, 0, 7, 8, 9, 0, 0], [4, 3, 2], [0]]  # ragged, with end tokens inside and last, as after a turn of a chat


def sample(script, policy, temperature, share_prompt, group_size=4, max_new_tokens=10):
    prompts = script.pad_prompts(IDS, torch.device("cpu"))
    uniforms = (len(IDS) * group_size, max_new_tokens)
    uniforms = torch.rand(uniforms, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = script.Batch(*prompts, *script.generate_completions(policy, *prompts, uniforms, temperature, ENDS))
    return batch if share_prompt else with_copies(batch)


@SCRIPTS
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.6])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_before_the_first_update_the_ratio_is_1_and_the_kl_is_0(script, name, temperature, share_prompt):
    """Greedy and sampled, with pad == eos and ragged prompts. From the sampler's log-probabilities but for rounding;
    from those that `train` scores, exactly."""
    policy = make_model(name, torch.float32, **SHARING[name])
    ref_policy = copy.deepcopy(policy)
    batch = sample(script, policy, temperature, share_prompt)
    mask, sampled = batch.completion_mask, batch.sampler_logprobs
    ended = torch.isin(batch.completion_ids, ENDS) & mask
    assert ended.sum() > 3
    assert len(set(mask.sum(-1).flatten().tolist())) > 1

    def score(model: nn.Module) -> Tensor:
        return script.completion_logprobs(model, batch, temperature or 1.0)[0]

    logprobs, old_logprobs, ref_logprobs = score(policy), score(policy).detach(), score(ref_policy).detach()
    torch.testing.assert_close(logprobs.detach(), sampled, atol=3e-5, rtol=0)
    assert (logprobs[ended] < 0).all()  # the end token counts, although it is the padding
    for estimator in ("k1", "k2", "k3"):
        assert kl_estimate(logprobs, ref_logprobs, estimator).eq(0).all()
    weights = script.loss_weights(mask, "sequence", 10)
    advantages = torch.randn(len(mask), 1).expand_as(mask)
    for old, tolerance in ((old_logprobs, 0.0), (sampled, 1e-4)):
        if script is grpo:
            _, curves = grpo.grpo_loss(logprobs, old, ref_logprobs, advantages, mask, weights)
            assert curves["kl"].eq(0).all()
        else:
            _, curves = ppo.policy_loss(logprobs, old, advantages, mask, weights)
        assert ((curves["ratio"] - 1).abs() <= tolerance).all()
        assert (curves["approx_kl"] <= tolerance**2).all()
        assert curves["clip_frac"].eq(0).all()
