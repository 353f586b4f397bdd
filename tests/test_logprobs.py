# SPDX-License-Identifier: MIT
"""Log-probabilities of completions: sharing the prompt, padding and micro-batches change no number."""

from itertools import chain

import pytest
import torch
from torch import Tensor

import grpo
from helpers.tiny_models import NOT_SHARING, SHARING, VOCAB, batch_of, in_parts, make_model, with_copies


def one_by_one(model, batch, temperature):
    """The plainest way: every completion alone behind its prompt, without padding, through the model's own forward."""
    logprobs = torch.zeros(batch.completion_ids.shape, dtype=torch.float64)
    batch = with_copies(batch)
    for i, ids in enumerate(batch.completion_ids):
        prompt, tokens = batch.prompt_ids[i][batch.prompt_mask[i]], ids[batch.completion_mask[i]]
        logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1)
        logprobs[i, : len(tokens)] = logp.gather(1, tokens[:, None])[:, 0]
    return logprobs


def token_weights(batch) -> Tensor:
    """A weight of its own for every token, (N, T), to take gradients of a sum."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch.completion_ids.shape, dtype=torch.float64, generator=generator)


def gradient(model, *scalars) -> Tensor:
    """Of their sum, in all parameters, flat."""
    model.zero_grad()
    for scalar in scalars:
        scalar.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", SHARING)
def test_however_many_completions_share_a_prompt_numbers_and_gradients_are_those_of_completions_alone(family):
    """`predict_shared` and the plain `predict_completions`, in parts of 12 completions, which are all, to 1."""
    # These take the softmax of their attention in float32, and most norms compute in float32, whatever the weights are.
    single = family in ("gemma2", "gpt_neo")
    model, batch = make_model(family, torch.float32 if single else torch.float64, **SHARING[family]), batch_of(grpo)
    tolerance = 1e-4 if single else 1e-10
    gradient_tolerance = 1e-4 if single else 1e-12 if family in ("gpt2", "gpt_neox", "opt") else 1e-6
    alone, weights = one_by_one(model, batch, 0.7), token_weights(batch)
    expected = gradient(model, (alone * weights).sum())
    score = lambda part: grpo.completion_logprobs(model, part, 0.7)[0]
    for size, share_prompt in ((12, True), (4, True), (2, True), (1, True), (12, False), (5, False)):
        found = in_parts(grpo, score, batch, size, share_prompt)
        torch.testing.assert_close(found.double(), alone, atol=tolerance, rtol=0)
        assert (gradient(model, (found * weights).sum()) - expected).norm() < gradient_tolerance * expected.norm()


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize("family", NOT_SHARING)
def test_completions_with_a_prompt_of_their_own_are_right_where_a_prompt_cannot_be_shared(family):
    model, batch = make_model(family, torch.float32, **NOT_SHARING[family]), batch_of(grpo, width=12)
    with torch.no_grad():
        alone = one_by_one(model, batch, 1.0)
        plain, _ = grpo.completion_logprobs(model, with_copies(batch), 1.0)
        torch.testing.assert_close(plain.double(), alone, atol=1e-4, rtol=0)


def test_what_stands_in_the_padding_changes_no_number():
    model, batch = make_model("llama"), batch_of(grpo)
    for rows in (batch, with_copies(batch)):
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


def test_entropy_is_that_of_the_distribution_and_has_a_gradient_only_if_asked():
    """Without one, its graph holds no memory while the loss is taken backward."""
    model, batch = make_model("llama"), batch_of(grpo, num_prompts=1, group_size=2)
    logprobs, entropy = grpo.completion_logprobs(model, batch, temperature=0.7)
    # The first token of the first completion: the distribution after the prompt.
    logp = (model(batch.prompt_ids[batch.prompt_mask][None]).logits[0, -1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(entropy[0, 0], -(logp.exp() * logp).sum())
    assert (entropy[~batch.completion_mask] == 0).all()
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    _, again = grpo.completion_logprobs(model, batch, temperature=0.7, entropy_gradient=True)
    assert torch.equal(again, entropy)
    assert gradient(model, again.sum()).norm() > 0


def test_token_entropy_in_pieces_is_the_plain_sum():
    """-(p log p).sum(-1), and its gradient; also where the rows are more than one piece, or one row is."""
    for shape in ((2, 3, 5), (5, 300, 1000), (1, 2, 2**20 + 1)):
        logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weights = torch.linspace(-1, 1, shape[0] * shape[1], dtype=torch.float64).view(shape[:2])
        logp = logits.log_softmax(-1)
        found, expected = grpo.token_entropy(logp), -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad((x * weights).sum(), logits, retain_graph=True)[0] for x in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_the_gradient_of_the_entropy_is_finite_where_a_probability_is_0():
    model = make_model("llama", torch.float32)
    model.lm_head.weight.data *= 400  # probabilities below the smallest number of float32
    batch = batch_of(grpo)
    _, entropy = grpo.completion_logprobs(model, batch, temperature=0.1, entropy_gradient=True)
    assert entropy.isfinite().all()
    assert gradient(model, entropy.sum()).isfinite().all()
    with torch.no_grad():
        logits = grpo.predict_completions(model, batch) / 0.1
        assert (logits.softmax(-1) == 0).any(), "no probability is 0: this shows nothing"


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_token_that_the_model_masks_out_has_no_part_in_the_entropy(masked):
    """As some models do with the unused ids of a padded vocabulary. Neither the numbers nor the gradients are NaN."""
    model, batch = make_model("llama", torch.float32), batch_of(grpo)
    batch = batch._replace(completion_ids=batch.completion_ids.where(batch.completion_ids != 5, 6))
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor(5), masked))
    logprobs, entropy = grpo.completion_logprobs(model, batch, 0.7, entropy_gradient=True)
    assert entropy.isfinite().all()
    assert (entropy[batch.completion_mask] > 0).all()
    assert gradient(model, logprobs.sum() + entropy.sum()).isfinite().all()


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
    model, batch = make_model("llama"), with_copies(batch_of(grpo))
    passes = record_passes(model)
    grpo.completion_logprobs(model, batch, 1.0)
    ((shape, kwargs, output),) = passes
    assert kwargs.keys() == {"input_ids", "use_cache", "logits_to_keep"}
    assert output.cache is None
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
    for rows in (batch, with_copies(batch)):
        expected = grpo.completion_logprobs(model, rows, 0.7)
        with torch.device("meta"):
            found = grpo.completion_logprobs(model, rows, 0.7)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ----- Cutting the batch -----


def cut(batch, minibatch: Tensor, logits: float = 10**9, rank: int = 0, processes: int = 1, **args) -> tuple:
    """The indices of the micro-batches of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "max_logits", lambda device: logits)
        patch.setattr(grpo, "world", lambda: (rank, processes))
        return grpo.split_minibatch(make_model("llama"), batch, minibatch, grpo.Args(**args))


def lengths_of(batch, indices: list[Tensor]) -> list[list[int]]:
    return [batch.completion_mask[index].sum(1).tolist() for index in indices]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_taken_completions_keep_their_prompts_and_lose_nothing_but_padding(share_prompt):
    batch = batch_of(grpo, num_prompts=4, group_size=3, width=9)
    batch = batch._replace(advantages=token_weights(batch))
    copies = with_copies(batch)
    whole, part, any_number = torch.tensor([9, 11, 10, 0, 1, 2]), torch.tensor([5, 3]), torch.tensor([7, 0, 4, 11])
    for index in (whole, part, *([] if share_prompt else [any_number])):
        taken = grpo.take_completions(batch, index, share_prompt)
        assert len(taken.prompt_ids) == (max(1, len(index) // 3) if share_prompt else len(index))
        assert taken.prompt_mask.any(0).all()
        assert taken.completion_mask.any(0).all()
        assert taken.weights is None
        of_each = with_copies(taken)
        for mask, names in (("prompt_mask", ["prompt_ids"]), ("completion_mask", ["completion_ids", "advantages"])):
            for i, j in enumerate(index.tolist()):
                of_taken, of_batch = getattr(of_each, mask)[i], getattr(copies, mask)[j]
                for name in names:
                    assert torch.equal(getattr(of_each, name)[i][of_taken], getattr(copies, name)[j][of_batch])


@pytest.mark.parametrize("num_minibatches", [1, 3, 4])
@pytest.mark.parametrize("budget", [1, 30, 60, 300, 10**6])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_micro_batches_hold_every_completion_once_and_keep_to_the_budget(share_prompt, budget, num_minibatches):
    batch, sizes = batch_of(grpo, num_prompts=12, group_size=6, width=9), set()
    of_each_prompt = torch.arange(72).view(12, 6)
    # Once by --micro-batch-tokens, once by the logits that may be held.
    for tokens, logits in ((budget, 10**9), (10**9, budget * VOCAB)):
        for minibatch in torch.arange(12).roll(5).chunk(num_minibatches):
            indices = cut(batch, minibatch, logits, micro_batch_tokens=tokens, share_prompt=share_prompt)
            assert torch.equal(torch.cat(indices).sort().values, of_each_prompt[minibatch].flatten().sort().values)
            for index in indices:
                part = grpo.take_completions(batch, index, share_prompt)
                sizes.add(len(index))
                # A prompt that is shared is that of all its completions.
                groups = (index // 6).view(len(part.prompt_ids), -1)
                assert (groups == groups[:, :1]).all()
                held = part.completion_ids.numel() + (part.prompt_ids.numel() if tokens == budget else 0)
                assert len(index) == 1 or held <= budget
    assert budget > 1 or sizes == {1}
    assert budget < 10**6 or max(sizes) == 72 // num_minibatches


def test_completions_of_similar_lengths_share_a_micro_batch():
    batch = batch_of(grpo, num_prompts=1, group_size=6, width=9)
    P, T = batch.prompt_mask.sum(1).max(), batch.completion_mask.sum(1).max()
    # Three completions and their prompt would fit, but not with three copies of its keys and values.
    parts = cut(batch, torch.arange(1), micro_batch_tokens=float(3 * T + P + 3 * P / 8) - 0.1)
    assert [len(index) for index in parts] == [2, 2, 2]
    assert [*chain(*lengths_of(batch, parts))] == sorted(batch.completion_mask.sum(1).tolist())


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_longest_micro_batches_come_first(share_prompt):
    """So that one that does not fit in memory fails at once, and the processes get similar ones."""
    batch = batch_of(grpo, num_prompts=8, group_size=2, width=30)
    parts = cut(batch, torch.arange(8), micro_batch_tokens=80, share_prompt=share_prompt)
    totals = batch.prompt_mask.sum(1).repeat_interleave(2) + batch.completion_mask.sum(1)
    if share_prompt:
        totals = batch.prompt_mask.sum(1) + batch.completion_mask.sum(1).view(8, 2).sum(1)
        parts = [index[::2] // 2 for index in parts]
    assert len(parts) > 2
    assert torch.equal(totals[torch.cat(parts)], totals.sort(descending=True).values)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_processes_divide_a_minibatch_in_as_many_parts_of_the_same_sizes(share_prompt, processes):
    """With FSDP all of them must run a layer at the same time."""
    batch, minibatch = batch_of(grpo, num_prompts=12, group_size=6, width=9), torch.arange(4, 12)
    for budget in (1, 50, 100, 10**6):
        args = dict(micro_batch_tokens=budget, share_prompt=share_prompt)
        parts = [cut(batch, minibatch, rank=rank, processes=processes, **args) for rank in range(processes)]
        assert torch.cat([*chain(*parts)]).sort().values.tolist() == [*range(24, 72)]
        assert all([len(index) for index in of_one] == [len(index) for index in parts[0]] for of_one in parts)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_micro_batches_add_up_to_one_pass_over_the_minibatch_in_numbers_and_gradients(
    share_prompt, processes, monkeypatch
):
    """What `micro_batches` and `score_batch` stand for; the second minibatch of two, over all processes."""
    model, batch = make_model("gpt2", **SHARING["gpt2"]), batch_of(grpo, num_prompts=8, group_size=4)
    batch = batch._replace(weights=token_weights(batch))
    minibatches, score = torch.arange(8).chunk(2), lambda model, part: grpo.completion_logprobs(model, part, 0.7)[0]
    expected, of_second = score(model, batch), slice(16, 32)
    expected_gradient = gradient(model, (expected * batch.weights)[of_second].sum())
    for budget in (1, 30, 60, 10**6):
        args, scored, sums = grpo.Args(micro_batch_tokens=budget, share_prompt=share_prompt), 0, []
        for rank in range(processes):
            monkeypatch.setattr(grpo, "world", lambda rank=rank: (rank, processes))
            with torch.no_grad():
                scored += grpo.score_batch(lambda *x: score(*x).float(), model, batch, minibatches, args)  # (N, T)
            for part in grpo.micro_batches(model, batch, minibatches[1], args):
                sums.append((score(model, part) * part.weights).sum())
        torch.testing.assert_close(scored, expected.detach().float())
        assert (gradient(model, *sums) - expected_gradient).norm() < 1e-12 * expected_gradient.norm()


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("budget", [1, 30, 10**6])
def test_the_update_starts_from_the_very_numbers_that_were_scored(share_prompt, budget):
    """PPO Eq. 6: the first ratio is exactly 1, because the micro-batches of scoring are those of the update."""
    model, batch = make_model("llama", torch.float32), batch_of(grpo, num_prompts=4)
    args, minibatches = grpo.Args(micro_batch_tokens=budget, share_prompt=share_prompt), torch.arange(4).chunk(2)
    score = lambda model, part: grpo.completion_logprobs(model, part, 0.7)[0]
    batch = batch._replace(old_logprobs=grpo.score_batch(score, model, batch, minibatches, args))
    parts = [part for minibatch in minibatches for part in grpo.micro_batches(model, batch, minibatch, args)]
    assert sum(len(part.completion_ids) for part in parts) == 16
    assert all(torch.equal(score(model, part), part.old_logprobs) for part in parts)
