# SPDX-License-Identifier: MIT
"""GRPO in plain words: DeepSeekMath (arXiv 2402.03300) 4.1.1, 4.1.2 and Algorithm 1. To have the algorithm on one page,
read this. It does to the weights what grpo.py does, for completions that are given, and nothing to be fast: one
completion after the other, no padding, no masks, sums as loops, AdamW by its formula. It imports nothing from grpo.py;
test_wiring.py compares the two, in float64. The default flags give the paper's algorithm; a line for another flag names
its paper. A prompt q and a completion o are lists of token ids, r is a reward.
"""

import copy
import math

import torch


def next_logprobs(model, q, o, temperature):
    """log pi(. | q, o_{<t}), the distribution from which each token of o was drawn: (|o|, V)."""
    logits = model(torch.tensor([q + o])).logits[0] / temperature       # (|q| + |o|, V), each predicts the next token
    return logits[len(q) - 1 : -1].log_softmax(-1)


def group_advantages(rewards, args):
    """4.1.2: A_i = (r_i - mean(r)) / std(r), where r are the rewards of one prompt's G completions."""
    G, total = len(rewards), sum(rewards)
    std = math.sqrt(sum((r - total / G) ** 2 for r in rewards) / (G - 1))  # Differs: the sample std, plus 1e-4
    divisor = std + 1e-4 if args.advantage_scale == "group" else 1      # 1: Dr. GRPO
    if args.advantage_baseline == "leave_one_out":
        return [(r - (total - r) / (G - 1)) / divisor for r in rewards]  # RLOO: the mean of the others
    return [(r - total / G) / divisor for r in rewards]


def token_weight(o, counted, args):
    """What a token of o counts in the mean over a minibatch; `counted` are the completions of the step that count."""
    N = args.num_prompts * args.group_size / args.num_minibatches       # completions in a minibatch, prompts x G
    if args.loss_average == "sequence":
        return 1 / N / len(o)                                           # Eq. 3: 1/G 1/|o_i|, and the mean over prompts
    if args.loss_average == "token":                                    # DAPO; a minibatch is one part of the step
        return args.num_minibatches / sum(len(x) for x in counted)
    return 1 / N / args.max_new_tokens                                  # Dr. GRPO


def kl_estimate(logp, ref_logp, estimator):
    """D_KL[pi_theta, pi_ref], estimated from one token. Eq. 4 is k3."""
    log_r = ref_logp - logp                                             # log(pi_ref / pi_theta)
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": log_r.exp() - log_r - 1}[estimator]


def adamw(model, loss, history, learning_rate, max_grad_norm):
    """One update, without weight decay. `history` gets the loss, its gradient, and that scaled to max_grad_norm."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss, parameters)
    norm = math.sqrt(sum((g**2).sum().item() for g in gradient))
    history.append((loss.item(), gradient, [g * min(1, max_grad_norm / (norm + 1e-6)) for g in gradient]))
    n = len(history)
    for i, x in enumerate(parameters):
        m = sum(0.1 * 0.9 ** (n - 1 - k) * history[k][2][i] for k in range(n)) / (1 - 0.9**n)
        v = sum(0.001 * 0.999 ** (n - 1 - k) * history[k][2][i] ** 2 for k in range(n)) / (1 - 0.999**n)
        x.data -= learning_rate * m / (v.sqrt() + 1e-8)


def plain_grpo(policy, rollouts, args, eos_ids):
    """Train the policy. A rollout is what a step sampled: B groups (q, [o_1 .. o_G], [r_1 .. r_G]).
    Returns the history of the updates. `args` are the flags of grpo.py."""
    ref_policy, history = copy.deepcopy(policy), []                     # pi_ref, the initial policy
    for step, groups in enumerate(rollouts):
        if args.ref_refresh_every and step % args.ref_refresh_every == 0:
            ref_policy = copy.deepcopy(policy)                          # pi_ref <- pi_theta, the outer loop (4.1.4)
        old_policy = copy.deepcopy(policy)                              # pi_old <- pi_theta, which sampled the o_i
        # The completions whose tokens count: all, or those with an end (DAPO). A group's mean is always that of all.
        counted = [o for _, group, _ in groups for o in group if o[-1] in eos_ids or not args.mask_truncated]
        size = args.num_prompts // args.num_minibatches
        for first in [*range(0, args.num_prompts, size)] * args.update_epochs:  # mu passes over the minibatches
            J = 0
            for q, group, rewards in groups[first : first + size]:
                for o, A in zip(group, group_advantages(rewards, args), strict=True):
                    if o not in counted:
                        continue
                    pi = next_logprobs(policy, q, o, args.temperature)  # (|o|, V)
                    old, ref = (next_logprobs(x, q, o, args.temperature).detach() for x in (old_policy, ref_policy))
                    for t, token in enumerate(o):                       # every token of o gets the same A
                        token_ratio = ratio = (pi[t, token] - old[t, token]).exp()  # w = pi_theta / pi_old
                        if args.ratio_level == "sequence":              # GSPO Eq. 7
                            ratio = (sum(pi[s, o[s]] - old[s, o[s]] for s in range(len(o))) / len(o)).exp()
                        clipped = ratio.clamp(1 - args.clip_eps, 1 + (args.clip_eps_high or args.clip_eps))
                        kl = kl_estimate(pi[t, token], ref[t, token], args.kl_estimator)
                        if args.kl_importance_weight:                   # DeepSeek-V3.2
                            kl = token_ratio * kl
                        # Eq. 3: 1/G sum_i 1/|o_i| sum_t {min[w A, clip(w, 1 - eps, 1 + eps) A] - beta D_KL}
                        J += token_weight(o, counted, args) * (min(ratio * A, clipped * A) - args.beta * kl)
            adamw(policy, -J, history, args.learning_rate, args.max_grad_norm)
    return history
