# SPDX-License-Identifier: MIT
"""PPO on a language model: Proximal Policy Optimization as it is used for RLHF, complete in this file.

Papers: PPO (arXiv 1707.06347), GAE (1506.02438), InstructGPT (2203.02155) and Ziegler et al. (1909.08593) for language
models, DeepSeekMath (2402.03300) Eqs. 1 and 2 for the notation that grpo.py shares.

The policy pi_theta is a causal language model. A state s_t is a prompt and the tokens so far, an action a_t is the next
token, and an episode is a completion. Each step:

    1. Generate completions with the old policy                                    generate_completions
    2. Estimate the KL from the reference policy and put it into the rewards       kl_estimate (kl.py), token_rewards
    3. Compute the advantages with the value model                                 completion_values, gae (advantage.py)
    4. Update policy and value model on the clipped objectives, K epochs           policy_loss, value_loss

grpo.py asks how much better a completion is than its group. Here the value model predicts the reward from every prefix,
so one completion per prompt is enough and every token gets an advantage of its own. And the KL enters the reward before
the advantages are computed, where GRPO has it in the loss: the tokens that led to a token also pay for its KL.
Advantage and KL still pull against each other, but inside one sum of rewards.

    symbol       name in the code    shape        meaning
    G, K         group_size, update_epochs        completions per prompt; passes over them per step
    q            prompt_ids          (B, P)       B prompts of at most P tokens, left-padded
    a_t, o_t     completion_ids      (N, T)       N = B G completions of at most T tokens, right-padded
    |o|          completion_mask     (N, T)       true up to and including the EOS token, which is trained too
    r_phi        rewards             (N,)         the reward of a completion
    r_t          r_t                 (N, T)       -beta log(pi_old / pi_ref), and r_phi on the last token
    V(s_t)       values              (N, T)       what the value model expects from s_t on, in units of reward
    A_t          advantages          (N, T)       how much better a_t was than V(s_t) predicted
    V_t^targ     returns             (N, T)       A_t + V(s_t), before the advantages are whitened
    pi_theta     logprobs            (N, T)       log pi_theta(a_t | s_t) at the sampling temperature, in nats
    pi_old       old_logprobs        (N, T)       the same under the weights that sampled
    pi_ref       ref_logprobs        (N, T)       the same under the reference policy, which is frozen
    r_t(theta)   ratio               (N, T)       pi_theta / pi_old (the PPO paper calls ratio and reward r_t)
    1/(BG|o|)    weights             (N, T)       the weight of a token in the losses

Differs from the papers, each marked "Differs" where it happens: the value model shares no parameter with the policy, so
Eq. 9 splits into two losses, each with its own AdamW, and needs no c_1; the value loss has the 1/2 and the clipping of
Ziegler et al.'s code; the value model trains alone in the first steps; minibatches are the same in all epochs, and
pi_old is computed by the trainer's own forward pass, so that the first ratio is exactly 1; constant learning rates and
gradient clipping; advantages are whitened; a truncated completion counts as ended (advantage.py).

    python ppo.py                                      a tiny model learns two-digit addition, without any download
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --eval-data test.jsonl --max-new-tokens 512

To use it for a task of your own, copy this file with advantage.py and kl.py and change the block marked CHANGE THIS.
The code below the banner PLUMBING (files, processes, checkpoints) is not part of the algorithm.
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
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: spinning threads starve a busy machine

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import logging as transformers_logging

from advantage import gae, whiten
from kl import adaptive_beta, kl_estimate, penalty_beta

TINY = Path(__file__).resolve().parent / "tests" / "tiny"  # a model that adds two-digit numbers, badly


@dataclass
class Args:
    # The task and the model
    model: str = str(TINY)
    """the policy: a Hugging Face hub id or folder; by default a tiny model that comes with this script"""
    data: str = str(TINY / "train.jsonl")
    """training problems, JSON lines with "question" or "prompt" (text or chat messages) and "answer" """
    eval_data: str = str(TINY / "test.jsonl")
    """held-out problems in the same format; if only --data is set, a random tenth of it, at most 256"""
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
    """a value further than this from its old value gains nothing more; in units of reward (Ziegler et al.'s code)"""
    gamma: float = 1.0
    """discount per token (GAE Eq. 16); 1: none (InstructGPT)"""
    gae_lambda: float = 0.95
    """lambda of GAE Eq. 16: 0 trusts the value model, 1 the rewards"""
    whiten_advantages: bool = True
    """shift and scale the advantages of a step to mean 0 and variance 1"""
    whiten_rewards: bool = False
    """scale the token rewards of a step to variance 1, keeping their mean (Ziegler et al.'s code)"""
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
    """end the epochs of a step once KL[pi_old, pi_theta] exceeds this many nats a token"""
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
# A task is a file of problems, a function that reads one line of it, and a reward. Nothing else depends on the task.
# Here the final number, after the marker "#", must be the right one. GSM8K's own files are in this format.

INSTRUCTION = "\nThink step by step, then end with the final number after ####."


def read_problem(record: dict) -> tuple[str | list[dict[str, str]], str]:
    """Read a line of --data: a prompt (text, or chat messages with "role" and "content") and an answer for `reward`.
    A "prompt" is used as it is; INSTRUCTION is appended to a "question"."""
    prompt = record["prompt"] if "prompt" in record else record["question"] + INSTRUCTION
    if not isinstance(record["answer"], str) or final_number("#" + record["answer"]) is None:
        raise ValueError('"answer" must be a string that ends in one number, alone or after ####')
    return prompt, record["answer"]


def final_number(text: str) -> Decimal | None:
    """The number after the last "#", or None if there is not exactly one: a list of guesses is not an answer."""
    words = text.replace("\N{MINUS SIGN}", "-").rpartition("#")[2].split() if "#" in text else []
    words = [word.lstrip("*(").rstrip("*).,;:!?%") for word in words if re.search("[0-9]|^-$", word)]
    word = words[0].replace("$", "", 1) if len(words) == 1 else ""
    is_number = re.fullmatch(r"[-+]?(([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?|\.[0-9]+)", word)
    return Decimal(word.replace(",", "")) if is_number else None


def reward(completion: str, answer: str) -> float:
    """r_i: 1 if the completion's final number is the answer's, else 0. The text is parsed, never evaluated.
    Special tokens are stripped; to keep them, set skip_special_tokens=False in `decode`."""
    number = final_number(completion)
    return float(number is not None and number == final_number("#" + answer))


# ========================= end of the block to change ===========================


class Batch(NamedTuple):
    """B prompts and their N = B G completions: G to the first prompt, then G to the second, and so on."""

    prompt_ids: Tensor          # (B, P), left-padded
    prompt_mask: Tensor         # (B, P), bool, true on the tokens
    completion_ids: Tensor      # (N, T), right-padded
    completion_mask: Tensor     # (N, T), bool, true through the EOS token
    sampler_logprobs: Tensor    # (N, T), from the sampler, perhaps in bfloat16; used only for policy/sampler_gap
    old_logprobs: Tensor | None = None  # (N, T), and so are all below
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None

    def rows(self, index: Tensor) -> "Batch":
        """The completions at these indices, (N',), with their prompts, each cut to the longest of them. They must
        be whole groups, or a part of one group."""
        group_size = len(self.completion_ids) // len(self.prompt_ids)
        prompts = index[::group_size] // group_size                                         # (B',)
        longest = torch.stack([self.prompt_mask[prompts].sum(1).max(), self.completion_mask[index].sum(1).max()])
        prompt_width, width = longest.clamp(min=1).tolist()
        columns = (x if x is None else x[index, :width] for x in self[2:])
        return Batch(*(x[prompts, -prompt_width:] for x in self[:2]), *columns)

    def unshared(self) -> "Batch":
        """The same with a copy of the prompt for every completion, as if G were 1."""
        group_size = len(self.completion_ids) // len(self.prompt_ids)
        return Batch(*(x.repeat_interleave(group_size, 0) for x in self[:2]), *self[2:])


# ----- 1. Generate completions: o_1 .. o_G ~ pi_old(. | q) -----

STOP_TEST_EVERY = 4  # tokens between tests for finished rows; a test waits for the device, and dropping rows copies


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token for each row of logits, (N, V), from softmax(logits / temperature), without top-k or top-p; the most
    probable at temperature 0. uniforms: (N,), in [0, 1). Returns tokens and log-probabilities in nats, both (N,)."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)                          # (N, V)
    if temperature == 0:
        tokens = logp.argmax(-1)                                                            # (N,)
    else:
        # The first token whose cumulative probability exceeds the random number.
        cdf = logp.exp().cumsum(-1, dtype=uniforms.dtype)                                   # (N, V)
        tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=cdf.shape[1] - 1)
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
    (num_prompts, prompt_width), (num_completions, max_new_tokens) = prompt_ids.shape, uniforms.shape
    device = prompt_ids.device
    # float64 keeps the rare tokens of a large vocabulary apart; MPS has none.
    uniforms = uniforms.to(device, torch.float32 if device.type == "mps" else torch.float64)  # (N, T)
    # A cache of fixed size, if the model can use one: only the tests below then wait for the device, not every token.
    cache = StaticCache(policy.config, prompt_width + max_new_tokens) if policy._can_compile_fullgraph else None
    position_ids = (prompt_mask.cumsum(1) - 1).clamp(min=0)                 # positions must ignore left padding
    output = policy(prompt_ids, attention_mask=prompt_mask.long(), position_ids=position_ids, past_key_values=cache,
                    use_cache=True, logits_to_keep=1)
    # The prompt ran once. Its keys and values are repeated for the G completions that follow it.
    prompts = torch.arange(num_completions, device=device) * num_prompts // num_completions  # (N,), of each completion
    output.past_key_values.reorder_cache(prompts)
    logits, lengths, cache = output.logits[prompts, -1], prompt_mask.sum(1)[prompts], output.past_key_values  # (N, V)
    visible = nn.functional.pad(prompt_mask[prompts].long(), (0, max_new_tokens), value=1)  # (N, P + T)

    ids, logprobs = prompt_ids.new_zeros(uniforms.shape), torch.zeros_like(uniforms, dtype=torch.float32)  # (N, T)
    rows = torch.arange(num_completions, device=device)                                     # those still in the batch
    running = torch.ones_like(rows, dtype=torch.bool)                                       # no EOS token yet
    # On a GPU, starting the kernels of a step from Python takes longer than running them: record it once and replay it.
    graph_step, use_graph = None, device.type == "cuda" and all(type(layer) is StaticLayer for layer in cache.layers)
    for t in range(max_new_tokens):
        tokens, logprobs[rows, t] = sample_tokens(logits, uniforms[rows, t], temperature)
        ids[rows, t] = tokens
        running = running & ~torch.isin(tokens, eos_ids)
        still_running = int(running.sum()) if (t + 1) % STOP_TEST_EVERY == 0 else len(rows)
        if t + 1 == max_new_tokens or still_running == 0:
            break
        if still_running < (len(rows) / 2 if use_graph else len(rows)):
            kept = running.nonzero()[:, 0]  # finished rows leave the batch and the cache
            rows, running, tokens, visible, lengths = (x[kept] for x in (rows, running, tokens, visible, lengths))
            cache.reorder_cache(kept)
            graph_step = None
        if use_graph and t:  # the first step has loaded the kernels
            graph_step = graph_step or record_step(policy, visible, lengths[:, None] + t, cache)
            logits = graph_step(tokens)                                                     # (N', V)
        else:
            logits = policy(tokens[:, None], attention_mask=visible[:, : prompt_width + t + 1], use_cache=True,
                            position_ids=lengths[:, None] + t, past_key_values=cache).logits[:, -1]  # (N', V)
    ended = torch.isin(ids, eos_ids)                                                        # (N, T)
    mask = ended.cumsum(1) - ended.long() == 0      # (N, T), true through the first EOS token; the rest is ignored
    longest = int(mask.sum(1).max())
    return tuple(x[:, :longest] for x in (ids.where(mask, 0), mask, logprobs.where(mask, 0.0)))


# ----- Log-probabilities: log pi(o_{i,t} | q, o_{i,<t}), for the ratio and for the KL -----


def predict_completions(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output in every state s_t = (q, o_{<t}), (N, T, V): logits that predict o_t, or one value (V = 1)."""
    group_size = len(batch.completion_ids) // len(batch.prompt_ids)
    lengths = batch.prompt_mask.sum(1, keepdim=True)                                        # (B, 1)
    t = torch.arange(batch.completion_ids.shape[1], device=lengths.device)                  # (T,)
    if group_size == 1:
        # Prompt and completion in one row, padding last, so that the model needs neither mask nor positions.
        mask = torch.cat([batch.prompt_mask, batch.completion_mask], 1)                     # (N, P + T)
        ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)[mask].split(mask.sum(1).tolist())
        ids = pad_sequence(ids, batch_first=True)                                           # (N, L)
        # Position j predicts token j + 1, so the first one is predicted at the last token of the prompt.
        before = (lengths - 1 + t).clamp(max=ids.shape[1] - 1)                              # (N, T)
        return model(input_ids=ids, use_cache=False, logits_to_keep=before).logits          # (N, T, V)
    # The prompt runs once, as in `generate_completions`. Its gradient is the sum over its completions.
    position_ids = (batch.prompt_mask.cumsum(1) - 1).clamp(min=0)                           # (B, P)
    # Its last state is projected once per completion, because a product of one row may be rounded differently.
    last = torch.full((group_size,), position_ids.shape[1] - 1, device=t.device)
    output = model(input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask.long(), position_ids=position_ids,
                   use_cache=True, logits_to_keep=last)
    first, cache = output.logits.flatten(0, 1)[:, None], output.past_key_values             # (N, 1, V)
    cache.batch_repeat_interleave(group_size)
    prompt_mask, lengths = (x.repeat_interleave(group_size, 0) for x in (batch.prompt_mask, lengths))
    visible = torch.cat([prompt_mask, torch.ones_like(batch.completion_mask)], 1).long()    # (N, P + T)
    others = model(input_ids=batch.completion_ids, attention_mask=visible, position_ids=lengths + t,
                   past_key_values=cache, use_cache=True, logits_to_keep=t[:-1]).logits     # (N, T - 1, V)
    return torch.cat([first, others], 1)


def completion_logprobs(policy: nn.Module, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_{<t}) and the entropy of pi(. | q, o_{<t}), both (N, T), in nats, 0 in the padding."""
    logits = predict_completions(policy, batch)                                             # (N, T, V)
    assert logits.shape[:2] == batch.completion_ids.shape, "the model ignores logits_to_keep"
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # near -6, bfloat16 values are 0.03 apart
    logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)           # (N, T, V)
    logprobs = logp.gather(2, batch.completion_ids[..., None])[..., 0]                      # (N, T)
    # p log p is 0 at p = 0, and so is its gradient; the clamp avoids 0 * -inf where a model masks a token with -inf.
    pieces = logp.flatten(0, 1).split(max(1, 2**20 // logp.shape[2]))    # of (N T, V), that fit in the cache of a CPU
    entropy = -torch.cat([(x.exp() * x.clamp(min=torch.finfo(x.dtype).min)).sum(-1) for x in pieces])  # (N T,)
    return tuple(x.view_as(logprobs).where(batch.completion_mask, 0.0) for x in (logprobs, entropy))


# ----- Values: V(s_t), what the value model expects from a prefix on -----


class ValueModel(nn.Module):
    """The policy's transformer with a scalar head instead of the output layer. It starts at V = 0 everywhere."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.backbone = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.get_output_embeddings().weight.shape[1], 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, logits_to_keep: int | Tensor = 0, **inputs: object) -> CausalLMOutputWithPast:
        """As a language model whose vocabulary is one value: its logits are (N, T, 1)."""
        output = self.backbone(**inputs)
        states = slice_logits_to_keep(output.last_hidden_state, logits_to_keep)
        return CausalLMOutputWithPast(logits=self.head(states), past_key_values=output.past_key_values)


def completion_values(value_model: ValueModel, batch: Batch) -> Tensor:
    """V(s_t) of the state s_t = (q, o_{<t}) before each token, (N, T), in units of reward, 0 in the padding."""
    values = predict_completions(value_model, batch)[..., 0]                                # (N, T)
    return values.to(torch.promote_types(values.dtype, torch.float32)).where(batch.completion_mask, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the tokens: 1 is a perfect prediction, 0 is no better than a constant."""
    errors, returns = (returns - values)[mask], returns[mask]
    return 1 - errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


# ----- 2. Token rewards: the KL penalty on every token, the completion's reward on the last -----


def token_rewards(rewards: Tensor, kl: Tensor, completion_mask: Tensor, beta: float) -> Tensor:
    """r_t = r_phi [t is the last token] - beta kl_t (DeepSeekMath Eq. 2, InstructGPT Eq. 2), without gradient.

    Args: rewards (...), one per completion; kl, completion_mask (..., T), kl as from `kl_estimate`.
    Returns: (..., T), 0 in the padding. A completion's token rewards sum to its reward less beta times its KL.
    """
    assert (*rewards.shape, completion_mask.shape[-1]) == kl.shape == completion_mask.shape
    last = completion_mask & (completion_mask.sum(-1, keepdim=True) == completion_mask.cumsum(-1))  # one a completion
    return (rewards[..., None].where(last, 0.0) - beta * kl).where(completion_mask, 0.0).detach()   # (..., T)


# ----- 3. The advantages: gae and whiten in advantage.py -----
# ----- 4. The losses: PPO Eq. 7, and of the value model -----


def loss_weights(completion_mask: Tensor, loss_average: str, max_new_tokens: int) -> Tensor:
    """The weight of each token in the loss: (..., T), 0 in the padding.

    The weights are computed over the whole batch of N completions. The losses and gradients of micro-batches therefore
    add up to those of the batch, however it is split.

        "sequence"  1/N 1/|o_i|               every completion counts the same (DeepSeekMath Eqs. 1 and 3)
        "token"     1 / sum_i |o_i|           every token counts the same, so long completions count more (DAPO Eq. 8)
        "constant"  1 / (N max_new_tokens)    a constant instead of |o_i|: no length bias (Dr. GRPO)
    """
    # Differs: DAPO averages over the tokens of a group, then over groups. Here, as is usual, over all tokens at once.
    mask = completion_mask.float()                                                          # (..., T)
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
    clip_eps: float = 0.2, clip_eps_high: float | None = None, penalty_beta: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-L^CLIP of PPO Eq. 7: -sum_t weight * min[r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t].

    Args:
        logprobs, old_logprobs: (..., T), in nats; only the first carries a gradient.
        advantages, completion_mask, weights: (..., T); weights as from `loss_weights`.
        penalty_beta: if given, PPO Eq. 8 instead: -sum_t weight * (r_t A_t - penalty_beta KL[pi_old, pi_theta]).

    Returns: the loss, a scalar, and the metrics ratio, clip_frac and approx_kl, each (..., T) without gradient.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == completion_mask.shape == weights.shape
    # The padding is masked before exp: an overflow there would make its gradient NaN instead of 0.
    log_ratio = (logprobs - old_logprobs).where(completion_mask, 0.0)                       # (..., T)
    advantages = advantages.where(completion_mask, 0.0)                                     # (..., T)
    # PPO Eq. 6: r_t = pi_theta / pi_old reweighs samples of the old policy to be those of the new one.
    ratio = log_ratio.exp()                                                                 # (..., T)
    approx_kl = torch.expm1(log_ratio) - log_ratio   # (..., T), k3 of KL[pi_old, pi_theta]: pi_old sampled the tokens

    # PPO Eq. 7, a pessimistic bound: the gradient is 0 only where the ratio has left the clip range in the direction in
    # which the advantage pushes it.
    unclipped = ratio * advantages                                                          # (..., T)
    clipped = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high)) * advantages
    objective = torch.minimum(unclipped, clipped)                                           # (..., T)
    if penalty_beta is not None:
        objective = unclipped - penalty_beta * approx_kl                                    # (..., T), Eq. 8

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
    # V_old + clip(V - V_old, -eps, eps), but exactly V, without rounding, where V is inside.
    clipped_values = values.clamp(old_values - value_clip_eps, old_values + value_clip_eps)  # (..., T)
    errors, clipped_errors = (values - returns).square(), (clipped_values - returns).square()  # (..., T), twice
    loss = (0.5 * torch.maximum(errors, clipped_errors) * weights).sum()                    # scalar
    return loss, (clipped_errors > errors).float().detach()


# ----- The loop: PPO Algorithm 1 -----


def train(args: Args, stop: threading.Event | None = None) -> Path:
    """Train a policy. Returns its folder, in Hugging Face format. Setting `stop` ends the run early."""
    args, stop = check_args(args), stop or threading.Event()
    if args.adaptive_kl_target and not args.beta:
        raise UserError("--adaptive-kl-target needs a --beta to start from")
    device = start(args)
    tokenizer, problems, held_out = load_problems(args)
    policy, eos_ids = load_policy(args.model, tokenizer, device)
    ref_policy = copy.deepcopy(policy).requires_grad_(False) if args.beta else None         # no KL, no reference
    value_model = ValueModel(policy)                                                        # Differs: no shared weights
    args = replace(args, share_prompt=can_share_prompt(policy, problems, args), dtype=choose_dtype(policy, args.dtype))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    sampler = make_sampler(policy, args.dtype)
    shard(ref_policy)
    shard(value_model, args.gradient_checkpointing)
    shard(policy, args.gradient_checkpointing)
    # Differs: constant learning rates, and `optimizer_step` clips the gradient.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    value_optimizer = torch.optim.AdamW(
        value_model.parameters(), lr=args.value_learning_rate, weight_decay=0.0, fused=True
    )
    models = {"policy": (policy, optimizer), "ref_policy": (ref_policy, None),              # what a checkpoint holds
              "value_model": (value_model, value_optimizer)}
    betas = {"kl": args.beta, "penalty": 1.0}                                               # PPO 4: any start will do
    run = Run(args, tokenizer, (problems, held_out), models, betas)
    for step in run.steps:
        run.step = step
        refresh_sampler(sampler, policy)                                                    # pi_old <- pi_theta
        last = step == args.num_steps or all_sum(torch.tensor(stop.is_set(), device=device, dtype=torch.long)) > 0
        if args.eval_every and (step % args.eval_every == 0 or step == args.num_steps):
            run.log(evaluate(run, sampler, held_out, eos_ids))
        if last or (args.save_every and step % args.save_every == 0):
            run.save(last)
        if last:
            break
        started = run.clock()

        # ---- 1. Generate completions: the policy as it is now is pi_old ----
        chosen = next_problems(problems, step, args.num_prompts, args.seed)                 # B pairs (ids, answer)
        prompts = pad_prompts([ids for ids, _ in chosen], device)                           # (B, P), ids and mask
        shape = args.num_prompts * args.group_size, args.max_new_tokens
        uniforms = torch.rand(shape, dtype=torch.float64, generator=seed_step(args.seed, step))  # (N, T)
        # Each process samples its share of the prompts. After `all_gather`, all of them have the whole batch.
        sampled = generate_completions(sampler, *(share(x) for x in (*prompts, uniforms)), args.temperature, eos_ids)
        answers = [answer for _, answer in share(chosen) for _ in range(args.group_size)]
        rewards = compute_rewards(decode(tokenizer, *sampled[:2]), answers, run)            # r_phi
        (rewards,), batch = all_gather(rewards), Batch(*prompts, *all_gather(*sampled))     # (N,); (N, T)
        lengths = batch.completion_mask.sum(-1)                                             # (N,), |o|
        ended = (torch.isin(batch.completion_ids, eos_ids) & batch.completion_mask).any(-1)  # (N,)
        sampled_at = run.clock()

        # ---- The same tokens under pi_old, pi_ref and the old value model, without gradient ----
        mask, has_signal = batch.completion_mask, torch.ones(args.num_prompts, dtype=torch.bool)  # (N, T); (B,)
        batch = batch if args.share_prompt else batch.unshared()
        # One update per minibatch; the gradients of its micro-batches are accumulated.
        minibatches = split_batch(batch, has_signal, policy.config.get_text_config().vocab_size, args)
        with torch.no_grad(), autocast:
            # Differs: by the forward pass of the update, not by the sampler, on minibatches that stay the same
            # in all epochs: before the first update the ratio is exactly 1.
            old_logprobs = score_batch(completion_logprobs, policy, batch, minibatches, args.temperature)  # (N, T)
            ref_logprobs = old_logprobs  # without a reference the KL is 0
            if ref_policy:
                ref_logprobs = score_batch(completion_logprobs, ref_policy, batch, minibatches, args.temperature)
            old_values = score_batch(completion_values, value_model, batch, minibatches)    # (N, T)

        # ---- 2. The KL from the reference goes into the reward of every token ----
        # Eq. 2 says pi_theta: the policy that sampled, our pi_old. A reward does not change during the epochs.
        kl = kl_estimate(old_logprobs, ref_logprobs, args.kl_estimator)                     # (N, T)
        r_t = token_rewards(rewards, kl, mask, betas["kl"] if args.kl_placement == "reward" else 0.0)  # (N, T)
        if args.whiten_rewards:
            r_t = whiten(r_t, mask, shift_mean=False)

        # ---- 3. The advantages: how much better than the value model predicted was each token? ----
        advantages, returns = gae(r_t, old_values, mask, args.gamma, args.gae_lambda)       # (N, T), twice
        explained = explained_variance(old_values, returns, mask)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask)                                           # (N, T). Differs
        # The weights are those of the whole batch, whichever minibatch a token is in. A minibatch holds
        # 1 / num_minibatches of the completions, hence the factor.
        weights = args.num_minibatches * loss_weights(mask, args.loss_average, args.max_new_tokens)  # (N, T)
        batch = batch._replace(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, advantages=advantages,
                               weights=weights, old_values=old_values, returns=returns)

        # ---- 4. The losses and the updates, K epochs ----
        metrics, value_metrics, warming_up = Metrics(), Metrics(), step < args.value_warmup_steps
        for epoch in range(1, args.update_epochs + 1):
            for minibatch in minibatches:
                for rows in map(batch.rows, minibatch):
                    with autocast:
                        values = completion_values(value_model, rows)                       # (N', T)
                    v_loss, value_clipped = value_loss(
                        values, rows.old_values, rows.returns, rows.completion_mask, rows.weights, args.value_clip_eps
                    )
                    v_loss.backward()  # now, so that its activations are gone before the policy's are there
                    value_metrics.add(rows.completion_mask, v_loss, clip_frac=value_clipped)
                    if warming_up:
                        continue  # Differs: first only the value model learns
                    with autocast:
                        logprobs, entropy = completion_logprobs(policy, rows, args.temperature)  # (N', T), twice
                    loss, per_token = policy_loss(
                        logprobs, rows.old_logprobs, rows.advantages, rows.completion_mask, rows.weights,
                        args.clip_eps, args.clip_eps_high, betas["penalty"] if args.penalty_kl_target else None,
                    )
                    if args.kl_placement == "loss" and ref_policy:
                        ref_kl = kl_estimate(logprobs, rows.ref_logprobs, args.kl_estimator)  # (N', T)
                        loss = loss + betas["kl"] * (ref_kl * rows.weights).sum()
                    if args.entropy_coef:
                        loss = loss - args.entropy_coef * (entropy * rows.weights).sum()    # PPO Eq. 9, c_2 S
                    loss.backward()
                    by_epoch = {f"{name}_epoch_{epoch}": per_token[name] for name in ("clip_frac", "approx_kl")}
                    metrics.add(rows.completion_mask, loss, entropy=entropy, **per_token, **by_epoch)
                value_metrics.grad_norms.append(optimizer_step(value_model, value_optimizer, args.max_grad_norm))
                if not warming_up:
                    metrics.grad_norms.append(optimizer_step(policy, optimizer, args.max_grad_norm))
            if args.early_stop_kl and not warming_up and metrics.mean(f"approx_kl_epoch_{epoch}") > args.early_stop_kl:
                break
        used_beta = betas["kl"]
        if args.penalty_kl_target and not warming_up:
            # PPO section 4: the next penalty follows from how far all updates together have moved the policy.
            with torch.no_grad(), autocast:
                logprobs = score_batch(completion_logprobs, policy, batch, minibatches, args.temperature)  # (N, T)
            moved = kl_estimate(old_logprobs, logprobs, "k3")[mask].mean().item()           # nats per token
            betas["penalty"] = penalty_beta(betas["penalty"], moved, args.penalty_kl_target)
        if args.adaptive_kl_target and not warming_up:
            betas["kl"] = adaptive_beta(used_beta, kl.sum(-1).mean().item(), args.adaptive_kl_target)

        run.log({
            "time/sample": sampled_at - started, "time/update": run.clock() - sampled_at,
            "reward/mean": rewards.mean(),
            "reward/std": rewards.std(),
            "completion/length": lengths.float().mean(),
            "completion/truncated": 1 - ended.float().mean(),
            "policy/kl": kl.sum() / mask.sum(),
            "policy/sampler_gap": (old_logprobs - batch.sampler_logprobs)[mask].abs().mean(),
            "policy/beta": used_beta,
            **(metrics.means("policy") if not warming_up else {}),
            **value_metrics.means("value"),
            "value/explained_variance": explained,
        })
    return run.finish()


# ================================== PLUMBING ====================================


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


LEARNING_RATES = {"learning_rate": (5e-4, 1e-6), "value_learning_rate": (1e-3, 1e-5)}  # of the tiny model, of others
LEAST = {  # other numbers are positive
    "beta": 0, "gamma": 0, "gae_lambda": 0, "entropy_coef": 0, "value_warmup_steps": 0, "seed": 0, "save_every": 0,
    "eval_every": 0
}
MOST = {"clip_eps": 1, "gamma": 1, "gae_lambda": 1}


def check_args(args: Args) -> Args:
    """Fill in defaults that depend on other arguments, and reject invalid values."""
    rates = {name: pair[args.model != Args.model] for name, pair in LEARNING_RATES.items()}
    args = replace(args, **{name: rate for name, rate in rates.items() if getattr(args, name) is None})
    if args.data != Args.data and args.eval_data == Args.eval_data:
        args = replace(args, eval_data="")  # that default belongs to the default --data
    for name, value in vars(args).items():
        least, most = LEAST.get(name, math.ulp(0)), MOST.get(name, 2**31)
        if type(value) in (int, float) and not least <= value <= most:
            wanted = f"at most {most}" if value > most else f"at least {least}" if name in LEAST else "positive"
            raise UserError(f"--{name.replace('_', '-')} must be {wanted}, got {value}")
    name = args.run_name
    if name is not None and (name in ("", "..") or Path(name).name != name or not name.isprintable()):
        raise UserError(f"--run-name must be the name of a folder in runs/, got {name!r}")
    if args.resume == "auto" and not name:
        raise UserError("--resume auto needs the --run-name of the run to resume")
    return args


# ----- Problems: prompts, completions and rewards -----


def load_problems(args: Args) -> tuple[PreTrainedTokenizerBase, list[tuple], list[tuple]]:
    """The tokenizer, the training problems and the held-out problems, each problem as (prompt ids, answer)."""
    with as_user_error(f"--model {args.model} is neither a model folder nor a reachable hub id"):
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)  # neither run its code, nor ask
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False).get_text_config()
        limits = config.vocab_size, (getattr(config, "max_position_embeddings", None) or math.inf) - args.max_new_tokens
    problems = read_problems(args.data, tokenizer, *limits)
    if args.eval_data:
        held_out = read_problems(args.eval_data, tokenizer, *limits)
    else:  # a tenth, drawn at random, always the same
        random.Random(0).shuffle(problems)
        number = min(256, len(problems) // 10 + 1)
        problems, held_out = problems[number:], problems[:number]
    if len(problems) < args.num_prompts:
        raise UserError(f"--num-prompts {args.num_prompts} is more than the {len(problems)} training problems")
    return tokenizer, problems, held_out


def read_problems(path: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, most_tokens: float) -> list[tuple]:
    """JSON lines as (prompt ids, answer); `read_problem` says what a line must hold."""
    problems = []
    with as_user_error(f"cannot read {path}"):
        lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        with as_user_error(f"{path}, line {number}"):
            if line.strip():
                prompt, answer = read_problem(json.loads(line.decode("utf-8-sig")))
                ids = encode_prompt(tokenizer, prompt)
                if not 0 < len(ids) <= most_tokens:
                    raise ValueError(f"it has {len(ids)} tokens; 1 to {most_tokens} fit beside --max-new-tokens")
                if max(ids) >= vocab_size:
                    raise ValueError(f"the tokenizer has token {max(ids)}, the model only {vocab_size} tokens")
                problems.append((ids, answer))
    if not problems:
        raise UserError(f"{path} is empty: it must hold one JSON object per line")
    return problems


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    """Encode a prompt. If there is a chat template, it adds the BOS token, and a last message of the assistant is
    continued. Special tokens in the text of a problem are encoded as plain text."""
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        return tokenizer(prompt, split_special_tokens=True).input_ids
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    is_message = lambda x: isinstance(x, dict) and isinstance(x.get("role"), str) and isinstance(x.get("content"), str)
    if not (isinstance(chat, list) and chat and all(map(is_message, chat))):
        raise ValueError('a prompt must be a text or a list of {"role": text, "content": text}')
    continued = chat[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(chat, add_generation_prompt=not continued, continue_final_message=continued,
                                         return_dict=False, sanitize_control_tokens=True)


def next_problems(problems: list, step: int, num_prompts: int, seed: int) -> list:
    """The problems of a step: every epoch has a new random order and drops its remainder. They follow from
    (seed, step), so a resumed run neither skips nor repeats one."""
    epoch, place = divmod(step, len(problems) // num_prompts)
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return [problems[i] for i in order[place * num_prompts : (place + 1) * num_prompts]]


def pad_prompts(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """prompt_ids and prompt_mask, (B, P), left-padded. The mask is by length, so pad may be any id."""
    ids = [torch.tensor(ids) for ids in prompts]
    masks = [torch.ones(len(ids), dtype=torch.bool) for ids in prompts]
    return tuple(pad_sequence(x, batch_first=True, padding_side="left").to(device) for x in (ids, masks))


def decode(tokenizer: PreTrainedTokenizerBase, completion_ids: Tensor, completion_mask: Tensor) -> list[str]:
    """The completions, (N, T), as texts. Special tokens are left out: `reward` does not see them."""
    rows = zip(completion_ids.tolist(), completion_mask.sum(1).tolist(), strict=True)
    return tokenizer.batch_decode([ids[:length] for ids, length in rows], skip_special_tokens=True)


def compute_rewards(completions: list[str], answers: list, run: "Run") -> Tensor:
    """The rewards of N completions, (N,). If `reward`, the user's own code, fails, the run is saved and the traceback
    shown."""
    rewards, failure = [], None
    try:
        for completion, answer in zip(completions, answers, strict=True):
            rewards.append(float(reward(completion, answer)))
            if not math.isfinite(rewards[-1]):
                raise ValueError(f"reward returned {rewards[-1]} for the completion {completion!r} to {answer!r}")
    except Exception as error:
        failure = error
    if all_sum(torch.tensor(float(failure is not None), device=run.device)):
        run.save()
        raise failure or UserError("the reward failed in another process")
    return torch.tensor(rewards, device=run.device)


@torch.no_grad()
def evaluate(run: "Run", sampler: nn.Module, problems: list, eos_ids: Tensor) -> dict[str, float]:
    """Mean reward on the held-out problems, greedy and sampled, and the mean length of the sampled completions. All
    completions are appended to completions.jsonl."""
    args, own, metrics = run.args, share(problems), {}
    size = args.num_prompts * args.group_size
    generator = torch.Generator().manual_seed(0)
    uniforms = share(torch.rand((len(problems), args.max_new_tokens), dtype=torch.float64, generator=generator))
    for kind, name, temperature in (("greedy", "eval/accuracy", 0.0), ("sampled", "eval/sampled", args.temperature)):
        completions, num_tokens = [], torch.zeros((), device=run.device)
        for i in range(0, len(own), size):
            prompts = pad_prompts([ids for ids, _ in own[i : i + size]], run.device)
            ids, mask, _ = generate_completions(sampler, *prompts, uniforms[i : i + size], temperature, eos_ids)
            completions += decode(run.tokenizer, ids, mask)
            num_tokens += mask.sum()
        rewards = compute_rewards(completions, [answer for _, answer in own], run)          # (problems,)
        totals = all_sum(torch.stack([rewards.sum(), num_tokens])) / len(problems)
        metrics[name], metrics["eval/length"] = totals.tolist()
        rows = [
            {"step": run.step, "kind": kind, "prompt": run.tokenizer.decode(ids), "completion": text, "answer": answer,
             "reward": r} for (ids, answer), text, r in zip(own, completions, rewards.tolist(), strict=True)
        ]
        rows = [*chain(*all_gather_objects(rows))]
        if world()[0] == 0:
            with contextlib.suppress(OSError), (run.folder / "completions.jsonl").open("a") as file:
                file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
        say("    {kind}, reward {reward:.2f}: {prompt}{completion}".format_map(rows[0])[-150:].replace("\n", " "))
    shown = "held-out accuracy {eval/accuracy:.3f} greedy, {eval/sampled:.3f} sampled, {eval/length:.1f} tokens"
    say(f"step {run.step}: {shown.format_map(metrics)}")
    return metrics


# ----- Cutting the batch into minibatches and micro-batches; the optimizer step -----


@torch.no_grad()
def can_share_prompt(policy: nn.Module, problems: list, args: Args) -> bool:
    """Whether the update can run a prompt once for all its completions; a model with linear attention cannot. Tried in
    float32, on two prompts of random tokens with two completions each. A model that looks ahead, or that samples
    differently from how it scores, is a user error."""
    vocab_size, device, generator = policy.config.get_text_config().vocab_size, policy.device, seed_step(0, 0)
    with as_user_error(f"--model {args.model} cannot be trained here"):
        longest = max(len(ids) for ids, _ in problems)
        width = max(2, min(args.max_new_tokens, max_logits(device) // vocab_size // 4))
        ids = torch.randint(vocab_size, (4, longest + width), generator=generator)
        prompts = pad_prompts([ids[0, :longest].tolist(), ids[1, : longest // 4 + 1].tolist()], device)
        mask = (torch.arange(width) < torch.tensor([[width], [width // 2], [1], [width]])).to(device)  # (4, width)
        ids[:, longest] = ids[0, longest]  # all begin alike, so two to one prompt agree on the first log-probability
        batch = Batch(*prompts, ids[:, longest:].to(device), mask, mask.float())
        alone, _ = completion_logprobs(policy, batch.unshared(), 1.0)                       # (4, width)
        if not (alone[::2, 0] - alone[1::2, 0]).abs().max() < 1e-3:
            raise ValueError("its predictions depend on later tokens, so it is no causal language model")
        eos_ids = torch.arange(0, vocab_size, 8, device=device)  # so many that some completions end early
        uniforms = torch.rand((4, min(width, 8)), generator=generator)
        sampled = generate_completions(policy, *prompts, uniforms, 1.0, eos_ids)
        scored, _ = completion_logprobs(policy, Batch(*prompts, *sampled).unshared(), 1.0)
        if not (gap := (scored - sampled[2]).abs().max().item()) < 1e-3:
            raise ValueError(f"the log-probabilities of sampling and of scoring differ by {gap:.2g} nats")
    if not args.share_prompt or args.group_size == 1 or args.gradient_checkpointing:  # it would fill a cache twice
        return False
    try:
        gap = (completion_logprobs(policy, batch, 1.0)[0] - alone).abs().max().item()
        reason = f"its log-probabilities would be off by {gap:.2g} nats"
        if gap < 1e-3:
            return True
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # a model without support can raise anything
        reason = str(error) or repr(error)
    say(f"This model cannot share a prompt in the update, so each completion gets its own: {reason}.")
    return False


def max_logits(device: torch.device) -> int:
    """Most logits in one pass of the update: in float32, 256 MB on a CPU and a 24th of the memory of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory // 96 if device.type == "cuda" else 2**26


def split_batch(batch: Batch, has_signal: Tensor, vocab_size: int, args: Args) -> list[tuple[Tensor, ...]]:
    """Cut the batch into minibatches, one optimizer update each, and this process's groups of each into micro-batches:
    whole groups, or equal parts of one. Groups without a signal add nothing to the gradient and are left out, but all
    processes keep the same number of groups and passes. Returns indices of completions."""
    (rank, processes), minibatches, device = world(), [], batch.prompt_ids.device
    prompts, lengths = batch.prompt_mask.sum(1).cpu(), batch.completion_mask.sum(1).cpu()   # (B,); (N,)
    groups = torch.arange(len(lengths)).view(len(prompts), -1)                              # (B, G), of completions
    G = groups.shape[1]
    groups = groups.gather(1, lengths[groups].argsort(dim=1, stable=True))                  # by length
    has_signal = has_signal.cpu().repeat_interleave(len(prompts) // len(has_signal))        # (B,)
    for chosen in torch.arange(len(prompts)).chunk(args.num_minibatches):
        kept = math.ceil(int(has_signal[chosen].sum()) / processes) * processes
        chosen = chosen[has_signal[chosen].byte().argsort(descending=True, stable=True)][:kept]
        chosen = chosen[(prompts[chosen] + lengths[groups[chosen]].sum(1)).argsort(descending=True, stable=True)]
        P, T = (int(x.max()) if kept else 0 for x in (prompts[chosen], lengths[groups[chosen]]))
        # A copy of the keys and values of a prompt takes about an eighth of the memory of its activations.
        fits = [n for n in range(2, kept * G + 1) if (n % G == 0 or G % n == 0) and n * T * vocab_size
                <= max_logits(device) and n * T + math.ceil(n / G) * P + n * P / 8 <= args.micro_batch_tokens]
        index = groups[chosen[rank::processes]].flatten().to(device)
        minibatches.append(index.split(max(fits, default=1)) if kept else ())
    return minibatches


def score_batch(score: Callable, model: nn.Module, batch: Batch, minibatches: list, *options: object) -> Tensor:
    """`completion_logprobs` or `completion_values` of the whole batch, (N, T), 0 where no micro-batch is; on the
    micro-batches of the update, so that they are the same numbers."""
    result = torch.zeros(batch.completion_ids.shape, device=batch.prompt_ids.device)
    for index in chain(*minibatches):
        output = score(model, batch.rows(index), *options)
        output = output[0] if isinstance(output, tuple) else output  # not the entropy
        result[index, : output.shape[1]] = output
    return all_sum(result)


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Tensor:
    """Clip the gradient by its global norm, step, and return the norm before clipping. No step if it is not finite."""
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if grad_norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


class Metrics:
    """Means over the tokens and the updates of a step, collected on the device."""

    def __init__(self):
        self.sums, self.counts, self.losses, self.ratios, self.grad_norms = {}, {}, [], [], []

    def add(self, mask: Tensor, loss: Tensor, **per_token: Tensor) -> None:
        """The loss of one micro-batch, and values of its tokens, (N', T)."""
        self.losses.append(loss.detach())
        self.ratios += [per_token.pop("ratio").where(mask, 0.0).max()] if "ratio" in per_token else []
        for name, value in per_token.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().where(mask, 0.0).sum()
            self.counts[name] = self.counts.get(name, 0) + mask.sum()

    def mean(self, name: str) -> float:
        """Over the tokens of all processes."""
        total, count = all_sum(torch.stack([self.sums[name], self.counts[name]])).tolist()
        return total / max(count, 1)

    def means(self, prefix: str) -> dict[str, float]:
        """All of them, under the names that TensorBoard shows."""
        means, finite = {name: self.mean(name) for name in self.sums}, [x for x in self.grad_norms if x.isfinite()]
        means["loss"] = all_sum(sum(self.losses)) / len(self.grad_norms) if self.losses else 0.0
        means["grad_norm"] = sum(finite) / max(1, len(finite))
        means["skipped"] = len(self.grad_norms) - len(finite)
        if self.ratios:
            means["ratio_max"] = all_gather(torch.stack(self.ratios)[None])[0].max()
        return {f"{prefix}/{name}": value for name, value in means.items()}


# ----- Models -----


def load_policy(model: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The policy in float32 without dropout, and every id that ends a completion."""
    with as_user_error(f"--model {model} cannot be loaded"):
        options = dict(trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
        policy, info = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
        lacking = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]  # would be random
        if lacking:
            raise ValueError(f"it has no weights, or none of the right shape, for {', '.join(sorted(lacking))}")
        if any(parameter.dtype != torch.float32 for parameter in policy.parameters()):
            raise ValueError("its weights are quantised; to train, they must be floating-point numbers")
        configs = policy.generation_config, policy.config.get_text_config(), tokenizer
        ends = [end if isinstance(end, list) else [end] for end in (config.eos_token_id for config in configs)]
        eos_ids = torch.tensor(sorted({i for end in ends for i in end if i is not None}), device=device)
        if not len(eos_ids):
            raise ValueError("it has no EOS token, so its completions could never end")
        return policy.to(device).eval(), eos_ids


def choose_dtype(policy: nn.Module, dtype: str) -> str:
    """Resolve --dtype auto."""
    device = policy.device.type
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    fast = native or (device == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16"))
    auto = "bfloat16" if fast and policy.num_parameters() > 10_000_000 else "float32"
    return auto if dtype == "auto" else dtype


def make_sampler(policy: nn.Module, dtype: str) -> nn.Module:
    """The model that samples: the policy itself, or a whole copy in the dtype of the computation."""
    if dtype == "float32" and not dist.is_initialized():
        return policy
    sampler = copy.deepcopy(policy).requires_grad_(False)
    for parameter in sampler.parameters():  # and no buffer: rounded rotary frequencies drift with the position
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return sampler


def record_step(policy: nn.Module, visible: Tensor, position_ids: Tensor, cache: StaticCache) -> Callable:
    """A step of sampling as a CUDA graph: a function of the last tokens, (N',), that returns the logits, (N', V). Every
    call reads and writes the same memory: the tokens, the positions, the cache, the logits."""
    tokens, graph = torch.zeros_like(position_ids), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = policy(tokens, attention_mask=visible, position_ids=position_ids, past_key_values=cache,
                        use_cache=True).logits[:, -1]

    def step(new_tokens: Tensor) -> Tensor:
        """Put the tokens, (N',), where the recording reads them, and replay it at the next position."""
        tokens.copy_(new_tokens[:, None])
        graph.replay()
        position_ids.add_(1)
        return logits

    return step


@torch.no_grad()
def refresh_sampler(sampler: nn.Module, policy: nn.Module) -> None:
    """Copy the policy's weights to the sampler."""
    for copied, current in zip(sampler.parameters(), policy.parameters(), strict=True):
        copied.copy_(full_tensor(current))  # does nothing where the policy itself samples


# ----- Processes: torchrun starts several; each samples, and computes gradients, for its share of the prompts -----


def start(args: Args) -> torch.device:
    """Choose the device, and join the other processes where torchrun has started several."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = accelerator if args.device == "auto" else torch.device(args.device)
    if device.type not in ("cpu", accelerator.type):
        raise UserError(f"--device {args.device}: not available on this machine")
    started_by_torchrun = "MASTER_ADDR" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"
    if started_by_torchrun and not dist.is_initialized():
        with as_user_error("cannot join the other processes, which torchrun starts"):
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
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


def share(rows):
    """This process's part of a tensor or a list."""
    rank, processes = world()
    return rows[len(rows) * rank // processes : len(rows) * (rank + 1) // processes]


def all_gather_objects(x: object) -> list:
    """x of every process."""
    objects = [x] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(objects, x)
    return objects


def all_gather(*columns: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes together, padded to one width in the last dimension."""
    if not dist.is_initialized():
        return columns
    parts = all_gather_objects([x.cpu() for x in columns])
    width = max(x.shape[-1] for part in parts for x in part)
    padded = ([nn.functional.pad(x, (0, width - x.shape[-1])) for x in column] for column in zip(*parts, strict=True))
    return tuple(torch.cat(column).to(columns[0].device) for column in padded)


def all_sum(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def full_tensor(x: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over the processes."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard(model: nn.Module | None, gradient_checkpointing: bool = False) -> None:
    """Wrap the layers of a model for gradient checkpointing, and shard its weights over the processes (FSDP2)."""
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)] if model else []
    for layer in layers if gradient_checkpointing else []:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if model and dist.is_initialized():
        mesh = dist.init_device_mesh(next(model.parameters()).device.type, (world()[1],))  # by default it is the GPUs
        for module in [*layers, model]:
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)  # the loss has one denominator for all: gradients add up
            module.set_force_sum_reduction_for_comms(True)


# ----- The run: checkpoints, curves, what is printed, signals -----


def say(text: str) -> None:
    """Print a line above the progress bar, in the first process only. An output that fails does not end the run."""
    if world()[0] == 0:
        with contextlib.suppress(OSError):
            tqdm.write(text, file=sys.stderr)


def seed_step(seed: int, step: int) -> torch.Generator:
    """Every random number of a step follows from (seed, step), so a checkpoint holds no random state."""
    random.seed(f"{seed} {step}")
    return torch.manual_seed(seed * 1_000_003 + step)


class Run:
    """What a run keeps in runs/RUN_NAME/ (curves, completions.jsonl, checkpoint.pt, policy/) and what it prints."""

    FREE = ("num_steps", "share_prompt", "micro_batch_tokens", "gradient_checkpointing", "device", "run_name", "resume",
            "save_every", "eval_every")  # these arguments may change when a run is resumed

    def __init__(self, args: Args, tokenizer: PreTrainedTokenizerBase, problems: tuple, models: dict, betas: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.args, self.tokenizer, self.betas, self.script = args, tokenizer, betas, Path(__file__).stem
        self.models = {name: pair for name, pair in models.items() if pair[0]}  # name: (model, its optimizer or None)
        self.policy, self.step, self.writer = models["policy"][0], 0, None
        self.device = self.policy.device
        flags = {f"--{name.replace('_', '-')}": x for name, x in vars(args).items() if name not in self.FREE}
        problems = hashlib.sha256(json.dumps(problems, default=str).encode()).hexdigest()
        self.fixed = {"script": self.script, **flags, "hash of the problems": problems}
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        self.folder = Path("runs", args.run_name or f"{self.script}-{Path(args.model).name}-seed{args.seed}-{now}")
        path = self.folder / "checkpoint.pt" if args.resume == "auto" else Path(args.resume or "")
        if args.resume is not None and (os.path.exists(path) or args.resume != "auto"):
            self.load(path)
        if world()[0] == 0:
            with as_user_error(f"cannot write the run to {self.folder} (to resume a run: --resume auto)"):
                self.folder.mkdir(parents=True, exist_ok=args.resume == "auto")
                self.lock()
                self.writer = SummaryWriter(str(self.folder), purge_step=self.step)
                self.writer.add_text("flags", "\n".join(f"    {name} = {x!r}" for name, x in vars(args).items()))
        size = sum(parameter.numel() for parameter in self.policy.parameters()) / 1e6
        say(f"{self.script}: {size:.1f} M parameters in {args.dtype} on {self.device.type}, step {self.step} of "
            f"{args.num_steps}, in {self.folder}")
        # The steps to train, and at the end --num-steps itself, for the last evaluation and save.
        self.steps = tqdm(range(self.step, args.num_steps + 1), self.script, args.num_steps, initial=self.step,
                          unit="step", disable=True if world()[0] else None)

    def lock(self) -> None:
        """Keep other processes out of the folder until this run ends, even by a kill."""
        file = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        weakref.finalize(self, os.close, file)
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another process is training in it") from None
        except (ImportError, OSError):  # Windows and some network disks have no such locks
            pass

    def clock(self) -> float:
        """The time in seconds, once the device has done its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def log(self, metrics: dict[str, Tensor | float]) -> None:
        """Add a point to every curve. Point s is measured after s steps of training."""
        metrics = {name: float(value) for name, value in metrics.items()}
        if "time/sample" in metrics:  # else it is an evaluation
            tokens = metrics["completion/length"] * self.args.num_prompts * self.args.group_size
            metrics["time/tokens_per_second"] = tokens / (metrics["time/sample"] + metrics["time/update"])
            self.steps.set_postfix_str("reward {reward/mean:.2f}, length {completion/length:.1f}, KL {policy/kl:.3f}, "
                                       "{time/tokens_per_second:.0f} tokens/s".format_map(metrics))
        if metrics.get("policy/skipped") or metrics.get("value/skipped"):
            say(f"step {self.step}: the gradient was not finite, so its update was skipped")
        try:
            for name, value in metrics.items() if self.writer else ():
                self.writer.add_scalar(name, value, self.step)
            if self.writer:
                self.writer.flush()  # before the checkpoint, so that a kill after it loses no point
        except OSError as error:  # a full disk ends the curves, not the run
            self.writer = None
            say(f"the curves end here, the run goes on: {error}")

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
        except (OSError, RuntimeError) as error:  # a full disk can be either
            aside.unlink(missing_ok=True)  # half of a file would only fill the disk
            if last:
                raise UserError(f"{self.folder} could not be saved: {error}") from None
            say(f"{self.folder} could not be saved: {error}")
        all_sum(torch.zeros((), device=self.device))  # the others wait for the one that writes

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
    """Train, and print a user error as one sentence. The first SIGINT or SIGTERM ends the run after the current step,
    the second one at once. Returns the exit code."""
    stop, handlers, code = threading.Event(), {}, 0

    def ask(number: int, _: object) -> None:
        """Handle the first signal; later ones act as if there were no handler."""
        stop.set()
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # not by print, which may be at work
            os.write(2, b"\nfinishing this step, then saving; a second signal exits at once\n")

    try:
        if threading.current_thread() is threading.main_thread():
            handlers |= {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        train(args, stop)
    except UserError as error:
        print(f"{Path(__file__).name}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if dist.is_initialized():
        if not code or dist.get_backend() != "nccl":  # otherwise it would wait for processes that wait for this one
            dist.destroy_process_group()
        os._exit(code)  # a normal exit sometimes aborts in a thread left over from gloo
    return code


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
