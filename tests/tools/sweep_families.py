# SPDX-License-Identifier: MIT
"""Goes over every kind of causal language model that transformers has, with tiny random weights: do the scripts train
it right, or say in one sentence that they cannot?

    python tests/tools/sweep_families.py [--modes MODE ...] [--only FAMILY ...] [--processes 2]

    score     does grpo.py sample and score right? The truth is each completion alone in a plain forward pass (default)
    grpo      two steps of grpo.py in float32, with and without --no-share-prompt: same curves? Is its export, loaded
              again, the trained model?
    ppo       the same with ppo.py, whose value model is trained from the first step
    bfloat16  both scripts with --dtype bfloat16
    two       grpo.py under torchrun with two processes. Without --only, of the families TWO

Verdicts; the exit code is 1 if there is a WRONG one:

    sharing    trains, and several completions share a prompt; in score, with the largest gap in nats
    alone      trains only with --no-share-prompt: a sentence refuses the other
    refused    a sentence says why, with --no-share-prompt, too, and nothing is written
    WRONG      none of these: wrong numbers, gradients that are not finite, an exception that is no UserError, no end
    not built  no tiny model could be made here, which says nothing about the scripts
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed.checkpoint.state_dict  # these three once, before the forks
import torch.distributed.fsdp
import torch.utils.tensorboard
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import grpo
import ppo
from helpers.runs import SMALL, command, curves, make_folder, start, variety
from helpers.tiny_models import alone, plain_logprobs, with_copies

SECONDS, TOLERANCE, VOCAB, NO_DECODER = 120, 1e-3, 61, "is_decoder is False"
TWO = ["llama", "gemma3_text", "mixtral", "qwen3_5_text", "falcon_h1", "zamba", "gpt2", "gpt_neo"]
PROMPT_LENGTHS, ENDS = (20, 11, 3), torch.tensor([1, 5, 9, 17, 33])
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
    "youtu": dict(pad_token_id=None),  # transformers sets the row of that token to 0 whenever it loads a model
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


def make_finite_model(family: str, special: dict) -> tuple[torch.nn.Module, list[str]]:
    """The largest weights whose logits are finite; notes on what is unusual about it."""
    for std in (0.3, 0.1, 0.03):
        model = make_model(family, std, special)
        with torch.no_grad(), contextlib.suppress(Exception):  # the script is to say what that is
            if model(torch.arange(2, 22)[None]).logits.isfinite().all():
                break
    notes = [] if std == 0.3 else [f"std {std}"]
    decodes = getattr(model.config, "is_decoder", True) or model.config.is_encoder_decoder
    return model, notes if decodes else [*notes, NO_DECODER]


def finite_gradients(model: torch.nn.Module, batch: grpo.Batch) -> bool:
    model.zero_grad()
    grpo.completion_logprobs(model, batch, 1.0)[0].sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(gradients) and all(gradient.isfinite().all() for gradient in gradients)


def ways_that_pass(attempt: Callable) -> tuple[dict, list[str]]:
    """What `attempt` gives with sharing and without, where it is not refused; the sentences of refusal. All that trains
    with shared prompts must train without."""
    found, refusals = {}, []
    for share_prompt in (True, False):
        try:
            found[share_prompt] = attempt(share_prompt)
        except (grpo.UserError, ppo.UserError) as error:
            refusals.append(str(error))
    assert False in found or not found, f"trains only with shared prompts: {refusals}"
    return found, refusals


def verdict_on(found: dict) -> str:
    return "sharing" if True in found else "alone" if found else "refused"


def score(family: str, model: torch.nn.Module, notes: list[str]) -> tuple[str, float, str]:
    """The verdict on one family, the largest gap, and a note."""
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB, (length,), generator=random).tolist() for length in PROMPT_LENGTHS]
    pairs = [(ids, {}) for ids in prompts]
    check = lambda share_prompt: grpo.check_policy(model, pairs, grpo.Args(model=family, share_prompt=share_prompt))
    found, refusals = ways_that_pass(check)
    if not found:
        return "refused", 0.0, " ".join([*notes, *refusals[:1]])
    ids, mask = grpo.pad_prompts(prompts, torch.device("cpu"))
    torch.manual_seed(0)
    batch = grpo.Batch(ids, mask, *grpo.generate_completions(model, ids, mask, 4, 24, 1.0, ENDS))
    changed = batch._replace(prompt_ids=(ids + 1) % VOCAB)
    with torch.no_grad():
        truth, other = (alone(partial(plain_logprobs, model), x) for x in (batch, changed))          # (N, T), each
    gaps, all_finite = {"sampled": batch.sampler_logprobs - truth}, True
    for share_prompt in found:
        one = batch if share_prompt else with_copies(batch)
        with torch.no_grad():
            gaps["shared" if share_prompt else "alone"] = grpo.completion_logprobs(model, one, 1.0)[0] - truth
        all_finite &= finite_gradients(model, one)
    largest, hangs = torch.stack(list(gaps.values())).abs().max().item(), (other - truth).abs().max()
    notes += [] if hangs > 0.05 else [f"(only {hangs:.2g} nats hang on the prompt)"]
    if largest <= TOLERANCE and all_finite:
        return verdict_on(found), largest, "; ".join([*notes, *refusals])
    notes += [] if all_finite else ["gradients are not finite"]
    notes.append(", ".join(f"{name} {x.abs().max():.2g}" for name, x in gaps.items()))
    return "WRONG", largest, "; ".join(notes)


def finite_curves(name: str) -> dict:
    points = {curve: [value for _, value in points] for curve, points in curves(name).items()}
    for curve, values in points.items():
        assert all(map(math.isfinite, values)), f"{name} has {curve} {values}"
        expected = {"skipped": False, "grad_norm": True}.get(curve.partition("/")[2], any(values))
        assert any(values) == expected, f"{name} has {curve} {values}"
    return points


@torch.no_grad()
def train(script, **args: object) -> dict:
    """The curves of two steps in this process, once the export is found to be the trained model."""
    kept, load, name = [], script.load_policy, f"{script.__name__}_{args['share_prompt']}"
    script.load_policy = lambda *x: kept.append(load(*x)) or kept[-1]
    script.reward, script.say = variety, lambda text: None
    try:
        with torch.enable_grad():
            script.train(script.Args(**SMALL | dict(num_steps=2, run_name=name) | args))
    except script.UserError:
        assert not Path("runs", name).exists(), "it is refused after the run has begun"
        raise
    finally:
        script.load_policy = load
    points = finite_curves(name)
    exported, info = AutoModelForCausalLM.from_pretrained(f"runs/{name}/policy", output_loading_info=True)
    before, after, ids = kept[0].state_dict(), exported.state_dict(), torch.arange(2, 22)[None]
    wrong = info | {"other": [x for x in before.keys() & after if not torch.equal(before[x], after[x])]}
    assert not any(wrong.values()), f"the export of {name} has wrong weights: {wrong}"
    gaps = [(kept[0](ids).logits - exported(ids).logits).abs().max().item(), *points["policy/sampler_gap"]]
    gaps = gaps[:1] if args["dtype"] == "bfloat16" else gaps
    assert max(gaps) < TOLERANCE, f"{name}: the logits of the export, and the sampler, are off by {gaps}"
    return points


def try_training(mode: str) -> tuple[str, float, str]:
    """On the model of this folder. With and without shared prompts the first points of all curves are the same."""
    dtype, verdicts, notes = mode if mode == "bfloat16" else "float32", set(), []
    for script in {"ppo": [ppo], "bfloat16": [grpo, ppo]}.get(mode, [grpo]):
        own = dict(value_warmup_steps=0) if script is ppo else {}
        found, refusals = ways_that_pass(lambda share, script=script, own=own: train(
            script, share_prompt=share, dtype=dtype, **own))
        verdicts.add(verdict_on(found))
        notes += refusals[:1]
        if True in found and dtype == "float32":
            for curve, (value, *_) in found[True].items():
                other = found[False][curve][0]
                are_close = math.isclose(value, other, rel_tol=1e-3, abs_tol=1e-5)
                assert are_close, f"{curve} is {value} with shared prompts, {other} without"
        if mode == "two" and found:
            flags = dict(run_name="two", num_steps=1, share_prompt=True in found)
            with start(command("grpo", processes=2, **flags)) as process:
                said, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, f"two processes ended with {process.returncode} and said {said[-600:]}"
            assert finite_curves("two")["policy/sampler_gap"][0] < TOLERANCE
            AutoModelForCausalLM.from_pretrained("runs/two/policy")
    assert len(verdicts) == 1, f"one script trains it, the other does not: {notes}"
    return verdicts.pop(), 0.0, "; ".join(notes)


def verdict(mode: str, family: str, special: dict, folder: str) -> tuple[str, float, str]:
    """In a process of its own."""
    os.chdir(folder)
    try:
        model, notes = make_finite_model(family, special)
        if mode != "score":
            make_folder(Path())
            model = make_finite_model(family, dict(is_decoder=True))[0] if NO_DECODER in notes else model
            model.save_pretrained("model")
    except Exception as error:
        return "not built", 0.0, f"{type(error).__name__}: {error}"
    try:
        return score(family, model, notes) if mode == "score" else try_training(mode)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        frames = [x for x in frames if x.filename in (grpo.__file__, ppo.__file__) or x is frames[-1]]
        lines = " ".join(f"{Path(x.filename).name}:{x.lineno}" for x in frames)
        return "WRONG", math.nan, f"{type(error).__name__} in {lines}: {error}"


def apart(mode: str, family: str, special: dict) -> tuple[str, float, str]:
    """The verdict of a fork of this process, in a temporary folder: it may crash, or never end."""
    fork, started = multiprocessing.get_context("fork"), time.time()
    receiver, sender = fork.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = fork.Process(target=lambda: sender.send(verdict(mode, family, special, folder)))
        process.start()
        sender.close()
        found = "WRONG", math.nan, "no end, or its process died"
        with contextlib.suppress(EOFError):
            if receiver.poll(SECONDS * (2 if mode == "two" else 1)):
                found = receiver.recv()
        process.kill()
        process.join()
    if mode == "score" or found[0] != "sharing":
        name = f"{mode:8} {family + ' (decoder)' * bool(special):32} {found[0]:9} {found[1]:8.2g}"
        print(f"{name} {time.time() - started:3.0f} s  {' '.join(found[2].split())}"[:400], flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = "score", "grpo", "ppo", "bfloat16", "two"
    parser.add_argument("--modes", nargs="+", default=["score"], choices=modes)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", choices=list(CONFIG_MAPPING))
    parser.add_argument("--processes", type=int, default=2, help="at once")
    args, wrong = parser.parse_args(), 0
    for mode in args.modes:
        families = args.only or (TWO if mode == "two" else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        with ThreadPool(args.processes) as pool:
            found = pool.starmap(apart, [(mode, family, {}) for family in families], chunksize=1)
            encoders = [family for family, x in zip(families, found, strict=True) if NO_DECODER in x[2]]
            causal = pool.starmap(apart, [(mode, family, {"is_decoder": True}) for family in encoders], chunksize=1)
        for title, results in {"as their configs are": found, "of these, made causal": causal}.items():
            if results:
                counts = Counter(x[0] for x in results)
                print(f"{mode}: {len(results)} {title}:", dict(counts.most_common()), flush=True)
                wrong += counts["WRONG"]
    return int(wrong > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main())
