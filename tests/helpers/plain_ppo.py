# SPDX-License-Identifier: MIT
"""PPO for a language model in plain words: PPO (arXiv 1707.06347) Algorithm 1, with the KL in the rewards, on one page,
for completions that are given. Read plain_grpo.py first. It imports nothing from ppo.py, and test_wiring.py compares
the two.
"""

import copy
from statistics import fmean, pvariance

import torch
from torch import nn

from helpers.plain_grpo import adamw, kl_estimate, next_logprobs, token_weight


def state_values(value_model, q, o):
    """V(s_t) of the states s_t = (q, o_{<t}), before each token of o: (|o|,)."""
    transformer, head = value_model
    return head(transformer(torch.tensor([q + o])).last_hidden_state[0, len(q) - 1 : -1])[:, 0]


def token_advantages(r, V, gamma, gae_lambda):
    """GAE (arXiv 1506.02438) Eq. 16: A_t = sum_l (gamma lambda)^l delta_{t+l}. V is 0 after the last token."""
    T, V = len(V), [*V, 0]
    delta = [r[t] + gamma * V[t + 1] - V[t] for t in range(T)]
    return [sum((gamma * gae_lambda) ** (s - t) * delta[s] for s in range(t, T)) for t in range(T)]


def plain_ppo(policy, rollouts, args):
    """Train the policy. A rollout is what a step sampled: N times (q, o, r), where r is r_phi(o).
    Returns the value model, the histories of the updates of both, and of every step what the controllers see."""
    ref_policy = copy.deepcopy(policy)                                  # pi_ref, the initial policy
    value_model = nn.ModuleList([copy.deepcopy(policy.base_model), nn.Linear(policy.config.hidden_size, 1)])
    for x in value_model[1].parameters():
        x.data.zero_()                                                  # V is 0 at first
    # beta weighs KL[pi_theta, pi_ref] in the rewards, beta_old KL[pi_old, pi_theta] in Eq. 8, whose start is free.
    history, value_history, steps, beta, beta_old = [], [], [], args.beta, 1.0
    for step, rollout in enumerate(rollouts):
        # ---- Rewards and advantages of the tokens, under the policy that sampled them, which is pi_old ----
        old_policy, rows = copy.deepcopy(policy), []
        for q, o, r_phi in rollout:
            old, ref = (next_logprobs(x, q, o, args.temperature).detach() for x in (old_policy, ref_policy))
            kl = [kl_estimate(old[t, o[t]], ref[t, o[t]], args.kl_estimator).item() for t in range(len(o))]
            r = [-beta * x for x in kl]                                 # DeepSeekMath Eq. 2
            r[-1] += r_phi
            V = state_values(value_model, q, o).tolist()
            A = token_advantages(r, V, args.gamma, args.gae_lambda)
            V_targ = [A[t] + V[t] for t in range(len(o))]
            rows.append((q, o, old, kl, V, A, V_targ))
        if args.whiten_advantages:                                      # Ziegler et al.: mean 0, variance 1
            every_A = [x for *_, A, _ in rows for x in A]
            mean, std = fmean(every_A), (pvariance(every_A) + 1e-8) ** 0.5
            for *_, A, _ in rows:
                A[:] = [(x - mean) / std for x in A]

        # ---- K epochs over the minibatches ----
        warming_up = step < args.value_warmup_steps                     # at first the value model learns alone
        size, completions = len(rows) // args.num_minibatches, [o for _, o, _ in rollout]
        for first in [*range(0, len(rows), size)] * args.update_epochs:
            J = value_loss = 0
            for q, o, old, _, V_old, A, V_targ in rows[first : first + size]:
                pi, V = next_logprobs(policy, q, o, args.temperature), state_values(value_model, q, o)
                weight = token_weight(o, completions, args)
                for t, token in enumerate(o):
                    ratio = (pi[t, token] - old[t, token]).exp()        # r_t(theta)
                    clipped = ratio.clamp(1 - args.clip_eps, 1 + (args.clip_eps_high or args.clip_eps))
                    L = min(ratio * A[t], clipped * A[t])               # Eq. 7
                    if args.penalty_kl_target:                          # Eq. 8, KL[pi_old, pi_theta] by k3
                        L = ratio * A[t] - beta_old * kl_estimate(old[t, token], pi[t, token], "k3")
                    entropy = -(pi[t].exp() * pi[t]).sum()
                    J += weight * (L + args.entropy_coef * entropy)     # Eq. 9, c_2 S
                    # Eq. 9 without c_1, as the models are apart; the 1/2 and the clipping are Ziegler et al.'s code.
                    V_clipped = V[t].clamp(V_old[t] - args.value_clip_eps, V_old[t] + args.value_clip_eps)
                    value_loss += weight / 2 * max((V[t] - V_targ[t]) ** 2, (V_clipped - V_targ[t]) ** 2)
            if not warming_up:
                adamw(policy, -J, history, args.learning_rate, args.max_grad_norm)
            adamw(value_model, value_loss, value_history, args.value_learning_rate, args.max_grad_norm)

        # ---- The betas of the next step: PPO section 4, and Ziegler et al.'s controller ----
        kls = [kl for _, _, _, kl, *_ in rows]
        steps.append({"policy/beta": beta, "policy/kl": fmean(x for kl in kls for x in kl)})
        if args.penalty_kl_target and not warming_up:
            moved = []                                                  # KL[pi_old, pi_theta], nats per token
            for q, o, old, *_ in rows:
                pi = next_logprobs(policy, q, o, args.temperature).detach()
                moved += [kl_estimate(old[t, o[t]], pi[t, o[t]], "k3").item() for t in range(len(o))]
            steps[-1]["penalty_beta"] = moved = fmean(moved)            # the KL that this controller sees
            beta_old *= 1 / 2 if moved < args.penalty_kl_target / 1.5 else 1
            beta_old *= 2 if moved > args.penalty_kl_target * 1.5 else 1
        if args.adaptive_kl_target and not warming_up:
            steps[-1]["adaptive_beta"] = kl = fmean(sum(kl) for kl in kls)  # the KL that it sees, nats per completion
            error = kl / args.adaptive_kl_target - 1
            beta *= 1 + 0.1 * min(max(error, -0.2), 0.2)
    return value_model, history, value_history, steps
