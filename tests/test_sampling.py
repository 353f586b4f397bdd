# SPDX-License-Identifier: MIT
"""Sampling: from the whole distribution at one temperature, with a cache, shared prompts and rows that leave; and what
is tried before training: can this model be trained here, and can its completions share a prompt?"""

import inspect
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import grpo
from helpers.tiny_models import NOT_SHARING, SHARING, VOCAB, make_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [4, 3, 2], [12]]
ENDS = torch.arange(0, VOCAB, 6)  # many end tokens: rows end at different times


def sample(model, group_size=4, max_new_tokens=10, temperature=0.7, ends=ENDS, seed=0):
    prompts = grpo.pad_prompts(PROMPTS, torch.device("cpu"))
    uniforms = draw(len(PROMPTS) * group_size, max_new_tokens, seed=seed)
    return prompts, grpo.generate_completions(model, *prompts, uniforms, temperature, ends)


def draw(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_plainly(model, group_size=4, max_new_tokens=10, temperature=0.7):
    """What `Decoder` stands for: the whole text of every row in a forward pass of its own, for every token."""
    ids, logprobs, groups = [], [], draw(len(PROMPTS) * group_size, max_new_tokens).split(group_size)
    for prompt, uniforms in zip(PROMPTS, groups, strict=True):
        text, chosen = torch.tensor([prompt] * group_size), []
        for t in range(max_new_tokens):
            logp = (model(text, use_cache=False).logits[:, -1] / temperature).log_softmax(-1)  # (G, V)
            cdf = logp.double().exp().cumsum(-1)
            tokens = (cdf <= uniforms[:, t : t + 1] * cdf[:, -1:]).sum(1, keepdim=True)     # (G, 1)
            text = torch.cat([text, tokens], 1)
            chosen.append(logp.gather(1, tokens))
        ids.append(text[:, len(prompt) :])
        logprobs.append(torch.cat(chosen, 1))
    return torch.cat(ids), torch.cat(logprobs)


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", [*SHARING, *NOT_SHARING])
def test_the_decoder_samples_what_full_forward_passes_sample(family):
    """With ragged prompts that run once each, a temperature, a cache and rows that leave it."""
    model = make_model(family, torch.float32, **(SHARING | NOT_SHARING)[family])
    plain_ids, plain_logprobs = sample_plainly(model)
    _, (ids, mask, logprobs) = sample(model)
    assert len(set(mask.sum(1).tolist())) > (1 if family == "gemma3_text" else 3)
    for row, counted in enumerate(mask):
        ends = torch.isin(plain_ids[row], ENDS).nonzero()[:1, 0]
        length = int(ends) + 1 if len(ends) else 10
        assert torch.equal(counted, torch.arange(len(counted)) < length)
        assert torch.equal(ids[row, :length], plain_ids[row, :length])
        torch.testing.assert_close(logprobs[row, :length], plain_logprobs[row, :length], atol=1e-4, rtol=0)


def test_sharing_prompts_changes_no_token():
    model = make_model("llama", torch.float32)
    prompts, (ids, mask, logprobs) = sample(model)
    prompts = (x.repeat_interleave(4, 0) for x in prompts)
    plain_ids, plain_mask, plain_logprobs = grpo.generate_completions(model, *prompts, draw(12, 10), 0.7, ENDS)
    assert torch.equal(ids, plain_ids)
    assert torch.equal(mask, plain_mask)
    torch.testing.assert_close(logprobs, plain_logprobs, atol=1e-5, rtol=0)


def test_the_other_rows_change_no_token(monkeypatch):
    """A row samples the same with its own random numbers alone, and tested for its end at every token or never."""
    model, prompts = make_model("llama", torch.float32), grpo.pad_prompts(PROMPTS, torch.device("cpu"))
    uniforms = draw(len(PROMPTS) * 4, 12)
    ids, mask, _ = grpo.generate_completions(model, *prompts, uniforms, 0.7, ENDS)
    for row in range(len(PROMPTS)):
        prompt = grpo.pad_prompts([PROMPTS[row]], ids.device)
        group = slice(4 * row, 4 * row + 4)
        alone = grpo.generate_completions(model, *prompt, uniforms[group], 0.7, ENDS)
        width = alone[0].shape[1]
        assert torch.equal(alone[0], ids[group, :width])
        assert torch.equal(alone[1], mask[group, :width])
    for tokens in (1, 99):
        monkeypatch.setattr(grpo, "STOP_TEST_EVERY", tokens)
        again = grpo.generate_completions(model, *prompts, uniforms, 0.7, ENDS)
        assert torch.equal(again[0], ids)
        assert torch.equal(again[1], mask)


def test_sampling_ends_when_every_completion_has_ended_and_finished_rows_are_not_computed():
    model, rows = make_model("llama", torch.float32), []
    model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    _, (ids, _, _) = sample(model, max_new_tokens=60)
    assert len(rows) <= ids.shape[1] + grpo.STOP_TEST_EVERY < 60
    assert rows[0] == 3
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < 12


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph and torch.cuda.graph on the CPU: what is called inside is only written down, and every
    replay does it again in the same memory. Memory from outside that is freed in between gets another use on a GPU."""

    def __init__(self):
        super().__init__()
        self.calls, self.names, self.kept, self.outside, self.own = [], {}, [], {}, {}

    def name(self, x: object) -> object:
        """What stands for a tensor in `calls`."""
        if isinstance(x, torch.Tensor) and id(x) not in self.names:
            self.names[id(x)] = f"tensor {len(self.names)}"
            self.kept.append(x)
        return self.names[id(x)] if isinstance(x, torch.Tensor) else x

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        new = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and id(x) not in self.names]
        given = tree_map(self.name, (args, kwargs or {}))
        self.outside |= {self.name(x): (weakref.ref(x), x.clone()) for x in new}
        result = op(*args, **kwargs or {})
        memory = {x().untyped_storage().data_ptr() for x, _ in self.outside.values()}
        self.own |= {self.name(x): x for x in tree_leaves(result) if x.untyped_storage().data_ptr() not in memory}
        self.calls.append((op, *given, tree_map(self.name, result)))
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for x, before in self.outside.values():
            x().copy_(before)
        self.kept.clear()

    def replay(self) -> None:
        values = {name: x() for name, (x, _) in self.outside.items()}
        assert all(x is not None for x in values.values()), "memory was freed that a replay needs"
        values |= self.own
        value = lambda x: values[x] if isinstance(x, str) and x in values else x
        for op, args, kwargs, result in self.calls:
            again = op(*tree_map(value, args), **tree_map(value, kwargs))
            for name, x in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if name in self.own:
                    self.own[name].copy_(x)
                else:  # a view
                    values.setdefault(name, x)


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", SHARING)
def test_a_step_that_is_recorded_as_a_cuda_graph_samples_the_same(family, monkeypatch):
    model, graphs = make_model(family, torch.float32, **SHARING[family]), []
    _, expected = sample(model, max_new_tokens=16)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Graph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: graph)
    source = inspect.getsource(grpo.Decoder)
    assert "self.rows.is_cuda" in source
    exec(source.replace("self.rows.is_cuda", "True"), patched := {**vars(grpo)})
    monkeypatch.setattr(grpo, "Decoder", patched["Decoder"])
    _, recorded = sample(model, max_new_tokens=16)
    assert torch.equal(recorded[0], expected[0])
    assert torch.equal(recorded[1], expected[1])
    torch.testing.assert_close(recorded[2], expected[2], atol=1e-5, rtol=0)
    windows = getattr(model.config.get_text_config(), "layer_types", None) or []
    assert (len(graphs) > 1) == (model._can_compile_fullgraph and "sliding_attention" not in windows), family


def test_completions_run_through_the_first_eos_token_and_stop_there():
    _, (ids, mask, logprobs) = sample(make_model("llama", torch.float32), max_new_tokens=12)
    for row, counted in zip(ids, mask, strict=True):
        length = int(counted.sum())
        assert torch.equal(counted, torch.arange(len(counted)) < length)
        is_end = torch.isin(row[:length], ENDS)
        assert not is_end[:-1].any()
        assert is_end[-1] or length == 12
    assert (logprobs[~mask] == 0).all()


def test_no_eos_token_within_the_limit_means_full_length():
    _, (ids, mask, _) = sample(make_model("llama", torch.float32), ends=torch.tensor([], dtype=torch.long))
    assert ids.shape == mask.shape == (12, 10)
    assert mask.all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_softmax_of_logits_over_temperature(temperature):
    model = make_model("llama", torch.float32)
    prompts = grpo.pad_prompts([[5, 6, 7]], torch.device("cpu"))
    expected = (model(prompts[0]).logits[0, -1] / temperature).softmax(-1)
    ids, _, _ = grpo.generate_completions(model, *prompts, draw(20000, 1), temperature, ENDS)
    found = torch.bincount(ids[:, 0], minlength=VOCAB) / 20000
    # Five standard errors of a frequency, for each of the 61 tokens.
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 20000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_random_number_draws_a_token_without_a_probability_or_none_at_all(dtype):
    """The smallest number with a first token that has probability 0, and the largest one with a last token that has."""
    logits = 5 * torch.randn(1000, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = logits[:, -1] = -torch.inf
    for uniform in (0.0, 1 - torch.finfo(dtype).eps):
        tokens, logprobs = grpo.sample_tokens(logits, torch.full((1000,), uniform, dtype=dtype), 1.0)
        assert tokens.min() > 0
        assert tokens.max() < VOCAB - 1
        assert logprobs.isfinite().all()


def test_sample_tokens_takes_the_log_softmax_in_float32():
    """Near -6, numbers of bfloat16 are 0.03 apart."""
    logits = (3 * torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(0))).bfloat16()
    tokens, logprobs = grpo.sample_tokens(logits, draw(200), 0.7)
    expected = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)


def test_temperature_zero_takes_the_most_probable_token():
    model = make_model("llama", torch.float32)
    _, (ids, mask, _) = sample(model, group_size=1, temperature=0.0)
    for prompt, row, counted in zip(PROMPTS, ids, mask, strict=True):
        text = list(prompt)
        for token in row[counted].tolist():
            assert token == int(model(torch.tensor([text])).logits[0, -1].argmax())
            text.append(token)


def test_the_models_own_generation_config_is_ignored():
    model = make_model("llama", torch.float32)
    _, (ids, _, _) = sample(model)
    model.generation_config.update(top_k=1, top_p=0.1, temperature=9.0, max_new_tokens=1, repetition_penalty=5.0)
    assert torch.equal(sample(model)[1][0], ids)


def test_sampling_follows_from_the_seed():
    model = make_model("llama", torch.float32)
    assert torch.equal(sample(model, seed=3)[1][0], sample(model, seed=3)[1][0])
    assert not torch.equal(sample(model, seed=3)[1][0][..., 0], sample(model, seed=4)[1][0][..., 0])


# ----- The trial: can this model be trained here, and can its completions share a prompt? -----


def ask(model, monkeypatch, prompt=5, **args):
    """Whether prompts will be shared, and what is said about it."""
    said = []
    monkeypatch.setattr(grpo, "say", said.append)
    args = grpo.Args(**dict(model="x", max_new_tokens=12) | args)
    args, _ = grpo.prepare(args, model, [], [([0] * prompt, {}), ([0], {})])
    return args.share_prompt, said


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", SHARING)
def test_sharing_is_found_exact_where_it_is(family, monkeypatch):
    assert ask(make_model(family, torch.float32, **SHARING[family]), monkeypatch) == (True, [])


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", NOT_SHARING)
def test_sharing_is_refused_with_a_sentence_where_it_is_wrong(family, monkeypatch):
    shared, (said,) = ask(make_model(family, torch.float32, **NOT_SHARING[family]), monkeypatch)
    assert not shared
    assert said.startswith("This model cannot share a prompt in the update")


@pytest.mark.parametrize("off", [dict(share_prompt=False), dict(group_size=1), dict(gradient_checkpointing=True)])
def test_sharing_that_is_not_wanted_is_not_tried(off, monkeypatch):
    assert ask(make_model("llama", torch.float32), monkeypatch, **off) == (False, [])


NATS = r"the log-probabilities of sampling and of scoring differ by \S+ nats"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "special", "says"),
    [
        ("rwkv", {}, "it has no cache of keys and values"),
        ("bart", dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48), NATS),
        # transformers 5.24: from its second step on, mamba misreads the mask that it is given.
        ("mamba", {}, NATS),
        # Its longest prompt and completion have 17 tokens.
        ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, max_position_embeddings=16), "index out of range"),
        # It counts its positions from another number when it is not given any.
        ("roberta", dict(is_decoder=True), NATS),
        # These predict a token from those after it, with and without a cache.
        ("gemma3_text", dict(use_bidirectional_attention=True), NATS),
        *((family, {}, "it has no cache of keys and values") for family in ("bert", "roberta", "electra")),
    ],
)
def test_a_model_that_cannot_be_trained_here_is_refused_in_a_sentence(family, special, says, monkeypatch):
    """tests/sweep_families.py goes over all families."""
    model = make_model(family, torch.float32, **special)
    with pytest.raises(grpo.UserError, match=rf"^--model x cannot be trained here: .*{says}"):
        ask(model, monkeypatch)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_an_encoder_that_was_made_causal_shares_its_prompts(family, monkeypatch):
    assert ask(make_model(family, torch.float32, is_decoder=True), monkeypatch) == (True, [])


@pytest.mark.parametrize(("prompt", "max_new_tokens"), [(1, 1), (1, 30), (2, 3), (40, 24)])
def test_prompts_and_completions_of_every_length_can_be_tried(prompt, max_new_tokens, monkeypatch):
    assert ask(make_model("llama", torch.float32), monkeypatch, prompt, max_new_tokens=max_new_tokens) == (True, [])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("assert")])
def test_an_error_of_the_device_is_not_taken_for_one_of_the_model(error, monkeypatch):
    model, score = make_model("llama", torch.float32), grpo.completion_logprobs

    def fail(policy, batch, temperature):
        if len(batch.prompt_ids) < len(batch.completion_ids):
            raise error
        return score(policy, batch, temperature)

    monkeypatch.setattr(grpo, "completion_logprobs", fail)
    with pytest.raises(type(error)):
        ask(model, monkeypatch)
    error = RuntimeError("The size of tensor a must match the size of tensor b")
    shared, (said,) = ask(model, monkeypatch)
    assert not shared
    assert "The size of tensor a must match" in said


def test_a_sampler_in_bfloat16_keeps_the_positions_of_the_policy():
    model = make_model("llama", torch.float32)
    assert grpo.make_sampler(model, "float32") is model
    sampler = grpo.make_sampler(model, "bfloat16")
    assert {parameter.dtype for parameter in sampler.parameters()} == {torch.bfloat16}
    for copied, original in zip(sampler.buffers(), model.buffers(), strict=True):
        assert torch.equal(copied, original)
    model.lm_head.weight.data.fill_(3.0)
    grpo.refresh_sampler(sampler, model)
    assert (sampler.lm_head.weight == 3.0).all()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("millions", [1, 11])
def test_bfloat16_is_chosen_for_a_larger_model_where_it_is_fast_and_otherwise_as_asked(fast, millions, monkeypatch):
    policy = SimpleNamespace(device=torch.device("cpu"), num_parameters=lambda: millions * 1_000_000)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    assert grpo.choose_dtype(policy, "auto") == ("bfloat16" if fast and millions == 11 else "float32")
    assert [grpo.choose_dtype(policy, dtype) for dtype in ("float32", "bfloat16")] == ["float32", "bfloat16"]


def test_a_batch_of_ragged_prompts_is_padded_on_the_left_by_length():
    ids, mask = grpo.pad_prompts([[0, 1], [1, 1, 0]], torch.device("cpu"))
    assert ids.tolist() == [[0, 0, 1], [1, 1, 0]]
    assert mask.tolist() == [[False, True, True], [True, True, True]]
