# SPDX-License-Identifier: MIT
"""What the models say of a completion's tokens: their log-probabilities, the entropies before them, and the values of
the states before them. Shared prompts and padding change no number."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import grpo
import ppo
from helpers.tiny_models import NOT_SHARING, SHARING, batch_of, in_parts, make_model, trained_value_model, with_copies

# OPT-350m has states that are narrower than the model that computes them.
PROJECTED = {"opt with a projection": dict(word_embed_proj_dim=16)}
TEMPERATURE = 0.7


def plain_logprobs(policy, text: Tensor, start: int) -> Tensor:
    """Of one text, without padding, through the model's own forward: of the tokens from `start` on, (T,)."""
    logp = (policy(text[None]).logits[0, start - 1 : -1] / TEMPERATURE).log_softmax(-1)
    return logp.gather(1, text[start:, None])[:, 0]


def plain_entropy(policy, text: Tensor, start: int) -> Tensor:
    logp = (policy(text[None]).logits[0, start - 1 : -1] / TEMPERATURE).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def plain_values(value_model, text: Tensor, start: int) -> Tensor:
    """A token's value is that of the state before it."""
    states = value_model.backbone(text[None], use_cache=False).last_hidden_state[0, start - 1 : -1]
    return states @ value_model.head.weight[0] + value_model.head.bias[0]


# A script, what it gives for the tokens of a batch, (N, T), and the plainest way to it.
SCORES = {
    "logprobs": (grpo, lambda policy, batch: grpo.completion_logprobs(policy, batch, TEMPERATURE)[0], plain_logprobs),
    "entropy": (grpo, lambda policy, batch: grpo.completion_logprobs(policy, batch, TEMPERATURE, True)[1],
                plain_entropy),
    "values": (ppo, ppo.completion_values, plain_values),
}  # fmt: skip


def model_for(what: str, family: str = "llama", dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    policy = make_model(family.split()[0], dtype, **PROJECTED.get(family, {}))
    return trained_value_model(policy) if what == "values" else policy


def gradient(model, scalar: Tensor) -> Tensor:
    """In all parameters, flat."""
    model.zero_grad()
    scalar.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore")  # of families whose fast kernels are not installed
@pytest.mark.parametrize(
    ("what", "family"),
    [*itertools.product(["logprobs", "values"], [*SHARING, *NOT_SHARING, *PROJECTED]), ("entropy", "llama")],
)
def test_numbers_and_gradients_are_those_of_completions_alone(what, family):
    """However many share a prompt: `predict_shared` and the plain `predict_completions`, for all 12 at once, to 1."""
    # These take the softmax of their attention in float32, and most norms compute in float32, whatever the weights are.
    single = family in ("gemma2", "gpt_neo", *NOT_SHARING)
    tolerance = 1e-4 if single else 1e-10
    gradient_tolerance = 1e-4 if single else 1e-12 if family in ("gpt2", "gpt_neox", "opt") else 1e-6
    script, score, plain_score = SCORES[what]
    model, batch = model_for(what, family, torch.float32 if single else torch.float64), batch_of(script, width=9)
    alone = torch.zeros(batch.completion_ids.shape, dtype=torch.float64)
    prompts = with_copies(batch)
    for i, counted in enumerate(batch.completion_mask):
        prompt = prompts.prompt_ids[i][prompts.prompt_mask[i]]
        text = torch.cat([prompt, batch.completion_ids[i][counted]])
        alone[i, : counted.sum()] = plain_score(model, text, len(prompt))
    weights = torch.linspace(-1, 1, alone.numel(), dtype=torch.float64).view_as(alone)
    expected = gradient(model, (alone * weights).sum())
    shared = [(size, True) for size in (12, 4, 2, 1) if family not in NOT_SHARING]
    for size, share_prompt in (*shared, (12, False), (5, False)):
        found = in_parts(script, lambda part: score(model, part), batch, size, share_prompt)
        torch.testing.assert_close(found.double(), alone, atol=tolerance, rtol=0)
        assert (gradient(model, (found * weights).sum()) - expected).norm() < gradient_tolerance * expected.norm()


@pytest.mark.parametrize("what", SCORES)
def test_numbers_depend_neither_on_the_padding_nor_on_the_default_device(what):
    """Other ids and more columns there; and a device where nothing can be computed. The padding has exactly 0."""
    script, score, _ = SCORES[what]
    model, batch = model_for(what), batch_of(script)
    for rows in (batch, with_copies(batch)):
        expected = score(model, rows)
        wider = rows._replace(
            prompt_ids=rows.prompt_ids.where(rows.prompt_mask, 7),
            completion_ids=pad(rows.completion_ids.where(rows.completion_mask, 9), (0, 3), value=9),
            completion_mask=pad(rows.completion_mask, (0, 3)),
        )
        found = score(model, wider)
        assert torch.equal(found[:, :-3], expected)
        assert (found[~wider.completion_mask] == 0).all()
        with torch.device("meta"):
            assert torch.equal(score(model, rows), expected)


def test_the_entropy_has_a_gradient_only_if_asked():
    """Without one, its graph holds no memory while the loss is taken backward."""
    model, batch = make_model("llama"), batch_of(grpo)
    logprobs, entropy = grpo.completion_logprobs(model, batch, temperature=0.7)
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    _, again = grpo.completion_logprobs(model, batch, temperature=0.7, entropy_gradient=True)
    assert torch.equal(again, entropy)
    assert again.requires_grad


@pytest.mark.parametrize("shape", [(2, 3, 5), (5, 300, 1000), (1, 2, 2**20 + 1)])
def test_token_entropy_in_pieces_is_the_plain_sum(shape):
    """-(p log p).sum(-1), and its gradient; also where the rows are more than one piece, or one row is."""
    logits = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.linspace(-1, 1, shape[0] * shape[1], dtype=torch.float64).view(shape[:2])
    logp = logits.log_softmax(-1)
    found, expected = grpo.token_entropy(logp), -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((x * weights).sum(), logits, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


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




def test_prompts_run_once_and_only_completions_have_logits():
    """A completion with a prompt of its own is one row without mask and positions, for kernels that take none."""
    model, batch, passes = make_model("llama"), batch_of(grpo), []
    note = lambda _, __, inputs, output: passes.append((inputs, output))
    model.register_forward_hook(note, with_kwargs=True)
    grpo.completion_logprobs(model, with_copies(batch), 1.0)
    ((inputs, output),) = passes
    assert inputs.keys() == {"input_ids", "use_cache", "logits_to_keep"}
    prompt_lengths = batch.prompt_mask.sum(1).repeat_interleave(4)
    assert inputs["input_ids"].shape == (12, (prompt_lengths + batch.completion_mask.sum(1)).max())
    assert output.cache is None
    assert output.logits.shape == (12, 7, model.config.vocab_size)
    passes.clear()
    grpo.completion_logprobs(model, batch, 1.0)
    assert [inputs["input_ids"].shape for inputs, _ in passes] == [(3, 5), (12, 7)]
    assert [output.logits.shape[:2] for _, output in passes] == [(3, 4), (12, 6)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "opt"])
def test_the_value_model_starts_as_a_copy_of_the_policy_at_exactly_zero_and_shares_nothing_with_it(family):
    """Ziegler et al.: the head is initialised to zero. Only its gradient is not zero, and so it learns. Training one
    model does not change the other, be the output head tied to the embeddings (gpt2) or not (llama)."""
    policy = make_model(family, torch.float32)
    with torch.device("meta"):
        value_model = ppo.ValueModel(policy)  # on the device of the policy
    copied, original = value_model.backbone.state_dict(), policy.base_model.state_dict()
    assert copied.keys() == original.keys()
    assert all(torch.equal(copied[name], value) for name, value in original.items())
    memory = [{x.untyped_storage().data_ptr() for x in (*m.parameters(), *m.buffers())} for m in (policy, value_model)]
    assert memory[0].isdisjoint(memory[1])
    assert value_model.config is policy.config
    for batch in (batch_of(ppo), with_copies(batch_of(ppo))):
        value_model.zero_grad()
        values = ppo.completion_values(value_model, batch)
        assert torch.equal(values, torch.zeros(batch.completion_ids.shape))
        values.sum().backward()
        assert value_model.head.weight.grad.ne(0).any()
        assert value_model.head.bias.grad == batch.completion_mask.sum()
        assert all(parameter.grad is not None for parameter in value_model.parameters())
