# SPDX-License-Identifier: MIT
"""PPO on a language model: Proximal Policy Optimization for RLHF, complete in this file, advantage.py and kl.py.

Papers: PPO (arXiv 1707.06347), GAE (1506.02438), InstructGPT (2203.02155) and Ziegler et al. (1909.08593) for language
models, DeepSeekMath (2402.03300) Eqs. 1 and 2 for the notation that grpo.py shares.

The policy pi_theta is a causal language model. A state s_t is a prompt and the tokens so far, an action a_t is the next
token, and an episode is a completion. Each step:

    1. Generate completions with the old policy                                    generate_completions
    2. Estimate the KL from the reference policy and put it into the rewards       kl_estimate (kl.py), rewards_with_kl
    3. Compute the advantages with the value model                                 completion_values, gae (advantage.py)
    4. Update policy and value model on the clipped objectives, K epochs           policy_loss, value_loss

grpo.py asks how much better a completion is than its group. Here the value model predicts the reward from every prefix,
so one completion per prompt is enough and every token gets an advantage of its own. And the KL enters the reward before
the advantages are computed, where GRPO has it in the loss: earlier tokens, too, pay for the KL that they lead to.
Advantage and KL still pull against each other, but inside one sum of rewards.

    symbol       name in the code    shape        meaning
    G            group_size          scalar       completions per prompt, usually 1
    K            update_epochs       scalar       passes over the completions of one step
    q            prompt_ids          (B, P)       B prompts of at most P tokens, left-padded
    a_t, o_t     completion_ids      (N, T)       N = B G completions of at most T tokens, right-padded
    |o|          completion_mask     (N, T)       true through the EOS token, which is trained too; sums to |o|
    r_phi        rewards             (N,)         the reward of a completion
    r_t          token_rewards       (N, T)       -beta log(pi_old / pi_ref), and r_phi on the last token
    V(s_t)       values              (N, T)       what the value model expects from s_t on, in units of reward
    A_t          advantages          (N, T)       how much better a_t was than V(s_t) predicted
    V_t^targ     returns             (N, T)       A_t + V(s_t), before the advantages are whitened
    pi_theta     logprobs            (N, T)       log pi_theta(a_t | s_t) at the sampling temperature, in nats
    pi_old       old_logprobs        (N, T)       the same under the parameters that sampled
    pi_ref       ref_logprobs        (N, T)       the same under the reference policy, which is frozen
    r_t(theta)   ratio               (N, T)       pi_theta / pi_old (the PPO paper calls ratio and reward r_t)
    1/(BG|o|)    weights             (N, T)       the weight of a token in the losses, by default

Differs from the papers, each marked "Differs" where it happens: InstructGPT's Eq. 2 has one KL per completion, which
its tokens pay here, and a pretraining term, which is left out; the value model shares no parameter with the policy, so
Eq. 9 splits into two losses, each with its own AdamW, and needs no c_1; the value loss has the 1/2 and the clipping of
Ziegler et al.'s code, whose whitening of the advantages is here, too; the value model trains alone in the first steps;
Eq. 8's KL is k3 of the sampled tokens; constant learning rates, gradient clipping, and no update where the gradient is
0 or not finite; a truncated completion counts as ended (advantage.py).

    python ppo.py                                      a tiny model learns two-digit addition, without any download
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --eval-data test.jsonl --max-new-tokens 512

The algorithm comes first. Below SPEED is what gives the same numbers, up to rounding, in less time or memory; below
PLUMBING are files, processes and errors. For a task of your own, copy this file with advantage.py and kl.py and change
the block marked CHANGE THIS.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: spinning threads starve a busy machine

import torch
import torch.distributed as dist
import tyro
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
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
    """training problems, JSON lines with "question" or "prompt" (text or chat messages) and "answer" """
    eval_data: str | None = None
    """held-out problems in the same format; default: the tiny model's own, or a random tenth of --data, at most 256"""
    num_prompts: int = 256
    """B: prompts per step"""
    group_size: int = 1
    """G: completions per prompt"""
    max_new_tokens: int = 32
    """T: maximum completion length in tokens; real models need more, such as 512"""
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
    """AdamW's learning rate; default: 5e-4 for the tiny model, 1e-6 for others (DeepSeekMath 4.2)"""
    max_grad_norm: float = 1.0
    """gradient clipping: gradients with a larger norm are scaled down to this norm"""
    # The value model and the advantage
    value_learning_rate: float | None = None
    """of the value model's AdamW; by default 1e-3 for the tiny model, else 1e-5"""
    value_warmup_steps: int = 5
    """first steps that train only the value model: it starts at 0 and predicts nothing until it has seen rewards"""
    value_clip_eps: float = 0.2
    """a value further than this from its old value gets no more gradient; in units of reward (Ziegler et al.'s code)"""
    gamma: float = 1.0
    """discount per token (GAE Eq. 16); 1: none (InstructGPT)"""
    gae_lambda: float = 0.95
    """lambda of GAE Eq. 16: 0 trusts the value model, 1 the rewards"""
    whiten_advantages: bool = True
    """shift and scale the advantages of a step to mean 0 and variance 1"""
    whiten_rewards: bool = False
    """scale the token rewards of a step to variance 1 around their mean (Ziegler et al.'s code)"""
    # The KL penalty
    beta: float = 0.02
    """weight of the KL from the reference policy (InstructGPT: 0.02); 0 loads no reference policy"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """estimator of KL[policy, reference]: k1 is InstructGPT Eq. 2; in the loss, k1 has mean gradient 0, see kl.py"""
    kl_placement: Literal["loss", "reward"] = "reward"
    """"reward": DeepSeekMath Eq. 2, InstructGPT Eq. 2; "loss": added to the policy loss as in GRPO"""
    adaptive_kl_target: float | None = None
    """steer beta so that the KL of a completion is this many nats (Ziegler et al.); by default beta is constant"""
    # The policy loss
    clip_eps: float = 0.2
    """eps: the ratio is clipped to [1 - eps, 1 + eps] (PPO Eq. 7, DeepSeekMath Eq. 3)"""
    clip_eps_high: float | None = None
    """upper eps, if different from the lower one (DAPO's clip-higher: 0.28)"""
    penalty_kl_target: float | None = None
    """instead of clipping, penalise KL[pi_old, pi_theta] and steer it to this many nats a token (PPO Eq. 8)"""
    entropy_coef: float = 0.0
    """c_2: weight of the entropy bonus (PPO Eq. 9)"""
    early_stop_kl: float | None = None
    """skip the other epochs of a step once KL[pi_old, pi_theta] exceeds this many nats a token"""
    loss_average: Literal["sequence", "token", "constant"] = "sequence"
    """"sequence": 1/|o_i| sum_t (DeepSeekMath Eq. 3); "token": all tokens alike (DAPO Eq. 8); "constant": Dr. GRPO"""
    # The machine
    share_prompt: bool = True
    """run a prompt once for all its completions in a micro-batch, as in sampling; off if the model cannot do that"""
    micro_batch_tokens: int = 8192
    """maximum tokens, with padding, in a micro-batch of the update; changes gradients only by rounding"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass instead of storing them: less memory, slower, no shared prompts"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute dtype; weights stay float32; auto: bfloat16 if it is fast and the model has over 10 M parameters"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: the first of cuda, mps and cpu that is available"""
    # The run
    seed: int = 1
    """every random number of step s follows from (seed, s)"""
    run_name: str | None = None
    """the run is kept in runs/RUN_NAME; default name: script, model, seed and time"""
    resume: str | None = None
    """"auto": resume RUN_NAME from its checkpoint, if it has one; or the path of a checkpoint.pt"""
    save_every: int = 50
    """steps between checkpoints; 0: only at the end"""
    eval_every: int = 20
    """steps between evaluations on the held-out problems; 0: never, not even at the start and end"""


# ============================ CHANGE THIS: the task =============================
# A task is read_prompt, reward and compute_rewards; nothing outside this block knows it. Here a completion must end in
# the right number, after the marker "#". The files of GSM8K are in this format.

INSTRUCTION = "\nThink step by step, then end with the final number after ####."


def read_prompt(problem: dict) -> str | list[dict[str, str]]:
    """The prompt of a problem, a line of --data: text, or chat messages with "role" and "content". A "prompt" is used
    as it is; INSTRUCTION is appended to a "question". If it raises an error, the line is refused."""
    if not isinstance(problem["answer"], str) or final_number("#" + problem["answer"]) is None:
        raise ValueError('"answer" must be a string that ends in one number, alone or after ####')
    return problem["prompt"] if "prompt" in problem else problem["question"] + INSTRUCTION


def final_number(text: str) -> Decimal | None:
    """The number after the last "#", or None if there is not exactly one: a list of guesses is not an answer."""
    words = text.replace("\N{MINUS SIGN}", "-").rpartition("#")[2].split() if "#" in text else []
    # Words without a digit may stand beside the number, but not a lone minus sign: "- 3" is no number, nor is it 3.
    words = [word.lstrip("*(").rstrip("*).,;:!?%") for word in words if re.search("[0-9]|^-$", word)]
    word = words[0].replace("$", "", 1) if len(words) == 1 else ""
    is_number = re.fullmatch(r"[-+]?(([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?|\.[0-9]+)", word)
    return Decimal(word.replace(",", "")) if is_number else None


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
    """B prompts and their N = B G completions: G to the first prompt, then G to the second, and so on. Below, B' and N'
    are those of a part: a process's, a minibatch, or a micro-batch, which is cut to its own longest T."""

    prompt_ids: Tensor          # (B, P), left-padded
    prompt_mask: Tensor         # (B, P), bool, true on the tokens
    completion_ids: Tensor      # (N, T), right-padded
    completion_mask: Tensor     # (N, T), bool, true through the EOS token
    sampler_logprobs: Tensor    # (N, T), from the sampler, whose weights may be bfloat16; for policy/sampler_gap
    old_logprobs: Tensor | None = None  # (N, T), and so are all below
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None


# ----- 1. Generate completions: o_1 .. o_G ~ pi_old(. | q) -----


def next_problems(problems: list, step: int, num_prompts: int, seed: int) -> list:
    """The B problems of a step. Every pass over the data has a new random order and drops the remainder. The order
    follows from (seed, step), so a resumed run neither skips nor repeats a problem."""
    data_epoch, place = divmod(step, len(problems) // num_prompts)
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed * 1_000_003 + data_epoch))
    return [problems[i] for i in order[place * num_prompts : (place + 1) * num_prompts].tolist()]


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token for each row of logits, (R, V), from softmax(logits / temperature), without top-k or top-p; the most
    probable at temperature 0. uniforms: (R,), in [0, 1). Returns tokens and log-probabilities in nats, both (R,)."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)                          # (R, V)
    if temperature == 0:
        tokens = logp.argmax(-1)                                                            # (R,)
    else:
        # The first token whose cumulative probability exceeds the random number. By rounding, the total is not exactly
        # 1, and in float32 a random number just below 1 can be 1.
        cdf = logp.exp().cumsum(-1, dtype=uniforms.dtype)                                   # (R, V)
        threshold = uniforms[:, None].clamp(max=1 - torch.finfo(uniforms.dtype).eps) * cdf[:, -1:]  # (R, 1)
        tokens = torch.searchsorted(cdf, threshold, right=True)[:, 0]                       # (R,)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


@torch.no_grad()
def generate_completions(
    policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, temperature: float, eos_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample G completions per prompt, token by token, each until an EOS token or T tokens.

    Args: prompt_ids, prompt_mask (B, P), as in `Batch`; eos_ids (E,); uniforms (N, T), N = B G, one random number per
        token, drawn in advance, so that a completion depends neither on the other rows nor on the process.
    Returns: completion_ids, completion_mask, logprobs: (N, T), where T is now the length of the longest completion.
    """
    # float64 keeps the rare tokens of a large vocabulary apart; MPS has no float64.
    dtype = torch.float32 if prompt_ids.device.type == "mps" else torch.float64
    uniforms = uniforms.to(prompt_ids.device, dtype)                                        # (N, T)
    ids = prompt_ids.new_zeros(uniforms.shape)                                              # (N, T)
    logprobs = torch.zeros_like(uniforms, dtype=torch.float32)                              # (N, T)
    running = torch.ones_like(ids[:, 0], dtype=torch.bool)                                  # (N,), no EOS token yet
    decoder = Decoder(policy, prompt_ids, prompt_mask, ids.shape)                           # repeats a prompt G times
    for t in range(ids.shape[1]):
        # The logits after q and o_{<t}. Rows that have ended may be among them: the mask removes their tokens.
        rows, logits = decoder.next_logits(ids[:, :t], running)                             # (R,); (R, V)
        if len(rows) == 0:
            break
        ids[rows, t], logprobs[rows, t] = sample_tokens(logits, uniforms[rows, t], temperature)
        running = running & ~torch.isin(ids[:, t], eos_ids)
    is_end = torch.isin(ids, eos_ids).long()                                                # (N, T)
    mask = is_end.cumsum(1) - is_end == 0           # (N, T), true through the first EOS token; the rest is ignored
    longest = int(mask.sum(1).max())
    return tuple(x[:, :longest] for x in (ids.where(mask, 0), mask, logprobs.where(mask, 0.0)))


# ----- Log-probabilities: log pi(o_{i,t} | q, o_{i,<t}), for the ratio and for the KL -----


def predict_completions(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output in every state s_t = (q, o_{<t}), (N, T, V): logits that predict o_t, or V = 1 value."""
    if len(batch.prompt_ids) < len(batch.completion_ids):
        return predict_shared(model, batch)  # the same, but each prompt runs once for its completions: see SPEED
    # Here every completion has a copy of its prompt: B = N. Both in one row, padding last, so that the model needs
    # neither mask nor positions.
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], 1)                         # (N, P + T)
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)[mask].split(mask.sum(1).tolist())
    ids = pad_sequence(ids, batch_first=True)                                               # (N, L)
    # Position j predicts token j + 1, so the first one is predicted at the last token of the prompt.
    t = torch.arange(batch.completion_ids.shape[1], device=ids.device)                      # (T,)
    before = (batch.prompt_mask.sum(1, keepdim=True) - 1 + t).clamp(max=ids.shape[1] - 1)   # (N, T), any in the padding
    # Two-dimensional logits_to_keep: the positions of each row that are projected to logits.
    return model(input_ids=ids, use_cache=False, logits_to_keep=before).logits              # (N, T, V)


def completion_logprobs(
    policy: nn.Module, batch: Batch, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_{<t}) and the entropy of pi(. | q, o_{<t}), both (N, T), in nats, 0 in the padding. A bonus for
    the entropy (PPO Eq. 9) needs its gradient, which costs memory; a metric does not."""
    logits = predict_completions(policy, batch)                                             # (N, T, V)
    assert logits.shape[:2] == batch.completion_ids.shape, "the model ignores logits_to_keep"
    # A log-probability near -6 would be off by up to 0.016 in bfloat16, so log_softmax runs in float32.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)           # (N, T, V)
    logprobs = logp.gather(2, batch.completion_ids[..., None])[..., 0]                      # (N, T)
    entropy = token_entropy(logp if entropy_gradient else logp.detach())                    # (N, T), -sum_v pi log pi
    return logprobs.where(batch.completion_mask, 0.0), entropy.where(batch.completion_mask, 0.0)


# ----- Values: V(s_t), what the value model expects from a prefix on -----


class ValueModel(nn.Module):
    """The policy's transformer with a scalar head instead of the output layer. It starts at V = 0 everywhere."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.config = policy.config  # for `split_minibatch`
        self.backbone = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.get_output_embeddings().weight.shape[1], 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, logits_to_keep: Tensor, **inputs: object) -> CausalLMOutputWithPast:
        """As a language model whose vocabulary is one value: its logits are (N, T, 1)."""
        output = self.backbone(**inputs)
        states = slice_logits_to_keep(output.last_hidden_state, logits_to_keep)
        return CausalLMOutputWithPast(logits=self.head(states), cache=output.cache)


def completion_values(value_model: ValueModel, batch: Batch) -> Tensor:
    """V(s_t) of the state s_t = (q, o_{<t}) before each token, (N, T), in units of reward, 0 in the padding."""
    values = predict_completions(value_model, batch)[..., 0]                                # (N, T)
    return values.to(torch.promote_types(values.dtype, torch.float32)).where(batch.completion_mask, 0.0)


# ----- 2. Token rewards: the KL penalty on every token, the completion's reward on the last -----


def rewards_with_kl(rewards: Tensor, kl: Tensor, completion_mask: Tensor, beta: float) -> Tensor:
    """r_t = r_phi [t is the last token] - beta kl_t (DeepSeekMath Eq. 2), without gradient.

    Args: rewards (...), one per completion; kl, completion_mask (..., T), kl as from `kl_estimate`.
    Returns: (..., T), 0 in the padding. A completion's token rewards sum to its reward less beta times its KL.
    """
    # Differs: InstructGPT Eq. 2 takes one KL off the whole reward, the sum of these, and adds a pretraining term.
    assert (*rewards.shape, completion_mask.shape[-1]) == kl.shape == completion_mask.shape
    last = completion_mask & (completion_mask.sum(-1, keepdim=True) == completion_mask.cumsum(-1))  # one a completion
    return (rewards[..., None].where(last, 0.0) - beta * kl).where(completion_mask, 0.0).detach()   # (..., T)


# ----- 4. The losses: PPO Eq. 7, and that of the value model (3. is gae in advantage.py) -----


def loss_weights(token_mask: Tensor, loss_average: str, max_new_tokens: int) -> Tensor:
    """The weight of each token in the loss: (..., T), 0 where token_mask, (..., T), is false.

    The weights are computed over the whole batch of N completions. The losses and gradients of micro-batches therefore
    add up to those of the batch, however it is split.

        "sequence"  1/N 1/|o_i|               every completion counts the same (DeepSeekMath Eqs. 1 and 3)
        "token"     1 / sum_i |o_i|           every token counts the same, so long completions count more (DAPO Eq. 8)
        "constant"  1 / (N max_new_tokens)    a constant instead of |o_i|: no length bias (Dr. GRPO)
    """
    # Differs: DAPO averages over the tokens of a group, then over groups. Here, as is usual, over all tokens at once.
    mask = token_mask.float()                                                               # (..., T)
    num_completions = mask[..., 0].numel()
    if loss_average == "sequence":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / num_completions
    if loss_average == "token":
        return mask / mask.sum().clamp(min=1)
    if loss_average == "constant":
        return mask / (num_completions * max_new_tokens)
    raise ValueError(f"loss_average must be one of sequence, token, constant, got {loss_average!r}")


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor, weights: Tensor,
    clip_eps: float = 0.2, clip_eps_high: float | None = None, beta_old: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-L^CLIP of PPO Eq. 7: -sum_t weight * min[r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t].

    Args:
        logprobs, old_logprobs: (..., T), in nats; only the first carries a gradient.
        advantages, completion_mask, weights: (..., T); weights as from `loss_weights`.
        beta_old: if given, PPO Eq. 8 instead: -sum_t weight * (r_t A_t - beta_old KL[pi_old, pi_theta]).
    Returns: the loss, a scalar, and the metrics ratio, clip_frac and approx_kl, each (..., T) without gradient.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == completion_mask.shape == weights.shape
    # The padding is masked before exp: an overflow there would make its gradient NaN instead of 0.
    log_ratio = (logprobs - old_logprobs).where(completion_mask, 0.0)                       # (..., T)
    advantages = advantages.where(completion_mask, 0.0)                                     # (..., T)
    ratio = log_ratio.exp()                                                                 # (..., T), r_t, PPO Eq. 6

    # PPO Eq. 7, a pessimistic bound: the gradient is 0 only where the ratio has left the clip range in the direction in
    # which the advantage pushes it.
    unclipped = ratio * advantages                                                          # (..., T)
    clipped = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high)) * advantages
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
    """sum_t weight * 1/2 max[(V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2].

    Args:
        values, old_values, returns, completion_mask, weights: (..., T); only the first carries a gradient.
        value_clip_eps: in units of reward.
    Returns: the loss, a scalar, and where the clipping decides, (..., T), as 0 and 1.
    """
    assert values.shape == old_values.shape == returns.shape == completion_mask.shape == weights.shape
    # Differs: PPO Eq. 9 has (V - V^targ)^2. The 1/2 and the clipping are Ziegler et al.'s.
    values, old_values, returns = (x.where(completion_mask, 0.0) for x in (values, old_values, returns))
    # V_old + clip(V - V_old, -eps, eps); this way a V inside the range stays exactly V.
    clipped_values = values.clamp(old_values - value_clip_eps, old_values + value_clip_eps)  # (..., T)
    errors, clipped_errors = (values - returns).square(), (clipped_values - returns).square()  # (..., T), twice
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
    """Train a policy. Returns its folder, in Hugging Face format. Setting `stop` ends the run after its step."""
    args = check_args(args)
    device = start(args)
    tokenizer, eos_ids, problems, held_out = load_problems(args, device)
    policy = load_policy(args.model, device)            # dropout is off: with it, the first ratio would not be 1
    ref_policy = copy.deepcopy(policy).requires_grad_(False) if args.beta else None         # no KL, no reference
    value_model = ValueModel(policy)                                                        # Differs: no shared weights
    args, sampler = prepare(args, policy, [ref_policy, value_model], problems)  # tries and shards them: before AdamW
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    # Differs: constant learning rates, and `optimizer_step` clips the gradient.
    adamw = partial(torch.optim.AdamW, weight_decay=0.0, fused=True)
    optimizer = adamw(policy.parameters(), args.learning_rate)
    value_optimizer = adamw(value_model.parameters(), args.value_learning_rate)
    models = {"policy": (policy, optimizer), "ref_policy": (ref_policy, None),              # what a checkpoint holds
              "value_model": (value_model, value_optimizer)}
    betas = {"ref": args.beta, "old": 1.0}              # of the KL from pi_ref and of that from pi_old (Eq. 8)
    run = Run(args, tokenizer, eos_ids, problems, held_out, sampler, models, betas, stop)
    if args.value_warmup_steps >= args.num_steps:
        say("the policy will not learn: --value-warmup-steps, for the value model alone, is not below --num-steps")
    # One update per minibatch of prompts. Minibatches are never reshuffled.
    minibatches = torch.arange(args.num_prompts).chunk(args.num_minibatches)                # each (B',)
    score = lambda model, part: completion_logprobs(model, part, args.temperature)[0]       # (N', T)
    for step in run.bar:                                # from 0, or the checkpoint's step, through num_steps
        if run.evaluate_and_save(step):                 # when it is due; true after the last step or a signal
            break
        refresh_sampler(sampler, policy)                                                    # pi_old <- pi_theta

        # ---- 1. Generate completions, actions a_t ~ pi_old(. | s_t), and compute their rewards r_phi ----
        chosen = next_problems(problems, step, args.num_prompts, args.seed)                 # B pairs (prompt, problem)
        prompt_ids, prompt_mask = pad_prompts([prompt for prompt, _ in chosen], device)     # (B, P), each
        shape = args.num_prompts * args.group_size, args.max_new_tokens
        uniforms = torch.rand(shape, dtype=torch.float64, generator=reseed(args.seed, step))  # (N, T)
        # Each process does its own part of the prompts. After `all_gather` every process has all N completions.
        own_ids, own_mask, own_logprobs = generate_completions(
            sampler, own_part(prompt_ids), own_part(prompt_mask), own_part(uniforms), args.temperature, eos_ids
        )
        own_problems = [problem for _, problem in own_part(chosen) for _ in range(args.group_size)]
        own_rewards = run.guard(compute_rewards, decode(tokenizer, own_ids, own_mask, eos_ids), own_problems)
        rewards = all_gather(own_rewards)                                                   # (N,), r_phi
        batch = Batch(prompt_ids, prompt_mask, *(all_gather(x) for x in (own_ids, own_mask, own_logprobs)))
        ended = (torch.isin(batch.completion_ids, eos_ids) & batch.completion_mask).any(-1)  # (N,)
        run.lap("time/sample")

        # ---- 2. The KL from the reference goes into the reward of every token ----
        # pi_old, pi_ref and V are scored without gradient. pi_old is the trainer's own forward pass under the weights
        # that sampled, on the micro-batches of the update, so that the first ratio is exactly 1.
        with torch.no_grad(), autocast:
            old_logprobs = score_batch(score, policy, batch, minibatches, args)             # (N, T)
            ref_logprobs = score_batch(score, ref_policy, batch, minibatches, args) if ref_policy else old_logprobs
            old_values = score_batch(completion_values, value_model, batch, minibatches, args)  # (N, T)
        mask = batch.completion_mask                                                        # (N, T)
        # Eq. 2 has pi_theta, which at this point is pi_old. A reward does not change during the epochs.
        kl = kl_estimate(old_logprobs, ref_logprobs, args.kl_estimator)                     # (N, T)
        beta_in_reward = betas["ref"] if args.kl_placement == "reward" else 0.0
        token_rewards = rewards_with_kl(rewards, kl, mask, beta_in_reward)                  # (N, T), r_t
        if args.whiten_rewards:
            token_rewards = whiten(token_rewards, mask, shift_mean=False)                   # (N, T)

        # ---- 3. The advantages: how much better than the value model predicted was each token? ----
        advantages, returns = gae(token_rewards, old_values, mask, args.gamma, args.gae_lambda)  # (N, T), each
        if args.whiten_advantages:
            # Differs: the papers do not whiten, Ziegler et al.'s code does: mean 0 and variance 1 over all tokens.
            advantages = whiten(advantages, mask)                                           # (N, T)

        # ---- 4. The clipped losses of both models, and the updates, K epochs ----
        # The weights divide by the whole batch. A minibatch is 1 / num_minibatches of it, hence the factor.
        weights = args.num_minibatches * loss_weights(mask, args.loss_average, args.max_new_tokens)  # (N, T)
        batch = batch._replace(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, advantages=advantages,
                               weights=weights, old_values=old_values, returns=returns)
        metrics, value_metrics, warming_up = Metrics(), Metrics(), step < args.value_warmup_steps
        for epoch in range(1, args.update_epochs + 1):
            for minibatch in minibatches:
                # The gradients of the parts add up to that of the minibatch; FSDP adds up those of the processes.
                for part in micro_batches(value_model, batch, minibatch, args):
                    with autocast:
                        values = completion_values(value_model, part)                       # (N', T)
                    loss, is_clipped = value_loss(
                        values, part.old_values, part.returns, part.completion_mask, part.weights, args.value_clip_eps
                    )
                    loss.backward()
                    value_metrics.add(part.completion_mask, loss, clip_frac=is_clipped)
                value_metrics.grad_norms.append(optimizer_step(value_model, value_optimizer, args.max_grad_norm))
                if warming_up:
                    continue  # Differs: first only the value model learns
                for part in micro_batches(policy, batch, minibatch, args):                  # the same parts
                    with autocast:
                        logprobs, entropy = completion_logprobs(policy, part, args.temperature, args.entropy_coef > 0)
                    loss, per_token = policy_loss(
                        logprobs, part.old_logprobs, part.advantages, part.completion_mask, part.weights,
                        clip_eps=args.clip_eps, clip_eps_high=args.clip_eps_high,
                        beta_old=betas["old"] if args.penalty_kl_target else None,
                    )
                    if args.kl_placement == "loss" and ref_policy:
                        ref_kl = kl_estimate(logprobs, part.ref_logprobs, args.kl_estimator)  # (N', T)
                        loss = loss + betas["ref"] * (ref_kl * part.weights).sum()
                    if args.entropy_coef:
                        loss = loss - args.entropy_coef * (entropy * part.weights).sum()    # PPO Eq. 9, c_2 S
                    loss.backward()
                    # Of each epoch alone, too, for the early stop.
                    by_epoch = {f"{name}_epoch_{epoch}": per_token[name] for name in ("clip_frac", "approx_kl")}
                    metrics.add(part.completion_mask, loss, entropy=entropy, **per_token, **by_epoch)
                metrics.grad_norms.append(optimizer_step(policy, optimizer, args.max_grad_norm))
            if args.early_stop_kl and not warming_up and metrics.mean(f"approx_kl_epoch_{epoch}") > args.early_stop_kl:
                break

        # ---- The controllers: the betas of the next step ----
        used_beta = betas["ref"]
        if args.penalty_kl_target and not warming_up:
            # PPO section 4: it follows from the KL between pi_old and the policy after all updates of the step.
            with torch.no_grad(), autocast:
                logprobs = score_batch(score, policy, batch, minibatches, args)             # (N, T)
            moved = kl_estimate(old_logprobs, logprobs, "k3")[mask].mean().item()           # nats per token
            betas["old"] = penalty_beta(betas["old"], moved, args.penalty_kl_target)
        if args.adaptive_kl_target and not warming_up:
            betas["ref"] = adaptive_beta(used_beta, kl.sum(-1).mean().item(), args.adaptive_kl_target)

        run.log_step({
            "reward/mean": rewards.mean(),
            "reward/std": rewards.std(correction=int(len(rewards) > 1)),                    # 0 for a single one
            "completion/length": mask.sum(-1).float().mean(),
            "completion/truncated": 1 - ended.float().mean(),
            "policy/kl": kl.sum() / mask.sum(),
            "policy/sampler_gap": (old_logprobs - batch.sampler_logprobs)[mask].abs().mean(),
            "policy/beta": used_beta,
            **metrics.means("policy"),
            **value_metrics.means("value"),
            "value/explained_variance": explained_variance(old_values, returns, mask),
        })
    return run.finish()


# ==================================== SPEED =====================================
# The same numbers, up to rounding, in less time or memory. The docstrings say which plain thing a function stands for.
# The last functions try the models before training.

STOP_TEST_EVERY = 4  # tokens between tests for ended rows: a test waits for the device, dropping rows copies the cache


class Decoder:
    """Logits of the next token for N = B G rows. Stands for `policy(torch.cat([prompts, ids], 1)).logits[:, -1]` with
    each prompt repeated G times: a cache keeps the keys and values of all tokens before, and ended rows leave it."""

    can_record = True  # until a model's step could not be recorded

    def __init__(self, policy: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, shape: tuple[int, int]):
        """prompt_ids, prompt_mask: (B, P); shape: N and the maximum of tokens, T."""
        self.policy, self.prompt_ids, self.prompt_mask, self.graph_step = policy, prompt_ids, prompt_mask, None
        self.rows = torch.arange(shape[0], device=prompt_ids.device)                        # (R,), those in the cache
        self.prompts = self.rows * len(prompt_ids) // len(self.rows)                        # (N,), of each completion
        self.lengths = prompt_mask.sum(1)[self.prompts]                                     # (R,), of the prompts
        self.visible = nn.functional.pad(prompt_mask[self.prompts].long(), (0, shape[1]), value=1)  # (R, P + T)
        # Of fixed size, if the model can use such a cache: else every token waits for the device.
        self.cache = StaticCache(policy.config, self.visible.shape[1]) if policy._can_compile_fullgraph else None

    def next_logits(self, ids: Tensor, running: Tensor) -> tuple[Tensor, Tensor]:
        """ids: (N, t), all tokens so far; running: (N,), rows that have not ended. Returns the rows in the cache, (R,),
        none if all have ended, and their logits, (R, V)."""
        t = ids.shape[1]
        if t == 0:
            return self.rows, self.run_prompts()
        if t % STOP_TEST_EVERY == 0:
            kept = running[self.rows].nonzero()[:, 0]                                       # of the R rows
            if len(kept) == 0:
                return kept, self.visible[:0]
            if len(kept) < len(self.rows) / (2 if self.use_graph else 1):  # a graph must be recorded again
                self.rows, self.lengths, self.visible = self.rows[kept], self.lengths[kept], self.visible[kept]
                self.cache.reorder_cache(kept)
                self.graph_step = None
        tokens, position_ids = ids[self.rows, -1], self.lengths[:, None] + t - 1            # (R,); (R, 1)
        if self.use_graph and t > 1:  # the first step has loaded the kernels
            try:
                self.graph_step = self.graph_step or record_step(self.policy, self.visible, position_ids, self.cache)
                return self.rows, self.graph_step(tokens)
            except RuntimeError as error:
                Decoder.can_record = self.use_graph = False
                say(f"A step of sampling cannot be recorded as a CUDA graph, so this model samples without: {error}")
        visible = self.visible[:, : self.prompt_ids.shape[1] + t]
        output = self.policy(tokens[:, None], attention_mask=visible, position_ids=position_ids, cache=self.cache,
                             use_cache=True)
        return self.rows, output.logits[:, -1]

    def run_prompts(self) -> Tensor:
        """Run every prompt once and repeat its keys and values G times. Returns the first logits, (N, V)."""
        position_ids = (self.prompt_mask.cumsum(1) - 1).clamp(min=0)            # positions must ignore left padding
        output = self.policy(self.prompt_ids, attention_mask=self.prompt_mask.long(), position_ids=position_ids,
                             cache=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = getattr(output, "cache", None)
        assert self.cache, "it has no cache of keys and values"
        self.cache.reorder_cache(self.prompts)
        # On a GPU, starting the kernels of a step from Python takes longer than running them: record it, replay it.
        layers = getattr(self.cache, "layers", ())                              # a cache for encoders, too, has none
        self.use_graph = self.can_record and self.rows.is_cuda and {type(x) for x in layers} == {StaticLayer}
        return output.logits[self.prompts, -1]


def record_step(policy: nn.Module, visible: Tensor, position_ids: Tensor, cache: StaticCache) -> Callable:
    """A step of `Decoder` as a CUDA graph: a function of the last tokens, (R,), that returns the logits, (R, V). Every
    call reads and writes the same memory: the tokens, the positions, the cache, the logits."""
    tokens, graph = torch.zeros_like(position_ids), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = policy(tokens, attention_mask=visible, position_ids=position_ids, cache=cache, use_cache=True).logits

    def step(new_tokens: Tensor) -> Tensor:
        """Replay it, one token further."""
        tokens.copy_(new_tokens[:, None])  # where it reads them
        graph.replay()
        position_ids.add_(1)
        return logits[:, -1]

    return step


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


def max_logits(device: torch.device) -> int:
    """Most logits in a micro-batch: in float32, 256 MB on a CPU and a 24th of the memory of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory // 96 if device.type == "cuda" else 2**26


def split_minibatch(model: nn.Module, batch: Batch, minibatch: Tensor, args: Args) -> tuple[Tensor, ...]:
    """Cut this process's completions of a minibatch, (B',) prompts, into micro-batches of similar lengths that fit in
    memory, each (N',) completions: whole groups, or equal parts of one; any number where prompts are not shared."""
    rank, processes = world()
    prompt_lengths, lengths = batch.prompt_mask.sum(1).cpu(), batch.completion_mask.sum(1).cpu()  # (B,); (N,)
    group_size = len(lengths) // len(prompt_lengths)
    groups = torch.arange(len(lengths)).view(-1, group_size)[minibatch]                     # (B', G), of completions
    groups = groups if args.share_prompt else groups.view(-1, 1)                            # or as if G were 1
    groups = groups.gather(1, lengths[groups].argsort(dim=1, stable=True))                  # by length
    totals = prompt_lengths[groups[:, 0] // group_size] + lengths[groups].sum(1)            # (B',)
    groups = groups[totals.argsort(descending=True, stable=True)]
    G, P, T = groups.shape[1], int(prompt_lengths[minibatch].max()), int(lengths[groups].max())
    logits_per_token, most_logits = model.config.get_text_config().vocab_size, max_logits(batch.prompt_ids.device)
    # Of n completions. A copy of a prompt's keys and values takes an eighth of its activations.
    tokens = lambda n: n * T + math.ceil(n / G) * P + n * P / 8
    fits = lambda n: n * T * logits_per_token <= most_logits and tokens(n) <= args.micro_batch_tokens
    sizes = [n for n in range(2, groups.numel() + 1) if n % G == 0 or G % n == 0]
    size = max(filter(fits, sizes), default=1)
    return groups[rank::processes].flatten().to(batch.prompt_ids.device).split(size)


def take_completions(batch: Batch, index: Tensor, share_prompt: bool) -> Batch:
    """Every column at these indices, (N',), with the prompts, all cut to the longest of them. Completions share a
    prompt, or each has a copy; to share, the indices must be whole groups, or a part of one."""
    group_size = len(batch.completion_ids) // len(batch.prompt_ids)
    prompts = index[:: group_size if share_prompt else 1] // group_size                     # (B',) or (N',)
    prompt_ids, prompt_mask, *columns = batch
    P, T = torch.stack([prompt_mask[prompts].sum(1).max(), batch.completion_mask[index].sum(1).max()]).tolist()
    columns = [None if x is None else x[index, :T] for x in columns]
    return Batch(prompt_ids[prompts, -P:], prompt_mask[prompts, -P:], *columns)


def micro_batches(model: nn.Module, batch: Batch, minibatch: Tensor, args: Args) -> Iterator[Batch]:
    """This process's completions of a minibatch, (B',) prompts, in parts. Stands for all of them at once."""
    for index in split_minibatch(model, batch, minibatch, args):
        yield take_completions(batch, index, args.share_prompt)


def score_batch(score: Callable, model: nn.Module, batch: Batch, minibatches: tuple, args: Args) -> Tensor:
    """Stands for `score(model, batch)`, (N, T): on the micro-batches of the update, so that these are equal."""
    result = torch.zeros(batch.completion_ids.shape, device=batch.prompt_ids.device)
    for minibatch in minibatches:
        for index in split_minibatch(model, batch, minibatch, args):
            output = score(model, take_completions(batch, index, args.share_prompt))        # (N', T')
            result[index, : output.shape[1]] = output
    return all_sum(result)


def prepare(args: Args, policy: nn.Module, others: list, problems: list) -> tuple[Args, nn.Module]:
    """Try the models, choose --dtype and whether prompts are shared, and shard all over the processes. Returns the
    arguments with these choices, and the model that samples."""
    models, dtype = [model for model in (*others, policy) if model is not None], choose_dtype(policy, args.dtype)
    sampler, trial = make_sampler(policy, dtype), trial_batch(policy, problems, args)
    check_models(policy, sampler, models, trial, replace(args, dtype=dtype))
    args = replace(args, dtype=dtype, share_prompt=can_share_prompt(policy, trial, args))
    for model in models:
        shard(model, args.gradient_checkpointing)
    return args, sampler


def trial_batch(policy: nn.Module, problems: list, args: Args) -> Batch:
    """Two prompts of random tokens, one as long as the longest of training, each twice, and a completion of each."""
    vocab_size, device = policy.config.get_text_config().vocab_size, policy.device
    longest = max(len(prompt) for prompt, _ in problems)
    width = max(2, min(args.max_new_tokens, max_logits(device) // vocab_size // 4))
    ids = torch.randint(vocab_size, (4, longest + width), generator=reseed(0, 0))
    prompts = pad_prompts([ids[0, :longest].tolist(), ids[1, : longest // 4 + 1].tolist()], device)
    mask = (torch.arange(width) < torch.tensor([[width], [width // 2], [1], [width]])).to(device)  # (4, width)
    return Batch(*(x.repeat_interleave(2, 0) for x in prompts), ids[:, longest:].to(device), mask, mask.float())


@torch.no_grad()
def check_models(policy: nn.Module, sampler: nn.Module, models: list, trial: Batch, args: Args) -> None:
    """Refuse models that cannot run the longest rows in --dtype, and a policy that scores otherwise than it samples."""
    how = "" if args.dtype == "float32" else f" with --dtype {args.dtype}"
    with together(), as_user_error(f"--model {args.model} cannot be trained here{how}"):
        # Every eighth token ends a completion, so that some end early.
        eos_ids = torch.arange(0, policy.config.get_text_config().vocab_size, 8, device=policy.device)
        uniforms = torch.rand((4, min(trial.completion_ids.shape[1], 8)), generator=reseed(0, 1))
        prompts = trial.prompt_ids[::2], trial.prompt_mask[::2]                             # (2, P), each once
        ids, mask, logprobs = generate_completions(policy, *prompts, uniforms, 1.0, eos_ids)
        scored, _ = completion_logprobs(policy, Batch(*trial[:2], ids, mask, logprobs), 1.0)
        gap = (scored - logprobs).abs().max().item()
        if not gap < 1e-3:
            raise ValueError(f"the log-probabilities of sampling and of scoring differ by {gap:.2g} nats")
        generate_completions(sampler, *prompts, uniforms, 1.0, eos_ids)
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            for model in models:
                predict_completions(model, trial)


@torch.no_grad()
def can_share_prompt(policy: nn.Module, trial: Batch, args: Args) -> bool:
    """Whether the update can run a prompt once for all its completions; a model with linear attention cannot."""
    if not args.share_prompt or args.group_size == 1 or args.gradient_checkpointing:  # it would fill a cache twice
        return False
    shared = trial._replace(prompt_ids=trial.prompt_ids[::2], prompt_mask=trial.prompt_mask[::2])
    try:
        gap = completion_logprobs(policy, shared, 1.0)[0] - completion_logprobs(policy, trial, 1.0)[0]
        reason = f"its log-probabilities would be off by {gap.abs().max().item():.2g} nats"
        if gap.abs().max() < 1e-3:
            return True
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # a model without support can raise anything
        reason = str(error) or repr(error)
    say(f"This model cannot share a prompt in the update, so each completion gets its own: {reason}.")
    return False


def choose_dtype(policy: nn.Module, dtype: str) -> str:
    """Resolve --dtype auto."""
    on_gpu = policy.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    on_cpu = policy.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    auto = "bfloat16" if (on_gpu or on_cpu) and policy.num_parameters() > 10_000_000 else "float32"
    return auto if dtype == "auto" else dtype


# ================================== PLUMBING ====================================
# Files, models from disk, processes, checkpoints, curves, signals, and one sentence for every mistake of the user.


class UserError(Exception):
    """A user error: printed as one sentence, without a traceback."""


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn any error inside into one sentence about `what`."""
    try:
        yield
    except Exception as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error) or repr(error)
        raise UserError(f"{what}: {reason}") from None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A user error inside, in any process, is one of all processes. The first process says it."""
    failure = ""
    try:
        yield
    except UserError as error:
        failure = str(error)
    if failures := [text for text in all_gather_objects(failure) if text]:
        raise UserError(failures[0])


LEARNING_RATES = {"learning_rate": (5e-4, 1e-6), "value_learning_rate": (1e-3, 1e-5)}  # of the tiny model, of others
LEAST = {  # other numbers are positive
    "temperature": 1e-3, "beta": 0, "gamma": 0, "gae_lambda": 0, "entropy_coef": 0, "value_warmup_steps": 0, "seed": 0,
    "save_every": 0, "eval_every": 0
}
MOST = {"num_prompts": 2**20, "group_size": 2**16, "clip_eps": 1, "gamma": 1, "gae_lambda": 1}
NO_EFFECT = [  # what switches other flags off, whether it does, and those flags
    ("--beta 0", lambda args: args.beta == 0, "kl_estimator kl_placement adaptive_kl_target"),
    ("--update-epochs 1", lambda args: args.update_epochs == 1, "early_stop_kl"),
    ("--penalty-kl-target", lambda args: args.penalty_kl_target, "clip_eps clip_eps_high"),
]


def check_args(args: Args) -> Args:
    """Fill in defaults that depend on other arguments, and reject invalid values."""
    for name, (of_tiny, of_others) in LEARNING_RATES.items():
        if getattr(args, name) is None:
            args = replace(args, **{name: of_tiny if Path(args.model).resolve() == TINY else of_others})
    if args.eval_data is None and Path(args.data).resolve() == TINY / "train.jsonl":
        args = replace(args, eval_data=str(TINY / "test.jsonl"))
    for name, value in vars(args).items():
        if type(value) not in (int, float):
            continue
        flag, least, most = f"--{name.replace('_', '-')}", LEAST.get(name), MOST.get(name, 2**31 - 1)
        if not (value > 0 if least is None else value >= least):  # NaN, too
            raise UserError(f"{flag} must be {'positive' if least is None else f'at least {least}'}, got {value}")
        if value > most:
            raise UserError(f"{flag} must be at most {most}, got {value}")
    for switch, is_set, names in NO_EFFECT:
        for name in names.split():
            if is_set(args) and getattr(args, name) != getattr(Args, name):
                raise UserError(f"--{name.replace('_', '-')} has no effect with {switch}")
    name = args.run_name
    if name is not None and (name in ("", "..") or Path(name).name != name or not name.isprintable()):
        raise UserError(f"--run-name must be the name of a folder in runs/, got {name!r}")
    if args.resume == "auto" and not name:
        raise UserError("--resume auto needs the --run-name of the run to resume")
    return args


# ----- Problems: prompts and texts -----


@together()
def load_problems(args: Args, device: torch.device) -> tuple[Tokenizer, Tensor, list, list]:
    """The tokenizer; every id that ends a completion, (E,); the training and the held-out problems, each as a pair of
    its prompt's ids and its line."""
    with as_user_error(f"--model {args.model} is neither a model folder nor a reachable hub id"):
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)  # neither run its code, nor ask
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False).get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or 0                   # 0 and -1: no limit
        most_tokens = (positions if positions > 0 else math.inf) - args.max_new_tokens
        ropes = getattr(config, "rope_parameters", None) or {}
        for rope in (ropes, *ropes.values()):  # one, or one for each kind of layer
            if isinstance(rope, dict) and rope.get("rope_type") == "longrope":  # longer rows change all positions
                most_tokens = min(most_tokens, rope["original_max_position_embeddings"] - args.max_new_tokens)
        sources, eos_ids = [config, tokenizer], set()
        with contextlib.suppress(OSError):  # many models have no generation_config.json
            sources.append(GenerationConfig.from_pretrained(args.model))
        for ends in (getattr(source, "eos_token_id", None) for source in sources):
            eos_ids |= set(ends if isinstance(ends, list) else [ends])
        eos_ids = sorted(i for i in eos_ids if i is not None and 0 <= i < config.vocab_size)
    if not eos_ids:
        raise UserError(f"--model {args.model}: it has no EOS token, so its completions could never end")
    read = lambda path: read_problems(path, tokenizer, eos_ids, config.vocab_size, most_tokens)
    problems = read(args.data)
    if args.eval_data:
        held_out = read(args.eval_data)
    else:  # a tenth of the prompts, drawn at random, always the same
        random.Random(0).shuffle(problems)
        prompts = list(dict.fromkeys(tuple(prompt) for prompt, _ in problems))
        chosen = set(prompts[: min(256, len(prompts) // 10 + 1, len(prompts) - 1)])
        held_out = [problem for problem in problems if tuple(problem[0]) in chosen] or problems[:1]
        problems = [problem for problem in problems if tuple(problem[0]) not in chosen]
    trained = {tuple(prompt) for prompt, _ in problems}
    if repeated := sum(tuple(prompt) in trained for prompt, _ in held_out):
        say(f"{repeated} of {len(held_out)} held-out problems have a prompt that is trained on, too")
    if len(problems) < args.num_prompts:
        raise UserError(f"--num-prompts {args.num_prompts} is more than the {len(problems)} training problems, "
                        f"{len(held_out)} being held out")
    return tokenizer, torch.tensor(eos_ids, device=device), problems, held_out


def read_problems(path: str, tokenizer: Tokenizer, eos_ids: list, vocab_size: int, most: float) -> list:
    """JSON lines as pairs of prompt ids and line; `read_prompt` says what a line must hold."""
    problems = []
    with as_user_error(f"cannot read {path}"):
        lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        with as_user_error(f"{path}, line {number}"):
            if not line.strip():
                continue
            problem = json.loads(line.decode("utf-8-sig"))
            ids = encode_prompt(tokenizer, read_prompt(problem), eos_ids)
            if not 0 < len(ids) <= most:
                raise ValueError(f"it has {len(ids)} tokens; 1 to {most} fit beside --max-new-tokens")
            if max(ids) >= vocab_size:
                raise ValueError(f"the tokenizer has token {max(ids)}, the model only {vocab_size} tokens")
            problems.append((ids, problem))
    if not problems:
        raise UserError(f"{path} is empty: it must hold one JSON object per line")
    return problems


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict], eos_ids: list[int]) -> list[int]:
    """Encode a prompt. If there is a chat template, it adds the BOS token, and a last message of the assistant is
    continued. Special tokens in the text of a problem are encoded as plain text."""
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        ids = tokenizer(prompt, split_special_tokens=True).input_ids
        while ids and ids[-1] in eos_ids:  # some tokenizers add an end, after which a model has nothing to say
            ids.pop()
        return ids
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    is_message = lambda x: isinstance(x, dict) and isinstance(x.get("role"), str) and isinstance(x.get("content"), str)
    if not (isinstance(chat, list) and chat and all(map(is_message, chat))):
        raise ValueError('a prompt must be a text or a list of {"role": text, "content": text}')
    continued = chat[-1]["role"] == "assistant"
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


# ----- Models -----


@together()
def load_policy(model: str, device: torch.device) -> nn.Module:
    """The policy in float32, without dropout."""
    with as_user_error(f"--model {model} cannot be loaded"):
        options = dict(trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
        policy, info = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
        if type(policy.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError("it is a part of another model: alone, it could not be loaded after training")
        for config in (policy.config, policy.config.get_text_config()):  # options that change what forward returns
            for name in ("output_router_logits", "output_attentions", "output_hidden_states", "return_dict"):
                if hasattr(config, name):
                    setattr(config, name, name == "return_dict")
        if lacking := [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]:  # would be random
            raise ValueError(f"it has no weights, or none of the right shape, for {', '.join(sorted(lacking))}")
        if any(parameter.dtype != torch.float32 for parameter in policy.parameters()):
            raise ValueError("its weights are quantised; to train, they must be floating-point numbers")
        return policy.to(device).eval()


def shard(model: nn.Module, gradient_checkpointing: bool) -> None:
    """Wrap the layers of a model for gradient checkpointing, and shard its weights over the processes (FSDP2)."""
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
    if gradient_checkpointing:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if dist.is_initialized():
        mesh = dist.init_device_mesh(next(model.parameters()).device.type, (world()[1],))  # by default that of the GPUs
        are_nested = any(inner is not layer and inner in layers for layer in layers for inner in layer.modules())
        for module in [*([] if are_nested else layers), model]:
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)  # the loss has one denominator for all: gradients add up
            module.set_force_sum_reduction_for_comms(True)


# ----- Processes: torchrun starts several; each samples, and computes gradients, for its share of the prompts -----


def start(args: Args) -> torch.device:
    """Choose the device, and join the other processes where torchrun has started several."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = accelerator if args.device == "auto" else torch.device(args.device)
    if device.type not in ("cpu", accelerator.type):
        raise UserError(f"--device {args.device}: not available on this machine")
    if "MASTER_ADDR" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":  # torchrun has started it
        with as_user_error("cannot join the other processes, which torchrun starts"):
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(device)
            if not dist.is_initialized():
                if os.environ.get("RANK") == "0":
                    number, host, port = (os.environ.get(x) for x in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
                    say(f"waiting for {number} processes at {host}:{port}")
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    parts = world()[1] * args.num_minibatches
    if args.num_prompts % parts:
        raise UserError(f"--num-prompts {args.num_prompts} must be a multiple of {parts}, "
                        "the number of processes times --num-minibatches")
    # cuDNN's attention with a mask has had NaN gradients and wrong decoding (pytorch issues 196678 and 193893).
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return device


def world() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_part(rows):
    """This process's part of a tensor or a list, such as the prompts of a step."""
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
    parts = all_gather_objects(x.cpu())
    width = max(part.shape[-1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]).to(x.device)


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
    """Print a line above the progress bar, in the first process only. Control characters, which a terminal would obey,
    are escaped. An output that fails does not end the run."""
    if world()[0] == 0:
        with contextlib.suppress(OSError):
            tqdm.write("".join(x if x.isprintable() else ascii(x)[1:-1] for x in text), file=sys.stderr)


def reseed(seed: int, step: int) -> torch.Generator:
    """Seed Python's and torch's random numbers anew, so that a checkpoint holds none. Returns torch's generator."""
    random.seed(f"{seed} {step}")
    return torch.manual_seed(seed * 1_000_003 + step)


class Metrics:
    """Means over the tokens and the updates of a step, kept on the device until the step ends."""

    def __init__(self):
        self.totals, self.losses, self.ratios, self.grad_norms = {}, [], [], []

    def add(self, mask: Tensor, loss: Tensor, ratio: Tensor | None = None, **per_token: Tensor) -> None:
        """The loss of one micro-batch, and values of its tokens, (N', T)."""
        self.losses.append(loss.detach())
        if ratio is not None:
            self.ratios.append(ratio.where(mask, 0.0).max())
        for name, x in per_token.items():
            total = torch.stack([x.detach().where(mask, 0.0).sum(), mask.sum()])            # (2,), sum and count
            self.totals[name] = self.totals.get(name, 0) + total

    def mean(self, name: str) -> float:
        """Over the tokens of all processes."""
        total, count = all_sum(self.totals[name]).tolist()
        return total / max(count, 1)

    def means(self, prefix: str) -> dict[str, float]:
        """All of them, under the names that TensorBoard shows; none if nothing was added."""
        if not self.grad_norms:
            return {}
        finite = [x for x in self.grad_norms if x.isfinite()]
        means = {name: self.mean(name) for name in self.totals}
        means["loss"] = all_sum(sum(self.losses)) / len(self.grad_norms)
        means["grad_norm"] = sum(finite) / max(1, len(finite))
        means["skipped"] = len(self.grad_norms) - len(finite)
        if self.ratios:
            means["ratio_max"] = max(all_gather_objects(max(self.ratios).item()))
        return {f"{prefix}/{name}": value for name, value in means.items()}


class Run:
    """What a run keeps in runs/RUN_NAME/ (curves, completions.jsonl, checkpoint.pt, policy/) and what it prints."""

    FREE = ("model", "data", "eval_data", "num_steps", "share_prompt", "micro_batch_tokens", "gradient_checkpointing",
            "device", "run_name", "resume", "save_every", "eval_every")  # may change when a run is resumed

    def __init__(
        self, args: Args, tokenizer: Tokenizer, eos_ids: Tensor, problems: list, held_out: list,
        sampler: nn.Module, models: dict, betas: dict, stop: threading.Event | None,
    ):
        self.args, self.tokenizer, self.eos_ids, self.held_out = args, tokenizer, eos_ids, held_out
        self.models = {name: pair for name, pair in models.items() if pair[0]}  # name: (model, its optimizer or None)
        self.policy, self.sampler, self.betas = models["policy"][0], sampler, betas
        self.stop = stop or threading.Event()
        self.script, self.device, self.step, self.writer, self.times = Path(__file__).stem, eos_ids.device, 0, None, {}
        flags = {f"--{name.replace('_', '-')}": x for name, x in vars(args).items() if name not in self.FREE}
        bits = lambda x: x.detach().float().view(torch.int32).sum(dtype=torch.int64).item()
        contents = {  # never paths; the weights of the sampler, which every process has as a whole
            "problems": [line for _, line in problems],
            "held-out problems": [line for _, line in held_out],
            "model": [(name, [*x.shape], bits(x)) for name, x in sampler.named_parameters()],
        }
        digest = lambda content: hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        hashes = {f"hash of the {name}": digest(content) for name, content in contents.items()}
        self.fixed = {"script": self.script, **flags, **hashes}  # what a resumed run must have, too
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        name = args.run_name or f"{self.script}-{Path(args.model).resolve().name}-seed{args.seed}-{now}"
        self.folder = Path("runs", all_gather_objects(name)[0])
        path = self.folder / "checkpoint.pt" if args.resume == "auto" else args.resume
        if path is not None and (args.resume != "auto" or os.path.exists(path)):  # else it starts from the beginning
            self.load(Path(path))
        # Two hosts may hold different files under one name.
        facts = {**vars(args), **hashes, "step of the checkpoint": self.step}
        if different := {name for other in all_gather_objects(facts) for name in facts if other[name] != facts[name]}:
            raise UserError(f"the processes do not agree on: {', '.join(sorted(different))}")
        self.open_folder()
        say(f"{self.script}: {self.policy.num_parameters() / 1e6:.1f} M parameters in {args.dtype} on "
            f"{self.device.type}, step {self.step} of {args.num_steps}, in {self.folder}")
        self.bar = tqdm(range(self.step, args.num_steps + 1), self.script, args.num_steps, initial=self.step,
                        unit="step", disable=True if world()[0] else None)

    @together()
    def open_folder(self) -> None:
        """In the first process: make the folder, keep others out, and drop what was written after the checkpoint."""
        from torch.utils.tensorboard import SummaryWriter

        if world()[0]:
            return
        with as_user_error(f"cannot write the run to {self.folder} (to resume a run: --resume auto, once at a time)"):
            self.folder.mkdir(parents=True, exist_ok=self.args.resume == "auto")
            # Held as long as a run in this folder lives; another one of this process shares it.
            self.lock = FileLock((self.folder / "lock").absolute(), thread_local=False, is_singleton=True)
            self.lock.acquire(blocking=False)
            self.writer = SummaryWriter(str(self.folder.absolute()), purge_step=self.step)
            self.writer.add_text("flags", "\n".join(f"    {name} = {x!r}" for name, x in vars(self.args).items()))
            if (path := self.folder / "completions.jsonl").exists():
                lines = path.read_text().splitlines(keepends=True)
                kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] < self.step]
                path.with_suffix(".aside").write_text("".join(kept))
                path.with_suffix(".aside").replace(path)

    def evaluate_and_save(self, step: int) -> bool:
        """Before the update of a step, evaluate and save, each if it is due. True if the run ends here."""
        self.step, args = step, self.args
        last = step == args.num_steps or any(all_gather_objects(self.stop.is_set()))
        if args.eval_every and (step % args.eval_every == 0 or step == args.num_steps):
            self.evaluate()
        if last or (args.save_every and step % args.save_every == 0):
            self.save(last)
        self.lap_started = time.perf_counter()
        return last

    @torch.no_grad()
    def evaluate(self) -> None:
        """Mean reward on the held-out problems, greedy and sampled, and the mean length of the sampled completions. All
        completions are appended to completions.jsonl, and the first is printed."""
        args, own, metrics = self.args, own_part(self.held_out), {}
        refresh_sampler(self.sampler, self.policy)
        size = args.num_prompts * args.group_size
        shape = len(self.held_out), args.max_new_tokens
        uniforms = own_part(torch.rand(shape, dtype=torch.float64, generator=reseed(0, 0)))
        for kind, temperature in (("greedy", 0.0), ("sampled", args.temperature)):
            texts, num_tokens = [], torch.zeros((), device=self.device)
            for i in range(0, len(own), size):
                part = slice(i, i + size)
                prompts = pad_prompts([prompt for prompt, _ in own[part]], self.device)
                ids, mask, _ = generate_completions(self.sampler, *prompts, uniforms[part], temperature, self.eos_ids)
                texts += decode(self.tokenizer, ids, mask, self.eos_ids)
                num_tokens += mask.sum()
            rewards = self.guard(compute_rewards, texts, [problem for _, problem in own])   # (problems,)
            totals = all_sum(torch.stack([rewards.sum(), num_tokens])) / len(self.held_out)
            metrics[f"eval/{kind}"], metrics["eval/length"] = totals.tolist()
            lines = []
            for (prompt, problem), text, r in zip(own, texts, rewards.tolist(), strict=True):
                prompt = self.tokenizer.decode(prompt)
                lines.append(dict(step=self.step, kind=kind, prompt=prompt, completion=text, reward=r, problem=problem))
            lines = [line for of_process in all_gather_objects(lines) for line in of_process]
            if world()[0] == 0:
                with contextlib.suppress(OSError), (self.folder / "completions.jsonl").open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
            text = (lines[0]["prompt"] + lines[0]["completion"]).replace("\n", " ")
            text = text if len(text) <= 150 else f"{text[:60]} ... {text[-85:]}"
            say(f"    {kind}, reward {lines[0]['reward']:.2f}: {text}")
        shown = "held-out reward {eval/greedy:.3f} greedy, {eval/sampled:.3f} sampled, {eval/length:.1f} tokens"
        say(f"step {self.step}: {shown.format_map(metrics)}")
        self.log(metrics)

    def guard(self, function: Callable, completions: list[str], problems: list[dict]) -> Tensor:
        """Call `compute_rewards`, which is the user's own code; returns its rewards, (N,), in float32. If it fails, in
        any process, the run is saved before the traceback is shown."""
        failure, rewards, here = None, [], os.getcwd()
        try:
            rewards = [float(x) for x in function(completions, problems)]
            if len(rewards) != len(completions):
                raise ValueError(f"compute_rewards returned {len(rewards)} rewards for {len(completions)} completions")
            for x, completion, problem in zip(rewards, completions, problems, strict=True):
                if not abs(x) < 1e15:  # the square of more, summed, is not finite in float32
                    raise ValueError(f"the reward is {x}, not a number below 1e15, for {completion!r} to {problem}")
        except BaseException as error:  # SystemExit, too: code that is run may call for an exit
            failure = error
        os.chdir(here)
        if any(all_gather_objects(failure is not None)):
            self.save()
            if isinstance(failure, SystemExit):  # it would end the program without a traceback
                raise RuntimeError("compute_rewards ended the program") from failure
            raise failure or UserError("the reward failed in another process")
        return torch.tensor(rewards, device=self.device)                                    # (N,)

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap under this name. What was read before has waited for the device."""
        now = time.perf_counter()
        self.times[name], self.lap_started = now - self.lap_started, now

    def log_step(self, metrics: dict[str, Tensor | float]) -> None:
        """The curves of a step of training, with its times, and what the progress bar shows of them."""
        self.lap("time/update")
        metrics = {name: float(value) for name, value in (self.times | metrics).items()}
        tokens = metrics["completion/length"] * self.args.num_prompts * self.args.group_size
        metrics["time/tokens_per_second"] = tokens / sum(self.times.values())
        shown = "reward {reward/mean:.2f}, length {completion/length:.1f}, KL {policy/kl:.3f}, "
        self.bar.set_postfix_str((shown + "{time/tokens_per_second:.0f} tokens/s").format_map(metrics))
        if metrics.get("policy/skipped") or metrics.get("value/skipped"):
            say(f"step {self.step}: the gradient was not finite, so its update was skipped")
        self.log(metrics)

    def log(self, metrics: dict[str, float]) -> None:
        """Add a point to every curve. Point s is measured after s steps of training."""
        try:
            for name, value in metrics.items() if self.writer else ():
                self.writer.add_scalar(name, value, self.step)
            if self.writer:
                self.writer.flush()  # before the checkpoint, so that a kill after it loses no point
        except OSError as error:  # a full disk ends the curves, not the run
            self.writer = None
            say(f"the curves end here, the run goes on: {error}")

    @together()
    def save(self, last: bool = False) -> None:
        """Write checkpoint.pt, to resume from, and policy/, in Hugging Face format, which no resume reads. A checkpoint
        is written beside, flushed and then renamed: a kill at any moment leaves a whole one."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        content = {"step": self.step, "fixed": self.fixed, "betas": self.betas}
        aside, options = self.folder / "checkpoint.aside", StateDictOptions(full_state_dict=True, cpu_offload=True)
        try:
            for name, (model, optimizer) in self.models.items():
                # An optimizer without a step has no state; get_state_dict would make it count a step that never was.
                optimizer = optimizer if optimizer and optimizer.state else ()
                content[name] = get_state_dict(model, optimizer, options=options)
            if world()[0] == 0:
                with aside.open("wb") as file:
                    torch.save(content, file)
                    file.flush()
                    os.fsync(file.fileno())
                aside.replace(self.folder / "checkpoint.pt")
                self.policy.save_pretrained(self.folder / "policy", state_dict=content["policy"][0])
                self.tokenizer.save_pretrained(self.folder / "policy")
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # a full disk can be anything
            aside.unlink(missing_ok=True)  # half of a file would only fill the disk
            if last:
                raise UserError(f"{self.folder} could not be saved: {error}") from None
            say(f"{self.folder} could not be saved: {error}")

    @together()
    def load(self, path: Path) -> None:
        """Restore a checkpoint that any number of processes wrote, if the arguments that must not change have not."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        with as_user_error(f"{path} cannot be loaded"):
            with zipfile.ZipFile(path) as file:  # torch.load compares no checksums and skips what looks like a folder
                if damaged := file.testzip() or next((x.filename for x in file.infolist() if x.external_attr), None):
                    raise ValueError(f"{damaged} is damaged")
            saved = torch.load(path, weights_only=True, map_location="cpu")
            pairs = {name: (saved["fixed"].get(name), now) for name, now in self.fixed.items()}
            if changed := [f"{name} was {old}, is {now}" for name, (old, now) in pairs.items() if old != now]:
                raise ValueError(f"it belongs to a run with other arguments: {', '.join(changed)}")
            if saved["step"] > self.args.num_steps:
                raise ValueError(f"it is at step {saved['step']}, beyond --num-steps {self.args.num_steps}")
            # Not strict: parameters that never had a gradient have no state.
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
            for name, (model, optimizer) in self.models.items():
                weights, state = saved[name]
                optimizer = optimizer if state else ()
                set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
        self.step = saved["step"]
        self.betas.update(saved["betas"])
        say(f"resuming from {path}")

    def finish(self) -> Path:
        """Say where everything is. Returns the folder of the trained model."""
        if self.writer:
            self.writer.close()
        say(f"trained model after {self.step} steps: {self.folder / 'policy'}; curves: tensorboard --logdir runs")
        if self.step < self.args.num_steps:
            say(f"to resume, run the same command with --run-name {self.folder.name} --resume auto")
        return self.folder / "policy"


def main(args: Args) -> int:
    """Train as a program. The first SIGINT or SIGTERM ends the run after the current step, the second one at once. A
    user error is printed as one sentence. Returns the exit code."""
    stop, code = threading.Event(), 0

    def ask(*_: object) -> None:
        """Handle the first signal; later ones act as if there were no handler."""
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        more = "; torchrun kills after its --shutdown-timeout, 30 s" if "TORCHELASTIC_RUN_ID" in os.environ else ""
        with contextlib.suppress(OSError):  # not by print, which may be at work
            os.write(2, f"\nfinishing this step, then saving; a second signal exits at once{more}\n".encode())

    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the other processes, too
        start(check_args(args))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)
        train(args, stop)
    except UserError as error:
        say(f"{Path(__file__).name}: {textwrap.shorten(str(error), 1000)}")
        code = 2
    if dist.is_initialized():
        if not code or dist.get_backend() != "nccl":  # otherwise it would wait for processes that wait for this one
            dist.destroy_process_group()
        os._exit(code)  # a normal exit sometimes aborts in a thread left over from gloo
    return code


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
