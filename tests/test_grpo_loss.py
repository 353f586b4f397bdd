# SPDX-License-Identifier: MIT
"""What must hold for the loss of GRPO (DeepSeekMath Eq. 3) and for what each token weighs in it.

The loss is minus a sum of weight times objective, so its gradient in the weights shows the objective of every token,
exactly: that is how clipping is looked at here, without a copy of the code.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from advantage import group_advantages
from grpo import grpo_loss, loss_weights
from helpers.strategies import Batch, assert_close, batches, masks, rewards, tensors
from kl import kl_estimate

eps = st.floats(1e-3, 0.999)
levels = st.sampled_from(["token", "sequence"])
averages = st.sampled_from(["sequence", "token", "constant"])
betas = st.floats(0, 1)
MAX_NEW_TOKENS = 7  # more than the tests' longest row


def objective(batch: Batch, **options) -> Tensor:
    """What stands in the braces of Eq. 3, token by token, (N, T)."""
    weights = torch.zeros_like(batch.logprobs).requires_grad_()
    loss, _ = grpo_loss(*batch, weights, **options)
    return -torch.autograd.grad(loss, weights)[0]


def loss_and_gradient(batch: Batch, weights: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in the log-probabilities of the policy, (N, T)."""
    logprobs = batch.logprobs.detach().requires_grad_()
    loss, _ = grpo_loss(*batch._replace(logprobs=logprobs), weights, **options)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def loss_and_curves(batch: Batch, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Every token weighs 1."""
    return grpo_loss(*batch, torch.ones_like(batch.logprobs), **options)


def ratio(batch: Batch, level: str = "token") -> Tensor:
    return grpo_loss(*batch, torch.zeros_like(batch.logprobs), ratio_level=level)[1]["ratio"]


def average(batch: Batch, loss_average: str) -> Tensor:
    return loss_weights(batch.completion_mask, loss_average, MAX_NEW_TOKENS).to(batch.logprobs)


# ----- The ratio and its clipping: PPO Eq. 7 -----


@given(batches())
def test_the_ratio_is_that_of_the_probabilities(batch):
    """w = pi_theta / pi_old; one in the padding. `approx_kl`, for the curves, is k3 of KL[pi_old, pi_theta]."""
    log_ratio = (batch.logprobs - batch.old_logprobs).where(batch.completion_mask, 0.0)
    batch.logprobs.requires_grad_()
    _, curves = grpo_loss(*batch, torch.zeros_like(batch.logprobs))
    assert torch.equal(curves["ratio"], log_ratio.exp())
    assert torch.equal(curves["approx_kl"], torch.expm1(log_ratio) - log_ratio)
    assert not any(curve.requires_grad for curve in curves.values())


@given(batches(), eps, eps, levels)
def test_the_clipped_objective_is_a_lower_bound(batch, clip_eps, clip_eps_high, level):
    """PPO Eq. 7: min(rA, clip(r)A) <= rA, exactly."""
    options = dict(clip_eps=clip_eps, clip_eps_high=clip_eps_high, ratio_level=level)
    bound = (ratio(batch, level) * batch.advantages).where(batch.completion_mask, 0.0)
    assert (objective(batch, beta=0.0, **options) <= bound).all()


@given(batches(), eps, eps, levels)
def test_clip_bounds_are_one_minus_clip_eps_and_one_plus_clip_eps_high(batch, clip_eps, clip_eps_high, level):
    """PPO Eq. 7: only the upper bound matters for A >= 0 and only the lower one for A < 0, exactly."""
    r, advantages = ratio(batch, level), batch.advantages
    low, high = (torch.tensor(bound, dtype=r.dtype) for bound in (1 - clip_eps, 1 + clip_eps_high))
    bound = torch.where(advantages >= 0, high, low)
    expected = torch.minimum(r * advantages, bound * advantages).where(batch.completion_mask, 0.0)
    options = dict(clip_eps=clip_eps, clip_eps_high=clip_eps_high, ratio_level=level)
    assert torch.equal(objective(batch, beta=0.0, **options), expected)


@given(batches(), eps, levels)
def test_clip_eps_is_both_bounds_unless_clip_eps_high_is_given(batch, clip_eps, level):
    """PPO Eq. 7, and DAPO's clip-higher as the exception."""
    options = dict(beta=0.0, clip_eps=clip_eps, ratio_level=level)
    assert torch.equal(objective(batch, **options), objective(batch, **options, clip_eps_high=clip_eps))


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
            found = objective(batch, beta=0.0, clip_eps=0.2, **options)
            assert found[0].tolist() == pytest.approx(expected)
            clip_frac = grpo_loss(*batch, zero, clip_eps=0.2, **options)[1]["clip_frac"]
            assert torch.equal(clip_frac.bool(), (found - sign * r).abs() > 1e-9)


@given(batches(), eps, eps)
def test_the_gradient_vanishes_where_nothing_more_can_be_gained(batch, clip_eps, clip_eps_high):
    """PPO Eq. 7: d/dr = A if (A > 0 and r <= 1 + eps_high) or (A < 0 and r >= 1 - eps_low), else exactly 0.

    d/dlogprobs is r times that."""
    r, advantages, mask = ratio(batch), batch.advantages, batch.completion_mask
    options = dict(beta=0.0, clip_eps=clip_eps, clip_eps_high=clip_eps_high)
    gradient = -loss_and_gradient(batch, mask.to(r), **options)[1]
    inside = torch.where(advantages > 0, r <= 1 + clip_eps_high, r >= 1 - clip_eps)
    edge = torch.minimum((r - 1 - clip_eps_high).abs(), (r - 1 + clip_eps).abs()) < 1e-6
    assert gradient[~inside & ~edge].eq(0).all()
    counts = inside & ~edge & mask
    assert_close(gradient[counts], (r * advantages)[counts])


@given(batches(), eps)
def test_within_the_clip_range_nothing_is_clipped(batch, clip_eps):
    """PPO Eqs. 6 and 7: |r - 1| < eps implies L^CLIP = L^CPI, exactly."""
    r = ratio(batch)
    inside = ((r - 1).abs() < clip_eps - 1e-6) & batch.completion_mask
    assert torch.equal(objective(batch, beta=0.0, clip_eps=clip_eps)[inside], (r * batch.advantages)[inside])


@given(batches(on_policy=True), averages, eps)
def test_on_policy_the_gradient_is_that_of_the_vanilla_policy_gradient(batch, loss_average, clip_eps):
    """PPO Eq. 6: at r = 1 exactly, d loss / d logprobs = -A weight, exactly."""
    weights = average(batch, loss_average)
    assert ratio(batch).eq(1).all()
    gradient = loss_and_gradient(batch, weights, beta=0.0, clip_eps=clip_eps)[1]
    assert torch.equal(gradient, -batch.advantages * weights)


@given(batches(), averages, levels, st.floats(1e-3, 1e3))
def test_scaled_advantages_scale_the_loss_and_the_gradient(batch, loss_average, level, scale):
    """PPO Eq. 7: A -> cA with c > 0; and A = 0 gives exactly 0 for both."""
    options = dict(weights=average(batch, loss_average), beta=0.0, ratio_level=level)
    before = loss_and_gradient(batch, **options)
    after = loss_and_gradient(batch._replace(advantages=scale * batch.advantages), **options)
    size = scale * (ratio(batch, level) * batch.advantages).abs().max()
    for found, expected in zip(after, before, strict=True):
        assert_close(found, scale * expected, scale=size)
    for found in loss_and_gradient(batch._replace(advantages=torch.zeros_like(batch.advantages)), **options):
        assert found.eq(0).all()


@given(batches())
def test_the_defaults_are_those_of_the_papers(batch):
    """Eq. 3 with beta = 0.04 (DeepSeekMath 4.2), k3 (Eq. 4), a ratio per token, and PPO's eps = 0.2."""
    named = dict(beta=0.04, clip_eps=0.2, clip_eps_high=0.2, ratio_level="token", kl_estimator="k3")
    assert torch.equal(objective(batch), objective(batch, **named, kl_importance_weight=False))


# ----- The KL in the loss -----


@given(batches(), st.sampled_from(["k1", "k2", "k3"]), betas, levels)
def test_the_kl_stands_outside_of_min_and_clip(batch, estimator, beta, level):
    """Eq. 3: the objective less beta times the estimate, token by token; without a reference there is none."""
    kl = kl_estimate(batch.logprobs, batch.ref_logprobs, estimator).where(batch.completion_mask, 0.0)
    options = dict(beta=beta, ratio_level=level)
    without = objective(batch._replace(ref_logprobs=None), **options)
    assert_close(objective(batch, kl_estimator=estimator, **options), without - beta * kl, scale=kl.abs().max())
    curves = grpo_loss(*batch, torch.zeros_like(batch.logprobs), kl_estimator=estimator)[1]
    assert torch.equal(curves["kl"], kl)


@given(batches(), averages, st.sampled_from(["k1", "k3"]), betas, levels)
def test_the_importance_weighted_kl_has_the_gradient_w_k1(batch, loss_average, estimator, beta, level):
    """DeepSeek-V3.2: grad(w k3) = w k1 s; and grad(w k1) = w (k1 + 1) s. A = 0 leaves the KL alone, which
    has the ratio of the token, also under GSPO."""
    batch = batch._replace(advantages=torch.zeros_like(batch.advantages))
    weights, w, k1 = average(batch, loss_average), ratio(batch), batch.logprobs - batch.ref_logprobs
    options = dict(beta=beta, kl_estimator=estimator, kl_importance_weight=True, ratio_level=level)
    coefficient = k1 if estimator == "k3" else k1 + 1
    largest = w * kl_estimate(batch.logprobs, batch.ref_logprobs, "k3").where(batch.completion_mask, 0.0)
    gradient = loss_and_gradient(batch, weights, **options)[1]
    assert_close(gradient, beta * weights * w * coefficient, scale=1 + largest.max())


@given(batches(on_policy=True), averages, betas)
def test_on_policy_the_gradient_coefficient_is_that_of_the_paper(batch, loss_average, beta):
    """On-policy, the coefficient of the gradient is A + beta (pi_ref / pi_theta - 1), DeepSeekMath Eq. 21."""
    weights, r = average(batch, loss_average), (batch.ref_logprobs - batch.logprobs).exp()
    gradient = loss_and_gradient(batch, weights, beta=beta)[1]
    coefficient = batch.advantages + beta * (r - 1)
    # The two terms may cancel: the tolerance is that of the terms, not of what is left of them.
    terms = batch.advantages.abs() + beta * (r - 1).abs()
    assert_close(gradient, -coefficient * weights, scale=terms.max())


@given(batches(), levels)
def test_without_a_weight_the_kl_is_shown_and_costs_nothing(batch, level):
    """beta = 0, exactly, even where the reference rules a token out and the estimate is infinite."""
    batch = batch._replace(ref_logprobs=batch.ref_logprobs.index_fill(1, torch.tensor(0), -torch.inf))
    without = loss_and_curves(batch._replace(ref_logprobs=None), ratio_level=level)
    found = loss_and_curves(batch, beta=0.0, ratio_level=level)
    assert torch.equal(found[0], without[0])
    assert found[1]["kl"][:, 0].isinf().all()
    assert without[1]["kl"].eq(0).all()


# ----- The ratio of a whole completion: GSPO -----


@given(batches())
def test_the_sequence_ratio_is_the_geometric_mean_of_the_tokens(batch):
    """GSPO Eq. 7: min_t w <= s_i <= mean_t w <= max_t w; a completion of one token has s = w."""
    for w, s, mask in zip(ratio(batch), ratio(batch, "sequence"), batch.completion_mask, strict=True):
        w, length = w[mask].double(), int(mask.sum())
        assert s.eq(s[0]).all()
        assert_close(s[:1], w.prod().item() ** (1 / length))
        slack = 1 + 1e-4
        assert w.min() / slack <= s[0] <= w.mean() * slack <= w.max() * slack**2
        if length == 1:
            assert torch.equal(s[0], w[0].to(s))


@given(batches(on_policy=True, outcome=True), averages)
def test_on_policy_gspo_has_the_gradient_of_grpo(batch, loss_average):
    """On-policy, grad GSPO = grad GRPO (GSPO Eq. 7): with beta = 0 and one advantage per completion."""
    weights = average(batch, loss_average)
    of_grpo, of_gspo = (loss_and_gradient(batch, weights, beta=0.0, ratio_level=x)[1] for x in ("token", "sequence"))
    assert_close(of_gspo, of_grpo)


# ----- The weights: what is averaged over what -----


@given(masks())
def test_weights_are_those_of_the_three_averages(mask):
    """Eq. 3: every completion counts the same. DAPO Eq. 8: every token. Dr. GRPO: every token, over a constant."""
    num_rows, lengths = len(mask), mask.sum(1, keepdim=True)
    expected = {
        "sequence": 1 / (num_rows * lengths),
        "token": 1 / lengths.sum(),
        "constant": torch.tensor(1 / (num_rows * MAX_NEW_TOKENS)),
    }
    for name, value in expected.items():
        weights = loss_weights(mask, name, MAX_NEW_TOKENS)
        assert_close(weights, value.expand(mask.shape).where(mask, 0.0))
        assert weights[~mask].eq(0).all()


@given(masks(), averages)
def test_rows_without_a_token_weigh_nothing(mask, loss_average):
    """As DAPO's overlong filtering leaves them; a whole batch of them weighs nothing, and is no division by zero."""
    mask[0] = False
    assert loss_weights(mask, loss_average, MAX_NEW_TOKENS)[0].eq(0).all()
    assert loss_weights(torch.zeros_like(mask), loss_average, MAX_NEW_TOKENS).eq(0).all()


@given(st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: batches(mask=st.just(torch.ones(shape, dtype=torch.bool)))
), levels, betas)
def test_with_equal_lengths_the_three_averages_agree(batch, level, beta):
    """Equal lengths L: J_GRPO = J_DAPO = J_DrGRPO MAX / L."""
    options = dict(beta=beta, ratio_level=level)
    of_grpo, of_dapo, of_dr_grpo = (
        grpo_loss(*batch, average(batch, x), **options)[0] for x in ("sequence", "token", "constant")
    )
    size = 1e4 * objective(batch, **options).abs().max()  # weights are float32
    assert_close(of_dapo.double(), of_grpo.double(), scale=size)
    assert_close(of_dr_grpo.double() * MAX_NEW_TOKENS / batch.logprobs.shape[1], of_grpo.double(), scale=size)


@given(rewards(max_prompts=2, max_group=4), st.data())
def test_on_policy_the_objective_is_zero_and_its_gradient_is_not(rewards, data):
    """On-policy with beta 0, Eq. 3 is 0 whatever the lengths are, and its gradient is not."""
    num_rows = rewards.numel()
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=num_rows, max_size=num_rows)))
    mask = torch.arange(5) < lengths[:, None]
    batch = data.draw(batches(on_policy=True, mask=st.just(mask)))
    advantages = group_advantages(rewards).view(-1, 1).expand(mask.shape).to(batch.logprobs)
    loss, gradient = loss_and_gradient(batch._replace(advantages=advantages), average(batch, "sequence"), beta=0.0)
    assert_close(loss.float(), 0.0)
    assert (gradient.abs().amax() > 0) == (advantages.abs().amax() > 0)


def test_an_unknown_loss_average_is_refused():
    with pytest.raises(ValueError, match="must be one of sequence, token, constant, got 'sentence'"):
        loss_weights(torch.ones(2, 3, dtype=torch.bool), "sentence", MAX_NEW_TOKENS)


def test_an_unknown_ratio_level_is_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^ratio_level must be one of token, sequence, got 'word'"):
        grpo_loss(x, x, x, x, mask, x, ratio_level="word")


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("shape", [(2, 1), (3,), (1, 3)])
def test_shapes_that_would_broadcast_are_refused(which, shape):
    """One advantage a completion, (N, 1), must be expanded by who calls: a (T,) would be taken for it in silence."""
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    arguments = [x, x, x, x, mask, x]
    grpo_loss(*arguments)
    arguments[which] = arguments[which][: shape[0] if len(shape) > 1 else 1, : shape[-1]].reshape(shape)
    with pytest.raises(AssertionError):
        grpo_loss(*arguments)


# ----- Padding and micro-batches -----

every_option = st.fixed_dictionaries({
    "beta": betas,
    "ratio_level": levels,
    "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
    "kl_importance_weight": st.booleans(),
})


def size_of(batch: Batch, options: dict) -> Tensor:
    """The largest objective of a token: what rounding is relative to."""
    return 1 + objective(batch, **options).abs().max()


@given(batches(), averages, every_option, st.data())
def test_padding_garbage_changes_no_loss_and_no_gradient(batch, loss_average, options, data):
    """Padding changes nothing: log-ratios of 1e30 or inf there, and columns added; gradients there are exactly 0."""
    width, extra = batch.logprobs.shape[1], data.draw(st.integers(0, 3))
    mask = torch.nn.functional.pad(batch.completion_mask, (0, extra))

    def dirty(x: Tensor, *sizes: float) -> Tensor:
        noise = data.draw(tensors(mask.shape, -1.0, 1.0, st.just(x.dtype))) * data.draw(st.sampled_from(sizes))
        return torch.nn.functional.pad(x, (0, extra)).where(mask, noise)

    logprobs, old_logprobs, ref_logprobs = (dirty(x, 1.0, 1e30, torch.inf) for x in batch[:3])
    padded = Batch(logprobs, old_logprobs, ref_logprobs, dirty(batch.advantages, 1.0, 1e30), mask)
    loss, gradient = loss_and_gradient(batch, average(batch, loss_average), **options)
    padded_loss, padded_gradient = loss_and_gradient(padded, average(padded, loss_average), **options)
    assert_close(padded_loss, loss, scale=size_of(batch, options))
    kept = gradient.where(batch.completion_mask, 0.0)
    assert_close(padded_gradient[:, :width], kept, scale=size_of(batch, options))
    assert padded_gradient[~mask].eq(0).all()
    assert gradient[~batch.completion_mask].eq(0).all()


@given(batches(), averages, every_option, st.data())
def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_update(batch, loss_average, options, data):
    """The loss, however the rows are ordered and cut, the weights being those of all."""
    num_rows = len(batch.logprobs)
    order = torch.tensor(data.draw(st.permutations(range(num_rows))))
    parts = order.tensor_split(sorted(data.draw(st.sets(st.integers(0, num_rows)))))
    weights = average(batch, loss_average)
    loss, gradient = loss_and_gradient(batch, weights, **options)
    pieces = [loss_and_gradient(Batch(*(x[rows] for x in batch)), weights[rows], **options) for rows in parts]
    assert_close(sum(piece[0] for piece in pieces), loss, scale=size_of(batch, options))
    assembled = torch.empty_like(gradient)
    assembled[order] = torch.cat([piece[1] for piece in pieces])
    assert_close(assembled, gradient, scale=size_of(batch, options))


# ----- Shapes: nothing depends on how the completions are arranged -----


@given(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)), averages, every_option, st.data())
def test_groups_give_what_their_completions_give_in_one_list(shape, loss_average, options, data):
    """(B, G, T) and (B G, T): the loss, its gradient, every metric and the weights, exactly."""
    rows = shape[0] * shape[1]
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, shape[2]), min_size=rows, max_size=rows)))
    flat = data.draw(batches(mask=st.just(torch.arange(shape[2]) < lengths[:, None])))
    nested = Batch(*(x.reshape(shape) for x in flat))
    assert torch.equal(average(nested, loss_average), average(flat, loss_average).view(shape))
    weights = average(flat, loss_average)
    loss, gradient = loss_and_gradient(flat, weights, **options)
    nested_loss, nested_gradient = loss_and_gradient(nested, weights.view(shape), **options)
    assert_close(nested_loss, loss, scale=size_of(flat, options))
    assert torch.equal(nested_gradient, gradient.view(shape))
    curves, nested_curves = (loss_and_curves(x, **options)[1] for x in (flat, nested))
    assert curves.keys() == nested_curves.keys() == {"ratio", "clip_frac", "kl", "approx_kl"}
    for name, curve in curves.items():
        assert torch.equal(nested_curves[name], curve.view(shape))
