# SPDX-License-Identifier: MIT
"""Tiny policies whose every completion is listed, so that an expectation is a sum: a softmax over one token, and a
random transformer whose completions have one to three tokens, of which one is the end token.
"""

import functools
import itertools
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from grpo import Batch, completion_logprobs
from helpers.strategies import float64, tensors
from helpers.tiny_models import make_model

END = 1


class Completions(NamedTuple):
    """All M completions of at most T tokens out of V. A state is what has been written before a token: one of S."""

    ids: Tensor  # (M, T)
    mask: Tensor  # (M, T), through the end token
    states: Tensor  # (M, T), the state before each token
    entries: Tensor  # (S, V), where in the flattened (M, T) token v after state s stands first


@functools.cache
def all_completions(vocab: int, width: int) -> Completions:
    """Pad is the end token, so that a mask by id would be a wrong one."""
    every_row = itertools.product(range(vocab), repeat=width)
    rows = sorted({row[: row.index(END) + 1] if END in row else row for row in every_row})
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    ids = torch.tensor([row + (END,) * (width - len(row)) for row in rows])
    prefixes = sorted({row[:t] for row in rows for t in range(len(row))})
    states, entries = torch.zeros_like(ids), torch.full((len(prefixes), vocab), -1)
    for i, row in reversed(list(enumerate(rows))):
        for t, token in enumerate(row):
            states[i, t] = prefixes.index(row[:t])
            entries[states[i, t], token] = i * width + t
    return Completions(ids, mask, states, entries)


class Policy(NamedTuple):
    parameters: list[Tensor]
    completions: Completions
    logprobs: Tensor  # (M, T), of the tokens of every completion, differentiable in the parameters
    mask: Tensor  # (M, T)

    def __repr__(self) -> str:
        """Short: Hypothesis prints it over and over."""
        return f"Policy({[round(x, 3) for x in self.logprobs.flatten().tolist()]})"

    def probabilities(self) -> Tensor:
        """Of the completions, (M,)."""
        return self.logprobs.sum(1).exp()

    def sum_by_state(self, x: Tensor) -> Tensor:
        """Over the completions that pass through a state: (M, T) -> (S,)."""
        zeros = torch.zeros(len(self.completions.entries), dtype=x.dtype)
        return zeros.index_add(0, self.completions.states[self.mask], x[self.mask])

    def visits(self) -> Tensor:
        """The probability that a completion passes through a state, (S,)."""
        return self.sum_by_state(self.probabilities()[:, None].expand_as(self.mask))

    def table(self) -> Tensor:
        """The log-probabilities of the next token in every state, (S, V)."""
        return self.logprobs.flatten()[self.completions.entries]

    def gradient(self, scalar: Tensor) -> Tensor:
        """Of a scalar in all parameters, flat."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, self.parameters, retain_graph=True)])


def softmax_policy(logits: Tensor) -> Policy:
    logits, completions = logits.clone().requires_grad_(), all_completions(len(logits), 1)
    return Policy([logits], completions, logits.log_softmax(-1)[:, None], completions.mask)


@functools.cache
def transformer_policy(vocab: int, width: int, seed: int) -> Policy:
    """gpt2, because all of it computes in float64. Scored as in training: all completions share a prompt."""
    model = make_model("gpt2", vocab_size=vocab, hidden_size=8, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    completions, prompt = all_completions(vocab, width), torch.tensor([[2, 0, END, 2]])
    ids, mask, *_ = completions
    batch = Batch(prompt, torch.ones_like(prompt, dtype=torch.bool), ids, mask, torch.zeros(ids.shape))
    logprobs, _ = completion_logprobs(model, batch, temperature=0.7)
    return Policy(list(model.parameters()), completions, logprobs, mask)


@st.composite
def tables(draw) -> list[Policy]:
    """A policy, its reference and mu, over one token."""
    vocab = draw(st.integers(2, 5))
    return [softmax_policy(draw(tensors((vocab,), -5.0, 5.0, float64))) for _ in range(3)]


@st.composite
def transformers(draw) -> list[Policy]:
    """A policy, its reference and mu, over completions of several tokens: 15 of them, or 13."""
    size, seed = draw(st.sampled_from([(3, 3), (4, 2)])), draw(st.integers(0, 20))
    return [transformer_policy(*size, seed=seed + i) for i in range(3)]
