# SPDX-License-Identifier: MIT
"""PPO on a language model: Proximal Policy Optimization for RLHF. Each step:

    1. Rollout    completions and their rewards         rollout
    2. Score      pi_old, pi_ref, V; KL into rewards    rewards_with_kl
    3. Advantage  what came, less what V predicted      gae
    4. Update     K epochs on both clipped losses       policy_loss, value_loss

    python ppo.py             a tiny model learns to add, without any download
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl \\
        --eval-data test.jsonl --max-new-tokens 512

Papers: PPO (arXiv 1707.06347), GAE (1506.02438), InstructGPT (2203.02155) and Ziegler et al. (1909.08593) for language
models, DeepSeekMath (2402.03300) Eqs. 1 and 2 for the notation that grpo.py shares.

The policy pi_theta is a causal language model. A state s_t is a prompt and the tokens so far, an action a_t is the next
token, and an episode is a completion. grpo.py asks how much better a completion is than its group. Here the value model
predicts the return from every prefix, so one completion per prompt is enough and every token gets an advantage of its
own. And the KL enters the reward before the advantages are computed, while GRPO has it in the loss: earlier tokens,
too, pay for the KL that they lead to.

    symbol       name in the code    shape        meaning
    G            group_size          scalar       completions per prompt, usually 1
    K            update_epochs       scalar       passes over the completions of one step
    q            prompt_ids          (B, P)       B = num_prompts prompts of at most P tokens, left-padded
    a_t, o_t     completion_ids      (N, T)       N = B G completions of at most T tokens, right-padded
    |o|          completion_mask     (N, T)       true on the tokens of o, its EOS token too; sums to |o|
    r_phi, r_i   rewards             (N,)         the reward of a completion
    r_t          token_rewards       (N, T)       -beta log(pi_old / pi_ref), and r_phi on the last token
    V(s_t)       values, old_values  (N, T)       the return expected from s_t on, KL included; old as in pi_old
    A_t          advantages          (N, T)       how much better a_t was than V(s_t) predicted
    V_t^targ, R  returns             (N, T)       A_t + V(s_t), before the advantages are whitened
    pi_theta     logprobs            (N, T)       log pi_theta(a_t | s_t) at the sampling temperature, in nats
    pi_old       old_logprobs        (N, T)       the same before the first update of the step
    pi_ref       ref_logprobs        (N, T)       the same under the reference policy, which is frozen
    r_t(theta)   ratio               (N, T)       pi_theta / pi_old (the PPO paper calls ratio and reward r_t)
    M/(BG|o|)    weights             (N, T)       a token's weight in the losses, by default; M is num_minibatches
    eps, beta    clip_eps, beta      scalar       clip range of the ratio; weight of the KL in the rewards

Differences from the papers, each marked "Differs" where it happens: InstructGPT's Eq. 2 has one KL per completion, here
split over its tokens, and a pretraining term, left out here; the value model shares no parameter with the policy, so
Eq. 9 splits into two losses, each with its own AdamW, and needs no c_1; the value loss has the 1/2 and the clipping of
Ziegler et al.'s code, whose whitening of the advantages is here, too; the value model trains alone in the first steps;
Eq. 8's KL is k3 of the sampled tokens; in bfloat16 the completions come from rounded weights, uncorrected; constant
learning rates, gradient clipping, no update where the gradient is 0 or not finite; a completion that was cut off
counts as ended (advantage.py); DAPO's token mean runs over all groups at once.

The algorithm comes first; below SPEED is what saves time or memory, below PLUMBING are files, processes and errors. For
a task of your own, copy this file with advantage.py and kl.py, and change the block marked CHANGE THIS.
"""

import contextlib
import copy
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: spinning threads starve a busy machine

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import logging as transformers_logging

from advantage import explained_variance, gae, whiten
from kl import adaptive_beta, kl_estimate, penalty_beta

TINY = (Path(__file__).parent / "tests" / "tiny").resolve()  # a model that adds two-digit numbers, badly


@dataclass
class Args:
    # The task and the model
    model: str = str(TINY)
    """the policy: a Hugging Face hub id or folder; by default a tiny model that comes with this script"""
    data: str = str(TINY / "train.jsonl")
    """training problems: JSON lines with "answer" and either "question" or "prompt" (text or chat messages)"""
    eval_data: str | None = None
    """held-out problems in the same format; default: the tiny model's own, or a random tenth of --data, at most 256"""
    num_prompts: int = 256
    """B: prompts per step"""
    group_size: int = 1
    """G: completions per prompt"""
    max_new_tokens: int = 32
    """maximum completion length in tokens, the largest T; real models need more, such as 512"""
    temperature: float = 1.0
    """divides the logits, in sampling and in every log-probability"""
    # The update
    num_steps: int = 100
    """steps of sampling and updating"""
    update_epochs: int = 2
    """K (mu in GRPO): passes over the completions of one step"""
    num_minibatches: int = 2
    """optimizer updates per pass"""
    learning_rate: float | None = None
    """AdamW's learning rate; default: 1e-6 (DeepSeekMath 4.2), but 5e-4 for models below 10 M parameters"""
    max_grad_norm: float = 1.0
    """gradient clipping: gradients with a larger norm are scaled down to this norm"""
    # The value model and the advantage
    value_learning_rate: float | None = None
    """AdamW's learning rate for the value model; default: 1e-5, but 1e-3 below 10 M parameters"""
    value_warmup_steps: int = 5
    """first steps, which train the value model alone: it must see rewards before it predicts any"""
    value_clip_eps: float = 0.2
    """a value that came closer to its return by more than this gets no more gradient; in units of reward"""
    gamma: float = 1.0
    """discount per token (GAE Eq. 16); 1: none"""
    gae_lambda: float = 0.95
    """lambda of GAE Eq. 16: 0 trusts the value model, 1 the rewards"""
    whiten_advantages: bool = True
    """shift and scale the advantages of a step to mean 0 and variance 1"""
    # The KL penalty
    beta: float = 0.02
    """weight of the KL from the reference policy (InstructGPT: 0.02); 0 loads no reference policy"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """estimator of KL[policy, reference]: k1 is InstructGPT Eq. 2; in the reward, k2 and k3 hardly act, see kl.py"""
    adaptive_kl_target: float | None = None
    """steer beta to a KL of this many nats a completion (Ziegler et al.); default: beta is constant"""
    # The policy loss
    clip_eps: float = 0.2
    """eps: the ratio is clipped to [1 - eps, 1 + eps] (PPO Eq. 7)"""
    clip_eps_high: float | None = None
    """upper eps, if different from the lower one (DAPO's clip-higher: 0.28)"""
    penalty_kl_target: float | None = None
    """instead of clipping, penalise KL[pi_old, pi_theta] and steer it to this many nats a token (PPO Eq. 8)"""
    entropy_coef: float = 0.0
    """c_2: weight of the entropy bonus (PPO Eq. 9)"""
    loss_average: Literal["sequence", "token", "constant"] = "sequence"
    """sequence: 1/|o_i| sum_t (DeepSeekMath Eqs. 1, 3); token: all tokens alike (DAPO Eq. 8); constant: Dr. GRPO"""
    # The machine
    share_prompt: bool = True
    """run a prompt once for all its completions in a micro-batch; a few models cannot do that"""
    micro_batch_tokens: int = 8192
    """maximum tokens in a micro-batch, with padding; fewer need less memory; gradients change only by rounding"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute dtype; weights stay float32; auto: bfloat16 on a GPU if the model has over 10 M parameters"""
    # The run
    seed: int = 1
    """fixes training's random numbers, given the number of processes; an evaluation's are always the same"""
    run_name: str | None = None
    """the run is kept in runs/RUN_NAME; default name: script, model, seed and time"""
    resume: bool = False
    """go on from the checkpoint of RUN_NAME, if it has one"""
    save_every: int = 50
    """steps between checkpoints; 0: only at the end"""
    eval_every: int = 20
    """steps between evaluations on the held-out problems; 0: never, not even at the start and end"""


# ============================ CHANGE THIS: the task =============================
# A task is read_prompt, reward and compute_rewards; no code outside this block knows it. Here a completion must end in
# the right number, after the marker "#". The files of GSM8K are in this format.

INSTRUCTION = "\nThink step by step, then end with the final number after ####."


def read_prompt(problem: dict) -> str | list[dict[str, str]]:
    """The prompt of a problem, a line of --data: text, or chat messages with "role" and "content". A "prompt" is used
    as it is; INSTRUCTION is appended to a "question". An error ends the run with a sentence that names the line."""
    if "answer" not in problem or not {"question", "prompt"} & problem.keys():
        raise ValueError('it must have "answer" and either "question" or "prompt"')
    if not isinstance(problem["answer"], str) or final_number("#" + problem["answer"]) is None:
        raise ValueError('"answer" must be a string that ends in one number, alone or after ####')
    return problem["prompt"] if "prompt" in problem else problem["question"] + INSTRUCTION


def final_number(text: str) -> float | None:
    """The number after the last "#", or None if there is not exactly one: a list of guesses is not an answer."""
    words = text.rpartition("#")[2].split() if "#" in text else []
    words = [word.lstrip("*$(").rstrip("*).,;:!?%") for word in words if re.search("[0-9]|^-$", word)]
    if len(words) == 1 and re.fullmatch(r"[-+]?[0-9][0-9,]*(\.[0-9]+)?", words[0]):
        return float(words[0].replace(",", ""))
    return None


def reward(completion: str, problem: dict) -> float:
    """r_i: 1 if the completion's final number is the answer's, else 0. The text is parsed, never evaluated.
    Special tokens are stripped; to keep them, set skip_special_tokens=False in `decode`."""
    number = final_number(completion)
    # With "#" in front, an answer that is a number alone is read like GSM8K's, which end in "#### 72".
    return float(number is not None and number == final_number("#" + problem["answer"]))


def compute_rewards(completions: list[str], problems: list[dict]) -> list[float]:
    """r_i of all completions of this process at once, each with its problem. A thread pool, a judge or a reward model
    that wants batches goes here."""
    return [reward(completion, problem) for completion, problem in zip(completions, problems, strict=True)]


# ========================= end of the block to change ===========================


class Batch(NamedTuple):
    """B prompts and their N = B G completions: those of the first prompt, then of the second, and so on. Below, B'
    and N' are those of a process, a minibatch, or a part (a micro-batch), trimmed to its own P and T."""

    prompt_ids: Tensor          # (B, P), left-padded
    prompt_mask: Tensor         # (B, P), bool, true on the tokens
    completion_ids: Tensor      # (N, T), right-padded
    completion_mask: Tensor     # (N, T), bool, true through EOS, or through T: what is cut off is trained, too
    sampler_logprobs: Tensor    # (N, T), from the sampler, whose weights may be bfloat16; for policy/sampler_gap
    old_logprobs: Tensor | None = None  # (N, T), and so are all below
    advantages: Tensor | None = None
    weights: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None


# ----- Rollout: completions o_1 .. o_G ~ pi_old(. | q) and their rewards -----


def next_problems(pairs: list, step: int, num_prompts: int, seed: int) -> list:
    """B pairs (prompt ids, problem) for a step. Every pass over the data has a new random order and drops the
    remainder. The order follows from (seed, step), so a resumed run neither skips nor repeats a problem."""
    data_epoch, place = divmod(step, len(pairs) // num_prompts)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed * 1_000_003 + data_epoch))
    return [pairs[i] for i in order[place * num_prompts : (place + 1) * num_prompts].tolist()]


def sample_tokens(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token for each row of logits, (R, V), from softmax(logits / temperature), without top-k or top-p; the most
    probable one at temperature 0. Returns tokens and their log-probabilities in nats, both (R,)."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)                          # (R, V)
    if temperature == 0:
        tokens = logp.argmax(-1)                                                            # (R,)
    else:
        # The first token whose cumulative probability reaches a random threshold in (0, total]. In float32 the rare
        # tokens of a large vocabulary would vanish in the sum; torch.multinomial takes longer.
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)                                    # (R, V)
        threshold = (1 - torch.rand_like(cdf[:, :1])) * cdf[:, -1:]                         # (R, 1)
        tokens = torch.searchsorted(cdf, threshold)[:, 0].clamp(max=cdf.shape[1] - 1)       # (R,), NaN is refused later
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


@torch.no_grad()
def generate_completions(
    policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, group_size: int, max_new_tokens: int,
    temperature: float, eos_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample G completions per prompt, token by token, each until an EOS token or max_new_tokens tokens.

    Args: prompt_ids, prompt_mask (B, P), as in `Batch`; eos_ids (E,).
    Returns: completion_ids, completion_mask, logprobs: (N, T), where T is the length of the longest completion.
    """
    ids = prompt_ids.new_zeros(len(prompt_ids) * group_size, max_new_tokens)                # (N, max_new_tokens)
    logprobs = torch.zeros_like(ids, dtype=torch.float32)                                   # (N, max_new_tokens)
    running = torch.ones_like(ids[:, 0], dtype=torch.bool)                                  # (N,), no EOS token yet
    decoder = Decoder(policy, prompt_ids, prompt_mask, group_size, max_new_tokens)
    for t in range(max_new_tokens):
        # R of the N rows: all that run, and some that have ended, whose tokens the mask removes.
        rows = decoder.running_rows(running, t)                                             # (R,)
        if len(rows) == 0:
            break
        logits = decoder.next_logits(ids[:, :t])                                            # (R, V), after q and o_{<t}
        ids[rows, t], logprobs[rows, t] = sample_tokens(logits, temperature)
        running = running & ~torch.isin(ids[:, t], eos_ids)
    is_end = torch.isin(ids, eos_ids).long()                                                # (N, max_new_tokens)
    mask = is_end.cumsum(1) - is_end == 0       # (N, max_new_tokens), true through EOS, else throughout
    T = int(mask.sum(1).max())
    ids, mask, logprobs = ids.where(mask, 0)[:, :T], mask[:, :T], logprobs.where(mask, 0.0)[:, :T]
    assert logprobs.isfinite().all(), "the model's output is not finite"
    return ids, mask, logprobs


def rollout(
    sampler: nn.Module, pairs: list, step: int, args: Args, tokenizer: Tokenizer, eos_ids: Tensor
) -> tuple[Batch, Tensor, Tensor]:
    """Sample completions for B pairs (prompt ids, problem), and compute their rewards.

    Returns: the batch; rewards, (N,); ended, (N,), false where a completion was cut off at max_new_tokens. With B = 2,
    G = 2, max_new_tokens = 4 and EOS token 2 (A, that of grpo.py, and weights, for one minibatch, come in later steps):

        prompt_ids    completion_ids     completion_mask    rewards    ended     A         weights
        [0, 5, 6]     [21, 22,  2,  0]   [1, 1, 1, 0]       1.0        true      0.707     [1/12, 1/12, 1/12, 0]
                      [23, 24, 25, 26]   [1, 1, 1, 1]       0.0        false    -0.707     [1/16, 1/16, 1/16, 1/16]
        [7, 8, 9]     [21,  2,  0,  0]   [1, 1, 0, 0]       1.0        true      0         [1/8, 1/8, 0, 0]
                      [22,  2,  0,  0]   [1, 1, 0, 0]       1.0        true      0         [1/8, 1/8, 0, 0]

    The second was cut off, and is still rewarded and trained. In GRPO, the last group teaches only the KL.
    """
    # Each process samples for its own share of the prompts; all_gather gives every process the whole batch.
    rank, processes = world()
    torch.manual_seed(args.seed * 1_000_003 + step * processes + rank)
    random.seed(f"{args.seed} {step} {rank}")           # a reward may use random numbers, too
    prompt_ids, prompt_mask = pad_prompts([prompt for prompt, _ in pairs], eos_ids.device)  # (B, P), each
    ids, mask, logprobs = generate_completions(                                             # (N', T), each
        sampler, own_share(prompt_ids), own_share(prompt_mask), args.group_size, args.max_new_tokens, args.temperature,
        eos_ids,
    )
    problems = [problem for _, problem in own_share(pairs) for _ in range(args.group_size)]  # each G times
    texts = decode(tokenizer, ids, mask, eos_ids)       # for compute_rewards
    rewards = all_gather(checked_rewards(texts, problems, eos_ids.device))                  # (N,), r_i
    batch = Batch(prompt_ids, prompt_mask, all_gather(ids), all_gather(mask), all_gather(logprobs))
    ended = (torch.isin(batch.completion_ids, eos_ids) & batch.completion_mask).any(-1)     # (N,)
    return batch, rewards, ended


# ----- Score: log pi(o_{i,t} | q, o_{i,<t}), for the ratio and for the KL -----


def predict_completions(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits in every state s_t = (q, o_{<t}), which predict o_t: (N, T, V)."""
    if len(batch.prompt_ids) == len(batch.completion_ids):  # every completion has a copy of its prompt
        # Both in one row, with the padding last, so that the model needs neither mask nor positions.
        mask = torch.cat([batch.prompt_mask, batch.completion_mask], 1)                     # (N, P + T)
        rows = torch.cat([batch.prompt_ids, batch.completion_ids], 1)[mask].split(mask.sum(1).tolist())
        ids = pad_sequence(rows, batch_first=True)                                          # (N, L)
        # Position j predicts token j + 1: the prompt's last one predicts o_0. In the padding, any will do.
        t = torch.arange(batch.completion_ids.shape[1], device=ids.device)                  # (T,)
        before = (batch.prompt_mask.sum(1, keepdim=True) - 1 + t).clamp(max=ids.shape[1] - 1)  # (N, T)
        # Two-dimensional logits_to_keep: the positions of each row that are projected to logits.
        return model(input_ids=ids, use_cache=False, logits_to_keep=before).logits          # (N, T, V)
    return predict_shared(model, batch)  # the same, but a prompt runs once for all its completions: see SPEED


def completion_logprobs(
    policy: nn.Module, batch: Batch, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_{<t}) and the entropy of pi(. | q, o_{<t}), both (N, T), in nats, 0 in the padding.
    Without entropy_gradient, which costs memory, the entropy is only a metric."""
    logits = predict_completions(policy, batch)                                             # (N, T, V)
    assert logits.shape[:2] == batch.completion_ids.shape, "the model ignores logits_to_keep"
    # A log-probability near -6 would be off by up to 0.016 in bfloat16, so log_softmax runs in float32.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)           # (N, T, V)
    logprobs = logp.gather(2, batch.completion_ids[..., None])[..., 0]                      # (N, T)
    entropy = token_entropy(logp if entropy_gradient else logp.detach())                    # (N, T), -sum_v pi log pi
    return logprobs.where(batch.completion_mask, 0.0), entropy.where(batch.completion_mask, 0.0)


# ----- Score: V(s_t), what the value model expects from a prefix on -----


class ValueModel(nn.Module):
    """The policy's transformer with a scalar head instead of the output layer. It starts at V = 0 everywhere."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.config = policy.config  # for `micro_batches`
        # In a few families, such as Llama 4's text models, the base model is the language model itself.
        self.backbone = copy.deepcopy(policy.model if policy.base_model is policy else policy.base_model)
        self.head = nn.Linear(policy.get_output_embeddings().weight.shape[1], 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, logits_to_keep: Tensor, **inputs: object) -> CausalLMOutputWithPast:
        """As a language model whose vocabulary is one value: its logits are (N, T, 1)."""
        output = self.backbone(**inputs)
        states = slice_logits_to_keep(output.last_hidden_state, logits_to_keep).to(self.head.weight.dtype)
        with torch.autocast(states.device.type, enabled=False):  # in bfloat16, values near 1 would be 0.004 apart
            values = self.head(states).clone()          # FSDP2 warns of a view
        return CausalLMOutputWithPast(logits=values, cache=output.cache)


def completion_values(value_model: ValueModel, batch: Batch) -> Tensor:
    """V(s_t) of the state s_t = (q, o_{<t}) before each token, (N, T), in units of reward, 0 in the padding."""
    values = predict_completions(value_model, batch)[..., 0]                                # (N, T)
    return values.where(batch.completion_mask, 0.0)


# ----- Score: token rewards, with the KL penalty on every token and the completion's reward on the last -----


def rewards_with_kl(rewards: Tensor, kl: Tensor, completion_mask: Tensor, beta: float) -> Tensor:
    """r_t = r_phi [t is the last token] - beta kl_t (DeepSeekMath Eq. 2), without gradient.

    Args: rewards (...), one per completion; kl, completion_mask (..., T), kl as from `kl_estimate`.
    Returns: (..., T), 0 in the padding. A completion's token rewards sum to its reward less beta times its KL.
    """
    # Differs: InstructGPT Eq. 2 takes one KL off the whole reward, the sum of these, and adds a pretraining term.
    assert (*rewards.shape, completion_mask.shape[-1]) == kl.shape == completion_mask.shape
    last = completion_mask & (completion_mask.sum(-1, keepdim=True) == completion_mask.cumsum(-1))  # one per row
    return (rewards[..., None].where(last, 0.0) - beta * kl).where(completion_mask, 0.0).detach()   # (..., T)


# ----- Update: the losses, PPO Eq. 7 and that of the value model (advantages: gae in advantage.py) -----


def loss_weights(token_mask: Tensor, loss_average: str, max_new_tokens: int) -> Tensor:
    """The weight of each token in the loss: (..., T), 0 where token_mask, (..., T), is false.

    The weights divide by the whole batch, so that the losses and gradients of its parts add up, however it is split.

        "sequence"  1/N 1/|o_i|               every completion counts the same (DeepSeekMath Eqs. 1 and 3)
        "token"     1 / sum_i |o_i|           every token counts the same, so long completions count more (DAPO Eq. 8)
        "constant"  1 / (N max_new_tokens)    a constant instead of |o_i|: no length bias (Dr. GRPO)
    """
    # Differs: DAPO averages over the tokens of a group, then over groups. Here, as is usual, over all tokens at once.
    mask = token_mask.float()                                                               # (..., T)
    num_completions = mask[..., 0].numel()      # N, also the rows without a counted token
    if loss_average == "sequence":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / num_completions
    if loss_average == "token":
        return mask / mask.sum().clamp(min=1)
    assert loss_average == "constant", loss_average
    return mask / (num_completions * max_new_tokens)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor, weights: Tensor,
    clip_eps: float = 0.2, clip_eps_high: float | None = None, beta_old: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-L^CLIP of PPO Eq. 7: -sum_{i,t} weight * min[r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t].

    Args:
        logprobs, old_logprobs: (..., T), in nats; only the first carries a gradient.
        advantages, completion_mask, weights: (..., T); weights as from `loss_weights`.
        beta_old: if given, PPO Eq. 8 instead: -sum_{i,t} weight * (r_t A_t - beta_old KL[pi_old, pi_theta]).
    Returns: the loss, a scalar, and the metrics ratio, clip_frac and approx_kl, each (..., T) without gradient.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == completion_mask.shape == weights.shape
    # The padding is masked before exp: an overflow there would make its gradient NaN instead of 0.
    log_ratio = (logprobs - old_logprobs).where(completion_mask, 0.0)                       # (..., T)
    advantages = advantages.where(completion_mask, 0.0)                                     # (..., T)
    ratio = log_ratio.exp()                                                                 # (..., T), r_t, PPO Eq. 6

    # PPO Eq. 7, a pessimistic bound: no gradient where the ratio has left the clip range the way the advantage pushes.
    unclipped = ratio * advantages                                                          # (..., T)
    eps_high = clip_eps if clip_eps_high is None else clip_eps_high
    clipped = ratio.clamp(1 - clip_eps, 1 + eps_high) * advantages                          # (..., T)
    objective = torch.minimum(unclipped, clipped)                                           # (..., T)
    approx_kl = torch.expm1(log_ratio) - log_ratio   # (..., T), k3 of KL[pi_old, pi_theta]: pi_old sampled the tokens
    if beta_old is not None:
        # Differs: the KL of Eq. 8 is a sum over all possible tokens. This is its estimate from the sampled ones.
        objective = unclipped - beta_old * approx_kl                                        # (..., T), Eq. 8

    loss = -(objective * weights).sum()                                                     # scalar
    metrics = {"ratio": ratio, "clip_frac": (clipped < unclipped).float(), "approx_kl": approx_kl}
    return loss, {name: value.detach() for name, value in metrics.items()}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, completion_mask: Tensor, weights: Tensor,
    value_clip_eps: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """sum_{i,t} weight * 1/2 max[(V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2].

    Args:
        values, old_values, returns, completion_mask, weights: (..., T); only the first carries a gradient.
        value_clip_eps: in units of reward.
    Returns: the loss, a scalar, and (..., T), 1 where the clipping decides, else 0.
    """
    assert values.shape == old_values.shape == returns.shape == completion_mask.shape == weights.shape
    # Differs: PPO Eq. 9 has (V - V^targ)^2. The 1/2 and the clipping are Ziegler et al.'s.
    values, old_values, returns = (x.where(completion_mask, 0.0) for x in (values, old_values, returns))
    # V_old + clip(V - V_old, -eps, eps); as a clamp, which does not round a V inside the range.
    clipped_values = values.clamp(old_values - value_clip_eps, old_values + value_clip_eps)  # (..., T)
    errors, clipped_errors = (values - returns).square(), (clipped_values - returns).square()  # (..., T), each
    loss = (0.5 * torch.maximum(errors, clipped_errors) * weights).sum()                    # scalar
    return loss, (clipped_errors > errors).float().detach()


# ----- The loop: PPO Algorithm 1 -----


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
    """Clip the gradient by its global norm and step. Returns the norm before clipping, a scalar."""
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    # Differs: no step if the norm is not finite, or if it is 0, when only AdamW's momentum would move the weights.
    if 0 < grad_norm < math.inf:
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def train(args: Args, stop: threading.Event | None = None) -> Path:
    """Train a policy. Returns its folder, in Hugging Face format. `stop` ends the run after the current step."""
    args = check_args(args)
    device = start(args)
    policy = load_policy(args.model, device)            # dropout is off: with it, the first ratio would not be 1
    tokenizer, eos_ids, pairs, held_out = load_problems(args, policy)                       # pairs: (ids, problem)
    check_policy(policy, pairs, args)                   # it must score as it samples
    args = replace(args, dtype=choose_dtype(policy, args.dtype))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    value_model = shard(ValueModel(policy))                                                 # Differs: no shared weights
    ref_policy = shard(copy.deepcopy(policy).requires_grad_(False)) if args.beta else None  # no KL, no reference
    sampler = make_sampler(policy, args.dtype)
    policy = shard(policy)                              # over the processes; before AdamW
    # Differs: constant learning rates, and `optimizer_step` clips the gradient.
    adamw = partial(torch.optim.AdamW, weight_decay=0.0, fused=True)
    is_small = policy.num_parameters() < 10_000_000
    optimizer = adamw(policy.parameters(), args.learning_rate or (5e-4 if is_small else 1e-6))
    value_optimizer = adamw(value_model.parameters(), args.value_learning_rate or (1e-3 if is_small else 1e-5))
    models = {"policy": (policy, optimizer), "ref_policy": (ref_policy, None),              # what a checkpoint holds
              "value_model": (value_model, value_optimizer)}
    betas = {"ref": args.beta, "old": 1.0}              # weights of the KLs from pi_ref and pi_old (Eq. 8)
    run = Run(args, tokenizer, eos_ids, held_out, sampler, models, betas, stop)
    if args.value_warmup_steps >= args.num_steps:
        say("the policy will not learn: --value-warmup-steps, for the value model alone, is not below --num-steps")
    minibatches = torch.arange(args.num_prompts).chunk(args.num_minibatches)  # each (B',): which prompts
    score = lambda model, part: completion_logprobs(model, part, args.temperature)[0]       # gives (N', T)
    for step in run.bar:                                # from 0, or the checkpoint's step, through num_steps
        if run.evaluate_and_save(step):                 # when it is due; true after the last step or a signal
            break
        refresh_sampler(sampler, policy)                                                    # pi_old <- pi_theta

        # ---- 1. Rollout: completions, of actions a_t ~ pi_old(. | s_t), and their rewards r_phi ----
        # Differs: in bfloat16 the sampler's weights are rounded, which policy/sampler_gap shows and nothing corrects.
        chosen = next_problems(pairs, step, args.num_prompts, args.seed)                    # B pairs
        batch, rewards, ended = rollout(sampler, chosen, step, args, tokenizer, eos_ids)

        # ---- 2. Score: every token under pi_old, pi_ref and V, no gradient; the KL goes into the rewards ----
        # pi_old is the policy before the step's first update. On the same micro-batches, the first ratio is exactly 1.
        with torch.no_grad(), autocast:
            old_logprobs = score_batch(score, policy, batch, minibatches, args)             # (N, T)
            ref_logprobs = score_batch(score, ref_policy, batch, minibatches, args) if ref_policy else old_logprobs
            old_values = score_batch(completion_values, value_model, batch, minibatches, args)  # (N, T)
        mask = batch.completion_mask                                                        # (N, T)
        # DeepSeekMath Eq. 2 has pi_theta, which at this point is pi_old. A reward does not change during the epochs.
        kl = kl_estimate(old_logprobs, ref_logprobs, args.kl_estimator)                     # (N, T)
        token_rewards = rewards_with_kl(rewards, kl, mask, betas["ref"])                    # (N, T), r_t

        # ---- 3. Advantage: how much better than the value model predicted was each token? ----
        advantages, returns = gae(token_rewards, old_values, mask, args.gamma, args.gae_lambda)  # (N, T), each
        if args.whiten_advantages:
            # Differs: the papers do not whiten, Ziegler et al.'s code does: mean 0 and variance 1 over all tokens.
            advantages = whiten(advantages, mask)                                           # (N, T)

        # ---- 4. Update: K epochs, on the clipped losses of both models ----
        # The weights divide by the whole batch. A minibatch is 1 / num_minibatches of it, hence the factor.
        weights = args.num_minibatches * loss_weights(mask, args.loss_average, args.max_new_tokens)  # (N, T)
        batch = batch._replace(old_logprobs=old_logprobs, advantages=advantages, weights=weights,
                               old_values=old_values, returns=returns)
        metrics, value_metrics = Metrics(), Metrics()
        warming_up = step < args.value_warmup_steps
        for _ in range(args.update_epochs):
            for minibatch in minibatches:
                # A part is a micro-batch. Gradients add up over the parts and, in FSDP, over the processes.
                if not warming_up:  # Differs: in the first steps only the value model learns
                    for _, part in micro_batches(policy, batch, minibatch, args):
                        with autocast:
                            logprobs, entropy = completion_logprobs(
                                policy, part, args.temperature, entropy_gradient=args.entropy_coef > 0
                            )
                        loss, per_token = policy_loss(
                            logprobs, part.old_logprobs, part.advantages, part.completion_mask, part.weights,
                            args.clip_eps, args.clip_eps_high, betas["old"] if args.penalty_kl_target else None,
                        )
                        if args.entropy_coef:
                            loss = loss - args.entropy_coef * (entropy * part.weights).sum()  # PPO Eq. 9, c_2 S
                        loss.backward()
                        metrics.add(part.completion_mask, loss, entropy=entropy, **per_token)
                    metrics.grad_norms.append(optimizer_step(policy, optimizer, args.max_grad_norm))
                for _, part in micro_batches(value_model, batch, minibatch, args):
                    with autocast:
                        values = completion_values(value_model, part)                       # (N', T)
                    loss, is_clipped = value_loss(
                        values, part.old_values, part.returns, part.completion_mask, part.weights, args.value_clip_eps
                    )
                    loss.backward()
                    value_metrics.add(part.completion_mask, loss, clip_frac=is_clipped)
                value_metrics.grad_norms.append(optimizer_step(value_model, value_optimizer, args.max_grad_norm))

        run.log_step({
            "reward/mean": rewards.mean(),
            "reward/std": rewards.std(correction=int(len(rewards) > 1)),                    # 0 for a single one
            "completion/length": mask.sum(-1).float().mean(),
            "completion/truncated": 1 - ended.float().mean(),
            "policy/kl": kl.sum() / mask.sum(),
            "policy/sampler_gap": (old_logprobs - batch.sampler_logprobs)[mask].abs().mean(),
            "policy/beta": betas["ref"],
            **metrics.means("policy"),
            **value_metrics.means("value"),
            "value/explained_variance": explained_variance(old_values, returns, mask),
        })

        # ---- The controllers: the betas of the next step ----
        if args.penalty_kl_target and not warming_up:
            # PPO section 4: the next beta follows from KL[pi_old, pi_theta] after all updates of the step.
            with torch.no_grad(), autocast:
                logprobs = score_batch(score, policy, batch, minibatches, args)             # (N, T)
            moved = kl_estimate(old_logprobs, logprobs, "k3")[mask].mean().item()           # nats per token
            betas["old"] = penalty_beta(betas["old"], moved, args.penalty_kl_target)
        if args.adaptive_kl_target and not warming_up:
            betas["ref"] = adaptive_beta(betas["ref"], kl.sum(-1).mean().item(), args.adaptive_kl_target)
    return run.folder / "policy"


# ==================================== SPEED =====================================
# The same numbers, up to rounding, in less time or memory. The docstrings say which plain thing a function stands for.

STOP_TEST_EVERY = 4  # tokens between tests for ended rows, because a test waits for the device


class Decoder:
    """Logits of the next token for N = B G rows. Stands for `model(torch.cat([prompts, ids], 1)).logits[:, -1]` with
    each prompt repeated G times: a cache keeps the keys and values of all tokens before, and ended rows leave it."""

    def __init__(self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, group_size: int, max_new_tokens: int):
        self.model, self.prompt_ids, self.prompt_mask = model, prompt_ids, prompt_mask    # (B, P)
        self.prompts = torch.arange(len(prompt_ids), device=prompt_ids.device).repeat_interleave(group_size)  # (N,)
        self.rows = torch.arange(len(self.prompts), device=prompt_ids.device)               # (R,), those in the cache
        self.lengths = prompt_mask.sum(1)[self.prompts]                                     # (R,), of the prompts
        self.visible = nn.functional.pad(prompt_mask[self.prompts].long(), (0, max_new_tokens), value=1)  # (R, P + T)
        # Of fixed size, if the model can use such a cache: else every token waits for the device.
        self.cache = StaticCache(model.config, self.visible.shape[1]) if model._can_compile_fullgraph else None
        self.can_record, self.recorded_step = False, None       # until the prompts have run

    def running_rows(self, running: Tensor, t: int) -> Tensor:
        """Every few tokens, drop the rows that have ended. running: (N,). Returns the rows in the cache, (R,)."""
        if t % STOP_TEST_EVERY == 0:
            kept = running[self.rows].nonzero()[:, 0]                                       # of the R rows
            # Dropping copies the cache, and a step must then be recorded again.
            if len(kept) < len(self.rows) / (2 if self.can_record else 1):
                self.rows, self.lengths, self.visible = self.rows[kept], self.lengths[kept], self.visible[kept]
                self.cache.reorder_cache(kept)
                self.recorded_step = None
        return self.rows

    def next_logits(self, ids: Tensor) -> Tensor:
        """ids: (N, t), all tokens so far. Returns the logits of the next ones, for the rows in the cache, (R, V)."""
        t = ids.shape[1]
        if t == 0:
            return self.run_prompts()
        tokens, position_ids = ids[self.rows, -1:], self.lengths[:, None] + t - 1           # (R, 1), each
        if self.can_record and t > 1:  # the step at t = 1, below, has loaded the kernels
            if self.recorded_step is None:
                self.recorded_step = record_step(self.model, self.visible, position_ids, self.cache)
            return self.recorded_step(tokens)
        step = partial(self.model, tokens, attention_mask=self.visible[:, : self.prompt_ids.shape[1] + t],
                       position_ids=position_ids, cache=self.cache, use_cache=True)
        output, self.can_record = watch_step(step) if self.can_record else (step(), False)
        return output.logits[:, -1]

    def run_prompts(self) -> Tensor:
        """Run every prompt once and repeat its keys and values G times. Returns the first logits, (N, V)."""
        position_ids = (self.prompt_mask.cumsum(1) - 1).clamp(min=0)            # positions must ignore left padding
        output = self.model(self.prompt_ids, attention_mask=self.prompt_mask.long(), position_ids=position_ids,
                             cache=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.cache
        self.cache.reorder_cache(self.prompts)
        # On a GPU, starting the kernels of a step from Python takes longer than running them: record it, replay it.
        # Other kinds of layers, such as sliding windows, count tokens in Python, which a recording would not repeat.
        self.can_record = self.rows.is_cuda and all(type(layer) is StaticLayer for layer in self.cache.layers)
        return output.logits[self.prompts, -1]


def watch_step(step: Callable) -> tuple[object, bool]:
    """Run a step of `Decoder`. Returns its output, and whether it can be recorded, which it cannot if it waits for the
    GPU. Trying is no way to find out: torch does not recover from a recording that fails."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        output = step()
        torch.cuda.set_sync_debug_mode("default")
    return output, not any("called a synchronizing" in str(warning.message) for warning in caught)


def record_step(policy: nn.Module, visible: Tensor, position_ids: Tensor, cache: StaticCache) -> Callable:
    """A step of `Decoder` as a CUDA graph: a function of the last tokens, (R, 1), that returns the logits, (R, V).
    Every call reads and writes the same memory: the tokens, the positions, the cache, the logits."""
    tokens, graph = torch.zeros_like(position_ids), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = policy(tokens, attention_mask=visible, position_ids=position_ids, cache=cache, use_cache=True).logits

    def step(new_tokens: Tensor) -> Tensor:
        """Replay it, one token further."""
        tokens.copy_(new_tokens)  # where it reads them
        graph.replay()
        position_ids.add_(1)
        return logits[:, -1]

    return step


def choose_dtype(policy: nn.Module, dtype: str) -> str:
    """Resolve --dtype auto."""
    is_fast = policy.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    auto = "bfloat16" if is_fast and policy.num_parameters() > 10_000_000 else "float32"
    return auto if dtype == "auto" else dtype


def make_sampler(policy: nn.Module, dtype: str) -> nn.Module:
    """The model that samples: the policy, or a whole copy in the dtype of the computation. Stands for the policy, from
    which a copy in bfloat16 differs by rounding (policy/sampler_gap)."""
    if dtype == "float32" and not dist.is_initialized():
        return policy
    sampler = copy.deepcopy(policy).requires_grad_(False)
    for parameter in sampler.parameters():  # and no buffer: rounded rotary frequencies drift with the position
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return sampler


@torch.no_grad()
def refresh_sampler(sampler: nn.Module, policy: nn.Module) -> None:
    """pi_old <- pi_theta: copy the policy's weights to the sampler, where it is not the policy itself."""
    for copied, current in zip(sampler.parameters(), policy.parameters(), strict=True):
        copied.copy_(full_tensor(current))


def predict_shared(model: nn.Module, batch: Batch) -> Tensor:
    """Stands for `predict_completions` with copies of the prompts. Here G' > 1 completions share a prompt, which runs
    once, as in `Decoder`; its gradient is the sum over its completions. Returns (N, T, V)."""
    group_size = len(batch.completion_ids) // len(batch.prompt_ids)                         # G'
    position_ids = (batch.prompt_mask.cumsum(1) - 1).clamp(min=0)                           # (B, P)
    # Its last state is projected once per completion, because a product of one row may be rounded differently.
    last = torch.full((group_size,), position_ids.shape[1] - 1, device=position_ids.device)
    output = model(input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask.long(), position_ids=position_ids,
                   use_cache=True, logits_to_keep=last)
    first = output.logits.flatten(0, 1)[:, None]                                            # (N, 1, V)
    output.cache.batch_repeat_interleave(group_size)
    prompt_mask = batch.prompt_mask.repeat_interleave(group_size, 0)                        # (N, P)
    visible = torch.cat([prompt_mask, torch.ones_like(batch.completion_mask)], 1).long()    # (N, P + T)
    t = torch.arange(batch.completion_ids.shape[1], device=visible.device)                  # (T,)
    others = model(input_ids=batch.completion_ids, attention_mask=visible, cache=output.cache, use_cache=True,
                   position_ids=prompt_mask.sum(1, keepdim=True) + t, logits_to_keep=t[:-1]).logits  # (N, T - 1, V)
    return torch.cat([first, others], 1)


def token_entropy(logp: Tensor) -> Tensor:
    """Stands for `-(logp.exp() * logp).sum(-1)`, (N, T, V) -> (N, T): in pieces that fit in a CPU cache. 0 log 0
    and its gradient are 0: the clamp avoids 0 * -inf where a model masks a token with -inf."""
    pieces = logp.flatten(0, 1).split(max(1, 2**20 // logp.shape[2]))                       # of (N T, V)
    sums = [(x.exp() * x.clamp(min=torch.finfo(x.dtype).min)).sum(-1) for x in pieces]
    return -torch.cat(sums).view(logp.shape[:2])


def take_completions(batch: Batch, index: Tensor, share: int) -> Batch:
    """The completions at these indices, (N',), and their prompts, cut to the longest of them. `share` completions that
    follow each other have one prompt, which stands once for them; 1: every completion has a copy."""
    group_size = len(batch.completion_ids) // len(batch.prompt_ids)
    prompts = index[::share] // group_size                                                  # (N' / share,)
    prompt_ids, prompt_mask, *columns = batch
    P, T = int(prompt_mask[prompts].sum(1).max()), int(batch.completion_mask[index].sum(1).max())
    columns = [None if x is None else x[index, :T] for x in columns]
    return Batch(prompt_ids[prompts, -P:], prompt_mask[prompts, -P:], *columns)


def micro_batches(model: nn.Module, batch: Batch, minibatch: Tensor, args: Args) -> Iterator[tuple[Tensor, Batch]]:
    """This process's completions of a minibatch, (B',) prompts, in parts that fit in memory. Stands for all of them at
    once. Yields the indices of a part, (N',), and the part."""
    rank, processes = world()
    lengths = batch.completion_mask.sum(1).cpu()                                            # (N,)
    prompt_lengths = batch.prompt_mask.sum(1).cpu().repeat_interleave(args.group_size)      # (N,)
    groups = torch.arange(len(lengths)).view(-1, args.group_size)[minibatch]                # (B', G)
    P, T = int(prompt_lengths[groups].max()), int(lengths[groups].max())
    most_logits = 2**28 if batch.prompt_ids.is_cuda else 2**26                              # 1 GB, 256 MB in float32
    most_tokens = min(args.micro_batch_tokens, most_logits // model.config.get_text_config().vocab_size)
    # Completions that share a prompt: a whole group, or if that does not fit, an equal share of one.
    sizes = [n for n in range(1, args.group_size + 1) if args.group_size % n == 0 and P + n * T <= most_tokens]
    share = max(sizes, default=1) if args.share_prompt else 1
    # For little padding, completions of similar length stand together, in a group and then in the minibatch.
    bundles = groups.gather(1, lengths[groups].argsort(dim=1, stable=True)).view(-1, share)  # (bundles, share)
    totals = prompt_lengths[bundles[:, 0]] + lengths[bundles].sum(1)                        # (bundles,)
    bundles = bundles[totals.argsort(descending=True, stable=True)]
    for part in bundles[rank::processes].split(max(1, most_tokens // (P + share * T))):
        index = part.flatten().to(batch.prompt_ids.device)                                  # (N',)
        yield index, take_completions(batch, index, share)


def score_batch(score: Callable, model: nn.Module, batch: Batch, minibatches: tuple, args: Args) -> Tensor:
    """Stands for `score(model, batch)`, (N, T): on the micro-batches of the update, so that it gives the same bits."""
    result = torch.zeros(batch.completion_ids.shape, device=batch.prompt_ids.device)
    for minibatch in minibatches:
        for index, part in micro_batches(model, batch, minibatch, args):
            output = score(model, part)                                                     # (N', T')
            result[index, : output.shape[1]] = output
    return all_sum(result)


# ================================== PLUMBING ====================================
# Files, models from disk, processes, checkpoints, curves, signals, and one sentence for a wrong flag, line or model.


class UserError(Exception):
    """A user error: printed as one sentence, without a traceback."""


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn any error inside into one sentence about `what`."""
    try:
        yield
    except Exception as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error) or repr(error)
        raise UserError(f"{what}: {' '.join(reason.split())}") from None


# The smallest values; other numbers are positive.
LEAST = {
    "beta": 0, "gamma": 0, "gae_lambda": 0, "entropy_coef": 0, "value_warmup_steps": 0, "seed": 0, "save_every": 0,
    "eval_every": 0,
}


def check_args(args: Args) -> Args:
    """Fill in defaults that depend on other arguments, and reject invalid values."""
    if args.eval_data is None and args.data == str(TINY / "train.jsonl"):
        args = replace(args, eval_data=str(TINY / "test.jsonl"))
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in LEAST and not value >= LEAST[name]:
            raise UserError(f"{flag} must be at least {LEAST[name]}, got {value}")
        if name not in LEAST and type(value) in (int, float) and not value > 0:  # NaN, too
            raise UserError(f"{flag} must be positive, got {value}")
    for name, choices in get_type_hints(Args).items():  # tyro checks them, a caller from Python may not
        if get_origin(choices) is Literal and getattr(args, name) not in get_args(choices):
            raise UserError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(args, name)!r}")
    if max(args.gamma, args.gae_lambda) > 1:
        raise UserError("--gamma and --gae-lambda must be at most 1")
    if args.resume and not args.run_name:
        raise UserError("--resume needs the --run-name of the run to resume")
    return args


# ----- Problems: prompts and texts -----


def load_problems(args: Args, policy: nn.Module) -> tuple[Tokenizer, Tensor, list, list]:
    """The tokenizer; all ids that end a completion, (E,); training and held-out problems, as pairs (ids, problem)."""
    with as_user_error(f"--model {args.model}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)  # neither run its code, nor ask
    eos_ids = end_tokens(tokenizer, policy)
    if not eos_ids:
        raise UserError(f"--model {args.model}: it has no EOS token, so its completions could never end")
    config = policy.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0                       # 0 and -1: no limit
    most_tokens = (positions if positions > 0 else math.inf) - args.max_new_tokens
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one, or one for each kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":  # longer rows change all positions
            most_tokens = min(most_tokens, rope["original_max_position_embeddings"] - args.max_new_tokens)
    pairs = read_problems(args.data, tokenizer, most_tokens)
    if args.eval_data is not None:
        held_out = read_problems(args.eval_data, tokenizer, most_tokens)
    else:
        random.Random(0).shuffle(pairs)  # always the same tenth
        num_held_out = min(256, len(pairs) // 10 + 1)
        held_out, pairs = pairs[:num_held_out], pairs[num_held_out:]
    trained = {tuple(prompt) for prompt, _ in pairs}
    repeated = sum(tuple(prompt) in trained for prompt, _ in held_out)
    if repeated:
        say(f"{repeated} of {len(held_out)} held-out problems have a prompt that is trained on, too")
    if len(pairs) < args.num_prompts:
        raise UserError(f"--num-prompts {args.num_prompts} is more than the {len(pairs)} training problems, "
                        f"{len(held_out)} being held out")
    return tokenizer, torch.tensor(eos_ids, device=policy.device), pairs, held_out


def end_tokens(tokenizer: Tokenizer, policy: nn.Module) -> list[int]:
    """Every id that ends a completion: the EOS tokens of the tokenizer and of the model, and the special token that a
    chat template writes behind an answer, which base models do not always name."""
    ends = policy.generation_config.eos_token_id  # of generation_config.json, or else of config.json
    eos_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        with as_user_error("the chat template cannot write a question and an answer"):
            behind = tokenizer.apply_chat_template(chat, tokenize=False).partition("ANSWER")[2]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        eos_ids |= set(tokenizer(behind, add_special_tokens=False).input_ids[:1]) & special
    vocab_size = policy.config.get_text_config().vocab_size
    return sorted(i for i in eos_ids if i is not None and 0 <= i < vocab_size)


def read_problems(path: str, tokenizer: Tokenizer, most_tokens: float) -> list:
    """JSON lines as pairs (prompt ids, problem); `read_prompt` says what a problem must hold."""
    pairs, num_marked = [], 0
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    with as_user_error(f"cannot read {path}"), open(path, encoding="utf-8-sig") as file:
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    for number, line in lines:
        with as_user_error(f"{path}, line {number}"):
            problem = json.loads(line)
            if not isinstance(problem, dict):
                raise ValueError("it must be a JSON object")
            prompt = read_prompt(problem)
            ids = encode_prompt(tokenizer, prompt)
            if not 0 < len(ids) <= most_tokens:
                raise ValueError(f"it has {len(ids)} tokens; 1 to {most_tokens} fit beside --max-new-tokens")
        pairs.append((ids, problem))
        num_marked += isinstance(prompt, str) and any(token in prompt for token in special)
    if not pairs:
        raise UserError(f"{path} is empty: it must hold one JSON object per line")
    if num_marked:
        say(f"{path}: {num_marked} prompts hold special tokens, which are encoded as plain text: use chat messages")
    return pairs


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict[str, str]]) -> list[int]:
    """Encode a prompt. If there is a chat template, it adds the BOS token, and a last message of the assistant is
    continued. Special tokens in the text of a problem are encoded as plain text."""
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        ids = tokenizer(prompt, split_special_tokens=True).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers add an end
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not all(isinstance(message["role"], str) and isinstance(message["content"], str) for message in chat):
        raise ValueError('a prompt must be a text or a list of {"role": text, "content": text}')
    continued = chat[-1]["role"] == "assistant"
    tokenizer.chat_control_tokens = []                  # <think> is a token; special tokens are text
    return tokenizer.apply_chat_template(chat, add_generation_prompt=not continued, continue_final_message=continued,
                                         return_dict=False, sanitize_control_tokens=True)


def pad_prompts(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """prompt_ids and prompt_mask, (B, P), left-padded. The mask is by length, so pad may be any id."""
    ids = [torch.tensor(ids) for ids in prompts]
    masks = [torch.ones(len(ids), dtype=torch.bool) for ids in prompts]
    return tuple(pad_sequence(x, batch_first=True, padding_side="left").to(device) for x in (ids, masks))


def decode(tokenizer: Tokenizer, completion_ids: Tensor, completion_mask: Tensor, eos_ids: Tensor) -> list[str]:
    """The completions, (N, T), as texts, without the EOS token and special tokens: `reward` does not see them."""
    lengths = (completion_mask & ~torch.isin(completion_ids, eos_ids)).sum(1).tolist()
    texts = [ids[:length] for ids, length in zip(completion_ids.tolist(), lengths, strict=True)]
    return tokenizer.batch_decode(texts, skip_special_tokens=True)


def checked_rewards(completions: list[str], problems: list[dict], device: torch.device) -> Tensor:
    """`compute_rewards`, which is the user's own code, as a tensor of finite numbers, (N,)."""
    try:
        rewards = compute_rewards(completions, problems)
    except SystemExit as error:  # it would end the program as if all were well
        raise RuntimeError("compute_rewards called for an exit") from error
    rewards = torch.tensor(rewards, dtype=torch.float32, device=device)                     # (N,)
    if rewards.shape != (len(completions),) or not rewards.isfinite().all():
        raise ValueError(f"compute_rewards must return {len(completions)} finite numbers, got {rewards.tolist()}")
    return rewards


# ----- Models -----


def load_policy(model: str, device: torch.device) -> nn.Module:
    """The policy in float32, without dropout."""
    with as_user_error(f"--model {model} cannot be loaded"):
        policy, info = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        if info["missing_keys"]:  # they would be random
            raise ValueError(f"it has no weights for {', '.join(sorted(info['missing_keys']))}")
        if any(parameter.dtype != torch.float32 for parameter in policy.parameters()):
            raise ValueError("its weights are quantised; to train, they must be floating-point numbers")
        return policy.to(device).eval()


@torch.no_grad()
def check_policy(policy: nn.Module, pairs: list, args: Args) -> None:
    """Refuse a policy that scores otherwise than it samples: it would train silently wrong. Tried with the longest
    prompt and a quarter of it, and two completions of each."""
    longest = max((prompt for prompt, _ in pairs), key=len)
    prompt_ids, prompt_mask = pad_prompts([longest, longest[: len(longest) // 4 + 1]], policy.device)  # (2, P), each
    # Every eighth token ends a completion, so that some end early.
    eos_ids = torch.arange(0, policy.config.get_text_config().vocab_size, 8, device=policy.device)
    torch.manual_seed(0)
    with as_user_error(f"--model {args.model} cannot be trained here; some models need --no-share-prompt"):
        ids, mask, logprobs = generate_completions(policy, prompt_ids, prompt_mask, 2, 8, 1.0, eos_ids)
        batch, index = Batch(prompt_ids, prompt_mask, ids, mask, logprobs), torch.arange(4, device=policy.device)
        for share in (1, 2) if args.share_prompt else (1,):
            part = take_completions(batch, index, share)
            gap = (completion_logprobs(policy, part, 1.0)[0] - logprobs).abs().max().item()
            if not gap < 1e-3:
                raise ValueError(f"the log-probabilities of sampling and of scoring differ by {gap:.2g} nats")


def shard(model: nn.Module) -> nn.Module:
    """Shard a model over the processes, if there are several (FSDP2): layer by layer, if layers share no weight."""
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    if dist.is_initialized():
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        uses = Counter(parameter for layer in layers for parameter in layer.parameters())
        alone = [layer for layer in layers if all(uses[parameter] == 1 for parameter in layer.parameters())]
        for module in [*alone, model]:
            fully_shard(module)
            module.set_gradient_divide_factor(1.0)  # the loss has one denominator for all: gradients add up
            module.set_force_sum_reduction_for_comms(True)
    return model


# ----- Processes: torchrun starts several; each has its share of the prompts and of the gradient -----


def start(args: Args) -> torch.device:
    """Choose the device, and join the other processes where torchrun has started several."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun has started it
        if has_gpu:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if has_gpu else "gloo")
    shares = world()[1] * args.num_minibatches
    if args.num_prompts % shares:
        raise UserError(f"--num-prompts {args.num_prompts} must be a multiple of {shares}, "
                        "the number of processes times --num-minibatches")
    # cuDNN's attention with a mask has had NaN gradients and wrong decoding (pytorch issues 196678 and 193893).
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return device


def world() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_share(rows):
    """This process's share of the rows of a tensor or a list, such as the prompts of a step."""
    rank, processes = world()
    return rows[len(rows) * rank // processes : len(rows) * (rank + 1) // processes]


def all_gather_objects(x: object) -> list:
    """x of every process."""
    objects = [x] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(objects, x)
    return objects


def all_gather(x: Tensor) -> Tensor:
    """The rows of all processes together, (N,) or (N, T), padded to the longest T."""
    shares = all_gather_objects(x.cpu())
    T = max(share.shape[-1] for share in shares)    # if they are (N', T); of (N',), all have one length
    return torch.cat([nn.functional.pad(share, (0, T - share.shape[-1])) for share in shares]).to(x.device)


def all_sum(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def full_tensor(x: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over the processes."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# ----- The run: evaluation, checkpoints, curves, what is printed, signals -----


def say(text: str) -> None:
    """Print a line above the progress bar, in the first process only."""
    if world()[0] == 0:
        tqdm.write(text, file=sys.stderr)


class Metrics:
    """Means over the tokens and the updates of a step, kept on the device until the step ends."""

    def __init__(self):
        self.totals, self.losses, self.grad_norms = {}, [], []

    def add(self, mask: Tensor, loss: Tensor, **per_token: Tensor) -> None:
        """The loss of one micro-batch, and values of its tokens, (N', T)."""
        self.losses.append(loss.detach())
        for name, x in per_token.items():
            total = torch.stack([x.detach().where(mask, 0.0).sum(), mask.sum()])            # (2,), sum and count
            self.totals[name] = self.totals.get(name, 0) + total

    def means(self, prefix: str) -> dict[str, float]:
        """All of them, under the names that TensorBoard shows; none if nothing was added."""
        if not self.grad_norms:
            return {}
        grad_norms = torch.stack(self.grad_norms)                                           # (updates,)
        totals = {name: all_sum(total) for name, total in self.totals.items()}              # (2,), of all processes
        means = {name: total[0] / total[1].clamp(min=1) for name, total in totals.items()}
        means["loss"] = all_sum(sum(self.losses)) / len(grad_norms)
        means["grad_norm"] = grad_norms.mean()
        means["skipped"] = (~grad_norms.isfinite()).sum()
        return {f"{prefix}/{name}": float(value) for name, value in means.items()}


class Run:
    """What a run keeps in runs/RUN_NAME/ (curves, completions.jsonl, checkpoint.pt, policy/) and what it prints."""

    def __init__(
        self, args: Args, tokenizer: Tokenizer, eos_ids: Tensor, held_out: list, sampler: nn.Module, models: dict,
        betas: dict, stop: threading.Event | None,
    ):
        """models: name: (model, its optimizer or None); with betas, what a checkpoint holds."""
        from torch.utils.tensorboard import SummaryWriter  # here, so that --help need not wait for it

        self.args, self.tokenizer, self.eos_ids, self.held_out = args, tokenizer, eos_ids, held_out
        self.sampler, self.policy, self.betas = sampler, models["policy"][0], betas
        self.models = {name: pair for name, pair in models.items() if pair[0] is not None}
        self.stop, self.step, self.writer = stop or threading.Event(), 0, None
        script = Path(__file__).stem
        name = args.run_name or f"{script}-{Path(args.model).name}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path("runs", all_gather_objects(name)[0]).absolute()  # processes may differ in the time
        if args.resume and any(all_gather_objects((self.folder / "checkpoint.pt").exists())):
            self.load(self.folder / "checkpoint.pt")
        if world()[0] == 0:
            with as_user_error(f"cannot write to {self.folder} (to go on with a run: --resume)"):
                self.folder.mkdir(parents=True, exist_ok=args.resume)
                self.writer = SummaryWriter(str(self.folder), purge_step=self.step)
            self.writer.add_text("flags", "\n".join(f"    {name} = {x!r}" for name, x in vars(args).items()))
        learning_rate = models["policy"][1].param_groups[0]["lr"]
        say(f"{script}: {self.policy.num_parameters() / 1e6:.1f} M parameters in {args.dtype} on {eos_ids.device.type}"
            f", learning rate {learning_rate:g}, step {self.step} of {args.num_steps}, in {self.folder}")
        self.bar = tqdm(range(self.step, args.num_steps + 1), script, args.num_steps, initial=self.step, unit="step",
                        disable=True if world()[0] else None)

    def evaluate_and_save(self, step: int) -> bool:
        """Before the update of a step, evaluate and save, each if it is due. True if the run ends here."""
        self.step, args = step, self.args
        last = step == args.num_steps or any(all_gather_objects(self.stop.is_set()))
        if args.eval_every and (step % args.eval_every == 0 or step == args.num_steps):
            self.evaluate()
        if last or (args.save_every and step % args.save_every == 0):
            self.save()
        if last:
            say(f"trained model after {step} steps: {self.folder / 'policy'}; curves: tensorboard --logdir runs")
        self.step_started = time.perf_counter()
        return last

    @torch.no_grad()
    def evaluate(self) -> None:
        """Mean reward on the held-out problems, greedy and sampled, and the mean length of the sampled completions. All
        completions are appended to completions.jsonl, and the first is printed."""
        args, own, metrics = self.args, own_share(self.held_out), {}
        refresh_sampler(self.sampler, self.policy)
        size = args.num_prompts * args.group_size  # as many completions at once as in training
        for kind, temperature in (("greedy", 0.0), ("sampled", args.temperature)):
            torch.manual_seed(world()[0])  # the same random numbers in every evaluation, for a reward, too
            random.seed(world()[0])
            lines = []
            for i in range(0, len(own), size):
                pairs = own[i : i + size]
                prompts = pad_prompts([prompt for prompt, _ in pairs], self.eos_ids.device)
                ids, mask, _ = generate_completions(
                    self.sampler, *prompts, 1, args.max_new_tokens, temperature, self.eos_ids
                )
                texts = decode(self.tokenizer, ids, mask, self.eos_ids)
                rewards = checked_rewards(texts, [problem for _, problem in pairs], ids.device)
                for row, (prompt, problem) in enumerate(pairs):
                    lines.append({
                        "step": self.step, "kind": kind, "prompt": self.tokenizer.decode(prompt),
                        "completion": texts[row], "reward": rewards[row].item(), "length": mask[row].sum().item(),
                        "problem": problem,
                    })
            lines = [line for of_process in all_gather_objects(lines) for line in of_process]
            metrics[f"eval/{kind}"] = sum(line["reward"] for line in lines) / len(lines)
            metrics["eval/length"] = sum(line["length"] for line in lines) / len(lines)
            if world()[0] == 0:
                with (self.folder / "completions.jsonl").open("a") as file:
                    file.writelines(json.dumps(line, default=str) + "\n" for line in lines)
            text = lines[0]["prompt"] + lines[0]["completion"]
            say(f"    {kind}, reward {lines[0]['reward']:.2f}: {text[-150:]!r}")
        shown = "held-out reward {eval/greedy:.3f} greedy, {eval/sampled:.3f} sampled, {eval/length:.1f} tokens"
        say(f"step {self.step}: {shown.format_map(metrics)}")
        self.log(metrics)

    def log_step(self, metrics: dict[str, Tensor | float]) -> None:
        """The curves of a step of training, and what the progress bar shows of them."""
        metrics = {name: float(value) for name, value in metrics.items()}
        metrics["time/step"] = time.perf_counter() - self.step_started
        num_tokens = metrics["completion/length"] * self.args.num_prompts * self.args.group_size
        metrics["time/tokens_per_second"] = num_tokens / metrics["time/step"]
        shown = "reward {reward/mean:.2f}, length {completion/length:.1f}, KL {policy/kl:.3f}, ".format_map(metrics)
        shown += f"{metrics['time/tokens_per_second']:.0f} tokens/s"
        self.bar.set_postfix_str(shown)
        if self.bar.disable:  # in a notebook or a log there is no bar
            say(f"step {self.step}: {shown}")
        if self.step == 0 and metrics["reward/std"] == 0:
            say(f"step 0: no completion earned more than those it is compared with, so the rewards teach nothing yet; "
                f"{metrics['completion/truncated']:.0%} were cut off at --max-new-tokens")
        if metrics.get("policy/skipped") or metrics.get("value/skipped"):
            say(f"step {self.step}: the gradient was not finite, so its update was skipped")
        self.log(metrics)

    def log(self, metrics: dict[str, float]) -> None:
        """Add a point to every curve. Point s is measured after s steps of training."""
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, self.step)
            self.writer.flush()  # before the checkpoint, so that a kill after it loses no point

    def save(self) -> None:
        """Write checkpoint.pt, to resume from, and policy/, in Hugging Face format, which no resume reads."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        content = {"step": self.step, "args": vars(self.args), "betas": self.betas}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        for name, (model, optimizer) in self.models.items():
            # An optimizer without a step has no state; get_state_dict would make it count a step that never was.
            has_state = optimizer is not None and len(optimizer.state) > 0
            content[name] = get_state_dict(model, optimizer if has_state else (), options=options)
        if world()[0] == 0:
            # Renamed when it is complete, so that a kill at any moment leaves a whole checkpoint.
            torch.save(content, self.folder / "checkpoint.aside")
            (self.folder / "checkpoint.aside").replace(self.folder / "checkpoint.pt")
            self.policy.save_pretrained(self.folder / "policy", state_dict=content["policy"][0])
            self.tokenizer.save_pretrained(self.folder / "policy")

    def load(self, path: Path) -> None:
        """Restore a checkpoint that any number of processes wrote, and say which flags have changed since."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        with as_user_error(f"{path} cannot be loaded"):
            saved = torch.load(path, weights_only=True, map_location="cpu")
            # Not strict: parameters that never had a gradient have no state.
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
            for name, (model, optimizer) in self.models.items():
                weights, state = saved[name]
                if weights.keys() != model.state_dict().keys():
                    raise ValueError("it belongs to another model")
                optimizer = optimizer if state else ()
                if state:  # the flag counts, not the checkpoint
                    state["param_groups"][0]["lr"] = optimizer.param_groups[0]["lr"]
                set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
        self.step = saved["step"]
        self.betas.update(saved["betas"])
        changed = [f"{name} (was {saved['args'].get(name)})" for name, value in vars(self.args).items()
                   if name != "resume" and saved["args"].get(name) != value]
        say(f"resuming from {path}, with other flags: {', '.join(changed) or 'none'}")


def main(args: Args) -> None:
    """Train as a program. The first SIGINT or SIGTERM ends the run after the current step, the second one at once. A
    user error is printed as one sentence."""
    stop = threading.Event()

    def ask(*_: object) -> None:
        """Handle the first signal; later ones act as if there were no handler."""
        stop.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(2, b"\nfinishing this step, then saving; a second signal exits at once\n")  # print may be at work

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    # A process that a reward forks ends when it is told to.
    os.register_at_fork(after_in_child=partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))
    try:
        train(args, stop)
    except UserError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\nPapers")[0]))
