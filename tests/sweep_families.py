# SPDX-License-Identifier: MIT
"""Goes over every kind of causal language model that transformers has, with tiny random weights: does grpo.py sample
and score it right, or say in one sentence that it cannot?  python tests/sweep_families.py [FAMILY ...]  (10 minutes)

The truth is each completion alone behind its prompt in a plain forward pass. Verdicts, with the largest gap in nats:

    shares     several completions share a prompt, and all numbers are right
    alone      each completion gets a prompt of its own, and all numbers are right
    refused    a sentence says why before that
    WRONG      none of these: wrong numbers, gradients that are not finite, an exception that is no UserError, no end
    not built  no tiny model could be made here, which says nothing about grpo.py
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import grpo
from families import with_copies

SECONDS, CPUS, TOLERANCE, VOCAB, NO_DECODER = 60, 2, 1e-3, 61, "is_decoder is False"
PROMPT_LENGTHS, SHAPE, ENDS = (20, 11, 3), (12, 24), torch.tensor([1, 5, 9, 17, 33])
# What makes a model tiny, whatever its config class calls it.
TINY = """
61 vocab_size vocab_size_per_layer_input unpadded_vocab_size shape_vocab_size pronunciation_vocab_size
61 encoder_hash_byte_group_vocab
32 hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim lru_width input_embedding_size
32 output_embedding_size attention_hidden_size mamba_d_ssm
48 intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner dff dim_ff d_inner feed_forward_size
48 moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp
48 shared_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size
48 shared_experts_intermediate_size
2 num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers
2 depth num_blocks num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok
2 moe_k moe_topk top_k_experts
4 num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
4 num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads hc_mult
4 linear_num_heads mamba_n_heads mamba_num_heads num_experts n_routed_experts num_local_experts moe_num_experts
4 zero_expert_num
8 head_dim swa_head_dim dim_head d_head attention_head_dim attention_head_size kv_channels d_rel qk_rope_head_dim
8 qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head
8 mamba_head_dim mamba_d_state state_size ssm_state_size kv_lora_rank q_lora_rank o_lora_rank adapter_rank laurel_rank
8 hidden_size_per_layer_input rotary_dim time_step_rank mamba_dt_rank gated_norm_rank
1 n_group topk_group mamba_n_groups n_groups n_shared_experts num_shared_experts num_dense_layers
1 first_k_dense_replace mamba_expand expand eos_token_id pad_token_id
0 bos_token_id
256 max_position_embeddings n_positions max_seq_len n_ctx context_length max_target_positions
40 sliding_window window_size attention_chunk_size sliding_window_size attention_window_size
40 local_attention_window_len
16 index_topk index_n_heads index_topk_blocks query_pre_attn_scalar image_size chunk_size mamba_chunk_size
"""
TINY = {name: int(size) for size, *names in map(str.split, TINY.split("\n")[1:-1]) for name in names}
# What only one kind needs.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NGRAMS = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=16, indexer_compress_ratio=4,
              ple_layer_ids=[1], ple_embed_dim=32, heads_per_ngram=4, ngram_vocab_size_base=50, split_ngram_parts=1,
              make_ngram_vocab_size_divisible_by=1)
DOTS = dict(num_key_value_heads=4, swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=8,
            swa_kv_lora_rank=8, swa_head_dim=16, swa_qk_nope_head_dim=8, swa_v_head_dim=8, swa_qk_rope_head_dim=8)
LINEAR, FULL, SLIDING, HYBRID = "linear_attention", "full_attention", "sliding_attention", "hybrid"
SPECIAL = {
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(rope_parameters={SLIDING: ROPE, FULL: ROPE}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0), ffn_config=dict(moe_top_k=2)),
    "dots3_note": dict(text_config=DOTS, audio_config=dict(adapter_input_size=32,
                       adapter_out_dim=32), vision_config=dict(adapter_in_dim=32, adapter_out_dim=32)),
    "dots3_note_text": DOTS,
    "gemma3n_text": dict(layer_types=[SLIDING, FULL] * 2, num_hidden_layers=4, num_kv_shared_layers=2,
                         activation_sparsity_pattern=[0.5, 0.0, 0.5, 0.0]),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=[LINEAR, FULL]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_hidden_layers=4),
    "lfm2": dict(layer_types=["conv", FULL]),
    "lfm2_moe": dict(layer_types=["conv", FULL]),
    "modernbert-decoder": dict(local_attention=80),
    "qwen4_exp": dict(text_config=NGRAMS),
    "qwen4_exp_text": NGRAMS,
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(is_decoder=True, attn_layers=("local", "lsh"), axial_pos_shape=(16, 16),
                     axial_pos_embds_dim=(16, 16), local_attn_chunk_length=8, lsh_attn_chunk_length=8),
    "xlstm": dict(embedding_dim=128, hidden_size=128),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=[LINEAR, HYBRID] * 2, num_hidden_layers=4, attention_hidden_size=64,
                  attention_head_dim=16, num_key_value_heads=4),
    "zamba2": dict(layers_block_type=[LINEAR, HYBRID] * 2, num_hidden_layers=4, num_key_value_heads=4),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


def tiny(config_class: type, special: dict) -> dict:
    """Arguments: all of those names that the class has, one layer of every kind, the same for the configs inside it."""
    usual, fields = config_class(), config_class.__dataclass_fields__
    chosen = {name: value for name, value in TINY.items() if name in fields}
    kinds = {name: getattr(usual, name, None) for name in ("layer_types", "mlp_layer_types") if name in fields}
    kinds = {name: list(dict.fromkeys(x)) for name, x in kinds.items() if x}
    number = max([2, *map(len, kinds.values())])
    if kinds:
        chosen |= {name: (x * number)[:number] for name, x in kinds.items()} | {"num_hidden_layers": number}
    if "kv_lora_rank" in fields:  # every head has keys of its own
        chosen["num_key_value_heads"] = 4
    inner = {name: type(getattr(usual, name)) for name in config_class.sub_configs if getattr(usual, name) is not None}
    return chosen | special | {
        name: {"model_type": x.model_type} | tiny(x, special.get(name, {})) for name, x in inner.items()
    }


def make_model(family: str, std: float, special: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[family]
    config = config_class(**tiny(config_class, SPECIAL.get(family, {}) | special))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, std)
    return model


@torch.no_grad()
def one_by_one(model: torch.nn.Module, batch: grpo.Batch, change: int = 0) -> torch.Tensor:
    """The truth, (12, T): every completion alone, without padding, mask or positions. `change`: of the first id."""
    logprobs, batch = torch.zeros(batch.completion_ids.shape), with_copies(batch)
    for i in range(len(logprobs)):
        prompt, ids = batch.prompt_ids[i][batch.prompt_mask[i]], batch.completion_ids[i][batch.completion_mask[i]]
        prompt = torch.cat([(prompt[:1] + change) % VOCAB, prompt[1:]])
        logits = model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs[i, : len(ids)] = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return logprobs


def finite_gradients(model: torch.nn.Module, batch: grpo.Batch) -> bool:
    model.zero_grad()
    grpo.completion_logprobs(model, batch, 1.0)[0].sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(gradients) and all(gradient.isfinite().all() for gradient in gradients)


def check(family: str, special: dict) -> tuple[str, float, str]:
    """The verdict on one family, the largest gap, and a note."""
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB, (length,), generator=random).tolist() for length in PROMPT_LENGTHS]
    uniforms = torch.rand(SHAPE, dtype=torch.float64, generator=random)
    for std in (0.3, 0.1, 0.03):
        try:
            model = make_model(family, std, special)
        except Exception as error:
            return "not built", 0.0, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        with torch.no_grad(), contextlib.suppress(Exception):  # grpo.py is to say what that is
            if model(torch.tensor(prompts[:1])).logits.isfinite().all():
                break
    notes = [] if std == 0.3 else [f"std {std}"]
    notes += [] if getattr(model.config, "is_decoder", True) or model.config.is_encoder_decoder else [NO_DECODER]
    grpo.say = notes.append
    try:
        args = grpo.Args(model=family, max_new_tokens=SHAPE[1])
        shared = grpo.prepare(args, model, [], [(ids, {}) for ids in prompts])[0].share_prompt
    except grpo.UserError as error:
        return "refused", 0.0, " ".join([*notes, *str(error).split()])
    ids, mask = grpo.pad_prompts(prompts, torch.device("cpu"))
    batch = grpo.Batch(ids, mask, *grpo.generate_completions(model, ids, mask, uniforms, 1.0, ENDS))
    truth, of_token = one_by_one(model, batch), batch.completion_mask
    gaps, all_finite = {"sampled": (batch.sampler_logprobs - truth)[of_token].abs()}, True
    for name, one in {"alone": with_copies(batch), **({"shared": batch} if shared else {})}.items():
        with torch.no_grad():
            scored = grpo.completion_logprobs(model, one, 1.0)[0]
        gaps[name] = (scored - truth)[of_token].abs()
        all_finite &= finite_gradients(model, one)
        if name == "alone":
            gaps["sampled - scored"] = (batch.sampler_logprobs - scored)[of_token].abs()
    largest = torch.cat(list(gaps.values())).max().item()
    hangs = (one_by_one(model, batch, change=1) - truth).abs().max()
    notes += [] if hangs > 0.05 else [f"(only {hangs:.2g} nats hang on the first token)"]
    notes += [] if all_finite else ["gradients are not finite"]
    if largest <= TOLERANCE and all_finite:
        return "shares" if shared else "alone", largest, "; ".join(notes)
    notes.append(", ".join(f"{name} {x.max():.2g}" for name, x in gaps.items()))
    return "WRONG", largest, "; ".join(notes)


def verdict(case: tuple[str, dict]) -> tuple[str, float, str]:
    """In a process of its own."""
    signal.alarm(SECONDS)  # ends the process
    started = time.time()
    try:
        found = check(*case)
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == grpo.__file__]
        found = "WRONG", math.nan, f"{type(error).__name__} in lines {lines} of grpo.py: {' '.join(str(error).split())}"
    name = case[0] + " (decoder)" * bool(case[1])
    print(f"{name:32} {found[0]:9} {found[1]:8.2g} {time.time() - started:3.0f} s  {found[2]}"[:400], flush=True)
    return found


def go_over(title: str, cases: list[tuple[str, dict]]) -> list[tuple[str, float, str]]:
    with multiprocessing.get_context("fork").Pool(CPUS, maxtasksperchild=1) as pool:
        results = []
        for case, waiting in [(case, pool.apply_async(verdict, (case,))) for case in cases]:
            try:
                results.append(waiting.get(SECONDS + 5))
            except multiprocessing.TimeoutError:
                results.append(("WRONG", math.nan, "no end, or its process died"))
                print(f"{case[0]:32} {results[-1]}", flush=True)
    print(f"{len(cases)} {title}:", dict(Counter(found[0] for found in results).most_common()))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    families = sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = go_over("as their configs are", [(family, {}) for family in families])
    encoders = [family for family, found in zip(families, results, strict=True) if NO_DECODER in found[2]]
    go_over("of these, made causal", [(family, {"is_decoder": True}) for family in encoders])
