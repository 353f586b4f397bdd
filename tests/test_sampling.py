# SPDX-License-Identifier: MIT
"""Sampling: from the whole distribution at one temperature, with a cache, shared prompts and rows that leave; and what
is tried before training: can this model be trained here, and can its completions share a prompt?"""

import inspect
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import grpo
from helpers.tiny_models import ENDS, NOT_SHARING, PROMPTS, SHARING, VOCAB, make_model, random_numbers, sample

CPU = torch.device("cpu")
assert_same = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@torch.no_grad()
def sample_plainly(model, temperature, group_size=4, max_new_tokens=10):
    """What `Decoder` stands for: the whole text of every row in a forward pass of its own, for every token."""
    ids, logprobs, groups = [], [], random_numbers(len(PROMPTS) * group_size, max_new_tokens).split(group_size)
    for prompt, uniforms in zip(PROMPTS, groups, strict=True):
        text, chosen = torch.tensor([prompt] * group_size), []
        for t in range(max_new_tokens):
            logp = (model(text, use_cache=False).logits[:, -1] / (temperature or 1.0)).log_softmax(-1)  # (G, V)
            cdf = logp.double().exp().cumsum(-1)
            tokens = (cdf <= uniforms[:, t : t + 1] * cdf[:, -1:]).sum(1, keepdim=True)     # (G, 1)
            tokens = tokens if temperature else logp.argmax(-1, keepdim=True)
            text = torch.cat([text, tokens], 1)
            chosen.append(logp.gather(1, tokens))
        ids.append(text[:, len(prompt) :])
        logprobs.append(torch.cat(chosen, 1))
    return torch.cat(ids), torch.cat(logprobs)


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize(("family", "temperature"), [*((x, 0.7) for x in (*SHARING, *NOT_SHARING)), ("llama", 0.0)])
def test_the_decoder_samples_what_full_forward_passes_sample(family, temperature):
    """Ragged prompts run once each, and a completion runs through its first end token, or is full; the rest is 0. At
    temperature 0 the most probable tokens are taken."""
    model = make_model(family, torch.float32)
    plain_ids, plain_logprobs = sample_plainly(model, temperature)
    is_end = torch.isin(plain_ids, ENDS).long()
    plain_mask = is_end.cumsum(1) - is_end == 0
    assert len(set(plain_mask.sum(1).tolist())) > (3 if temperature and family != "gemma3_text" else 1)
    batch, width = sample(model, temperature=temperature), int(plain_mask.sum(1).max())
    assert torch.equal(batch.completion_mask, plain_mask[:, :width])
    assert torch.equal(batch.completion_ids, plain_ids.where(plain_mask, 0)[:, :width])
    plain_logprobs = plain_logprobs.where(plain_mask, 0.0)[:, :width]
    torch.testing.assert_close(batch.sampler_logprobs, plain_logprobs, atol=1e-4, rtol=0)


def test_a_completion_depends_on_its_prompt_and_its_random_numbers_alone(monkeypatch):
    """Not on left padding, other rows, a shared prompt, generation_config.json, or when ends are looked for."""
    model, uniforms = make_model("llama", torch.float32), random_numbers(12, 12)
    generate = lambda prompts, numbers: grpo.generate_completions(model, *prompts, numbers, 0.7, ENDS)
    prompts = grpo.pad_prompts(PROMPTS, CPU)
    expected = generate(prompts, uniforms)
    for i, prompt in enumerate(PROMPTS):
        group = slice(4 * i, 4 * i + 4)
        found = generate(grpo.pad_prompts([prompt], CPU), uniforms[group])
        assert_same(found, tuple(x[group, : found[0].shape[1]] for x in expected))
    model.generation_config.update(top_k=1, top_p=0.1, temperature=9.0, max_new_tokens=1, repetition_penalty=5.0)
    for tokens in (1, 4, 99):
        monkeypatch.setattr(grpo, "STOP_TEST_EVERY", tokens)
        assert_same(generate(prompts, uniforms), expected)
        assert_same(generate([x.repeat_interleave(4, 0) for x in prompts], uniforms), expected)


def test_sampling_ends_when_every_completion_has_ended_and_ended_rows_are_not_computed():
    model, rows = make_model("llama", torch.float32), []
    model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    batch = sample(model, max_new_tokens=60)
    assert len(rows) <= batch.completion_ids.shape[1] + grpo.STOP_TEST_EVERY < 60
    assert rows[0] == 3
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < 12


# ----- A step that is recorded as a CUDA graph -----


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph and torch.cuda.graph on the CPU: what is called inside is only written down, and every
    replay does it again in the same memory. Memory from outside that is freed in between gets another use on a GPU."""

    def __init__(self):
        super().__init__()
        self.calls, self.own, self.outside = [], {}, {}

    def note(self, x: object) -> object:
        """What stands for `x` in `calls`."""
        if not isinstance(x, torch.Tensor) or id(x) in self.own:
            return x
        self.outside.setdefault(id(x), (weakref.ref(x), x.clone()))
        return self.outside[id(x)][0]

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        given, result = tree_map(self.note, (args, kwargs or {})), op(*args, **kwargs or {})
        self.own |= {id(x): x for x in tree_leaves(result) if id(x) not in self.outside}
        self.calls.append((op, *given, tree_map(self.note, result)))
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for x, before in self.outside.values():
            x().copy_(before)

    def replay(self) -> None:
        def value(x: object) -> object:
            if not isinstance(x, weakref.ref):
                return x
            assert x() is not None, "memory was freed that a replay needs"
            return x()

        for op, args, kwargs, result in self.calls:
            again = op(*tree_map(value, args), **tree_map(value, kwargs))
            for x, new in zip(tree_leaves(tree_map(value, result)), tree_leaves(again), strict=True):
                if x.data_ptr() != new.data_ptr():
                    x.copy_(new)


class RefusingGraph(Graph):
    """A recording that fails in the midst of a step, of which nothing has been computed."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if len(self.calls) == 30:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().__torch_dispatch__(op, types, args, kwargs)


def record_steps(monkeypatch, graph: type[Graph]) -> list[Graph]:
    """Let `Decoder` record its steps as on a GPU, and return the recordings. No tensor of the CPU says that it is on a
    GPU, so the line that asks is another one here."""
    graphs, source = [], inspect.getsource(grpo.Decoder)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(graph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: graph)
    assert "self.rows.is_cuda" in source
    exec(source.replace("self.rows.is_cuda", "True"), patched := {**vars(grpo)})
    monkeypatch.setattr(grpo, "Decoder", patched["Decoder"])
    return graphs






# ----- From logits to tokens -----


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_softmax_of_logits_over_temperature(temperature):
    model, prompts = make_model("llama", torch.float32), grpo.pad_prompts([[5, 6, 7]], CPU)
    expected = (model(prompts[0]).logits[0, -1] / temperature).softmax(-1)
    ids, _, _ = grpo.generate_completions(model, *prompts, random_numbers(20000, 1), temperature, ENDS)
    found = torch.bincount(ids[:, 0], minlength=VOCAB) / 20000
    # Five standard errors of a frequency, for each of the 61 tokens.
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 20000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_random_number_draws_a_token_without_a_probability_or_none_at_all(dtype):
    """On MPS, which has only float32, a random number just below 1 was 1, and the last token was sampled."""
    logits, impossible = 5 * random_numbers(1000, VOCAB), [0, 1, 30, VOCAB - 1]
    logits[:, impossible] = -torch.inf
    for uniform in (0.0, 1 - 2**-53):
        uniforms = torch.full((1000,), uniform, dtype=torch.float64).to(dtype)
        tokens, logprobs = grpo.sample_tokens(logits, uniforms, 1.0)
        assert not {*impossible, VOCAB} & {*tokens.tolist()}
        assert logprobs.isfinite().all()


def test_sample_tokens_takes_the_log_softmax_in_float32():
    """Near -6, numbers of bfloat16 are 0.03 apart."""
    logits = (3 * torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(0))).bfloat16()
    tokens, logprobs = grpo.sample_tokens(logits, random_numbers(200), 0.7)
    expected = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)


# ----- The trial: can this model be trained here, and can its completions share a prompt? -----


def try_model(model, monkeypatch, prompt_length=5, **args):
    """Whether prompts will be shared, and what is said about it."""
    said = []
    monkeypatch.setattr(grpo, "say", said.append)
    args = grpo.Args(**dict(model="x", max_new_tokens=12) | args)
    args, _ = grpo.prepare(args, model, [], [([0] * prompt_length, {}), ([0], {})])
    return args.share_prompt, said


CAUSAL_ENCODERS = {"bert": dict(is_decoder=True), "electra": dict(is_decoder=True)}






NATS = r"the log-probabilities of sampling and of scoring differ by \S+ nats"
NO_CACHE = "it has no cache of keys and values"






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


