# SPDX-License-Identifier: MIT
"""What the properties are drawn from: finite numbers, masks, rewards, and inputs of the loss with log-ratios up to 10;
and the tolerance to which they hold, 1e-10 in float64 and 1e-4 in float32."""

import functools
import math
from collections import namedtuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

dtypes = st.sampled_from([torch.float64, torch.float32])
float64 = st.just(torch.float64)
# For what 50 examples show as well as the 200 of HYPOTHESIS_PROFILE=ci.
few_examples = settings(max_examples=min(50, settings().max_examples))
garbage = st.sampled_from([0.0, 1.0, -1e30, 1e30, torch.inf, torch.nan])  # what padding may hold where it is not read


def assert_close(actual: Tensor, expected: Tensor | float, scale: float = 1.0) -> None:
    """Equal within the tolerance of the dtype, relative, or absolute for numbers of size `scale`."""
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[actual.dtype]
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(scale))


@functools.cache  # building strategies takes longer than drawing from them
def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats, where less than 1e-20 is 0: what underflows says nothing about the math."""
    return st.floats(low, high).map(lambda x: x if abs(x) >= 1e-20 else 0.0)


@st.composite
def tensors(draw, shape: tuple[int, ...], low: float, high: float, dtypes=dtypes) -> Tensor:
    size = math.prod(shape)
    values = draw(st.lists(numbers(low, high), min_size=size, max_size=size))
    return torch.tensor(values, dtype=draw(dtypes)).view(shape)


@st.composite
def masks(draw, least: int = 1) -> Tensor:
    """(N, T), bool: rows of `least` to T tokens, padded on the right."""
    width = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(least, width), min_size=1, max_size=4))
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def spread_out(values: list[float]) -> bool:
    """std >= 1e-2 max|R|: with less, a float32 mean has no digits to spare."""
    values = torch.tensor(values, dtype=torch.float64)
    return bool(values.std() >= 1e-2 * values.abs().max() > 0)


@st.composite
def rewards(draw) -> Tensor:
    """(B, G), of which no row is equal: right or wrong, a mark in tenths, or any number."""
    kinds = [st.sampled_from([0.0, 1.0]), st.integers(0, 10).map(lambda x: x / 10), numbers(-1e6, 1e6)]
    group_size = draw(st.integers(2, 8))
    row = st.lists(draw(st.sampled_from(kinds)), min_size=group_size, max_size=group_size).filter(spread_out)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)), dtype=draw(dtypes))


# The first arguments of `grpo_loss`, in its order, each (N, T).
Batch = namedtuple("Batch", ["logprobs", "old_logprobs", "ref_logprobs", "advantages", "completion_mask"])


@st.composite
def batches(draw, on_policy: bool = False, mask=None) -> Batch:
    """Ratios up to e^10, half of the time within 1 +- 0.3."""
    mask, dtype = draw(masks() if mask is None else mask), st.just(draw(dtypes))
    logprobs = draw(tensors(mask.shape, -10.0, 0.0, dtype))
    widest = draw(st.sampled_from([0.3, 10.0]))
    log_ratio = 0.0 if on_policy else draw(tensors(mask.shape, -widest, widest, dtype))
    ref_log_ratio = draw(tensors(mask.shape, -widest, widest, dtype))
    advantages = draw(tensors(mask.shape, -10.0, 10.0, dtype))
    return Batch(logprobs, logprobs - log_ratio, logprobs - ref_log_ratio, advantages, mask)
