# SPDX-License-Identifier: MIT
"""What must hold for advantages: those of a group (DeepSeekMath 4.1.2), of steps (4.1.3), GAE and whitening."""

import doctest
import math
import statistics

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import advantage
import kl
from advantage import explained_variance, gae, group_advantages, process_advantages, whiten
from helpers.strategies import assert_close, dtypes, few_examples, garbage, masks, numbers, rewards, spread_out, tensors

STD_EPS = 1e-4  # which the code adds to a standard deviation
scales, baselines = st.sampled_from(["group", "none"]), st.sampled_from(["mean", "leave_one_out"])
fractions = st.floats(0.0, 1.0)  # gamma, lambda


@pytest.mark.parametrize("module", [advantage, kl])
def test_examples_in_docstrings_are_right(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# ----- Group advantages -----


@given(rewards(), scales)
def test_group_advantages_are_rewards_less_their_mean_over_the_sample_std(rewards, scale):
    """DeepSeekMath 4.1.2, group by group; Dr. GRPO does not divide."""
    for row, found in zip(rewards, group_advantages(rewards, scale), strict=True):
        mean, std = statistics.fmean(row.tolist()), statistics.stdev(row.tolist())
        expected = (row - mean) / (std + STD_EPS if scale == "group" else 1.0)
        assert_close(found, expected, scale=expected.abs().max())
    assert torch.equal(group_advantages(rewards), group_advantages(rewards, scale="group", baseline="mean"))


@given(rewards(), scales)
def test_leave_one_out_subtracts_the_mean_of_the_others(rewards, scale):
    """RLOO: r_i minus the mean of the others, which is G / (G - 1) (r_i - mean)."""
    group_size = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (group_size - 1)
    found = group_advantages(rewards, "none", "leave_one_out")
    assert_close(found, rewards - others, scale=10 * found.abs().max())
    found, centred = (group_advantages(rewards, scale, baseline) for baseline in ("leave_one_out", "mean"))
    assert_close(found, group_size / (group_size - 1) * centred, scale=found.abs().max())


@given(numbers(-1e6, 1e6), st.integers(2, 64), dtypes, scales, baselines)
@example(0.1, 3, torch.float32, "group", "mean")  # the mean of three times 0.1 misses it by 7e-9
@example(0.1, 3, torch.float32, "group", "leave_one_out")
def test_equal_rewards_give_exactly_zero(value, group_size, dtype, scale, baseline):
    """Also beside a group of which one reward is larger and one smaller."""
    rewards = torch.full((2, group_size), value, dtype=dtype)
    rewards[1, :2] += torch.tensor([1, -1])
    assert group_advantages(rewards, scale, baseline)[0].eq(0).all()


# ----- Process supervision -----


@st.composite
def steps(draw) -> tuple[Tensor, Tensor]:
    """step_rewards and step_ends, (B, G, T); steps end anywhere, also nowhere; what is no reward is garbage."""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(2, 3), st.integers(1, 5)))
    size = math.prod(shape)
    ends = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(shape)
    rewards = draw(tensors(shape, *draw(st.sampled_from([(0.0, 0.0), (0.1, 0.1), (0.0, 1.0), (-10.0, 10.0)]))))
    for group, group_ends in zip(rewards, ends, strict=True):
        values = group[group_ends].tolist()
        assume(len(set(values)) < 2 or spread_out(values))
    return rewards.masked_fill(~ends, draw(garbage)), ends


@given(steps())
@example((torch.tensor([[[1.0], [0.0]]]), torch.ones(1, 2, 1, dtype=torch.bool)))  # n - 1 = 1 of two steps
def test_process_advantages_sum_the_normalised_rewards_of_the_steps_still_to_end(drawn):
    """DeepSeekMath 4.1.3: A_t - A_{t+1} is the normalised reward of the step that ends at t, else 0."""
    rewards, ends = drawn
    advantages = process_advantages(rewards, ends)
    after = torch.cat([advantages[..., 1:], torch.zeros_like(advantages[..., :1])], dim=2)
    expected = torch.zeros_like(advantages)
    for normalised, group, group_ends in zip(expected, rewards, ends, strict=True):
        values = group[group_ends].tolist()
        if len(set(values)) > 1:
            mean, std = statistics.fmean(values), statistics.stdev(values)
            normalised[group_ends] = (group[group_ends] - mean) / (std + STD_EPS)
    assert_close(advantages - after, expected)


@given(numbers(-1e6, 1e6), st.integers(1, 12), dtypes)
@example(0.1, 3, torch.float32)
def test_equal_step_rewards_give_exactly_zero(value, width, dtype):
    """Also beside a group of which one step earned more and one less; and one step alone, if width is 1."""
    rewards, ends = torch.full((2, 2, width), value, dtype=dtype), torch.ones(2, 2, width, dtype=torch.bool)
    rewards[1, :, 0] += torch.tensor([1, -1])
    assert process_advantages(rewards, ends)[0].eq(0).all()
    ends[0, 1] = False
    assert process_advantages(rewards, ends)[0].eq(0).all()


# ----- Generalised advantage estimation -----


@st.composite
def episodes(draw) -> tuple[Tensor, Tensor, Tensor]:
    """token_rewards, values and mask, (N, T), 0 in the padding."""
    mask, dtype = draw(masks()), st.just(draw(dtypes))
    token_rewards, values = (draw(tensors(mask.shape, -10.0, 10.0, dtype)).where(mask, 0.0) for _ in range(2))
    return token_rewards, values, mask


def next_token(x: Tensor) -> Tensor:
    """x_{t+1}, and 0 after the last one."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


@given(episodes(), fractions, fractions, garbage)
def test_gae_is_the_discounted_sum_of_the_residuals(episode, gamma, gae_lambda, garbage):
    """GAE Eq. 16: sum_l (gamma lambda)^l delta_{t+l}, term by term. Returns are advantages + values. What stands in the
    padding changes nothing, and both are 0 there. A dimension in front changes nothing."""
    token_rewards, values, mask = episode
    deltas = token_rewards + gamma * next_token(values) - values
    expected = torch.zeros_like(deltas)
    for distance in range(deltas.shape[1]):
        expected += (gamma * gae_lambda) ** distance * deltas
        deltas = next_token(deltas)
    dirty = (x.masked_fill(~mask, garbage)[None] for x in (token_rewards, values))
    advantages, returns = (x[0] for x in gae(*dirty, mask[None], gamma, gae_lambda))
    assert_close(advantages, expected, scale=100)
    assert_close(returns, advantages + values, scale=100)
    assert advantages[~mask].eq(0).all()
    assert returns[~mask].eq(0).all()


# ----- Whitening -----


@given(masks(), garbage, st.data())
def test_whitened_numbers_are_deviations_over_the_population_std(mask, garbage, data):
    """Ziegler et al.'s code: (x - mean) / sqrt(var + 1e-8) over the mask. What stands in the padding changes nothing,
    and becomes 0."""
    x = data.draw(tensors(mask.shape, -1e3, 1e3))
    assume(mask.sum() > 1 and spread_out(x[mask].tolist()))
    mean, variance = x[mask].mean(), x[mask].var(correction=0)
    whitened = whiten(x.masked_fill(~mask, garbage), mask)
    assert_close(whitened, ((x - mean) / (variance + 1e-8).sqrt()).where(mask, 0.0))
    assert whitened[~mask].eq(0).all()


def test_whitening_nothing_or_one_number_gives_zero():
    x = torch.tensor([3.0, 4.0])
    assert whiten(x, torch.tensor([False, False])).eq(0).all()
    assert whiten(x, torch.tensor([True, False])).eq(0).all()


# ----- How well the values foretell the returns -----


@few_examples
@given(masks().filter(lambda mask: mask.sum() > 1), numbers(-2, 2), numbers(-10, 10), garbage, st.data())
def test_explained_variance_is_one_less_the_square_of_the_part_that_values_miss(mask, part, shift, garbage, data):
    """V = part R + shift gives 1 - (1 - part)^2: 1 for V = R + shift, 0 for a constant, and less for the wrong way; the
    padding changes nothing."""
    returns = data.draw(tensors(mask.shape, -1.0, 1.0))
    returns = returns + 3 * torch.arange(mask.numel()).view(mask.shape)  # they differ by 1 at least
    for share in (part, 1.0, 0.0):
        values = (share * returns + shift).masked_fill(~mask, garbage)
        found = explained_variance(values, returns.masked_fill(~mask, garbage), mask)
        assert_close(found, 1 - (1 - share) ** 2, scale=10)
    assert explained_variance(returns / 100, returns / 100, mask) == 1  # small returns are not equal ones


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("equal", [0.0, 0.1, 1.0])
def test_explained_variance_of_equal_returns_is_zero(count, equal):
    """All right or all wrong, or a single token: there is no variance to divide by."""
    returns, mask = torch.full((1, count), equal), torch.ones(1, count, dtype=torch.bool)
    assert explained_variance(0.1 * torch.arange(count)[None], returns, mask) == 0


# ----- Errors -----

X, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: group_advantages(torch.zeros(4)), "rewards must be"),
    (lambda: group_advantages(torch.zeros(2, 2, dtype=torch.long)), "rewards must be"),
    (lambda: group_advantages(torch.zeros(4, 1)), "a group of one"),
    (lambda: group_advantages(X, scale="std"), "no such scale or baseline: 'std', 'mean'"),
    (lambda: group_advantages(X, baseline="median"), "no such scale or baseline: 'group', 'median'"),
    (lambda: process_advantages(X, MASK), "step_rewards and step_ends"),
    (lambda: process_advantages(X[None], X[None]), "step_rewards and step_ends"),
    (lambda: gae(X, X[:, :1], MASK, 1.0, 1.0), "token_rewards, values and mask"),
    (lambda: gae(X, X, torch.ones(2, 3), 1.0, 1.0), r"token_rewards, values and mask \(bool\)"),
    (lambda: gae(X, X, MASK, 1.5, 1.0), "gamma must lie in"),
    (lambda: gae(X, X, MASK, math.nan, 1.0), "gamma must lie in"),
    (lambda: gae(X, X, MASK, 1.0, -0.1), "gae_lambda must lie in"),
    (lambda: whiten(X, torch.ones(2, 3)), r"x .* and mask \(bool\)"),
    (lambda: whiten(X, MASK[0]), r"x .* and mask \(bool\)"),
])
def test_wrong_shapes_types_names_and_numbers_are_refused(call, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        call()
