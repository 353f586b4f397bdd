# SPDX-License-Identifier: MIT
"""The KL penalty: how far has the policy moved from a reference?

    kl_estimate     k1, k2, k3 from the log-probabilities of sampled tokens (Schulman, "Approximating KL divergence")
    exact_kl        the sum over the vocabulary that they estimate
    adaptive_beta   Ziegler et al. (arXiv 1909.08593): a beta that steers the KL to a target
    penalty_beta    PPO (arXiv 1707.06347) section 4: a beta that doubles or halves

A good estimator is not a good loss. With KL = KL[policy, reference], w = pi_theta / pi_old, which carries gradient, and
the loss average "constant", this is the gradient that each has on average, token by token:

    estimator     where     sampled by    mean gradient
    k1            reward    policy        of KL; with gamma = lambda = 1 and unscaled advantages, of whole completions
    k2            reward    policy        0 to first order in log(pi_theta / pi_ref): it hardly holds the policy
    k3            reward    policy        of KL - KL[reference, policy], which is 0 to first order as well
    k1            loss      policy        0: it adds only noise
    k2            loss      policy        of KL
    k3            loss      policy        of KL[reference, policy], to first order that of KL
    k1, k2, k3    loss      pi_old        none of these, as soon as an update (mu > 1, minibatches) has moved the policy
    w k1, w k3    loss      pi_old        of KL, in the states that pi_old visits (DeepSeek-V3.2, arXiv 2512.02556)

In the reward (ppo.py), a token answers for its own KL and that of all tokens after it; in the loss (grpo.py), for its
own alone.
"""

import torch
from torch import Tensor


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate KL[policy, reference] from tokens sampled from the policy, one estimate a token, in nats.

    With r = pi_ref / pi_theta:  k1 = -log r,  k2 = (log r)^2 / 2,  k3 = r - 1 - log r (DeepSeekMath Eq. 4).
    k1 is unbiased and often negative; k2 is biased, never negative; k3 is unbiased and never negative.

    Args:
        logprobs, ref_logprobs: one shape, usually (N, T): log pi_theta and log pi_ref of the sampled tokens.
        estimator: "k1", "k2" or "k3".

    Returns:
        The same shape; differentiable in both arguments. Nothing is clamped: clamping would leave a
        policy that is far off without gradient.

    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-2.0]), "k3")       # r = 1/e: 1/e - 1 + 1
    tensor([0.3679])
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"logprobs {tuple(logprobs.shape)} and ref_logprobs {tuple(ref_logprobs.shape)} must match")
    log_r = ref_logprobs - logprobs                     # log(pi_ref / pi_theta)
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    if estimator == "k3":
        return torch.expm1(log_r) - log_r               # exp(x) - 1 - x would round to less than 0 near x = 0
    raise ValueError(f"estimator must be one of k1, k2, k3, got {estimator!r}")


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL[policy, reference] = sum_v pi(v) (log pi(v) - log pi_ref(v)), in nats: (..., V) -> (...).

    Args:
        logits, ref_logits: (..., V), finite, already divided by the sampling temperature.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must match")
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def adaptive_beta(beta: float, kl: float, target: float, gain: float = 0.1) -> float:
    """Ziegler et al.'s controller: beta (1 + gain * e) with e = clip((kl - target) / target, -0.2, 0.2).

    Args: kl, target: in nats per completion, summed over its tokens and averaged over completions; target positive.
    Returns: the beta of the next step.

    >>> round(adaptive_beta(0.1, kl=60.0, target=6.0), 6)       # far above the target: e is clipped, beta grows by 2 %
    0.102
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return beta * (1 + gain * error)


def penalty_beta(beta: float, kl: float, target: float) -> float:
    """PPO section 4, after every step: kl < target / 1.5 halves beta, kl > 1.5 target doubles it.

    Args: kl: KL[pi_old, pi_theta] (Eq. 8; RLHF's has the other direction), in nats per token, like the target.
    Returns: the beta of the next step.

    >>> penalty_beta(1.0, kl=0.1, target=0.01), penalty_beta(1.0, kl=0.01, target=0.01), penalty_beta(1.0, 0.001, 0.01)
    (2.0, 1.0, 0.5)
    """
    return beta / 2 if kl < target / 1.5 else beta * 2 if kl > target * 1.5 else beta
