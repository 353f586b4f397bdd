# SPDX-License-Identifier: MIT
"""What must hold for the KL: its three estimators, their expectations and gradients by enumeration of a small softmax
policy, Schulman's table for two Gaussians, and the controllers of beta.

With r = pi_ref / pi_theta: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r. RKL is KL[policy, reference], FKL is
KL[reference, policy], s is the gradient of log pi_theta, mu is another policy that sampled and w = pi_theta / mu.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from helpers.strategies import assert_close, dtypes, float64, tensors
from kl import adaptive_beta, exact_kl, kl_estimate, penalty_beta

estimators = st.sampled_from(["k1", "k2", "k3"])


def estimates(log_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3 of a given log r, without rounding it: the policy's log-probability is 0."""
    return tuple(kl_estimate(torch.zeros_like(log_r), log_r, name) for name in ("k1", "k2", "k3"))


@st.composite
def tables(draw, count: int = 2) -> list[Tensor]:
    """Logits of `count` policies over one vocabulary of at most 8 tokens, (V,) each, with log-ratios up to about 10."""
    size = draw(st.integers(2, 8))
    return [draw(tensors((size,), -5.0, 5.0, float64)) for _ in range(count)]


# ----- One token -----


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), dtypes)
@example([1e-9, -1e-7, 1e-4, 3e-4, 1e-20], torch.float32)
def test_k2_and_k3_are_never_negative_and_zero_only_where_the_policies_agree(log_r, dtype):
    """k2, k3 >= 0, and 0 only where log r = 0. Below the spacing of floats at 1, k3 rounds to 0: never to less."""
    log_r = torch.tensor(log_r, dtype=dtype)
    k1, k2, k3 = estimates(log_r)
    assert torch.equal(k1, -log_r)
    assert k2.ge(0).all()
    assert k3.ge(0).all()
    far = log_r.abs() > 2 * torch.finfo(dtype).eps
    assert k2[far].gt(0).all()
    assert k3[far].gt(0).all()
    assert k2[log_r == 0].eq(0).all()
    assert k3[log_r == 0].eq(0).all()


def test_k3_is_never_negative_near_zero_in_float32():
    """k3 >= 0 where exp(x) - 1 - x would reach -6e-8: a million log-ratios from 1e-9 to 10, of both signs."""
    size = torch.logspace(-9, 1, 500_000)
    log_r = torch.cat([size, -size])
    assert (log_r.exp() - 1 - log_r).min() < 0
    assert estimates(log_r)[2].min() >= 0


def test_k3_is_the_estimator_unless_another_is_named():
    """DeepSeekMath Eq. 4."""
    pair = torch.tensor([-1.0]), torch.tensor([-3.0])
    assert kl_estimate(*pair) == kl_estimate(*pair, "k3") != kl_estimate(*pair, "k2")


@given(tensors((4,), -10.0, 10.0))
def test_k3_minus_k1_is_the_ratio_minus_one_and_k3_is_near_k2(log_r):
    """Schulman: k3 - k1 = r - 1, and |k3 - k2| <= |x|^3 e^|x| / 6."""
    k1, k2, k3 = estimates(log_r)
    rounding = 8 * torch.finfo(log_r.dtype).eps * (log_r.exp() + log_r.square())
    assert ((k3 - k1 - torch.expm1(log_r)).abs() <= rounding).all()
    assert ((k3 - k2).abs() <= log_r.abs() ** 3 * log_r.abs().exp() / 6 + rounding).all()


@given(tensors((4,), -10.0, 0.0, float64), tensors((4,), -10.0, 0.0, float64), tensors((4,), -10.0, 0.0, float64))
def test_the_gradient_in_logprobs_is_one_then_k1_then_one_minus_r(logprobs, ref_logprobs, mu_logprobs):
    """Per sample, grad k2 = k1 s and grad(w k3) = w k1 s; also grad k1 = s and grad k3 = (1 - r) s."""
    logprobs.requires_grad_()
    k1, k2, k3 = (kl_estimate(logprobs, ref_logprobs, name) for name in ("k1", "k2", "k3"))
    r, w = (ref_logprobs - logprobs).exp(), (logprobs - mu_logprobs).exp()
    for value, coefficient in [(k1, torch.ones(4)), (k2, k1), (k3, 1 - r), (w * k3, w * k1)]:
        (gradient,) = torch.autograd.grad(value.sum(), logprobs, retain_graph=True)
        assert_close(gradient.where(w * r < 1e4, 0.0), coefficient.where(w * r < 1e4, 0.0), scale=100)


@given(tensors((4,), -10.0, 0.0, float64), tensors((4,), -10.0, 0.0, float64), estimators)
def test_both_arguments_carry_a_gradient_of_opposite_sign(logprobs, ref_logprobs, estimator):
    """The estimate depends on the difference only."""
    pair = logprobs.requires_grad_(), ref_logprobs.requires_grad_()
    by_policy, by_reference = torch.autograd.grad(kl_estimate(*pair, estimator).sum(), pair)
    assert torch.equal(by_policy, -by_reference)


# ----- Expectations, by enumeration -----


@given(tables())
def test_k1_and_k3_are_unbiased_and_the_kl_is_not_negative(logits):
    """Schulman: E_pi[k1] = E_pi[k3] = KL >= 0."""
    kl = exact_kl(*logits)
    logp, ref_logp = (x.log_softmax(-1) for x in logits)
    k1, _, k3 = ((logp.exp() * kl_estimate(logp, ref_logp, name)).sum() for name in ("k1", "k2", "k3"))
    assert kl >= -1e-15
    assert_close(k1, kl)
    assert_close(k3, kl)
    assert_close(exact_kl(logits[0], logits[0] + 3.0), 0.0)


@given(tables())
def test_exact_kl_is_the_sum_over_the_vocabulary_for_every_leading_index(logits):
    """exact_kl: (..., V) -> (...), against a sum in plain Python."""
    p, q = (x.softmax(-1).tolist() for x in logits)
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert_close(exact_kl(*logits), kl)
    stacked = exact_kl(torch.stack(logits)[:, None], torch.stack([logits[1], logits[1]])[:, None])
    assert stacked.shape == (2, 1)
    assert_close(stacked[0], kl)
    assert_close(stacked[1], 0.0)


@given(tables())
def test_the_variance_of_one_minus_r_is_the_chi_squared_divergence(logits):
    """Var_pi[1 - r] = chi^2(ref || pi), and 1 - r = k1 - k3 is the coefficient of the gradient of k3."""
    logp, ref_logp = (x.log_softmax(-1) for x in logits)
    pi, ref = logp.exp(), ref_logp.exp()
    coefficient = kl_estimate(logp, ref_logp, "k1") - kl_estimate(logp, ref_logp, "k3")
    variance = (pi * coefficient.square()).sum() - (pi * coefficient).sum().square()
    assert_close(variance, ((ref - pi).square() / pi).sum())


def token_logprobs(logits: Tensor) -> Tensor:
    """All 4 completions of two tokens out of two, (4, 2): logits[0] is the distribution of the first token, logits[1]
    that of the second one after token 0, and logits[2] after token 1."""
    first, second = torch.cartesian_prod(torch.arange(2), torch.arange(2)).unbind(1)        # (4,), (4,)
    logp = logits.log_softmax(-1)
    return torch.stack([logp[0, first], logp[1 + first, second]], dim=1)


two_tokens = tensors((3, 2), -5.0, 5.0, float64)


@given(two_tokens, two_tokens)
def test_k1_of_the_tokens_sums_to_the_log_ratio_of_the_completion(logits, ref_logits):
    """The chain rule: sum_t k1_t = log pi(y) - log ref(y)."""
    logprobs, ref_logprobs = token_logprobs(logits), token_logprobs(ref_logits)
    log_ratio = (logprobs.sum(1).exp() / ref_logprobs.sum(1).exp()).log()
    assert_close(kl_estimate(logprobs, ref_logprobs, "k1").sum(1), log_ratio)


@given(two_tokens, two_tokens)
def test_k1_in_the_reward_gives_the_gradient_of_the_kl_of_whole_completions(logits, ref_logits):
    """The table of kl.py, with several tokens: k1 in the reward is exact, a loss of k2 per token is not."""
    logits.requires_grad_()
    logprobs, ref_logprobs = token_logprobs(logits), token_logprobs(ref_logits)             # (4, 2)
    pi = logprobs.sum(1).exp()                                                              # (4,)
    penalty = kl_estimate(logprobs, ref_logprobs, "k1").sum(1)                              # (4,)
    (of_the_kl,) = torch.autograd.grad((pi * (logprobs - ref_logprobs).sum(1)).sum(), logits, retain_graph=True)
    (in_the_reward,) = torch.autograd.grad((pi.detach() * penalty.detach() * logprobs.sum(1)).sum(), logits)
    assert_close(in_the_reward, of_the_kl)


def test_k2_in_the_loss_misses_the_gradient_of_the_kl_of_whole_completions():
    """The table of kl.py, with several tokens: it forgets that the first token changes what the second one costs."""
    logits, ref_logits = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    logprobs, ref_logprobs = token_logprobs(logits), token_logprobs(ref_logits)
    pi = logprobs.sum(1).exp()
    k2 = kl_estimate(logprobs, ref_logprobs, "k2").sum(1)
    (of_the_kl,) = torch.autograd.grad((pi * (logprobs - ref_logprobs).sum(1)).sum(), logits, retain_graph=True)
    (in_the_loss,) = torch.autograd.grad((pi.detach() * k2).sum(), logits)
    assert_close(in_the_loss[1:], of_the_kl[1:])
    assert (in_the_loss[0] - of_the_kl[0]).abs().max() > 1e-2


# ----- The gradient table: a good estimator is not a good loss -----


def in_the_loss(estimator: str, w: Callable, sampler: str = "mu") -> Callable:
    """The expected loss, over samples that carry no gradient, of w(pi / mu) times an estimate."""

    def loss(logp: Tensor, ref_logp: Tensor, mu_logp: Tensor) -> Tensor:
        sampled = {"pi": logp.detach(), "mu": mu_logp}[sampler].exp()
        return (sampled * w((logp - mu_logp).exp()) * kl_estimate(logp, ref_logp, estimator)).sum()

    return loss


def in_the_reward(logp: Tensor, ref_logp: Tensor, _: Tensor) -> Tensor:
    """The policy gradient of E_pi[k1]: a penalty without gradient times log pi."""
    return (logp.detach().exp() * kl_estimate(logp, ref_logp, "k1").detach() * logp).sum()


def no_weight(w: Tensor) -> Tensor:
    return torch.ones_like(w)


def weight(w: Tensor) -> Tensor:
    return w


gradient_table = {
    "k1 as loss": (in_the_loss("k1", no_weight, "pi"), "0"),
    "k2 as loss": (in_the_loss("k2", no_weight, "pi"), "RKL"),
    "k3 as loss": (in_the_loss("k3", no_weight, "pi"), "FKL"),
    "k1 in the reward": (in_the_reward, "RKL"),
    "w k1, gradient through w": (in_the_loss("k1", weight), "RKL"),
    "w k3, gradient through w": (in_the_loss("k3", weight), "RKL"),
    "sg(w) k2": (in_the_loss("k2", Tensor.detach), "RKL"),
    "sg(w) k3": (in_the_loss("k3", Tensor.detach), "FKL"),
    "k1, samples from mu": (in_the_loss("k1", no_weight), "none of them"),
    "k2, samples from mu": (in_the_loss("k2", no_weight), "none of them"),
    "k3, samples from mu": (in_the_loss("k3", no_weight), "none of them"),
}

# Five categories, and what an independent enumeration found for them.
THETA = torch.tensor([0.9, -0.4, 0.3, -1.1, 0.2], dtype=torch.float64)
REF = torch.tensor([-0.2, 0.7, -0.5, 0.4, 0.1], dtype=torch.float64)
MU = torch.tensor([0.4, 0.0, 0.6, -0.9, -0.3], dtype=torch.float64)
GRAD_RKL = torch.tensor([0.26795203, -0.17137138, 0.07994318, -0.10716667, -0.06935717], dtype=torch.float64)
GRAD_FKL = torch.tensor([0.27197915, -0.22253370, 0.12322135, -0.19198873, 0.01932193], dtype=torch.float64)


def table_gradients(row: str, theta: Tensor, ref: Tensor, mu: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The expected gradient of a row of the table in theta, and those it is compared with, from `exact_kl`."""
    theta = theta.clone().requires_grad_()
    (found,) = torch.autograd.grad(gradient_table[row][0](*(x.log_softmax(-1) for x in (theta, ref, mu))), theta)
    (rkl,) = torch.autograd.grad(exact_kl(theta, ref), theta)
    (fkl,) = torch.autograd.grad(exact_kl(ref, theta), theta)
    return found, {"0": torch.zeros_like(theta), "RKL": rkl, "FKL": fkl}


@pytest.mark.parametrize("row", [row for row, (_, equals) in gradient_table.items() if equals != "none of them"])
@given(tables(count=3))
def test_the_expected_gradient_is_that_of_the_table(row, logits):
    """The table of kl.py, to 1e-12."""
    found, known = table_gradients(row, *logits)
    torch.testing.assert_close(found, known[gradient_table[row][1]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", gradient_table)
def test_the_rows_of_the_table_are_different_directions(row):
    """A row is what the table says and nothing else; without a weight, samples of mu give none of them."""
    found, known = table_gradients(row, THETA, REF, MU)
    equal = [name for name, gradient in known.items() if (found - gradient).abs().max() < 1e-3]
    assert equal == [name for name in known if name == gradient_table[row][1]]


def test_five_categories_have_the_known_divergences_and_gradients():
    """The table of kl.py for five categories: RKL, FKL and E[k2] to 12 digits, the gradients to 8."""
    logp, ref_logp = THETA.log_softmax(-1), REF.log_softmax(-1)
    k2 = (logp.exp() * kl_estimate(logp, ref_logp, "k2")).sum()
    values = torch.stack([exact_kl(THETA, REF), exact_kl(REF, THETA), k2])
    known = torch.tensor([0.442966682225, 0.489489821965, 0.448622032588], dtype=torch.float64)
    torch.testing.assert_close(values, known, rtol=0, atol=1e-12)
    for row, gradient in (("k2 as loss", GRAD_RKL), ("k3 as loss", GRAD_FKL)):
        torch.testing.assert_close(table_gradients(row, THETA, REF, MU)[0], gradient, rtol=0, atol=1e-8)


# ----- Schulman's table: unit Gaussians with mean gap m -----

# m: {estimator: (bias / true, sd / true)} with true = m^2 / 2.
GAUSSIANS = {
    0.1: {"k1": (0.0, 20.0), "k2": (0.0025, 1.417745), "k3": (0.0, 1.416575)},
    1.0: {"k1": (0.0, 2.0), "k2": (0.25, 1.732051), "k3": (0.0, 1.695030)},
}


def gaussian_estimate(x: Tensor, gap: float, estimator: str) -> Tensor:
    """The estimate of KL[N(0, 1), N(gap, 1)] from x."""
    return kl_estimate(-x.square() / 2, -(x - gap).square() / 2, estimator)


def gaussian_moments(gap: float, estimator: str) -> tuple[float, float, float]:
    """Mean, variance and fourth central moment of an estimate, by quadrature."""
    x = torch.arange(-14, 18, 0.01, dtype=torch.float64)
    density = 0.01 * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    values = gaussian_estimate(x, gap, estimator)
    mean = (density * values).sum()
    return (mean.item(), *((density * (values - mean) ** power).sum().item() for power in (2, 4)))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gap", [0.1, 1.0, 0.5])
def test_gaussians_give_the_bias_and_deviation_of_the_table(gap, estimator):
    """Bias m^2/4 for k2 and 0 else; deviations 2/m, sqrt(2 + m^2) and 2 sqrt(e^(m^2) - 1 - m^2) / m^2, over the KL."""
    true, square = gap**2 / 2, gap**2
    mean, variance, _ = gaussian_moments(gap, estimator)
    bias, deviation = mean / true - 1, math.sqrt(variance) / true
    closed = {
        "k1": (0.0, 2 / gap),
        "k2": (square / 4, math.sqrt(2 + square)),
        "k3": (0.0, 2 * math.sqrt(math.expm1(square) - square) / square),
    }
    assert (bias, deviation) == pytest.approx(closed[estimator], rel=1e-9, abs=1e-9)
    if gap in GAUSSIANS:
        assert (bias, deviation) == pytest.approx(GAUSSIANS[gap][estimator], rel=0, abs=5e-7)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gap", list(GAUSSIANS))
def test_gaussian_samples_give_the_table_within_four_standard_errors(gap, estimator):
    """Of the mean, sd / sqrt(n), and of the variance, sqrt((fourth moment - variance^2) / n)."""
    x = torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = gaussian_estimate(x, gap, estimator)
    bias, deviation = (gap**2 / 2 * x for x in GAUSSIANS[gap][estimator])
    fourth = gaussian_moments(gap, estimator)[2]
    assert abs(values.mean() - gap**2 / 2 - bias) < 4 * deviation / math.sqrt(len(x))
    assert abs(values.var() - deviation**2) < 4 * math.sqrt((fourth - deviation**4) / len(x))


# ----- The controllers of beta -----

positive = st.floats(1e-6, 1e6)


@given(positive, positive, st.floats(-1e6, 1e6), st.floats(0.01, 1.0))
def test_adaptive_kl_moves_beta_by_two_percent_at_most_and_towards_the_target(beta, target, kl, gain):
    """Ziegler et al.: beta grows where the KL is too large; 10 % of the relative error, 2 % at most."""
    factor = adaptive_beta(beta, kl, target) / beta
    assert 0.98 - 1e-12 <= factor <= 1.02 + 1e-12
    error = kl / target - 1
    assert (factor - 1) * error >= 0
    clipped = max(-0.2, min(0.2, error))
    assert factor - 1 == pytest.approx(0.1 * clipped, abs=1e-12)
    assert adaptive_beta(beta, kl, target, gain) / beta - 1 == pytest.approx(gain * clipped, abs=1e-12)
    assert adaptive_beta(beta, target, target) == beta


@given(positive, positive, st.floats(0, 10))
def test_penalty_kl_halves_keeps_or_doubles_beta(beta, target, relative):
    """PPO section 4: the factor is 1/2 below target / 1.5, 2 above 1.5 target, else 1."""
    kl = relative * target
    factor = 0.5 if kl < target / 1.5 else 2.0 if kl > target * 1.5 else 1.0
    assert penalty_beta(beta, kl, target) == factor * beta
    for inside in (target / 1.5, target, target * 1.5):
        assert penalty_beta(beta, inside, target) == beta


def test_controllers_go_on_from_the_beta_that_they_gave():
    """A few updates, each from the beta of the one before."""
    penalty, adaptive = [1.0], [1.0]
    for kl in (9.0, 9.0, 1.0, 0.1):
        penalty.append(penalty_beta(penalty[-1], kl, target=1.0))
    for kl in (9.0, 9.0, 0.0):
        adaptive.append(adaptive_beta(adaptive[-1], kl, target=1.0, gain=0.5))
    assert penalty[1:] == [2.0, 4.0, 4.0, 2.0]
    assert adaptive[1:] == pytest.approx([1.1, 1.21, 1.089])


# ----- Far apart -----


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimate_pulls_a_policy_back_from_however_far(estimator):
    """Where an estimate or a log-ratio is clamped, its gradient is exactly 0, and a policy that is far off stays so."""
    logprobs = torch.tensor([-40.0, -8.0, -0.1, -0.1], requires_grad=True)
    ref_logprobs = torch.tensor([-20.0, -0.1, -8.0, -40.0])
    estimate = kl_estimate(logprobs, ref_logprobs, estimator)
    estimate.sum().backward()
    assert logprobs.grad.abs().gt(0.9).all()
    assert estimate.abs().gt(6).all()


# ----- Errors -----


def test_unknown_estimators_and_wrong_shapes_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(x, x, "k4")
    for function in (kl_estimate, exact_kl):
        with pytest.raises(ValueError, match="must match"):
            function(x, x[:1])
