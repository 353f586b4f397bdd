# SPDX-License-Identifier: MIT
"""What the losses climb in expectation, exactly: every completion of a tiny policy is listed and weighed with its
probability, and the gradient of the scripts' own losses is compared with that of what they are meant to maximise.

Two kinds of policy, from helpers/exact_policies.py: one token, and a real transformer with several. J is E[R], the
expected reward; RKL is KL[policy, reference], FKL is KL[reference, policy], s is the gradient of log pi_theta, mu is
another policy that sampled, w = pi_theta / mu.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from advantage import gae, group_advantages
from grpo import grpo_loss, loss_weights
from helpers.exact_policies import Policy, softmax_policy, tables, transformers
from helpers.strategies import assert_close, float64, tensors
from kl import exact_kl, kl_estimate
from ppo import policy_loss, rewards_with_kl

MAX_NEW_TOKENS = 4  # more than the longest completion has
betas = lambdas = st.floats(0, 1)
either = st.one_of(tables(), transformers())


# ----- What the expectations are compared with -----


def scores(policy: Policy) -> st.SearchStrategy[Tensor]:
    """A reward for every completion, (M,)."""
    return tensors((len(policy.mask),), -10.0, 10.0, float64)


def grad_reward(policy: Policy, rewards: Tensor) -> Tensor:
    return policy.gradient((policy.probabilities() * rewards).sum())


def grad_whole_kl(policy: Policy, ref: Policy) -> Tensor:
    """Of RKL over whole completions, sum_y pi(y) log(pi(y) / ref(y))."""
    log_ratio = policy.logprobs.sum(1) - ref.logprobs.sum(1).detach()
    return policy.gradient((policy.probabilities() * log_ratio).sum())


def grad_token_kl(policy: Policy, ref: Policy, sampler: Policy, direction: str = "RKL") -> Tensor:
    """Of the KL of the next token, state by state, visited as the sampler does: it forgets that a token also changes
    which states come after it. With one token there is one state, and nothing to forget."""
    logp, ref_logp = policy.table(), ref.table().detach()                                   # (S, V) each
    kl = exact_kl(logp, ref_logp) if direction == "RKL" else exact_kl(ref_logp, logp)       # (S,)
    return policy.gradient((sampler.visits().detach() * kl).sum())


# ----- The expected gradients of the scripts' losses -----


def token_weights(policy: Policy, groups: Tensor, loss_average: str = "constant") -> Tensor:
    """What each token weighs in the update on each group, times max_new_tokens, times the probability of the group.

    Args: groups: (K, G), indices of completions. Returns: (K G, T)."""
    size = groups.shape[1] * MAX_NEW_TOKENS
    weights = [loss_weights(policy.mask[group], loss_average, MAX_NEW_TOKENS) * size for group in groups]
    # They are float32, where the constant 1 / (G max_new_tokens) times its inverse is exactly 1 for the sizes here.
    weights = torch.stack(weights).double() / groups.shape[1]                               # (K, G, T)
    chances = policy.probabilities().detach()[groups].prod(1)                               # (K,)
    assert_close(chances.sum(), 1.0)
    return (weights * chances.view(-1, 1, 1)).flatten(0, 1)


def all_groups(policy: Policy, group_size: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(len(policy.mask))] * group_size).view(-1, group_size)


def grpo_gradient(
    policy: Policy, rewards: Tensor, group_size: int = 2, baseline: str = "leave_one_out", loss_average="constant"
) -> Tensor:
    """What grpo.py climbs on-policy, with beta = 0 and advantages that are not scaled, times max_new_tokens."""
    groups = all_groups(policy, group_size)
    logprobs, mask = policy.logprobs[groups.flatten()], policy.mask[groups.flatten()]       # (K G, T), twice
    advantages = group_advantages(rewards[groups], "none", baseline).view(-1, 1).expand_as(logprobs)
    weights = token_weights(policy, groups, loss_average)
    loss, _ = grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, weights, beta=0.0)
    return policy.gradient(-loss)


def ppo_gradient(policy: Policy, token_rewards: Tensor, values: Tensor, gae_lambda: float = 1.0) -> Tensor:
    """What ppo.py climbs on-policy, times max_new_tokens, with the values of the states before the tokens, (M, T)."""
    logprobs, mask = policy.logprobs, policy.mask
    advantages, _ = gae(token_rewards, values, mask, gamma=1.0, gae_lambda=gae_lambda)
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, mask, token_weights(policy, all_groups(policy, 1)))
    return policy.gradient(-loss)


def kl_loss_gradient(policy: Policy, ref: Policy, sampler: Policy, estimator: str, weighted: bool) -> Tensor:
    """The gradient of the KL in the loss of grpo.py, alone: A = 0, beta = 1, for completions of the sampler."""
    old_logprobs = sampler.logprobs.detach()
    loss, _ = grpo_loss(
        policy.logprobs, old_logprobs, ref.logprobs.detach(), torch.zeros_like(old_logprobs), policy.mask,
        token_weights(sampler, all_groups(sampler, 1)), beta=1.0, kl_estimator=estimator, kl_importance_weight=weighted,
    )
    return policy.gradient(loss)


def rewards_less_kl(rewards: Tensor, policy: Policy, ref: Policy, beta: float, estimator: str = "k1") -> Tensor:
    """The token rewards of ppo.py, (M, T), for rewards (M,)."""
    return rewards_with_kl(rewards, kl_estimate(policy.logprobs, ref.logprobs, estimator), policy.mask, beta)


# ----- The lists are complete -----


@given(transformers())
def test_the_listed_completions_are_all_there_are(policies):
    """Their probabilities, as re-scored, sum to 1; so do those of the next token; lengths differ. And the chain rule:
    the KL of the tokens, in states that are visited as the policy does and learns to, is that of whole completions."""
    policy, ref, _ = policies
    assert len(set(policy.mask.sum(1).tolist())) > 1
    assert_close(policy.probabilities().sum().detach(), 1.0)
    assert_close(policy.table().exp().sum(1).detach(), 1.0)
    whole = (policy.visits() * exact_kl(policy.table(), ref.table().detach())).sum()
    assert_close(policy.gradient(whole), grad_whole_kl(policy, ref))


# ----- The group as baseline -----


@given(either, st.data())
def test_the_mean_baseline_gives_a_part_of_grad_j_and_leave_one_out_all_of_it(policies, data):
    """Over all groups of two, and for one token also of three: (G - 1)/G grad J and grad J, respectively.
    It takes Dr. GRPO's average, by a constant: there a token weighs the same however long its completion and the rest
    of its group are, and the sum of A s over a completion is A grad log pi(y)."""
    policy = policies[0]
    rewards, size = data.draw(scores(policy)), data.draw(st.integers(2, 3 if policy.mask.shape[1] == 1 else 2))
    for baseline, factor in (("mean", (size - 1) / size), ("leave_one_out", 1.0)):
        found = grpo_gradient(policy, rewards, size, baseline)
        assert_close(found, factor * grad_reward(policy, rewards), scale=10.0)


@given(transformers(), st.data())
def test_the_papers_average_climbs_the_reward_per_token(policies, data):
    """1/|o_i| favours short completions among the good and long ones among the bad: in expectation the "sequence"
    average climbs E[(R - J) / |o|], with J held fixed. It is biased whenever lengths differ."""
    policy = policies[0]
    rewards = data.draw(scores(policy).filter(lambda x: x.std() > 0.1))
    found = grpo_gradient(policy, rewards, loss_average="sequence")
    lengths, mean = policy.mask.sum(1), (policy.probabilities() * rewards).sum().detach()
    wanted = grad_reward(policy, (rewards - mean) / lengths)
    torch.testing.assert_close(found, MAX_NEW_TOKENS * wanted, rtol=1e-6, atol=1e-5)  # 1/3 in float32


# ----- PPO: the value model as baseline -----


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@given(either, betas, st.data())
def test_ppo_climbs_the_reward_less_beta_times_the_kl_whatever_the_values_are(estimator, policies, beta, data):
    """With gamma = lambda = 1 and k1 in the reward: grad (E[R] - beta RKL) of whole completions, for any function of
    the state as value model. With k3, RKL - FKL takes the place of RKL, where FKL is that of single tokens."""
    policy, ref, _ = policies
    rewards = data.draw(scores(policy))
    values = data.draw(tensors((len(policy.completions.entries),), -10.0, 10.0, float64))[policy.completions.states]
    token_rewards = rewards_less_kl(rewards, policy, ref, beta, estimator)
    grad_kl = grad_whole_kl(policy, ref)
    if estimator == "k3":
        grad_kl = grad_kl - grad_token_kl(policy, ref, policy, "FKL")
    expected = grad_reward(policy, rewards) - beta * grad_kl
    assert_close(ppo_gradient(policy, token_rewards, values), expected, scale=20 + token_rewards.abs().max())


@given(transformers(), lambdas, betas, st.data())
def test_ppo_is_exact_for_every_lambda_where_the_values_are_true(policies, gae_lambda, beta, data):
    """The bias of lambda < 1 is that of the value model alone."""
    policy, ref, _ = policies
    rewards = data.draw(scores(policy))
    token_rewards = rewards_less_kl(rewards, policy, ref, beta)
    to_go = token_rewards.flip(1).cumsum(1).flip(1)                                         # (M, T), from each token on
    values = (policy.sum_by_state(policy.probabilities()[:, None] * to_go) / policy.visits()).detach()
    found = ppo_gradient(policy, token_rewards, values[policy.completions.states], gae_lambda)
    assert_close(found, grad_reward(policy, rewards) - beta * grad_whole_kl(policy, ref), scale=20.0)


# ----- A good estimator of the KL is not a good loss: the table of kl.py -----

# The estimator in the loss, whether it is weighted by w, and who sampled: what it is the gradient of.
IN_THE_LOSS = {
    ("k1", False, "policy"): "0", ("k2", False, "policy"): "RKL", ("k3", False, "policy"): "FKL",
    ("k1", True, "mu"): "RKL", ("k3", True, "mu"): "RKL",
}  # fmt: skip


@pytest.mark.parametrize("row", IN_THE_LOSS, ids=str)
@given(either)
def test_the_kl_in_the_loss_has_the_gradient_of_the_table(row, policies):
    """Exact for one token, and for several token by token, in the states that the sampler visits."""
    (policy, ref, mu), (estimator, weighted, sampled), known = policies, row, IN_THE_LOSS[row]
    sampler = {"policy": policy, "mu": mu}[sampled]
    found = kl_loss_gradient(policy, ref, sampler, estimator, weighted)
    assert_close(found, 0.0 if known == "0" else grad_token_kl(policy, ref, sampler, known), scale=10.0)


# Logits over five tokens, and the gradients of their divergences as an independent enumeration found them.
THETA, REF, MU = torch.tensor(
    [[0.9, -0.4, 0.3, -1.1, 0.2], [-0.2, 0.7, -0.5, 0.4, 0.1], [0.4, 0.0, 0.6, -0.9, -0.3]], dtype=torch.float64
)
GRAD_RKL = torch.tensor([0.26795203, -0.17137138, 0.07994318, -0.10716667, -0.06935717], dtype=torch.float64)
GRAD_FKL = torch.tensor([0.27197915, -0.22253370, 0.12322135, -0.19198873, 0.01932193], dtype=torch.float64)


def test_five_tokens_have_the_known_divergences_and_gradients():
    """RKL, FKL and E[k2] to 12 digits, the gradients of RKL and FKL to 8."""
    theta = THETA.clone().requires_grad_()
    rkl, fkl = exact_kl(theta, REF), exact_kl(REF, theta)
    k2 = (theta.softmax(-1) * kl_estimate(theta.log_softmax(-1), REF.log_softmax(-1), "k2")).sum()
    known = [0.442966682225, 0.489489821965, 0.448622032588]
    assert [rkl.item(), fkl.item(), k2.item()] == pytest.approx(known, rel=0, abs=1e-12)
    for divergence, known in ((rkl, GRAD_RKL), (fkl, GRAD_FKL)):
        torch.testing.assert_close(torch.autograd.grad(divergence, theta)[0], known, rtol=0, atol=1e-8)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_in_the_loss_has_no_such_gradient_for_completions_of_another_policy(estimator):
    """Without the weight w, from the second update of a step on: neither 0 nor grad RKL nor grad FKL, but a third of
    their length or more away from both. The same five tokens, sampled by mu."""
    policy, ref, mu = (softmax_policy(logits) for logits in (THETA, REF, MU))
    found = kl_loss_gradient(policy, ref, mu, estimator, weighted=False)
    assert found.norm() > 0.1
    for known in (GRAD_RKL, GRAD_FKL):
        assert (found - known).norm() > known.norm() / 3


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@given(either)
def test_in_the_reward_k2_and_k3_have_no_gradient_to_first_order(estimator, policies):
    """A millionth of the way to the reference, k1 pulls by a millionth of the way, they by a billionth at most."""
    policy, ref, _ = policies
    away = ref.table().detach() - policy.table().detach()                                   # (S, V)
    near = (policy.table().detach() + 1e-6 * away).log_softmax(-1)                          # (S, V)
    near = ref._replace(logprobs=near[policy.completions.states, policy.completions.ids])
    nothing = torch.zeros(len(policy.mask), dtype=torch.float64)                            # (M,)
    token_rewards = rewards_less_kl(nothing, policy, near, 1.0, estimator)                  # (M, T)
    assert ppo_gradient(policy, token_rewards, 0 * token_rewards).abs().max() <= 1e-9 * away.abs().max() + 1e-20
