# SPDX-License-Identifier: MIT
"""Log-probabilities of completions: sharing the prompt, padding and micro-batches change no number."""

from types import SimpleNamespace

import pytest
import torch

import grpo
from families import NOT_SHARING, SHARING, VOCAB, make_model, packed


def one_by_one(model, batch, temperature):
    """The plainest way: every completion alone behind its prompt, without padding, through the model's own forward."""
    logprobs = torch.zeros(batch.completion_ids.shape, dtype=torch.float64)
    for i, group in enumerate(batch.completion_ids):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i]]
        for j, ids in enumerate(group):
            tokens = ids[batch.completion_mask[i, j]]
            logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
            logp = (logits / temperature).log_softmax(-1)
            logprobs[i, j, : len(tokens)] = logp.gather(1, tokens[:, None])[:, 0]
    return logprobs


def gradient(model, logprobs):
    """Of a sum in which every token has a weight of its own."""
    weights = torch.randn(logprobs.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logprobs.flatten() * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", SHARING)
def test_however_many_completions_share_a_row_numbers_and_gradients_are_those_of_completions_alone(family):
    model, batch = make_model(family, **SHARING[family]), packed(grpo)
    # These take the softmax of their attention in float32, and most norms compute in float32, whatever the weights are.
    tolerance = 1e-5 if family in ("gemma2", "gpt_neo") else 1e-10
    gradient_tolerance = 1e-12 if family in ("gpt2", "gpt_neox", "opt") else 1e-6
    alone = one_by_one(model, batch, 0.7)
    expected = gradient(model, alone)
    for completions_per_row in (4, 2, 1):
        rows = batch.repack(completions_per_row)
        assert rows.completion_ids.shape == (12 // completions_per_row, completions_per_row, 7)
        found, _ = grpo.completion_logprobs(model, rows, 0.7)
        torch.testing.assert_close(found.view_as(alone), alone, atol=tolerance, rtol=0)
        assert (gradient(model, found) - expected).norm() < gradient_tolerance * expected.norm()


def test_completions_that_are_left_out_change_no_number_of_the_others():
    """--mask-truncated empties completions, and whole rows and micro-batches of them."""
    model, batch = make_model("gpt2", **SHARING["gpt2"]), packed(grpo)
    expected, _ = grpo.completion_logprobs(model, batch, 0.7)
    mask = batch.completion_mask.clone()
    mask[1, 2], mask[2] = False, False
    for rows in (torch.arange(3), torch.tensor([2])):
        batch = packed(grpo)._replace(completion_mask=mask).rows(rows)
        for completions_per_row in (4, 2, 1):
            both = grpo.completion_logprobs(model, batch.repack(completions_per_row), 0.7)
            torch.testing.assert_close(both[0].view_as(expected[rows]), expected[rows] * mask[rows])
            model.zero_grad()
            sum(both).sum().backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", NOT_SHARING)
def test_rows_of_one_completion_are_right_where_shared_rows_are_not(family):
    model, batch = make_model(family, torch.float32, **NOT_SHARING[family]), packed(grpo, width=12)
    with torch.no_grad():
        alone = one_by_one(model, batch, 1.0)
        plain, _ = grpo.completion_logprobs(model, batch.repack(1), 1.0)
        torch.testing.assert_close(plain.view_as(alone).double(), alone, atol=1e-4, rtol=0)
        assert (grpo.completion_logprobs(model, batch, 1.0)[0] - alone).abs().max() > 1e-3


def test_what_stands_in_the_padding_changes_no_number():
    model, batch = make_model("llama"), packed(grpo)
    for rows in (batch, batch.repack(1)):
        other = rows._replace(
            prompt_ids=rows.prompt_ids.where(rows.prompt_mask, 7),
            completion_ids=rows.completion_ids.where(rows.completion_mask, 9),
        )
        for found, expected in zip(
            grpo.completion_logprobs(model, other, 0.7), grpo.completion_logprobs(model, rows, 0.7), strict=True
        ):
            assert torch.equal(found, expected)
            assert (expected[~rows.completion_mask] == 0).all()


def test_temperature_divides_the_logits_in_scoring():
    model, batch = make_model("llama"), packed(grpo)
    with torch.no_grad():
        scored, _ = grpo.completion_logprobs(model, batch, temperature=2.5)
        torch.testing.assert_close(scored, one_by_one(model, batch, 2.5), atol=1e-10, rtol=0)
        assert (scored - one_by_one(model, batch, 1.0)).abs().max() > 0.1


def test_entropy_is_that_of_the_distribution():
    model, batch = make_model("llama"), packed(grpo, num_prompts=1, group_size=2)
    _, entropy = grpo.completion_logprobs(model, batch, temperature=0.7)
    # The first token of the first completion: the distribution after the prompt.
    logp = (model(batch.prompt_ids[batch.prompt_mask][None]).logits[0, -1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(entropy[0, 0, 0], -(logp.exp() * logp).sum())
    assert (entropy[~batch.completion_mask] == 0).all()


def test_the_gradient_of_the_entropy_is_finite_where_a_probability_is_0():
    model = make_model("llama", torch.float32)
    model.lm_head.weight.data *= 400  # probabilities below the smallest number of float32
    batch = packed(grpo)
    _, entropy = grpo.completion_logprobs(model, batch, temperature=0.1)
    entropy.sum().backward()
    assert entropy.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        inputs, before, *_ = grpo.pack_rows(batch, torch.float32)
        logits = model(**inputs, logits_to_keep=before).logits / 0.1
        assert (logits.softmax(-1) == 0).any(), "no probability is 0: this shows nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_temperature_divides_and_the_log_softmax_is_taken_in_float32(dtype):
    model, batch = make_model("llama", dtype), packed(grpo)
    with torch.no_grad():
        inputs, before, _, is_token = grpo.pack_rows(batch, dtype)
        logits = model(**inputs, logits_to_keep=before).logits[is_token].float()
        for temperature in (0.7, 1.0, 2.0):
            tokens = batch.completion_ids[batch.completion_mask]
            expected = (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            found, entropy = grpo.completion_logprobs(model, batch, temperature)
            assert found.dtype == entropy.dtype == torch.float32
            torch.testing.assert_close(found[batch.completion_mask], expected, atol=1e-5, rtol=0)


def test_the_mask_of_a_shared_row_has_the_dtype_of_the_computation_and_a_row_alone_has_none():
    model, batch, found = make_model("llama", torch.float32), packed(grpo), []
    model.register_forward_pre_hook(lambda _, __, inputs: found.append(inputs), with_kwargs=True)
    grpo.completion_logprobs(model, batch, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        grpo.completion_logprobs(model, batch, 1.0)
    assert [inputs["attention_mask"].dtype for inputs in found] == [torch.float32, torch.bfloat16]
    grpo.completion_logprobs(model, batch.repack(1), 1.0)
    assert found[2].keys() == {"input_ids", "use_cache", "logits_to_keep"}


def test_the_model_runs_once_on_rows_of_the_longest_length_and_computes_logits_of_completions_only():
    model, batch, outputs = make_model("llama"), packed(grpo), []
    model.register_forward_hook(
        lambda _, __, inputs, output: outputs.append((inputs["input_ids"].shape, output)), with_kwargs=True
    )
    for rows in (batch, batch.repack(1)):
        grpo.completion_logprobs(model, rows, 1.0)
        shape, output = outputs.pop()
        assert not outputs
        assert output.past_key_values is None
        lengths = rows.completion_mask.sum((1, 2))
        assert shape == (len(lengths), (rows.prompt_mask.sum(1) + lengths).max())
        assert output.logits.shape == (len(lengths), lengths.max(), VOCAB)


def test_every_tensor_is_made_on_the_device_of_the_inputs():
    """With another default device, where nothing can be computed, the numbers are the same."""
    model, batch = make_model("llama"), packed(grpo)
    for rows in (batch, batch.repack(1)):
        expected = grpo.completion_logprobs(model, rows, 0.7)
        with torch.device("meta"):
            found = grpo.completion_logprobs(model, rows, 0.7)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ----- Cutting the batch -----


@pytest.mark.parametrize(("completions", "budget", "num_minibatches"), [
    (6, 60, 3), (1, 25, 2), (6, 1, 1), (6, 10**6, 4), (2, 40, 3),
])  # fmt: skip
def test_micro_batches_hold_every_row_once_and_keep_to_the_budget(monkeypatch, completions, budget, num_minibatches):
    batch = packed(grpo, num_prompts=12, group_size=6, width=9).repack(completions)
    lengths = batch.prompt_mask.sum(1) + batch.completion_mask.sum((1, 2))
    # Once by --micro-batch-tokens, once by the logits that may be held.
    for tokens, logits in ((budget, 10**9), (10**9, budget * VOCAB)):
        monkeypatch.setitem(grpo.MAX_LOGITS, "cpu", logits)
        args = SimpleNamespace(micro_batch_tokens=tokens, num_minibatches=num_minibatches)
        minibatches = grpo.split_batch(batch, torch.ones(12, dtype=torch.bool), VOCAB, args)
        assert [sorted(torch.cat(m).tolist()) for m in minibatches] == [
            rows.tolist() for rows in torch.arange(len(lengths)).chunk(num_minibatches)
        ]
        for rows in (rows for minibatch in minibatches for rows in minibatch):
            assert len(rows) == 1 or len(rows) * lengths[rows].max() <= budget


def test_prompts_without_a_signal_are_left_out_whole():
    batch = packed(grpo, num_prompts=4, group_size=3).repack(1)
    has_signal = torch.tensor([True, False, False, True])
    for num_minibatches, expected in ((1, [[0, 1, 2, 9, 10, 11]]), (2, [[0, 1, 2], [9, 10, 11]])):
        args = SimpleNamespace(micro_batch_tokens=20, num_minibatches=num_minibatches)
        minibatches = grpo.split_batch(batch, has_signal, VOCAB, args)
        assert [sorted(torch.cat(minibatch).tolist()) for minibatch in minibatches] == expected
    assert grpo.split_batch(batch, ~(has_signal | True), VOCAB, args) == [(), ()]


@pytest.mark.parametrize(
    ("group_size", "prompt", "completion", "hidden_size", "expected"),
    [  # in the first line, what was fastest when it was measured
        (8, 92, 225, 576, 2), (16, 82, 64, 576, 8), (8, 92, 48, 576, 8), (8, 6, 17, 96, 4), (32, 6, 17, 96, 4),
        (16, 2000, 10, 576, 16), (16, 10, 500, 576, 1),
    ],
)  # fmt: skip
def test_prompts_are_shared_as_often_as_is_fastest(group_size, prompt, completion, hidden_size, expected):
    def batch(padding: int) -> grpo.Batch:
        masks = [torch.ones(shape, dtype=torch.bool) for shape in ((2, prompt), (2, group_size, completion))]
        prompts, completions = (torch.nn.functional.pad(mask, (0, padding)) for mask in masks)
        return grpo.Batch(prompts.long(), prompts, completions.long(), completions, completions.float())

    policy, problems = make_model("llama", torch.float32, max_position_embeddings=10_000), [([0] * prompt, "")]
    policy.config.hidden_size = hidden_size
    args = SimpleNamespace(model="x", share_prompt=True)
    longest = grpo.longest_shared_row(policy, problems, args)
    policy.config.sliding_window = prompt + 2 * completion - 1  # two completions do not fit
    windowed = grpo.longest_shared_row(policy, problems, args)
    for padding in (0, 5):
        assert grpo.completions_per_row(batch(padding), longest) == expected
        assert grpo.completions_per_row(batch(padding), windowed) == 1
    args.share_prompt = False
    assert grpo.longest_shared_row(policy, problems, args) == 0
    assert grpo.completions_per_row(batch(0), 0) == 1


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_token_that_the_model_masks_out_has_no_part_in_the_entropy(masked):
    """As some models do with the unused ids of a padded vocabulary. Neither the numbers nor the gradients are NaN."""
    model, batch = make_model("llama", torch.float32), packed(grpo)
    batch = batch._replace(completion_ids=batch.completion_ids.where(batch.completion_ids != 5, 6))
    masking = lambda _, __, logits: logits.index_fill(-1, torch.tensor(5), masked)
    model.lm_head.register_forward_hook(masking)
    logprobs, entropy = grpo.completion_logprobs(model, batch, 0.7)
    (logprobs.sum() + entropy.sum()).backward()
    assert entropy.isfinite().all()
    assert (entropy[batch.completion_mask] > 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
