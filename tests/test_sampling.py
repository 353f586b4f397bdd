# SPDX-License-Identifier: MIT
"""Sampling: from the whole distribution at one temperature, with a cache, shared prompts and rows that leave; and what
is tried before training: can this model be trained here, and can its completions share a prompt?"""

import inspect
import weakref
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import grpo
from helpers.tiny_models import PROMPTS, make_model, random_numbers

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


