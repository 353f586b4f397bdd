# SPDX-License-Identifier: MIT
"""The value model: one number for the state before each token, from a copy of the policy's backbone."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import ppo
from helpers.tiny_models import NOT_SHARING, SHARING, batch_of, in_parts, make_model, with_copies
from ppo import ValueModel, completion_logprobs, completion_values


def trained_value_model(policy: nn.Module) -> ValueModel:
    """With a head that is no longer 0, in the policy's dtype."""
    value_model = ValueModel(policy).to(policy.dtype)
    torch.manual_seed(1)
    for parameter in value_model.head.parameters():
        nn.init.normal_(parameter)
    return value_model


@torch.no_grad()
def state_by_state(value_model: ValueModel, batch: ppo.Batch) -> Tensor:
    """The plainest way: every state s_t = (q, o_{<t}) alone, without padding and without the tokens that follow it."""
    values = torch.zeros(batch.completion_ids.shape, dtype=torch.float64)
    batch = with_copies(batch)
    for i, t in batch.completion_mask.nonzero().tolist():
        state = torch.cat([batch.prompt_ids[i][batch.prompt_mask[i]], batch.completion_ids[i, :t]])
        hidden = value_model.backbone(state[None], use_cache=False).last_hidden_state[0, -1]
        values[i, t] = hidden @ value_model.head.weight[0] + value_model.head.bias[0]
    return values


# OPT-350m has states that are narrower than the model that computes them.
PROJECTED = {"opt with a projection": dict(ffn_dim=48, word_embed_proj_dim=16)}


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", SHARING | PROJECTED)
def test_values_are_those_of_the_state_before_each_token(family):
    # The attention of gemma2 takes its softmax in float32, and the least number of float64 is -inf there.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    policy = make_model(family.split()[0], dtype, **(SHARING | PROJECTED)[family])
    value_model, batch = trained_value_model(policy), batch_of(ppo)
    alone = state_by_state(value_model, batch)
    assert alone[batch.completion_mask].std() > 0.1
    # The eager attention of some families takes its softmax in float32.
    tolerance = 1e-5 if family in ("gemma2", "gpt_neo", "hyperclovax", "gemma3_text") else 1e-10
    with torch.no_grad():
        for size, share_prompt in ((12, True), (4, True), (2, True), (1, True), (12, False)):
            found = in_parts(ppo, functools.partial(completion_values, value_model), batch, size, share_prompt)
            torch.testing.assert_close(found.double(), alone, atol=tolerance, rtol=0)


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", NOT_SHARING)
def test_values_of_completions_alone_are_right_where_a_prompt_cannot_be_shared(family):
    value_model = trained_value_model(make_model(family, **NOT_SHARING[family]))
    batch = batch_of(ppo, num_prompts=2, group_size=2, width=12)
    alone = state_by_state(value_model, batch)
    with torch.no_grad():
        plain = completion_values(value_model, with_copies(batch))
    torch.testing.assert_close(plain, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "opt"])
def test_the_value_model_starts_at_exactly_zero(family):
    """Ziegler et al.: the head is initialised to zero. Only its gradient is not zero, and so it learns."""
    value_model = ValueModel(make_model(family, torch.float32, **SHARING[family]))
    for batch in (batch_of(ppo), with_copies(batch_of(ppo))):
        values = completion_values(value_model, batch)
        assert values.shape == batch.completion_ids.shape
        assert values.eq(0).all()
        value_model.zero_grad()
        values.sum().backward()
        assert value_model.head.weight.grad.ne(0).any()
        assert value_model.head.bias.grad == batch.completion_mask.sum()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_value_model_starts_from_a_copy_of_the_policy_and_shares_nothing_with_it(family):
    """Training one does not change the other, be the output head tied to the embeddings (gpt2) or not (llama)."""
    policy, batch = make_model(family, **SHARING[family]), batch_of(ppo)
    value_model = trained_value_model(policy)
    backbone = policy.base_model.state_dict()
    assert backbone.keys() == value_model.backbone.state_dict().keys()
    for name, tensor in value_model.backbone.state_dict().items():
        assert torch.equal(tensor, backbone[name])
    models = policy, value_model
    storages = [{x.untyped_storage().data_ptr() for x in (*m.parameters(), *m.buffers())} for m in models]
    assert storages[0].isdisjoint(storages[1])

    def outputs() -> tuple[Tensor, Tensor]:
        return completion_logprobs(policy, batch, 1.0)[0], completion_values(value_model, batch)

    logprobs, values = outputs()
    values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    torch.optim.SGD(value_model.backbone.parameters(), lr=1e-2).step()
    after = outputs()
    assert torch.equal(after[0], logprobs)
    assert not torch.equal(after[1], values)
    value_model.zero_grad()
    after[0].sum().backward()
    assert all(parameter.grad is None for parameter in value_model.parameters())
    torch.optim.SGD(policy.parameters(), lr=1e-2).step()
    last = outputs()
    assert not torch.equal(last[0], logprobs)
    assert torch.equal(last[1], after[1])


def test_shared_prompts_give_the_value_model_the_same_gradient():
    value_model, batch = trained_value_model(make_model("gpt2", **SHARING["gpt2"])), batch_of(ppo)
    weights = torch.randn(batch.completion_ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for rows in (batch, with_copies(batch)):
        value_model.zero_grad()
        (completion_values(value_model, rows) * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in value_model.parameters()]))
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-12 * gradients[1].norm()


def test_what_stands_in_the_padding_changes_no_value():
    """Other ids there, and columns added; the values there are exactly 0."""
    value_model, batch = trained_value_model(make_model("llama")), batch_of(ppo)
    first = completion_values(value_model, batch)
    other = batch._replace(
        prompt_ids=batch.prompt_ids.where(batch.prompt_mask, 1),
        completion_ids=pad(batch.completion_ids.where(batch.completion_mask, 1), (0, 3)),
        completion_mask=pad(batch.completion_mask, (0, 3)),
    )
    second = completion_values(value_model, other)
    assert torch.equal(second[..., :-3], first)
    assert second[~other.completion_mask].eq(0).all()


def test_the_value_model_is_made_on_the_device_of_the_policy_and_its_values_on_that_of_the_inputs():
    """With another default device, where nothing can be computed, the values are the same. One number a state."""
    policy, batch = make_model("llama"), batch_of(ppo)
    value_model = trained_value_model(policy)
    expected = completion_values(value_model, batch)
    with torch.device("meta"):
        assert torch.equal(completion_values(value_model, batch), expected)
        head = ValueModel(policy).head
    assert head.weight.device == policy.device
    assert head.out_features == 1


def test_values_are_float32_over_a_bfloat16_model():
    value_model = trained_value_model(make_model("llama", torch.bfloat16))
    assert completion_values(value_model, batch_of(ppo)).dtype == torch.float32
