# SPDX-License-Identifier: MIT
"""The KL penalty: how far has the policy moved from a reference?

    kl_estimate   k1, k2, k3 from the log-probabilities of sampled tokens (Schulman, "Approximating KL divergence")
    exact_kl      the sum over the vocabulary that they estimate
    AdaptiveKL    Ziegler et al. (arXiv 1909.08593): a beta that steers the KL to a target
    PenaltyKL     PPO (arXiv 1707.06347) section 4: a beta that doubles or halves

A good estimator is not a good loss. For completions sampled from the policy itself, tokens summed, the mean gradient is
    k1 in the reward    of KL[policy, reference]      of whole completions, where every token answers for all that
                                                      follow (gamma = lambda = 1) and advantages are not scaled
    k3 in the reward    of KL[policy, reference] - KL[reference, policy]: 0 to first order, it hardly pulls
    k2 in the reward    0 to first order              it hardly pulls either
    k1 in the loss      0                             it is noise only
    k2 in the loss      of KL[policy, reference]      token by token
    k3 in the loss      of KL[reference, policy]      token by token; equal to first order near the reference
    w * k1, w * k3      of KL[policy, reference]      token by token, in the loss, for completions of pi_old too;
                                                      w = pi_theta / pi_old carries gradient (DeepSeek-V3.2)
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
        The same shape; differentiable in both arguments. No clamp: a policy that is far off must feel it.

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

    >>> exact_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]))
    tensor(0.)
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must match")
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


class _Beta:
    """What the two controllers share: a beta that a checkpoint can keep."""

    beta: float

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` takes."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from the beta of another controller."""
        self.beta = state["beta"]


class AdaptiveKL(_Beta):
    """Ziegler et al.'s controller: e = clip((KL - target) / target, -0.2, 0.2), beta <- beta (1 + K e), K = 0.1.

    `target` and the `kl` given to `update` are in nats per completion: summed over its tokens, averaged over rows.

    >>> controller = AdaptiveKL(beta=0.1, target=6.0)
    >>> round(controller.update(kl=60.0), 6)            # far above the target: e is clipped, beta grows by 2 %
    0.102
    """

    def __init__(self, beta: float, target: float, gain: float = 0.1):
        if not (beta > 0 and target > 0 and gain > 0):
            raise ValueError(f"beta, target and gain must be positive, got {beta}, {target} and {gain}")
        self.beta, self.target, self.gain = beta, target, gain

    def update(self, kl: float) -> float:
        """Returns the beta of the next step."""
        error = min(max((kl - self.target) / self.target, -0.2), 0.2)
        self.beta *= 1 + self.gain * error
        return self.beta


class PenaltyKL(_Beta):
    """PPO section 4, after every policy update: KL < target / 1.5 halves beta, KL > 1.5 target doubles it.

    `kl` is KL[pi_old, pi_theta] (Eq. 8, the other direction than RLHF's), in nats per token.

    >>> controller = PenaltyKL(beta=1.0, target=0.01)
    >>> controller.update(kl=0.1), controller.update(kl=0.01), controller.update(kl=0.001)
    (2.0, 2.0, 1.0)
    """

    def __init__(self, beta: float, target: float):
        if not (beta > 0 and target > 0):
            raise ValueError(f"beta and target must be positive, got {beta} and {target}")
        self.beta, self.target = beta, target

    def update(self, kl: float) -> float:
        """Returns the beta of the next update."""
        if kl < self.target / 1.5:
            self.beta /= 2
        elif kl > self.target * 1.5:
            self.beta *= 2
        return self.beta
