# SPDX-License-Identifier: MIT
"""What must hold for the KL: its three estimators and their gradients, the sum that they estimate, and the controllers
of beta. What gradients they have on average, as penalties, is in test_exact_gradients.py.

With r = pi_ref / pi_theta: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.strategies import assert_close, float64, tensors
from kl import adaptive_beta, exact_kl, kl_estimate, penalty_beta

ESTIMATORS = ("k1", "k2", "k3")


# ----- One token -----


def estimates(log_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3 of a given log r, without rounding it: the policy's log-probability is 0."""
    return tuple(kl_estimate(torch.zeros_like(log_r), log_r, name) for name in ESTIMATORS)


def test_k3_is_never_negative_near_zero_in_float32():
    """k3 >= 0 where exp(x) - 1 - x would reach -6e-8: a million log-ratios from 1e-9 to 10, of both signs."""
    size = torch.logspace(-9, 1, 500_000)
    log_r = torch.cat([size, -size])
    assert (log_r.exp() - 1 - log_r).min() < 0
    k3 = estimates(log_r)[2]
    assert k3.min() >= 0
    assert k3[log_r.abs() > 1e-6].min() > 0  # below the spacing of floats at 1, it rounds to 0


@given(tensors((4,), -10.0, 10.0))
def test_the_estimators_are_those_of_schulman(log_r):
    """k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r. DeepSeekMath Eq. 4 is k3, which is the default."""
    k1, k2, k3 = estimates(log_r)
    assert torch.equal(k1, -log_r)
    assert torch.equal(k2, log_r**2 / 2)
    assert_close(k3, log_r.exp() - 1 - log_r, scale=10)
    assert torch.equal(kl_estimate(torch.zeros_like(log_r), log_r), k3)


@given(*[tensors((4,), -10.0, 0.0, float64)] * 2)
def test_the_gradient_in_logprobs_is_one_then_k1_then_one_minus_r(logprobs, ref_logprobs):
    """Per sample, with s the gradient of log pi_theta: grad k1 = s, grad k2 = k1 s, grad k3 = (1 - r) s. That in the
    reference has the opposite sign."""
    logprobs.requires_grad_()
    ref_logprobs.requires_grad_()
    k1, k2, k3 = (kl_estimate(logprobs, ref_logprobs, name) for name in ESTIMATORS)
    r = (ref_logprobs - logprobs).detach().exp()
    for value, coefficient in ((k1, torch.ones(4)), (k2, k1), (k3, 1 - r)):
        gradient, ref_gradient = torch.autograd.grad(value.sum(), (logprobs, ref_logprobs), retain_graph=True)
        assert_close(gradient, coefficient, scale=10 + r.max())
        assert torch.equal(ref_gradient, -gradient)


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


# ----- All tokens -----


@given(st.integers(2, 8).flatmap(lambda vocab: tensors((2, vocab), -5.0, 5.0, float64)))
def test_exact_kl_is_the_sum_over_the_vocabulary(logits):
    """KL[p, q] = sum_v p(v) log(p(v) / q(v)), in both directions, against sums in plain Python."""
    p, q = logits.softmax(-1).tolist()                                                      # (V,) each
    found = exact_kl(logits[None], logits.flip(0)[None])[0]                                 # (2,)
    assert_close(found[0], sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert_close(found[1], sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
    assert_close(exact_kl(logits, logits + 3.0), 0.0)


# ----- The controllers of beta -----

positive = st.floats(1e-6, 1e6)


@given(positive, positive, st.floats(-1e6, 1e6), st.floats(0.01, 1.0))
def test_adaptive_kl_moves_beta_by_two_percent_at_most_and_towards_the_target(beta, target, kl, gain):
    """Ziegler et al.: beta grows where the KL is too large; 10 % of the relative error, 2 % at most."""
    clipped = max(-0.2, min(0.2, kl / target - 1))
    assert adaptive_beta(beta, kl, target) / beta - 1 == pytest.approx(0.1 * clipped, abs=1e-12)
    assert adaptive_beta(beta, kl, target, gain) / beta - 1 == pytest.approx(gain * clipped, abs=1e-12)
    assert adaptive_beta(beta, target, target) == beta


@given(positive, positive)
def test_penalty_kl_halves_keeps_or_doubles_beta(beta, target):
    """PPO section 4: the factor is 1/2 below target / 1.5, 2 above 1.5 target, else 1."""
    kept = target / 1.5, target, target * 1.5
    for factor, kls in ((0.5, (0.0, 0.66 * target)), (1.0, kept), (2.0, (1.51 * target, 10 * target))):
        assert [penalty_beta(beta, kl, target) for kl in kls] == [factor * beta] * len(kls)
