# SPDX-License-Identifier: MIT
"""What must hold for the KL: its three estimators, their expectations by enumeration of a small vocabulary, Schulman's
table for two Gaussians, and the controllers of beta. Their gradients as penalties are in test_exact_gradients.py.

With r = pi_ref / pi_theta: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r.
"""

import doctest
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import kl
from helpers.strategies import assert_close, dtypes, float64, tensors
from kl import adaptive_beta, exact_kl, kl_estimate, penalty_beta

ESTIMATORS = ("k1", "k2", "k3")


def test_examples_in_docstrings_are_right():
    results = doctest.testmod(kl)
    assert results.attempted > 0
    assert results.failed == 0


# ----- One token -----


def estimates(log_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3 of a given log r, without rounding it: the policy's log-probability is 0."""
    return tuple(kl_estimate(torch.zeros_like(log_r), log_r, name) for name in ESTIMATORS)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), dtypes)
@example([1e-9, -1e-7, 1e-4, 3e-4, 1e-20], torch.float32)
def test_k2_and_k3_are_never_negative_and_zero_only_where_the_policies_agree(log_r, dtype):
    """k2, k3 >= 0, and 0 only where log r = 0. Below the spacing of floats at 1, k3 rounds to 0: never to less."""
    log_r = torch.tensor(log_r, dtype=dtype)
    k1, k2, k3 = estimates(log_r)
    assert torch.equal(k1, -log_r)
    far = log_r.abs() > 2 * torch.finfo(dtype).eps
    for estimate in (k2, k3):
        assert estimate.ge(0).all()
        assert estimate[far].gt(0).all()
        assert estimate[log_r == 0].eq(0).all()


def test_k3_is_never_negative_near_zero_in_float32():
    """k3 >= 0 where exp(x) - 1 - x would reach -6e-8: a million log-ratios from 1e-9 to 10, of both signs."""
    size = torch.logspace(-9, 1, 500_000)
    log_r = torch.cat([size, -size])
    assert (log_r.exp() - 1 - log_r).min() < 0
    assert estimates(log_r)[2].min() >= 0


@given(tensors((4,), -10.0, 10.0))
def test_k3_minus_k1_is_the_ratio_minus_one_and_k3_is_near_k2(log_r):
    """Schulman: k3 - k1 = r - 1, and |k3 - k2| <= |x|^3 e^|x| / 6. DeepSeekMath Eq. 4 is k3, which is the default."""
    k1, k2, k3 = estimates(log_r)
    rounding = 8 * torch.finfo(log_r.dtype).eps * (log_r.exp() + log_r.square())
    assert ((k3 - k1 - torch.expm1(log_r)).abs() <= rounding).all()
    assert ((k3 - k2).abs() <= log_r.abs() ** 3 * log_r.abs().exp() / 6 + rounding).all()
    assert torch.equal(kl_estimate(torch.zeros_like(log_r), log_r), k3)


@given(*[tensors((4,), -10.0, 0.0, float64)] * 3)
def test_the_gradient_in_logprobs_is_one_then_k1_then_one_minus_r(logprobs, ref_logprobs, mu_logprobs):
    """Per sample, with s the gradient of log pi_theta: grad k1 = s, grad k2 = k1 s, grad k3 = (1 - r) s, and
    grad(w k3) = w k1 s, where w = pi_theta / mu. That in the reference has the opposite sign."""
    logprobs.requires_grad_()
    ref_logprobs.requires_grad_()
    k1, k2, k3 = (kl_estimate(logprobs, ref_logprobs, name) for name in ESTIMATORS)
    r, w = (ref_logprobs - logprobs).detach().exp(), (logprobs - mu_logprobs).exp()
    for value, coefficient in ((k1, torch.ones(4)), (k2, k1), (k3, 1 - r)):
        gradient, ref_gradient = torch.autograd.grad(value.sum(), (logprobs, ref_logprobs), retain_graph=True)
        assert_close(gradient, coefficient, scale=10 + r.max())
        assert torch.equal(ref_gradient, -gradient)
    (gradient,) = torch.autograd.grad((w * k3).sum(), logprobs)
    assert_close(gradient, w * k1, scale=100 + (w * r).max().detach())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_estimate_pulls_a_policy_back_from_however_far(estimator):
    """Where an estimate or a log-ratio is clamped, its gradient is exactly 0, and a policy that is far off stays so."""
    logprobs = torch.tensor([-40.0, -8.0, -0.1, -0.1], requires_grad=True)
    ref_logprobs = torch.tensor([-20.0, -0.1, -8.0, -40.0])
    estimate = kl_estimate(logprobs, ref_logprobs, estimator)
    estimate.sum().backward()
    assert logprobs.grad.abs().gt(0.9).all()
    assert estimate.abs().gt(6).all()


def test_unknown_estimators_and_wrong_shapes_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^estimator must be one of k1, k2, k3, got 'k4'"):
        kl_estimate(x, x, "k4")
    for function in (kl_estimate, exact_kl):
        with pytest.raises(ValueError, match="must match"):
            function(x, x[:1])


# ----- Expectations, by enumeration -----


@given(st.integers(2, 8).flatmap(lambda vocab: tensors((2, vocab), -5.0, 5.0, float64)))
def test_k1_and_k3_are_unbiased_and_exact_kl_is_the_sum_over_the_vocabulary(tables):
    """Schulman: E_pi[k1] = E_pi[k3] = KL >= 0, against a sum in plain Python; for every leading index."""
    p, q = tables.softmax(-1).tolist()                                                      # (V,) each
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    logp, ref_logp = tables.log_softmax(-1)
    for estimator in ("k1", "k3"):
        assert_close((logp.exp() * kl_estimate(logp, ref_logp, estimator)).sum(), expected)
    logits, ref_logits = tables
    kl = exact_kl(torch.stack([logits, ref_logits])[:, None], torch.stack([ref_logits, ref_logits + 3.0])[:, None])
    assert kl.shape == (2, 1)
    assert kl.min() >= -1e-15
    assert_close(kl[0], expected)
    assert_close(kl[1], 0.0)


# Logits over five tokens, and what an independent enumeration found for them.
THETA = torch.tensor([0.9, -0.4, 0.3, -1.1, 0.2], dtype=torch.float64)
REF = torch.tensor([-0.2, 0.7, -0.5, 0.4, 0.1], dtype=torch.float64)
GRAD_RKL = torch.tensor([0.26795203, -0.17137138, 0.07994318, -0.10716667, -0.06935717], dtype=torch.float64)
GRAD_FKL = torch.tensor([0.27197915, -0.22253370, 0.12322135, -0.19198873, 0.01932193], dtype=torch.float64)


def test_five_tokens_have_the_known_divergences_and_gradients():
    """RKL is KL[policy, reference] and FKL is KL[reference, policy]: they and E[k2] to 12 digits, gradients to 8."""
    theta = THETA.clone().requires_grad_()
    rkl, fkl = exact_kl(theta, REF), exact_kl(REF, theta)
    k2 = (theta.softmax(-1) * kl_estimate(theta.log_softmax(-1), REF.log_softmax(-1), "k2")).sum()
    known = [0.442966682225, 0.489489821965, 0.448622032588]
    assert [rkl.item(), fkl.item(), k2.item()] == pytest.approx(known, rel=0, abs=1e-12)
    for divergence, known in ((rkl, GRAD_RKL), (fkl, GRAD_FKL)):
        torch.testing.assert_close(torch.autograd.grad(divergence, theta)[0], known, rtol=0, atol=1e-8)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gap", [0.1, 1.0, 0.5])
def test_gaussians_give_the_bias_and_deviation_of_the_table(gap, estimator):
    """Schulman's table for KL[N(0, 1), N(m, 1)] = m^2 / 2, by quadrature: bias m^2/4 for k2 and 0 else; deviations 2/m,
    sqrt(2 + m^2) and 2 sqrt(e^(m^2) - 1 - m^2) / m^2, over the KL."""
    x = torch.arange(-14, 18, 0.01, dtype=torch.float64)
    density = 0.01 * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    estimate = kl_estimate(-x.square() / 2, -(x - gap).square() / 2, estimator)
    true, square = gap**2 / 2, gap**2
    mean = (density * estimate).sum()
    deviation = (density * (estimate - mean).square()).sum().sqrt()
    found = mean.item() / true - 1, deviation.item() / true
    closed = {
        "k1": (0.0, 2 / gap),
        "k2": (square / 4, math.sqrt(2 + square)),
        "k3": (0.0, 2 * math.sqrt(math.expm1(square) - square) / square),
    }
    assert found == pytest.approx(closed[estimator], rel=1e-9, abs=1e-9)


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


@given(positive, positive)
def test_penalty_kl_halves_keeps_or_doubles_beta(beta, target):
    """PPO section 4: the factor is 1/2 below target / 1.5, 2 above 1.5 target, else 1."""
    kept = target / 1.5, target, target * 1.5
    for factor, kls in ((0.5, (0.0, 0.66 * target)), (1.0, kept), (2.0, (1.51 * target, 10 * target))):
        assert [penalty_beta(beta, kl, target) for kl in kls] == [factor * beta] * len(kls)
