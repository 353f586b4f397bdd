# SPDX-License-Identifier: MIT
"""The front door: what PPO and GRPO promise, one property a test, beside the equation that it comes from.

Plain numbers are drawn, and tensors built from them in the test. test_by_hand.py works the same formulas out with a
pencil; the other files go into the details.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from advantage import gae, group_advantages
from grpo import grpo_loss, loss_weights
from kl import kl_estimate
from ppo import policy_loss, rewards_with_kl, value_loss

log_ratios = st.floats(-10, 10)  # log(pi_theta / pi_old) or log(pi_ref / pi_theta), in nats
numbers = st.floats(-10, 10, allow_subnormal=False)
eps = st.floats(1e-3, 0.999)
fractions = st.floats(0, 1)  # beta, gamma
double = partial(torch.tensor, dtype=torch.float64)
close = partial(pytest.approx, rel=1e-9, abs=1e-9)


def grpo_loss_without_kl(logprobs, old_logprobs, *others, **options):
    """`grpo_loss` with the arguments of `policy_loss`."""
    return grpo_loss(logprobs, old_logprobs, None, *others, **options)


def objective(loss, log_ratio, advantage, **options):
    """The objective of one token, and its ratio r. It is alone and weighs 1, so the loss is minus its objective."""
    one = torch.ones(1, 1, dtype=torch.float64)                                             # (N, T)
    value, metrics = loss(log_ratio * one, 0 * one, advantage * one, one.bool(), one, **options)
    return -value, metrics["ratio"].item()


# ----- The losses -----

both_losses = pytest.mark.parametrize("loss", [policy_loss, grpo_loss_without_kl])


@both_losses
@given(log_ratios, numbers, eps)
def test_clipped_objective_is_a_lower_bound(loss, log_ratio, advantage, clip_eps):
    """PPO Eq. 7: min[r A, clip(r, 1 - eps, 1 + eps) A] <= r A, exactly."""
    clipped, r = objective(loss, log_ratio, advantage, clip_eps=clip_eps)
    assert clipped <= r * advantage


@both_losses
@given(log_ratios, numbers, eps, eps)
def test_loss_is_clipped_on_one_side_only(loss, log_ratio, advantage, low, high):
    """PPO Eq. 7 is min[r A, (1 + eps) A] if A >= 0, and min[r A, (1 - eps) A] if A < 0. DAPO: two eps."""
    clipped, r = objective(loss, log_ratio, advantage, clip_eps=low, clip_eps_high=high)
    bound = 1 + high if advantage >= 0 else 1 - low
    assert clipped == min(r * advantage, bound * advantage)


@both_losses
@given(log_ratios, numbers, eps)
def test_loss_has_no_gradient_where_the_advantage_has_pushed_the_ratio_out(loss, log_ratio, advantage, clip_eps):
    """PPO Eq. 7: d objective / d log pi = r A, but 0 if A > 0 and r > 1 + eps, or A < 0 and r < 1 - eps."""
    log_ratio = double(log_ratio, requires_grad=True)
    clipped, r = objective(loss, log_ratio, advantage, clip_eps=clip_eps)
    clipped.backward()
    pushed_out = r > 1 + clip_eps if advantage > 0 else r < 1 - clip_eps
    assert log_ratio.grad == (0 if pushed_out else r * advantage)


@given(log_ratios, numbers, log_ratios, fractions)
def test_grpo_loss_has_the_kl_outside_of_the_clipping(log_ratio, advantage, ref_logprob, beta):
    """DeepSeekMath Eq. 3: {min[w A, clip(w, 1 - eps, 1 + eps) A] - beta D_KL}, where D_KL is k3 (Eq. 4)."""
    ref_logprobs = double([[ref_logprob]])                      # (N, T); log pi_old is 0, so log_ratio is log pi_theta
    whole, _ = objective(lambda p, q, *x: grpo_loss(p, q, ref_logprobs, *x, beta=beta), log_ratio, advantage)
    clipped, _ = objective(grpo_loss_without_kl, log_ratio, advantage)
    kl = kl_estimate(double([[log_ratio]]), ref_logprobs, "k3").item()
    assert whole.item() == close(clipped.item() - beta * kl)


@pytest.mark.parametrize("loss", [policy_loss, grpo_loss_without_kl, value_loss])
@given(st.lists(st.tuples(st.integers(1, 4), log_ratios, numbers), min_size=2, max_size=5))
def test_loss_of_a_batch_is_the_sum_of_its_micro_batches(loss, completions):
    """DeepSeekMath Eq. 3 is 1/N sum_i 1/|o_i| sum_t: with the weights of the batch, each completion adds its part."""
    lengths, x, y = double(completions).T[..., None].expand(3, -1, 4)  # (N, T), each; y: advantages, or returns
    mask = torch.arange(4) < lengths
    columns = x, 0 * x, y, mask, loss_weights(mask, "sequence", max_new_tokens=4)
    parts = [loss(*(column[[i]] for column in columns))[0].item() for i in range(len(completions))]
    assert sum(parts) == close(loss(*columns)[0].item())


# ----- The KL penalty -----


@given(log_ratios.filter(lambda x: x == 0 or abs(x) > 1e-12))  # k3 is about log_r^2 / 2, which rounds to 0 near 1e-16
@example(5e-9)  # where r - 1 - log r, computed as it is written, is -3e-17
def test_kl_estimate_k3_is_never_negative_and_zero_only_where_the_policies_agree(log_r):
    """DeepSeekMath Eq. 4, Schulman: k3 = r - 1 - log r >= 0, and 0 if and only if log r = 0, with r = pi_ref / pi."""
    k3 = kl_estimate(logprobs=double([0]), ref_logprobs=double([log_r]), estimator="k3")
    assert k3 >= 0
    assert (k3 == 0) == (log_r == 0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_kl_estimate_is_unbiased(estimator, p, q):
    """Schulman: E_pi[k1] = E_pi[k3] = KL[pi, ref] = sum_v pi(v) log(pi(v) / ref(v)), here of two possible tokens."""
    pi, ref = double([p, 1 - p]), double([q, 1 - q])                                        # (V,) each
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert (pi * kl_estimate(pi.log(), ref.log(), estimator)).sum().item() == close(expected)


@given(numbers, st.lists(numbers, min_size=1, max_size=6), st.integers(0, 3), fractions)
def test_rewards_with_kl_sum_to_the_reward_less_beta_times_the_kl(reward, kl, padding, beta):
    """DeepSeekMath Eq. 2, InstructGPT Eq. 2: sum_t r_t = r_phi - beta sum_t KL_t over the tokens, not the padding."""
    mask = torch.tensor([[True] * len(kl) + [False] * padding])                             # (N, T)
    r_t = rewards_with_kl(double([reward]), double([kl + [math.nan] * padding]), mask, beta)
    assert r_t.sum().item() == close(reward - beta * sum(kl))


# ----- Advantages -----

scales, baselines = st.sampled_from(["group", "none"]), st.sampled_from(["mean", "leave_one_out"])
tokens = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6)  # the reward r_t and the value V(s_t) of each


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8), scales, baselines)
def test_group_advantages_have_mean_zero(rewards, scale, baseline):
    """DeepSeekMath 4.1.2: A_i = (r_i - mean r) / std r, and each of two groups has mean 0; RLOO and Dr. GRPO too."""
    advantages = group_advantages(double(rewards).T, scale, baseline)                       # (B, G)
    assert advantages.mean(dim=1).tolist() == close([0, 0])


@given(tokens, fractions)
def test_gae_with_lambda_0_is_delta(tokens, gamma):
    """GAE Eq. 17: A_t = delta_t = r_t + gamma V(s_{t+1}) - V(s_t), and V is 0 after the last token."""
    advantages, _ = gae(*double(tokens).T, torch.ones(len(tokens), dtype=torch.bool), gamma, gae_lambda=0)
    deltas = [r + gamma * after - v for (r, v), (_, after) in zip(tokens, [*tokens[1:], (0, 0)], strict=True)]
    assert advantages.tolist() == close(deltas)


@given(tokens, fractions)
def test_gae_with_lambda_1_is_the_return_minus_the_value(tokens, gamma):
    """GAE Eq. 18: A_t = sum_l gamma^l r_{t+l} - V(s_t)."""
    advantages, _ = gae(*double(tokens).T, torch.ones(len(tokens), dtype=torch.bool), gamma, gae_lambda=1)
    returns = [sum(gamma**i * r for i, (r, _) in enumerate(tokens[t:])) for t in range(len(tokens))]
    assert advantages.tolist() == close([g - v for g, (_, v) in zip(returns, tokens, strict=True)])
