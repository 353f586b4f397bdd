# SPDX-License-Identifier: MIT
"""Training end to end, in both scripts: the tiny model that comes with them, for a few steps. That the numbers of an
update are those of the papers is in test_wiring.py.
"""

import itertools
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import grpo
import ppo
from advantage import group_advantages
from helpers.inputs import make_byte_folder
from helpers.runs import SCRIPTS, TWINS, curves, make_folder, saved, variety, weights
from helpers.tiny_models import tokens_of

TINY = grpo.Args.model
SMALL = dict(
    data="data.jsonl", num_prompts=4, group_size=4, max_new_tokens=24, num_steps=3, eval_every=0, save_every=0,
)  # fmt: skip
TAGS = {
    "reward/mean", "reward/std", "completion/length", "completion/truncated", "policy/kl", "policy/entropy",
    "policy/ratio", "policy/clip_frac", "policy/approx_kl", "policy/grad_norm", "policy/loss", "policy/skipped",
    "policy/sampler_gap", "eval/greedy", "eval/sampled", "eval/length",
}  # fmt: skip
OF_PPO = {
    "policy/beta", "value/loss", "value/grad_norm", "value/skipped", "value/clip_frac", "value/explained_variance",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> None:
    """The current one, with a few problems."""
    monkeypatch.chdir(tmp_path)
    lines = Path(grpo.Args.data).read_text().splitlines(keepends=True)[:40]
    Path("data.jsonl").write_text("".join(lines))


def small(script, run_name: str, **args: object) -> grpo.Args | ppo.Args:
    # PPO's first steps train the value model only: these runs are shorter than that.
    return script.Args(run_name=run_name, **SMALL | (dict(value_warmup_steps=0) if script is ppo else {}) | args)


def moved(before: dict, after: dict) -> bool:
    return any(not torch.equal(before[name], value) for name, value in after.items())


def record(monkeypatch, owner, name: str, what) -> list:
    """A list that gets something of the arguments and the result of every call of a function."""
    function, records = getattr(owner, name), []

    def recorded(*given: object, **options: object) -> object:
        result = function(*given, **options)
        records.append(what(given, result))
        return result

    monkeypatch.setattr(owner, name, recorded)
    return records


# ----- A step of four completions, as the docstring of `rollout` shows it -----

# What the model writes without an end to it, (4, 4): 21 is "#7", 22 is " #7", which is the answer, and 2 is EOS.
WRITTEN = torch.tensor([[21, 22, 2, 29], [23, 24, 25, 26], [21, 2, 21, 2], [22, 2, 28, 27]])


class GivenTokens:
    """A `Decoder` whose logits leave no choice."""

    def running_rows(self, running: torch.Tensor, t: int) -> torch.Tensor:
        return torch.arange(4)

    def next_logits(self, ids: torch.Tensor) -> torch.Tensor:
        t = ids.shape[1]
        return torch.full((4, 32), -torch.inf).scatter(1, WRITTEN[:, t : t + 1], 0.0)       # (R, V)


@SCRIPTS
def test_rollout_gives_the_rows_of_its_docstring(script, monkeypatch):
    """Left pad, right pad, a completion that was cut off, a group that teaches nothing."""
    monkeypatch.setattr(script, "Decoder", lambda *_: GivenTokens())
    words = [f"word{i}" for i in range(32)]
    words[2], words[21], words[22] = "<end>", "#7", " #7"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "word0"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    pairs = [([5, 6], {"answer": "7"}), ([7, 8, 9], {"answer": "7"})]
    args = small(script, "a", num_prompts=2, group_size=2, max_new_tokens=4)
    batch, rewards, ended = script.rollout(None, pairs, 0, args, tokenizer, torch.tensor([2]))
    advantages = group_advantages(rewards.view(2, 2)).flatten()                             # (4,)
    token_weights = script.loss_weights(batch.completion_mask, args.loss_average, 4)        # (4, 4)
    rows = []
    for i in range(4):
        columns = [batch.completion_ids[i].tolist(), batch.completion_mask[i].int().tolist(), rewards[i].item(),
                   "true" if ended[i] else "false", f"{advantages[i]:.3g}"]
        if i % 2 == 0:  # the first of its group
            columns.insert(0, batch.prompt_ids[i // 2].tolist())
        fractions = ["0" if weight == 0 else f"1/{1 / weight:.0f}" for weight in token_weights[i]]
        rows += [*columns, f"[{', '.join(fractions)}]"]
    assert " ".join(map(str, rows)) in " ".join(script.rollout.__doc__.split())
    assert batch.prompt_mask.tolist() == [[False, True, True], [True, True, True]]


# ----- What a run leaves and says -----


@SCRIPTS
def test_train_leaves_a_trained_model_a_checkpoint_and_every_curve(script, monkeypatch, capsys):
    logged = record(monkeypatch, script.Run, "log", lambda given, _: given[1])
    folder = script.train(small(script, "a", eval_every=2))
    assert folder == Path("runs/a/policy").absolute()
    assert moved(weights(TINY), weights(folder))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(TINY).get_vocab()
    assert saved("a")["step"] == 3
    found = curves("a")
    assert found.keys() == TAGS | (OF_PPO if script is ppo else set())
    for tag, points in found.items():
        assert [step for step, _ in points] == ([0, 2, 3] if tag.startswith("eval/") else [0, 1, 2]), tag
        assert torch.tensor([value for _, value in points]).isfinite().all(), tag
    steps = [metrics for metrics in logged if "time/step" in metrics]
    said = capsys.readouterr().err.splitlines()
    for step, metrics in zip(range(3), steps, strict=True):
        tokens_per_second = 16 * metrics["completion/length"] / metrics["time/step"]
        assert metrics["time/tokens_per_second"] == pytest.approx(tokens_per_second)
        # There is no bar where this is no terminal: a line instead.
        (line,) = [line for line in said if line.startswith(f"step {step}: reward ")]
        assert line.endswith(f"KL {metrics['policy/kl']:.3f}, {tokens_per_second:.0f} tokens/s")


@SCRIPTS
@pytest.mark.parametrize(("parameters", "rates"), [(9_999_999, [5e-4, 1e-3]), (10_000_000, [1e-6, 1e-5])])
def test_the_learning_rate_follows_from_the_size_and_is_said(script, parameters, rates, monkeypatch, capsys):
    """It followed from the path: a small model elsewhere trained at 1e-6, and nothing said so."""
    make_folder(Path())
    monkeypatch.setattr(PreTrainedModel, "num_parameters", lambda model: parameters)
    models = record(monkeypatch, script, "Run", lambda given, _: given[5])
    stop = threading.Event()
    stop.set()
    script.train(small(script, "a", model="model"), stop)
    assert f", learning rate {rates[0]:g}, step 0 of 3, in " in capsys.readouterr().err
    used = [optimizer.param_groups[0]["lr"] for _, optimizer in models[0].values() if optimizer]
    assert used == rates[: len(used)]


@TWINS
def test_evaluate_writes_every_held_out_problem_none_of_which_is_trained_on(script, monkeypatch):
    """What JSON does not know, such as a set that a reward has put into a problem, is written as text."""
    monkeypatch.setattr(script, "reward", lambda _, problem: len(problem.setdefault("seen", {"once"})))
    chosen = record(monkeypatch, script, "rollout", lambda given, _: [problem["prompt"] for _, problem in given[1]])
    script.train(small(script, "a", num_steps=8, max_new_tokens=2, eval_every=8))
    lines = [json.loads(line) for line in Path("runs/a/completions.jsonl").read_text().splitlines()]
    assert {line["problem"]["seen"] for line in lines} == {"{'once'}"}
    assert len(lines) == 5 * 2 * 2  # problems, greedy and sampled, before the first step and after the last
    held_out, trained = {line["problem"]["prompt"] for line in lines}, {*itertools.chain(*chosen)}
    assert (len(held_out), len(trained)) == (5, 4 * 8)
    assert not held_out & trained


# ----- Where there is little to learn -----

NOTHING_TO_LEARN = {
    "grpo, equal rewards": (grpo, dict(beta=0.0, max_new_tokens=17), lambda *_: 0.5),
    "grpo, all truncated": (grpo, dict(max_new_tokens=1, mask_truncated=True), lambda *_: torch.rand(()).item()),
    "ppo, no rewards": (ppo, dict(beta=0.0, max_new_tokens=17), lambda *_: 0.0),
    "ppo, one completion": (ppo, dict(beta=0.0, num_prompts=1, group_size=1, num_minibatches=1), lambda *_: 0.0),
}


@pytest.mark.parametrize("case", NOTHING_TO_LEARN)
def test_train_goes_on_where_there_is_nothing_to_learn(case, monkeypatch, capsys):
    """Advantages of 0 have a variance of 0, by which whitening divides. A gradient of 0 is no update, yet none that was
    skipped because it was not finite. Runs whose rewards were all equal trained to their end without a word."""
    script, options, reward = NOTHING_TO_LEARN[case]
    monkeypatch.setattr(script, "reward", reward)
    assert not moved(weights(TINY), weights(script.train(small(script, "a", **options))))
    found, never = curves("a"), [(0, 0.0), (1, 0.0), (2, 0.0)]
    for tag, points in found.items():
        assert [step for step, _ in points] == [0, 1, 2], tag
        assert all(torch.tensor(value).isfinite() for _, value in points), tag
    assert found["policy/grad_norm"] == found["policy/skipped"] == never
    truncated = found["completion/truncated"][0][1]
    lines = [line for line in capsys.readouterr().err.splitlines() if "teach nothing" in line]
    if case == "grpo, all truncated":  # the rewards differ
        assert (truncated, lines) == (1, [])
    else:
        assert [line[:38] for line in lines] == ["step 0: no completion earned more than"]
        assert lines[0].endswith(f"; {truncated:.0%} were cut off at --max-new-tokens")
        assert found["reward/std"] == found.get("value/explained_variance", never) == never


# ----- Stopping -----


@TWINS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_leaves(script, number, monkeypatch, capfd):
    calls = itertools.count(1)

    def signalling(completion: str, problem: dict) -> float:
        if next(calls) == 16 + 3:  # in the second step
            os.kill(os.getpid(), number)
        return variety(completion, problem)

    monkeypatch.setattr(script, "reward", signalling)
    script.main(small(script, "a", num_steps=100))
    said = capfd.readouterr().err
    assert "finishing this step, then saving; a second signal exits at once" in said
    assert "trained model after 2 steps" in said
    assert saved("a")["step"] == 2
    assert [step for step, _ in curves("a")["reward/mean"]] == [0, 1]


@TWINS
def test_a_run_in_a_thread_ends_when_asked_and_sets_no_signal_handlers(script, monkeypatch):
    """As in a notebook. The step under way is finished."""
    stop, before = threading.Event(), (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    monkeypatch.setattr(script, "reward", lambda *texts: stop.set() or variety(*texts))
    thread = threading.Thread(target=script.train, args=(small(script, "a"), stop))
    thread.start()
    thread.join()
    assert saved("a")["step"] == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ----- What must reach the update as it was sampled, and the curves as it was trained -----


@SCRIPTS
def test_train_has_a_ratio_of_exactly_1_for_as_long_as_the_policy_stays(script, monkeypatch):
    """PPO Eq. 6: log-probabilities at another temperature are those of another policy than the one that sampled; from
    other shapes, or from the sampler, they would be rounded otherwise."""
    name = "grpo_loss" if script is grpo else "policy_loss"
    ratios = record(monkeypatch, script, name, lambda _, result: result[1]["ratio"])
    # AdamW divides such gradients by its eps of 1e-8: its steps are too short to change a weight.
    still = dict(update_epochs=2, num_minibatches=2, learning_rate=1e-12, max_grad_norm=1e-12)
    script.train(small(script, "a", num_steps=1, micro_batch_tokens=60, temperature=0.6, **still))
    assert len(ratios) > 4
    assert all(ratio.eq(1).all() for ratio in ratios)
    found = {tag: value for tag, [(_, value)] in curves("a").items()}
    assert found["policy/approx_kl"] == found["policy/clip_frac"] == found["policy/kl"] == 0
    assert 0 < found["policy/sampler_gap"] < 1e-5


@SCRIPTS
def test_train_rewards_every_completion_with_the_problem_of_its_prompt(script, monkeypatch):
    """A group is compared within itself: the answer of another prompt would make it a comparison of prompts."""
    sampled = record(monkeypatch, script, "generate_completions", lambda given, result: (*given[1:3], *result[:2]))
    rewarded = record(monkeypatch, script, "compute_rewards", lambda given, _: given)
    script.train(small(script, "a", num_steps=1))
    (texts, problems), (*prompts, ids, mask) = rewarded[-1], sampled[-1]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompts = tokenizer.batch_decode(tokens_of(*prompts))
    assert [problem["prompt"] for problem in problems] == [prompt for prompt in prompts for _ in range(4)]
    assert texts == tokenizer.batch_decode(tokens_of(ids, mask), skip_special_tokens=True)


@SCRIPTS
def test_train_trains_the_very_ids_that_were_sampled(script, monkeypatch):
    """Decoded and encoded again, bytes that are no UTF-8 would become others, which the policy has not written."""
    make_byte_folder(Path())
    sampled = record(monkeypatch, script, "generate_completions", lambda _, result: tokens_of(*result[:2]))
    scored = record(monkeypatch, script, "completion_logprobs", lambda given, result: (given[1], *result))
    script.train(small(script, "a", model="model", num_steps=1, update_epochs=1))
    trained = [part for part, logprobs, _ in scored if logprobs.requires_grad]
    trained = [tokens_of(part.completion_ids, part.completion_mask) for part in trained]
    assert sorted(itertools.chain(*trained)) == sorted(sampled[-1])
    tokenizer = AutoTokenizer.from_pretrained("model")
    again = [tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids for ids in sampled[-1]]
    assert again != sampled[-1], "every text has these ids alone: this shows nothing"


@SCRIPTS
def test_load_policy_turns_dropout_off_and_it_stays_off(script, monkeypatch):
    """With it a ratio is noise, and so is the difference between two passes of one model."""
    make_folder(Path(), "gpt2")
    models = record(monkeypatch, script, "Run", lambda given, _: given[5])
    monkeypatch.setattr(script, "reward", variety)
    script.train(small(script, "a", model="model", num_steps=1))
    ids = torch.arange(1, 9)[None]                                                          # (1, 8)
    for name in ("policy", "ref_policy", *(["value_model"] if script is ppo else [])):
        model, _ = models[0][name]
        assert model.config.resid_pdrop > 0
        first, second = (model(input_ids=ids, logits_to_keep=torch.arange(8)).logits for _ in range(2))
        assert first.ne(0).any()
        assert torch.equal(first, second)


@SCRIPTS
def test_load_policy_keeps_weights_that_a_step_of_one_millionth_moves(script, monkeypatch):
    """Weights of 0.3 in bfloat16 are 0.002 apart: every update at the default learning rate would be rounded away."""
    make_folder(Path())
    AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16).save_pretrained("model")
    before = weights("model")
    monkeypatch.setattr(script, "reward", variety)
    after = weights(script.train(small(script, "a", model="model", num_steps=1, learning_rate=1e-6, dtype="bfloat16")))
    assert torch.cat([(after[name] != value).flatten() for name, value in before.items()]).float().mean() > 0.9
