# SPDX-License-Identifier: MIT
"""What must hold for the losses of both scripts: GRPO's (DeepSeekMath Eq. 3), PPO's (PPO Eqs. 7 and 8) and that of the
value model; for what each token weighs in them; and for the token rewards (DeepSeekMath Eq. 2) of PPO.

Every loss is a sum of weight times a term, so its gradient in the weights shows the term of every token, exactly.
"""

from collections import namedtuple
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from grpo import grpo_loss, loss_weights
from helpers.strategies import Batch, assert_close, batches, dtypes, few_examples, float64, masks, numbers, tensors
from kl import exact_kl, kl_estimate
from ppo import explained_variance, policy_loss, rewards_with_kl, value_loss

eps = st.floats(1e-3, 0.999)
value_eps = st.floats(1e-3, 5.0)
betas = st.floats(0, 10)
extra_columns = st.integers(0, 3)
averages = st.sampled_from(["sequence", "token", "constant"])
levels = st.sampled_from(["token", "sequence"])
estimators = st.sampled_from(["k1", "k2", "k3"])
MAX_NEW_TOKENS = 7  # more than the tests' longest row
average = partial(loss_weights, max_new_tokens=MAX_NEW_TOKENS)  # (token_mask, loss_average)


# ----- One form for all losses: (batch, weights) -> (loss, metrics) -----


def grpo(batch: Batch, weights: Tensor, **options) -> tuple[Tensor, dict[str, Tensor]]:
    return grpo_loss(*batch, weights, **options)


grpo_without_kl = partial(grpo, beta=0.0)
gspo = partial(grpo_without_kl, ratio_level="sequence")


def ppo(batch: Batch, weights: Tensor, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss`, which has no use for the reference policy."""
    logprobs, old_logprobs, _, advantages, mask = batch
    return policy_loss(logprobs, old_logprobs, advantages, mask, weights, **options)


# The first arguments of `value_loss`, in its order, each (N, T).
Estimates = namedtuple("Estimates", ["values", "old_values", "returns", "completion_mask"])


@st.composite
def estimates(draw, mask=None) -> Estimates:
    """Values and old values, half of the time within 0.3 of 0; drawn apart, for a sum old + move is rounded already."""
    mask, dtype = draw(masks() if mask is None else mask), st.just(draw(dtypes))
    widest = draw(st.sampled_from([0.3, 10.0]))
    values, old_values = (draw(tensors(mask.shape, -widest, widest, dtype)) for _ in range(2))
    return Estimates(values, old_values, draw(tensors(mask.shape, -10.0, 10.0, dtype)), mask)


def value(batch: Estimates, weights: Tensor, **options) -> tuple[Tensor, dict[str, Tensor]]:
    loss, clip_frac = value_loss(*batch, weights, **options)
    return loss, {"clip_frac": clip_frac}


POLICY_LOSSES = pytest.mark.parametrize("loss", [ppo, grpo])
CLIPPED_LOSSES = pytest.mark.parametrize("loss", [ppo, grpo_without_kl, gspo], ids=["ppo", "grpo", "gspo"])
# A loss, what its batch is drawn from, and all its options.
ALL_LOSSES = pytest.mark.parametrize(("loss", "inputs", "every_option"), [
    pytest.param(ppo, batches, st.fixed_dictionaries({
        "clip_eps": eps, "clip_eps_high": st.none() | eps, "beta_old": st.none() | betas,
    }), id="ppo"),
    pytest.param(grpo, batches, st.fixed_dictionaries({
        "beta": betas, "clip_eps": eps, "clip_eps_high": st.none() | eps, "ratio_level": levels,
        "kl_estimator": estimators, "kl_importance_weight": st.booleans(),
    }), id="grpo"),
    pytest.param(value, estimates, st.fixed_dictionaries({"value_clip_eps": value_eps}), id="value"),
])  # fmt: skip


def terms(loss: Callable, batch: Batch | Estimates, **options) -> Tensor:
    """What the weights multiply, token by token, (N, T): of a policy, minus the objective."""
    weights = torch.zeros_like(batch[0]).requires_grad_()
    return torch.autograd.grad(loss(batch, weights, **options)[0], weights)[0]


def metrics(loss: Callable, batch: Batch | Estimates, **options) -> dict[str, Tensor]:
    return loss(batch, torch.ones_like(batch[0]), **options)[1]


def loss_and_gradient(loss: Callable, batch: Batch | Estimates, weights: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in the log-probabilities, or in the values, (N, T)."""
    trained = batch[0].detach().requires_grad_()
    found, _ = loss(type(batch)(trained, *batch[1:]), weights, **options)
    return found.detach(), torch.autograd.grad(found, trained)[0]


def size_of(loss: Callable, batch: Batch | Estimates, options: dict) -> Tensor:
    """The largest number of a token: what rounding is relative to."""
    size = 1 + terms(loss, batch, **options).abs().max()
    if isinstance(batch, Batch):
        size += (metrics(loss, batch, **options)["ratio"] * batch.advantages).abs().max()
    return size


# ----- The ratio and its clipping: PPO Eq. 7 -----


@POLICY_LOSSES
@given(batches())
def test_metrics_are_the_ratio_and_the_kl_from_the_old_policy(loss, batch):
    """r = pi_theta / pi_old (PPO Eq. 6), and k3 of KL[pi_old, pi_theta], r - 1 - log r; in the padding 1 and 0."""
    log_ratio = (batch.logprobs - batch.old_logprobs).where(batch.completion_mask, 0.0)
    found = metrics(loss, batch._replace(logprobs=batch.logprobs.clone().requires_grad_()))
    assert found.keys() == {"ratio", "clip_frac", "approx_kl"} | ({"kl"} if loss is grpo else set())
    assert torch.equal(found["ratio"], log_ratio.exp())
    assert_close(found["approx_kl"], log_ratio.exp() - 1 - log_ratio, scale=found["ratio"].max())
    assert found["approx_kl"].ge(0).all()
    assert found["approx_kl"][log_ratio == 0].eq(0).all()
    assert not any(metric.requires_grad for metric in found.values())


@POLICY_LOSSES
def test_approx_kl_is_never_negative_near_zero_in_float32(loss):
    """Where r - 1 - log r would round to less than 0: the early stop and the penalty read its mean."""
    size = torch.logspace(-9, 1, 10_000)
    log_ratio = torch.cat([size, -size])[None]
    assert (log_ratio.exp() - 1 - log_ratio).min() < 0
    zero, mask = torch.zeros_like(log_ratio), torch.ones_like(log_ratio, dtype=torch.bool)
    assert metrics(loss, Batch(log_ratio, zero, zero, zero, mask))["approx_kl"].min() >= 0


@CLIPPED_LOSSES
@given(batches(), eps, st.none() | eps)
def test_clip_bounds_are_one_minus_clip_eps_and_one_plus_clip_eps_high(loss, batch, clip_eps, clip_eps_high):
    """PPO Eq. 7: only the upper bound matters for A >= 0 and only the lower one for A < 0, exactly. `clip_frac` marks
    the tokens where the objective is less than rA."""
    options = dict(clip_eps=clip_eps, clip_eps_high=clip_eps_high)
    r, advantages = metrics(loss, batch)["ratio"], batch.advantages
    highest = 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    low, high = (torch.tensor(bound, dtype=r.dtype) for bound in (1 - clip_eps, highest))
    unclipped = (r * advantages).where(batch.completion_mask, 0.0)
    clipped = (torch.where(advantages >= 0, high, low) * advantages).where(batch.completion_mask, 0.0)
    assert torch.equal(-terms(loss, batch, **options), torch.minimum(unclipped, clipped))
    assert torch.equal(metrics(loss, batch, **options)["clip_frac"], (clipped < unclipped).float())


@CLIPPED_LOSSES
def test_clip_higher_moves_the_upper_bound_alone(loss):
    """DAPO's 0.2 and 0.28, at ratios below, inside, between the two upper bounds and above, for A = 1 and A = -1."""
    r = torch.tensor([[0.5], [0.9], [1.1], [1.25], [1.5]], dtype=torch.float64)  # completions of one token
    one, zero = torch.ones_like(r), torch.zeros_like(r)
    for advantage, clip_eps_high, expected in (
        (1.0, None, [0.5, 0.9, 1.1, 1.2, 1.2]),
        (1.0, 0.28, [0.5, 0.9, 1.1, 1.25, 1.28]),
        (-1.0, None, [-0.8, -0.9, -1.1, -1.25, -1.5]),
        (-1.0, 0.28, [-0.8, -0.9, -1.1, -1.25, -1.5]),
    ):
        batch = Batch(r.log(), zero, zero, advantage * one, one.bool())
        found = -terms(loss, batch, clip_eps=0.2, clip_eps_high=clip_eps_high)
        assert found.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("loss", "options"), [(ppo, {}), (ppo, {"beta_old": 2.0}), (grpo_without_kl, {})])
@given(batches(on_policy=True), averages, eps)
def test_on_policy_the_gradient_is_that_of_the_vanilla_policy_gradient(loss, options, batch, loss_average, clip_eps):
    """PPO Eq. 1: at r = 1, d loss / d logprobs = -A weight, exactly. The penalty of Eq. 8 is at its minimum there."""
    weights = average(batch.completion_mask, loss_average).to(batch.logprobs)
    gradient = loss_and_gradient(loss, batch, weights, clip_eps=clip_eps, **options)[1]
    assert torch.equal(gradient, -batch.advantages * weights)


@few_examples
@given(batches(), estimates())
def test_the_defaults_are_those_of_the_papers(batch, estimated):
    """Eq. 3 with beta = 0.04 (DeepSeekMath 4.2), k3 (Eq. 4) and a ratio per token; eps = 0.2 (PPO 6.1)."""
    named = dict(beta=0.04, clip_eps=0.2, clip_eps_high=0.2, ratio_level="token", kl_estimator="k3")
    assert torch.equal(terms(grpo, batch), terms(grpo, batch, **named, kl_importance_weight=False))
    assert torch.equal(terms(ppo, batch), terms(ppo, batch, clip_eps=0.2, clip_eps_high=0.2, beta_old=None))
    assert torch.equal(terms(value, estimated), terms(value, estimated, value_clip_eps=0.2))


# ----- The ratio of a whole completion: GSPO -----


@given(batches())
def test_the_sequence_ratio_is_the_geometric_mean_of_the_tokens(batch):
    """GSPO Eq. 7: s_i = (prod_t w_t)^(1 / |o_i|), one for all tokens; a completion of one token has s = w."""
    ratios = metrics(grpo, batch)["ratio"], metrics(gspo, batch)["ratio"]
    for w, s, mask in zip(*ratios, batch.completion_mask, strict=True):
        w = w[mask]
        assert_close(s, w.double().prod().item() ** (1 / len(w)))
        assert s.eq(s[0] if len(w) > 1 else w[0]).all()


# ----- The KL in the loss of GRPO -----


@given(batches(), estimators, betas, levels)
def test_the_kl_stands_outside_of_min_and_clip(batch, estimator, beta, level):
    """DeepSeekMath Eq. 3: the objective less beta times the estimate, token by token; no reference, no KL."""
    kl = kl_estimate(batch.logprobs, batch.ref_logprobs, estimator).where(batch.completion_mask, 0.0)
    options = dict(beta=beta, kl_estimator=estimator, ratio_level=level)
    without = -terms(grpo, batch._replace(ref_logprobs=None), **options)
    assert_close(-terms(grpo, batch, **options), without - beta * kl, scale=(1 + beta) * kl.abs().max())
    assert torch.equal(metrics(grpo, batch, **options)["kl"], kl)


@given(batches(), averages, st.sampled_from(["k1", "k3"]), betas, levels)
def test_the_importance_weighted_kl_has_the_gradient_w_k1(batch, loss_average, estimator, beta, level):
    """DeepSeek-V3.2: grad(w k3) = w k1 s; and grad(w k1) = w (k1 + 1) s. A = 0 leaves the KL alone, which
    has the ratio of the token, also under GSPO."""
    batch = batch._replace(advantages=torch.zeros_like(batch.advantages))
    weights, w = average(batch.completion_mask, loss_average).to(batch.logprobs), metrics(grpo, batch)["ratio"]
    options = dict(beta=beta, kl_estimator=estimator, kl_importance_weight=True, ratio_level=level)
    gradient = loss_and_gradient(grpo, batch, weights, **options)[1]
    k1, k3 = (kl_estimate(batch.logprobs, batch.ref_logprobs, name) for name in ("k1", "k3"))
    coefficient = k1 if estimator == "k3" else k1 + 1
    assert_close(gradient, beta * weights * w * coefficient, scale=(1 + beta) * (1 + (w * k3).max()))


@given(batches(on_policy=True), averages, betas)
def test_on_policy_the_gradient_coefficient_is_that_of_the_paper(batch, loss_average, beta):
    """DeepSeekMath Eq. 21: A + beta (pi_ref / pi_theta - 1)."""
    weights = average(batch.completion_mask, loss_average).to(batch.logprobs)
    r = (batch.ref_logprobs - batch.logprobs).exp()
    gradient = loss_and_gradient(grpo, batch, weights, beta=beta)[1]
    # The two terms may cancel: the tolerance is that of the terms, not of what is left of them.
    largest = (batch.advantages.abs() + beta * (r - 1).abs()).max()
    assert_close(gradient, -(batch.advantages + beta * (r - 1)) * weights, scale=largest)




# ----- The KL penalty of PPO instead of clipping: PPO Eq. 8 -----


@given(batches(), betas, eps)
def test_the_penalised_objective_is_the_unclipped_one_less_beta_times_the_kl(batch, beta_old, clip_eps):
    """PPO Eq. 8, token by token, whatever eps is; a penalty of 0 leaves rA, exactly."""
    found = metrics(ppo, batch)
    unclipped = (found["ratio"] * batch.advantages).where(batch.completion_mask, 0.0)
    penalised = -terms(ppo, batch, beta_old=beta_old, clip_eps=clip_eps)
    assert_close(penalised, unclipped - beta_old * found["approx_kl"], scale=unclipped.abs().max())
    assert torch.equal(-terms(ppo, batch, beta_old=0.0, clip_eps=clip_eps), unclipped)


@given(st.integers(2, 8).flatmap(lambda vocab: tensors((3, 2, vocab), -5.0, 5.0, float64)), betas)
def test_the_expected_penalty_is_the_kl_from_the_old_policy_to_the_new_one(drawn, beta_old):
    """PPO Eq. 8, over all tokens, weighed by pi_old, which samples them: pi_theta A - beta KL[pi_old, pi_theta].

    The other direction, KL[pi_theta, pi_old], is that of the penalty in the reward."""
    logits, old_logits, advantages = drawn                                                  # (S, V) each, S states
    logits.requires_grad_()
    logprobs, old_logprobs = logits.log_softmax(-1), old_logits.log_softmax(-1)
    batch = Batch(logprobs, old_logprobs, logprobs, advantages, torch.ones_like(logits, dtype=torch.bool))
    loss = ppo(batch, old_logprobs.exp(), beta_old=beta_old)[0]
    expected = beta_old * exact_kl(old_logits, logits).sum() - (logprobs.exp() * advantages).sum()
    assert_close(loss, expected.detach(), scale=1 + beta_old)
    assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)), scale=1 + beta_old)


# ----- The loss of the value model -----


@given(estimates(), value_eps)
def test_the_value_loss_is_the_larger_of_the_plain_and_the_clipped_error(batch, value_clip_eps):
    """Ziegler et al.'s code: 1/2 max[(V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2]. The gradient is V - R, and
    exactly 0 where the clipped error is the larger, which `clip_frac` marks."""
    values, old_values, returns, mask = batch
    move = values - old_values
    plain = (values - returns).square().where(mask, 0.0)
    clipped = (old_values + move.clamp(-value_clip_eps, value_clip_eps) - returns).square().where(mask, 0.0)
    found = terms(value, batch, value_clip_eps=value_clip_eps)
    assert_close(found, torch.maximum(plain, clipped) / 2, scale=10)
    gradient = loss_and_gradient(value, batch, torch.ones_like(values), value_clip_eps=value_clip_eps)[1]
    clip_frac = metrics(value, batch, value_clip_eps=value_clip_eps)["clip_frac"]
    outside = move.abs() > value_clip_eps
    stuck = outside & (clipped > plain)
    # Not where rounding decides: on the edge of the range, and outside of it where both errors are one.
    sure = ((move.abs() - value_clip_eps).abs() > 1e-5) & (~outside | ((clipped - plain).abs() > 1e-3)) & mask
    assert_close(gradient[sure], (values - returns).masked_fill(stuck, 0.0)[sure], scale=10)
    assert gradient[sure & stuck].eq(0).all()
    assert torch.equal(clip_frac[sure], stuck[sure].float())
    assert clip_frac[~mask].eq(0).all()
    assert not value_loss(values.clone().requires_grad_(), *batch[1:], torch.ones_like(values))[1].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_within_the_value_clip_range_nothing_is_clipped_by_rounding(dtype):
    """Where V_old + (V - V_old) would miss V: the loss is (V - R)^2 / 2, exactly."""
    values, old_values = 0.05 * torch.randn(2, 1, 10_000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert (old_values + (values - old_values)).ne(values).any()
    returns, mask = (values > 0).to(dtype), torch.ones_like(values, dtype=torch.bool)
    batch = Estimates(values, old_values, returns, mask)
    inside = (values - old_values).abs() < 0.2 - 1e-5
    assert metrics(value, batch)["clip_frac"][inside].eq(0).all()
    assert torch.equal(terms(value, batch)[inside], (values - returns).square()[inside] / 2)


# ----- The weights: what is averaged over what -----


@given(masks(least=0))
def test_weights_are_those_of_the_three_averages(mask):
    """Eq. 3: every completion counts the same. DAPO Eq. 8: every token. Dr. GRPO: every token, over a constant.

    Completions without a token, as DAPO's overlong filtering leaves them, weigh nothing, be it all of them."""
    num_rows, lengths = len(mask), mask.sum(1, keepdim=True)
    expected = {
        "sequence": 1 / (num_rows * lengths),
        "token": 1 / lengths.sum(),
        "constant": torch.tensor(1 / (num_rows * MAX_NEW_TOKENS)),
    }
    for name, weight in expected.items():
        assert_close(average(mask, name), weight.expand(mask.shape).where(mask, 0.0))
        assert average(mask, name)[~mask].eq(0).all()
        assert average(torch.zeros_like(mask), name).eq(0).all()


# ----- Padding, micro-batches and shapes: all three losses -----


def dirty(data: st.DataObject, x: Tensor, mask: Tensor) -> Tensor:
    """`x` with columns added up to the width of the mask, and up to 1e30, inf or NaN wherever the mask is false."""
    noise = data.draw(tensors(mask.shape, -1.0, 1.0, st.just(x.dtype)))
    noise = noise * data.draw(st.sampled_from([1.0, 1e30, torch.inf]))
    return pad(x, (0, mask.shape[1] - x.shape[1])).where(mask, noise)


@ALL_LOSSES
@few_examples
@given(averages, extra_columns, st.data())
def test_padding_garbage_changes_no_loss_and_no_gradient(loss, inputs, every_option, loss_average, extra, data):
    """Log-ratios of 1e30 or inf there, and columns added; gradients in the padding are exactly 0."""
    batch, options = data.draw(inputs()), data.draw(every_option)
    width, mask = batch[0].shape[1], pad(batch.completion_mask, (0, extra))
    padded = type(batch)(*(dirty(data, x, mask) for x in batch[:-1]), mask)
    size = size_of(loss, batch, options)
    expected, gradient = loss_and_gradient(loss, batch, average(batch.completion_mask, loss_average), **options)
    found, padded_gradient = loss_and_gradient(loss, padded, average(mask, loss_average), **options)
    assert_close(found, expected, scale=size)
    assert_close(padded_gradient[:, :width], gradient, scale=size)
    assert padded_gradient[~mask].eq(0).all()
    assert gradient[~batch.completion_mask].eq(0).all()
    padded_metrics = metrics(loss, padded, **options)
    for name, metric in metrics(loss, batch, **options).items():
        assert_close(padded_metrics[name][:, :width], metric)


@ALL_LOSSES
@few_examples
@given(averages, st.data())
def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_update(loss, inputs, every_option, loss_average, data):
    """However the rows are ordered and cut, the weights being those of all."""
    batch, options = data.draw(inputs()), data.draw(every_option)
    num_rows, size = len(batch[0]), size_of(loss, batch, options)
    order = torch.tensor(data.draw(st.permutations(range(num_rows))))
    parts = order.tensor_split(sorted(data.draw(st.sets(st.integers(0, num_rows)))))
    weights = average(batch.completion_mask, loss_average)
    expected, gradient = loss_and_gradient(loss, batch, weights, **options)
    pieces = [
        loss_and_gradient(loss, type(batch)(*(x[rows] for x in batch)), weights[rows], **options) for rows in parts
    ]
    assert_close(sum(piece[0] for piece in pieces), expected, scale=size)
    assert_close(torch.cat([piece[1] for piece in pieces]), gradient[order], scale=size)


@ALL_LOSSES
@few_examples
@given(averages, st.sampled_from([0, 1]), st.data())
def test_groups_give_what_their_completions_give_in_one_list(loss, inputs, every_option, loss_average, place, data):
    """(1, N, T), (N, 1, T) and (N, T): weights, gradient and metrics, exactly; also where a row has no token."""
    flat, options = data.draw(inputs(mask=masks(least=0))), data.draw(every_option)
    nested = type(flat)(*(x.unsqueeze(place) for x in flat))
    weights, nested_weights = (average(x.completion_mask, loss_average) for x in (flat, nested))
    assert torch.equal(nested_weights, weights.unsqueeze(place))
    expected, gradient = loss_and_gradient(loss, flat, weights, **options)
    found, nested_gradient = loss_and_gradient(loss, nested, nested_weights, **options)
    assert_close(found, expected, scale=size_of(loss, flat, options))
    assert torch.equal(nested_gradient, gradient.unsqueeze(place))
    nested_metrics = metrics(loss, nested, **options)
    for name, metric in metrics(loss, flat, **options).items():
        assert torch.equal(nested_metrics[name], metric.unsqueeze(place))


@pytest.mark.parametrize("shape", [(2, 1), (3,), (1, 3), (2, 4)])
def test_shapes_that_would_broadcast_are_refused(shape):
    """One advantage a completion, (N, 1), must be expanded by who calls: a (T,) would be taken for it in silence."""
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for loss, right in (
        (grpo_loss, [x, x, x, x, mask, x]), (policy_loss, [x, x, x, mask, x]), (value_loss, [x, x, x, mask, x]),
        (partial(rewards_with_kl, beta=0.1), [x[:, 0], x, mask]),
    ):  # fmt: skip
        loss(*right)
        for which, argument in enumerate(right):
            wrong = [*right[:which], torch.ones(shape).to(argument), *right[which + 1 :]]
            with pytest.raises(AssertionError):
                loss(*wrong)




# ----- Token rewards of PPO: DeepSeekMath Eq. 2, InstructGPT Eq. 2 -----


@few_examples
@given(batches(mask=masks(least=0)), estimators, betas, extra_columns, st.data())
def test_token_rewards_pay_the_score_on_the_last_token_and_the_kl_on_every_token(batch, estimator, beta, extra, data):
    """DeepSeekMath Eq. 2, exactly: r_t = -beta KL_t, and the last token that the mask counts has the score on top.

    A row without a token is paid nothing. The padding changes nothing: beta = 0 makes no NaN of an infinite KL there.
    Groups give what their completions give in one list. What is paid is a number, however the KL was computed."""
    kl = kl_estimate(batch.logprobs, batch.ref_logprobs, estimator)                         # (N, T)
    scores = data.draw(tensors((len(kl),), -10.0, 10.0, st.just(kl.dtype)))                 # (N,)
    mask = pad(batch.completion_mask, (0, extra))
    dirty_kl = dirty(data, kl, mask).requires_grad_()
    for weight in (beta, 0.0):
        expected = (-weight * pad(kl, (0, extra))).where(mask, 0.0)
        for row, length in enumerate(mask.sum(1).tolist()):
            if length > 0:
                expected[row, length - 1] += scores[row]
        found = rewards_with_kl(scores, dirty_kl, mask, weight)
        assert torch.equal(found, expected)
        assert not found.requires_grad
        for place in (0, 1):
            nested = (x.unsqueeze(place) for x in (scores, dirty_kl, mask))
            assert torch.equal(rewards_with_kl(*nested, weight), expected.unsqueeze(place))


# ----- How well the values foretell the returns -----


@few_examples
@given(masks().filter(lambda mask: mask.sum() > 1), numbers(-2, 2), numbers(-10, 10), extra_columns, st.data())
def test_explained_variance_is_one_less_the_square_of_the_part_that_values_miss(mask, part, shift, extra, data):
    """V = part R + shift gives 1 - (1 - part)^2: 1 for V = R, 0 for a constant, and less for the wrong way; the padding
    changes nothing."""
    returns = data.draw(tensors(mask.shape, -1.0, 1.0))
    returns = returns + 3 * torch.arange(mask.numel()).view(mask.shape)  # they differ by 1 at least
    wide = pad(mask, (0, extra))
    for share, expected in ((part, 1 - (1 - part) ** 2), (0.0, 0.0)):
        values, dirty_returns = (dirty(data, x, wide) for x in (share * returns + shift, returns))
        assert_close(explained_variance(values, dirty_returns, wide), expected, scale=10)
    assert explained_variance(returns / 100, returns / 100, mask) == 1  # small returns are not equal ones


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("equal", [0.0, 0.1, 1.0])
def test_explained_variance_of_equal_returns_is_zero(count, equal):
    """All right or all wrong, or a single token: there is no variance to divide by."""
    returns, mask = torch.full((1, count), equal), torch.ones(1, count, dtype=torch.bool)
    for values in (returns, 0.1 * torch.arange(count)[None], 1e3 * torch.arange(count)[None]):
        assert explained_variance(values, returns, mask) == 0
