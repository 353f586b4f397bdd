# SPDX-License-Identifier: MIT
"""What the models say of a completion's tokens: their log-probabilities, the entropies before them, and the values of
the states before them. Shared prompts and what stands in the padding change no number."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import grpo
import ppo
from helpers.tiny_models import (
    NOT_SHARING,
    SHARING,
    VOCAB,
    alone,
    batch_of,
    make_model,
    plain_logprobs,
    trained_value_model,
    with_copies,
)

TEMPERATURE = 0.7


def plain_entropy(policy: torch.nn.Module, text: Tensor, start: int) -> Tensor:
    logits = policy(text[None]).logits[0, start - 1 : -1] / TEMPERATURE
    return torch.distributions.Categorical(logits=logits).entropy()


def plain_values(value_model: ppo.ValueModel, text: Tensor, start: int) -> Tensor:
    """A token's value is that of the state before it."""
    states = value_model.backbone(text[None], use_cache=False).last_hidden_state[0, start - 1 : -1]
    return states @ value_model.head.weight[0] + value_model.head.bias[0]


# A script, what it gives for the tokens of a batch, (N, T), and the plainest way to it.
SCORES = {
    "logprobs": (grpo, lambda policy, batch: grpo.completion_logprobs(policy, batch, TEMPERATURE)[0],
                 partial(plain_logprobs, temperature=TEMPERATURE)),
    "entropy": (grpo, lambda policy, batch: grpo.completion_logprobs(policy, batch, TEMPERATURE, True)[1],
                plain_entropy),
    "values": (ppo, ppo.completion_values, plain_values),
}  # fmt: skip


def model_for(what: str, family: str = "llama", dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    policy = make_model(family, dtype)
    return trained_value_model(policy) if what == "values" else policy


def gradient(model, scalar: Tensor) -> Tensor:
    """In all parameters, flat."""
    model.zero_grad()
    scalar.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize(
    ("what", "family"),
    [*itertools.product(["logprobs", "values"], [*SHARING, *NOT_SHARING]), ("entropy", "llama")],
)
def test_numbers_and_gradients_are_those_of_completions_alone(what, family):
    """However many share a prompt: `predict_shared` and the plain `predict_completions`, for all 12 at once, to 1."""
    # These take the softmax of their attention in float32, and most norms compute in float32, whatever the weights are.
    single = family in ("gemma2", "gpt_neo", "llama4_text", *NOT_SHARING)
    tolerance = 1e-4 if single else 1e-10
    gradient_tolerance = 1e-4 if single else 1e-12 if family in ("gpt2", "gpt_neox", "opt") else 1e-6
    script, score, plain_score = SCORES[what]
    model, batch = model_for(what, family, torch.float32 if single else torch.float64), batch_of(script, width=9)
    expected = alone(partial(plain_score, model), batch).double()
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    expected_gradient = gradient(model, (expected * weights).sum())
    shared = [(size, share) for size, share in ((12, 4), (4, 4), (12, 2), (2, 2)) if family not in NOT_SHARING]
    for size, share in (*shared, (12, 1), (5, 1), (1, 1)):
        parts = [script.take_completions(batch, index, share) for index in torch.arange(12).split(size)]
        found = torch.cat([pad(x, (0, 9 - x.shape[1])) for x in (score(model, part) for part in parts)])
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)
        gap = gradient(model, (found * weights).sum()) - expected_gradient
        assert gap.norm() < gradient_tolerance * expected_gradient.norm()


def test_the_entropy_has_a_gradient_only_if_asked():
    """Without one, its graph holds no memory while the loss is taken backward."""
    model, batch = make_model("llama"), batch_of(grpo)
    for options, asked in (({}, False), ({"entropy_gradient": True}, True)):
        logprobs, entropy = grpo.completion_logprobs(model, batch, 0.7, **options)
        assert (logprobs.requires_grad, entropy.requires_grad) == (True, asked)


@pytest.mark.parametrize("shape", [(2, 3, 5), (5, 300, 1000), (1, 2, 2**20 + 1)])
def test_token_entropy_in_pieces_is_the_plain_sum(shape):
    """-(p log p).sum(-1), and its gradient; also where the rows are more than one piece, or one row is."""
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.linspace(-1, 1, shape[0] * shape[1], dtype=torch.float64).view(shape[:2])
    logp = logits.log_softmax(-1)
    found, expected = grpo.token_entropy(logp), -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((x * weights).sum(), logits, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_token_that_the_model_masks_out_has_no_part_in_the_entropy(masked):
    """As some models do with the unused ids of a padded vocabulary. Neither the numbers nor the gradients are NaN."""
    model, batch = make_model("llama", torch.float32), batch_of(grpo)
    batch = batch._replace(completion_ids=batch.completion_ids.where(batch.completion_ids != 5, 6))
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor(5), masked))
    logprobs, entropy = grpo.completion_logprobs(model, batch, 0.7, entropy_gradient=True)
    assert entropy.isfinite().all()
    assert (entropy[batch.completion_mask] > 0).all()
    assert gradient(model, logprobs.sum() + entropy.sum()).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_over_a_bfloat16_model_the_log_softmax_is_in_float32(temperature):
    model, batch = make_model("llama", torch.bfloat16), batch_of(grpo)
    logits = grpo.predict_completions(model, batch).double()                                # (N, T, V)
    expected = (logits / temperature).log_softmax(-1).gather(2, batch.completion_ids[..., None])[..., 0]
    found = grpo.completion_logprobs(model, batch, temperature)[0].double()
    torch.testing.assert_close(found, expected.where(batch.completion_mask, 0.0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_values_near_50_are_not_rounded_where_the_model_computes_in_bfloat16():
    """There, numbers of bfloat16 are 0.25 apart. The states are rounded, but not what the head makes of them."""
    model, batch, states = trained_value_model(make_model("llama", torch.float32)), batch_of(ppo), []
    model.head.bias.fill_(50.0)
    model.backbone.norm.register_forward_hook(lambda *x: x[2].bfloat16())  # as in families without a last norm
    model.head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        found = ppo.completion_values(model, with_copies(batch))
    expected = states[0].double() @ model.head.weight[0].double() + 50
    torch.testing.assert_close(found.double(), expected.where(batch.completion_mask, 0.0), atol=1e-4, rtol=0)


def test_prompts_run_once_and_only_completions_have_logits():
    """A completion with a prompt of its own is one row without mask and positions, for kernels that take none."""
    model, batch, passes = make_model("llama"), batch_of(grpo), []
    model.register_forward_hook(lambda *x: passes.append((x[2], tuple(x[3].logits.shape))), with_kwargs=True)
    grpo.completion_logprobs(model, with_copies(batch), 1.0)
    ((inputs, shape),) = passes
    assert inputs.keys() == {"input_ids", "use_cache", "logits_to_keep"}
    assert shape == (12, 7, VOCAB)
    passes.clear()
    grpo.completion_logprobs(model, batch, 1.0)
    assert [(tuple(inputs["input_ids"].shape), shape) for inputs, shape in passes] == [
        ((3, 5), (3, 4, VOCAB)), ((12, 7), (12, 6, VOCAB))
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "llama4_text"])
def test_the_value_model_starts_as_a_copy_of_the_policy_at_exactly_zero_and_shares_nothing_with_it(family):
    """Ziegler et al.: the head is initialised to zero. Only its gradient is not zero, and so it learns. Training one
    model does not change the other, be the output head tied to the embeddings (gpt2) or not (llama)."""
    policy = make_model(family, torch.float32)
    value_model, batch = ppo.ValueModel(policy), batch_of(ppo)
    original = {name.partition(".")[2]: value for name, value in policy.state_dict().items()}
    for name, value in value_model.backbone.state_dict().items():
        assert torch.equal(value, original[name])
    memory = [{x.untyped_storage().data_ptr() for x in (*m.parameters(), *m.buffers())} for m in (policy, value_model)]
    assert memory[0].isdisjoint(memory[1])
    values = ppo.completion_values(value_model, batch)
    assert torch.equal(values, torch.zeros(batch.completion_ids.shape))
    values.sum().backward()
    assert value_model.head.weight.grad.ne(0).any()
    assert value_model.head.bias.grad == batch.completion_mask.sum()
    assert all(parameter.grad is not None for parameter in value_model.parameters())
