# SPDX-License-Identifier: MIT
"""How a batch is cut changes no number: micro-batches, shared prompts, minibatches, the parts of the processes, order
and padding. First the functions that cut, then `train` itself, whose gradients are caught where it would step. And the
first step of all: what was sampled is what is scored."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

import grpo
import ppo
from helpers.runs import SCRIPTS, make_folder
from helpers.tiny_models import VOCAB, trained_value_model

# ----- Cutting the batch -----


def cut(batch, minibatch: Tensor, logits: float = 10**9, rank: int = 0, processes: int = 1, **args) -> tuple:
    """The indices of the micro-batches of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "max_logits", lambda device: logits)
        patch.setattr(grpo, "world", lambda: (rank, processes))
        model = SimpleNamespace(config=LlamaConfig(vocab_size=VOCAB))
        return grpo.split_minibatch(model, batch, minibatch, grpo.Args(**args))








# ----- A run whose gradients are caught -----

EOS_IDS = [0, 3, 7]  # "2" and "6" end a completion, too, so that completions end at different times
PROMPTS = ["1+2=", "17+5=", "9=", "12+34+56=", "4+4#", "1=7+3+2="]  # 4 for every step, of the 5 not held out
COMMON = dict(
    model="model", data="data.jsonl", num_prompts=4, group_size=4, max_new_tokens=8, temperature=0.8, beta=0.5,
    eval_every=0, save_every=0, dtype="float32", micro_batch_tokens=10**6, num_steps=1, update_epochs=1,
    num_minibatches=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[None]:
    """The current one, with ragged prompts and a model whose pad is an end token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("batching"))
        make_folder(Path(), "gpt2")
        GenerationConfig(eos_token_id=EOS_IDS).save_pretrained("model")
        records = [json.dumps({"prompt": prompt, "answer": str(i)}) + "\n" for i, prompt in enumerate(PROMPTS)]
        Path("data.jsonl").write_text("".join(records))
        yield


@pytest.fixture
def in_float64(folder) -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def updates(script: ModuleType, options: dict, vary: Callable | None = None, step_size=0.05) -> SimpleNamespace:
    """What a run does, once `vary` has changed functions of the script: its completions, sorted, each with the answer
    to its prompt; the gradient of each update, all parameters in one tensor; the ids of each pass of the update; the
    curves of each step."""
    found = SimpleNamespace(completions=[], gradients=[], passes=[], curves=[])
    policy = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float64).eval()

    def note_pass(_, __, inputs: dict) -> None:
        if "input_ids" in inputs:  # in sampling the ids have no name
            found.passes.append(inputs["input_ids"].tolist())

    def reward(completion: str, problem: dict) -> float:
        found.completions.append((completion, problem["answer"]))
        return len(set(completion)) / (3 + int(problem["answer"]))

    def plain_gradient_descent(model: nn.Module, *_) -> Tensor:
        """A step that is proportional to the gradient; the next update's ratios are not 1."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        found.gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        for p in parameters:
            p.data -= step_size * p.grad
            p.grad = None
        return found.gradients[-1].norm()

    policy.register_forward_pre_hook(note_pass, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_policy", lambda *_: policy)
        patch.setattr(script, "reward", reward)
        patch.setattr(script, "optimizer_step", plain_gradient_descent)
        patch.setattr(script, "check_models", lambda *_: None)
        patch.setattr(script, "can_share_prompt", lambda *x: x[2].share_prompt and not x[2].gradient_checkpointing)
        patch.setattr(script.Run, "save", lambda *_: None)
        patch.setattr(script.Run, "log_step", lambda _, x: found.curves.append({tag: float(x[tag]) for tag in x}))
        patch.setattr(ppo, "ValueModel", trained_value_model)  # where it is 0, no gradient reaches the transformer
        if vary:
            vary(patch, script)
        script.train(script.Args(**COMMON | (dict(value_warmup_steps=0) if script is ppo else {}) | options))
    found.completions.sort()
    return found


def with_more_padding(patch: pytest.MonkeyPatch, script: ModuleType) -> None:
    """Columns of other tokens left of the prompts, and of end tokens right of the completions; the same in the padding
    that was there."""
    pad_prompts, generate = script.pad_prompts, script.generate_completions

    def wider_prompts(*args):
        ids, mask = (nn.functional.pad(x, (3, 0)) for x in pad_prompts(*args))
        return ids.where(mask, 5), mask

    def wider_completions(*args):
        ids, mask, logprobs = (nn.functional.pad(x, (0, 3)) for x in generate(*args))
        return ids.where(mask, EOS_IDS[-1]), mask, logprobs.where(mask, torch.nan)

    patch.setattr(script, "pad_prompts", wider_prompts)
    patch.setattr(script, "generate_completions", wider_completions)


VARIANTS = {  # flags that must change no gradient, and what is done to the functions of a script
    "one completion at a time": (dict(micro_batch_tokens=1), None),
    "two completions at a time": (dict(micro_batch_tokens=40), None),
    "a prompt for every completion": (dict(share_prompt=False), None),
    "one at a time with its prompt": (dict(share_prompt=False, micro_batch_tokens=1), None),
    "gradient checkpointing": (dict(gradient_checkpointing=True), None),
    "more padding": ({}, with_more_padding),
}
SETTINGS = {  # several updates each: the later ones have a KL, or ratios that are not 1
    "sequence": dict(loss_average="sequence", num_steps=2),
    "token": dict(loss_average="token", update_epochs=2),
    "constant": dict(loss_average="constant", num_minibatches=2),
    "other choices": dict(update_epochs=2),
}
OTHER_CHOICES = {  # whatever else takes a mean over the batch or over a completion
    grpo: dict(
        mask_truncated=True, advantage_scale="batch", advantage_baseline="leave_one_out", kl_placement="reward",
        kl_estimator="k1", ratio_level="sequence",
    ),
    ppo: dict(
        whiten_rewards=True, entropy_coef=0.1, kl_placement="loss", kl_estimator="k2", penalty_kl_target=0.01,
        gae_lambda=0.5,
    ),
}  # fmt: skip
CASES = [  # quick: every variant in one setting
    pytest.param(setting, variant, marks=() if i == j % len(SETTINGS) else pytest.mark.slow)
    for i, setting in enumerate(SETTINGS)
    for j, variant in enumerate(VARIANTS)
]


def options_of(script: ModuleType, setting: str) -> dict:
    return SETTINGS[setting] | (OTHER_CHOICES[script] if setting == "other choices" else {})


@functools.cache
def plain_updates(script: ModuleType, setting: str) -> SimpleNamespace:
    """With one micro-batch for every minibatch. Its gradients are not all alike: to compare them shows something."""
    options = options_of(script, setting)
    found = updates(script, options)
    assert len(found.completions) == 16 * options.get("num_steps", 1)
    assert len({len(text) for text, _ in found.completions}) > 3
    # All prompts of a minibatch in one pass, and all their completions in another.
    assert {len(ids) for ids in found.passes} == {n // options.get("num_minibatches", 1) for n in (4, 16)}
    assert len(found.gradients) == 2 * (2 if script is ppo else 1)
    assert all(gradient.norm() > 1e-3 for gradient in found.gradients)
    for first, second in itertools.combinations(found.gradients, 2):
        assert first.shape != second.shape or (first - second).norm() > 1e-2 * first.norm()
    return found






@SCRIPTS
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -torch.inf, 1e38])
def test_there_is_no_step_where_the_norm_is_0_or_not_finite(script, bad):
    """Only AdamW's momentum would move the weights; NaN would stay in it for good. The norm of 1e38s overflows."""
    weight = nn.Parameter(torch.ones(100))
    module, optimizer = nn.ParameterList([weight]), torch.optim.AdamW([weight], lr=0.1)

    def step(gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and its momentum after it."""
        weight.grad = gradient
        script.optimizer_step(module, optimizer, max_grad_norm=1.0)
        return weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()

    first = step(torch.ones(100))
    assert (first[0] < 1).all()
    second = step(torch.full((100,), bad).where(torch.arange(100) < 50, 0.0 if bad in (0.0, 1e38) else 1.0))
    assert all(map(torch.equal, first, second))
    assert (step(torch.ones(100))[0] < first[0]).all()


# ----- The first step -----


