# SPDX-License-Identifier: MIT
"""What must hold for advantages: those of a group (DeepSeekMath 4.1.2), of steps (4.1.3), GAE and whitening.

The deviations below carry the 1e-4 that the code adds to them: s / (s + 1e-4) is the factor that it costs.
"""

import math
import statistics

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from advantage import gae, group_advantages, process_advantages, whiten
from helpers.strategies import (
    assert_close,
    baselines,
    dtypes,
    float64,
    garbage,
    masks,
    numbers,
    rewards,
    scales,
    spread_out,
    tensors,
)

STD_EPS = 1e-4
fractions = st.floats(0.0, 1.0)  # gamma, lambda


def shrink(values: Tensor) -> Tensor:
    """s / (s + 1e-4) of every row, (B, 1)."""
    std = values.std(dim=1, keepdim=True)
    return std / (std + STD_EPS)


# ----- Group advantages -----


@given(rewards(), scales, baselines)
def test_group_advantages_sum_to_zero_in_each_group(rewards, scale, baseline):
    """DeepSeekMath 4.1.2, RLOO: the advantages of a group sum to 0."""
    advantages = group_advantages(rewards, scale, baseline)
    assert_close(advantages.sum(1) / advantages.abs().sum(1).clamp(min=1e-20), 0.0)


@given(rewards())
def test_group_advantages_have_the_variance_of_the_sample_std(rewards):
    """DeepSeekMath 4.1.2, sample std s: sum A^2 = (G - 1) (s / (s + 1e-4))^2."""
    squares = group_advantages(rewards).square().sum(1, keepdim=True)
    assert_close(squares, (rewards.shape[1] - 1) * shrink(rewards).square())


@given(rewards())
def test_group_advantages_are_bounded_by_the_group_size(rewards):
    """|A| <= (G - 1) / sqrt(G) with the sample std."""
    group_size = rewards.shape[1]
    assert group_advantages(rewards).abs().max() <= (group_size - 1) / math.sqrt(group_size) * (1 + 1e-4)


@given(rewards())
def test_the_bound_is_reached_by_the_one_success(rewards):
    """|A| <= (G - 1) / sqrt(G) with the sample std, its equality: one reward of 1 among zeros."""
    one = torch.zeros_like(rewards)
    one[:, 0] = 1
    group_size = one.shape[1]
    bound = (group_size - 1) / math.sqrt(group_size)
    assert_close(group_advantages(one)[:, :1], bound * shrink(one))


@given(rewards(float64, max_prompts=1), numbers(-100, 100), numbers(-10, 10), scales, baselines)
def test_shifted_rewards_change_nothing_and_scaled_rewards_at_most_the_sign(rewards, a, b, scale, baseline):
    """Shift and scale: A(aR + b) = sign(a) A(R), but for the 1e-4; without a std, a A(R)."""
    assume(abs(a) > 1e-2)
    before = group_advantages(rewards, scale, baseline)
    after = group_advantages(a * (rewards + b * rewards.abs().max()), scale, baseline)
    std = rewards.std()
    factor = a if scale == "none" else math.copysign(1, a) * (std + STD_EPS) / (std + STD_EPS / abs(a))
    assert_close(after, factor * before, scale=after.abs().max())


@given(rewards(), scales, baselines, st.data())
def test_group_advantages_follow_a_permutation_of_the_group(rewards, scale, baseline, data):
    """The order in a group, and other groups, change nothing."""
    order = data.draw(st.permutations(range(rewards.shape[1])))
    before, after = (group_advantages(x, scale, baseline) for x in (rewards, rewards[:, order]))
    assert_close(after, before[:, order], scale=before.abs().max())


@given(rewards(), st.sampled_from(["group", "none"]), baselines)
def test_other_groups_are_irrelevant(rewards, scale, baseline):
    """The order in a group, and other groups, change nothing."""
    alone = torch.cat([group_advantages(row[None], scale, baseline) for row in rewards])
    assert_close(group_advantages(rewards, scale, baseline), alone, scale=alone.abs().max())


@given(rewards(), baselines)
def test_batch_scale_divides_by_the_std_of_all_rewards(rewards, baseline):
    """"batch": the one place where other groups matter, by their spread only."""
    std = statistics.stdev(rewards.flatten().tolist())
    expected = group_advantages(rewards, "none", baseline) / (std + STD_EPS)
    assert_close(group_advantages(rewards, "batch", baseline), expected, scale=1e-2)


@given(numbers(-1e6, 1e6), st.integers(2, 64), dtypes, scales, baselines)
@example(0.1, 3, torch.float32, "group", "mean")
@example(0.1, 3, torch.float32, "group", "leave_one_out")
def test_equal_rewards_give_exactly_zero(value, group_size, dtype, scale, baseline):
    """Equal rewards give exactly 0, also beside a group with a larger and one with a smaller reward."""
    rewards = torch.full((3, group_size), value, dtype=dtype)
    rewards[1, 0] += 1
    rewards[2, 0] -= 1
    for values in (rewards[:1], rewards[:2], rewards[::2]):
        assert group_advantages(values, scale, baseline)[0].eq(0).all()


def test_equal_rewards_of_one_tenth_are_a_float32_trap():
    """The mean of equal rewards can miss them, here by 7e-9, and a std as small would make that large."""
    traps = [rewards for n in range(2, 65) if (rewards := torch.full((1, n), 0.1)).std() > 0]
    assert traps
    assert any((rewards - rewards.mean()).abs().max() > 0 for rewards in traps)
    assert all(group_advantages(rewards).eq(0).all() for rewards in traps)


@given(st.integers(2, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), dtypes)
def test_binary_rewards_give_the_odds_of_failure_and_of_success(drawn, dtype):
    """Binary rewards, success fraction p, sample std: sqrt((1-p)/p) and -sqrt(p/(1-p)), times sqrt((G-1)/G)."""
    group_size, successes = drawn
    rewards = (torch.arange(group_size) < successes).to(dtype)[None]
    p, shrunk = successes / group_size, math.sqrt((group_size - 1) / group_size) * shrink(rewards)
    advantages = group_advantages(rewards)
    assert_close(advantages[:, :successes], math.sqrt((1 - p) / p) * shrunk)
    assert_close(advantages[:, successes:], -math.sqrt(p / (1 - p)) * shrunk)


@given(rewards(max_group=2))
def test_two_distinct_rewards_give_plus_and_minus_one_over_the_root_of_two(rewards):
    """G = 2 with distinct rewards: +-1 / sqrt(2), of the sample std."""
    first = group_advantages(rewards)[:, :1]
    sign = torch.sign(rewards[:, :1] - rewards[:, 1:])
    assert_close(first, sign / math.sqrt(2) * shrink(rewards))


@given(rewards())
def test_leave_one_out_subtracts_the_mean_of_the_others(rewards):
    """RLOO: r_i minus the mean of the others, which is G / (G - 1) (r_i - mean)."""
    group_size = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (group_size - 1)
    found = group_advantages(rewards, "none", "leave_one_out")
    centred = group_advantages(rewards, "none", "mean")
    assert_close(found, rewards - others, scale=10 * found.abs().max())
    assert_close(found, group_size / (group_size - 1) * centred, scale=found.abs().max())


@pytest.mark.parametrize(("rewards", "options", "sentence"), [
    (torch.zeros(4), {}, "^rewards must be"),
    (torch.zeros(2, 2, 2), {}, "^rewards must be"),
    (torch.zeros(2, 2, dtype=torch.long), {}, "^rewards must be"),
    (torch.zeros(4, 1), {}, "^a group of one"),
    (torch.zeros(2, 2), {"scale": "std"}, "^scale must be one of group, batch, none, got 'std'"),
    (torch.zeros(2, 2), {"baseline": "median"}, "^baseline must be one of mean, leave_one_out, got 'median'"),
])
def test_group_advantages_refuse_wrong_shapes_unknown_names_and_groups_of_one(rewards, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        group_advantages(rewards, **options)


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


@given(rewards(max_prompts=2, max_group=4), st.integers(1, 5), st.data())
def test_one_step_at_the_last_token_is_outcome_supervision(rewards, width, data):
    """DeepSeekMath 4.1.3: one step at the last token is outcome supervision."""
    lengths = data.draw(st.lists(st.integers(1, width), min_size=rewards.numel(), max_size=rewards.numel()))
    lengths = torch.tensor(lengths).view(*rewards.shape, 1)
    place = torch.arange(width).expand(*rewards.shape, width)
    advantages = process_advantages(rewards[..., None].expand(place.shape), place == lengths - 1)
    expected = group_advantages(rewards)[..., None].where(place < lengths, 0.0)
    assert_close(advantages, expected)


@given(numbers(-1e6, 1e6), st.integers(1, 12), dtypes)
@example(0.1, 3, torch.float32)
def test_equal_step_rewards_give_exactly_zero(value, width, dtype):
    """Equal rewards of steps give 0, also beside a group with larger and one with smaller steps, and one step alone."""
    rewards, ends = torch.full((3, 2, width), value, dtype=dtype), torch.ones(3, 2, width, dtype=torch.bool)
    rewards[1, 0, 0] += 1
    rewards[2, 0, 0] -= 1
    for rows in (slice(0, 1), slice(0, 2), slice(0, 3, 2)):
        assert process_advantages(rewards[rows], ends[rows])[0].eq(0).all()
    ends[0, 1] = False
    assert process_advantages(rewards, ends)[0].eq(0).all()


@pytest.mark.parametrize(("rewards", "ends"), [
    (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)),
    (torch.zeros(1, 2, 3), torch.ones(1, 2, 4, dtype=torch.bool)),
    (torch.zeros(1, 2, 3), torch.ones(1, 2, 3)),
])
def test_process_advantages_refuse_wrong_shapes(rewards, ends):
    with pytest.raises(ValueError, match="step_rewards and step_ends"):
        process_advantages(rewards, ends)


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


def discounted_sum(x: Tensor, factor: float) -> Tensor:
    """sum_l factor^l x_{t+l}, term by term."""
    width = x.shape[1]
    sums = [sum(factor**k * x[:, t + k] for k in range(width - t)) for t in range(width)]
    return torch.stack(sums, dim=1)


@given(episodes(), fractions, fractions)
def test_gae_is_the_discounted_sum_of_the_residuals(episode, gamma, gae_lambda):
    """GAE Eq. 16: the recursion equals the double sum. Returns are advantages + values."""
    token_rewards, values, mask = episode
    advantages, returns = gae(*episode, gamma, gae_lambda)
    deltas = token_rewards + gamma * next_token(values) - values
    assert_close(advantages, discounted_sum(deltas, gamma * gae_lambda).where(mask, 0.0), scale=100)
    assert_close(returns, advantages + values, scale=100)


@given(episodes(), fractions)
def test_gae_lambda_zero_is_the_residual_and_one_the_return_minus_the_value(episode, gamma):
    """GAE Eqs. 17 and 18: lambda 0 gives delta_t, lambda 1 the return minus V_t."""
    token_rewards, values, _ = episode
    deltas = token_rewards + gamma * next_token(values) - values
    assert_close(gae(*episode, gamma, 0.0)[0], deltas, scale=100)
    assert_close(gae(*episode, gamma, 1.0)[0], discounted_sum(token_rewards, gamma) - values, scale=100)


@given(episodes(), numbers(-10, 10))
def test_gae_without_discount_is_the_outcome_minus_the_value(episode, outcome):
    """GAE Eq. 18: gamma = lambda = 1 and R on the last token give R - V_t."""
    _, values, mask = episode
    last = mask & ~next_token(mask)
    token_rewards = torch.zeros_like(values).masked_fill(last, outcome)
    assert_close(gae(token_rewards, values, mask, 1.0, 1.0)[0], (outcome - values).where(mask, 0.0), scale=100)


@given(episodes(), fractions, fractions)
def test_gae_advantages_differ_by_the_residual(episode, gamma, gae_lambda):
    """GAE Eq. 16: A_t - gamma lambda A_{t+1} = delta_t."""
    token_rewards, values, _ = episode
    advantages, _ = gae(*episode, gamma, gae_lambda)
    deltas = token_rewards + gamma * next_token(values) - values
    assert_close(advantages - gamma * gae_lambda * next_token(advantages), deltas, scale=100)


@given(episodes(), fractions, fractions)
def test_gae_is_the_weighted_mean_of_the_k_step_advantages(episode, gamma, gae_lambda):
    """GAE Eq. 16 as a weighted mean: weights (1 - lambda) lambda^(k-1) for k < K, and lambda^(K-1) for the last one."""
    token_rewards, values, mask = episode
    advantages, _ = gae(*episode, gamma, gae_lambda)
    for row, length in enumerate(mask.sum(1).tolist()):
        reward, value = token_rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            most, mean = length - t, 0.0
            for k in range(1, most + 1):
                k_step = sum(gamma**j * reward[t + j] for j in range(k)) + gamma**k * value[t + k] - value[t]
                mean += k_step * (gae_lambda ** (k - 1) * (1 - gae_lambda) if k < most else gae_lambda ** (k - 1))
            assert_close(advantages[row, t], mean, scale=100)


@given(episodes(), fractions, fractions, st.data())
def test_potential_shaping_leaves_gae_unchanged(episode, gamma, gae_lambda, data):
    """Potential shaping: rewards r + gamma Phi_{t+1} - Phi_t with values V - Phi."""
    token_rewards, values, mask = episode
    phi = data.draw(tensors(mask.shape, -10.0, 10.0, st.just(values.dtype))).where(mask, 0.0)
    shaped = gae(token_rewards + gamma * next_token(phi) - phi, values - phi, mask, gamma, gae_lambda)[0]
    assert_close(shaped, gae(*episode, gamma, gae_lambda)[0], scale=100)


@given(episodes(), fractions, st.data())
def test_returns_of_lambda_one_do_not_depend_on_the_values(episode, gamma, data):
    """GAE Eq. 18: with lambda 1, A + V does not depend on V."""
    token_rewards, values, mask = episode
    others = data.draw(tensors(mask.shape, -10.0, 10.0, st.just(values.dtype)))
    assert_close(gae(token_rewards, others, mask, gamma, 1.0)[1], gae(*episode, gamma, 1.0)[1], scale=100)


@given(episodes(), fractions, fractions, garbage)
def test_padding_garbage_changes_nothing_in_gae(episode, gamma, gae_lambda, garbage):
    """What stands in the padding changes nothing, of advantages and returns: 0 in the padding."""
    token_rewards, values, mask = episode
    dirty = (x.masked_fill(~mask, garbage) for x in (token_rewards, values))
    for found, expected in zip(gae(*dirty, mask, gamma, gae_lambda), gae(*episode, gamma, gae_lambda), strict=True):
        assert torch.equal(found, expected)
        assert found[~mask].eq(0).all()


@given(episodes(), fractions, fractions, st.booleans(), st.data())
def test_groups_give_what_their_completions_give_in_one_list(episode, gamma, gae_lambda, shift_mean, data):
    """(B, G, T), (B G, T) and for GAE every completion alone, (T,): the same advantages, returns and whitened numbers,
    where the latter take all tokens together."""
    num_rows, width = episode[2].shape
    groups = data.draw(st.sampled_from([n for n in range(1, num_rows + 1) if num_rows % n == 0]))
    nested = [x.view(groups, -1, width) for x in episode]
    found, flat = gae(*nested, gamma, gae_lambda), gae(*episode, gamma, gae_lambda)
    alone = zip(*(gae(*row, gamma, gae_lambda) for row in zip(*episode, strict=True)), strict=True)
    for in_groups, in_a_list, one_by_one in zip(found, flat, alone, strict=True):
        assert torch.equal(in_groups, in_a_list.view(groups, -1, width))
        assert torch.equal(in_a_list, torch.stack(one_by_one))
    assert_close(whiten(*nested[1:], shift_mean).flatten(0, 1), whiten(*episode[1:], shift_mean), scale=10)


@pytest.mark.parametrize(("shapes", "gamma", "gae_lambda", "sentence"), [
    (((2, 3), (2, 1), (2, 3)), 1.0, 1.0, "^token_rewards, values and mask"),
    (((2, 3), (2, 3), (1, 3)), 1.0, 1.0, "^token_rewards, values and mask"),
    (((2, 3), (2, 3), (2, 3)), 1.5, 1.0, "^gamma must lie in"),
    (((2, 3), (2, 3), (2, 3)), 1.0, -0.1, "^gae_lambda must lie in"),
    (((2, 3), (2, 3), (2, 3)), math.nan, 1.0, "^gamma must lie in"),
])
def test_gae_refuses_wrong_shapes_and_factors(shapes, gamma, gae_lambda, sentence):
    rewards, values, mask = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=sentence):
        gae(rewards, values, mask.bool(), gamma, gae_lambda)


def test_masks_must_be_bool():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"mask \(bool\)"):
        gae(x, x, torch.ones(2, 3), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"mask \(bool\)"):
        whiten(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask \(bool\)"):
        whiten(x, torch.ones(3, dtype=torch.bool))


# ----- Whitening -----


@st.composite
def masked_numbers(draw) -> tuple[Tensor, Tensor]:
    mask = draw(masks())
    x = draw(tensors(mask.shape, -1e3, 1e3))
    assume(mask.sum() > 1 and spread_out(x[mask].tolist()))
    return x, mask


@given(masked_numbers())
def test_whitened_numbers_have_mean_zero_and_variance_one(drawn):
    """Ziegler et al.'s whitening: over the mask; the variance is s^2 / (s^2 + 1e-8), of the population."""
    x, mask = drawn
    whitened, variance = whiten(x, mask)[mask], x[mask].var(correction=0)
    assert_close(whitened.mean(), 0.0)
    assert_close(whitened.var(correction=0), variance / (variance + 1e-8))


@given(masked_numbers())
def test_whitening_without_shift_keeps_the_mean(drawn):
    """Ziegler et al.'s whitening."""
    x, mask = drawn
    scaled = whiten(x, mask, shift_mean=False)
    assert_close(scaled[mask].mean(), x[mask].mean(), scale=scaled.abs().max())
    assert_close(scaled[mask] - x[mask].mean(), whiten(x, mask)[mask], scale=scaled.abs().max())


@given(masked_numbers(), garbage, st.booleans())
def test_padding_garbage_changes_nothing_in_whiten(drawn, garbage, shift_mean):
    """What stands in the padding changes nothing, of whitening: 0 in the padding."""
    x, mask = drawn
    whitened = whiten(x, mask, shift_mean)
    assert torch.equal(whiten(x.masked_fill(~mask, garbage), mask, shift_mean), whitened)
    assert whitened[~mask].eq(0).all()


def test_whitening_nothing_or_one_number_gives_zero():
    x = torch.tensor([3.0, 4.0])
    assert whiten(x, torch.tensor([False, False])).eq(0).all()
    assert whiten(x, torch.tensor([True, False])).eq(0).all()
