# SPDX-License-Identifier: MIT
"""Random tiny models of real families, and batches for them: nothing is downloaded."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import grpo
import ppo
from ppo import ValueModel

VOCAB = 61
BASE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)
# Families that can share a prompt in the update, with what makes each of them special switched on.
SHARING = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": dict(sliding_window=None),
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere": dict(logit_scale=0.3),
    "gemma2": dict(sliding_window=64, final_logit_softcapping=5.0),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "gemma3_text": dict(sliding_window=64),
    "hyperclovax": dict(logits_scaling=3.0),
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4),
    "ministral": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
}
# Families that cannot: linear attention, a state space beside the attention.
NOT_SHARING = {
    "qwen3_5_text": dict(
        num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "falcon_h1": dict(
        mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, lm_head_multiplier=0.5,
    ),
}
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


def trained_value_model(policy: nn.Module) -> ValueModel:
    """One whose head is no longer 0, in the policy's dtype."""
    value_model = ValueModel(policy).to(policy.dtype)
    torch.manual_seed(1)
    for parameter in value_model.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return value_model


def random_numbers(*shape: int) -> Tensor:
    """Uniform, in float64, and always the same."""
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sample(model: nn.Module, group_size=4, max_new_tokens=10, temperature=0.7, script=grpo) -> grpo.Batch | ppo.Batch:
    """Completions of PROMPTS."""
    prompts = script.pad_prompts(PROMPTS, torch.device("cpu"))
    uniforms = random_numbers(len(PROMPTS) * group_size, max_new_tokens)
    return script.Batch(*prompts, *script.generate_completions(model, *prompts, uniforms, temperature, ENDS))


def batch_of(script, num_prompts=3, group_size=4, width=7, seed=0) -> grpo.Batch | ppo.Batch:
    """Random tokens in prompts and completions of many lengths; the padding holds real ids, too."""
    generator, num_rows = torch.Generator().manual_seed(seed), num_prompts * group_size
    prompt_lengths = torch.randint(1, 6, (num_prompts, 1), generator=generator)
    lengths = torch.randint(1, width + 1, (num_rows, 1), generator=generator)
    prompt_ids = torch.randint(2, VOCAB, (num_prompts, 5), generator=generator)
    completion_ids = torch.randint(2, VOCAB, (num_rows, width), generator=generator)
    masks = torch.arange(5) >= 5 - prompt_lengths, torch.arange(width) < lengths
    return script.Batch(prompt_ids, masks[0], completion_ids, masks[1], torch.zeros(masks[1].shape))


def tokens_of(ids: Tensor, mask: Tensor) -> list[list]:
    """Row by row, without the padding."""
    return [row[counted].tolist() for row, counted in zip(ids, mask, strict=True)]


def with_copies(batch):
    """The same with a copy of its prompt for every completion, as if G were 1."""
    prompts = torch.arange(len(batch.completion_ids)) * len(batch.prompt_ids) // len(batch.completion_ids)
    return batch._replace(prompt_ids=batch.prompt_ids[prompts], prompt_mask=batch.prompt_mask[prompts])


def in_parts(script, score, batch, size: int, share_prompt: bool) -> Tensor:
    """What `score` gives for the batch in parts of `size` completions, (N, T)."""
    indices, width = torch.arange(len(batch.completion_ids)).split(size), batch.completion_ids.shape[1]
    share = min(size, len(batch.completion_ids) // len(batch.prompt_ids)) if share_prompt else 1
    parts = [score(script.take_completions(batch, index, share)) for index in indices]
    return torch.cat([nn.functional.pad(x, (0, width - x.shape[1])) for x in parts])
