# SPDX-License-Identifier: MIT
"""Advantages: how much better was this than expected?

    group_advantages     GRPO, DeepSeekMath (arXiv 2402.03300) 4.1.2   rewards against those of the same prompt
    process_advantages   GRPO, DeepSeekMath 4.1.3                      the same with a reward for every step
    gae                  PPO, Schulman et al. (arXiv 1506.02438)       rewards against a learned value function
    whiten               Ziegler et al. (arXiv 1909.08593)             mean 0, variance 1 over the tokens that count
    explained_variance   a metric                                      how well the value function predicts the returns

Shapes: B prompts, G completions of each, T completion tokens. Nothing is detached here: the inputs carry no gradient.
"""

import torch
from torch import Tensor

# Keeps the advantages of almost equal rewards small. TRL adds the same.
STD_EPS = 1e-4


def group_advantages(rewards: Tensor, scale: str = "group", baseline: str = "mean") -> Tensor:
    """GRPO's outcome advantage: A_i = (r_i - mean(r)) / std(r), over the group of one prompt (DeepSeekMath 4.1.2).

    Args:
        rewards: (B, G), one prompt a row, floating point.
        scale: "group" divides by the standard deviation of the row, "none" not at all (Dr. GRPO, arXiv 2503.20783:
            dividing favours prompts that are very easy or hard).
        baseline: "mean" subtracts the mean of the row, "leave_one_out" the mean of the other G - 1 rewards
            (RLOO, arXiv 2402.14740), which gives G / (G - 1) * (r_i - mean). On-policy, with scale "none" and loss
            average "constant", the mean gradient is then that of E[r] / max_new_tokens; with "mean", (G - 1) / G of it.

    Returns:
        (B, G); in standard deviations unless scale is "none". Every row sums to 0. Equal rewards give exactly 0.

    Differs: the standard deviation, which the paper does not specify, is the sample one (n - 1), plus 1e-4.

    >>> group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), scale="none")
    tensor([[-0.5000, -0.5000,  0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), scale="none", baseline="leave_one_out")
    tensor([[-0.3333, -0.3333, -0.3333,  1.0000]])
    """
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point of shape (B, G), got {rewards.dtype} {tuple(rewards.shape)}")
    if rewards.shape[1] < 2:
        raise ValueError("a group of one has nothing to be compared with: sample at least 2 completions per prompt")
    if scale not in ("group", "none") or baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"no such scale or baseline: {scale!r}, {baseline!r}")

    group_size = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)                                   # (B, G)
    # The mean of equal float32 rewards can miss them by a rounding error, which is no advantage.
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)          # (B, 1)
    advantages = centred.masked_fill(equal, 0.0)                                            # (B, G), in reward units
    if baseline == "leave_one_out":
        advantages = advantages * (group_size / (group_size - 1))
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + STD_EPS)
    return advantages


def process_advantages(step_rewards: Tensor, step_ends: Tensor) -> Tensor:
    """GRPO with process supervision (DeepSeekMath 4.1.3): A_{i,t} = sum of the normalised rewards of the steps
    that end at or after token t, undiscounted. All steps of all G outputs are normalised together.

    Args:
        step_rewards: (B, G, T), the reward of a step at the token that ends it; other entries are not read.
        step_ends: (B, G, T), bool, true where a step ends.

    Returns:
        (B, G, T), in standard deviations. Groups whose steps all earned the same, or that have one step, give 0.

    One step per output, at its last token, is outcome supervision: `group_advantages` on every token.

    In grpo.py, import this function; in train, these lines replace `per_completion` and `advantages` of step 2. Every
    finished column of a sum, which ends in ";", earns 0.1:

        mask = batch.completion_mask                                                        # (N, T)
        last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
        column = mask & (batch.completion_ids == tokenizer.convert_tokens_to_ids(";"))
        step_rewards = 0.1 * column + last * rewards[:, None]                               # (N, T)
        shape = (*groups.shape, mask.shape[1])                                              # (B, G, T)
        advantages = process_advantages(step_rewards.view(shape), (column | last).view(shape)).view(mask.shape)

    >>> rewards = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    >>> ends = torch.tensor([[[True, False, True], [True, False, True]]])
    >>> process_advantages(rewards, ends)           # steps 1, 1 | 0, 0: mean 1/2, std 0.577
    tensor([[[ 1.7318,  0.8659,  0.8659],
             [-1.7318, -0.8659, -0.8659]]])
    """
    if step_rewards.dim() != 3 or step_rewards.shape != step_ends.shape or step_ends.dtype != torch.bool:
        raise ValueError(
            "step_rewards and step_ends (bool) must both have shape (B, G, T), "
            f"got {tuple(step_rewards.shape)} and {step_ends.dtype} {tuple(step_ends.shape)}"
        )
    rewards, ends = step_rewards.flatten(1), step_ends.flatten(1)                           # (B, G * T)
    num_steps = ends.sum(dim=1, keepdim=True)                                               # (B, 1)
    mean = rewards.where(ends, 0.0).sum(dim=1, keepdim=True) / num_steps.clamp(min=1)       # (B, 1)
    centred = (rewards - mean).where(ends, 0.0)                                             # (B, G * T)
    std = (centred.square().sum(dim=1, keepdim=True) / (num_steps - 1).clamp(min=1)).sqrt()
    equal = rewards.where(ends, -torch.inf).amax(1, True) == rewards.where(ends, torch.inf).amin(1, True)
    normalised = (centred / (std + STD_EPS)).masked_fill(equal, 0.0).view_as(step_rewards)  # (B, G, T)
    return normalised.flip(2).cumsum(2).flip(2)             # (B, G, T), sum over the steps that end at t or later


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, Eq. 16): A_t = sum_l (gamma lambda)^l delta_{t+l}
    with delta_t = r_t + gamma V_{t+1} - V_t, where V after the last token is 0.

    Differs: a completion that was cut off counts as ended, where PPO Eqs. 10 to 12 add V(s_T) for what would follow.

    Args:
        token_rewards, values: (..., T), r_t for the token chosen at t and V(s_t) of the state before it.
        mask: (..., T), bool, true on the tokens of the completion, which come first.
        gamma: discount per token, 0 to 1; usually 1 for a language model.
        gae_lambda: 0 gives delta_t (Eq. 17: low variance, biased), 1 gives the return minus V_t (Eq. 18: unbiased).

    Returns:
        advantages, returns: (..., T), 0 in the padding. returns = advantages + values is what the value model learns.

    >>> token_rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
    >>> gae(token_rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=0.5)[0]
    tensor([[0.1250, 0.2500, 0.5000]])
    """
    if not token_rewards.shape == values.shape == mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            "token_rewards, values and mask (bool) must have one shape (..., T), got "
            f"{tuple(token_rewards.shape)}, {tuple(values.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    for name, number in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {number}")

    token_rewards, values = token_rewards.where(mask, 0.0), values.where(mask, 0.0)         # (..., T)
    next_values = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)   # (..., T), V_{t+1}
    deltas = token_rewards + gamma * next_values - values                                   # (..., T), delta_t
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(values[..., 0])                                            # (...), A_{t+1}
    for t in reversed(range(values.shape[-1])):
        advantage = deltas[..., t] + gamma * gae_lambda * advantage         # A_t = delta_t + gamma lambda A_{t+1}
        advantages[..., t] = advantage
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the entries where mask is true (Ziegler et al.'s code).

    Args:
        x: any shape.
        mask: the shape of x, bool.

    Returns:
        The shape of x, 0 where mask is false. var is the population variance, that of the result var / (var + 1e-8).

    >>> whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"x {tuple(x.shape)} and mask (bool) must match, got {mask.dtype} {tuple(mask.shape)}")
    count = mask.sum().clamp(min=1)
    mean = x.where(mask, 0.0).sum() / count
    centred = (x - mean).where(mask, 0.0)
    return centred * torch.rsqrt(centred.square().sum() / count + 1e-8)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the tokens: 1 if V is right up to a constant, 0 if no better than a constant.

    Args:
        values, returns: any shape.
        mask: the shape of both, bool.

    Returns:
        A scalar, 0 if all returns are equal and there is nothing to explain.

    >>> explained_variance(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]), torch.tensor([True, True]))
    tensor(0.7500)
    """
    errors, variance = (returns - values)[mask], returns[mask].var(correction=0)
    return (1 - errors.var(correction=0) / variance).where(variance > 1e-8, 0.0)
