# SPDX-License-Identifier: MIT
"""Sampling: from the whole distribution at one temperature, with a cache, shared prompts and rows that leave. And what
is refused before training: a policy that scores otherwise than it samples."""

import warnings
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import grpo
from helpers.exact_policies import END, all_completions
from helpers.tiny_models import ENDS, NOT_SHARING, SHARING, VOCAB, alone, make_model, plain_logprobs, sample, tokens_of

CPU = torch.device("cpu")
READS = torch.ops.aten._local_scalar_dense.default  # x.item(), and what else takes a value to the host

pytestmark = pytest.mark.filterwarnings("ignore:.*fast path")  # of families whose fast kernels are not installed


@torch.no_grad()
def sampled_as_scored(model: nn.Module, temperature: float = 0.7, **choices: int) -> grpo.Batch:
    """A sample, whose log-probabilities must be those of its whole texts, each in a forward pass of its own."""
    batch = sample(model, temperature=temperature, **choices)
    expected = alone(partial(plain_logprobs, model, temperature=temperature or 1.0), batch)
    torch.testing.assert_close(batch.sampler_logprobs, expected, atol=1e-4, rtol=0)
    return batch


@pytest.mark.parametrize(("family", "temperature"), [*((x, 0.7) for x in (*SHARING, *NOT_SHARING)), ("llama", 0.0)])
def test_the_decoder_samples_what_full_forward_passes_sample(family, temperature):
    """Ragged prompts run once each, rows leave, and a completion goes through its first end token, or is full. At
    temperature 0 the most probable token is taken."""
    model = make_model(family, torch.float32)
    batch = sampled_as_scored(model, temperature=temperature)
    best = alone(lambda text, start: model(text[None]).logits[0, start - 1 : -1].argmax(-1), batch)
    assert torch.equal(best, batch.completion_ids) or temperature
    completions, ends = tokens_of(batch.completion_ids, batch.completion_mask), {*ENDS.tolist()}
    assert len({*map(len, completions)}) > 1
    for tokens, row in zip(completions, batch.completion_ids.tolist(), strict=True):
        assert not ends & {*tokens[:-1]}
        assert tokens[-1] in ends or len(tokens) == 10
        assert row == tokens + [0] * (len(row) - len(tokens))


TINY_VOCAB, TINY_PROMPTS = 5, [[2, 0, END, 3], [END]]  # ragged, with the end token in the midst and last


def compare_with_all_completions(family: str, temperature: float, group_size: int = 40_000) -> tuple[float, float]:
    """A sample against the probabilities of all 85 completions of at most 3 tokens, for each prompt: the p-value of
    chi-square, and by how many standard errors the mean of log pi(o) is off, which a wrong temperature moves most."""
    model = make_model(family, torch.float32, vocab_size=TINY_VOCAB)
    model.get_output_embeddings().weight.data *= 3  # the completions differ more in their probabilities
    model.generation_config.update(top_k=1, top_p=0.1, temperature=9.0, max_new_tokens=1, repetition_penalty=5.0)
    ids, mask, *_ = all_completions(TINY_VOCAB, width=3)                                    # (85, 3), each
    number = lambda ids: (ids * torch.tensor([25, 5, 1])).sum(-1)  # one for each completion
    torch.manual_seed(0)
    prompts = grpo.pad_prompts(TINY_PROMPTS, CPU)
    found, counted, _ = grpo.generate_completions(model, *prompts, group_size, 3, temperature, torch.tensor([END]))
    found = nn.functional.pad(found.where(counted, END), (0, 3 - found.shape[1]), value=END)  # (N, 3)
    chi_square = cells = standard_errors = 0
    for prompt, sampled in zip(TINY_PROMPTS, found.split(group_size), strict=True):
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([prompt] * len(ids)), ids], 1)).logits[:, len(prompt) - 1 : -1]
        logp = (logits.double() / temperature).log_softmax(-1).gather(2, ids[..., None])[..., 0]  # (85, 3)
        logp = logp.where(mask, 0.0).sum(1)                                                 # (85,), log pi(o)
        assert logp.exp().sum().item() == pytest.approx(1)
        observed = torch.bincount(number(sampled), minlength=125)[number(ids)].double()     # (85,)
        expected = group_size * logp.exp()                                                  # (85,)
        mean = (expected * logp).sum() / group_size
        error = (expected * (logp - mean) ** 2).sum().sqrt()                                # of the sum below
        standard_errors += ((observed * (logp - mean)).sum() / error).item() / len(TINY_PROMPTS) ** 0.5
        often = expected > 10  # the others are one cell
        expected, observed = (torch.cat([x[often], x[~often].sum(0, keepdim=True)]) for x in (expected, observed))
        chi_square += ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
        cells += len(expected) - 1
    return torch.special.gammaincc(torch.tensor(cells / 2).double(), chi_square / 2).item(), standard_errors


@pytest.mark.parametrize(
    ("family", "temperature"),
    [*(("llama", temperature) for temperature in (0.5, 1.0, 2.0)),
     *(pytest.param(family, 1.5, marks=pytest.mark.slow) for family in (*SHARING, *NOT_SHARING))],
)  # fmt: skip
def test_completions_have_the_probabilities_of_full_forward_passes(family, temperature, monkeypatch):
    """Of whole completions: no row gets another's tokens, cache or place, where rows leave after every token. Notices
    a temperature that is 3 % off. The sampling flags of generation_config.json change nothing."""
    monkeypatch.setattr(grpo, "STOP_TEST_EVERY", 1)
    p_value, standard_errors = compare_with_all_completions(family, temperature)
    assert p_value > 1e-3
    assert abs(standard_errors) < 4


def test_sampling_ends_when_every_completion_has_ended_and_ended_rows_are_not_computed():
    model, rows = make_model("llama", torch.float32), []
    model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    batch = sample(model, max_new_tokens=60)
    assert len(rows) <= batch.completion_ids.shape[1] + grpo.STOP_TEST_EVERY < 60
    assert rows[0] == 3
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_output_that_is_not_finite_is_an_error_that_says_so(temperature):
    """A NaN in the weights was "index 15 is out of bounds for dimension 1 with size 15"."""
    model = make_model("llama", torch.float32)
    model.lm_head.weight.data[5, 0] = torch.nan
    with pytest.raises(AssertionError, match="the model's output is not finite"):
        sample(model, temperature=temperature)


# ----- From logits to tokens -----


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_softmax_of_logits_over_temperature(temperature, monkeypatch):
    """Of 10,000 random numbers at equal distances, every token gets its share, but for one at each of its ends."""
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand_like", lambda x: (torch.arange(len(x), dtype=x.dtype)[:, None] + 0.5) / len(x))
    tokens, logprobs = grpo.sample_tokens(logits.expand(10_000, -1), temperature)
    expected = (logits.double() / temperature).softmax(-1)                                  # (V,)
    assert ((torch.bincount(tokens, minlength=VOCAB) - 10_000 * expected).abs() < 1.01).all()
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-5, rtol=0)


def test_rare_tokens_of_a_large_vocabulary_are_drawn(monkeypatch):
    """The sum of a cumulative probability near 1 and one of 1e-8 is the first, in float32."""
    logits = torch.full((1, 10_001), 1e-8).log().index_fill(1, torch.tensor([0]), 0.0)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5e-4))
    assert 4990 < grpo.sample_tokens(logits, 1.0)[0].item() < 5010


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_no_random_number_draws_a_token_without_a_probability_or_none_at_all(uniform, monkeypatch):
    logits, impossible = torch.randn(1000, VOCAB, generator=torch.Generator().manual_seed(0)), [0, 1, 30, VOCAB - 1]
    logits[:, impossible] = -torch.inf
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, uniform))
    tokens, logprobs = grpo.sample_tokens(logits, 1.0)
    assert not {*impossible, VOCAB} & {*tokens.tolist()}
    assert logprobs.isfinite().all()


def test_sample_tokens_takes_the_log_softmax_in_float32():
    """Near -6, numbers of bfloat16 are 0.03 apart."""
    logits = (3 * torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(0))).bfloat16()
    tokens, logprobs = grpo.sample_tokens(logits, 0.7)
    expected = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)


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
        assert op is not READS, "operation not permitted when stream is capturing"
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


class Watch(TorchDispatchMode):
    """What torch.cuda.set_sync_debug_mode("warn") does, for what reads a value."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is READS:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return op(*args, **kwargs or {})


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """Let `Decoder` record its steps as on a GPU: the recordings, and the modes of torch's warnings."""
    found, watch = SimpleNamespace(graphs=[], modes=[]), Watch()

    def set_sync_debug_mode(mode: str) -> None:
        """As torch does, for the first time in a process, it warns that not every wait is found."""
        found.modes.append(mode)
        if mode == "default":
            watch.__exit__(None, None, None)
        else:
            warnings.warn("prototype feature and does not yet detect all synchronizing operations", stacklevel=1)
            watch.__enter__()

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    class Recording(Graph):
        def __init__(self):
            super().__init__()
            found.graphs.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: graph)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_sync_debug_mode)
    return found


@pytest.mark.parametrize("family", SHARING)
def test_a_step_that_is_recorded_as_a_cuda_graph_samples_the_same(family, gpu):
    """It is recorded again whenever rows leave; that it does not wait was found out once."""
    model = make_model(family, torch.float32)
    sampled_as_scored(model, max_new_tokens=24)
    kinds = {*(getattr(model.config.get_text_config(), "layer_types", None) or [])}
    can_record = model._can_compile_fullgraph and kinds <= {"full_attention"}
    assert (len(gpu.graphs) > 1) == can_record
    assert gpu.modes == ["warn", "default"] * can_record


def test_a_step_that_waits_for_the_device_is_found_before_and_is_not_recorded(gpu):
    """Such as in a model of experts that reads on the host how many tokens each of them gets. After a recording that
    fails, torch records no other, so none is tried. Whether a step waits is found out once, not for every token."""
    model = make_model("llama", torch.float32)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * max(1, logits[0, 0, 0].item() > 1e9))
    for _ in range(2):
        sampled_as_scored(model, max_new_tokens=24)
    assert gpu.graphs == []
    assert gpu.modes == ["warn", "default"] * 2


# ----- Before training: is this a policy that scores as it samples, and in which dtype? -----


REFUSED = {
    "rwkv": {},  # this and the next one have no cache of keys and values
    "bert": {},
    "bart": dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
    "mamba": {},  # transformers 5.24: from its second step on, it misreads the mask that it is given
    "roberta": dict(is_decoder=True),  # it counts its positions from another number when it is not given any
    "gemma3_text": dict(use_bidirectional_attention=True),  # it predicts a token from those after it
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize(("family", "special"), [*SHARING.items(), *NOT_SHARING.items(), *REFUSED.items()])
def test_check_policy_refuses_a_model_that_scores_otherwise_than_it_samples(family, special, share_prompt):
    """Or that does so only where a prompt is shared. tests/tools/sweep_families.py goes over all families."""
    model, pairs = make_model(family, torch.float32, **special), [([0], {}), ([3, 0, 5] * 6, {})]  # beyond windows
    args = grpo.Args(model="x", share_prompt=share_prompt)
    if special is SHARING.get(family) or (special is NOT_SHARING.get(family) and not share_prompt):
        grpo.check_policy(model, pairs, args)
        return
    with pytest.raises(grpo.UserError, match=r"^--model x cannot be trained here; .*--no-share-prompt: .+$"):
        grpo.check_policy(model, pairs, args)


def test_a_sampler_in_bfloat16_keeps_the_positions_of_the_policy():
    model = make_model("llama", torch.float32)
    assert grpo.make_sampler(model, "float32") is model
    sampler = grpo.make_sampler(model, "bfloat16")
    assert {parameter.dtype for parameter in sampler.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for copied, original in zip(sampler.buffers(), model.buffers(), strict=True):
        assert torch.equal(copied, original)
    model.lm_head.weight.data.fill_(3.0)
    grpo.refresh_sampler(sampler, model)
    assert (sampler.lm_head.weight == 3.0).all()


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize(("device", "millions"), [("cuda", 11), ("cuda", 10), ("cpu", 11)])
def test_bfloat16_is_chosen_for_a_larger_model_on_a_gpu_and_otherwise_as_asked(device, millions, is_fast, monkeypatch):
    """On a GPU that has it: others emulate it, slowly."""
    policy = SimpleNamespace(device=torch.device(device), num_parameters=lambda: millions * 1_000_000)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_fast or including_emulation)
    is_chosen = (device, millions, is_fast) == ("cuda", 11, True)
    assert grpo.choose_dtype(policy, "auto") == ("bfloat16" if is_chosen else "float32")
    assert [grpo.choose_dtype(policy, dtype) for dtype in ("float32", "bfloat16")] == ["float32", "bfloat16"]
