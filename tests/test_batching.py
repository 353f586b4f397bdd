# SPDX-License-Identifier: MIT
"""How a batch is cut into micro-batches changes no number. And when a gradient makes no step."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

import grpo
from helpers.runs import SCRIPTS
from helpers.tiny_models import VOCAB, batch_of, make_model, tokens_of, with_copies


@given(
    budget=st.integers(1, 70), by_logits=st.booleans(), group_size=st.sampled_from([1, 6]), prompts=st.integers(1, 3),
    num_minibatches=st.integers(1, 3), processes=st.integers(1, 3), share_prompt=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@example(70, False, 6, 1, 1, 1, True, 0)  # a whole group fits
def test_micro_batches_hold_every_completion_once_the_longest_first_and_keep_to_the_budget(
    budget, by_logits, group_size, prompts, num_minibatches, processes, share_prompt, seed
):
    """What does not fit in memory fails at once. With FSDP all processes must run a layer at the same time. The budget
    is --micro-batch-tokens, or what the largest number of logits allows."""
    batch = batch_of(grpo, prompts * num_minibatches * processes, group_size, width=9, seed=seed)
    copies = with_copies(batch)
    model = SimpleNamespace(config=LlamaConfig(vocab_size=2**26 // budget if by_logits else VOCAB))
    tokens = 10**9 if by_logits else budget
    args = grpo.Args(group_size=group_size, micro_batch_tokens=tokens, share_prompt=share_prompt)
    for minibatch in torch.arange(len(batch.prompt_ids)).roll(1).chunk(num_minibatches):
        own = torch.arange(len(batch.completion_ids)).view(-1, group_size)[minibatch].flatten()
        P, T = (int(mask[own].sum(1).max()) for mask in (copies.prompt_mask, copies.completion_mask))
        # A prompt is shared by a whole group where that fits, or by an equal part of it.
        fitting = [n for n in range(1, group_size + 1) if group_size % n == 0 and P + n * T <= budget]
        share, seen, sizes = max(fitting, default=1) if share_prompt else 1, [], []
        for rank in range(processes):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(grpo, "world", lambda rank=rank: (rank, processes))
                parts = list(grpo.micro_batches(model, batch, minibatch, args))
            for index, part in parts:
                assert len(index) == share * len(part.prompt_ids)
                assert part.prompt_ids.numel() + part.completion_ids.numel() <= budget or len(index) == 1
                assert part.prompt_mask.any(0).all()
                assert part.completion_mask.any(0).all()
                for i in (0, 2):  # its prompts and its completions
                    expected = tokens_of(copies[i][index], copies[i + 1][index])
                    assert tokens_of(*with_copies(part)[i : i + 2]) == expected
            seen.append(torch.cat([index for index, _ in parts]))
            bundles = seen[-1].view(-1, share)
            lengths = copies.prompt_mask[bundles[:, 0]].sum(1) + copies.completion_mask[bundles].sum((1, 2))
            assert (lengths.diff() <= 0).all()
            sizes.append([len(index) for index, _ in parts])
            assert {*sizes[-1][:-1]} <= {share * max(1, budget // (P + share * T))}         # as many as fit
        assert torch.equal(torch.cat(seen).sort().values, own.sort().values)
        assert all(x == sizes[0] for x in sizes)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_score_batch_gives_the_bits_that_the_update_will_see(share_prompt):
    """PPO Eq. 6: the first ratio is exactly 1, because scoring takes the micro-batches of the update."""
    model, batch, minibatches = make_model("gpt2", torch.float32), batch_of(grpo, 8, 4), torch.arange(8).chunk(2)
    score = lambda model, part: grpo.completion_logprobs(model, part, 0.7)[0]
    for budget in (1, 18, 60, 10**6):
        args = grpo.Args(group_size=4, micro_batch_tokens=budget, share_prompt=share_prompt)
        with torch.no_grad():
            scored = grpo.score_batch(score, model, batch, minibatches, args)               # (N, T)
        torch.testing.assert_close(scored, score(model, batch).detach(), atol=1e-5, rtol=0)
        for minibatch in minibatches:
            for index, part in grpo.micro_batches(model, batch, minibatch, args):
                assert torch.equal(score(model, part), scored[index, : part.completion_ids.shape[1]])


@SCRIPTS
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -torch.inf, 1e38])
def test_there_is_no_step_where_the_norm_is_0_or_not_finite(script, bad):
    """Only AdamW's momentum would move the weights; NaN would stay in it for good. The norm of 1e38s overflows."""
    weight = nn.Parameter(torch.ones(100))
    module, optimizer = nn.ParameterList([weight]), torch.optim.AdamW([weight], lr=0.1)
    seen = []
    for gradient in (torch.ones(100), torch.full((100,), bad), torch.ones(100)):
        weight.grad = gradient
        script.optimizer_step(module, optimizer, max_grad_norm=1.0)
        seen.append((weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()))
    assert all(map(torch.equal, seen[0], seen[1]))
    assert (seen[2][0] < seen[1][0]).all()
