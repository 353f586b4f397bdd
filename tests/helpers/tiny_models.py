# SPDX-License-Identifier: MIT
"""Random tiny models of real families, and batches for them: nothing is downloaded."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import grpo
import ppo

VOCAB = 61
BASE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)
# Families that can share a prompt in the update, with what makes each of them special switched on.
SHARING = {
    **{family: {} for family in ("llama", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gpt_neox")},
    "mistral": dict(sliding_window=None),
    "granite": dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere": dict(logit_scale=0.3),
    "gemma2": dict(sliding_window=64, final_logit_softcapping=5.0),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=16),  # its last states are narrower, as in OPT-350m
    "gemma3_text": dict(sliding_window=64),
    "hyperclovax": dict(logits_scaling=3.0),
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4),
    "ministral": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    # Experts, and a base model that is the language model itself.
    "llama4_text": dict(num_local_experts=2, intermediate_size_mlp=48, no_rope_layers=[1, 0], attention_chunk_size=64),
}
# Families that cannot: linear attention, a state space beside the attention.
NOT_SHARING = {
    "qwen3_5_text": dict(num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                         linear_value_head_dim=8),
    "falcon_h1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
                      lm_head_multiplier=0.5),
}  # fmt: skip
PROMPTS = [[5, 0, 7, 8, 9, 0, 0], [4, 3, 2], [0]]  # ragged, with the padding's 0 inside and last, as in a chat
ENDS = torch.arange(0, VOCAB, 6)  # many end tokens, of which the padding's 0 is one: rows end at different times


def make_model(family: str, dtype: torch.dtype = torch.float64, **special) -> nn.Module:
    """A model whose weights are large enough for its predictions to differ from token to token."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **BASE | (SHARING | NOT_SHARING).get(family, {}) | special)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def trained_value_model(policy: nn.Module) -> ppo.ValueModel:
    """One whose head is no longer 0, in the policy's dtype."""
    value_model = ppo.ValueModel(policy).to(policy.dtype)
    torch.manual_seed(1)
    for parameter in value_model.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return value_model


def sample(model: nn.Module, max_new_tokens=10, temperature=0.7) -> grpo.Batch:
    """Four completions of each of PROMPTS, always from the same random numbers."""
    prompts = grpo.pad_prompts(PROMPTS, torch.device("cpu"))
    torch.manual_seed(0)
    return grpo.Batch(*prompts, *grpo.generate_completions(model, *prompts, 4, max_new_tokens, temperature, ENDS))


def batch_of(script, num_prompts=3, group_size=4, width=7, seed=0) -> grpo.Batch | ppo.Batch:
    """Random tokens in prompts and completions of many lengths, among them the padding's 0 and the end token 1; the
    padding holds real ids, too."""
    generator, num_rows = torch.Generator().manual_seed(seed), num_prompts * group_size
    prompt_lengths = torch.randint(1, 6, (num_prompts, 1), generator=generator)
    lengths = torch.randint(1, width + 1, (num_rows, 1), generator=generator)
    prompt_ids = torch.randint(0, 9, (num_prompts, 5), generator=generator)
    completion_ids = torch.randint(0, 9, (num_rows, width), generator=generator)
    masks = torch.arange(5) >= 5 - prompt_lengths, torch.arange(width) < lengths
    return script.Batch(prompt_ids, masks[0], completion_ids, masks[1], torch.zeros(masks[1].shape))


def tokens_of(ids: Tensor, mask: Tensor) -> list[list]:
    """Row by row, without the padding."""
    return [row[counted].tolist() for row, counted in zip(ids, mask, strict=True)]


def with_copies(batch):
    """The same with a copy of its prompt for every completion, as if G were 1."""
    prompts = torch.arange(len(batch.completion_ids)) * len(batch.prompt_ids) // len(batch.completion_ids)
    return batch._replace(prompt_ids=batch.prompt_ids[prompts], prompt_mask=batch.prompt_mask[prompts])


def alone(score: Callable, batch) -> Tensor:
    """The plainest way to a number for every token, (N, T), 0 in the padding: each prompt with its completion in a
    forward pass of its own, without padding, mask or positions. `score` gets it and where the completion starts."""
    copies, rows = with_copies(batch), []
    prompts = tokens_of(copies.prompt_ids, copies.prompt_mask)
    for prompt, ids in zip(prompts, tokens_of(batch.completion_ids, batch.completion_mask), strict=True):
        row = score(torch.tensor(prompt + ids), len(prompt))                                # (|o|,)
        rows.append(nn.functional.pad(row, (0, batch.completion_ids.shape[1] - len(row))))
    return torch.stack(rows)


def plain_logprobs(policy: nn.Module, text: Tensor, start: int, temperature: float = 1.0) -> Tensor:
    """Of the tokens of a text from `start` on, (|o|,), through the model's own forward."""
    logp = (policy(text[None]).logits[0, start - 1 : -1] / temperature).log_softmax(-1)     # (|o|, V)
    return logp.gather(1, text[start:, None])[:, 0]
