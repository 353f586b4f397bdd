# SPDX-License-Identifier: MIT
"""Log-probabilities of completions: sharing the prompt, padding, pieces and micro-batches change no number."""

import math

import pytest
import torch

import grpo
from families import NOT_SHARING, SHARING, VOCAB, make_batch, make_model


def one_by_one(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature):
    """The plainest way: every row alone, without padding, through the model's own forward."""
    group_size = len(completion_ids) // len(prompt_ids)
    logprobs = torch.zeros(completion_ids.shape, dtype=torch.float64)
    for i, (ids, mask) in enumerate(zip(completion_ids, completion_mask, strict=True)):
        prompt, tokens = prompt_ids[i // group_size][prompt_mask[i // group_size]], ids[mask]
        logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs[i, : len(tokens)] = (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return logprobs


def plain(prompt_ids, prompt_mask, completion_ids, completion_mask):
    """The same batch with a prompt of its own for every completion."""
    group_size = len(completion_ids) // len(prompt_ids)
    return *(x.repeat_interleave(group_size, 0) for x in (prompt_ids, prompt_mask)), completion_ids, completion_mask


@pytest.mark.parametrize("family", SHARING)
def test_packed_and_plain_rows_give_the_log_probabilities_of_rows_alone(family):
    model, batch = make_model(family, **SHARING[family]), make_batch()
    with torch.no_grad():
        alone = one_by_one(model, *batch, temperature=0.7)
        packed, _ = grpo.completion_logprobs(model, *batch, temperature=0.7)
        unpacked, _ = grpo.completion_logprobs(model, *plain(*batch), temperature=0.7)
    tolerance = 1e-5 if family == "gemma2" else 1e-10  # gemma2's eager attention takes its softmax in float32
    torch.testing.assert_close(packed, alone, atol=tolerance, rtol=0)
    torch.testing.assert_close(unpacked, alone, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "granite"])
def test_packed_and_plain_rows_give_the_same_gradient(family):
    model, batch = make_model(family, **SHARING[family]), make_batch()
    weights = torch.randn(batch[2].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for rows in (batch, plain(*batch)):
        model.zero_grad()
        (grpo.completion_logprobs(model, *rows, temperature=0.7)[0] * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # gpt2 is float64 throughout; the norms of the others compute in float32, whatever the weights are.
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < (1e-12 if family == "gpt2" else 1e-6)


@pytest.mark.parametrize("family", NOT_SHARING)
def test_plain_rows_are_right_where_packed_rows_are_not(family):
    model, batch = make_model(family, **NOT_SHARING[family]), make_batch(width=12)
    with torch.no_grad():
        alone = one_by_one(model, *batch, temperature=1.0)
        packed, _ = grpo.completion_logprobs(model, *batch, temperature=1.0)
        unpacked, _ = grpo.completion_logprobs(model, *plain(*batch), temperature=1.0)
    torch.testing.assert_close(unpacked, alone, atol=1e-6, rtol=0)
    assert (packed - alone).abs().max() > 0.1


def test_what_stands_in_the_padding_changes_nothing():
    model, (prompt_ids, prompt_mask, completion_ids, completion_mask) = make_model("llama"), make_batch()
    first, _ = grpo.completion_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask, 1.0)
    prompt_ids, completion_ids = prompt_ids.where(prompt_mask, 1), completion_ids.where(completion_mask, 1)
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (completion_ids, completion_mask)]
    second, _ = grpo.completion_logprobs(model, prompt_ids, prompt_mask, *wider, 1.0)
    assert torch.equal(second[:, :-3], first)
    assert (second[~wider[1]] == 0).all()


def test_temperature_divides_the_logits_in_scoring():
    model, batch = make_model("llama"), make_batch()
    with torch.no_grad():
        scored, _ = grpo.completion_logprobs(model, *batch, temperature=2.5)
        torch.testing.assert_close(scored, one_by_one(model, *batch, 2.5), atol=1e-10, rtol=0)
        assert (scored - one_by_one(model, *batch, 1.0)).abs().max() > 0.1


def test_entropy_is_that_of_the_distribution_and_trains_only_when_asked():
    model, batch = make_model("llama"), make_batch(num_prompts=1, group_size=2)
    prompt_ids, prompt_mask, _, completion_mask = batch
    _, entropy = grpo.completion_logprobs(model, *batch, temperature=0.7)
    assert not entropy.requires_grad
    # Row 0, first token: the distribution after the prompt.
    logp = (model(prompt_ids[prompt_mask][None]).logits[0, -1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(entropy[0, 0], -(logp.exp() * logp).sum())
    assert (entropy[~completion_mask] == 0).all()
    assert grpo.completion_logprobs(model, *batch, temperature=0.7, entropy_grad=True)[1].requires_grad


@pytest.mark.parametrize("pieces", [2, 10])
def test_a_large_vocabulary_is_scored_in_pieces_with_the_same_numbers(monkeypatch, pieces):
    """No piece has more logits than allowed, and only pieces are computed again for the backward pass."""
    model, batch = make_model("llama"), make_batch()
    num_logits, sizes, results = int(batch[3].sum()) * VOCAB, [], []

    def output_logits(policy, hidden):
        sizes.append(hidden.shape[0] * VOCAB)
        return whole_logits(policy, hidden)

    whole_logits = grpo.output_logits
    monkeypatch.setattr(grpo, "output_logits", output_logits)
    for at_once, passes in ((num_logits, 1), (math.ceil(num_logits / pieces), 2)):
        monkeypatch.setitem(grpo.LOGITS_AT_ONCE, "cpu", at_once)
        sizes.clear()
        assert not grpo.completion_logprobs(model, *batch, temperature=0.7)[1].requires_grad
        sizes.clear()
        logprobs, entropy = grpo.completion_logprobs(model, *batch, temperature=0.7, entropy_grad=True)
        gradient = torch.autograd.grad(logprobs.sum() + entropy.square().sum(), tuple(model.parameters()))
        results.append((logprobs, entropy, *gradient))
        assert sum(sizes) == passes * num_logits
        assert max(sizes) < at_once + VOCAB
    for whole, piecewise in zip(*results, strict=True):
        torch.testing.assert_close(piecewise, whole, atol=1e-10, rtol=1e-10)


def test_the_temperature_divides_in_float32_over_a_bfloat16_model():
    model, batch = make_model("llama", torch.bfloat16), make_batch()
    with torch.no_grad():
        logits = grpo.output_logits(model, grpo.completion_hidden(model.base_model, *batch)).float()
        for temperature in (0.7, 1.0, 2.0):
            expected = (logits / temperature).log_softmax(-1).gather(1, batch[2][batch[3]][:, None])[:, 0]
            found, _ = grpo.completion_logprobs(model, *batch, temperature=temperature)
            torch.testing.assert_close(found[batch[3]], expected, atol=1e-5, rtol=0)


def test_the_mask_of_a_shared_row_has_the_dtype_of_the_computation():
    model, batch, found = make_model("llama", torch.float32), make_batch(), []
    note = lambda _, __, options: found.append(options["attention_mask"].dtype)
    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    grpo.completion_logprobs(model, *batch, temperature=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        grpo.completion_logprobs(model, *batch, temperature=1.0)
    assert found == [torch.float32, torch.bfloat16]


def test_the_model_runs_once_on_rows_of_the_longest_length_and_keeps_no_cache():
    """A prompt is paid for once; padding only up to the longest row; keys and values would fill the memory."""
    model, batch, outputs = make_model("llama"), make_batch(), []
    model.base_model.register_forward_hook(lambda _, arguments, output: outputs.append((arguments[0].shape, output)))
    for rows in (batch, plain(*batch)):
        grpo.completion_logprobs(model, *rows, temperature=1.0)
        shape, output = outputs.pop()
        assert not outputs
        assert output.past_key_values is None
        num_rows = len(rows[0])
        longest = (rows[1].sum(1) + rows[3].view(num_rows, -1).sum(1)).max()
        assert shape == (num_rows, longest)


def test_every_tensor_is_made_on_the_device_of_the_inputs():
    """With another default device, where nothing can be computed, the numbers are the same."""
    model, batch = make_model("llama"), make_batch()
    for rows in (batch, plain(*batch)):
        expected = grpo.completion_logprobs(model, *rows, temperature=0.7)
        with torch.device("meta"):
            found = grpo.completion_logprobs(model, *rows, temperature=0.7)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_log_softmax_is_float32_over_a_bfloat16_model():
    model, batch = make_model("llama", torch.bfloat16), make_batch()
    logprobs, entropy = grpo.completion_logprobs(model, *batch, temperature=1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_micro_batches_hold_every_row_once_and_keep_to_the_budget():
    _, prompt_mask, _, completion_mask = make_batch(num_prompts=12, group_size=6, width=9)
    everything = torch.ones(12, dtype=torch.bool)
    for k, budget, num_minibatches in ((6, 60, 3), (1, 25, 2), (6, 1, 1), (6, 10**6, 4), (2, 40, 3)):
        generator = torch.Generator().manual_seed(0)
        cut = grpo.split_batch(prompt_mask, completion_mask, everything, num_minibatches, budget, k, generator)
        assert len(cut) == num_minibatches
        assert sorted(i for minibatch in cut for _, rows in minibatch for i in rows.tolist()) == list(range(72))
        for prompts, rows in (micro for minibatch in cut for micro in minibatch):
            assert len(rows) == k * len(prompts)
            assert torch.equal(rows.view(-1, k) // 6, prompts[:, None].expand(-1, k))
            tokens = prompt_mask.sum(1)[prompts] + completion_mask.sum(1)[rows].view(-1, k).sum(1)
            assert len(prompts) == 1 or len(prompts) * tokens.max() <= budget


def test_groups_that_teach_nothing_are_left_out_whole():
    _, prompt_mask, _, completion_mask = make_batch(num_prompts=4, group_size=3)
    teaches = torch.tensor([True, False, False, True])
    cut = grpo.split_batch(prompt_mask, completion_mask, teaches, 2, 100, 3, torch.Generator().manual_seed(0))
    assert sorted(i for minibatch in cut for _, rows in minibatch for i in rows.tolist()) == [0, 1, 2, 9, 10, 11]


@pytest.mark.parametrize(
    ("group_size", "prompt", "completion", "hidden_size", "expected"),
    [  # in the first line, what was fastest when it was measured
        (8, 92, 225, 576, 2), (16, 82, 64, 576, 8), (8, 92, 48, 576, 8), (8, 6, 17, 96, 4), (32, 6, 17, 96, 4),
        (16, 2000, 10, 576, 16), (16, 10, 500, 576, 1),
    ],
)  # fmt: skip
def test_prompts_are_shared_as_often_as_is_fastest(group_size, prompt, completion, hidden_size, expected):
    policy = make_model("llama")
    policy.config.hidden_size = hidden_size
    masks = [torch.ones(shape, dtype=torch.bool) for shape in ((2, prompt), (2 * group_size, completion))]
    padded = [torch.cat([mask, torch.zeros_like(mask)], dim=1) for mask in masks]
    assert grpo.completions_per_row(*masks, policy) == grpo.completions_per_row(*padded, policy) == expected
