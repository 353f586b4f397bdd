# SPDX-License-Identifier: MIT
"""Log-probabilities of completions: sharing the prompt, padding and micro-batches change no number."""

import itertools
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

import grpo
from families import NOT_SHARING, SHARING, VOCAB, batch_of, in_parts, make_model


def one_by_one(model, batch, temperature):
    """The plainest way: every completion alone behind its prompt, without padding, through the model's own forward."""
    logprobs = torch.zeros(batch.completion_ids.shape, dtype=torch.float64)
    batch = batch.unshared()
    for i, ids in enumerate(batch.completion_ids):
        prompt, tokens = batch.prompt_ids[i][batch.prompt_mask[i]], ids[batch.completion_mask[i]]
        logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1)
        logprobs[i, : len(tokens)] = logp.gather(1, tokens[:, None])[:, 0]
    return logprobs


def gradient(model, logprobs):
    """Of a sum in which every token has a weight of its own."""
    weights = torch.randn(logprobs.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logprobs.flatten() * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", SHARING)
def test_however_many_completions_share_a_prompt_numbers_and_gradients_are_those_of_completions_alone(family):
    # These take the softmax of their attention in float32, and most norms compute in float32, whatever the weights are.
    single = family in ("gemma2", "gpt_neo")
    model, batch = make_model(family, torch.float32 if single else torch.float64, **SHARING[family]), batch_of(grpo)
    tolerance = 1e-4 if single else 1e-10
    gradient_tolerance = 1e-4 if single else 1e-12 if family in ("gpt2", "gpt_neox", "opt") else 1e-6
    alone = one_by_one(model, batch, 0.7)
    expected = gradient(model, alone)
    for each, size in ((batch, 12), (batch, 4), (batch, 2), (batch, 1), (batch.unshared(), 12), (batch.unshared(), 5)):
        found = in_parts(grpo.completion_logprobs, model, each, size, 0.7)
        torch.testing.assert_close(found.double(), alone, atol=tolerance, rtol=0)
        assert (gradient(model, found) - expected).norm() < gradient_tolerance * expected.norm()


def test_completions_that_are_left_out_change_no_number_of_the_others():
    """--mask-truncated empties completions, and whole groups and micro-batches of them."""
    model, batch = make_model("gpt2", **SHARING["gpt2"]), batch_of(grpo)
    expected, _ = grpo.completion_logprobs(model, batch, 0.7)
    mask = batch.completion_mask.clone()
    mask[6], mask[8:] = False, False
    batch = batch._replace(completion_mask=mask)
    for each, rows in itertools.product((batch, batch.unshared()), (torch.arange(12), torch.arange(8, 12))):
        logprobs, entropy = grpo.completion_logprobs(model, each.rows(rows), 0.7)
        torch.testing.assert_close(logprobs, (expected * mask)[rows, : logprobs.shape[1]])
        model.zero_grad()
        (logprobs + entropy).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", NOT_SHARING)
def test_completions_with_a_prompt_of_their_own_are_right_where_a_prompt_cannot_be_shared(family):
    model, batch = make_model(family, torch.float32, **NOT_SHARING[family]), batch_of(grpo, width=12)
    with torch.no_grad():
        alone = one_by_one(model, batch, 1.0)
        plain, _ = grpo.completion_logprobs(model, batch.unshared(), 1.0)
        torch.testing.assert_close(plain.double(), alone, atol=1e-4, rtol=0)


def test_what_stands_in_the_padding_changes_no_number():
    model, batch = make_model("llama"), batch_of(grpo)
    for rows in (batch, batch.unshared()):
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
    model, batch = make_model("llama"), batch_of(grpo)
    with torch.no_grad():
        scored, _ = grpo.completion_logprobs(model, batch, temperature=2.5)
        torch.testing.assert_close(scored, one_by_one(model, batch, 2.5), atol=1e-10, rtol=0)
        assert (scored - one_by_one(model, batch, 1.0)).abs().max() > 0.1


def test_entropy_is_that_of_the_distribution():
    model, batch = make_model("llama"), batch_of(grpo, num_prompts=1, group_size=2)
    _, entropy = grpo.completion_logprobs(model, batch, temperature=0.7)
    # The first token of the first completion: the distribution after the prompt.
    logp = (model(batch.prompt_ids[batch.prompt_mask][None]).logits[0, -1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(entropy[0, 0], -(logp.exp() * logp).sum())
    assert (entropy[~batch.completion_mask] == 0).all()


def test_the_gradient_of_the_entropy_is_finite_where_a_probability_is_0():
    model = make_model("llama", torch.float32)
    model.lm_head.weight.data *= 400  # probabilities below the smallest number of float32
    batch = batch_of(grpo)
    _, entropy = grpo.completion_logprobs(model, batch, temperature=0.1)
    entropy.sum().backward()
    assert entropy.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        logits = grpo.predict_completions(model, batch) / 0.1
        assert (logits.softmax(-1) == 0).any(), "no probability is 0: this shows nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_temperature_divides_and_the_log_softmax_is_taken_in_float32(dtype):
    model, batch = make_model("llama", dtype), batch_of(grpo)
    with torch.no_grad():
        logits = grpo.predict_completions(model, batch)[batch.completion_mask].float()
        for temperature in (0.7, 1.0, 2.0):
            tokens = batch.completion_ids[batch.completion_mask]
            expected = (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            found, entropy = grpo.completion_logprobs(model, batch, temperature)
            assert found.dtype == entropy.dtype == torch.float32
            torch.testing.assert_close(found[batch.completion_mask], expected, atol=1e-5, rtol=0)


def record_passes(model):
    passes = []
    record = lambda _, __, kwargs, output: passes.append((kwargs["input_ids"].shape, kwargs, output))
    model.register_forward_hook(record, with_kwargs=True)
    return passes


def test_a_completion_alone_runs_without_mask_and_positions_in_a_row_of_its_own():
    """So the kernels without a mask serve, and logits of prompts are not computed."""
    model, batch = make_model("llama"), batch_of(grpo).unshared()
    passes = record_passes(model)
    grpo.completion_logprobs(model, batch, 1.0)
    ((shape, kwargs, output),) = passes
    assert kwargs.keys() == {"input_ids", "use_cache", "logits_to_keep"}
    assert output.past_key_values is None
    assert shape == (12, (batch.prompt_mask.sum(1) + batch.completion_mask.sum(1)).max())
    assert output.logits.shape == (12, 7, VOCAB)


def test_a_shared_prompt_runs_once_and_logits_are_computed_of_completions_only():
    model, batch = make_model("llama"), batch_of(grpo)
    passes = record_passes(model)
    grpo.completion_logprobs(model, batch, 1.0)
    (prompts, _, first), (completions, _, others) = passes
    assert (prompts, completions) == ((3, 5), (12, 7))
    assert (first.logits.shape, others.logits.shape) == ((3, 4, VOCAB), (12, 6, VOCAB))


def test_every_tensor_is_made_on_the_device_of_the_inputs():
    """With another default device, where nothing can be computed, the numbers are the same."""
    model, batch = make_model("llama"), batch_of(grpo)
    for rows in (batch, batch.unshared()):
        expected = grpo.completion_logprobs(model, rows, 0.7)
        with torch.device("meta"):
            found = grpo.completion_logprobs(model, rows, 0.7)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ----- Cutting the batch -----


def cut(batch, has_signal=None, logits=10**9, **args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "max_logits", lambda device: logits)
        has_signal = torch.ones(len(batch.prompt_ids), dtype=torch.bool) if has_signal is None else has_signal
        return grpo.split_batch(batch, has_signal, VOCAB, SimpleNamespace(**args))


@pytest.mark.parametrize("num_minibatches", [1, 3, 4])
@pytest.mark.parametrize("budget", [1, 30, 60, 300, 10**6])
@pytest.mark.parametrize("shared", [True, False])
def test_micro_batches_hold_every_completion_once_and_keep_to_the_budget(shared, budget, num_minibatches):
    batch = batch_of(grpo, num_prompts=12, group_size=6, width=9)
    batch = batch if shared else batch.unshared()
    sizes = set()
    # Once by --micro-batch-tokens, once by the logits that may be held.
    for tokens, logits in ((budget, 10**9), (10**9, budget * VOCAB)):
        minibatches = cut(batch, logits=logits, micro_batch_tokens=tokens, num_minibatches=num_minibatches)
        assert [sorted(torch.cat(m).tolist()) for m in minibatches] == [
            rows.tolist() for rows in torch.arange(72).chunk(num_minibatches)
        ]
        for index in chain(*minibatches):
            rows = batch.rows(index)
            sizes.add(len(index))
            assert torch.equal(rows.completion_mask.sum(1), batch.completion_mask[index].sum(1))
            assert len(index) % len(rows.prompt_ids) == 0
            of_each, expected = rows.unshared(), batch.unshared()  # to each completion its own prompt
            for i, j in enumerate(index.tolist()):
                prompt = of_each.prompt_ids[i][of_each.prompt_mask[i]]
                assert torch.equal(prompt, expected.prompt_ids[j][expected.prompt_mask[j]])
            held = rows.completion_ids.numel() + (rows.prompt_ids.numel() if tokens == budget else 0)
            assert len(index) == 1 or held <= budget
    assert budget > 1 or sizes == {1}
    assert budget < 10**6 or max(sizes) == 72 // num_minibatches


def test_completions_of_similar_lengths_share_a_micro_batch():
    batch = batch_of(grpo, num_prompts=1, group_size=6, width=9)
    P, T = batch.prompt_mask.sum(1).max(), batch.completion_mask.sum(1).max()
    # Three completions and their prompt would fit, but not with three copies of its keys and values.
    (parts,) = cut(batch, micro_batch_tokens=float(3 * T + P + 3 * P / 8) - 0.1, num_minibatches=1)
    lengths = [batch.completion_mask[index].sum(1).tolist() for index in parts]
    assert [len(x) for x in lengths] == [2, 2, 2]
    assert [*chain(*lengths)] == sorted(batch.completion_mask.sum(1).tolist())


def test_prompts_without_a_signal_are_left_out_whole():
    batch = batch_of(grpo, num_prompts=4, group_size=3)
    has_signal = torch.tensor([True, False, False, True])
    for each in (batch, batch.unshared()):
        for num_minibatches, expected in ((1, [[0, 1, 2, 9, 10, 11]]), (2, [[0, 1, 2], [9, 10, 11]])):
            minibatches = cut(each, has_signal, micro_batch_tokens=20, num_minibatches=num_minibatches)
            assert [sorted(torch.cat(minibatch).tolist()) for minibatch in minibatches] == expected
        assert cut(each, ~(has_signal | True), micro_batch_tokens=20, num_minibatches=2) == [(), ()]


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_token_that_the_model_masks_out_has_no_part_in_the_entropy(masked):
    """As some models do with the unused ids of a padded vocabulary. Neither the numbers nor the gradients are NaN."""
    model, batch = make_model("llama", torch.float32), batch_of(grpo)
    batch = batch._replace(completion_ids=batch.completion_ids.where(batch.completion_ids != 5, 6))
    masking = lambda _, __, logits: logits.index_fill(-1, torch.tensor(5), masked)
    model.lm_head.register_forward_hook(masking)
    logprobs, entropy = grpo.completion_logprobs(model, batch, 0.7)
    (logprobs.sum() + entropy.sum()).backward()
    assert entropy.isfinite().all()
    assert (entropy[batch.completion_mask] > 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
