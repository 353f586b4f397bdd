# SPDX-License-Identifier: MIT
"""What people's real files and habits did to the scripts: each docstring is a report, each assertion what is right."""

import contextlib
import inspect
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from test_data_and_models import make_tokenizer
from tokenizers import AddedToken, processors
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import grpo
import ppo
from helpers.runs import SMALL, assert_same_run, command, curves, finish, make_folder, saved, start, weights
from helpers.tiny_models import make_model
from test_sampling import Graph, sample
from tools import sweep_families

ROOT = Path(__file__).parents[1]
both = pytest.mark.parametrize(
    "script", [grpo, pytest.param(ppo, marks=pytest.mark.slow)], ids=["grpo", "ppo"], indirect=True
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a model and problems, which is also the current one."""
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=[grpo], ids=["grpo"])
def script(request, folder, monkeypatch):
    """A script, with a reward that a random model can earn."""
    monkeypatch.setattr(request.param, "reward", variety)
    return request.param


def variety(completion: str, problem: dict) -> float:
    return len(set(completion)) / 10


def arguments(script, **args: object):
    return script.Args(**SMALL | dict(run_name="a") | (dict(value_warmup_steps=0) if script is ppo else {}) | args)


def run(script, capsys, code: int = 0, **args: object) -> str:
    """What `main` says on its way to this exit code, which is one sentence if it is 2."""
    capsys.readouterr()
    assert script.main(arguments(script, **args)) == code, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count(f"{script.__name__}.py: ") == (code == 2), said
    return said


def change_json(path: str, **changes: object) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def write_lines(path: str, *problems: dict) -> None:
    Path(path).write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def read_lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def batches(script, monkeypatch) -> list[tuple]:
    """(prompts, temperature, mask) of every batch that was sampled; the prompts are lists of token ids."""
    generate, seen = script.generate_completions, []

    def recorded(policy, prompt_ids, prompt_mask, uniforms, temperature, *rest):
        sampled = generate(policy, prompt_ids, prompt_mask, uniforms, temperature, *rest)
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        seen.append((prompts, temperature, sampled[1]))
        return sampled

    monkeypatch.setattr(script, "generate_completions", recorded)
    return seen


# ----- What ends a completion, and what is text -----


def end_with_an_added_token(special: bool) -> None:
    """The model ends with "<|im_end|>", which is not the EOS token of its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=special)])
    tokenizer.save_pretrained("model")
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    make_model("llama", torch.float32, vocab_size=len(tokenizer), **ids).save_pretrained("model")
    change_json("model/generation_config.json", eos_token_id=len(tokenizer) - 1)


@both
@pytest.mark.parametrize("special", [False, True])
def test_the_reward_sees_no_token_that_ended_the_completion(script, capsys, monkeypatch, special):
    """A chat model ends with a token that its tokenizer does not mark as special: every reward saw it as text."""
    end_with_an_added_token(special)
    texts = []
    monkeypatch.setattr(script, "reward", lambda completion, problem: texts.append(completion) or 0.0)
    run(script, capsys, eval_every=2, num_steps=2, max_new_tokens=12)
    assert len({*texts}) > 10
    assert not [text for text in texts if "<|im_end|>" in text]
    assert not [line for line in read_lines("runs/a/completions.jsonl") if "<|im_end|>" in line["completion"]]


@both
@pytest.mark.parametrize(
    ("template", "expected"),
    [(None, "02+14="), ("{{ messages[0].content }}<end>", "02+14=<end>")],
    ids=["text", "chat"],
)
def test_a_prompt_is_not_closed_by_the_end_token_unless_a_template_says_so(script, capsys, batches, template, expected):
    """The tokenizer appends its EOS to every text, as Llama's does with add_eos_token: prompts were closed answers."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    appends = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    tokenizer.backend_tokenizer.post_processor = appends
    tokenizer.chat_template = template
    tokenizer.save_pretrained("model")
    assert AutoTokenizer.from_pretrained("model")("1+1=").input_ids[-1] == 0
    run(script, capsys, num_steps=10, eval_data="data.jsonl")
    prompts = {tokenizer.decode(ids) for prompts, _, mask in batches if len(mask) == 8 for ids in prompts}
    assert expected in prompts
    assert {prompt.endswith("<end>") for prompt in prompts} == {template is not None}


@both
@pytest.mark.parametrize("end", [15, 99, -1])
def test_an_end_token_that_the_model_cannot_produce_is_none(script, capsys, end):
    """A config names an EOS id outside the vocabulary: every completion was truncated, and nothing was said."""
    change_json("model/config.json", eos_token_id=end)
    change_json("model/generation_config.json", eos_token_id=end)
    run(script, capsys, run_name="one_left", num_steps=1, max_new_tokens=40)  # the tokenizer's own one
    assert curves("one_left")["completion/truncated"][0][1] < 1
    change_json("model/tokenizer_config.json", eos_token=None)
    assert "it has no EOS token, so its completions could never end" in run(script, capsys, 2)


def test_an_end_token_of_the_tokenizer_that_the_model_does_not_have_is_none(script, capsys):
    """A tokenizer was given an EOS token, the model's vocabulary was not extended."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained("model")
    change_json("model/config.json", eos_token_id=None)
    change_json("model/generation_config.json", eos_token_id=None)
    assert "it has no EOS token, so its completions could never end" in run(script, capsys, 2)


# ----- Problems -----


def trained_and_held_out(batches: list[tuple]) -> list[set[tuple[int, ...]]]:
    """The prompts with two completions, and those of greedy completions."""
    trained = [prompts for prompts, _, mask in batches if len(prompts) == 4 and len(mask) == 8]
    held_out = [prompts for prompts, temperature, _ in batches if temperature == 0]
    return [{tuple(ids) for part in parts for ids in part} for parts in (trained, held_out)]


@both
def test_what_is_held_out_is_not_trained_on_where_problems_repeat(script, capsys, batches):
    """A file held every problem ten times: those that were held out of it were trained on."""
    write_lines("data.jsonl", *[{"prompt": f"{a:02}+01=", "answer": f"{a + 1}"} for _ in range(10) for a in range(20)])
    run(script, capsys, num_steps=40, max_new_tokens=1, eval_every=40)
    trained, held_out = trained_and_held_out(batches)
    assert trained
    assert held_out
    assert not trained & held_out


def test_held_out_problems_that_are_trained_on_are_counted_in_a_line(script, capsys):
    """--eval-data was a copy of some of the training problems, and its reward was taken for generalisation."""
    lines = read_lines("data.jsonl")
    write_lines("held_out.jsonl", *lines[:3], {"prompt": "99+99=", "answer": "198"})
    said = run(script, capsys, num_steps=1, eval_data="held_out.jsonl")
    assert [line for line in said.splitlines() if "3 of 4" in line and "held-out" in line]
    write_lines("held_out.jsonl", {"prompt": "99+99=", "answer": "198"})
    said = run(script, capsys, num_steps=1, eval_data="held_out.jsonl", run_name="b")
    assert "held-out" not in said


def long_context(rope_type: str) -> None:
    factors = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4) if rope_type == "longrope" else dict(factor=4.0)
    scaling = dict(rope_type=rope_type, rope_theta=10000.0, original_max_position_embeddings=20, **factors)
    special = dict(vocab_size=15, bos_token_id=0, eos_token_id=0, pad_token_id=0, rope_parameters=scaling)
    if rope_type == "longrope":
        special |= dict(original_max_position_embeddings=20)
    make_model("phi3", torch.float32, **special).save_pretrained("model")


@both
def test_completions_that_would_cross_the_length_at_which_positions_are_rescaled_are_refused(script, capsys):
    """Phi-3 scales all positions anew once a text is longer than its first context: sampled and scored differed."""
    long_context("longrope")
    said = run(script, capsys, 2, max_new_tokens=40)
    assert "tokens; 1 to -20 fit beside --max-new-tokens" in said
    run(script, capsys, max_new_tokens=14, num_steps=2)
    assert max(gap for _, gap in curves("a")["policy/sampler_gap"]) < 1e-4


# ----- Rewards -----


class Enough(BaseException):
    """No Exception, as SystemExit is none."""


@both
@pytest.mark.parametrize("exits", [SystemExit, Enough])
@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_a_reward_that_exits_is_a_reward_that_fails(script, capsys, monkeypatch, exits, when):
    """Code that the reward ran called exit(): the run ended with exit code 0, nothing said and nothing saved."""
    run(script, capsys, run_name="whole", eval_every=2)
    calls, bad = [], {"training": 10 + 8 + 8 + 10 + 3, "evaluation": 10 + 8 + 8 + 3}[when]

    def exiting(completion: str, problem: dict) -> float:
        calls.append(completion)
        if len(calls) == bad:
            raise exits
        return variety(completion, problem)

    monkeypatch.setattr(script, "reward", exiting)
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        script.main(arguments(script, eval_every=2))
    assert not isinstance(raised.value, SystemExit)  # which would be exit code 0 and no traceback
    assert "exiting" in [frame.name for frame in raised.traceback] or raised.value.__cause__ is not None
    assert saved("a")["step"] == 2
    monkeypatch.setattr(script, "reward", variety)
    run(script, capsys, eval_every=2, resume="auto")
    assert_same_run("whole", "a")


@both
def test_ctrl_c_during_a_reward_is_no_failure_of_the_reward(script, monkeypatch):
    """In a notebook, `train` has no handler of signals: the interrupt reaches whoever called it."""

    def interrupted(completion: str, problem: dict) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "reward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.train(arguments(script))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_process_whose_reward_exits_says_so_and_does_not_end_with_0(folder, name):
    """A reward called sys.exit(): a shell script that waited for exit code 0 went on with the untrained model."""
    said = finish(start(command(name, "script.reward = lambda *x: sys.exit()", run_name="a")), code=1)
    assert "Traceback" in said
    assert "SystemExit" in said
    assert saved("a")["step"] == 0


@both
def test_a_reward_that_changes_the_folder_does_not_change_where_the_run_is_kept(script, capsys, monkeypatch, folder):
    """A reward ran code in a folder of its own: the curves ended there, and nothing could be saved at the end."""
    (folder / "sandbox").mkdir()
    monkeypatch.setattr(script, "reward", lambda *x: os.chdir(folder / "sandbox") or variety(*x))
    run(script, capsys, eval_every=2)
    os.chdir(folder)
    assert not [*Path("sandbox").iterdir()]
    assert saved("a")["step"] == 4
    assert [step for step, _ in curves("a")["reward/mean"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("script", "value"), [(grpo, 1e39), (grpo, -1e39), pytest.param(ppo, 1e39, marks=pytest.mark.slow), (ppo, 1e20)],
    indirect=["script"],
)  # fmt: skip
def test_a_reward_too_large_for_float32_fails_as_nan_does(script, monkeypatch, value):
    """A reward was finite as Python counts: its mean was inf, or its square, and no update was ever made."""
    monkeypatch.setattr(script, "reward", lambda completion, problem: value if "1" in completion else 0.0)
    with pytest.raises(ValueError, match=re.escape(f"the reward is {value}, not a number below 1e15, for '")):
        script.train(arguments(script))
    assert saved("a")["step"] == 0


# ----- The update -----


def test_the_kl_of_a_truncated_completion_counts_in_the_mean_of_its_group(script, monkeypatch, batches):
    """--mask-truncated with the KL in the reward: a truncated completion paid no KL, yet it stayed in its group."""
    monkeypatch.setattr(script, "reward", lambda completion, problem: 0.0)
    # One nat for every token that was scored.
    monkeypatch.setattr(script, "kl_estimate", lambda logprobs, *rest: (logprobs != 0).float())
    advantages, groups = script.group_advantages, []
    monkeypatch.setattr(script, "group_advantages", lambda x, *rest: groups.append(x) or advantages(x, *rest))
    options = dict(mask_truncated=True, kl_placement="reward", kl_estimator="k1", beta=1.0, max_new_tokens=12)
    script.train(arguments(script, num_steps=1, num_prompts=8, group_size=4, **options))
    (mask,) = [mask for prompts, _, mask in batches if len(prompts) == 8]
    lengths = mask.sum(1)
    assert min(lengths) < max(lengths) == 12  # some were truncated
    assert groups[-1].flatten().tolist() == (-lengths).tolist()


def test_without_a_gradient_the_weights_stay(script, capsys, monkeypatch):
    """--mask-truncated when every completion is truncated: AdamW's momentum moved the weights all the same."""
    options = dict(beta=0.0, mask_truncated=True, max_new_tokens=12, num_prompts=8, group_size=4)
    run(script, capsys, num_steps=2, **options)
    generate = script.generate_completions

    def endless(policy, prompt_ids, *args) -> tuple:
        ids, mask, logprobs = generate(policy, prompt_ids, *args)
        return (ids.where(ids != 0, 1) if len(prompt_ids) == 8 else ids), mask, logprobs  # not in the trial

    monkeypatch.setattr(script, "generate_completions", endless)
    said = run(script, capsys, num_steps=4, run_name="b", resume="runs/a/checkpoint.pt", **options)
    assert curves("b")["policy/grad_norm"] == [(2, 0.0), (3, 0.0)]
    before, after = weights("runs/a/policy"), weights("runs/b/policy")
    assert (weights("model")["lm_head.weight"] - before["lm_head.weight"]).abs().max() > 1e-4
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "not finite" not in said


@pytest.mark.parametrize("script", [ppo], indirect=True)
@pytest.mark.parametrize(("length", "gae_lambda"), [(1, 0.95), (6, 1.0)])
def test_the_explained_variance_is_0_where_there_is_none_to_explain(script, capsys, monkeypatch, length, gae_lambda):
    """Every completion earned the same, and the curve showed a prediction millions of times worse than a constant."""
    monkeypatch.setattr(script, "reward", lambda completion, problem: 1.0)
    run(script, capsys, num_steps=6, max_new_tokens=length, beta=0.0, gae_lambda=gae_lambda)
    assert [value for _, value in curves("a")["value/explained_variance"]] == [0.0] * 6


# ----- Flags -----


NO_EFFECT = [
    (grpo, dict(kl_importance_weight=True, kl_placement="reward"), "--kl-importance-weight", "--kl-placement"),
    (grpo, dict(kl_importance_weight=True, beta=0.0), "--kl-importance-weight", "--beta"),
    (grpo, dict(ref_refresh_every=1, beta=0.0), "--ref-refresh-every", "--beta"),
    (ppo, dict(early_stop_kl=0.1, update_epochs=1), "--early-stop-kl", "--update-epochs"),
    (ppo, dict(kl_placement="loss", beta=0.0), "--kl-placement", "--beta"),
]


@pytest.mark.parametrize(("script", "options", "one", "other"), NO_EFFECT, indirect=["script"])
def test_flags_that_have_no_effect_together_are_refused(script, capsys, options, one, other):
    """A flag was set and did nothing, because another one had switched off what it changes."""
    said = run(script, capsys, 2, **options)
    assert one in said
    assert other in said


@pytest.mark.parametrize("script", [grpo, ppo], indirect=True)
def test_the_tiny_model_is_known_by_any_name(script, capsys, monkeypatch):
    """--model tests/tiny was trained at a real model's learning rate, and its --data lost the test set beside it."""
    monkeypatch.chdir(ROOT)
    usual = script.check_args(script.Args())
    for tiny in ("tests/tiny", "./tests/tiny/", "tests/../tests/tiny"):
        args = script.check_args(script.Args(model=tiny, data=f"{tiny}/train.jsonl"))
        assert args.learning_rate == usual.learning_rate
        assert Path(args.eval_data).samefile(usual.eval_data)
    assert script.check_args(script.Args(data="tests/tiny/test.jsonl")).eval_data is None


@both
@pytest.mark.parametrize("options", [dict(group_size=2**31), dict(temperature=1e-40)], ids=str)
def test_numbers_at_the_edge_are_refused_in_a_sentence(script, capsys, options):
    """A number was accepted that no memory holds, or that float32 does not have."""
    (name,) = options
    assert f"--{name.replace('_', '-')}" in run(script, capsys, 2, **options)


@pytest.mark.parametrize("script", [ppo], indirect=True)
def test_one_completion_a_step_has_no_spread(script, capsys):
    """ppo.py with one completion a step: a warning, and a curve of NaN."""
    run(script, capsys, num_prompts=1, group_size=1, num_minibatches=1, num_steps=2)
    for tag, points in curves("a").items():
        assert all(value == value for _, value in points), tag


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_of_probability_0_is_sampled(dtype):
    """A random number just below 1 is 1 in float32, which is all that MPS has."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf], [0.0, -torch.inf, 1.0, 2.0], [-torch.inf, 0.0, 1.0, 2.0]])
    for uniform in (0.0, 1 - 2**-53):
        tokens, logprobs = grpo.sample_tokens(logits, torch.full((3,), uniform, dtype=torch.float64).to(dtype), 1.0)
        assert logprobs.isfinite().all(), tokens


# ----- A run that goes on: what it compares, what it writes -----


def moved() -> dict:
    Path("elsewhere").mkdir()
    shutil.move("model", "elsewhere/other")
    shutil.move("data.jsonl", "elsewhere/lines.jsonl")
    return dict(model="elsewhere/other", data="elsewhere/lines.jsonl")


SPELLINGS = {
    "slash": lambda: dict(model="model/"),
    "dot": lambda: dict(model="./model", data="./data.jsonl"),
    "absolute": lambda: dict(model=str(Path("model").resolve()), data=str(Path("data.jsonl").resolve())),
    "link": lambda: Path("link").symlink_to("model") or dict(model="link"),
    "moved": moved,
}


@both
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_run_goes_on_wherever_its_model_and_data_lie_now(script, capsys, spelling):
    """The folder was renamed, or --model was completed with a slash by the shell: the run could not be resumed."""
    run(script, capsys, num_steps=2)
    run(script, capsys, num_steps=3, resume="auto", **SPELLINGS[spelling]())
    assert saved("a")["step"] == 3


@both
def test_a_run_does_not_go_on_with_the_weights_of_another_model(script, capsys):
    """Other weights were put where the model was: the reference, and what was trained so far, are of the first one."""
    run(script, capsys, num_steps=2)
    other = AutoModelForCausalLM.from_pretrained("model")
    other.lm_head.weight.data += 0.1
    other.save_pretrained("model")
    assert "runs/a/checkpoint.pt cannot be loaded" in run(script, capsys, 2, resume="auto")


@both
def test_a_run_goes_on_although_the_chat_template_writes_the_date(script, capsys, monkeypatch):
    """Llama 3's template writes today's date into every prompt: no run could be resumed on the next day."""

    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz=None) -> datetime:
            return cls(2025, 1, cls.day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    template = "{{ strftime_now('%d') }}+{{ messages[0].content }}"
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained("model")
    run(script, capsys, num_steps=2)
    Clock.day = 2
    run(script, capsys, num_steps=3, resume="auto")
    assert saved("a")["step"] == 3


@both
def test_no_checkpoint_beyond_the_last_step_begins_a_run(script, capsys):
    """--num-steps counts from the beginning, also in a run that begins with a checkpoint: a model was promised that
    was never written."""
    run(script, capsys, num_steps=3)
    assert "step 3" in run(script, capsys, 2, num_steps=1, run_name="b", resume="runs/a/checkpoint.pt")
    assert "step 3" in run(script, capsys, 2, num_steps=2, resume="auto")
    assert not Path("runs/b").exists()
    assert saved("a")["step"] == 3


def assert_written_once(*steps: int) -> None:
    lines = read_lines("runs/a/completions.jsonl")
    keys = [(line["step"], line["kind"], line["prompt"]) for line in lines]
    assert len({*keys}) == len(keys)
    assert sorted({step for step, *_ in keys}) == [*steps]


@both
def test_a_finished_run_that_is_resumed_writes_no_evaluation_twice(script, capsys):
    """A finished run was resumed with --eval-every 1: its last evaluation stood in completions.jsonl twice."""
    run(script, capsys, eval_every=2)
    before = Path("runs/a/completions.jsonl").read_text()
    run(script, capsys, eval_every=1, resume="auto")
    assert_written_once(0, 2, 4)
    assert Path("runs/a/completions.jsonl").read_text() == before


@pytest.mark.slow
def test_a_run_that_was_killed_after_an_evaluation_writes_it_once(folder):
    """Killed between an evaluation and the next checkpoint, and resumed: its completions stood there twice."""
    killing = """
calls, good = iter(range(10**9)), script.reward
script.reward = lambda *x: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 10 + 8 + 10 + 3 else good(*x)
"""
    finish(start(command("grpo", killing, run_name="a", eval_every=1, save_every=4)), code=-signal.SIGKILL)
    assert {line["step"] for line in read_lines("runs/a/completions.jsonl")} == {0, 1}
    finish(start(command("grpo", run_name="a", eval_every=1, save_every=4, resume="auto")))
    assert_written_once(0, 1, 2, 3, 4)
    assert [step for step, _ in curves("a")["eval/greedy"]] == [0, 1, 2, 3, 4]


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes: writing more fails, as on a full disk, with OSError (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill_once_there(path: str, monkeypatch) -> None:
    """The disk is full from the moment that this file is there."""
    sync = os.fsync

    def filling(file: int) -> None:
        sync(file)
        if Path(path).exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    monkeypatch.setattr(os, "fsync", filling)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@both
@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_disk_that_is_full_once_the_checkpoint_is_written_does_not_end_the_run(script, capsys, monkeypatch, what):
    """The disk held the checkpoint but not the export beside it: what writes it has errors of its own."""
    options = dict(eval_every=0, save_every=2)
    run(script, capsys, run_name="whole", **options)
    size = Path("runs/whole/checkpoint.pt").stat().st_size + 1000
    if what == "tokenizer":
        tokenizer = json.loads(Path("model/tokenizer.json").read_text())
        tokenizer["model"]["vocab"] |= {f"word {i}": i for i in range(15, 40_000)}
        Path("model/tokenizer.json").write_text(json.dumps(tokenizer))
    with full_disk(size), monkeypatch.context() as patch:
        if what == "weights":
            fill_once_there("runs/a/checkpoint.aside", patch)
        said = run(script, capsys, 2, **options)
    assert said.count("runs/a could not be saved: ") == 3, said  # at steps 0 and 2, and the sentence at the end
    run(script, capsys, resume="auto", **options)
    assert saved("a")["step"] == 4


# ----- What is printed -----


def chatty(folder: Path, prompt: str) -> None:
    """A model over bytes that reads long texts, and a file of this prompt and some others."""
    special = dict(vocab_size=259, max_position_embeddings=512, bos_token_id=0, eos_token_id=2, pad_token_id=2)
    make_model("llama", torch.float32, **special).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_lines("data.jsonl", *[{"prompt": prompt + str(i), "answer": "1"} for i in range(12)])


@both
def test_control_characters_are_printed_escaped_and_kept_in_the_file(script, capsys, folder):
    """A prompt held an escape sequence: every evaluation cleared the screen."""
    prompt = "\x1b[2J\x07a\rb\x9bc\x7f\u202e"
    chatty(folder, prompt)
    said = run(script, capsys, eval_every=1, num_steps=2, max_new_tokens=60)
    assert all(character.isprintable() or character == "\n" for character in said), ascii(said)
    assert all(prompt in line["prompt"] for line in read_lines("runs/a/completions.jsonl"))


@both
def test_control_characters_in_an_error_are_printed_escaped(script, capsys):
    """A file's name, or a model's chat template, stands in the sentence that the run ends with."""
    said = run(script, capsys, 2, data="\x1b[2J.jsonl")
    assert all(character.isprintable() or character == "\n" for character in said), ascii(said)


@both
def test_a_long_prompt_leaves_room_for_what_is_said_of_it(script, capsys, folder):
    """Of an evaluation with a long prompt, the kind and the reward were cut off."""
    chatty(folder, "long " * 50)
    said = run(script, capsys, eval_every=1, num_steps=1, max_new_tokens=10)
    lines = [line for line in said.splitlines() if "long" in line]
    assert len(lines) == 4
    for line, kind in zip(lines, ["greedy", "sampled"] * 2, strict=True):
        assert f"{kind}, reward 0." in line
        assert len(line) < 200


# ----- Models -----


def family(name: str) -> None:
    """A tiny random model of this family, with more tokens than its tokenizer has."""
    sweep_families.make_model(name, 0.1, {}).save_pretrained("model")


@pytest.mark.parametrize("script", [ppo], indirect=True)
def test_a_model_without_a_transformer_of_its_own_gets_values_or_a_sentence(script, capsys):
    """The base model of Llama 4's text model is the language model itself: ppo.py took its logits for states."""
    family("llama4_text")
    code = script.main(arguments(script, num_steps=2))
    assert code in (0, 2)
    assert ("ppo.py: --model model cannot be trained here: " in capsys.readouterr().err) == (code == 2)


@both
@pytest.mark.parametrize(
    "name", ["dbrx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("xglm", "inkling2_text"))]
)
def test_a_model_that_cannot_compute_in_bfloat16_computes_in_float32_or_a_sentence_says_so(script, capsys, name):
    """A model mixed dtypes where the trial, which is in float32, did not: a traceback in the first step."""
    family(name)
    code = script.main(arguments(script, num_steps=1, dtype="bfloat16"))
    assert code in (0, 2)
    said = capsys.readouterr().err
    assert "float32" in said if code == 0 else "--dtype bfloat16" in said


RETURNS = [dict(output_router_logits=True), dict(return_dict=False), dict(output_attentions=True),
           dict(output_hidden_states=True), dict(use_cache=False)]  # fmt: skip


@both
@pytest.mark.parametrize("options", RETURNS, ids=str)
def test_what_a_config_says_that_forward_returns_changes_nothing(script, capsys, options):
    """Mixtral's own config may ask for the logits of its router: it was refused for sizes that did not match."""
    family("mixtral")
    run(script, capsys, num_steps=2, run_name="without")
    change_json("model/config.json", **options)
    run(script, capsys, num_steps=2)
    before, after = weights("runs/without/policy"), weights("runs/a/policy")
    assert all(torch.equal(after[name], value) for name, value in before.items())


@both
def test_a_trained_model_can_be_loaded_or_is_refused_before_training(script, capsys):
    """Of a model of images and text, the language model alone was saved, under a type that nothing loads."""
    config = CONFIG_MAPPING["mllama"](**sweep_families.tiny(CONFIG_MAPPING["mllama"], {}))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained("model")
    code = script.main(arguments(script, num_steps=1))
    assert code in (0, 2)
    if code == 0:
        AutoModelForCausalLM.from_pretrained("runs/a/policy")
    else:
        assert f"{script.__name__}.py: --model model" in capsys.readouterr().err
        assert not Path("runs/a").exists()


class Refusing(Graph):
    """A recording that fails in the midst of a step: nothing of it has been computed."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if len(self.calls) == 30:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().__torch_dispatch__(op, types, args, kwargs)


def test_a_step_that_cannot_be_recorded_is_computed_each_time(monkeypatch, capsys):
    """A model of experts reads on the host how many tokens each of them gets, which no recording can."""
    model = make_model("llama", torch.float32)
    expected = sample(model, max_new_tokens=16)[1]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: graph)
    source = inspect.getsource(grpo.Decoder)
    exec(source.replace("self.rows.is_cuda", "True"), patched := {**vars(grpo)})
    monkeypatch.setattr(grpo, "Decoder", patched["Decoder"])
    for _ in range(2):
        for one, other in zip(sample(model, max_new_tokens=16)[1], expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert capsys.readouterr().err.count("cannot be recorded") == 1


# ----- Several processes -----


def processes(*commands: list[str], number: int = 2) -> list[subprocess.Popen]:
    """The first of this number, as torchrun starts them, but each with a pipe and an exit code of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = [f"WORLD_SIZE={number}", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}"]
    return [start(["env", f"RANK={i}", f"LOCAL_RANK={i}", *common, *x]) for i, x in enumerate(commands)]


def assert_refused_once(started: list[subprocess.Popen]) -> str:
    """All end with exit code 2, and together they say one sentence, which is returned."""
    said = [finish(process, code=2) for process in started]
    sentences = [line for line in "".join(said).splitlines() if line.startswith("grpo.py: ")]
    assert len(sentences) == 1, said
    assert "Traceback" not in "".join(said)
    return sentences[0]


def other_problems() -> dict:
    lines = read_lines("data.jsonl")
    write_lines("other/data.jsonl", *[line | dict(prompt="1" + line["prompt"]) for line in lines])
    return dict(data="other/data.jsonl")


def other_weights() -> dict:
    model = AutoModelForCausalLM.from_pretrained("model")
    model.lm_head.weight.data += 0.01
    model.save_pretrained("other/model")
    AutoTokenizer.from_pretrained("model").save_pretrained("other/model")
    return dict(model="other/model")


DIFFERENT = {"problems": other_problems, "weights": other_weights, "arguments": lambda: dict(temperature=0.5)}


@pytest.mark.slow
@pytest.mark.parametrize("what", DIFFERENT)
def test_processes_that_were_given_different_things_are_refused(folder, what):
    """Two hosts had different files under one name: each process scored the other's completions behind its own
    prompts."""
    Path("other").mkdir()
    different = DIFFERENT[what]()
    sentence = assert_refused_once(processes(command("grpo", run_name="a"), command("grpo", run_name="a", **different)))
    assert "process" in sentence
    assert not Path("runs/a/checkpoint.pt").exists()


@pytest.mark.slow
def test_what_one_process_finds_wrong_all_processes_end_with(folder):
    """The name of a run was taken: besides the sentence there was a traceback of the process that does not write."""
    Path("runs/a").mkdir(parents=True)
    again = command("grpo", run_name="a")
    assert "cannot write the run to runs/a" in assert_refused_once(processes(again, again))


@pytest.mark.slow
def test_what_only_the_second_process_finds_wrong_is_said_once_by_all(folder):
    """A host lacked a file: the process there said so, and the others failed for reasons of their own."""
    lacking = command("grpo", run_name="a", data="nothing.jsonl")
    assert "cannot read nothing.jsonl" in assert_refused_once(processes(command("grpo", run_name="a"), lacking))


@pytest.mark.slow
def test_all_processes_know_the_name_of_the_run(folder):
    """A run without a name was trained by two processes: in one, `train` returned a folder that is not there."""
    returns = """
train = script.train
script.train = lambda *args: print("FOLDER", train(*args))
"""
    run = [x for x in command("grpo", returns, num_steps=1) if "run-name" not in x]
    folders = [re.findall("FOLDER (.*)", finish(process)) for process in processes(run, run)]
    assert folders[0] == folders[1]
    assert Path(folders[0][0], "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_a_model_whose_layers_share_weights_is_trained_by_several_processes_or_refused(folder, name):
    """Zamba's layers hold layers that are shared: sharding them one by one was a TypeError."""
    family(name)
    each = command("grpo", run_name="a", num_steps=2)
    started = processes(each, each)
    said = "".join(process.communicate(timeout=300)[0] for process in started)
    assert {process.returncode for process in started} in ({0}, {2}), said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_the_others_says_so_and_can_be_ended(folder, number):
    """The variables of torchrun were left in a shell: nothing was printed, and Ctrl-C did nothing."""
    (process,) = processes(command("grpo", run_name="a"))
    with process:
        time.sleep(15)
        assert process.poll() is None
        process.send_signal(number)
        said, _ = process.communicate(timeout=10)
    assert process.returncode != 0
    assert "127.0.0.1" in said
    assert "waiting" in said


@pytest.mark.slow
def test_a_process_gives_up_waiting_for_the_others_in_a_sentence(folder):
    """It waited for two hours for a process that had never been started."""
    soon = """
from datetime import timedelta
script.timedelta = lambda **time: timedelta(seconds=3) if timedelta(**time) < timedelta(hours=1) else timedelta(**time)
"""
    (process,) = processes(command("grpo", soon, run_name="a"))
    with process:
        said, _ = process.communicate(timeout=40)
    assert process.returncode == 2, said
    assert "grpo.py: cannot join the other processes, which torchrun starts: " in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_reward_that_exits_in_one_process_ends_all(folder):
    """sys.exit() in the reward of one of two processes: the other one ended in a traceback of gloo."""
    exits = """
import itertools
calls, good = itertools.count(), script.reward
script.reward = lambda *x: sys.exit() if os.environ["RANK"] == "1" and next(calls) == 10 else good(*x)
"""
    each = command("grpo", exits, run_name="a")
    first, second = (finish(process, code) for process, code in zip(processes(each, each), (2, 1), strict=True))
    assert "the reward failed in another process" in first
    assert "SystemExit" in second
    assert "gloo" not in first + second
    assert saved("a")["step"] == 2


SLOW_STEP = "script.reward = lambda *x: time.sleep(5) or 0.0"  # 4 of them in each of two processes


@pytest.mark.slow
def test_sigterm_under_torchrun_names_its_patience(folder):
    """torchrun kills its processes 30 seconds after it was told to end: the step had not been saved."""
    run = command("grpo", SLOW_STEP, processes=2, run_name="a")
    with start(run) as process:
        while not [*Path("runs").glob("a/events*")]:
            time.sleep(0.1)
            assert process.poll() is None
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=100)
    assert "--shutdown-timeout" in said
    assert saved("a")["step"] == 1


# ----- run.sh -----


@pytest.fixture
def installed(tmp_path) -> Path:
    """A copy of run.sh in p/, set up already, whose Python prints its arguments."""
    (tmp_path / "p/.venv/bin").mkdir(parents=True)
    for place in ("p/run.sh", "p/requirements.txt", "p/.venv/requirements.txt"):
        shutil.copy(ROOT / Path(place).name, tmp_path / place)
    (tmp_path / "p/.venv/bin/python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "p/.venv/bin/python").chmod(0o755)
    (tmp_path / "q").mkdir()
    (tmp_path / "q/run.sh").symlink_to("../p/run.sh")
    (tmp_path / "r").symlink_to("q/run.sh")
    return tmp_path


@pytest.mark.parametrize("path", ["p/run.sh", "q/run.sh", "r"])
@pytest.mark.parametrize("cdpath", [None, "."])
def test_run_sh_finds_its_folder(installed, path, cdpath):
    """CDPATH was set, or run.sh was called through a link in a folder of programs: another .venv was set up."""
    environment = os.environ | dict(PYTHON="false") | (dict(CDPATH=cdpath) if cdpath else {})
    script = path if "/" in path else f"./{path}"
    options = dict(cwd=installed, env=environment, capture_output=True, text=True)
    shown = subprocess.run([script, "grpo", "--seed", "2"], **options)
    assert shown.stdout == f"{installed}/p/grpo.py --seed 2\n", shown.stderr
    assert sorted(x.name for x in installed.iterdir()) == ["p", "q", "r"]
    assert [x.name for x in (installed / "q").iterdir()] == ["run.sh"]
