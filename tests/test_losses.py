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
from helpers.strategies import Batch, assert_close, batches, dtypes, few_examples, masks, tensors
from kl import kl_estimate
from ppo import policy_loss, rewards_with_kl, value_loss

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


# ----- The ratio and its clipping: PPO Eq. 7 -----

POLICY_LOSSES = pytest.mark.parametrize("loss", [ppo, grpo])


@POLICY_LOSSES
@given(batches())
def test_metrics_are_the_ratio_and_the_kl_from_the_old_policy(loss, batch):
    """r = pi_theta / pi_old (PPO Eq. 6), and k3 of KL[pi_old, pi_theta], r - 1 - log r; in the padding 1 and 0."""
    log_ratio = (batch.logprobs - batch.old_logprobs).where(batch.completion_mask, 0.0)
    found = metrics(loss, batch._replace(logprobs=batch.logprobs.clone().requires_grad_()))
    assert found.keys() == {"ratio", "clip_frac", "approx_kl"} | ({"kl"} if loss is grpo else set())
    assert torch.equal(found["ratio"], log_ratio.exp())
    assert_close(found["approx_kl"], log_ratio.exp() - 1 - log_ratio, scale=found["ratio"].max())
    assert not any(metric.requires_grad for metric in found.values())


@POLICY_LOSSES
def test_approx_kl_is_never_negative_near_zero_in_float32(loss):
    """Where r - 1 - log r would round to less than 0."""
    log_ratio = torch.logspace(-9, 1, 10_000) * torch.tensor([[1.0], [-1.0]])               # (2, T)
    assert (log_ratio.exp() - 1 - log_ratio).min() < 0
    zero, mask = torch.zeros_like(log_ratio), torch.ones_like(log_ratio, dtype=torch.bool)
    assert metrics(loss, Batch(log_ratio, zero, zero, zero, mask))["approx_kl"].min() >= 0


@pytest.mark.parametrize("loss", [ppo, grpo_without_kl, gspo], ids=["ppo", "grpo", "gspo"])
@given(batches(), eps, st.none() | eps)
def test_clip_bounds_are_one_minus_clip_eps_and_one_plus_clip_eps_high(loss, batch, clip_eps, clip_eps_high):
    """PPO Eq. 7: only the upper bound matters for A >= 0 and only the lower one for A < 0, exactly; DAPO's clip-higher
    moves the upper one alone. `clip_frac` marks where the objective is less than rA. The default is 0.2."""
    options = dict(clip_eps=clip_eps, clip_eps_high=clip_eps_high)
    r, advantages = metrics(loss, batch)["ratio"], batch.advantages
    highest = 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    low, high = (torch.tensor(bound, dtype=r.dtype) for bound in (1 - clip_eps, highest))
    unclipped = (r * advantages).where(batch.completion_mask, 0.0)
    clipped = (torch.where(advantages >= 0, high, low) * advantages).where(batch.completion_mask, 0.0)
    assert torch.equal(-terms(loss, batch, **options), torch.minimum(unclipped, clipped))
    assert torch.equal(metrics(loss, batch, **options)["clip_frac"], (clipped < unclipped).float())
    assert torch.equal(terms(loss, batch), terms(loss, batch, clip_eps=0.2, clip_eps_high=0.2))


@pytest.mark.parametrize(("loss", "options"), [(ppo, {}), (ppo, {"beta_old": 2.0}), (grpo_without_kl, {})])
@given(batches(on_policy=True), averages, eps)
def test_on_policy_the_gradient_is_that_of_the_vanilla_policy_gradient(loss, options, batch, loss_average, clip_eps):
    """PPO Eq. 1: at r = 1, d loss / d logprobs = -A weight, exactly. The penalty of Eq. 8 is at its minimum there."""
    weights = average(batch.completion_mask, loss_average).to(batch.logprobs)
    gradient = loss_and_gradient(loss, batch, weights, clip_eps=clip_eps, **options)[1]
    assert torch.equal(gradient, -batch.advantages * weights)


@given(batches(mask=masks(least=0)))
def test_the_sequence_ratio_is_the_geometric_mean_of_the_tokens(batch):
    """GSPO Eq. 7: s_i = (prod_t w_t)^(1 / |o_i|), one for all tokens; a completion of one token has s = w,
    one without a token s = 1."""
    ratios = metrics(grpo, batch)["ratio"], metrics(gspo, batch)["ratio"]
    for w, s, mask in zip(*ratios, batch.completion_mask, strict=True):
        w = w[mask]
        assert_close(s, w.double().prod().item() ** (1 / max(len(w), 1)))
        assert s.eq(w[0] if len(w) == 1 else s[0]).all()


# ----- The KL: in the loss of GRPO, DeepSeekMath Eq. 3, or from the old policy, PPO Eq. 8 -----


@given(batches(), estimators, betas, levels, st.booleans())
def test_the_kl_stands_outside_of_min_and_clip(batch, estimator, beta, level, weighted):
    """DeepSeekMath Eq. 3: the objective less beta times the estimate, token by token; no reference, no KL.
    DeepSeek-V3.2 multiplies it by the ratio of the token, also under GSPO. By default: 0.04, k3, unweighted."""
    kl = kl_estimate(batch.logprobs, batch.ref_logprobs, estimator).where(batch.completion_mask, 0.0)
    without = batch._replace(ref_logprobs=None)
    if weighted:
        kl = metrics(grpo, without)["ratio"] * kl
    options = dict(beta=beta, kl_estimator=estimator, ratio_level=level, kl_importance_weight=weighted)
    expected = -terms(grpo, without, **options) - beta * kl
    assert_close(-terms(grpo, batch, **options), expected, scale=(1 + beta) * kl.abs().max())
    assert torch.equal(metrics(grpo, batch, **options)["kl"], kl)
    assert metrics(grpo, without, **options)["kl"].eq(0).all()
    assert torch.equal(terms(grpo, batch), terms(grpo, batch, beta=0.04, kl_estimator="k3", kl_importance_weight=False))


@given(batches(), betas, eps)
def test_the_penalised_objective_is_the_unclipped_one_less_beta_times_the_kl(batch, beta_old, clip_eps):
    """PPO Eq. 8, token by token, whatever eps is; a penalty of 0 leaves rA, exactly."""
    found = metrics(ppo, batch)
    unclipped = (found["ratio"] * batch.advantages).where(batch.completion_mask, 0.0)
    penalised = -terms(ppo, batch, beta_old=beta_old, clip_eps=clip_eps)
    assert_close(penalised, unclipped - beta_old * found["approx_kl"], scale=unclipped.abs().max())
    assert torch.equal(-terms(ppo, batch, beta_old=0.0, clip_eps=clip_eps), unclipped)


# ----- The loss of the value model -----


@given(estimates(), value_eps)
def test_the_value_loss_is_the_larger_of_the_plain_and_the_clipped_error(batch, value_clip_eps):
    """Ziegler et al.'s code: 1/2 max[(V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2]. The gradient is V - R, and
    exactly 0 where the clipped error is the larger, which `clip_frac` marks; inside, nothing is rounded. eps is 0.2."""
    values, old_values, returns, mask = batch
    move = values - old_values
    plain = (values - returns).square().where(mask, 0.0)
    clipped = (old_values + move.clamp(-value_clip_eps, value_clip_eps) - returns).square().where(mask, 0.0)
    found = terms(value, batch, value_clip_eps=value_clip_eps)
    assert_close(found, torch.maximum(plain, clipped) / 2, scale=10)
    gradient = loss_and_gradient(value, batch, torch.ones_like(values), value_clip_eps=value_clip_eps)[1]
    clip_frac = metrics(value, batch, value_clip_eps=value_clip_eps)["clip_frac"]
    # Not on the edge of the range, nor where both errors are one: there, rounding decides.
    inside = move.abs() < value_clip_eps - 1e-5
    stuck = (move.abs() > value_clip_eps + 1e-5) & (clipped > plain + 1e-3) & mask
    free = inside | (plain > clipped + 1e-3)
    assert torch.equal(found[inside], plain[inside] / 2)
    assert_close(gradient[free], (values - returns).where(mask, 0.0)[free], scale=10)
    assert gradient[stuck].eq(0).all()
    assert clip_frac[stuck].eq(1).all()
    assert clip_frac[free | ~mask].eq(0).all()
    assert torch.equal(terms(value, batch), terms(value, batch, value_clip_eps=0.2))


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
        assert average(torch.zeros_like(mask), name).eq(0).all()


# ----- Padding and shapes -----


def dirty(data: st.DataObject, x: Tensor, mask: Tensor) -> Tensor:
    """`x` with columns added up to the width of the mask, and up to 1e30, inf or NaN wherever the mask is false."""
    noise = data.draw(tensors(mask.shape, -1.0, 1.0, st.just(x.dtype)))
    noise = noise * data.draw(st.sampled_from([1.0, 1e30, torch.inf]))
    return pad(x, (0, mask.shape[1] - x.shape[1])).where(mask, noise)


# A loss, what its batch is drawn from, and all its options.
@pytest.mark.parametrize(("loss", "inputs", "every_option"), [
    pytest.param(ppo, batches, st.fixed_dictionaries({
        "clip_eps": eps, "clip_eps_high": st.none() | eps, "beta_old": st.none() | betas,
    }), id="ppo"),
    pytest.param(grpo, batches, st.fixed_dictionaries({
        "beta": betas, "clip_eps": eps, "clip_eps_high": st.none() | eps, "ratio_level": levels,
        "kl_estimator": estimators, "kl_importance_weight": st.booleans(),
    }), id="grpo"),
    pytest.param(value, estimates, st.fixed_dictionaries({"value_clip_eps": value_eps}), id="value"),
])  # fmt: skip
@few_examples
@given(averages, extra_columns, st.data())
def test_padding_garbage_changes_no_loss_and_no_gradient(loss, inputs, every_option, loss_average, extra, data):
    """Log-ratios of 1e30 or inf there, columns added, and a dimension in front, (1, N, T); also where a completion has
    no token. Gradients in the padding are exactly 0."""
    batch, options = data.draw(inputs(mask=masks(least=0))), data.draw(every_option)
    width, mask = batch[0].shape[1], pad(batch.completion_mask, (0, extra))
    padded = type(batch)(*(dirty(data, x, mask)[None] for x in batch[:-1]), mask[None])
    weights, padded_weights = (average(x.completion_mask, loss_average) for x in (batch, padded))
    expected, gradient = loss_and_gradient(loss, batch, weights, **options)
    found, padded_gradient = loss_and_gradient(loss, padded, padded_weights, **options)
    size = 1 + terms(loss, batch, **options).abs().max()
    assert_close(found, expected, scale=size)
    assert_close(padded_gradient[0, :, :width], gradient, scale=gradient.abs().max() + size)
    assert padded_gradient[0, ~mask].eq(0).all()
    padded_metrics = metrics(loss, padded, **options)
    for name, metric in metrics(loss, batch, **options).items():
        assert_close(padded_metrics[name][0, :, :width], metric)


@pytest.mark.parametrize("shape", [(2, 1), (3,), (1, 3), (2, 4)])
def test_shapes_that_would_broadcast_and_names_that_are_none_are_refused(shape):
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
    with pytest.raises(AssertionError, match="sentence"):
        average(mask, "sentence")
    with pytest.raises(AssertionError, match="word"):
        grpo_loss(x, x, x, x, mask, x, ratio_level="word")


# ----- Token rewards of PPO: DeepSeekMath Eq. 2, InstructGPT Eq. 2 -----


@few_examples
@given(batches(mask=masks(least=0)), estimators, betas, extra_columns, st.data())
def test_token_rewards_pay_the_score_on_the_last_token_and_the_kl_on_every_token(batch, estimator, beta, extra, data):
    """DeepSeekMath Eq. 2, exactly: r_t = -beta KL_t, and the last token that the mask counts has the score on top. A
    row without a token is paid nothing; an infinite KL in the padding makes no NaN; nothing carries a gradient."""
    kl = kl_estimate(batch.logprobs, batch.ref_logprobs, estimator)                         # (N, T)
    scores = data.draw(tensors((len(kl),), -10.0, 10.0, st.just(kl.dtype)))                 # (N,)
    mask = pad(batch.completion_mask, (0, extra))
    dirty_kl = dirty(data, kl, mask).requires_grad_()
    expected = (-beta * pad(kl, (0, extra))).where(mask, 0.0)
    for row, length in enumerate(mask.sum(1).tolist()):
        if length > 0:
            expected[row, length - 1] += scores[row]
    found = rewards_with_kl(scores, dirty_kl, mask, beta)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert torch.equal(rewards_with_kl(scores[None], dirty_kl[None], mask[None], beta)[0], expected)
