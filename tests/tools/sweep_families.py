# SPDX-License-Identifier: MIT
"""Goes over every kind of causal language model that transformers has, with tiny random weights: do the scripts train
it right, or say in one sentence that they cannot?

    python tests/tools/sweep_families.py [--modes MODE ...] [--only FAMILY ...] [--processes 2]

    score     does grpo.py sample and score right? The truth is each completion alone in a plain forward pass (default)
    grpo      two steps of grpo.py in float32; then its export is loaded again and compared with the trained model
    ppo       the same with ppo.py, whose value model is trained from the first step
    bfloat16  both scripts with --dtype bfloat16
    options   grpo.py where config.json asks for attentions, hidden states and router logits in a tuple: same curves?
    two       grpo.py under torchrun with two processes: the gradient norm of one? Without --only, of the families TWO

Verdicts; the exit code is 1 if there is a WRONG one:

    shares     several completions share a prompt, and all numbers are right, with the largest gap in nats
    alone      each completion gets a prompt of its own, and all numbers are right
    trains     every step, curve and gradient is finite, and the export is the trained model
    refused    a sentence says why before that, and nothing else is written
    WRONG      none of these: wrong numbers, gradients that are not finite, an exception that is no UserError, no end
    not built  no tiny model could be made here, which says nothing about the scripts
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed.checkpoint.state_dict  # these three once, before the forks
import torch.distributed.fsdp
import torch.utils.tensorboard
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import grpo
import ppo
from helpers.runs import SMALL, command, curves, make_folder, start
from helpers.tiny_models import with_copies

SECONDS, TOLERANCE, VOCAB, NO_DECODER = 60, 1e-3, 61, "is_decoder is False"
TWO = ["llama", "gemma3_text", "mixtral", "qwen3_5_text", "falcon_h1", "zamba", "gpt2", "gpt_neo"]
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


def score(family: str, model: torch.nn.Module, notes: list[str]) -> tuple[str, float, str]:
    """The verdict on one family, the largest gap, and a note."""
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB, (length,), generator=random).tolist() for length in PROMPT_LENGTHS]
    uniforms = torch.rand(SHAPE, dtype=torch.float64, generator=random)
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


class Refused(Exception):
    pass


def judge(script: str, name: str, code: int, said: str) -> dict:
    """The curves of a run that trained. A refusal is one sentence without a traceback, and leaves nothing behind."""
    sentences = [line for line in said.splitlines() if line.startswith(f"{script}.py: ")]
    if code and len(sentences) == 1 == said.count(f"{script}.py") and not Path("runs", name).exists():
        raise Refused(sentences[0])
    assert code == 0, f"{name} ended with {code} and said {said[-600:]}"
    points = {curve: [value for _, value in points] for curve, points in curves(name).items()}
    for curve, values in points.items():
        expected = {"skipped": False, "grad_norm": True}.get(curve.partition("/")[2], any(values))
        assert any(values) == expected, f"{name} has {curve} {values}"
        assert all(map(math.isfinite, values)), f"{name} has {curve} {values}"
    return points


@torch.no_grad()
def train(script, name: str, **args: object) -> dict:
    """The curves of two steps in this process, once the export is found to be the trained model."""
    kept, load, said = [], script.load_policy, io.StringIO()
    script.load_policy = lambda *x: kept.append(load(*x)) or kept[-1]
    script.reward = lambda completion, problem: len(set(completion)) / 10  # as in helpers/runs.py
    with contextlib.redirect_stderr(said), torch.enable_grad():
        code = script.main(script.Args(**SMALL | dict(num_steps=2, run_name=name) | args))
    script.load_policy = load
    points = judge(script.__name__, name, code, said.getvalue())
    exported, info = AutoModelForCausalLM.from_pretrained(f"runs/{name}/policy", output_loading_info=True)
    before, after, ids = kept[0].state_dict(), exported.state_dict(), torch.arange(2, 22)[None]
    wrong = info | {"other": [x for x in before.keys() & after if not torch.equal(before[x], after[x])]}
    assert not any(wrong.values()), f"the export of {name} has wrong weights: {wrong}"
    gaps = [(kept[0](ids).logits - exported(ids).logits).abs().max().item(), *points["policy/sampler_gap"]]
    gaps = gaps[:1] if args.get("dtype") == "bfloat16" else gaps
    assert max(gaps) < TOLERANCE, f"{name}: the logits of the export, and the sampler, are off by {gaps}"
    return points


def ask_for_more() -> None:
    """In config.json and the configs inside it: what changes the output of forward."""
    path, config = Path("model/config.json"), AutoConfig.from_pretrained("model")
    content = json.loads(path.read_text())
    inner = [(content[name], getattr(config, name)) for name in config.sub_configs if content.get(name)]
    for part, usual in [(content, config), *inner]:
        router = dict(output_router_logits=True) if hasattr(usual, "output_router_logits") else {}
        part |= dict(output_attentions=True, output_hidden_states=True, return_dict=False) | router
    path.write_text(json.dumps(content))


def try_training(mode: str) -> None:
    """On the model of this folder. Where two runs must agree, the first points of their curves do."""
    dtype, usual, other = mode if mode == "bfloat16" else "float32", {}, {}
    if mode != "ppo":
        usual = train(grpo, "grpo", dtype=dtype)
    if mode in ("ppo", "bfloat16"):
        train(ppo, "ppo", value_warmup_steps=0, dtype=dtype)
    if mode == "options":
        ask_for_more()
        other = train(grpo, "options")
    if mode == "two":
        with start(command("grpo", processes=2, run_name="two", num_steps=1)) as process:
            said, _ = process.communicate(timeout=3 * SECONDS)
        other = judge("grpo", "two", process.returncode, said)
        AutoModelForCausalLM.from_pretrained("runs/two/policy")
    for curve, (value, *_) in other.items():
        are_close = math.isclose(value, usual[curve][0], rel_tol=1e-4, abs_tol=1e-6)
        assert are_close, f"{curve} {usual[curve][0]} became {value}"


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
        return score(family, model, notes) if mode == "score" else try_training(mode) or ("trains", 0.0, "")
    except Refused as error:
        return "refused", 0.0, str(error)
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
            if receiver.poll(SECONDS * (4 if mode == "two" else 1)):
                found = receiver.recv()
        process.kill()
        process.join()
    if found[0] != "trains":
        name = f"{mode:8} {family + ' (decoder)' * bool(special):32} {found[0]:9} {found[1]:8.2g}"
        print(f"{name} {time.time() - started:3.0f} s  {' '.join(found[2].split())}"[:400], flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = "score", "grpo", "ppo", "bfloat16", "options", "two"
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
