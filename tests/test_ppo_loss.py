# SPDX-License-Identifier: MIT
"""What must hold for PPO: the loss of the policy (PPO Eqs. 7 and 8) and of the value model, the rewards of the tokens
(DeepSeekMath Eq. 2), the value model itself, and how well it foretells.

Both losses are a sum of weight times a term, so their gradient in the weights shows the term of every token, exactly:
that is how clipping is looked at here, without a copy of the code.
"""

import functools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import pad

import ppo
from advantage import gae
from helpers.strategies import Batch, assert_close, batches, dtypes, float64, garbage, masks, numbers, tensors
from helpers.tiny_models import NOT_SHARING, SHARING, batch_of, in_parts, make_model, with_copies
from kl import exact_kl, kl_estimate
from ppo import (
    ValueModel,
    completion_logprobs,
    completion_values,
    explained_variance,
    loss_weights,
    policy_loss,
    rewards_with_kl,
    value_loss,
)

eps = st.floats(1e-3, 0.999)
value_eps = st.floats(1e-3, 5.0)
averages = st.sampled_from(["sequence", "token", "constant"])
betas = st.floats(0, 10)
MAX_NEW_TOKENS = 7  # more than the tests' longest row


def loss_and_curves(batch: Batch, weights: Tensor | None = None, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss`, which has no use for the reference policy; without weights every token weighs 1."""
    weights = torch.ones_like(batch.logprobs) if weights is None else weights
    logprobs, old_logprobs, _, advantages, mask = batch
    return policy_loss(logprobs, old_logprobs, advantages, mask, weights, **options)


def objective(batch: Batch, **options) -> Tensor:
    """What is averaged in Eq. 7 or Eq. 8, token by token, (N, T)."""
    weights = torch.zeros_like(batch.logprobs).requires_grad_()
    return -torch.autograd.grad(loss_and_curves(batch, weights, **options)[0], weights)[0]


def loss_and_gradient(batch: Batch, weights: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in the log-probabilities of the policy, (N, T)."""
    logprobs = batch.logprobs.detach().requires_grad_()
    loss, _ = loss_and_curves(batch._replace(logprobs=logprobs), weights, **options)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def ratio(batch: Batch) -> Tensor:
    return loss_and_curves(batch)[1]["ratio"]


def average(mask: Tensor, loss_average: str) -> Tensor:
    return loss_weights(mask, loss_average, MAX_NEW_TOKENS)


# ----- The ratio and its clipping: PPO Eq. 7 -----


@given(batches())
def test_the_ratio_is_that_of_the_probabilities(batch):
    """PPO section 3: r = pi_theta / pi_old; one in the padding. No curve carries a gradient."""
    log_ratio = (batch.logprobs - batch.old_logprobs).where(batch.completion_mask, 0.0)
    batch.logprobs.requires_grad_()
    for options in ({}, {"beta_old": 1.0}):
        _, curves = loss_and_curves(batch, **options)
        assert curves.keys() == {"ratio", "clip_frac", "approx_kl"}
        assert torch.equal(curves["ratio"], log_ratio.exp())
        assert not any(curve.requires_grad for curve in curves.values())


@given(batches(), eps, eps)
def test_the_clipped_objective_is_a_lower_bound(batch, clip_eps, clip_eps_high):
    """PPO Eq. 7 is pessimistic: min(rA, clip(r)A) <= rA, exactly; `clip_frac` marks the tokens where it is less."""
    options = dict(clip_eps=clip_eps, clip_eps_high=clip_eps_high)
    bound = (ratio(batch) * batch.advantages).where(batch.completion_mask, 0.0)
    assert (objective(batch, **options) <= bound).all()
    clip_frac = loss_and_curves(batch, **options)[1]["clip_frac"]
    assert torch.equal(clip_frac, (objective(batch, **options) < bound).float())


@given(batches(), eps, eps)
def test_clip_bounds_are_one_minus_clip_eps_and_one_plus_clip_eps_high(batch, clip_eps, clip_eps_high):
    """PPO Eq. 7: only the upper bound matters for A >= 0 and only the lower one for A < 0, exactly."""
    r, advantages = ratio(batch), batch.advantages
    low, high = (torch.tensor(bound, dtype=r.dtype) for bound in (1 - clip_eps, 1 + clip_eps_high))
    bound = torch.where(advantages >= 0, high, low)
    expected = torch.minimum(r * advantages, bound * advantages).where(batch.completion_mask, 0.0)
    assert torch.equal(objective(batch, clip_eps=clip_eps, clip_eps_high=clip_eps_high), expected)


@given(batches(), eps)
def test_clip_eps_is_both_bounds_unless_clip_eps_high_is_given(batch, clip_eps):
    """PPO Eq. 7, and DAPO's clip-higher as the exception. Without either, eps is the 0.2 of the paper."""
    assert torch.equal(
        objective(batch, clip_eps=clip_eps), objective(batch, clip_eps=clip_eps, clip_eps_high=clip_eps)
    )
    assert torch.equal(objective(batch), objective(batch, clip_eps=0.2))


def test_clip_higher_moves_the_upper_bound_alone():
    """DAPO's 0.2 and 0.28, at ratios outside, inside and between the bounds, for A = 1 and A = -1."""
    r = torch.tensor([[0.5, 0.9, 1.1, 1.25, 1.5]], dtype=torch.float64)
    mask, zero = torch.ones_like(r, dtype=torch.bool), torch.zeros_like(r)
    for sign, symmetric, higher in (
        (1.0, [0.5, 0.9, 1.1, 1.2, 1.2], [0.5, 0.9, 1.1, 1.25, 1.28]),
        (-1.0, [-0.8, -0.9, -1.1, -1.25, -1.5], [-0.8, -0.9, -1.1, -1.25, -1.5]),
    ):
        batch = Batch(r.log(), zero, zero, sign * torch.ones_like(r), mask)
        for options, expected in (({}, symmetric), ({"clip_eps_high": 0.28}, higher)):
            found = objective(batch, clip_eps=0.2, **options)
            assert found[0].tolist() == pytest.approx(expected)
            clip_frac = loss_and_curves(batch, clip_eps=0.2, **options)[1]["clip_frac"]
            assert torch.equal(clip_frac.bool(), (found - sign * r).abs() > 1e-9)


@given(batches(), eps, eps)
def test_the_gradient_vanishes_where_nothing_more_can_be_gained(batch, clip_eps, clip_eps_high):
    """Of PPO Eq. 7, d/dr = A if (A > 0 and r <= 1 + eps_high) or (A < 0 and r >= 1 - eps_low), else exactly 0.

    d/dlogprobs is r times that."""
    r, advantages = ratio(batch), batch.advantages
    gradient = -loss_and_gradient(batch, clip_eps=clip_eps, clip_eps_high=clip_eps_high)[1]
    inside = torch.where(advantages > 0, r <= 1 + clip_eps_high, r >= 1 - clip_eps)
    edge = torch.minimum((r - 1 - clip_eps_high).abs(), (r - 1 + clip_eps).abs()) < 1e-6
    assert gradient[~inside & ~edge].eq(0).all()
    counts = inside & ~edge & batch.completion_mask
    assert_close(gradient[counts], (r * advantages)[counts])


@given(batches(), eps)
def test_within_the_clip_range_nothing_is_clipped(batch, clip_eps):
    """|r - 1| < eps implies L^CLIP (PPO Eq. 7) = L^CPI (Eq. 6), exactly."""
    r = ratio(batch)
    inside = ((r - 1).abs() < clip_eps - 1e-6) & batch.completion_mask
    assert torch.equal(objective(batch, clip_eps=clip_eps)[inside], (r * batch.advantages)[inside])
    assert loss_and_curves(batch, clip_eps=clip_eps)[1]["clip_frac"][inside].eq(0).all()


@given(batches(on_policy=True), averages, eps, st.none() | betas)
def test_on_policy_the_gradient_is_that_of_the_vanilla_policy_gradient(batch, loss_average, clip_eps, beta_old):
    """PPO Eq. 1: at r = 1, d loss / d logprobs = -A weight, exactly. The penalty of Eq. 8 is at its minimum there and
    adds nothing."""
    weights = average(batch.completion_mask, loss_average).to(batch.logprobs)
    assert ratio(batch).eq(1).all()
    gradient = loss_and_gradient(batch, weights, clip_eps=clip_eps, beta_old=beta_old)[1]
    assert torch.equal(gradient, -batch.advantages * weights)


@given(batches(), averages, eps, st.floats(1e-3, 1e3))
def test_scaled_advantages_scale_the_loss_and_the_gradient(batch, loss_average, clip_eps, scale):
    """A -> cA with c > 0; and A = 0 gives exactly 0 for both."""
    options = dict(weights=average(batch.completion_mask, loss_average), clip_eps=clip_eps)
    before = loss_and_gradient(batch, **options)
    after = loss_and_gradient(batch._replace(advantages=scale * batch.advantages), **options)
    size = scale * (ratio(batch) * batch.advantages).abs().max()
    for found, expected in zip(after, before, strict=True):
        assert_close(found, scale * expected, scale=size)
    for found in loss_and_gradient(batch._replace(advantages=torch.zeros_like(batch.advantages)), **options):
        assert found.eq(0).all()


# ----- The KL penalty instead of clipping: PPO Eq. 8 -----


@given(batches(), betas, eps)
def test_the_penalised_objective_is_the_unclipped_one_less_beta_times_the_kl(batch, beta_old, clip_eps):
    """PPO Eq. 8, token by token, whatever eps is; a penalty of 0 leaves rA, exactly."""
    unclipped = (ratio(batch) * batch.advantages).where(batch.completion_mask, 0.0)
    kl = loss_and_curves(batch)[1]["approx_kl"]
    found = objective(batch, beta_old=beta_old, clip_eps=clip_eps)
    assert_close(found, unclipped - beta_old * kl, scale=unclipped.abs().max())
    assert torch.equal(objective(batch, beta_old=0.0, clip_eps=clip_eps), unclipped)
    gradient = -loss_and_gradient(batch, beta_old=0.0, clip_eps=clip_eps)[1]
    assert_close(gradient, unclipped)


@given(batches())
def test_approx_kl_is_never_negative_and_zero_where_the_policies_agree(batch):
    """k3 of KL[pi_old, pi_theta], r - 1 - log r with r = pi_theta / pi_old: 0 in the padding, too."""
    r, kl = ratio(batch), loss_and_curves(batch)[1]["approx_kl"]
    assert kl.ge(0).all()
    assert_close(kl, r - 1 - r.log(), scale=r.max())
    assert kl[~batch.completion_mask].eq(0).all()
    same = batch._replace(old_logprobs=batch.logprobs)
    assert loss_and_curves(same)[1]["approx_kl"].eq(0).all()


def test_approx_kl_is_never_negative_near_zero_in_float32():
    """Where r - 1 - log r would round to less than 0: the early stop and the penalty read its mean."""
    size = torch.logspace(-9, 1, 10_000)
    log_ratio = torch.cat([size, -size])[None]
    assert (log_ratio.exp() - 1 - log_ratio).min() < 0
    zero, mask = torch.zeros_like(log_ratio), torch.ones_like(log_ratio, dtype=torch.bool)
    assert loss_and_curves(Batch(log_ratio, zero, zero, zero, mask))[1]["approx_kl"].min() >= 0


# Logits of pi_theta and pi_old and an advantage for every token of the vocabulary, (states, V) each.
tables = st.tuples(st.integers(1, 3), st.integers(2, 8)).flatmap(
    lambda shape: st.tuples(*(tensors(shape, -5.0, 5.0, float64) for _ in range(3)))
)


@given(tables, betas)
def test_the_expected_penalty_is_the_kl_from_the_old_policy_to_the_new_one_and_so_is_its_gradient(drawn, beta_old):
    """PPO Eq. 8, over all tokens, weighed by pi_old, which samples them: pi_theta A - beta KL[pi_old, pi_theta].

    The other direction, KL[pi_theta, pi_old], is that of the penalty in the reward."""
    logits, old_logits, advantages = drawn
    for a in (advantages, torch.zeros_like(advantages)):
        logits = logits.detach().requires_grad_()
        logprobs, old_logprobs = logits.log_softmax(-1), old_logits.log_softmax(-1)
        batch = Batch(logprobs, old_logprobs, logprobs, a, torch.ones_like(logits, dtype=torch.bool))
        loss, curves = loss_and_curves(batch, weights=old_logprobs.exp(), beta_old=beta_old)
        kl = exact_kl(old_logits, logits)
        assert_close((old_logprobs.exp() * curves["approx_kl"]).sum(-1), kl.detach())
        expected = beta_old * kl.sum() - (logprobs.exp() * a).sum()
        assert_close(loss, expected.detach())
        found, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
        assert_close(found, wanted, scale=1 + beta_old)


# ----- The loss of the value model -----


class Estimates(NamedTuple):
    """The first arguments of `value_loss`, in its order, each (N, T)."""

    values: Tensor
    old_values: Tensor
    returns: Tensor
    completion_mask: Tensor


@st.composite
def estimates(draw, moved: bool = True) -> Estimates:
    """Values and old values, half of the time within 0.3 of 0; drawn apart, for a sum old + move is rounded already."""
    mask, dtype = draw(masks()), st.just(draw(dtypes))
    widest = draw(st.sampled_from([0.3, 10.0]))
    old_values = draw(tensors(mask.shape, -widest, widest, dtype))
    values = draw(tensors(mask.shape, -widest, widest, dtype)) if moved else old_values
    return Estimates(values, old_values, draw(tensors(mask.shape, -10.0, 10.0, dtype)), mask)


def value_terms(batch: Estimates, value_clip_eps: float) -> Tensor:
    """1/2 max[(V - R)^2, (clipped V - R)^2], token by token, (N, T)."""
    weights = torch.zeros_like(batch.values).requires_grad_()
    return torch.autograd.grad(value_loss(*batch, weights, value_clip_eps)[0], weights)[0]


def value_loss_and_gradient(batch: Estimates, weights: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in the values, (N, T)."""
    values = batch.values.detach().requires_grad_()
    loss, _ = value_loss(values, *batch[1:], weights, **options)
    return loss.detach(), torch.autograd.grad(loss, values)[0]


def half_squared(error: Tensor, mask: Tensor) -> Tensor:
    return 0.5 * error.square().where(mask, 0.0)


@given(estimates(), value_eps)
def test_the_clipped_value_loss_lies_between_its_bounds(batch, value_clip_eps):
    """Pessimistic, too: (V - R)^2 <= 2 loss <= max((V - R)^2, (|V_old - R| + eps)^2), the former exactly."""
    values, old_values, returns, mask = batch
    found, plain = value_terms(batch, value_clip_eps), half_squared(values - returns, mask)
    assert (found >= plain).all()
    highest = torch.maximum(plain, half_squared((old_values - returns).abs() + value_clip_eps, mask))
    assert_close((found - highest).clamp(min=0), 0.0, scale=1 + highest.max())


def assert_nothing_is_clipped(batch: Estimates, value_clip_eps: float) -> None:
    """Where |V - V_old| < eps: exactly (V - R)^2 / 2, no clipping is reported, and V = R has no gradient."""
    values, old_values, returns, mask = batch
    inside = ((values - old_values).abs() < value_clip_eps - 1e-5) & mask
    _, clip_frac = value_loss(*batch, torch.ones_like(values), value_clip_eps)
    assert clip_frac[inside].eq(0).all()
    assert torch.equal(value_terms(batch, value_clip_eps)[inside], half_squared(values - returns, mask)[inside])
    reached = batch._replace(returns=values)
    gradient = value_loss_and_gradient(reached, torch.ones_like(values), value_clip_eps=value_clip_eps)[1]
    assert gradient[inside].eq(0).all()


@given(estimates(), value_eps)
def test_within_the_value_clip_range_nothing_is_clipped(batch, value_clip_eps):
    """|V - V_old| < eps implies that the loss is (V - R)^2 / 2."""
    assert_nothing_is_clipped(batch, value_clip_eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_within_the_value_clip_range_nothing_is_clipped_by_rounding(dtype):
    """Where V_old + (V - V_old) would miss V by rounding: ten thousand small values."""
    values, old_values = 0.05 * torch.randn(2, 1, 10_000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert (old_values + (values - old_values)).ne(values).any()
    returns, mask = (values > 0).to(dtype), torch.ones_like(values, dtype=torch.bool)
    assert_nothing_is_clipped(Estimates(values, old_values, returns, mask), 0.2)


@given(estimates(moved=False), value_eps, averages)
def test_while_the_value_is_the_old_one_the_value_gradient_is_weight_times_error(batch, value_clip_eps, loss_average):
    """Before the first update of a step the clipping is inert: d loss / d V = weight (V - R), exactly."""
    values, _, returns, mask = batch
    weights = average(mask, loss_average).to(values)
    loss, gradient = value_loss_and_gradient(batch, weights, value_clip_eps=value_clip_eps)
    assert torch.equal(gradient, weights * (values - returns).where(mask, 0.0))
    assert_close(loss, (weights * half_squared(values - returns, mask)).sum())
    assert value_loss(*batch, weights, value_clip_eps)[1].eq(0).all()


@given(estimates(), value_eps)
def test_the_value_gradient_vanishes_only_where_the_clipped_error_is_the_larger(batch, value_clip_eps):
    """The gradient is 0 iff V = R, or |V - V_old| > eps and the clipped error is the larger; else V - R.

    The second result marks the latter tokens."""
    values, old_values, returns, mask = batch
    gradient = value_loss_and_gradient(batch, torch.ones_like(values), value_clip_eps=value_clip_eps)[1]
    move, plain = values - old_values, (values - returns).square()
    clipped = (old_values + value_clip_eps * move.sign() - returns).square()
    stuck = (move.abs() > value_clip_eps) & (clipped > plain)
    # Not where rounding decides: on the edge of the range, and outside of it where both errors are one.
    edge = (move.abs() - value_clip_eps).abs() < 1e-5
    edge |= (move.abs() > value_clip_eps) & ((clipped - plain).abs() < 1e-3)
    assert gradient[stuck & ~edge].eq(0).all()
    moving = ~stuck & ~edge & mask
    assert_close(gradient[moving], (values - returns)[moving], scale=10)
    far = (values - returns).abs() > 1e-4
    assert gradient[moving & far].ne(0).all()
    _, clip_frac = value_loss(*batch, torch.ones_like(values), value_clip_eps)
    assert clip_frac[stuck & ~edge & mask].eq(1).all()
    assert clip_frac[(move.abs() > value_clip_eps) & ~stuck & ~edge].eq(0).all()
    assert clip_frac[~mask].eq(0).all()


def test_the_value_loss_of_five_moves_from_zero_towards_and_away_from_one():
    """Ziegler et al.'s code with V_old = 0, R = 1 and eps = 0.2, which is the default: only V = 0.5 is held back."""
    values = torch.tensor([[-1.0, -0.1, 0.1, 0.5, 2.0]], dtype=torch.float64)
    one, mask = torch.ones_like(values), torch.ones_like(values, dtype=torch.bool)
    batch = Estimates(values, torch.zeros_like(values), one, mask)
    gradient = value_loss_and_gradient(batch, one)[1]
    assert value_terms(batch, 0.2)[0].tolist() == pytest.approx([2.0, 0.605, 0.405, 0.32, 0.5])
    assert gradient[0].tolist() == pytest.approx([-2.0, -1.1, -0.9, 0.0, 1.0])
    loss, clip_frac = value_loss(values.requires_grad_(), *batch[1:], one)
    assert loss.item() == pytest.approx((4.0 + 1.21 + 0.81 + 0.64 + 1.0) / 2)
    assert clip_frac.tolist() == [[0.0, 0.0, 0.0, 1.0, 0.0]]
    assert not clip_frac.requires_grad


# ----- Token rewards: DeepSeekMath Eq. 2, InstructGPT Eq. 2 -----


def outcomes(num_rows: int, dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """(N,), what the task pays."""
    return tensors((num_rows,), -10.0, 10.0, st.just(dtype))


@given(batches(), betas, st.data())
def test_token_rewards_sum_to_the_score_less_beta_times_the_log_ratio_of_the_completion(batch, beta, data):
    """InstructGPT Eq. 2: R - beta sum_t k1_t = R - beta (log pi(y) - log ref(y))."""
    logprobs, _, ref_logprobs, _, mask = batch
    rewards = data.draw(outcomes(len(mask), logprobs.dtype))
    found = rewards_with_kl(rewards, kl_estimate(logprobs, ref_logprobs, "k1"), mask, beta)
    log_pi, log_ref = (x.where(mask, 0.0).sum(1) for x in (logprobs, ref_logprobs))
    assert_close(found.sum(1), rewards - beta * (log_pi - log_ref), scale=10 * (1 + beta))


@given(batches(), betas, st.data())
def test_the_score_is_paid_on_the_last_token_and_the_kl_on_every_token(batch, beta, data):
    """DeepSeekMath Eq. 2, exactly: the last token that the mask counts, and 0 in the padding."""
    mask, kl = batch.completion_mask, kl_estimate(batch.logprobs, batch.ref_logprobs, "k1")
    rewards = data.draw(outcomes(len(mask), kl.dtype))
    scores = rewards_with_kl(rewards, torch.zeros_like(kl), mask, beta)
    penalties = rewards_with_kl(torch.zeros_like(rewards), kl, mask, beta)
    both = rewards_with_kl(rewards, kl, mask, beta)
    for i, length in enumerate(mask.sum(1).tolist()):
        last = length - 1
        assert scores[i, last] == rewards[i]
        assert scores[i, :last].eq(0).all()
        assert torch.equal(penalties[i, :length], -beta * kl[i, :length])
        assert torch.equal(both[i, :last], penalties[i, :last])
        assert both[i, last] == rewards[i] - beta * kl[i, last]
        for found in (scores, penalties, both):
            assert found[i, length:].eq(0).all()


@given(masks(), betas)
def test_rows_without_a_token_are_paid_nothing(mask, beta):
    mask[0] = False
    found = rewards_with_kl(torch.ones(len(mask)), torch.ones(mask.shape), mask, beta)
    assert found[0].eq(0).all()


def test_token_rewards_carry_no_gradient():
    """Eq. 2: what is paid is a number, however the KL was computed."""
    rewards, kl = torch.ones(2, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    assert not rewards_with_kl(rewards, kl, torch.ones(2, 3, dtype=torch.bool), 0.1).requires_grad


@given(batches(), betas, st.data())
def test_without_values_and_discount_the_advantage_is_the_reward_to_go(batch, beta, data):
    """GAE Eq. 18 on DeepSeekMath Eq. 2: with V = 0, A_t = R - beta sum_{s >= t} k1_s: a token answers for its own KL
    and for that of all tokens after it, never of those before. With any V, A_t is that less V_t."""
    logprobs, _, ref_logprobs, _, mask = batch
    rewards = data.draw(outcomes(len(mask), logprobs.dtype))
    rewards_t = rewards_with_kl(rewards, kl_estimate(logprobs, ref_logprobs, "k1"), mask, beta)
    to_go = torch.zeros_like(logprobs)
    for i, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            to_go[i, t] = rewards[i] - beta * (logprobs - ref_logprobs)[i, t:length].sum()
    some_values = data.draw(tensors(mask.shape, -10.0, 10.0, st.just(logprobs.dtype)))
    for values in (torch.zeros_like(logprobs), some_values):
        advantages, returns = gae(rewards_t, values, mask, gamma=1.0, gae_lambda=1.0)
        assert_close(returns, to_go, scale=10 * (1 + beta))
        assert_close(advantages, (to_go - values).where(mask, 0.0), scale=10 * (1 + beta))


# ----- The value model -----


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


# ----- How well it foretells -----


@st.composite
def returns_and_masks(draw) -> tuple[Tensor, Tensor]:
    """At least two tokens, whose returns differ by more than 1."""
    mask = draw(masks().filter(lambda mask: mask.sum() > 1))
    steps = 3.0 * torch.arange(mask.numel()).view(mask.shape)
    returns = draw(tensors(mask.shape, -1.0, 1.0))
    return returns + steps.to(returns), mask


@given(returns_and_masks(), numbers(-10, 10))
def test_perfect_foresight_explains_all_variance_and_a_constant_none(drawn, constant):
    """1 for V = R; 0 for V = mean R, and for every other constant."""
    returns, mask = drawn
    assert explained_variance(returns, returns, mask) == 1
    for value in (returns[mask].mean(), torch.tensor(constant)):
        explained = explained_variance(torch.full_like(returns, value.item()), returns, mask)
        assert_close(explained, 0.0)


@given(returns_and_masks(), numbers(-2, 2), numbers(-10, 10))
def test_a_value_that_goes_a_part_of_the_way_leaves_the_square_of_the_rest_unexplained(drawn, part, shift):
    """V = part R + shift gives 1 - (1 - part)^2: going the wrong way is worse than a constant."""
    returns, mask = drawn
    assert_close(explained_variance(part * returns + shift, returns, mask), 1 - (1 - part) ** 2, scale=10)


@given(returns_and_masks(), numbers(-2, 2), garbage, st.integers(0, 3), st.data())
def test_padding_garbage_changes_no_explained_variance(drawn, part, garbage, extra, data):
    returns, mask = drawn
    values = part * returns + data.draw(tensors(mask.shape, -1.0, 1.0, st.just(returns.dtype)))
    wide = pad(mask, (0, extra))
    dirty = [pad(x, (0, extra)).where(wide, garbage) for x in (values, returns)]
    assert_close(explained_variance(*dirty, wide), explained_variance(values, returns, mask), scale=10)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("equal", [0.0, 0.1, 1.0])
def test_of_equal_returns_nothing_is_explained_whatever_the_values_are(count, equal):
    """All right or all wrong, or a single token: there is no variance to divide by."""
    returns, mask = torch.full((1, count), equal), torch.ones(1, count, dtype=torch.bool)
    for values in (returns, 0.1 * torch.arange(count)[None], 1e3 * torch.arange(count)[None]):
        assert explained_variance(values, returns, mask) == 0


# ----- Padding and micro-batches -----

every_option = st.fixed_dictionaries({
    "clip_eps": eps,
    "clip_eps_high": st.none() | eps,
    "beta_old": st.none() | betas,
})


def size_of(batch: Batch, options: dict) -> Tensor:
    """The largest objective of a token: what rounding is relative to."""
    unclipped = (ratio(batch) * batch.advantages).abs().max()
    return 1 + objective(batch, **options).abs().max() + unclipped


def dirty(data: st.DataObject, x: Tensor, mask: Tensor) -> Tensor:
    """`x` with columns added up to the width of the mask, and up to 1e30, inf or NaN wherever the mask is false."""
    noise = data.draw(tensors(mask.shape, -1.0, 1.0, st.just(x.dtype)))
    noise = noise * data.draw(st.sampled_from([1.0, 1e30, torch.inf]))
    return pad(x, (0, mask.shape[1] - x.shape[1])).where(mask, noise)


@given(batches(), averages, every_option, st.integers(0, 3), st.data())
def test_padding_garbage_changes_no_policy_loss_and_no_gradient(batch, loss_average, options, extra, data):
    """Log-ratios of 1e30 or inf there, and columns added; gradients in the padding are exactly 0."""
    width, mask = batch.logprobs.shape[1], pad(batch.completion_mask, (0, extra))
    padded = Batch(*(dirty(data, x, mask) for x in batch[:4]), mask)
    loss, gradient = loss_and_gradient(batch, average(batch.completion_mask, loss_average), **options)
    padded_loss, padded_gradient = loss_and_gradient(padded, average(mask, loss_average), **options)
    assert_close(padded_loss, loss, scale=size_of(batch, options))
    assert_close(padded_gradient[:, :width], gradient, scale=size_of(batch, options))
    assert padded_gradient[~mask].eq(0).all()
    assert gradient[~batch.completion_mask].eq(0).all()
    curves, padded_curves = loss_and_curves(batch, **options)[1], loss_and_curves(padded, **options)[1]
    for name, curve in curves.items():
        assert_close(padded_curves[name][:, :width], curve)


@given(estimates(), averages, value_eps, st.integers(0, 3), st.data())
def test_padding_garbage_changes_no_value_loss_and_no_gradient(batch, loss_average, value_clip_eps, extra, data):
    width, mask = batch.values.shape[1], pad(batch.completion_mask, (0, extra))
    padded, options = Estimates(*(dirty(data, x, mask) for x in batch[:3]), mask), {"value_clip_eps": value_clip_eps}
    loss, gradient = value_loss_and_gradient(batch, average(batch.completion_mask, loss_average), **options)
    padded_loss, padded_gradient = value_loss_and_gradient(padded, average(mask, loss_average), **options)
    assert_close(padded_loss, loss)
    assert_close(padded_gradient[:, :width], gradient)
    assert padded_gradient[~mask].eq(0).all()
    assert gradient[~batch.completion_mask].eq(0).all()
    weights = torch.ones_like(padded.values)
    assert torch.equal(
        value_loss(*padded, weights, value_clip_eps)[1][:, :width],
        value_loss(*batch, weights[:, :width], value_clip_eps)[1],
    )


@given(batches(), betas, st.integers(0, 3), st.data())
def test_padding_garbage_changes_no_token_reward(batch, beta, extra, data):
    """Exactly; beta = 0 makes no NaN of an infinite KL in the padding."""
    kl, mask = kl_estimate(batch.logprobs, batch.ref_logprobs, "k3"), pad(batch.completion_mask, (0, extra))
    rewards = data.draw(outcomes(len(mask), kl.dtype))
    for weight in (beta, 0.0):
        found = rewards_with_kl(rewards, dirty(data, kl, mask), mask, weight)
        expected = rewards_with_kl(rewards, kl, batch.completion_mask, weight)
        assert torch.equal(found[:, : kl.shape[1]], expected)
        assert found[~mask].eq(0).all()


def pieces_of(data: st.DataObject, num_rows: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The rows in any order, and the same cut anywhere."""
    order = torch.tensor(data.draw(st.permutations(range(num_rows))))
    return order, order.tensor_split(sorted(data.draw(st.sets(st.integers(0, num_rows)))))


@given(batches(), averages, every_option, st.data())
def test_micro_batches_add_up_to_the_policy_loss_and_gradient_of_the_update(batch, loss_average, options, data):
    """However the rows are ordered and cut, the weights being those of all."""
    order, parts = pieces_of(data, len(batch.logprobs))
    weights = average(batch.completion_mask, loss_average)
    loss, gradient = loss_and_gradient(batch, weights, **options)
    pieces = [loss_and_gradient(Batch(*(x[rows] for x in batch)), weights[rows], **options) for rows in parts]
    assert_close(sum(piece[0] for piece in pieces), loss, scale=size_of(batch, options))
    assert_close(torch.cat([piece[1] for piece in pieces]), gradient[order], scale=size_of(batch, options))


@given(estimates(), averages, value_eps, st.data())
def test_micro_batches_add_up_to_the_value_loss_and_gradient_of_the_update(batch, loss_average, value_clip_eps, data):
    order, parts = pieces_of(data, len(batch.values))
    weights, options = average(batch.completion_mask, loss_average), {"value_clip_eps": value_clip_eps}
    loss, gradient = value_loss_and_gradient(batch, weights, **options)
    pieces = [value_loss_and_gradient(Estimates(*(x[rows] for x in batch)), weights[rows], **options) for rows in parts]
    assert_close(sum(piece[0] for piece in pieces), loss)
    assert_close(torch.cat([piece[1] for piece in pieces]), gradient[order])


@pytest.mark.parametrize("which", range(5))
@given(batches(), estimates())
def test_a_shape_that_would_broadcast_is_refused(which, batch, estimate):
    """In any of the arguments: here a column more, which a T of 1 would be stretched to."""
    of_policy = batch.logprobs, batch.old_logprobs, batch.advantages, batch.completion_mask
    for loss, arguments in ((policy_loss, of_policy), (value_loss, estimate)):
        arguments = [*arguments, torch.ones_like(arguments[0])]
        arguments[which] = pad(arguments[which], (0, 1))
        with pytest.raises(AssertionError):
            loss(*arguments)


# ----- Shapes: nothing depends on how the completions are arranged -----


@st.composite
def groups(draw) -> tuple[Batch, tuple[int, int, int]]:
    """Completions in one list, (B G, T), of which some have no token, and B, G, T."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)))
    rows = shape[0] * shape[1]
    lengths = torch.tensor(draw(st.lists(st.integers(0, shape[2]), min_size=rows, max_size=rows)))
    return draw(batches(mask=st.just(torch.arange(shape[2]) < lengths[:, None]))), shape


@given(groups(), averages, every_option)
def test_groups_have_the_policy_loss_of_their_completions_in_one_list(drawn, loss_average, options):
    flat, shape = drawn
    nested, weights = Batch(*(x.reshape(shape) for x in flat)), average(flat.completion_mask, loss_average)
    assert torch.equal(average(nested.completion_mask, loss_average), weights.view(shape))
    loss, gradient = loss_and_gradient(flat, weights, **options)
    nested_loss, nested_gradient = loss_and_gradient(nested, weights.view(shape), **options)
    assert_close(nested_loss, loss, scale=size_of(flat, options))
    assert torch.equal(nested_gradient, gradient.view(shape))
    curves, nested_curves = (loss_and_curves(x, **options)[1] for x in (flat, nested))
    for name, curve in curves.items():
        assert torch.equal(nested_curves[name], curve.view(shape))


@given(groups(), averages, value_eps)
def test_groups_have_the_value_loss_of_their_completions_in_one_list(drawn, loss_average, value_clip_eps):
    flat, shape = drawn
    flat = Estimates(*flat[:3], flat.completion_mask)  # any numbers will do
    nested, weights = Estimates(*(x.reshape(shape) for x in flat)), average(flat.completion_mask, loss_average)
    loss, gradient = value_loss_and_gradient(flat, weights, value_clip_eps=value_clip_eps)
    found = value_loss_and_gradient(nested, weights.view(shape), value_clip_eps=value_clip_eps)
    assert_close(found[0], loss)
    assert torch.equal(found[1], gradient.view(shape))
    clipped = [value_loss(*x, torch.ones_like(x.values), value_clip_eps)[1] for x in (flat, nested)]
    assert torch.equal(clipped[1], clipped[0].view(shape))


@given(groups(), betas, st.data())
def test_groups_have_the_token_rewards_of_their_completions_in_one_list(drawn, beta, data):
    flat, shape = drawn
    kl, mask = kl_estimate(flat.logprobs, flat.ref_logprobs, "k1"), flat.completion_mask
    rewards = data.draw(outcomes(len(mask), kl.dtype))
    expected = rewards_with_kl(rewards, kl, mask, beta)
    found = rewards_with_kl(rewards.view(shape[:2]), kl.view(shape), mask.view(shape), beta)
    assert torch.equal(found, expected.view(shape))
