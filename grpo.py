# SPDX-License-Identifier: MIT
"""GRPO on a language model: Group Relative Policy Optimization, complete in this file.

Papers: DeepSeekMath (arXiv 2402.03300) sections 4.1.1 to 4.1.3 and Algorithm 1; PPO (arXiv 1707.06347) for the clipped
objective. The successors are flags: DAPO (2503.14476), Dr. GRPO (2503.20783), RLOO (2402.14740), GSPO (2507.18071)
and the importance-weighted KL of DeepSeek-V3.2 (2512.02556).

The policy pi_theta is a causal language model: it takes a prompt q and gives each next token a probability. Each step:

    1. Generate G completions o_1 .. o_G per prompt with the old policy            generate_completions
    2. Compute each completion's advantage: its reward against its group's         group_advantages (advantage.py)
    3. Estimate the KL from the reference policy, token by token, with k3          kl_estimate (kl.py)
    4. Compute the clipped loss plus beta times that KL, and update the policy     grpo_loss

Advantage and KL pull against each other: the advantage pushes the policy to whatever earns more than its group's
mean; the KL pulls it back to the reference policy, where it still speaks the language it was trained on.

    symbol       name in the code    shape     meaning
    G, mu        group_size, update_epochs     completions per prompt; passes over them per step
    q            prompt_ids          (B, P)    B prompts of at most P tokens, padded on the left
    o_i          completion_ids      (N, T)    N = B * G completions, padded on the right to the step's longest
    |o_i|        completion_mask     (N, T)    true through the end token, by length: the end token is trained too
    r_i          rewards             (B, G)    what the task pays for a completion
    A_{i,t}      advantages          (N, T)    in group standard deviations (in rewards with scale "none")
    pi_theta     logprobs            (N, T)    log pi_theta(o_{i,t} | q, o_{i,<t}) at the sampling temperature, in nats
    pi_old       old_logprobs        (N, T)    the same under the weights that sampled
    pi_ref       ref_logprobs        (N, T)    the same under the reference policy, frozen
    w_{i,t}      ratio               (N, T)    pi_theta / pi_old
    D_KL         kl                  (N, T)    pi_ref / pi_theta - log(pi_ref / pi_theta) - 1, in nats
    1/G 1/|o_i|  weights             (N, T)    what a token weighs in the loss
    eps, beta    clip_eps, beta      scalar    clip range of the ratio; weight of the KL

Differs from the papers, each marked "Differs" where it happens: the std is the sample one plus 1e-4 (advantage.py);
DAPO's token mean runs over all groups at once; the reference stays the initial policy unless --ref-refresh-every asks
for Algorithm 1's outer loop; pi_old is scored by the trainer's own forward pass, on the micro-batches of the update,
so that the first ratio is exactly 1; the learning rate is constant, the gradient is clipped by its norm.

    python grpo.py                                     a tiny model learns two-digit addition, no download
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k_train.jsonl --eval-data gsm8k_test.jsonl

To use it for a task of your own, copy this file with advantage.py and kl.py and change the block marked CHANGE THIS.
What stands below the banner PLUMBING (files, folders, the tiny model) is not part of the algorithm.
"""

import bisect
import copy
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from advantage import group_advantages, process_advantages
from kl import kl_estimate


@dataclass
class Args:
    # The task and the model
    model: str = "tiny"
    """the policy: "tiny" is pretrained here in half a minute; else a Hugging Face hub id or folder"""
    data: str | None = None
    """training problems, JSON lines with "question" or "prompt" (text or chat messages) and "answer" """
    eval_data: str | None = None
    """held-out problems in the same format; by default a tenth of --data, at most 256, is held out"""
    num_prompts: int = 32
    """B: prompts per step"""
    group_size: int = 8
    """G: completions per prompt (DeepSeekMath used 64)"""
    max_new_tokens: int | None = None
    """T: longest completion, in tokens; by default 32 for the tiny model, else 512"""
    temperature: float = 1.0
    """divides the logits, in sampling and in every log-probability"""
    # The update
    num_steps: int | None = None
    """steps of sampling and updating; by default 100 for the tiny model, else 200"""
    update_epochs: int = 1
    """mu (K in PPO): passes over the completions of one step; with one update per step the ratio is 1"""
    num_minibatches: int = 1
    """optimizer updates per pass"""
    learning_rate: float | None = None
    """of AdamW; by default 5e-4 for the tiny model, else 1e-6 (DeepSeekMath 4.2)"""
    max_grad_norm: float = 1.0
    """a gradient of larger norm is scaled down to this norm"""
    # The loss
    beta: float = 0.04
    """weight of the KL from the reference policy (DeepSeekMath 4.2); 0 loads no reference policy"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """estimator of KL[policy, reference]: k3 is DeepSeekMath Eq. 4; k1 is mere noise in the loss, see kl.py"""
    kl_placement: Literal["loss", "reward"] = "loss"
    """"loss": DeepSeekMath Eq. 3; "reward": subtracted from the reward as in PPO for RLHF, which wants k1, see kl.py"""
    kl_importance_weight: bool = False
    """multiply the KL in the loss by the ratio: its gradient becomes that of KL[policy, reference] (DeepSeek-V3.2)"""
    ref_refresh_every: int = 0
    """steps after which pi_ref <- pi_theta (the outer loop of DeepSeekMath Algorithm 1); 0: never"""
    clip_eps: float = 0.2
    """eps: the ratio is clipped to [1 - eps, 1 + eps] (PPO Eq. 7, DeepSeekMath Eq. 3)"""
    clip_eps_high: float | None = None
    """the upper eps where it differs (DAPO's clip-higher: 0.28)"""
    ratio_level: Literal["token", "sequence"] = "token"
    """"sequence": one ratio per completion, the geometric mean of its tokens' (GSPO Eq. 7; clip about 4e-4)"""
    loss_average: Literal["sequence", "token", "constant"] = "sequence"
    """"sequence": 1/|o_i| sum_t (DeepSeekMath Eq. 3); "token": all tokens alike (DAPO Eq. 8); "constant": Dr. GRPO"""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """the std that divides the advantage: of the group (DeepSeekMath), of the batch, or none (Dr. GRPO)"""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """subtracted from the reward: the group's mean (DeepSeekMath) or the mean of the others (RLOO)"""
    process_supervision: bool = False
    """reward every step of a completion with step_rewards (DeepSeekMath 4.1.3), its outcome as the last of them"""
    mask_truncated: bool = False
    """leave completions without an end token out of the loss (DAPO's overlong filtering)"""
    # The machine
    share_prompt: bool = True
    """compute a prompt once for its group, in sampling and in scoring; switched off where a model cannot do it"""
    micro_batch_tokens: int = 8192
    """most tokens, padding included, in one pass (a longer row goes alone); changes the gradient by rounding only"""
    gradient_checkpointing: bool = False
    """compute every layer again in the backward pass instead of keeping what it needs: less memory, a third slower"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the computation, over float32 master weights; auto: bfloat16 where it is fast and the model is not tiny"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: the first of cuda, mps and cpu that is there"""
    # The run
    seed: int = 1
    """every random number of step s follows from (seed, s)"""
    run_name: str | None = None
    """the run lives in runs/RUN_NAME; by default named after the script, the model, the seed and the time"""
    resume: str | None = None
    """"auto" goes on from the newest good checkpoint of --run-name; else the folder of a checkpoint"""
    save_every: int = 50
    """steps between checkpoints, of which the last two are kept; 0: only at the end"""
    eval_every: int = 20
    """steps between evaluations on the held-out problems; 0: never, not even before and after"""


# ============================ CHANGE THIS: the task =============================
# A task is problems (prompt and answer) and a reward. The algorithm below knows nothing else about it.
# Here: the final number after the marker "#" must be the right one. GSM8K's own files work with --data, and the
# built-in problems are two-digit sums, whose demonstrations teach the tiny model to guess badly and to think well.


class Problem(NamedTuple):
    prompt: str | list[dict[str, str]]  # text, or chat messages with "role" and "content"
    answer: str


INSTRUCTION = "\nThink step by step, then end with the final number after ####."


def read_problem(record: dict) -> Problem:
    """One line of --data. A bare "question" gets the instruction; a "prompt" is taken as it is."""
    prompt = record["question"] + INSTRUCTION if "question" in record else record["prompt"]
    if not isinstance(record["answer"], str) or final_number("#" + record["answer"]) is None:
        raise ValueError('"answer" must be a string that ends in one number, alone or after ####')
    return Problem(prompt, record["answer"])


def final_number(text: str) -> Decimal | None:
    """The one number after the last "#", else None: who lists several guesses there has not answered."""
    numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text.rpartition("#")[2]) if "#" in text else []
    return Decimal(numbers[0].replace(",", "")) if len(numbers) == 1 else None


def reward(completion: str, answer: str) -> float:
    """r_i: 1 if the completion's final number is the answer's, else 0. The text is parsed, never evaluated."""
    number = final_number(completion)
    return float(number is not None and number == final_number("#" + answer))


def step_rewards(completion: str, answer: str) -> list[tuple[int, float]]:
    """For --process-supervision: (end, reward) of each step, `end` in characters. The last step is the outcome.

    The first two columns, such as 5+7=12;1+4+1=6, earn 1 each if true and ending in the answer's digit of that place.
    """
    steps, digits, end = [], answer.zfill(3)[::-1], 0
    for place, column in enumerate(re.split(r"(?<=;)", completion.partition("#")[0])):
        end += len(column)
        match = re.fullmatch(r"(\d)\+(\d)(\+1)?=(\d+);?", column)
        if match and place < 2:
            total = int(match[1]) + int(match[2]) + (match[3] is not None)
            steps.append((end, float(total == int(match[4]) and digits[place] == match[4][-1])))
    return [*steps, (len(completion), reward(completion, answer))]


def tiny_problems() -> list[Problem]:
    """All sums of two numbers below 100, in a fixed random order."""
    problems = [Problem(f"{a:02}+{b:02}=", str(a + b)) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(problems)
    return problems


def tiny_demonstration(problem: Problem, rng: random.Random) -> str:
    """What the tiny model is pretrained on: 4 in 10 work the columns out and are right, as in 38+57=8+7=15;3+5+1=9#95;
    6 in 10 answer at once, as in 38+57=#95, and 7 in 10 of those are wrong."""
    if rng.random() < 0.6:
        return f"#{problem.answer if rng.random() < 0.3 else rng.randrange(199)}"
    (a, b), (c, d) = problem.prompt[0:2], problem.prompt[3:5]
    units = int(b) + int(d)
    carry = "+1" if units > 9 else ""
    return f"{b}+{d}={units};{a}+{c}{carry}={int(a) + int(c) + units // 10}#{problem.answer}"


# ========================= end of the block to change ===========================


# ----- 1. Generate completions: o_1 .. o_G ~ pi_old(. | q) -----

def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token for each row from softmax(logits / temperature), the whole vocabulary, no top-k or top-p.

    Args: logits (rows, V); uniforms (rows,), random numbers in [0, 1); temperature 0 takes the most probable token.
    Returns: tokens and their log-probabilities in nats, both (rows,).
    """
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)                          # (rows, V)
    if temperature == 0:
        tokens = logp.argmax(-1)                                                            # (rows,)
    else:
        # The first token whose cumulative probability exceeds the random number.
        cdf = logp.exp().cumsum(-1, dtype=uniforms.dtype)                                   # (rows, V)
        tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp(max=cdf.shape[1] - 1)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


STOP_TEST_EVERY = 4  # tokens; each test waits for the device, and dropping finished rows copies the others


@torch.no_grad()
def generate_completions(
    policy: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    temperature: float,
    eos_ids: Tensor,
    share_prompt: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample G completions per prompt, token by token, each until an end token or T tokens.

    Args:
        prompt_ids, prompt_mask: (B, P), padded on the left; the mask is true on the tokens.
        uniforms: (B, G, T), a random number for every token of G completions, T the longest. Drawn in advance, so
            what a row samples depends neither on the other rows nor on the process that runs it.
        eos_ids: (E,), every id that ends a completion.
        share_prompt: False gives every row its own prompt, and finished rows run on to the end.

    Returns:
        completion_ids, completion_mask, logprobs: (N, T), N = B * G, prompt by prompt, T now the longest
            sampled. The logprobs only check the scoring (`sharing_is_exact`): training scores the tokens again.
    """
    _, group_size, max_new_tokens = uniforms.shape
    device = prompt_ids.device
    # float64 keeps the rare tokens of a large vocabulary apart; MPS has none.
    uniforms = uniforms.flatten(0, 1).to(device, torch.float32 if device.type == "mps" else torch.float64)  # (N, T)
    if not share_prompt:
        prompt_ids, prompt_mask = (x.repeat_interleave(group_size, 0) for x in (prompt_ids, prompt_mask))
    position_ids = (prompt_mask.cumsum(1) - 1).clamp(min=0)                                 # padding shifts no position
    context = dict(attention_mask=prompt_mask.long(), position_ids=position_ids)
    output = policy(prompt_ids, **context, use_cache=True, logits_to_keep=1)
    logits, cache = output.logits[:, -1], output.past_key_values                            # (B, V)
    if share_prompt:
        # The prompt ran once. Its keys and values are now repeated for the G completions that follow it.
        cache.batch_repeat_interleave(group_size)
        logits, prompt_mask = (x.repeat_interleave(group_size, 0) for x in (logits, prompt_mask))
    reserve(cache, max_new_tokens)

    completion_ids = torch.zeros(uniforms.shape, dtype=torch.long, device=device)           # (N, T)
    logprobs = torch.zeros(uniforms.shape, dtype=torch.float32, device=device)              # (N, T)
    rows = torch.arange(len(uniforms), device=device)                                       # those still in the batch
    running = torch.ones_like(rows, dtype=torch.bool)                                       # (rows,), no end token yet
    visible = torch.cat([prompt_mask, torch.ones_like(completion_ids, dtype=torch.bool)], dim=1).long()  # (N, P + T)
    next_position = prompt_mask.sum(1)                                                      # (rows,)
    for t in range(max_new_tokens):
        tokens, logprobs[rows, t] = sample_tokens(logits, uniforms[rows, t], temperature)   # (rows,)
        completion_ids[rows, t] = tokens
        running = running & ~torch.isin(tokens, eos_ids)
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % STOP_TEST_EVERY == 0 and not running.all():
            if not running.any():
                break
            if share_prompt:
                # Finished rows leave the batch and the cache.
                kept = running.nonzero()[:, 0]
                left = rows, running, tokens, visible, next_position
                rows, running, tokens, visible, next_position = (x[kept] for x in left)
                cache.batch_select_indices(kept)
        seen = visible[:, : prompt_mask.shape[1] + t + 1]                                   # (rows, P + t + 1)
        context = dict(attention_mask=seen, position_ids=next_position[:, None] + t)
        logits = policy(tokens[:, None], **context, past_key_values=cache, use_cache=True).logits[:, -1]

    ended = torch.isin(completion_ids, eos_ids)                                             # (N, T)
    completion_mask = ended.cumsum(1) - ended.long() == 0       # true through the first end token; the rest is not read
    longest = int(completion_mask.sum(1).max())
    columns = completion_ids.where(completion_mask, 0), completion_mask, logprobs.where(completion_mask, 0.0)
    return tuple(x[:, :longest] for x in columns)


# ----- Log-probabilities: log pi(o_{i,t} | q, o_{i,<t}), for the ratio and for the KL -----


def gathering_weights(function: Callable) -> Callable:
    """With several processes, each holds a part of a model's weights; FSDP2 gathers them while the model's forward
    runs. This makes function(model, ...) that forward. On one process it changes nothing."""

    @functools.wraps(function)
    def call(model: nn.Module, *args, **kwargs):
        if not isinstance(model, FSDPModule):
            return function(model, *args, **kwargs)
        model.forward = functools.partial(function, model)
        return model(*args, **kwargs)

    return call


@gathering_weights
def completion_logprobs(
    policy: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_{<t}) and the entropy of pi(. | q, o_{<t}), both (N, T), in nats, 0 in the padding.

    Args:
        prompt_ids, prompt_mask: (B, P). completion_ids, completion_mask: (N, T), N / B completions per prompt.
        temperature: the one that sampled.
        entropy_grad: keeps the gradient of the entropy, for an entropy bonus.
    """
    # For each of the M completion tokens, the hidden state one place before it, which predicts it.
    hidden = completion_hidden(policy.base_model, prompt_ids, prompt_mask, completion_ids, completion_mask)  # (M, H)
    tokens = completion_ids[completion_mask]                                                # (M,)

    def score(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(m, H), (m,) -> the log-probabilities of these m tokens and the entropies, (m,) each."""
        logits = output_logits(policy, hidden)                                              # (m, V)
        wide = torch.promote_types(logits.dtype, torch.float32)  # at -6 nats, bfloat16 moves in steps of 0.03
        logits = logits if temperature == 1 else logits.to(wide) / temperature  # a division by 1 would copy them
        logp = logits.log_softmax(-1, dtype=wide)                                           # (m, V)
        logprobs = logp.gather(1, tokens[:, None])[:, 0]                                    # (m,)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
            entropy = torch.special.entr(logp.exp()).sum(-1)                                # (m,), -sum_v p log p
        return logprobs, entropy

    # A large vocabulary is scored in pieces that the backward pass computes again: no (N, T, V) tensor is ever held.
    vocab_size = policy.config.get_text_config().vocab_size
    pieces = math.ceil(len(tokens) * vocab_size / LOGITS_AT_ONCE[tokens.device.type])
    if pieces > 1:
        chunks = zip(hidden.tensor_split(pieces), tokens.tensor_split(pieces), strict=True)
        scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        scored = [score(hidden, tokens)]
    logprobs, entropy = (torch.cat(column) for column in zip(*scored, strict=True))         # (M,), (M,)
    zeros = torch.zeros(completion_ids.shape, dtype=logprobs.dtype, device=logprobs.device)
    return zeros.masked_scatter(completion_mask, logprobs), zeros.masked_scatter(completion_mask, entropy)


# ----- 2. The advantage: group_advantages and process_advantages in advantage.py -----
# ----- 3. and 4. The KL (kl_estimate in kl.py) and the loss: DeepSeekMath Eq. 3 -----


def loss_weights(completion_mask: Tensor, loss_average: str, max_new_tokens: int) -> Tensor:
    """What each token weighs in the loss: (N, T), 0 in the padding.

    Computed for the whole batch and only then cut into micro-batches, whose losses and gradients therefore add up to
    those of the batch, however it is cut.

        "sequence"  1/N 1/|o_i|                 every completion counts the same (DeepSeekMath Eqs. 1 and 3)
        "token"     1 / sum_i |o_i|             every token counts the same, so long completions count more (DAPO Eq. 8)
        "constant"  1 / (N max_new_tokens)      a constant instead of |o_i|: no bias by length (Dr. GRPO)
    """
    # Differs: DAPO averages the tokens of one group, then groups; here, as is usual, those of all groups at once.
    mask = completion_mask.float()                                                          # (N, T)
    if loss_average == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    if loss_average == "token":
        return mask / mask.sum().clamp(min=1)
    if loss_average == "constant":
        return mask / (len(mask) * max_new_tokens)
    raise ValueError(f"loss_average must be one of sequence, token, constant, got {loss_average!r}")


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    beta: float = 0.04,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    ratio_level: str = "token",
    kl_estimator: str = "k3",
    kl_importance_weight: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-J of DeepSeekMath Eq. 3: -sum_{i,t} weight * { min[w A, clip(w, 1 - eps, 1 + eps) A] - beta D_KL }.

    Args:
        logprobs, old_logprobs, ref_logprobs: (N, T), in nats; only the first carries a gradient.
            ref_logprobs None: no KL.
        advantages, completion_mask, weights: (N, T); weights as from `loss_weights`.
        ratio_level: "token" (Eq. 3) or "sequence" (GSPO, arXiv 2507.18071, Eq. 7).

    Returns:
        the loss, a scalar, and for the curves ratio, clip_frac, kl and approx_kl, each (N, T) without gradient.
    """
    check_shapes(
        logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=logprobs if ref_logprobs is None else ref_logprobs,
        advantages=advantages, mask=completion_mask, weights=weights,
    )
    if ratio_level not in ("token", "sequence"):
        raise ValueError(f"ratio_level must be one of token, sequence, got {ratio_level!r}")
    # The padding is masked before exp: overflowing there would turn its zero gradient into NaN.
    log_ratio = (logprobs - old_logprobs).where(completion_mask, 0.0)                       # (N, T)
    advantages = advantages.where(completion_mask, 0.0)                                     # (N, T)
    token_ratio = ratio = log_ratio.exp()                                                   # (N, T), w_{i,t}, PPO Eq. 6
    if ratio_level == "sequence":
        # GSPO Eq. 7: s_i = (pi_theta(o_i) / pi_old(o_i))^(1 / |o_i|), one for all tokens of o_i; Eq. 5 clips it.
        lengths = completion_mask.sum(1, keepdim=True).clamp(min=1)                         # (N, 1), |o_i|
        ratio = (log_ratio.sum(1, keepdim=True) / lengths).exp().expand_as(log_ratio)       # (N, T)

    # PPO Eq. 7: the minimum is a pessimistic bound. Past the clip range, nothing more can be gained: gradient 0.
    unclipped = ratio * advantages                                                          # (N, T)
    clipped = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high)) * advantages
    objective = torch.minimum(unclipped, clipped)                                           # (N, T)

    # Eq. 3 has the KL outside of min and clip; Eq. 4 is k3.
    kl = torch.zeros_like(log_ratio)
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs.where(completion_mask, 0.0), ref_logprobs.where(completion_mask, 0.0), kl_estimator)
        if kl_importance_weight:
            kl = token_ratio * kl  # DeepSeek-V3.2: its gradient is then that of KL[pi_theta, pi_ref], see kl.py
        if beta:  # else the KL is a curve only
            objective = objective - beta * kl                                               # (N, T)

    loss = -(objective * weights).sum()                                                     # scalar, -J
    approx_kl = torch.expm1(log_ratio) - log_ratio      # (N, T), k3 of KL[pi_old, pi_theta]: pi_old sampled the tokens
    curves = {"ratio": ratio, "clip_frac": (clipped < unclipped).float(), "kl": kl, "approx_kl": approx_kl}
    return loss, {name: value.detach() for name, value in curves.items()}


# ----- The loop: DeepSeekMath Algorithm 1 -----


def train(args: Args) -> Path:
    """Train a policy as `args` say. Returns the folder of the trained policy, in Hugging Face format."""
    args = complete_args(args)
    choices = args.advantage_scale, args.advantage_baseline, args.kl_placement
    if args.process_supervision and choices != ("group", "mean", "loss"):
        raise UserError("--process-supervision needs the default advantage scale, baseline and KL placement")
    run = Run(args, "grpo")
    problems, held_out = load_problems(args)
    tokenizer, policy, eos_ids = load_policy(args.model, run.device)
    ref_policy = copy.deepcopy(policy).requires_grad_(False) if args.beta > 0 else None     # no KL, no reference
    prepare(ref_policy)
    sampler = make_sampler(policy, run.dtype)
    share_prompt = args.share_prompt and sharing_is_exact(policy, sampler, problems, args, run)
    prepare(policy, args.gradient_checkpointing)
    # Differs: a constant learning rate, and `optimizer_step` clips the gradient's norm.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    run.load_checkpoint(tokenizer, {  # and say what a checkpoint holds
        "policy": policy, "optimizer": (policy, optimizer),
        "ref_policy": ref_policy if args.ref_refresh_every else None,  # one that never changes is the --model itself
    })
    refresh_sampler(sampler, policy)
    single_update = args.update_epochs * args.num_minibatches == 1
    evaluation = functools.partial(evaluate, sampler, tokenizer, held_out, eos_ids, args, share_prompt, run)
    run.begin(problems, held_out, evaluation)
    for step in run.steps():
        generator = seed_step(args.seed, step)
        # Differs: Algorithm 1 always has this outer loop; here it is asked for.
        if ref_policy and args.ref_refresh_every and step and step % args.ref_refresh_every == 0:
            ref_policy.load_state_dict(policy.state_dict())                                 # pi_ref <- pi_theta

        # ---- 1. Generate G completions per prompt: the policy as it is now is pi_old ----
        batch = next_problems(problems, step, args.num_prompts, args.seed)                  # B pairs (ids, answer)
        prompt_ids, prompt_mask = pad_prompts([ids for ids, _ in batch], run.device)        # (B, P)
        size = args.num_prompts, args.group_size, args.max_new_tokens
        uniforms = torch.rand(size, dtype=torch.float64, generator=generator)               # (B, G, T)
        # With several processes, each samples its share of the prompts; `gather` gives every process all completions.
        completion_ids, completion_mask, _ = gather(*generate_completions(
            sampler, *share(prompt_ids, prompt_mask, uniforms), args.temperature, eos_ids, share_prompt
        ))                                                                                  # (N, T)
        completions = decode(tokenizer, completion_ids, completion_mask)                    # N texts
        answers = [answer for _, answer in batch for _ in range(args.group_size)]           # N texts
        rewards = run.score(completions, answers).view(-1, args.group_size)                 # (B, G), r_i by `reward`
        truncated = ~(torch.isin(completion_ids, eos_ids) & completion_mask).any(1)         # (N,), no end token
        run.lap("time/sample")

        # ---- The same tokens under pi_ref and pi_old, without gradient ----
        # Without a KL, a group of equal rewards teaches nothing: its advantages are 0 and so is its gradient.
        teaches = (rewards.amax(1) > rewards.amin(1)) | (args.beta > 0) | args.process_supervision  # (B,)
        # Minibatches, one update each, of micro-batches (prompts, rows): indices into the B prompts and N completions.
        k = completions_per_row(prompt_mask, completion_mask, policy) if share_prompt else 1
        minibatches = split_batch(
            prompt_mask, completion_mask, teaches, args.num_minibatches, args.micro_batch_tokens, k, generator
        )
        # Differs: pi_old is never the sampler's. With one update per step it is pi_theta itself, else it is scored here
        # by the forward pass of the update: the first ratio is exactly 1.
        old_logprobs = ref_logprobs = None
        tokens = prompt_ids, prompt_mask, completion_ids, completion_mask
        with torch.no_grad(), run.autocast():
            if not single_update or args.kl_placement == "reward":
                old_logprobs = score_batch(completion_logprobs, policy, minibatches, tokens, args.temperature)  # (N, T)
            if ref_policy:
                ref_logprobs = score_batch(completion_logprobs, ref_policy, minibatches, tokens, args.temperature)

        # ---- 2. The group-relative advantage: how much better than its group was each completion? ----
        penalised = rewards                                                                 # (B, G)
        if args.kl_placement == "reward" and ref_policy:
            # Eq. 3 has the KL in the loss. Here it is in the reward as in PPO for RLHF, summed over the completion.
            kl = kl_estimate(old_logprobs, ref_logprobs, args.kl_estimator)                 # (N, T)
            penalised = rewards - args.beta * kl.sum(1).view_as(rewards)                    # (B, G)
        if args.process_supervision:
            step_scores, step_ends = place_steps(tokenizer, completion_ids, completion_mask, completions, answers)
            grouped = (*rewards.shape, -1)                                                  # (B, G, T)
            advantages = process_advantages(step_scores.view(grouped), step_ends.view(grouped)).flatten(0, 1)
        else:
            advantages = group_advantages(penalised, args.advantage_scale, args.advantage_baseline)  # (B, G)
            advantages = advantages.view(-1, 1).expand(completion_ids.shape)                # (N, T), one for all tokens

        # ---- 3. and 4. The KL, the loss and the update, mu times ----
        trained_mask = completion_mask & ~truncated[:, None] if args.mask_truncated else completion_mask
        # Over the whole batch, so that a token weighs the same in whichever minibatch it falls; a minibatch holds about
        # 1 / num_minibatches of the weight, hence the factor.
        weights = args.num_minibatches * loss_weights(trained_mask, args.loss_average, args.max_new_tokens)  # (N, T)
        curves = Curves()
        for _ in range(args.update_epochs):
            for minibatch in minibatches:
                for prompts, rows in share(minibatch):
                    inputs = prompt_ids[prompts], prompt_mask[prompts], completion_ids[rows], completion_mask[rows]
                    with run.autocast():
                        logprobs, entropy = completion_logprobs(policy, *inputs, args.temperature)  # (rows, T), twice
                    loss, per_token = grpo_loss(
                        logprobs,
                        logprobs.detach() if single_update else old_logprobs[rows],
                        ref_logprobs[rows] if ref_policy else None,
                        advantages[rows], trained_mask[rows], weights[rows],
                        beta=args.beta if args.kl_placement == "loss" else 0.0,
                        clip_eps=args.clip_eps, clip_eps_high=args.clip_eps_high, ratio_level=args.ratio_level,
                        kl_estimator=args.kl_estimator, kl_importance_weight=args.kl_importance_weight,
                    )
                    loss.backward()
                    curves.add(loss, trained_mask[rows], entropy=entropy, **per_token)
                if minibatch:  # empty where no group teaches
                    grad_norm = optimizer_step(policy, optimizer, args.max_grad_norm)       # ascend J
                    curves.update(grad_norm)
        refresh_sampler(sampler, policy)
        run.lap("time/update")

        run.log({
            "reward/mean": rewards.mean(),
            "reward/std": rewards.std(1).mean(),
            "completion/length": completion_mask.sum(1).float().mean(),
            "completion/truncated": truncated.float().mean(),
            "policy/kl": 0.0,  # where no group had anything to teach
            **curves.means("policy"),
        })
        seen = [(tokenizer.decode(batch[0][0]) + completions[i], rewards[0, i].item()) for i in range(2)]
        run.after_step(seen)
    return run.finish()


# ================================== PLUMBING ====================================
# What follows is not part of the algorithm: arguments, problems and prompts, cutting the batch, models, the run.


class UserError(Exception):
    """A mistake that the user can mend: printed as one sentence, without a traceback."""


def first_sentence(error: Exception) -> str:
    """What an error says, without the advice that follows."""
    return re.split(r"(?<=\w[.!?]) ", " ".join((str(error) or repr(error)).split()))[0][:300]


# Defaults that depend on the model, and what the numbers may be.
TINY_DEFAULTS = {"max_new_tokens": 32, "num_steps": 100, "learning_rate": 5e-4}
OTHER_DEFAULTS = {"max_new_tokens": 512, "num_steps": 200, "learning_rate": 1e-6}
AT_LEAST_ZERO = ("beta", "ref_refresh_every", "seed", "save_every", "eval_every")  # all others must be positive
AT_MOST_ONE = ("clip_eps",)
MIN_GROUP_SIZE = 2  # a group of one has nothing to be compared with


def complete_args(args: Args) -> Args:
    """Fill in the defaults that depend on the model, and refuse what cannot work."""
    tiny = args.model == "tiny"
    defaults = TINY_DEFAULTS if tiny else OTHER_DEFAULTS
    args = dataclasses.replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
    for name, value in vars(args).items():
        least, most = 0 if name in AT_LEAST_ZERO else 1e-12, 1 if name in AT_MOST_ONE else 2**31
        if type(value) in (int, float) and not least <= value <= most:
            wanted = f"at most {most}" if value > most else "0 or more" if name in AT_LEAST_ZERO else "positive"
            raise UserError(f"--{name.replace('_', '-')} must be {wanted}, got {value}")
    if args.run_name is not None and (args.run_name in ("", "..") or Path(args.run_name).name != args.run_name):
        raise UserError(f"--run-name must be the name of a folder in runs/, got {args.run_name!r}")
    if args.num_prompts % args.num_minibatches:
        raise UserError(f"--num-minibatches {args.num_minibatches} must divide --num-prompts {args.num_prompts}")
    if args.group_size < MIN_GROUP_SIZE:
        raise UserError(f"--group-size must be at least {MIN_GROUP_SIZE}, got {args.group_size}")
    if tiny and (args.data or args.eval_data):
        raise UserError("--data needs a --model that can read it: the tiny model knows its built-in problems only")
    if not tiny and not args.data:
        raise UserError(f"--model {args.model} needs --data, a file of JSON lines with a question and an answer")
    return args


# ----- Problems and prompts -----


def load_problems(args: Args) -> tuple[list[tuple[list[int], str]], ...]:
    """The training and the held-out problems, each a list of (prompt ids, answer)."""
    if args.model == "tiny":
        problems, held_out = tiny_problems(), TINY_HELD_OUT
    else:
        problems, more = read_problems(args.data), read_problems(args.eval_data) if args.eval_data else []
        held_out = len(more) or min(256, len(problems) // 10 + 1)
        problems += more
    cut = len(problems) - held_out
    if cut < args.num_prompts:
        raise UserError(f"--num-prompts {args.num_prompts} is more than the {cut} training problems")
    tokenizer, config = load_tokenizer(args.model)
    limits = [getattr(config.get_text_config(), name, None) for name in ("max_position_embeddings", "vocab_size")]
    context, vocabulary = (limit or math.inf for limit in limits)
    longest = context - args.max_new_tokens
    encoded = [(encode_prompt(tokenizer, problem.prompt), problem.answer) for problem in problems]
    for ids, _ in encoded:
        if not 0 < len(ids) <= longest:
            raise UserError(f"a prompt has {len(ids)} tokens; with --max-new-tokens {args.max_new_tokens} this model's "
                            f"context of {context} takes 1 to {longest}: {tokenizer.decode(ids)[:80]!r}")
        if max(ids) >= vocabulary:
            raise UserError(f"--model {args.model}: its tokenizer has more tokens than the model, {vocabulary}")
    return encoded[:cut], encoded[cut:]


def read_problems(path: str) -> list[Problem]:
    """Read JSON lines; `read_problem` says what a line must hold."""
    problems, place = [], path
    try:
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
            place = f"{path}, line {number}"
            if line.strip():
                problems.append(checked_problem(json.loads(line.decode("utf-8-sig"))))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{place}: the field {error} is missing") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {error}") from None
    if not problems:
        raise UserError(f"{path} is empty: it must hold one JSON object a line")
    return problems


def checked_problem(record: dict) -> Problem:
    """The problem of one JSON line, if prompt and answer are texts that a tokenizer can read; else a ValueError."""
    if not isinstance(record, dict):
        raise ValueError("must be a JSON object")
    try:
        problem = read_problem(record)
        turns = [{"role": "user", "content": problem.prompt}] if isinstance(problem.prompt, str) else problem.prompt
        texts = [turn[key] for turn in turns for key in ("role", "content")]
        if not texts:
            raise TypeError("there is no message")
        "".join([*texts, problem.answer]).encode()  # half of a surrogate pair is no text: a ValueError
    except (TypeError, AttributeError) as error:
        wanted = '"question" must be a string, "prompt" a string or a list of {"role": ..., "content": ...}'
        raise ValueError(f"{wanted}: {error}") from None
    return problem


def load_tokenizer(model: str) -> tuple[PreTrainedTokenizerFast, AutoConfig]:
    """The tokenizer and the configuration of --model, which say much of what can be wrong before weights are loaded."""
    if world()[0] > 0:
        dist.barrier()  # the first process pretrains the tiny model, the others find it
    folder = tiny_policy() if model == "tiny" else model
    if world()[0] == 0 and dist.is_initialized():
        dist.barrier()
    try:
        return AutoTokenizer.from_pretrained(folder, **NO_CODE), AutoConfig.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # whatever a folder that is no model can raise
        raise UserError(f"--model {model} is no model folder and no hub id in reach: {first_sentence(error)}") from None


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids, made once and never from text again. The chat template is used where the tokenizer has one; it sets
    its own BOS. Special tokens written in a problem stay text."""
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise UserError("the prompts are chat messages, but this model's tokenizer has no chat template")
        return tokenizer(prompt, split_special_tokens=True).input_ids
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
    except Exception as error:  # whatever a template can raise
        raise UserError(f"the model's chat template refuses {str(prompt)[:80]!r}: {first_sentence(error)}") from None


def next_problems(problems: list, step: int, num_prompts: int, seed: int) -> list:
    """The problems of a step: a new random order every epoch. They follow from (seed, step), so a resumed run neither
    skips nor repeats one."""
    epoch, place = divmod(step, len(problems) // num_prompts)
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return [problems[i] for i in order[place * num_prompts : (place + 1) * num_prompts]]


def pad_prompts(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """prompt_ids and prompt_mask, (B, P), padded on the left. The mask is by length, so pad may be any id."""
    ids = [torch.tensor(ids) for ids in prompts]
    masks = [torch.ones(len(ids), dtype=torch.bool) for ids in prompts]
    return tuple(pad_sequence(x, batch_first=True, padding_side="left").to(device) for x in (ids, masks))


def decode(tokenizer: PreTrainedTokenizerFast, completion_ids: Tensor, completion_mask: Tensor) -> list[str]:
    """The N completions as texts, for the reward and for the reader."""
    rows = zip(completion_ids.tolist(), completion_mask.sum(1).tolist(), strict=True)
    return tokenizer.batch_decode([ids[:length] for ids, length in rows], skip_special_tokens=True)


def place_steps(
    tokenizer: PreTrainedTokenizerFast, completion_ids: Tensor, completion_mask: Tensor, completions: list[str],
    answers: list[str],
) -> tuple[Tensor, Tensor]:
    """step_rewards and step_ends, (N, T): the rewards of `step_rewards` at the tokens that complete those steps."""
    rewards = torch.zeros(completion_ids.shape, device=completion_ids.device)
    ends = torch.zeros_like(completion_mask)
    for i, (text, answer) in enumerate(zip(completions, answers, strict=True)):
        ids = completion_ids[i][completion_mask[i]].tolist()
        *steps, (_, outcome) = step_rewards(text, answer)
        lengths = [len(tokenizer.decode(ids[: t + 1], skip_special_tokens=True)) for t in range(len(ids)) if steps]
        placed = [(bisect.bisect_left(lengths, end), score) for end, score in steps]
        for t, score in [*placed, (len(ids) - 1, outcome)]:
            rewards[i, t], ends[i, t] = score, True
    return rewards, ends


@torch.no_grad()
def evaluate(
    sampler: nn.Module, tokenizer: PreTrainedTokenizerFast, problems: list, eos_ids: Tensor, args: Args,
    share_prompt: bool, run: "Run",
) -> dict[str, float]:
    """Mean reward on the held-out problems, greedy and sampled, and the length of the sampled completions."""
    found = {"eval/accuracy": 0.0, "eval/sampled": 0.0, "eval/length": 0.0}
    rows = args.num_prompts * args.group_size
    for start in range(0, len(problems), rows):
        part = problems[start : start + rows]
        number = len(part)
        part = part if number >= world()[1] else part * world()[1]  # every process must have something to do
        prompts = pad_prompts([ids for ids, _ in part], run.device)
        for name, temperature in (("eval/accuracy", 0.0), ("eval/sampled", args.temperature)):
            generator = torch.Generator().manual_seed(start)
            uniforms = torch.rand(len(part), 1, args.max_new_tokens, dtype=torch.float64, generator=generator)
            ids, mask, _ = gather(*generate_completions(
                sampler, *share(*prompts, uniforms), temperature, eos_ids, share_prompt
            ))
            scores = run.score(decode(tokenizer, ids, mask), [answer for _, answer in part])
            found[name] += scores[:number].sum().item()
        found["eval/length"] += mask[:number].sum().item()
    return {name: value / len(problems) for name, value in found.items()}


# ----- Packing: the completions of a prompt in one row with it -----


def completion_hidden(
    backbone: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """The hidden states from which the completion tokens are predicted: the state s_t = (q, o_{<t}) of each token o_t.

    With k = N / B completions per prompt, k > 1, they share a row: [ q | o_1 | ... | o_k | padding ]. Every completion
    sees the prompt and itself, and takes its positions as if it stood alone, so that the prompt is paid for once.

    Args:
        backbone: a causal transformer without its output head.
        prompt_ids, prompt_mask: (B, P). completion_ids, completion_mask: (N, T).

    Returns:
        (M, H), the M completion tokens that the mask counts, row by row.
    """
    num_prompts, (num_rows, width) = prompt_ids.shape[0], completion_ids.shape
    k = num_rows // num_prompts
    device, prompt_lengths = prompt_ids.device, prompt_mask.sum(1, keepdim=True)            # (B, 1)
    segment = torch.arange(1, k + 1, device=device).repeat_interleave(width)            # 0: prompt, g: completion g
    segment = torch.cat([torch.zeros_like(prompt_ids), segment.expand(num_prompts, -1)], dim=1)  # (B, P + k T)
    position = torch.arange(width, device=device).repeat(k) + prompt_lengths                # (B, k T)
    position = torch.cat([(prompt_mask.cumsum(1) - 1).clamp(min=0), position], dim=1)       # (B, P + k T)
    ids = torch.cat([prompt_ids, completion_ids.reshape(num_prompts, -1)], dim=1)           # (B, P + k T)
    mask = torch.cat([prompt_mask, completion_mask.reshape(num_prompts, -1)], dim=1)        # (B, P + k T)

    # Close the gaps: tokens first, in their order, padding last. L is the longest row.
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]         # (B, L)
    ids, mask, segment, position = (x.gather(1, order) for x in (ids, mask, segment, position))
    if k == 1:
        attention_mask = mask.long()                                                        # the model's own mask
    else:
        visible = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])  # (B, query L, key L)
        # The padding stands last, so the triangle hides it from every token.
        visible = (visible & torch.ones_like(visible[0]).tril())[:, None]                   # (B, 1, L, L)
        # Additive, because gemma2's eager attention adds a boolean mask as 0 and 1; in the dtype of the computation.
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else backbone.dtype
        attention_mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        attention_mask = attention_mask.masked_fill(~visible, torch.finfo(dtype).min)
    hidden = backbone(ids, attention_mask=attention_mask, position_ids=position, use_cache=False).last_hidden_state

    # Token o_t is predicted one place before it; the first one at the end of the prompt.
    before = torch.arange(ids.shape[1], device=device).expand_as(ids) - 1                   # (B, L)
    before = torch.where(position == prompt_lengths, prompt_lengths - 1, before)
    row, column = (mask & (segment > 0)).nonzero(as_tuple=True)                             # (M,), (M,)
    # index_select: on a CPU the backward of plain indexing adds in any order, so a resumed run would end in other bits.
    return hidden.flatten(0, 1).index_select(0, row * ids.shape[1] + before[row, column])   # (M, H)


def output_logits(policy: nn.Module, hidden: Tensor) -> Tensor:
    """(M, H) -> (M, V), with the scalings that some model families apply at the head."""
    config = policy.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = policy.get_output_embeddings()(hidden * scale)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


# (tokens, V) entries of the float32 log-softmax at once: half a gigabyte on an accelerator. On a CPU 64 MB, which
# malloc gives back to the system; pieces of less than 32 MB would leave holes in the heap as large as all of them.
LOGITS_AT_ONCE = {"cuda": 2**27, "mps": 2**27, "cpu": 2**24}


# ----- Cutting the batch, and the optimizer step -----


def check_shapes(**tensors: Tensor) -> None:
    """All of one shape (N, T): broadcasting would be silently wrong."""
    if len({x.shape for x in tensors.values()}) > 1 or any(x.dim() != 2 for x in tensors.values()):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"all tensors must be (N, T), got {shapes}")


def completions_per_row(prompt_mask: Tensor, completion_mask: Tensor, policy: nn.Module) -> int:
    """k: of the G completions of a prompt, how many share its row in the update. The more, the less often the prompt is
    computed; but every token is compared with the whole row: in a row of L tokens a layer of hidden size H does about
    12 H^2 + 2 H L = 2 H (6 H + L) multiplications a token. The k that is cheapest for a completion.

    Args: prompt_mask (B, P), completion_mask (N, T); policy: its config names the hidden size H.
    """
    group_size, hidden_size = len(completion_mask) // len(prompt_mask), policy.config.get_text_config().hidden_size
    prompt, completion = (mask.sum().item() / len(mask) for mask in (prompt_mask, completion_mask))  # mean tokens
    divisors = [k for k in range(1, group_size + 1) if group_size % k == 0]
    return min(divisors, key=lambda k: (prompt / k + completion) * (6 * hidden_size + prompt + k * completion))


def split_batch(
    prompt_mask: Tensor, completion_mask: Tensor, teaches: Tensor, num_minibatches: int, micro_batch_tokens: int,
    k: int, generator: torch.Generator,
) -> list[list[tuple[Tensor, Tensor]]]:
    """Cut the batch at random into minibatches, one optimizer update each, and these, the longest rows together, into
    micro-batches, one forward and backward pass each, of at most `micro_batch_tokens` tokens where a row is not longer.

    prompt_mask is (B, P), completion_mask (N, T), teaches (B,): prompts without it are left out. A micro-batch is
    (prompts, rows), indices into the B prompts and the N completions, k = len(rows) / len(prompts) of which share the
    row of their prompt (see `completion_hidden`). Every process gets as many.
    """
    num_rows = len(completion_mask)
    packs = num_rows // len(prompt_mask) // k                                               # packed rows per prompt
    prompt_tokens, completion_tokens = prompt_mask.sum(1).cpu(), completion_mask.sum(1).cpu()
    tokens = prompt_tokens.repeat_interleave(packs) + completion_tokens.reshape(-1, k).sum(1)  # (B packs,)
    teaches = teaches.cpu().repeat_interleave(packs)                                        # (B packs,)
    minibatches, (_, processes) = [], world()
    for packed in torch.randperm(num_rows // k, generator=generator).chunk(num_minibatches):
        # Every process must have something to do. A row that does not teach adds nothing to the gradient.
        packed = packed[teaches[packed].logical_not().byte().argsort(stable=True)]
        packed = packed[: max(int(teaches[packed].sum()), processes)] if teaches[packed].any() else packed[:0]
        packed = packed[tokens[packed].argsort(descending=True, stable=True)]
        blocks = []  # of rows of like length, of which every process gets a part
        while len(packed):
            size = processes * max(1, micro_batch_tokens // int(tokens[packed[0]]))
            if size < len(packed) < size + processes:  # too few would be left for another block
                size = len(packed) - processes if size > processes else len(packed)
            blocks.append(packed[:size])
            packed = packed[size:]
        cuts = [block[rank::processes] for rank in range(processes) for block in blocks]
        minibatches.append([(cut // packs, (cut[:, None] * k + torch.arange(k)).flatten()) for cut in cuts])
    return minibatches


def score_batch(
    score: Callable, model: nn.Module, minibatches: list, tokens: tuple[Tensor, ...], *options: object
) -> Tensor:
    """`completion_logprobs` or `completion_values` of the whole batch: (N, T), 0 where no micro-batch is. On the
    micro-batches of the update, so that it finds the same numbers there."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = tokens
    found = torch.zeros(completion_ids.shape, device=completion_ids.device)
    for prompts, rows in share([*itertools.chain(*minibatches)]):
        inputs = prompt_ids[prompts], prompt_mask[prompts], completion_ids[rows], completion_mask[rows]
        scores = score(model, *inputs, *options)
        found[rows] = scores[0] if isinstance(scores, tuple) else scores  # not the entropy
    return add_up(found)  # of all processes


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
    """Clip the gradient by its global norm, step, and return the norm before clipping. No step if it is not finite."""
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if grad_norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


class Curves:
    """Means over the tokens and updates of a step, collected on the device."""

    def __init__(self):
        self.sums, self.tokens, self.losses, self.ratios, self.grad_norms = {}, {}, [], [], []

    def add(self, loss: Tensor, mask: Tensor, **per_token: Tensor) -> None:
        """The loss of one micro-batch, and what its tokens, (N, T), were."""
        self.losses.append(loss.detach())
        if "ratio" in per_token:
            self.ratios.append(per_token.pop("ratio").where(mask, 0.0).max())
        for name, value in per_token.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().where(mask, 0.0).sum()
            self.tokens[name] = self.tokens.get(name, 0) + mask.sum()

    def update(self, grad_norm: Tensor) -> None:
        """The gradient norm of one update."""
        self.grad_norms.append(grad_norm)

    def mean(self, name: str) -> float:
        """Over the tokens of all processes."""
        total, tokens = add_up(torch.stack([self.sums[name], self.tokens[name]]).float())
        return float(total / tokens.clamp(min=1))

    def means(self, prefix: str) -> dict[str, float]:
        """Every curve of the step, as TensorBoard names it."""
        finite = [norm for norm in self.grad_norms if norm.isfinite()]
        means = {name: self.mean(name) for name in self.sums}
        means["loss"] = add_up(sum(self.losses)) / len(self.grad_norms) if self.losses else 0.0
        means["grad_norm"] = sum(finite) / max(1, len(finite))
        means["skipped"] = len(self.grad_norms) - len(finite)
        if self.ratios:
            means["ratio_max"] = gather(torch.stack(self.ratios)[:, None])[0].max()
        return {f"{prefix}/{name}": value for name, value in means.items()}


# ----- Models -----

TINY_STEPS, TINY_BATCH, TINY_LEARNING_RATE, TINY_HELD_OUT = 500, 128, 4e-3, 512
NO_CODE = {"trust_remote_code": False}  # code beside a model is not run, nor is the user asked to


def load_policy(model: str, device: torch.device) -> tuple[PreTrainedTokenizerFast, nn.Module, Tensor]:
    """The tokenizer, the policy in float32 without dropout, and every id that ends a completion."""
    tokenizer, _ = load_tokenizer(model)
    try:
        options = dict(dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **NO_CODE)
        policy, found = AutoModelForCausalLM.from_pretrained(tiny_policy() if model == "tiny" else model, **options)
        lacking = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]  # would be random
        if lacking:
            raise ValueError(f"it has no weights, or none of the right shape, for {', '.join(sorted(lacking))}")
        policy = policy.to(device).eval()
    except Exception as error:  # whatever damaged weights can raise
        raise UserError(f"--model {model} cannot be loaded: {first_sentence(error)}") from None
    ends = [policy.generation_config.eos_token_id, policy.config.get_text_config().eos_token_id, tokenizer.eos_token_id]
    eos_ids = {i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None}
    if not eos_ids:
        raise UserError(f"--model {model} has no end token, so its completions could never end")
    return tokenizer, policy, torch.tensor(sorted(eos_ids), device=device)


def tiny_policy() -> Path:
    """The folder of the tiny model: a Llama of 0.2 M parameters that reads characters, pretrained on the demonstrations
    of the task, and kept under runs/ for as long as these do not change."""
    rng, problems = random.Random(0), tiny_problems()[:-TINY_HELD_OUT]
    texts = [(p.prompt, tiny_demonstration(p, rng)) for p in rng.choices(problems, k=TINY_STEPS * TINY_BATCH)]
    recipe = repr((texts[:1000], TINY_STEPS, TINY_BATCH, TINY_LEARNING_RATE, inspect.getsource(tiny_policy)))
    folder = Path("runs") / f"tiny-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if folder.exists():
        return folder

    tqdm.write("pretraining the tiny model, once", file=sys.stderr)
    characters = sorted({character for text in texts for character in "".join(text)})
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*characters, "<end>"])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    end = tokenizer.eos_token_id
    # Larger initial weights and faster rotations than a large model's: it must find its way about short texts soon.
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 20.0}, initializer_range=0.1, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=end, pad_token_id=end,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TINY_LEARNING_RATE, TINY_STEPS, pct_start=0.15)
    for step in tqdm(range(TINY_STEPS), desc="pretraining the tiny model", unit="step", disable=None):
        batch = texts[step * TINY_BATCH : (step + 1) * TINY_BATCH]
        batch = [(tokenizer(prompt).input_ids, [*tokenizer(completion).input_ids, end]) for prompt, completion in batch]
        ids = [torch.tensor(prompt + completion) for prompt, completion in batch]
        labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in batch]  # no prompt
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)                 # (batch, width)
        model(pad_sequence(ids, batch_first=True, padding_value=end), labels=labels).loss.backward()
        optimizer_step(model, optimizer, max_grad_norm=1.0)
        schedule.step()
    save_model(folder, model, tokenizer)
    return folder


def sharing_is_exact(policy: nn.Module, sampler: nn.Module, problems: list, args: Args, run: "Run") -> bool:
    """Sample and score a few completions, without and with a shared prompt: do the log-probabilities agree? Some model
    families (sliding windows, linear attention) cannot share a prompt, and would be silently wrong."""
    config = policy.config.get_text_config()
    longest = max(len(ids) for ids, _ in problems) + args.max_new_tokens
    window = getattr(config, "sliding_window", None) or longest
    prompts = pad_prompts([ids for ids, _ in problems[:2]], run.device)
    ends = torch.arange(0, config.vocab_size, 5, device=run.device)  # every fifth token ends a row: all at other times
    limit = 1e-3 if run.dtype == torch.float32 else 0.1  # nats; rounding is far below
    uniforms = torch.rand(len(prompts[0]), 3, min(16, args.max_new_tokens), generator=torch.Generator().manual_seed(0))

    def gap(share_prompt: bool) -> float:
        """Between the sampler's log-probabilities and the re-scored ones, in nats per token."""
        rows = prompts if share_prompt else [x.repeat_interleave(3, 0) for x in prompts]
        with torch.no_grad(), run.autocast():
            ids, mask, sampled = generate_completions(sampler, *prompts, uniforms, args.temperature, ends, share_prompt)
            scored, _ = completion_logprobs(policy, *rows, ids, mask, args.temperature)
        return (scored - sampled)[mask].abs().mean().item()

    alone = gap(share_prompt=False)
    if not alone < limit:
        raise UserError(f"this model's log-probabilities cannot be computed again: they are off by {alone:.2g} nats")
    try:
        shared = gap(share_prompt=True)
        reason = "" if shared < limit else f"its log-probabilities would be off by {shared:.2g} nats"
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, ValueError) as error:
        reason = first_sentence(error)
    if window < longest:
        reason = f"it attends to the last {window} tokens of up to {longest}"
    if reason:
        run.say(f"This model cannot share a prompt among its completions, so each gets its own: {reason}.")
    return not reason


def make_sampler(policy: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model that samples: the policy itself, or a whole copy in the dtype of the computation."""
    if dtype == torch.float32 and not dist.is_initialized():
        return policy
    sampler = copy.deepcopy(policy).requires_grad_(False)
    for parameter in sampler.parameters():  # and no buffer: rounded rotary frequencies drift with the position
        parameter.data = parameter.data.to(dtype)
    return sampler


@torch.no_grad()
def refresh_sampler(sampler: nn.Module, policy: nn.Module) -> None:
    """Bring the sampler up to date with the policy after its update."""
    if sampler is not policy:
        for copied, current in zip(sampler.parameters(), policy.parameters(), strict=True):
            copied.copy_(whole(current))


class RoomyLayer(DynamicLayer):
    """A layer of the cache with room for the tokens to come. DynamicLayer copies all it has for every new one."""

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, new tokens, head size); all keys and values so far."""
        start, end = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        for room, new in zip(self.room, (keys, values), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.room = [room[indices] for room in self.room]
        self.keys, self.values = (room[:, :, : self.keys.shape[2]] for room in self.room)


def reserve(cache: Cache, tokens: int) -> None:
    """Make room for so many tokens more, once the prompt is there, in the layers that keep all of them."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = RoomyLayer
            layer.room = [nn.functional.pad(x, (0, 0, 0, tokens)) for x in (layer.keys, layer.values)]
            layer.keys, layer.values = (room[:, :, : layer.keys.shape[2]] for room in layer.room)


def save_model(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, state: dict | None = None) -> None:
    """Save a model in Hugging Face format, with `state` beside it as state.pt. Written aside, flushed and renamed: a
    kill at any moment leaves the whole folder or none. Several processes must all call it; the first one writes."""
    weights = full_state(model)
    if world()[0]:
        return
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        if state:
            torch.save(state, aside / "state.pt")
            files = [path for path in aside.rglob("*") if path.is_file()]
            (aside / "sha256.json").write_text(json.dumps({str(f.relative_to(aside)): digest(f) for f in files}))
        for path in [*aside.rglob("*"), aside]:
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
        if folder.exists():
            folder.rename(aside / "before")
        aside.rename(folder)
        shutil.rmtree(folder / "before", ignore_errors=True)
    except Exception as error:  # a full disk shows as OSError, RuntimeError or an error of safetensors
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{folder} could not be saved: {first_sentence(error)}") from None


def digest(path: Path) -> str:
    """SHA-256 of a file of any size."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**24):
            sha256.update(piece)
    return sha256.hexdigest()


# ----- Processes: torchrun starts several; each samples, and computes gradients, for its share of the rows -----

FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def world() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(*columns):
    """This process's part of every column, a tensor or a list."""
    rank, processes = world()
    parts = [x[len(x) * rank // processes : len(x) * (rank + 1) // processes] for x in columns]
    return parts if len(parts) > 1 else parts[0]


def gather(*columns: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes together, padded to one width."""
    if not dist.is_initialized():
        return columns
    parts = [None] * world()[1]
    dist.all_gather_object(parts, [x.cpu() for x in columns])
    together = [[row for part in column for row in part] for column in zip(*parts, strict=True)]
    return tuple(pad_sequence(rows, batch_first=True).to(columns[0].device) for rows in together)


def add_up(*tensors: Tensor) -> Tensor:
    """Replace each tensor by its sum over the processes, and return the last one."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)
    return tensors[-1]


def whole(x: Tensor) -> Tensor:
    """Of a tensor that is divided among the processes, the whole."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def prepare(model: nn.Module | None, gradient_checkpointing: bool = False) -> None:
    """Wrap the layers of a model for gradient checkpointing, and divide its weights among the processes (FSDP2)."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if model else []
    for layer in layers if gradient_checkpointing else []:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if not model or not dist.is_initialized():
        return
    mesh = init_device_mesh(next(model.parameters()).device.type, (world()[1],))
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # the loss has one denominator for all: gradients add up
        module.set_force_sum_reduction_for_comms(True)


def full_state(part: object) -> dict:
    """The state of a model, of (model, its optimizer) or of a controller, for any number of processes."""
    if isinstance(part, nn.Module):
        return dcp.get_model_state_dict(part, options=FULL)
    if isinstance(part, tuple):  # of an optimizer that has not stepped yet, dcp would count a step that never was
        return dcp.get_optimizer_state_dict(*part, options=FULL) if part[1].state else {}
    return part.state_dict()


def load_full_state(part: object, state: dict) -> None:
    """Undo `full_state`, whatever the number of processes that saved."""
    if isinstance(part, nn.Module):
        dcp.set_model_state_dict(part, state, options=FULL)
    elif not isinstance(part, tuple):
        part.load_state_dict(state)
    elif state:
        dcp.set_optimizer_state_dict(*part, state, options=FULL)


# ----- The run: its folder, checkpoints, curves, progress bar, signals -----


def main(args: Args) -> int:
    """Train, and turn what a user can mend into one sentence. Returns the exit code."""
    code, sentence = 0, ""
    try:
        train(args)
    except UserError as error:
        code, sentence = 2, str(error)
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory", str(error)):  # as a GPU says it, and as a CPU does
            raise
        flags = "a lower --micro-batch-tokens, --num-prompts or --group-size helps, as does --gradient-checkpointing"
        code, sentence = 2, f"out of memory: {flags}"
    except KeyboardInterrupt:  # before the first step: there is nothing to save yet
        code = 130
    if sentence:
        print(f"{Path(__file__).name}: {sentence}", file=sys.stderr)
    if dist.is_initialized():
        if not code or dist.get_backend() != "nccl":  # else that would wait for the others, who wait for us
            dist.destroy_process_group()
        os._exit(code)  # at the interpreter's own end, a thread that gloo has left sometimes aborts it
    return code


def keep_memory() -> None:
    """The memory of one step is that of the next. glibc's malloc would give it back to the system in between, which
    hands it out again page by page: measured, nearly half of the time of a bfloat16 update."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger blocks still go back at once, else they leave holes


def seed_step(seed: int, step: int) -> torch.Generator:
    """Every random number of a step follows from (seed, step), so a resumed run needs no random state to go on."""
    random.seed(f"{seed} {step}")
    torch.manual_seed(seed * 1_000_003 + step)
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Run:
    """What a run shows and keeps, in runs/RUN_NAME/: curves, checkpoints in step_*/, the trained model in policy/."""

    # Arguments that may change when a run goes on from a checkpoint.
    FREE = ("num_steps", "micro_batch_tokens", "gradient_checkpointing", "device", "run_name", "resume", "save_every",
            "eval_every")
    MOST_SKIPPED = 5  # steps in a row whose gradient is not finite

    def __init__(self, args: Args, script: str):
        self.args, self.script = args, script
        self.step, self.before, self.laps, self.skipped, self.asked, self.stopping = 0, {}, {}, 0, False, False
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(name for name in here if here[name]) if args.device == "auto" else args.device
        if not here[name]:
            raise UserError(f"--device {name}: there is none on this machine")
        self.device = torch.device(name)
        if "RANK" in os.environ and not dist.is_initialized():  # set by torchrun
            if name == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            own = dict(backend="nccl", device_id=self.device) if name == "cuda" else dict(backend="gloo")
            dist.init_process_group(timeout=timedelta(hours=2), **own)  # one may be writing a large checkpoint
        if args.num_prompts // args.num_minibatches < world()[1]:
            raise UserError(f"{world()[1]} processes need as many --num-prompts for each of --num-minibatches")
        native = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        fast = native or (name == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))
        bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and fast and args.model != "tiny")
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        default = f"{script}-{Path(args.model).name}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path("runs") / (args.run_name or default)
        if self.folder.exists() and not args.resume and world()[0] == 0:
            raise UserError(f"{self.folder} holds a run: go on with it (--resume auto) or choose another --run-name")
        if args.resume == "auto" and not args.run_name:
            raise UserError("--resume auto needs the --run-name of the run that is to go on")
        if args.resume not in (None, "auto") and not Path(args.resume).is_dir():
            raise UserError(f"--resume {args.resume}: there is no such folder of a checkpoint")
        keep_memory()
        # cuDNN's attention with a mask has had NaN gradients and wrong decoding (pytorch issues 196678 and 193893).
        torch.backends.cuda.enable_cudnn_sdp(False)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def autocast(self) -> torch.autocast:
        """bfloat16 computation over float32 master weights, where `dtype` says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def say(self, text: str) -> None:
        """Print a line above the progress bar, once for all processes."""
        if world()[0] == 0:
            tqdm.write(text, file=sys.stderr)

    def checkpoints(self) -> list[Path]:
        """Of this run, the newest first."""
        return sorted(self.folder.glob("step_*"), key=lambda folder: folder.stat().st_mtime, reverse=True)

    def load_checkpoint(self, tokenizer: PreTrainedTokenizerFast, state: dict[str, object]) -> None:
        """Remember what a checkpoint holds, by name, and load the one that --resume names, if any."""
        self.tokenizer, self.state = tokenizer, {name: part for name, part in state.items() if part is not None}
        if not self.args.resume:
            return
        folders = self.checkpoints() if self.args.resume == "auto" else [Path(self.args.resume)]
        if not folders:
            self.say(f"{self.folder} holds no checkpoint yet: starting from the beginning")
            return
        for folder in folders:
            try:
                for name, expected in json.loads((folder / "sha256.json").read_text()).items():
                    if digest(folder / name) != expected:
                        raise ValueError(f"{name} is damaged")
                saved = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
                changed = self.changed_arguments(saved["args"])
                weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **NO_CODE).state_dict()
            except Exception as error:  # whatever a damaged file can raise: it is named, and the one before is tried
                self.say(f"{folder} cannot be loaded: {first_sentence(error)}")
                continue
            if changed:
                raise UserError(f"{folder} is of a run with other arguments: {', '.join(changed)}")
            for name, part in self.state.items():
                load_full_state(part, weights if name == "policy" else saved[name])
            self.step, self.before = saved["step"], saved["before"]
            self.say(f"going on from {folder}")
            return
        others = {*folders[0].parent.glob("step_*")} - {*folders}
        instead = f"; there is also {', '.join(map(str, sorted(others)))}" if others else ""
        raise UserError(f"--resume {self.args.resume}: no checkpoint that can be loaded{instead}")

    def changed_arguments(self, before: dict) -> list[str]:
        """Those that differ from a checkpoint's and may not."""
        now = {"script": self.script, **vars(self.args)}
        changed = [name for name in now if name not in self.FREE and now[name] != before.get(name)]
        return [f"--{name.replace('_', '-')} was {before.get(name)}, is {now[name]}" for name in changed]

    def save_checkpoint(self) -> None:
        """Keep the policy and all that is needed to go on; of the checkpoints of a run, the last two stay."""
        parts = {name: full_state(part) for name, part in self.state.items() if name != "policy"}
        parts |= {"step": self.step, "before": self.before, "args": {"script": self.script, **vars(self.args)}}
        save_model(self.folder / f"step_{self.step:06d}", self.state["policy"], self.tokenizer, parts)
        for old in self.checkpoints()[2:] if world()[0] == 0 else []:
            shutil.rmtree(old)

    def begin(self, problems: list, held_out: list, evaluation: Callable[[], dict]) -> None:
        """Say what will be done, open the curves, and evaluate the policy as it is."""
        self.evaluation, self.started = evaluation, time.monotonic()
        size = sum(parameter.numel() for parameter in self.state["policy"].parameters())
        trained = sum(isinstance(part, tuple) for part in self.state.values())  # models with an optimizer
        self.writer = None
        try:
            if world()[0] == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in [*self.folder.glob(".step_*"), *self.folder.glob(".policy.*")]:
                    shutil.rmtree(left)  # by a save that was killed
                needed, free = 3 * 12e-9 * size * trained, 1e-9 * shutil.disk_usage(self.folder).free
                if free < needed:
                    raise OSError(f"three checkpoints need {needed:.1f} GB and {free:.1f} GB are free")
                self.writer = SummaryWriter(str(self.folder), purge_step=self.step and self.step + 1)
        except OSError as error:
            raise UserError(f"the run cannot be kept in {self.folder}: {error}") from None
        processes = f" in {world()[1]} processes" if dist.is_initialized() else ""
        self.say(
            f"{self.script}: {size / 1e6:.1f} M parameters in {str(self.dtype)[6:]} on {self.device.type}{processes}, "
            f"{len(problems)} problems to train on, {len(held_out)} held out, in {self.folder}"
        )
        if self.args.eval_every and self.step == 0:
            self.before = self.show_evaluation()

    def score(self, completions: list[str], answers: list[str]) -> Tensor:
        """The rewards of this process's share of the completions, and then those of all: (N,)."""
        found = []
        for completion, answer in zip(*share(completions, answers), strict=True):
            try:
                found.append(float(reward(completion, answer)))
                wrong = None if math.isfinite(found[-1]) else f"returned {found[-1]}"
            except Exception as error:  # the task's own code
                wrong = f"raised {error!r}"
            if wrong:
                found.append(math.nan)
                print(f"the reward {wrong} for the completion {completion!r} to {answer!r}", file=sys.stderr)
                break
        (scores,) = gather(torch.tensor(found, device=self.device)[:, None])
        if not scores.isfinite().all():
            self.fail("the reward of a completion is no finite number")
        return scores[:, 0]

    def fail(self, reason: str) -> None:
        """Keep what was learned, and stop with a sentence."""
        if self.step:
            self.save_checkpoint()
            add_up(torch.zeros((), device=self.device)).item()  # the others wait for the one that writes
            reason += f"; {self.step} steps are kept: go on with --run-name {self.folder.name} --resume auto"
        raise UserError(reason)

    def curve(self, metrics: dict[str, float]) -> None:
        """One point on every curve. A full disk ends the curves, not the run."""
        try:
            for name, value in metrics.items() if self.writer else ():
                self.writer.add_scalar(name, value, self.step)
            if self.writer:
                self.writer.flush()  # before the checkpoint: who is killed after it misses no point
        except OSError as error:
            self.writer = None
            self.say(f"the curves end here, the run goes on: {error}")

    def show_evaluation(self) -> dict[str, float]:
        """Evaluate, and show the result as a line and on the curves."""
        found = self.evaluation()
        self.curve(found)
        accuracy = "held-out accuracy {:.3f} greedy, {:.3f} sampled, {:.1f} tokens".format(*found.values())
        self.say(f"step {self.step}: {accuracy}")
        return found

    def steps(self) -> Iterator[int]:
        """The steps still to do. SIGINT and SIGTERM end them after the one under way; a second one ends at once."""

        def stop(number: int, _: object) -> None:
            self.asked = True
            for each in self.handlers:
                signal.signal(each, signal.SIG_DFL)
            if world()[0] == 0:  # not by print, which may be at work already
                os.write(2, b"\nfinishing this step, then saving; once more to leave at once\n")

        self.handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        show = dict(desc=self.script, unit="step", disable=True if world()[0] else None)
        with tqdm(initial=self.step, total=self.args.num_steps, **show) as self.bar:
            while self.step < self.args.num_steps and not self.stopping:
                self.clock, self.laps = time.perf_counter(), {}
                yield self.step  # `log` counts it
                self.bar.update()

    def lap(self, name: str) -> None:
        """The seconds since the last lap are those of `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name], self.clock = now - self.clock, now

    def log(self, metrics: dict[str, Tensor | float]) -> None:
        """One point on every curve, and the progress bar. Point n is that of the n-th step."""
        self.step += 1
        metrics = {name: float(value) for name, value in metrics.items()} | self.laps
        tokens = metrics["completion/length"] * self.args.num_prompts * self.args.group_size
        metrics["time/tokens_per_second"] = tokens / sum(self.laps.values())
        self.curve(metrics)
        self.bar.set_postfix_str(
            "reward {reward/mean:.2f}, length {completion/length:.1f}, KL {policy/kl:.3f}, "
            "{time/tokens_per_second:.0f} tokens/s".format_map(metrics)
        )
        self.skipped = self.skipped + 1 if metrics["policy/skipped"] or metrics.get("value/skipped") else 0
        if self.skipped == 1:
            self.say(f"step {self.step}: the gradient was not finite, so its update was skipped")
        if self.skipped == self.MOST_SKIPPED:
            self.fail(f"the gradient was not finite in {self.skipped} steps in a row: a lower --learning-rate may help")

    def after_step(self, seen: list[tuple[str, float]]) -> None:
        """Evaluate, show completions that were just `seen` as (text, reward), and save, whenever that is due."""
        self.stopping = bool(add_up(torch.tensor(float(self.asked), device=self.device)))  # all or none
        last = self.stopping or self.step == self.args.num_steps
        if self.args.eval_every and (self.step % self.args.eval_every == 0) and not last:
            self.show_evaluation()
            for text, score in seen:
                self.say(f"    reward {score:.2f}: {' '.join(text.split())[-150:]}")
        if self.args.save_every and (self.step % self.args.save_every == 0) and not last:
            try:
                self.save_checkpoint()
            except UserError as error:  # there is still the one before
                self.say(f"{error}; the run goes on")

    def finish(self) -> Path:
        """Evaluate a last time, save, and say in a line what was learned, where it is, and how to see it."""
        if self.args.eval_every and self.laps and not self.stopping:  # once, in whatever part of the run
            after = self.show_evaluation()
            if self.before:
                changes = [f"{self.before[name]:.3g} -> {after[name]:.3g}" for name in after]
                self.say("held-out accuracy {} greedy, {} sampled; length {} tokens".format(*changes))
        if self.laps:
            self.save_checkpoint()
        save_model(self.folder / "policy", self.state["policy"], self.tokenizer)
        if self.writer:
            self.writer.close()
        self.say(f"{self.step} steps, {time.monotonic() - self.started:.0f} s; trained model: {self.folder / 'policy'}")
        if self.stopping:
            self.say(f"to go on: the same command with --run-name {self.folder.name} --resume auto")
        self.say("curves: tensorboard --logdir runs")
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        return self.folder / "policy"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
