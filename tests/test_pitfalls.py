# SPDX-License-Identifier: MIT
"""One test for each known way to get PPO and GRPO on language models wrong. Every test first passes on the code, then
puts the bug back into its source and must fail, so that nobody has to believe that it would.
"""

import contextlib
import inspect
import itertools
import json
import os
import socket
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

import grpo
import ppo
from families import SHARING, VOCAB, batch_of, make_model
from running import curves, slow, weights

CPU = torch.device("cpu")
END = 1  # the end token of make_model and of make_tokenizer, and their pad token too
ENDS = torch.arange(END, VOCAB, 6)  # as many, so that rows end at different times
T, TEMPERATURE = 10, 0.7  # T: max_new_tokens


# ----- Putting a bug back -----


@contextlib.contextmanager
def bug(module, name, old, new):
    """For the duration, `module`'s function `name` (or "Class.method") with `new` for the text `old` in its source."""
    *outer, name = name.split(".")
    owner = getattr(module, outer[0]) if outer else module
    good = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(good))
    if source.count(old) != 1:  # not an AssertionError: a bug that no longer fits must not pass for one that was caught
        raise LookupError(f"{name} has {source.count(old)} times the text {old!r}: put this bug back in another way")
    found = {}
    exec(compile(source.replace(old, new), f"<{name} with a bug>", "exec"), inspect.unwrap(good).__globals__, found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, found[name])
        yield


def assert_caught(check, *bugs, error=AssertionError):
    """`check` passes on the code, and fails with each of the bugs alone."""
    check()
    for each in bugs:
        with each, pytest.raises(error):
            check()
    check()


def test_a_bug_that_does_not_fit_the_code_is_an_error():
    for old in ("no such text", "mask"):  # none, and many
        with pytest.raises(LookupError), bug(grpo, "loss_weights", old, ""):
            pass


# ----- What the checks run on -----


@pytest.fixture(params=[grpo, ppo], ids=["grpo", "ppo"])
def script(request):
    return request.param


def make_tokenizer(chat_template=None):
    """A real tokenizer that puts a BOS in front, as Llama's does, and reads 12 as one token, though 1, 2 is two."""
    characters = "0123456789+=#("
    vocab = {name: i for i, name in enumerate(["<s>", "<end>", *characters, "12", "34", "++"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("1", "2"), ("3", "4"), ("+", "+")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = dict(bos_token="<s>", eos_token="<end>", pad_token="<end>", chat_template=chat_template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_model(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def variety(completion, answer):
    """No sum of a random model is ever right: a reward that differs between its completions instead."""
    return len(set(completion)) / 10


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Real training of a random model for a step or two: run(flag=value, ...) gives its weights and its curves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "reward", variety)
    tokenizer = make_tokenizer()
    save_model(Path("model"), make_model("llama", torch.float32, vocab_size=len(tokenizer)), tokenizer)
    problems = [{"prompt": f"{a}+{7 * a}=", "answer": f"{8 * a}"} for a in range(1, 25)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, problems)))
    common = dict(model="model", data="data.jsonl", num_prompts=4, group_size=4, max_new_tokens=T, num_steps=1)
    common |= dict(update_epochs=1, num_minibatches=1, learning_rate=1e-3, eval_every=0, save_every=0, dtype="float32")
    common |= dict(device="cpu") | (dict(value_warmup_steps=0) if script is ppo else {})
    numbers = itertools.count()

    def run(**flags):
        args = replace(run.args, **dict(run_name=f"{next(numbers)}") | flags)
        return weights(script.train(args)), curves(args.run_name)

    run.args = script.Args(**common)
    return run


def sample(script, model, prompts=((5, 6, 7, 8, 9, 10, 11), (4, 3, 2), (12,)), share_prompt=True):
    """A batch of completions of ragged prompts, as sampled; not shared: each with its prompt."""
    prompts = script.pad_prompts([list(ids) for ids in prompts], CPU)
    uniforms = torch.rand(4 * len(prompts[0]), T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = script.Batch(*prompts, *script.generate_completions(model, *prompts, uniforms, TEMPERATURE, ENDS))
    return batch if share_prompt else batch.unshared()


def assert_scored_as_sampled(script, model, **options):
    """The same log-probabilities in sampling and in scoring, with shared prompts and without: the ratio starts at 1."""
    for share_prompt in (True, False):
        batch = sample(script, model, share_prompt=share_prompt, **options)
        with torch.no_grad():
            scored, _ = script.completion_logprobs(model, batch, TEMPERATURE)
        assert_close(scored, batch.sampler_logprobs, atol=1e-4, rtol=0)


def loss_of(script, logprobs, old_logprobs, mask):
    """The policy's loss for advantages of 1; GRPO's with the KL from `old_logprobs`."""
    weight, ones = script.loss_weights(mask, "sequence", T), torch.ones_like(logprobs)
    if script is grpo:
        return grpo.grpo_loss(logprobs, old_logprobs, old_logprobs, ones, mask, weight, beta=0.1)[0]
    return ppo.policy_loss(logprobs, old_logprobs, ones, mask, weight)[0]


def loss_name(script):
    return "grpo_loss" if script is grpo else "policy_loss"


# ----- The pitfalls -----


def test_pitfall_01_the_end_token_is_trained_though_pad_is_the_end_token(script):
    model = make_model("llama", torch.float32)
    assert model.config.pad_token_id == model.config.eos_token_id == END

    def check():
        _, _, ids, mask, logprobs, *_ = sample(script, model)
        loss_of(script, logprobs.requires_grad_(), logprobs.detach(), mask).backward()
        ends = torch.isin(ids, ENDS)
        assert (ends.any(-1) | (mask.sum(-1) == T)).all()
        assert ends.any()
        assert (logprobs.grad[ends] < 0).all()

    by_length = "ended.cumsum(1) - ended.long() == 0"
    assert_caught(check, bug(script, "generate_completions", by_length, f"({by_length}) & ~ended"))


def test_pitfall_02_end_tokens_of_the_turns_of_a_chat_stay_visible_in_scoring(script):
    model = make_model("llama", torch.float32)
    chats = (5, END, 6, 7, END, 8), (9, END, 4)

    def check():
        assert_scored_as_sampled(script, model, prompts=chats)

    alone, shared = "model(input_ids=ids, ", "attention_mask=batch.prompt_mask.long()"
    assert_caught(
        check,
        bug(script, "predict_completions", alone, f"{alone}attention_mask=(ids != {END}).long(), "),
        bug(script, "predict_completions", shared, f"attention_mask=(batch.prompt_ids != {END}).long()"),
    )


def test_pitfall_03_one_temperature_divides_the_logits_in_sampling_and_in_scoring(script):
    model = make_model("llama", torch.float32)
    assert_caught(
        lambda: assert_scored_as_sampled(script, model),
        bug(script, "completion_logprobs", "/ temperature", "/ 1.0"),
        bug(script, "sample_tokens", "/ (temperature or 1.0)", "/ 1.0"),
    )


def test_pitfall_04_a_top_k_in_the_generation_config_does_not_reach_the_sampling(script):
    model = make_model("llama", torch.float32)

    def sampled_with(top_k):
        model.generation_config.top_k = top_k
        return sample(script, model).completion_ids

    def check():
        whole, few = sampled_with(VOCAB), sampled_with(3)
        assert whole.shape == few.shape
        assert torch.equal(whole, few)

    sampled, limit = "sample_tokens(logits,", "logits.topk(policy.generation_config.top_k)[0][:, -1:]"
    top_k = f"sample_tokens(logits.where(logits >= {limit}, -torch.inf),"
    assert_caught(check, bug(script, "generate_completions", sampled, top_k))


@slow
def test_pitfall_05_the_gradient_does_not_depend_on_the_micro_batches(script, run):
    def check():
        whole, parts = (run(micro_batch_tokens=tokens)[1]["policy/grad_norm"][0][1] for tokens in (8192, 1))
        assert parts == pytest.approx(whole, rel=1e-3)

    loss = "-(objective * weights).sum()"
    assert_caught(check, bug(script, loss_name(script), loss, f"{loss} / weights.sum()"))


def train_in_two_processes(rank, port, args, bugs):
    """What each of the processes does: train without a bug, as run "two", and with each bug, as runs "bug0", "bug1"."""
    torch.set_num_threads(1)
    ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in ranks.items()}
    script = grpo if type(args) is grpo.Args else ppo
    script.reward = variety
    script.train(replace(args, run_name="two"))
    for i, each in enumerate(bugs):
        with bug(script, *each):
            script.train(replace(args, run_name=f"bug{i}"))
    torch.distributed.destroy_process_group()
    os._exit(0)  # as `main` does


@slow
def test_pitfall_05_the_gradient_does_not_depend_on_the_number_of_processes(script, run):
    whole = run()[1]["policy/grad_norm"][0][1]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    factor, loss = "set_gradient_divide_factor(1.0)", "-(objective * weights).sum()"
    averaged, own_denominators = factor.replace("1.0", "2.0"), f"{loss} / weights.sum()"  # one micro-batch a process
    bugs = [("shard", factor, averaged), (loss_name(script), loss, own_denominators)]
    torch.multiprocessing.spawn(train_in_two_processes, (port, run.args, bugs), nprocs=2)
    two, *wrong = (curves(name)["policy/grad_norm"][0][1] for name in ("two", "bug0", "bug1"))
    assert two == pytest.approx(whole, rel=1e-3)
    assert wrong == pytest.approx([whole / 2, whole * 2], rel=1e-3)  # caught, and for these very bugs


def test_pitfall_06_the_denominators_count_the_tokens_of_the_mask_alone(script):
    mask = torch.arange(6) < torch.tensor([[1], [3], [5]])

    def check():
        assert_close(script.loss_weights(mask, "sequence", T).sum(1), torch.full((3,), 1 / 3))
        assert_close(script.loss_weights(mask, "token", T)[mask], torch.full((9,), 1 / 9))

    assert_caught(
        check,
        bug(script, "loss_weights", "mask.sum(-1, keepdim=True).clamp(min=1)", "mask.shape[-1]"),
        bug(script, "loss_weights", "mask.sum().clamp(min=1)", "mask.numel()"),
    )


def test_pitfall_07_a_group_stays_whole_and_with_its_prompt_when_others_are_dropped(script):
    batch, has_signal = batch_of(script, num_prompts=4, group_size=3), torch.tensor([True, False, False, True])
    args = script.Args(micro_batch_tokens=1, num_minibatches=1)

    def check():
        for each in (batch, batch.unshared()):
            kept = each.rows(torch.cat(script.split_batch(each, has_signal, VOCAB, args)[0]).sort().values)
            whole = torch.tensor([0, 1, 2, 9, 10, 11])
            assert torch.equal(kept.completion_ids, batch.completion_ids[whole])
            prompts = batch.prompt_ids[whole // 3][:, -kept.prompt_ids.shape[1] :]
            assert torch.equal(kept.prompt_ids.repeat_interleave(6 // len(kept.prompt_ids), 0), prompts)

    own, rows = "has_signal.cpu().repeat_interleave(", "groups[chosen[rank::processes]]"
    assert_caught(
        check,
        bug(script, "split_batch", own, "has_signal.cpu().repeat("),
        bug(script, "split_batch", rows, "groups[chosen.argsort()[rank::processes]]"),  # numbered anew
        bug(script, "Batch.unshared", "x.repeat_interleave(group_size, 0)", "x.repeat(group_size, 1)"),
        bug(script, "Batch.rows", "// group_size    ", "% len(self.prompt_ids)"),
    )


@pytest.mark.parametrize("script", [grpo], ids=["grpo"])
def test_pitfall_07_no_advantage_compares_the_completions_of_two_prompts(script, run, monkeypatch):
    # Rewards that differ between prompts only: in whole groups, nothing is better than anything.
    monkeypatch.setattr(grpo, "reward", lambda completion, answer: float(answer))

    def check():
        after, before = run(beta=0.0)[0], weights("model")
        assert all(torch.equal(after[name], before[name]) for name in before)

    scores = "compute_rewards(decode(tokenizer, *sampled[:2]), answers, run)"
    assert_caught(check, bug(grpo, "train", scores, f"{scores}.roll(-1)"))  # each gets the reward of the next


def test_pitfall_08_the_ratio_is_exactly_1_for_as_long_as_the_policy_does_not_move(script, run):
    def check():
        found = run(update_epochs=2, num_minibatches=2, learning_rate=1e-12, max_grad_norm=1e-12)[1]  # both the least
        assert found["policy/ratio_max"] == [(0, 1.0)]
        assert found["policy/approx_kl"] == [(0, 0.0)]

    rows = "batch.rows(index)"
    alone = f"score(model, {rows}.unshared(), *options)"  # other shapes
    assert_caught(
        check,
        bug(script, "score_batch", f"score(model, {rows}, *options)", alone),
        bug(script, "train", "rows.old_logprobs", "rows.sampler_logprobs"),
    )


def test_pitfall_09_the_log_softmax_is_float32_over_a_bfloat16_model(script):
    model, batch = make_model("llama", torch.bfloat16), batch_of(script)

    @torch.no_grad()
    def check():
        logits = script.predict_completions(model, batch)[batch.completion_mask]
        logp, tokens = logits.double().log_softmax(-1), batch.completion_ids[batch.completion_mask]
        found = script.completion_logprobs(model, batch, temperature=1.0)[0][batch.completion_mask]
        assert_close(found.double(), logp.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)

    float32 = "torch.promote_types(logits.dtype, torch.float32)"
    assert_caught(check, bug(script, "completion_logprobs", float32, "logits.dtype"))


def test_pitfall_10_a_step_of_one_millionth_changes_the_weights_of_a_bfloat16_checkpoint(script, tmp_path):
    save_model(tmp_path / "model", make_model("llama", torch.bfloat16), make_tokenizer())

    def check():
        policy, _ = script.load_policy(str(tmp_path / "model"), make_tokenizer(), CPU)
        before = torch.cat([parameter.detach().flatten().clone() for parameter in policy.parameters()])
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        script.optimizer_step(policy, torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0), 1.0)
        after = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
        assert (after != before).float().mean() > 0.99

    assert_caught(check, bug(script, "load_policy", ".to(device)", ".to(device, torch.bfloat16)"))


def test_pitfall_11_k3_is_never_negative(script):
    log_r = torch.linspace(-1e-3, 1e-3, 1001)

    def check():
        assert (script.kl_estimate(torch.zeros_like(log_r), log_r, "k3") >= 0).all()

    assert_caught(check, bug(script, "kl_estimate", "torch.expm1(log_r) - log_r", "torch.exp(log_r) - log_r - 1"))


def test_pitfall_11_an_overflow_in_the_padding_reaches_neither_loss_nor_gradient(script):
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def check():
        for garbage in (-1e4, 1e4):  # ratios of e^9999 and e^-10001, where nothing is
            logprobs = torch.full(mask.shape, -1.0, requires_grad=True)
            loss = loss_of(script, logprobs, torch.full(mask.shape, -1.0).where(mask, garbage), mask)
            loss.backward()
            assert loss.isfinite()
            assert (logprobs.grad[~mask] == 0).all()

    name, masked = loss_name(script), ".where(completion_mask, 0.0)"
    bugs = [bug(script, name, f"(logprobs - old_logprobs){masked}", "(logprobs - old_logprobs)")]
    if script is grpo:
        bugs += [bug(grpo, name, f"logprobs{masked}, ref_logprobs{masked}", "logprobs, ref_logprobs")]
    assert_caught(check, *bugs)


def test_pitfall_12_a_policy_that_is_far_off_feels_the_kl(script):
    def check():
        logprobs = torch.tensor([-40.0, -8.0, -0.1, -0.1], requires_grad=True)
        ref_logprobs = torch.tensor([-20.0, -0.1, -8.0, -40.0])
        script.kl_estimate(logprobs, ref_logprobs, "k3").sum().backward()
        assert (logprobs.grad.abs() > 0.9).all()

    k3, log_r = "torch.expm1(log_r) - log_r", "ref_logprobs - logprobs"
    assert_caught(
        check,
        bug(script, "kl_estimate", f"return {k3}", f"return ({k3}).clamp(-10, 10)"),
        bug(script, "kl_estimate", f"log_r = {log_r}", f"log_r = ({log_r}).clamp(-20, 20)"),
    )


def test_pitfall_13_an_empty_completion_contributes_nothing(script):
    model, batch = make_model("llama"), batch_of(script)
    batch.completion_mask[1] = False  # of 12 completions

    def check():
        logprobs = script.completion_logprobs(model, batch, temperature=1.0)[0]
        loss = loss_of(script, logprobs, logprobs.detach(), batch.completion_mask)
        model.zero_grad()
        loss.backward()
        assert_close(loss.item(), -11 / 12)
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    length = "mask.sum(-1, keepdim=True)"
    assert_caught(check, bug(script, "loss_weights", f"{length}.clamp(min=1)", length))


def test_pitfall_13_a_batch_with_nothing_to_learn_from_is_logged_and_training_goes_on(script, run, monkeypatch):
    monkeypatch.setattr(script, "reward", lambda completion, answer: 0.0)

    def check():
        after, found = run(beta=0.0, num_steps=2)
        assert all(torch.equal(after[name], value) for name, value in weights("model").items())
        for points in found.values():
            assert [step for step, _ in points] == [0, 1]
            assert all(torch.tensor(value).isfinite() for _, value in points)

    if script is grpo:
        assert_caught(
            check,
            bug(grpo, "Metrics.means", " if self.losses else 0.0", " if self.losses else torch.tensor([]).mean()"),
            bug(grpo, "Metrics.means", "sum(finite) / max(1, len(finite))", "torch.tensor(finite).mean()"),
        )
    else:
        assert_caught(check, bug(ppo, "whiten", "count + 1e-8", "count"))


def test_pitfall_14_padding_on_the_left_shifts_no_position(script):
    model = make_model("gpt2", torch.float32, **SHARING["gpt2"])  # knows positions, not only their differences
    positions, shifted = "({}prompt_mask.cumsum(1) - 1).clamp(min=0)", "torch.ones_like({}prompt_ids).cumsum(1) - 1"
    assert_caught(
        lambda: assert_scored_as_sampled(script, model),
        bug(script, "generate_completions", positions.format(""), shifted.format("")),
        bug(script, "predict_completions", positions.format("batch."), shifted.format("batch.")),
    )


@pytest.mark.filterwarnings("ignore:std:UserWarning")
@pytest.mark.parametrize("script", [grpo], ids=["grpo"])
def test_pitfall_15_the_std_is_the_sample_one_and_a_group_of_one_is_refused(script):
    def check():
        advantages = grpo.group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
        assert advantages.square().sum().item() == pytest.approx(4 - 1, rel=1e-3)

    def check_one():
        with pytest.raises(ValueError, match="group of one"):
            grpo.group_advantages(torch.ones(3, 1))
        with pytest.raises(grpo.UserError, match="--group-size must be at least 2"):
            grpo.check_args(grpo.Args(group_size=1))

    std, refused = "rewards.std(dim=1, keepdim=True)", pytest.fail.Exception
    assert "(n - 1)" in grpo.group_advantages.__doc__
    assert_caught(check, bug(grpo, "group_advantages", std, "rewards.std(dim=1, keepdim=True, correction=0)"))
    assert_caught(check_one, bug(grpo, "group_advantages", "rewards.shape[1] < 2", "False"), error=refused)
    assert_caught(check_one, bug(grpo, "check_args", "LEAST.get(name, math.ulp(0))", "0"), error=refused)


@pytest.mark.filterwarnings("ignore:std:UserWarning")
@pytest.mark.parametrize("script", [ppo], ids=["ppo"])
def test_pitfall_15_one_completion_per_prompt_is_enough_for_ppo(script, run):
    def check():
        after, found = run(group_size=1)
        assert all(value.isfinite().all() for value in after.values())
        assert all(torch.tensor(points[0][1]).isfinite() for points in found.values())

    assert_caught(check, bug(ppo, "train", "rewards.std()", "rewards.view(-1, args.group_size).std(1).mean()"))


def test_pitfall_16_dropout_is_off_in_every_pass(script, tmp_path):
    model = make_model("gpt2", torch.float32, **SHARING["gpt2"])
    assert model.config.resid_pdrop > 0
    save_model(tmp_path / "model", model, make_tokenizer())
    batch = batch_of(script)

    def check():
        policy, _ = script.load_policy(str(tmp_path / "model"), make_tokenizer(), CPU)
        first, second = (script.completion_logprobs(policy, batch, temperature=1.0)[0] for _ in range(2))
        assert torch.equal(first, second)
        if script is ppo:
            value_model = ppo.ValueModel(policy)
            value_model.head.weight.data.fill_(1.0)
            assert torch.equal(*(ppo.completion_values(value_model, batch) for _ in range(2)))

    assert_caught(check, bug(script, "load_policy", ".eval()", ".train()"))


def test_pitfall_17_a_prompt_has_one_bos_with_a_chat_template_and_without(script):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    plain, chat = make_tokenizer(), make_tokenizer(template)

    def check():
        assert plain.decode(script.encode_prompt(plain, "5+7=")) == "<s>5+7="
        assert chat.decode(script.encode_prompt(chat, "5+7=")) == "<s>5+7=<end>"

    made = "tokenizer.apply_chat_template("
    again = f"(lambda chat, **_: tokenizer({made}chat, tokenize=False)).input_ids)("
    assert_caught(check, bug(script, "encode_prompt", made, again))


def test_pitfall_18_the_very_ids_that_were_sampled_are_trained(script, run, monkeypatch):
    generate, score = script.generate_completions, script.completion_logprobs

    def check():
        def rows(ids, mask):
            return {tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)}

        def generate_and_note(*args, **how):
            found = generate(*args, **how)
            sampled.clear()  # before this, only the test whether prompts can be shared has sampled
            scored.clear()
            sampled.update(rows(*found[:2]))
            return found

        def score_and_note(policy, batch, *options):
            scored.update(rows(batch.completion_ids, batch.completion_mask))
            return score(policy, batch, *options)

        sampled, scored = set(), set()
        monkeypatch.setattr(script, "generate_completions", generate_and_note)
        monkeypatch.setattr(script, "completion_logprobs", score_and_note)
        with contextlib.suppress(script.UserError):  # the curve policy/sampler_gap also gives the bug away
            run(num_prompts=16)
        assert sampled == scored

    texts = "[tokenizer.decode(ids[kept]) for ids, kept in zip(sampled[0], sampled[1])]"
    again = f"pad_prompts(tokenizer({texts}, add_special_tokens=False).input_ids, device)"
    again = f"again = {again}; sampled = *again, sampled[2][..., : again[0].shape[-1]]; "
    answers = "answers = [answer for"
    assert_caught(check, bug(script, "train", answers, again + answers))


def test_pitfall_19_what_the_model_writes_is_never_evaluated(script):
    def check():
        assert script.reward("#42", "42") == 1.0
        assert script.reward("#(40+2)", "42") == 0.0

    parsed = 'word.replace(",", "")) if is_number else None'
    assert_caught(check, bug(script, "final_number", parsed, "eval(word or '0'))"))
    assert script.reward("#99**99**99", "42") == 0.0


@slow
def test_pitfall_20_curves_are_means_over_all_tokens_of_all_minibatches(script, run, monkeypatch):
    score = script.completion_logprobs

    def check():
        def score_and_note(policy, batch, *options):
            logprobs, entropy = score(policy, batch, *options)
            if logprobs.requires_grad:
                seen.append(entropy.detach()[batch.completion_mask])
            return logprobs, entropy

        seen = []
        monkeypatch.setattr(script, "completion_logprobs", score_and_note)
        found = run(num_minibatches=2, micro_batch_tokens=30)[1]
        assert len(seen) >= 4
        assert found["policy/entropy"][0][1] == pytest.approx(torch.cat(seen).mean().item(), rel=1e-5)

    start = "self.losses.append(loss.detach())"
    assert_caught(
        check,
        bug(script, "Metrics.add", "+ mask.sum()", "+ torch.tensor(mask.numel())"),
        bug(script, "Metrics.add", start, f"{start}; self.sums, self.counts = {{}}, {{}}"),
    )


@slow
def test_pitfall_21_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(script, run):
    whole, numbers = run(num_steps=4)[0], itertools.count()

    def check():
        name = f"parts{next(numbers)}"
        run(run_name=name, num_steps=2)
        parts = run(run_name=name, num_steps=4, resume="auto")[0]
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    anew = "step - 2 * bool(args.resume)"  # counted from the restart
    assert_caught(
        check,
        bug(script, "Run.load", '= saved["step"]', '= saved["step"] - 1'),  # one step once more
        bug(script, "train", "next_problems(problems, step,", f"next_problems(problems, {anew},"),
        bug(script, "train", "seed_step(args.seed, step)", f"seed_step(args.seed, {anew})"),
        bug(script, "Run.load", "state = saved[name]", "state = saved[name][0], {}"),  # the optimizer anew
    )


def test_pitfall_22_the_gradient_is_clipped_by_its_global_norm_and_the_norm_is_logged(script, run):
    def check():
        def note(optimizer, *_):
            gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
            norms.append(torch.cat(gradients).norm().item())

        norms = []
        with register_optimizer_step_pre_hook(note):
            found = run(max_grad_norm=1e-3)[1]
        assert norms == [pytest.approx(1e-3, rel=1e-2)] * (1 if script is grpo else 2)
        assert found["policy/grad_norm"][0][1] > 1e-2  # that before clipping

    clip = "nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)"
    each = "sum(nn.utils.clip_grad_norm_(parameter, max_grad_norm) for parameter in model.parameters())"
    assert_caught(
        check,
        bug(script, "optimizer_step", clip, clip.replace("max_grad_norm", "math.inf")),
        bug(script, "optimizer_step", clip, each),
        bug(script, "optimizer_step", clip, f"{clip}.clamp(max=max_grad_norm)"),
    )


def test_pitfall_23_only_the_one_number_after_the_last_marker_is_an_answer(script):
    def check():
        assert script.reward("5+7=12 #12", "12") == 1.0
        for hack in ("12", "5+7=12", "#12 or 13", "#13 or 12", "#12 #13", "#12 #", "#112", "#12.5"):
            assert script.reward(hack, "12") == 0.0, hack

    assert_caught(
        check,
        bug(script, "final_number", 'if "#" in text', "if text"),  # anywhere
        bug(script, "final_number", "rpartition", "partition"),  # after the first marker
        bug(script, "final_number", "if len(words) == 1", "if words"),  # the first of several guesses
        bug(script, "reward", 'number == final_number("#" + answer)', "answer in completion"),
    )
