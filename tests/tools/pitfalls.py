# SPDX-License-Identifier: MIT
"""Known ways to get PPO and GRPO on language models wrong, put into the source one at a time: a test must fail.

    .venv/bin/python tests/tools/pitfalls.py                    all of them, in twenty minutes
    .venv/bin/python tests/tools/pitfalls.py -k temperature     those with this word in their row

Each row of the table replaces a text of one function by another and names the test that must fail then. The text must
stand in the function exactly once; tests/test_mutants.py says so as soon as a line is changed. First all of these tests
must pass. Works in a temporary folder, prints one line a bug, and fails if one goes unnoticed. What stands word for
word in both scripts (test_twins.py) is changed in grpo.py alone.
"""

import argparse
import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Pitfall(NamedTuple):
    """A bug: `new` instead of `old` in `function`, which may be "Class.method"; `test` as pytest names it."""

    what: str
    file: str
    function: str
    old: str
    new: str
    test: str


LOSS = "-(objective * weights).sum()"
TABLE = [  # of Pitfalls, with {} for the name of the script where both scripts have the bug
    # ----- The end token, the padding and the prompts -----
    ("the end token is not in the mask: the policy never learns to stop", "grpo.py", "generate_completions",
     "is_end.cumsum(1) - is_end == 0", "is_end.cumsum(1) == 0",
     "tests/test_sampling.py::test_the_decoder_samples_what_full_forward_passes_sample[llama-0.7]"),
    ("end tokens inside a chat are masked when a completion is scored, not when it is sampled",
     "grpo.py", "predict_completions",
     "model(input_ids=ids,", "model(input_ids=ids, attention_mask=(ids != 0).long(),",
     "tests/test_logprobs.py::test_numbers_and_gradients_are_those_of_completions_alone[logprobs-llama]"),
    ("end tokens inside a chat are masked when a shared prompt is scored", "grpo.py", "predict_shared",
     "batch.prompt_mask.long()", "(batch.prompt_ids != 0).long()",
     "tests/test_logprobs.py::test_numbers_and_gradients_are_those_of_completions_alone[logprobs-llama]"),
    ("the mask of a prompt is where its ids are not the padding's", "grpo.py", "pad_prompts",
     "torch.ones(len(ids), dtype=torch.bool) for", "torch.tensor(ids) != 0 for",
     "tests/test_data_and_models.py::test_prompts_are_padded_on_the_left"),
    ("positions count the padding on the left in sampling", "grpo.py", "Decoder.run_prompts",
     "(self.prompt_mask.cumsum(1) - 1).clamp(min=0)", "torch.ones_like(self.prompt_ids).cumsum(1) - 1",
     "tests/test_sampling.py::test_the_decoder_samples_what_full_forward_passes_sample[gpt2-0.7]"),
    ("positions count the padding on the left after the first token", "grpo.py", "Decoder.__init__",
     "prompt_mask.sum(1)[self.prompts]", "prompt_mask.shape[1] + 0 * self.prompts",
     "tests/test_sampling.py::test_the_decoder_samples_what_full_forward_passes_sample[gpt2-0.7]"),
    ("positions count the padding on the left of a shared prompt", "grpo.py", "predict_shared",
     "(batch.prompt_mask.cumsum(1) - 1).clamp(min=0)", "torch.ones_like(batch.prompt_ids).cumsum(1) - 1",
     "tests/test_logprobs.py::test_numbers_and_gradients_are_those_of_completions_alone[logprobs-gpt2]"),
    ("positions of completions count the padding on the left of their shared prompt", "grpo.py", "predict_shared",
     "prompt_mask.sum(1, keepdim=True) + t", "prompt_mask.shape[1] + 0 * prompt_mask[:, :1] + t",
     "tests/test_logprobs.py::test_numbers_and_gradients_are_those_of_completions_alone[logprobs-gpt2]"),
    ("a rendered chat template is tokenised again, with a second BOS", "grpo.py", "encode_prompt",
     "return tokenizer.apply_chat_template(",
     "return tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids; tokenizer.apply_chat_template(",
     "tests/test_data_and_models.py::test_a_prompt_has_one_bos_and_asks_for_the_assistant_or_continues_it"),
    ("completions are decoded and encoded again before they are trained", "grpo.py", "rollout",
     "    problems = [",
     "    for i, n in enumerate(mask.sum(1)):\n"
     "        again = tokenizer(tokenizer.decode(ids[i, :n]), add_special_tokens=False).input_ids\n"
     "        ids[i, : len(again)] = torch.tensor(again)\n"
     "        mask[i, len(again) :] = False\n"
     "    problems = [",
     "tests/test_training.py::test_train_trains_the_very_ids_that_were_sampled[grpo]"),
    # ----- One policy samples and is trained -----
    ("log-probabilities are not divided by the temperature of sampling", "grpo.py", "completion_logprobs",
     "else logits / temperature", "else logits",
     "tests/test_logprobs.py::test_numbers_and_gradients_are_those_of_completions_alone[logprobs-llama]"),
    ("sampling ignores the temperature", "grpo.py", "sample_tokens",
     "/ (temperature or 1.0)", "/ 1.0",
     "tests/test_sampling.py::test_tokens_are_drawn_from_softmax_of_logits_over_temperature"),
    ("the samples of a step have another temperature than its log-probabilities", "grpo.py", "rollout",
     "args.max_new_tokens, args.temperature,", "args.max_new_tokens, 1.0,",
     "tests/test_training.py::test_train_has_a_ratio_of_exactly_1_for_as_long_as_the_policy_stays[grpo]"),
    ("the old log-probabilities have another temperature than the new ones", "{}.py", "train",
     "part, args.temperature)[0]", "part, 1.0)[0]",
     "tests/test_training.py::test_train_has_a_ratio_of_exactly_1_for_as_long_as_the_policy_stays[{}]"),
    ("top-k of generation_config.json in sampling, the whole softmax in training", "grpo.py", "generate_completions",
     "        ids[rows, t], logprobs[rows, t] = ",
     "        top_k = policy.generation_config.top_k or logits.shape[1]\n"
     "        logits = logits.where(logits >= logits.topk(top_k)[0][:, -1:], -torch.inf)\n"
     "        ids[rows, t], logprobs[rows, t] = ",
     "tests/test_sampling.py::test_completions_have_the_probabilities_of_full_forward_passes[llama-1.0]"),
    ("old log-probabilities come from other shapes than the new ones", "grpo.py", "score_batch",
     "score(model, part)", "score(model, take_completions(batch, index, 1))",
     "tests/test_batching.py::test_score_batch_gives_the_bits_that_the_update_will_see[True]"),
    ("the sampler's log-probabilities are the old ones", "grpo.py", "train",
     "else part.old_logprobs", "else part.sampler_logprobs",
     "tests/test_training.py::test_train_has_a_ratio_of_exactly_1_for_as_long_as_the_policy_stays[grpo]"),
    ("the sampler's log-probabilities are the old ones", "ppo.py", "train",
     "logprobs, part.old_logprobs,", "logprobs, part.sampler_logprobs,",
     "tests/test_training.py::test_train_has_a_ratio_of_exactly_1_for_as_long_as_the_policy_stays[ppo]"),
    ("dropout is on", "grpo.py", "load_policy",
     "policy.to(device).eval()", "policy.to(device).train()",
     "tests/test_training.py::test_load_policy_turns_dropout_off_and_it_stays_off[grpo]"),
    ("dropout is switched on where training begins", "{}.py", "train",
     "    autocast = torch.autocast(", "    policy.train()\n    autocast = torch.autocast(",
     "tests/test_training.py::test_load_policy_turns_dropout_off_and_it_stays_off[{}]"),
    # ----- Numbers -----
    ("the log-softmax of scoring is in bfloat16", "grpo.py", "completion_logprobs",
     "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype",
     "tests/test_logprobs.py::test_over_a_bfloat16_model_the_log_softmax_is_in_float32"),
    ("the log-softmax of sampling is in bfloat16", "grpo.py", "sample_tokens",
     "logits.float() /", "logits /",
     "tests/test_sampling.py::test_sample_tokens_takes_the_log_softmax_in_float32"),
    ("the weights are bfloat16: a small update is rounded away", "grpo.py", "load_policy",
     "policy.to(device)", "policy.to(device, torch.bfloat16)",
     "tests/test_training.py::test_load_policy_keeps_weights_that_a_step_of_one_millionth_moves[grpo]"),
    ("the sampler that is rounded to bfloat16 is the policy itself", "grpo.py", "make_sampler",
     "copy.deepcopy(policy).requires_grad_(False)", "policy",
     "tests/test_training.py::test_load_policy_keeps_weights_that_a_step_of_one_millionth_moves[grpo]"),
    ("k3 is negative by rounding", "kl.py", "kl_estimate",
     "torch.expm1(log_r) - log_r", "torch.exp(log_r) - log_r - 1",
     "tests/test_kl.py::test_k3_is_never_negative_near_zero_in_float32"),
    ("the KL from the old policy is negative by rounding", "ppo.py", "policy_loss",
     "torch.expm1(log_ratio) - log_ratio", "torch.exp(log_ratio) - log_ratio - 1",
     "tests/test_losses.py::test_approx_kl_is_never_negative_near_zero_in_float32[ppo]"),
    ("k3 is clamped: a policy that is far off feels nothing", "kl.py", "kl_estimate",
     "torch.expm1(log_r) - log_r", "(torch.expm1(log_r) - log_r).clamp(-10, 10)",
     "tests/test_kl.py::test_kl_estimate_pulls_a_policy_back_from_however_far"),
    ("the log-ratio of the KL is clamped: a policy that is far off feels nothing", "kl.py", "kl_estimate",
     "log_r = ref_logprobs - logprobs", "log_r = (ref_logprobs - logprobs).clamp(-20, 20)",
     "tests/test_kl.py::test_kl_estimate_pulls_a_policy_back_from_however_far"),
    ("an overflow of the ratio in the padding reaches the gradient", "grpo.py", "grpo_loss",
     "(logprobs - old_logprobs).where(completion_mask, 0.0)", "(logprobs - old_logprobs)",
     "tests/test_losses.py::test_padding_garbage_changes_no_loss_and_no_gradient[grpo]"),
    ("an overflow of the ratio in the padding reaches the gradient", "ppo.py", "policy_loss",
     "(logprobs - old_logprobs).where(completion_mask, 0.0)", "(logprobs - old_logprobs)",
     "tests/test_losses.py::test_padding_garbage_changes_no_loss_and_no_gradient[ppo]"),
    ("an overflow of the KL in the padding reaches the gradient", "grpo.py", "grpo_loss",
     "logprobs.where(completion_mask, 0.0), ref_logprobs.where(completion_mask, 0.0)", "logprobs, ref_logprobs",
     "tests/test_losses.py::test_padding_garbage_changes_no_loss_and_no_gradient[grpo]"),
    # ----- Denominators and groups -----
    ("the loss has a denominator of its own in each micro-batch", "grpo.py", "grpo_loss",
     LOSS, f"{LOSS} / weights.sum()",
     "tests/test_properties.py::test_loss_of_a_batch_is_the_sum_of_its_micro_batches[grpo_loss_without_kl]"),
    ("the loss has a denominator of its own in each micro-batch", "ppo.py", "policy_loss",
     LOSS, f"{LOSS} / weights.sum()",
     "tests/test_properties.py::test_loss_of_a_batch_is_the_sum_of_its_micro_batches[policy_loss]"),
    ("the value loss has a denominator of its own in each micro-batch", "ppo.py", "value_loss",
     "* weights).sum()", "* weights).sum() / weights.sum()",
     "tests/test_properties.py::test_loss_of_a_batch_is_the_sum_of_its_micro_batches[value_loss]"),
    ("the weights of the tokens are those of their micro-batch", "{}.py", "train",
     "part.advantages, part.completion_mask, part.weights,",
     "part.advantages, part.completion_mask, part.weights / part.weights.sum(),",
     "tests/test_wiring.py::test_train_goes_where_the_plain_loops_go[{} --num-minibatches 1]"),
    ("a minibatch has the weights of the whole batch", "{}.py", "train",
     "args.num_minibatches * loss_weights(", "loss_weights(",
     "tests/test_wiring.py::test_train_goes_where_the_plain_loops_go[{} no flag]"),
    ("gradients are averaged over the processes, although their losses are parts of one", "grpo.py", "shard",
     "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)",
     "tests/test_processes.py::test_train_in_several_processes_has_the_gradients_of_one[several-2-grpo]"),
    ("the length of a completion counts its padding", "grpo.py", "loss_weights",
     "mask.sum(-1, keepdim=True).clamp(min=1)", "mask.shape[-1]",
     "tests/test_losses.py::test_weights_are_those_of_the_three_averages"),
    ("the number of tokens counts the padding", "grpo.py", "loss_weights",
     "mask.sum().clamp(min=1)", "mask.numel()",
     "tests/test_losses.py::test_weights_are_those_of_the_three_averages"),
    ("completions come to a prompt of another group", "grpo.py", "take_completions",
     "index[::share] // group_size", "index[::share] % len(batch.prompt_ids)",
     "tests/test_batching.py::test_score_batch_gives_the_bits_that_the_update_will_see[True]"),
    ("groups are numbered anew in a part of the batch", "grpo.py", "micro_batches",
     ".view(-1, args.group_size)[minibatch]", ".view(-1, args.group_size)[: len(minibatch)]",
     "tests/test_batching.py::"
     "test_micro_batches_hold_every_completion_once_the_longest_first_and_keep_to_the_budget"),
    ("a group of a micro-batch spans several prompts", "grpo.py", "micro_batches",
     ".view(-1, args.group_size)[minibatch]", ".view(args.group_size, -1).T[minibatch]",
     "tests/test_batching.py::"
     "test_micro_batches_hold_every_completion_once_the_longest_first_and_keep_to_the_budget"),
    ("completions are sampled for another prompt than that of their group", "grpo.py", "Decoder.__init__",
     ".repeat_interleave(group_size)", ".repeat(group_size)",
     "tests/test_sampling.py::test_the_decoder_samples_what_full_forward_passes_sample[llama-0.7]"),
    ("a group of the advantage spans several prompts", "grpo.py", "train",
     "groups = rewards.view(-1, args.group_size)", "groups = rewards.view(args.group_size, -1).T",
     "tests/test_wiring.py::test_train_goes_where_the_plain_loops_go[grpo no flag]"),
    ("completions are rewarded with the problem of another prompt", "grpo.py", "rollout",
     "for _, problem in own_share(pairs) for _ in range(args.group_size)",
     "for _ in range(args.group_size) for _, problem in own_share(pairs)",
     "tests/test_training.py::test_train_rewards_every_completion_with_the_problem_of_its_prompt[grpo]"),
    ("the std is another one than is said", "advantage.py", "group_advantages",
     "rewards.std(dim=1, keepdim=True)", "rewards.std(dim=1, keepdim=True, correction=0)",
     "tests/test_advantage.py::test_group_advantages_are_rewards_less_their_mean_over_the_sample_std"),
    ("a group of one has an advantage", "advantage.py", "group_advantages",
     "rewards.shape[1] < 2", "rewards.shape[1] < 1",
     "tests/test_advantage.py::test_wrong_shapes_types_names_and_numbers_are_refused"),
    ("groups of one are sampled", "grpo.py", "check_args",
     "not value >= LEAST[name]", 'not value >= (LEAST | {"group_size": 1})[name]',
     "tests/test_arguments.py::"
     "test_flags_that_cannot_work_are_refused_before_anything_is_loaded[grpo --group-size 1]"),
    ("one completion a step has a std of NaN", "ppo.py", "train",
     "rewards.std(correction=int(len(rewards) > 1))", "rewards.std()",
     "tests/test_training.py::test_train_goes_on_where_there_is_nothing_to_learn[ppo, one completion]"),
    # ----- Nothing to learn from -----
    ("an empty completion is a division by zero", "grpo.py", "loss_weights",
     "mask.sum(-1, keepdim=True).clamp(min=1)", "mask.sum(-1, keepdim=True)",
     "tests/test_losses.py::test_weights_are_those_of_the_three_averages"),
    ("a batch without a token is a division by zero", "grpo.py", "loss_weights",
     "mask.sum().clamp(min=1)", "mask.sum()",
     "tests/test_losses.py::test_weights_are_those_of_the_three_averages"),
    ("an empty completion has a ratio of NaN", "grpo.py", "grpo_loss",
     "completion_mask.sum(-1, keepdim=True).clamp(min=1)", "completion_mask.sum(-1, keepdim=True)",
     "tests/test_losses.py::test_the_sequence_ratio_is_the_geometric_mean_of_the_tokens"),
    ("equal rewards have an advantage by rounding", "advantage.py", "group_advantages",
     "centred.masked_fill(equal, 0.0)", "centred",
     "tests/test_advantage.py::test_equal_rewards_give_exactly_zero"),
    ("equal rewards are a division by zero", "advantage.py", "group_advantages",
     "rewards.std(dim=1, keepdim=True) + STD_EPS", "rewards.std(dim=1, keepdim=True)",
     "tests/test_advantage.py::test_equal_rewards_give_exactly_zero"),
    ("equal advantages are a division by zero when they are whitened", "advantage.py", "whiten",
     "count + 1e-8", "count",
     "tests/test_training.py::test_train_goes_on_where_there_is_nothing_to_learn[ppo, no rewards]"),
    ("where there is nothing to learn, momentum moves the weights", "grpo.py", "optimizer_step",
     "if 0 < grad_norm < math.inf", "if grad_norm < math.inf",
     "tests/test_batching.py::test_there_is_no_step_where_the_norm_is_0_or_not_finite[0.0-grpo]"),
    ("an update of NaN is made: every number of the policy is NaN from then on", "grpo.py", "optimizer_step",
     "if 0 < grad_norm < math.inf", "if grad_norm != 0",
     "tests/test_batching.py::test_there_is_no_step_where_the_norm_is_0_or_not_finite[nan-grpo]"),
    # ----- Curves, clipping and resuming -----
    ("curves are means over the padding, too", "grpo.py", "Metrics.add",
     "mask.sum()]", "torch.tensor(mask.numel())]",
     "tests/test_wiring.py::test_the_curves_are_means_over_the_tokens_or_the_completions_of_the_step[grpo]"),
    ("the curve of the KL is a mean over the padding, too", "ppo.py", "train",
     "kl.sum() / mask.sum()", "kl.mean()",
     "tests/test_wiring.py::test_train_goes_where_the_plain_loops_go[ppo no flag]"),
    ("curves are those of the last minibatch", "{}.py", "train",
     "for minibatch in minibatches:\n", "for minibatch in minibatches:\n                metrics = Metrics()\n",
     "tests/test_wiring.py::test_the_curves_are_means_over_the_tokens_or_the_completions_of_the_step[{}]"),
    ("curves are those of the last micro-batch", "grpo.py", "Metrics.add",
     "self.losses.append(loss.detach())", "self.totals, self.losses = {}, [loss.detach()]",
     "tests/test_wiring.py::test_the_curves_are_means_over_the_tokens_or_the_completions_of_the_step[grpo]"),
    ("gradients are not clipped: one bad batch ends the run", "grpo.py", "optimizer_step",
     "clip_grad_norm_(model.parameters(), max_grad_norm)", "clip_grad_norm_(model.parameters(), math.inf)",
     "tests/test_wiring.py::test_train_goes_where_the_plain_loops_go[grpo --max-grad-norm 0.1]"),
    ("gradients are clipped one parameter at a time", "grpo.py", "optimizer_step",
     "nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)",
     "sum(nn.utils.clip_grad_norm_(x, max_grad_norm) for x in model.parameters())",
     "tests/test_wiring.py::test_train_goes_where_the_plain_loops_go[grpo --max-grad-norm 0.1]"),
    ("the norm that is logged is that after clipping", "grpo.py", "optimizer_step",
     "return grad_norm", "return grad_norm.clamp(max=max_grad_norm)",
     "tests/test_wiring.py::test_the_curves_are_means_over_the_tokens_or_the_completions_of_the_step[grpo]"),
    ("a resumed run does a step again", "grpo.py", "Run.load",
     'self.step = saved["step"]', 'self.step = saved["step"] - 1',
     "tests/test_checkpoints.py::test_train_that_stops_after_every_step_ends_with_the_same_bits[grpo]"),
    ("a resumed run begins the problems anew", "{}.py", "train",
     "next_problems(pairs, step,", "next_problems(pairs, step - run.bar.iterable.start,",
     "tests/test_checkpoints.py::test_train_that_stops_after_every_step_ends_with_the_same_bits[{}]"),
    ("a resumed run begins the random numbers anew", "{}.py", "train",
     "rollout(sampler, chosen, step,", "rollout(sampler, chosen, step - run.bar.iterable.start,",
     "tests/test_checkpoints.py::test_train_that_stops_after_every_step_ends_with_the_same_bits[{}]"),
    ("a resumed run begins the optimizer anew", "grpo.py", "Run.load",
     "state = saved[name]", "state = saved[name][0], {}",
     "tests/test_checkpoints.py::test_train_that_stops_after_every_step_ends_with_the_same_bits[grpo]"),
    ("a resumed run begins the controllers of beta anew", "ppo.py", "Run.load",
     'self.betas.update(saved["betas"])', "self.betas.update()",
     "tests/test_checkpoints.py::test_train_that_stops_after_every_step_ends_with_the_same_bits[ppo]"),
    ("every step samples with the same random numbers", "grpo.py", "rollout",
     "+ step * processes + rank", "+ rank",
     "tests/test_wiring.py::test_rollout_draws_other_numbers_for_every_seed_step_and_process[grpo]"),
    ("all processes sample with the same random numbers", "grpo.py", "rollout",
     "+ step * processes + rank", "+ step",
     "tests/test_wiring.py::test_rollout_draws_other_numbers_for_every_seed_step_and_process[grpo]"),
    # ----- The reward -----
    ("what the model writes is evaluated", "grpo.py", "final_number",
     r"""and re.fullmatch(r"[-+]?[0-9][0-9,]*(\.[0-9]+)?", words[0]):
        return float(""",
     """:
        return eval(""",
     "tests/test_data_and_models.py::test_the_reward_is_for_the_one_number_after_the_last_marker"),
    ("a number anywhere is an answer", "grpo.py", "final_number",
     'if "#" in text else []', "if text else []",
     "tests/test_data_and_models.py::test_the_reward_is_for_the_one_number_after_the_last_marker"),
    ("the first marker counts, not the last", "grpo.py", "final_number",
     "rpartition", "partition",
     "tests/test_data_and_models.py::test_the_reward_is_for_the_one_number_after_the_last_marker"),
    ("the first of several guesses counts", "grpo.py", "final_number",
     "if len(words) == 1", "if words",
     "tests/test_data_and_models.py::test_the_reward_is_for_the_one_number_after_the_last_marker"),
    ("an answer that stands anywhere in the completion is right", "grpo.py", "reward",
     'number == final_number("#" + problem["answer"])',
     'str(final_number("#" + problem["answer"])) in completion.replace(",", "")',
     "tests/test_data_and_models.py::test_the_reward_is_for_the_one_number_after_the_last_marker"),
]  # fmt: skip
PITFALLS = [
    Pitfall(what, file.format(script), function, old, new, test.format(script))
    for what, file, function, old, new, test in TABLE
    for script in (("grpo", "ppo") if "{}" in file else ("",))
]


@functools.cache
def parsed(file: str) -> tuple[list[str], ast.Module]:
    """The lines of a source, and what they mean."""
    source = (ROOT / file).read_text()
    return source.splitlines(keepends=True), ast.parse(source)


def with_the_bug(pitfall: Pitfall) -> str:
    """The source of its file with the bug in it. An error if the row does not fit the source, or is no Python."""
    lines, node = parsed(pitfall.file)
    where = f"{pitfall.function} in {pitfall.file}"
    for name in pitfall.function.split("."):
        node = next((x for x in node.body if getattr(x, "name", None) == name), None)
        if node is None:
            raise ValueError(f"there is no {where}: {pitfall.what}")
    first, last = node.lineno - 1, node.end_lineno
    text = "".join(lines[first:last])
    if (count := text.count(pitfall.old)) != 1:
        raise ValueError(f"{where} has {count} times the text {pitfall.old!r}: {pitfall.what}")
    changed = text.replace(pitfall.old, pitfall.new)
    ast.parse(textwrap.dedent(changed))
    return "".join([*lines[:first], changed, *lines[last:]])


def run(*tests: str) -> tuple[int, str]:
    """pytest's exit code, and why a test failed, if one did."""
    # The slow tests, too, and few examples that are not made smaller; without .pyc files, which a change of
    # the same length in the same second would not replace.
    settings = dict(
        HYPOTHESIS_PROFILE="mutation", OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", COLUMNS="300"
    )  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-m", "slow or not slow", "-p", "no:cacheprovider"]
    command += ["-x", "-q", "--tb=no", *tests]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=1800)
    failed = re.findall(r"^FAILED .*? - (.*)", done.stdout, re.MULTILINE)
    return done.returncode, failed[-1] if failed else done.stdout[-2000:] + done.stderr[-2000:]


# The bug itself is broken then, which says nothing about the test.
BROKEN = re.compile(r"NameError|AttributeError|TypeError|UnboundLocalError|ImportError")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="WORD", default="")
    word, noticed = parser.parse_args().k, 0
    pitfalls = [pitfall for pitfall in PITFALLS if word in " ".join(pitfall)]
    if not pitfalls:
        parser.error(f"no row has the word {word!r}")
    sources = [with_the_bug(pitfall) for pitfall in pitfalls]
    with tempfile.TemporaryDirectory(prefix="pitfalls-of-") as folder:
        for path in (*ROOT.glob("*.py"), ROOT / ".pytest.ini"):
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "tests", f"{folder}/tests", ignore=shutil.ignore_patterns("__pycache__"))
        os.chdir(folder)
        code, why = run(*sorted({pitfall.test for pitfall in pitfalls}))
        if code:
            print(f"without a bug: {why}")
            return 1
        for pitfall, source in zip(pitfalls, sources, strict=True):
            good = Path(pitfall.file).read_text()
            Path(pitfall.file).write_text(source)
            code, why = run(pitfall.test)
            Path(pitfall.file).write_text(good)
            said = f"{pitfall.file}, {pitfall.function}: {pitfall.what}"
            if code == 1 and not BROKEN.match(why):
                noticed += 1
                print(f"noticed    {said} ({why[:60]})", flush=True)
            else:
                print(f"UNNOTICED  {said}\n{pitfall.test}\n{why}", flush=True)
    print(f"{noticed} of {len(pitfalls)} noticed")
    return 0 if noticed == len(pitfalls) else 1


if __name__ == "__main__":
    sys.exit(main())
