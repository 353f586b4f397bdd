# SPDX-License-Identifier: MIT
"""Every loss and every advantage once, with small numbers, worked out in the comments: read them with a pencil.

Probabilities stand in the tensors and their logarithms are taken on the way in, so that every ratio can be seen.
log 2 = 0.693147. Columns are tokens; a dash in a comment is padding, where the tensors hold what must not be read.
"""

from functools import partial

import pytest
import torch

from advantage import gae, group_advantages, process_advantages, whiten
from grpo import grpo_loss, loss_weights
from kl import kl_estimate
from ppo import policy_loss, rewards_with_kl, value_loss

double = partial(torch.tensor, dtype=torch.float64)
close = partial(pytest.approx, abs=1e-6)  # as many digits as the comments have


def test_grpo_loss_of_two_completions():
    """DeepSeekMath Eq. 3: J = 1/G sum_i 1/|o_i| sum_t {min[w A, clip(w, 1 - eps, 1 + eps) A] - beta D_KL}."""
    # G = 2 completions, |o_1| = 2 and |o_2| = 1 tokens, eps = 0.2, beta = 0.1. o_1 was the better one.
    #
    #                       o_1                  o_2
    #                       t = 1     t = 2      t = 1    t = 2
    # A                     1         1          -1       -
    # pi_theta              0.5       0.45       0.3      -
    # pi_old                0.4       0.5        0.2      -
    # w                     1.25      0.9        1.5      -
    # w A                   1.25      0.9        -1.5     -
    # clip(w, 0.8, 1.2) A   1.2       0.9        -1.2     -
    # min                   1.2       0.9        -1.5     -      clipped only at t = 1 of o_1
    # pi_ref                0.5       0.9        0.15     -
    # r = pi_ref/pi_theta   1         2          1/2      -
    # D_KL = r - 1 - log r  0         0.306853   0.193147 -      Eq. 4
    # min - 0.1 D_KL        1.2       0.869315   -1.519315
    #
    # o_1: (1.2 + 0.869315) / 2 = 1.034657, o_2: -1.519315 / 1
    # J = (1.034657 - 1.519315) / 2 = -0.242329, and the loss is -J.
    pi_theta = double([[0.5, 0.45], [0.3, 1.0]])                                            # (N, T)
    pi_old = double([[0.4, 0.5], [0.2, 0.1]])
    pi_ref = double([[0.5, 0.9], [0.15, 0.1]])
    advantages = double([[1, 1], [-1, -1]])
    mask = torch.tensor([[True, True], [True, False]])
    weights = double([[1 / 4, 1 / 4], [1 / 2, 0]])  # 1/G 1/|o_i|
    loss, metrics = grpo_loss(
        pi_theta.log(), pi_old.log(), pi_ref.log(), advantages, mask, weights, beta=0.1, clip_eps=0.2
    )
    assert loss.item() == close(0.242329)
    assert metrics["ratio"][mask].tolist() == close([1.25, 0.9, 1.5])
    assert metrics["clip_frac"].tolist() == [[1, 0], [0, 0]]
    assert metrics["kl"][mask].tolist() == close([0, 0.306853, 0.193147])


def test_policy_loss_of_four_tokens():
    """PPO Eq. 7: L^CLIP = mean of min[r A, clip(r, 1 - eps, 1 + eps) A]."""
    # pi_theta / pi_old      0.6/0.4   0.2/0.4   0.2/0.4   0.6/0.4
    # r                      1.5       0.5       0.5       1.5
    # A                      2         2         -1        -1
    # r A                    3         1         -0.5      -1.5
    # clip(r, 0.8, 1.2) A    2.4       1.6       -0.8      -1.2
    # min                    2.4       1         -0.8      -1.5    1: A > 0 and r > 1.2; 3: A < 0 and r < 0.8
    #
    # L = (2.4 + 1 - 0.8 - 1.5) / 4 = 1.1 / 4 = 0.275, and the loss is -L.
    pi_theta, pi_old = double([[0.6, 0.2, 0.2, 0.6]]), double([[0.4, 0.4, 0.4, 0.4]])       # (N, T)
    advantages, mask = double([[2, 2, -1, -1]]), torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = policy_loss(pi_theta.log(), pi_old.log(), advantages, mask, weights=mask / 4, clip_eps=0.2)
    assert loss.item() == close(-0.275)
    assert metrics["clip_frac"].tolist() == [[1, 0, 1, 0]]


def test_policy_loss_with_a_kl_penalty_of_two_tokens():
    """PPO Eq. 8: mean of r A - beta KL[pi_old, pi_theta], whose estimate from a token of pi_old is r - 1 - log r."""
    # r = pi_theta / pi_old  0.4/0.2 = 2           0.1/0.2 = 1/2
    # A                      3                     4
    # KL                     1 - log 2             -1/2 + log 2
    # r A - 1 KL             6 - 1 + log 2         2 + 1/2 - log 2          beta = 1; Eq. 8 has no clipping
    #
    # (5 + log 2 + 2.5 - log 2) / 2 = 3.75, and the loss is minus that.
    pi_theta, pi_old = double([[0.4, 0.1]]), double([[0.2, 0.2]])                           # (N, T)
    advantages, mask = double([[3, 4]]), torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = policy_loss(pi_theta.log(), pi_old.log(), advantages, mask, weights=mask / 2, beta_old=1.0)
    assert loss.item() == close(-3.75)
    assert metrics["approx_kl"][0].tolist() == close([0.306853, 0.193147])


def test_value_loss_of_four_tokens():
    """Ziegler et al.'s code: mean of 1/2 max[(V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2]."""
    # V_old = 0, eps = 0.5
    # V                      0.25      0.75      -0.75     2
    # R                      1         1         -1        1
    # clipped V              0.25      0.5       -0.5      0.5
    # (V - R)^2              0.5625    0.0625    0.0625    1
    # (clipped V - R)^2      0.5625    0.25      0.25      0.25
    # max                    0.5625    0.25      0.25      1       clipped where V went far and came near R
    #
    # (0.5625 + 0.25 + 0.25 + 1) / 4 / 2 = 2.0625 / 8 = 0.2578125
    values, returns = double([[0.25, 0.75, -0.75, 2]]), double([[1, 1, -1, 1]])             # (N, T)
    mask = torch.ones_like(values, dtype=torch.bool)
    loss, clip_frac = value_loss(values, 0 * values, returns, mask, weights=mask / 4, value_clip_eps=0.5)
    assert loss.item() == 0.2578125
    assert clip_frac.tolist() == [[0, 1, 1, 0]]


def test_rewards_with_kl_of_two_completions():
    """DeepSeekMath Eq. 2, InstructGPT Eq. 2: r_t = -beta KL_t, and the completion's reward r_phi on the last token."""
    # beta = 0.5        r_phi   KL                  -0.5 KL               r_t
    # o_1               3       1    -2    4        -0.5   1    -2        -0.5   1    3 - 2 = 1
    # o_2               1       6    -     -        -3     -    -         1 - 3 = -2  -    -
    rewards, kl = double([3, 1]), double([[1, -2, 4], [6, 9, 9]])                           # (N,), (N, T)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert rewards_with_kl(rewards, kl, mask, beta=0.5).tolist() == [[-0.5, 1, 1], [-2, 0, 0]]


def test_gae_of_three_tokens():
    """GAE Eq. 16: A_t = delta_t + gamma lambda A_{t+1}, where delta_t = r_t + gamma V(s_{t+1}) - V(s_t)."""
    # gamma = 1/2, lambda = 1/4, so gamma lambda = 1/8. From the last token to the first:
    #
    # t   r_t   V    delta_t                    A_t                     return = A_t + V
    # 3   10    2    10 + 0 - 2 = 8             8                       10
    # 2   1     1    1 + 1/2 * 2 - 1 = 1        1 + 1/8 * 8 = 2         3
    # 1   0     1    0 + 1/2 * 1 - 1 = -1/2     -1/2 + 1/8 * 2 = -1/4   3/4
    token_rewards, values = double([[0, 1, 10, 99]]), double([[1, 1, 2, 99]])               # (N, T)
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(token_rewards, values, mask, gamma=1 / 2, gae_lambda=1 / 4)
    assert advantages.tolist() == [[-1 / 4, 2, 8, 0]]
    assert returns.tolist() == [[3 / 4, 3, 10, 0]]


def test_group_advantages_of_three_groups():
    """DeepSeekMath 4.1.2: A_i = (r_i - mean(r)) / std(r), where std divides by G - 1, and is increased by 1e-4."""
    # r             mean   r - mean   sum of squares   std              A = (r - mean) / (std + 1e-4)
    # 0   1   2     1      -1 0 1     2                sqrt(2/2) = 1    -1/1.0001  0  1/1.0001 = 0.999900
    # 0   4   8     4      -4 0 4     32               sqrt(32/2) = 4   -4/4.0001  0  4/4.0001 = 0.999975
    # 0.1 0.1 0.1   0.1     0 0 0     0                0                 0  0  0, although a computer's mean misses 0.1
    rewards = double([[0, 1, 2], [0, 4, 8], [0.1, 0.1, 0.1]])                               # (B, G)
    first, second, third = group_advantages(rewards).tolist()
    assert first == close([-0.999900, 0, 0.999900])
    assert second == close([-0.999975, 0, 0.999975])
    assert third == [0, 0, 0]
    # Dr. GRPO keeps r - mean. RLOO subtracts the mean of the others: 0 - 3/2, 1 - 2/2, 2 - 1/2 in the first group.
    assert group_advantages(rewards, scale="none")[0].tolist() == [-1, 0, 1]
    assert group_advantages(rewards, scale="none", baseline="leave_one_out")[0].tolist() == [-1.5, 0, 1.5]


def test_process_advantages_of_two_completions():
    """DeepSeekMath 4.1.3: A_t is the sum of the normalised rewards of the steps that end at t or later."""
    # o_1 has two steps, one a token, of rewards 0 and 1; o_2 has one, of two tokens and reward 2.
    # 0, 1, 2 normalised together, as in the group above: -0.9999, 0, 0.9999.
    #
    #             o_1                        o_2
    #             t = 1            t = 2     t = 1     t = 2
    # ends here   -0.9999          0         no step   0.9999
    # A           -0.9999 + 0      0         0.9999    0.9999
    step_rewards = double([[[0, 1], [99, 2]]])                                              # (B, G, T)
    step_ends = torch.tensor([[[True, True], [False, True]]])
    o_1, o_2 = process_advantages(step_rewards, step_ends)[0].tolist()
    assert o_1 == close([-0.999900, 0])
    assert o_2 == close([0.999900, 0.999900])


def test_whiten_of_four_numbers():
    """(x - mean) / sqrt(var + 1e-8), over what the mask counts; var divides by their number."""
    # x = 1, 1, 5, 5: mean 3, deviations -2, -2, 2, 2, var 16/4 = 4, and 2 / sqrt(4) = 1 to eight digits.
    x, mask = double([1, 1, 5, 5, 99]), torch.tensor([True, True, True, True, False])       # (T,) each
    assert whiten(x, mask).tolist() == close([-1, -1, 1, 1, 0])


def test_kl_estimate_of_three_tokens():
    """Schulman: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r (DeepSeekMath Eq. 4); r = pi_ref / pi_theta."""
    # pi_ref / pi_theta     r     log r       k1          k2                           k3
    # 0.25 / 0.5            1/2   -0.693147   0.693147    0.693147^2 / 2 = 0.240227    1/2 - 1 + 0.693147 = 0.193147
    # 0.5 / 0.25            2     0.693147    -0.693147   0.693147^2 / 2 = 0.240227    2 - 1 - 0.693147 = 0.306853
    # 0.96 / 0.03           32    3.465736    -3.465736   3.465736^2 / 2 = 6.005663    32 - 1 - 3.465736 = 27.534264
    logprobs, ref_logprobs = double([0.5, 0.25, 0.03]).log(), double([0.25, 0.5, 0.96]).log()  # (T,) each
    assert kl_estimate(logprobs, ref_logprobs, "k1").tolist() == close([0.693147, -0.693147, -3.465736])
    assert kl_estimate(logprobs, ref_logprobs, "k2").tolist() == close([0.240227, 0.240227, 6.005663])
    assert kl_estimate(logprobs, ref_logprobs, "k3").tolist() == close([0.193147, 0.306853, 27.534264])


def test_loss_weights_of_two_completions():
    """DeepSeekMath Eq. 3, DAPO Eq. 8 and Dr. GRPO: what a token counts for."""
    # N = 2 completions of 1 and 3 tokens, max_new_tokens = 5
    # "sequence"   1/N 1/|o_i|       1/2 * 1/1 = 1/2 and 1/2 * 1/3 = 1/6
    # "token"      1/sum_i |o_i|     1/(1 + 3) = 1/4
    # "constant"   1/(N 5)           1/(2 * 5) = 1/10
    mask = torch.tensor([[True, False, False], [True, True, True]])                         # (N, T)
    for average, first, second in (("sequence", 1 / 2, 1 / 6), ("token", 1 / 4, 1 / 4), ("constant", 1 / 10, 1 / 10)):
        weights = loss_weights(mask, average, max_new_tokens=5)
        assert weights[0].tolist() == close([first, 0, 0])
        assert weights[1].tolist() == close([second, second, second])
