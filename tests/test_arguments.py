# SPDX-License-Identifier: MIT
"""Whatever a user, a data file or a model folder gets wrong is told in one sentence with exit code 2, without a
traceback, and before what takes longer is loaded: first the flags, then the tokenizer, the config and the data, then
the weights. And nothing that they hold is run as code.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import typing
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from hypothesis import given
from hypothesis import strategies as st
from test_data_and_models import CHATML, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import grpo
import ppo
from helpers.runs import TWINS
from helpers.tiny_models import make_model

ROOT = Path(__file__).parents[1]
PICKY = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user\nfirst') }}{% endif %}" + CHATML
CPU = torch.device("cpu")
FOLDERS = {"--model": "models/good", "--data": "good.jsonl"}


class Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("boom"),)


# ----- The files of data, as (file, bytes), and the model folders, each a change of a good one -----

LINE = b'{"question": "one and one?", "answer": "2"}\n'
DATA = {
    "good": b"".join(LINE.replace(b"one?", b"%d?" % i) for i in range(8)),
    "chat": b'{"prompt": [{"role": "user", "content": "one and one?"}], "answer": "2"}\n' * 8,
    "empty": b"",
    "blank": b"\n \n\r\n",
    "three": b"".join(LINE.replace(b"one?", b"%d?" % i) for i in range(3)),
    "cut": LINE * 3 + b'{"question": "one and',
    "list": LINE + b"\n[1, 2]",
    "utf8": LINE * 4 + b'{"question": "\xff?", "answer": "2"}',
    "utf16": LINE.decode().encode("utf-16"),
    "no_answer": LINE + b'{"question": "one and one?"}',
    "no_question": LINE + b'{"answer": "2"}',
    "number_answer": LINE + b'{"question": "one and one?", "answer": 2}',
    "word_answer": LINE + b'{"question": "one and one?", "answer": "two"}',
    "null_answer": LINE + b'{"question": "one and one?", "answer": null}',
    "number_question": LINE + b'{"question": 3, "answer": "2"}',
    "null_prompt": LINE * 3 + b'{"prompt": null, "answer": "2"}',
    "object_prompt": LINE * 3 + b'{"prompt": {"role": "user", "content": "x"}, "answer": "2"}',
    "texts_prompt": LINE * 3 + b'{"prompt": ["one and one?"], "answer": "2"}',
    "no_turn": LINE * 3 + b'{"prompt": [], "answer": "2"}',
    "no_content": LINE * 3 + b'{"prompt": [{"role": "user"}], "answer": "2"}',
    "null_content": LINE * 3 + b'{"prompt": [{"role": "user", "content": null}], "answer": "2"}',
    "surrogate": LINE * 3 + b'{"prompt": "\\ud800", "answer": "2"}',
    "deep": LINE + b"[" * 100_000,
    "nothing_asked": LINE * 7 + b'{"prompt": "", "answer": "2"}',
    "long": LINE * 3 + b'{"prompt": "' + b"long " * 30 + b'", "answer": "2"}\n' + LINE * 3,
    "system": b'{"prompt": [{"role": "system", "content": "x"}], "answer": "2"}\n' * 8,
}


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def no_end(folder: Path) -> None:
    change_json(folder / "config.json", eos_token_id=None)
    change_json(folder / "generation_config.json", eos_token_id=None)
    change_json(folder / "tokenizer_config.json", eos_token=None)


def text_end(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id="end")


def no_text(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


def plain(folder: Path) -> None:
    change_json(folder / "tokenizer.json", post_processor=None)


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, folder / "pytorch_model.bin")


def code(name: str, **auto_map: str):
    """Code beside the model, named in a file of its; the model type is known or not."""

    def change(folder: Path) -> None:
        (folder / "own.py").write_text("from pathlib import Path\nPath('boom').touch()\nclass Own: pass\n")
        change_json(folder / name, auto_map=auto_map)

    return change


def unknown_code(folder: Path) -> None:
    code("config.json", AutoConfig="own.Own", AutoModelForCausalLM="own.Own")(folder)
    change_json(folder / "config.json", model_type="own")


def fewer_ids(folder: Path) -> None:
    make_model("llama", torch.float32, vocab_size=99, max_position_embeddings=128).save_pretrained(folder)


MODELS = {
    "good": lambda folder: None,
    "template": lambda folder: (folder / "chat_template.jinja").write_text(CHATML),
    "picky": lambda folder: (folder / "chat_template.jinja").write_text(PICKY),
    "broken_template": lambda folder: (folder / "chat_template.jinja").write_text("{% for"),
    "adding_template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] + 1 }}"),
    "no_config": lambda folder: (folder / "config.json").unlink(),
    "broken_config": lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
    "list_config": lambda folder: (folder / "config.json").write_text("[]"),
    "unknown_type": lambda folder: change_json(folder / "config.json", model_type="nothing_of_the_kind"),
    "wrong_config": lambda folder: change_json(folder / "config.json", hidden_size="many"),
    "other_config": lambda folder: change_json(folder / "config.json", intermediate_size=40),
    "no_tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "broken_tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "no_end": no_end,
    "text_end": text_end,
    "no_text": no_text,
    "plain": plain,
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut_weights": cut_weights,
    "no_layer": lambda folder: change_json(folder / "config.json", num_hidden_layers=3),
    "fewer_ids": fewer_ids,
    "pickled_weights": pickled_weights,
    "code_of_unknown": unknown_code,
    "code_of_config": code("config.json", AutoConfig="own.Own", AutoModelForCausalLM="own.Own"),
    "code_of_tokenizer": code("tokenizer_config.json", AutoTokenizer=["own.Own", "own.Own"]),
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with all data files and model folders."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, content in DATA.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    make_model("llama", torch.float32, vocab_size=259, max_position_embeddings=128).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for name, change in MODELS.items():
        shutil.copytree(folder / "base", folder / "models" / name)
        change(folder / "models" / name)
    (folder / "models/empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def workplace(inputs, tmp_path, monkeypatch) -> None:
    """Every test is in a folder of its own, beside the same inputs."""
    for path in [*inputs.glob("*.jsonl"), inputs / "models"]:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def outcome(script, flags: str, capsys) -> tuple[int, list[str]]:
    """What the command would return, and the lines that it would write to stderr."""
    try:
        exit_code = script.main(tyro.cli(script.Args, args=shlex.split(flags)))
    except SystemExit as error:  # of tyro
        exit_code = error.code
    return exit_code, capsys.readouterr().err.splitlines()


def refusal(script, flags: str, capsys) -> str:
    """What the command would end with: one sentence, although another package's in it may have lines of its own."""
    exit_code, lines = outcome(script, flags, capsys)
    assert exit_code == 2, lines
    starts = [i for i, line in enumerate(lines) if line.startswith(f"{script.__name__}.py: ")]
    assert len(starts) == 1, lines
    assert "Traceback (most recent call last):" not in lines
    assert not Path("runs/new").exists()
    return " ".join(lines[starts[0] :])


@pytest.fixture
def loaded(monkeypatch) -> list:
    """What was asked for: "data", "tokenizer", "config", "weights"."""
    asked = []

    def watch(place, name: str, what: str) -> None:
        load = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *x, **y: asked.append(what) or load(*x, **y))

    watch(grpo, "read_problems", "data")
    watch(ppo, "read_problems", "data")
    watch(AutoTokenizer, "from_pretrained", "tokenizer")
    watch(AutoConfig, "from_pretrained", "config")
    watch(AutoModelForCausalLM, "from_pretrained", "weights")
    return asked


def for_both(*cases: tuple) -> pytest.MarkDecorator:
    """A test for every case of a table, of which (script, ...) is for one script, and else for both."""
    rows = []
    for case in cases:
        if case[0] in (grpo, ppo):
            rows.append(pytest.param(*case, id=f"{case[0].__name__} {case[1][:60]}"))
        else:
            rows.append(pytest.param(grpo, *case, id=f"grpo {case[0][:60]}"))
            rows.append(pytest.param(ppo, *case, id=f"ppo {case[0][:60]}", marks=pytest.mark.slow))
    return pytest.mark.parametrize(("script", "flags", "says"), rows)


# ----- Flags -----


@for_both(
    ("--no-such-flag 1", "--no-such-flag"),
    ("--seed x", "--seed"),
    ("--num-prompts 2.5", "--num-prompts"),
    ("--num-prompts", "--num-prompts"),
    ("--kl-estimator k4", "--kl-estimator"),
    ("--loss-average mean", "--loss-average"),
    ("--device tpu", "--device"),
    ("--dtype float16", "--dtype"),
    ("--share-prompt maybe", "maybe"),
    ("loose", "loose"),
    (grpo, "--gamma 1", "--gamma"),
    (grpo, "--process-supervision", "--process-supervision"),
    (ppo, "--mask-truncated", "--mask-truncated"),
)
def test_unknown_flags_and_values_are_named(script, flags, says, capsys):
    exit_code, lines = outcome(script, flags, capsys)
    assert exit_code == 2
    assert says in "".join(lines)


@for_both(
    ("--temperature 0", "--temperature must be at least 0.001, got 0.0"),
    ("--temperature inf", "--temperature must be at most 2147483647, got inf"),
    ("--beta -1", "--beta must be at least 0, got -1.0"),
    ("--beta nan", "--beta must be at least 0, got nan"),
    ("--clip-eps nan", "--clip-eps must be positive, got nan"),
    ("--clip-eps 1.5", "--clip-eps must be at most 1, got 1.5"),
    ("--clip-eps-high 0", "--clip-eps-high must be positive"),
    ("--learning-rate -1e-6", "--learning-rate must be positive"),
    ("--max-grad-norm 0", "--max-grad-norm must be positive"),
    ("--num-steps 0", "--num-steps must be positive, got 0"),
    ("--update-epochs 0", "--update-epochs must be positive"),
    ("--num-minibatches 0", "--num-minibatches must be positive"),
    ("--num-prompts -4", "--num-prompts must be positive"),
    ("--max-new-tokens 0", "--max-new-tokens must be positive"),
    ("--micro-batch-tokens 0", "--micro-batch-tokens must be positive"),
    ("--seed -1", "--seed must be at least 0"),
    ("--seed 99999999999999999999", "--seed must be at most"),
    ("--save-every -1", "--save-every must be at least 0"),
    ("--group-size 0", "--group-size must be "),
    ("--group-size 99999999999", "--group-size must be at most 65536"),
    ("--num-minibatches 7", "must be a multiple of 7, the number of processes times --num-minibatches"),
    ("--num-prompts 2 --num-minibatches 4", "--num-prompts 2 must be a multiple of 4"),
    ("--resume auto", "--resume auto needs the --run-name"),
    ("--run-name ''", "--run-name must be the name of a folder in runs/, got ''"),
    ("--run-name ..", "--run-name must be the name of a folder in runs/, got '..'"),
    ("--run-name .", "--run-name must be the name"),
    ("--run-name a/b", "--run-name must be the name"),
    ("--run-name /tmp", "--run-name must be the name"),
    ("--run-name 'a\nb'", "--run-name must be the name"),
    ("--run-name 'a\udcff'", r"--run-name must be the name of a folder in runs/, got 'a\udcff'"),
    (grpo, "--group-size 1", "--group-size must be at least 2, got 1"),
    (grpo, "--ref-refresh-every -1", "--ref-refresh-every must be at least 0"),
    (ppo, "--gamma 1.01", "--gamma must be at most 1"),
    (ppo, "--gae-lambda nan", "--gae-lambda must be at least 0, got nan"),
    (ppo, "--gae-lambda -0.1", "--gae-lambda must be at least 0"),
    (ppo, "--value-clip-eps 0", "--value-clip-eps must be positive"),
    (ppo, "--value-learning-rate inf", "--value-learning-rate must be at most"),
    (ppo, "--value-warmup-steps -1", "--value-warmup-steps must be at least 0"),
    (ppo, "--adaptive-kl-target 0", "--adaptive-kl-target must be positive"),
    (ppo, "--adaptive-kl-target 6 --beta 0", "--adaptive-kl-target has no effect with --beta 0"),
    (ppo, "--penalty-kl-target nan", "--penalty-kl-target must be positive"),
    (ppo, "--early-stop-kl -1", "--early-stop-kl must be positive"),
    (ppo, "--entropy-coef -1", "--entropy-coef must be at least 0"),
)
def test_flags_that_cannot_work_are_refused_before_anything_is_loaded(script, flags, says, capsys, loaded):
    assert says in refusal(script, flags, capsys)
    assert not loaded


@TWINS
def test_what_depends_on_other_flags_is_filled_in(script):
    def filled(**args) -> dict:
        before = script.Args(**args)
        after = vars(script.check_args(before))
        return {name: value for name, value in after.items() if value != getattr(before, name)}

    tiny, other = {"learning_rate": 5e-4}, {"learning_rate": 1e-6}
    if script is ppo:
        tiny, other = tiny | {"value_learning_rate": 1e-3}, other | {"value_learning_rate": 1e-5}
    test_set = {"eval_data": str(script.TINY / "test.jsonl")}
    assert filled() == tiny | test_set
    assert filled(model="x") == other | test_set
    assert filled(data="x") == tiny
    assert filled(data="x", eval_data="y") == tiny
    assert filled(eval_data="y") == tiny
    assert filled(model="x", eval_data="y", **dict.fromkeys(tiny, 0.5)) == {}
    os.chdir(ROOT)  # however they are spelled
    for spelled in ("tests/tiny", "./tests/tiny/", "tests/../tests/tiny", str(ROOT / "tests/tiny")):
        assert filled(model=spelled, data=f"{spelled}/train.jsonl") == tiny | test_set


@for_both(("--device cuda", "--device cuda: not available"), ("--device mps", "--device mps: not available"))
def test_a_device_that_is_not_there_is_refused(script, flags, says, capsys, loaded):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there may be one")
    assert says in refusal(script, flags, capsys)
    assert not loaded


@TWINS
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (dict(RANK="0", WORLD_SIZE="2"), "environment variable MASTER_ADDR expected"),
        (dict(MASTER_ADDR="localhost"), "environment variable RANK expected"),
        (dict(MASTER_ADDR="localhost", MASTER_PORT="x", RANK="0", WORLD_SIZE="2"), "'x'"),
    ],
)
def test_launch_variables_that_are_set_by_half_are_refused(script, variables, says, capsys, loaded, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = refusal(script, "--device cpu", capsys)
    assert "cannot join the other processes, which torchrun starts: " in said
    assert says in said
    assert not loaded


@TWINS
def test_one_process_that_is_called_the_first_of_one_works_alone(script, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert script.start(script.Args(device="cpu")).type == "cpu"
    assert script.world() == (0, 1)


# ----- Data and models -----

SMALL = "--num-prompts 2 --max-new-tokens 4 --num-steps 1 --eval-every 0 --device cpu"


@for_both(
    ("--data nothing.jsonl", "cannot read nothing.jsonl: [Errno 2] No such file"),
    ("--data models", "cannot read models: [Errno 21] Is a directory"),
    ("--data good.jsonl --eval-data nothing.jsonl", "cannot read nothing.jsonl"),
    ("--data good.jsonl --eval-data empty.jsonl", "empty.jsonl is empty"),
    ("--data empty.jsonl", "empty.jsonl is empty: it must hold one JSON object per line"),
    ("--data blank.jsonl", "blank.jsonl is empty"),
    ("--data cut.jsonl", "cut.jsonl, line 4: Unterminated string"),
    ("--data list.jsonl", "list.jsonl, line 3: list indices must be integers"),
    ("--data utf8.jsonl", "utf8.jsonl, line 5: 'utf-8' codec can't decode byte 0xff in position 14"),
    ("--data utf16.jsonl", "utf16.jsonl, line 1: 'utf-8' codec can't decode byte 0xff"),
    ("--data no_answer.jsonl", "no_answer.jsonl, line 2: the field 'answer' is missing"),
    ("--data no_question.jsonl", "no_question.jsonl, line 2: the field 'question' is missing"),
    ("--data number_answer.jsonl", 'number_answer.jsonl, line 2: "answer" must be a string that ends in one number'),
    ("--data word_answer.jsonl", 'word_answer.jsonl, line 2: "answer" must be a string'),
    ("--data null_answer.jsonl", 'null_answer.jsonl, line 2: "answer" must be a string'),
    ("--data number_question.jsonl", "number_question.jsonl, line 2: unsupported operand"),
    ("--data deep.jsonl", "deep.jsonl, line 2: maximum recursion depth"),
    ("--data three.jsonl --num-prompts 4", "--num-prompts 4 is more than the 2 training problems"),
    ("--data three.jsonl --eval-data good.jsonl --num-prompts 4", "--num-prompts 4 is more than the 3 training"),
)
def test_bad_data_are_refused_before_weights_are_loaded(script, flags, says, capsys, loaded):
    assert says in refusal(script, f"{SMALL} --run-name new --model models/good {flags}", capsys)
    assert {*loaded} == {"tokenizer", "config", "data"}


TYPES = 'a prompt must be a text or a list of {"role": text, "content": text}'


@for_both(
    ("--data null_prompt.jsonl", f"null_prompt.jsonl, line 4: {TYPES}"),
    ("--data chat.jsonl", "chat.jsonl, line 1: Cannot use chat template functions because tokenizer.chat_template"),
    ("--data null_prompt.jsonl --model models/template", f"null_prompt.jsonl, line 4: {TYPES}"),
    ("--data object_prompt.jsonl --model models/template", f"object_prompt.jsonl, line 4: {TYPES}"),
    ("--data texts_prompt.jsonl --model models/template", f"texts_prompt.jsonl, line 4: {TYPES}"),
    ("--data no_turn.jsonl --model models/template", f"no_turn.jsonl, line 4: {TYPES}"),
    ("--data no_content.jsonl --model models/template", f"no_content.jsonl, line 4: {TYPES}"),
    ("--data null_content.jsonl --model models/template", f"null_content.jsonl, line 4: {TYPES}"),
    ("--data surrogate.jsonl", "surrogate.jsonl, line 4: "),
    ("--data surrogate.jsonl --model models/template", "surrogate.jsonl, line 4: "),
    ("--data long.jsonl", "long.jsonl, line 4: it has 151 tokens; 1 to 124 fit beside --max-new-tokens"),
    ("--data good.jsonl --max-new-tokens 500", "good.jsonl, line 1: it has 74 tokens; 1 to -372 fit"),
    ("--data good.jsonl --eval-data long.jsonl", "long.jsonl, line 4: it has 151 tokens"),
    ("--data nothing_asked.jsonl --model models/plain", "nothing_asked.jsonl, line 8: it has 0 tokens"),
    ("--data system.jsonl --model models/picky", "system.jsonl, line 1: user first"),
    ("--model models/broken_template", "good.jsonl, line 1: "),
    ("--model models/adding_template", "good.jsonl, line 1: "),
    ("--model models/empty", "--model models/empty is neither a model folder"),
    ("--model models/nowhere", "--model models/nowhere is neither a model folder nor a reachable hub id"),
    ("--model nobody/nothing", "--model nobody/nothing is neither a model folder nor a reachable hub id"),
    ("--model ../..", "--model ../.. is neither a model folder"),
    ("--model good.jsonl", "--model good.jsonl is neither a model folder"),
    ("--model ''", "--model is neither a model folder"),
    ("--model models/no_config", "--model models/no_config is neither a model folder"),
    ("--model models/broken_config", "is not a valid JSON file"),
    ("--model models/list_config", "--model models/list_config is neither a model folder"),
    ("--model models/unknown_type", "`nothing_of_the_kind`"),
    ("--model models/wrong_config", "'hidden_size' expected int"),
    ("--model models/no_tokenizer", "--model models/no_tokenizer is neither a model folder"),
    ("--model models/broken_tokenizer", "--model models/broken_tokenizer is neither a model folder"),
    ("--model models/text_end", "--model models/text_end"),
    ("--model models/no_end", "--model models/no_end: it has no EOS token, so its completions could never end"),
    ("--model models/fewer_ids", "good.jsonl, line 1: the tokenizer has token "),
    ("--model models/no_text", "--model models/no_text"),
)
def test_bad_prompts_and_models_are_refused_before_weights_are_loaded(script, flags, says, capsys, loaded):
    defaults = " ".join(f"{flag} {value}" for flag, value in FOLDERS.items() if flag not in flags.split())
    assert says in refusal(script, f"{SMALL} --run-name new {defaults} {flags}", capsys)
    assert "tokenizer" in loaded
    assert "weights" not in loaded


@for_both(
    ("--model models/no_weights", "models/no_weights cannot be loaded: Error no file named model.safetensors"),
    ("--model models/cut_weights", "models/cut_weights cannot be loaded: Error while deserializing header"),
    ("--model models/no_layer", "it has no weights, or none of the right shape, for model.layers.2."),
    ("--model models/other_config", "it has no weights, or none of the right shape, for model.layers.0.mlp.down_proj"),
        ("--model models/pickled_weights", "models/pickled_weights cannot be loaded: Weights only load failed."),
    (f"--model models/good --run-name {'x' * 300}", "cannot write the run to runs/xxx"),
    ("--model models/good --run-name file --resume auto", "cannot write the run to runs/file (to resume a run"),
    (f"--model models/good --run-name {'x' * 300} --resume auto", "runs/xxx"),
    (f"--model models/good --resume {'x' * 300}", f"{'x' * 300} cannot be loaded: [Errno 36] File name too long"),
    ("--model models/good --resume nowhere", "nowhere cannot be loaded: [Errno 2] No such file"),
)
def test_bad_weights_and_run_folders_are_refused(script, flags, says, capsys, loaded):
    name = "" if "--run-name" in flags else "--run-name new"
    Path("runs").mkdir()
    Path("runs/file").touch()
    assert says in refusal(script, f"{SMALL} --data good.jsonl {name} {flags}", capsys)
    assert "weights" in loaded


@TWINS
def test_what_just_fits_the_model_is_taken(script, monkeypatch):
    Path("x.jsonl").write_bytes(LINE * 3 + b'{"prompt": "' + b"x" * 123 + b'", "answer": "2"}')
    config = AutoConfig.from_pretrained("models/good")
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda model, **options: config)
    args = script.Args(model="models/good", data="x.jsonl", eval_data="good.jsonl", num_prompts=4, max_new_tokens=4)
    _, _, problems, _ = script.load_problems(args, CPU)
    assert [len(ids) for ids, _ in problems][3] == 124
    with pytest.raises(script.UserError, match=r"x.jsonl, line 4: it has 124 tokens; 1 to 123 fit"):
        script.load_problems(replace(args, max_new_tokens=5), CPU)
    config.vocab_size = max(max(ids) for ids, _ in problems) + 1
    script.load_problems(args, CPU)
    config.vocab_size -= 1
    with pytest.raises(script.UserError, match=f"has token {config.vocab_size}, the model only {config.vocab_size} "):
        script.load_problems(args, CPU)


@TWINS
def test_quantised_weights_are_refused(script, monkeypatch, capsys):
    load = AutoModelForCausalLM.from_pretrained

    def load_quantised(*args, **options) -> tuple:
        model, info = load(*args, **options)
        model.lm_head.weight.data = model.lm_head.weight.data.to(torch.bfloat16)  # as if it were
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_quantised)
    said = refusal(script, f"{SMALL} --data good.jsonl --model models/good --run-name new", capsys)
    assert "models/good cannot be loaded: its weights are quantised; to train, they must be floating-point" in said


@TWINS
def test_every_token_that_ends_a_completion_is_found(script):
    shutil.copytree("models/good", "own")  # its tokenizer ends with 2
    for ends, expected in (([5, 3], [1, 2, 3, 5]), (4, [1, 2, 4]), (None, [1, 2])):
        change_json(Path("own/config.json"), eos_token_id=1)
        change_json(Path("own/generation_config.json"), eos_token_id=ends)
        args = script.check_args(script.Args(model="own", data="good.jsonl", num_prompts=1, max_new_tokens=4))
        assert script.load_problems(args, CPU)[1].tolist() == expected
        policy = script.load_policy("own", CPU)
        assert not policy.training
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


@TWINS
def test_a_file_may_have_a_name_that_is_no_utf_8(script, capsys):
    Path("\udcff.jsonl").write_bytes(DATA["good"])
    exit_code, lines = outcome(script, f"{SMALL} --model models/good --data \udcff.jsonl", capsys)
    assert exit_code == 0, lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("grpo", "--model models/cut_weights --data good.jsonl", "grpo.py: --model models/cut_weights cannot"),
        ("grpo", "--clip-eps nan", "grpo.py: --clip-eps must be positive, got nan"),
        ("ppo", "--kl-estimator k4", "--kl-estimator"),
        ("ppo", "--model models/good --data utf8.jsonl", "ppo.py: utf8.jsonl, line 5: "),
    ],
)
def test_a_real_process_ends_with_the_sentence_and_exit_code_2(name, flags, says):
    command = [sys.executable, str(ROOT / f"{name}.py"), *SMALL.split(), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@TWINS
def test_a_fault_of_the_script_is_not_hidden(script, monkeypatch):
    monkeypatch.setattr(script, "train", lambda args, stop: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        script.main(script.Args())


# ----- Runs and checkpoints -----


@pytest.fixture(scope="session")
def first_runs(inputs) -> Path:
    """A folder runs/ with a run of one step by each script."""
    before = os.getcwd()
    os.chdir(inputs)
    for script in (grpo, ppo):
        flags = f"{SMALL} --model models/good --data good.jsonl --dtype bfloat16 --run-name {script.__name__}"
        assert script.main(tyro.cli(script.Args, args=flags.split())) == 0
    os.chdir(before)
    return inputs / "runs"


@pytest.fixture
def again(first_runs) -> str:
    """The flags of these runs, which are copied here."""
    shutil.copytree(first_runs, "runs")
    return f"{SMALL} --model models/good --data good.jsonl --dtype bfloat16"


@TWINS
class TestRuns:
    def test_a_folder_of_another_run_is_refused(self, script, again, capsys):
        def state() -> dict:
            stats = {path: path.stat() for path in Path("runs").rglob("*")}
            return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}

        before = state()
        for resume in ("", f"--resume runs/{script.__name__}/checkpoint.pt"):
            said = refusal(script, f"{again} --run-name {script.__name__} {resume}", capsys)
            folder = f"runs/{script.__name__}"
            assert f"cannot write the run to {folder} (to resume a run: --resume auto): [Errno 17] File exists" in said
            assert state() == before

    def test_every_changed_argument_is_listed(self, script, again, capsys):
        changed = f"{again} --seed 7 --learning-rate 0.5 --temperature 0.9 --max-new-tokens 3 --kl-estimator k2"
        changed += " --eval-data good.jsonl"  # what was held out would be trained on
        said = refusal(script, f"{changed} --run-name {script.__name__} --resume auto", capsys)
        assert "/checkpoint.pt cannot be loaded: it belongs to a run with other arguments: --" in said
        flags, *hashes = said.split("other arguments: ")[1].split(", hash of ")
        assert set(f", {flags}".split(", --")[1:]) == {
            "max-new-tokens was 4, is 3", "temperature was 1.0, is 0.9", "learning-rate was 1e-06, is 0.5",
            f"kl-estimator was {script.Args.kl_estimator}, is k2", "seed was 1, is 7",
        }  # fmt: skip
        assert [text.partition(" was ")[0] for text in hashes] == ["the problems", "the held-out problems"]
        before, now = hashes[0].partition(" was ")[2].split(", is ")
        assert before != now

    def test_other_problems_under_the_same_name_are_refused(self, script, again, capsys):
        Path("good.jsonl").unlink()
        Path("good.jsonl").write_bytes(DATA["good"].replace(b"2", b"3", 1))
        said = refusal(script, f"{again} --run-name {script.__name__} --resume auto", capsys)
        assert "belongs to a run with other arguments: hash of the problems was " in said

    def test_another_model_under_the_same_name_is_refused(self, script, again, capsys):
        Path("models").unlink()
        special = dict(vocab_size=259, max_position_embeddings=128, hidden_size=48)
        make_model("llama", torch.float32, **special).save_pretrained("models/good")
        make_tokenizer().save_pretrained("models/good")
        said = refusal(script, f"{again} --run-name {script.__name__} --resume auto", capsys)
        assert "belongs to a run with other arguments: hash of the model was " in said

    def test_what_may_change_when_a_run_is_resumed(self, script, again, capsys):
        flags = f"{again} --num-steps 2 --micro-batch-tokens 64 --gradient-checkpointing --save-every 1 --eval-every 1"
        exit_code, lines = outcome(
            script, f"{flags} --device auto --run-name new --resume runs/{script.__name__}/checkpoint.pt", capsys
        )
        assert exit_code == 0, lines
        assert any("step 1 of 2, in runs/new" in line for line in lines)

    def test_a_checkpoint_of_the_other_script_is_refused(self, script, again, capsys):
        other = {"grpo": "ppo", "ppo": "grpo"}[script.__name__]
        said = refusal(script, f"{again} --run-name new --resume runs/{other}/checkpoint.pt", capsys)
        assert f"script was {other}, is {script.__name__}" in said

    def test_what_is_no_checkpoint_is_refused(self, script, again, capsys):
        torch.save({"step": 1}, "other.pt")
        torch.save(torch.ones(3), "tensor.pt")
        for path in ("models/good", ".", "good.jsonl", "other.pt", "tensor.pt", "models/good/model.safetensors"):
            said = refusal(script, f"{again} --run-name new --resume {path}", capsys)
            assert f"{path} cannot be loaded: " in said

    def test_a_damaged_checkpoint_is_refused(self, script, again, capsys):
        path = Path("runs", script.__name__, "checkpoint.pt")
        content = path.read_bytes()
        args = SimpleNamespace(num_steps=1)
        run = SimpleNamespace(models={}, betas={}, fixed={"script": script.__name__}, args=args)
        script.Run.load(run, path)
        run.fixed["--new"] = 1
        with pytest.raises(script.UserError, match="belongs to a run with other arguments: --new was None, is 1"):
            script.Run.load(run, path)
        with zipfile.ZipFile(path) as file:
            records = [(info.filename, info.header_offset, info.file_size) for info in file.infolist()]
        assert any(name.endswith("data.pkl") for name, *_ in records)
        assert len(records) > 40
        flipped = []
        for _, header, size in records:
            name_size, extra_size = (int.from_bytes(content[header + i : header + i + 2], "little") for i in (26, 28))
            place = header + 30 + name_size + extra_size + size // 2
            flipped.append(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        for damaged in (content[:-20], content[: len(content) // 2], b"", *flipped):
            path.write_bytes(damaged)
            with pytest.raises(script.UserError, match=r"checkpoint\.pt cannot be loaded: "):
                script.Run.load(SimpleNamespace(models={}, betas={}, fixed={}, args=args), path)
        said = refusal(script, f"{again} --run-name {script.__name__} --resume auto", capsys)
        assert f"runs/{script.__name__}/checkpoint.pt cannot be loaded: " in said

    def test_resuming_without_a_checkpoint_starts_from_the_beginning(self, script, again, capsys):
        exit_code, lines = outcome(script, f"{again} --run-name fresh --resume auto", capsys)
        assert exit_code == 0, lines
        assert any("step 0 of 1, in runs/fresh" in line for line in lines)
        assert not any("resuming" in line for line in lines)
        assert Path("runs/fresh/checkpoint.pt").exists()


# ----- Trust: nothing that data or models hold is run -----


@TWINS
@pytest.mark.parametrize("save", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, 2))])
def test_a_pickle_in_a_checkpoint_is_not_run(script, save, again, capsys):
    file = Path("runs", script.__name__, "checkpoint.pt")
    save(Bomb(), file)
    assert f"{file} cannot be loaded: " in refusal(script, f"{again} --run-name new --resume {file}", capsys)
    assert not Path("boom").exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle is loaded, and only then found to be none of torch's
        torch.load(file, weights_only=False)
    assert Path("boom").exists()


@TWINS
def test_a_pickle_of_weights_is_not_run(script, capsys):
    refusal(script, f"{SMALL} --data good.jsonl --model models/pickled_weights --run-name new", capsys)
    assert not Path("boom").exists()
    torch.load("models/pickled_weights/pytorch_model.bin", weights_only=False)
    assert Path("boom").exists()


@TWINS
def test_code_beside_a_model_is_not_run_nor_is_the_user_asked_to(script, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    said = refusal(script, f"{SMALL} --data good.jsonl --model models/code_of_unknown --run-name new", capsys)
    assert "contains custom code" in said
    for model in ("models/code_of_config", "models/code_of_tokenizer"):
        args = script.check_args(script.Args(model=model, data="good.jsonl", num_prompts=2))
        tokenizer, *_ = script.load_problems(args, CPU)
        policy = script.load_policy(model, CPU)
        assert policy.__class__.__module__.startswith("transformers.")
        assert tokenizer.__class__.__module__.startswith("transformers.")
    assert not Path("boom").exists()


TOKENIZERS = [make_tokenizer(), make_tokenizer(CHATML)]
pieces = st.sampled_from(["<s>", "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "a", " ", "\n", "\ue000", "\ue001"])


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["no template", "template"])
@given(st.lists(pieces, min_size=1, max_size=12).map("".join))
def test_no_text_of_a_prompt_becomes_a_control_token(tokenizer, text):
    honest, attack = (grpo.encode_prompt(tokenizer, prompt, []) for prompt in ("x", text))
    assert [attack.count(i) for i in range(3)] == [honest.count(i) for i in range(3)]


# ----- Whatever there is: problems or one sentence -----

names = st.sampled_from(["question", "prompt", "answer", "role", "content", "name"])
answers = st.sampled_from(["1", "a #### 2"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | answers
values = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(names, x, max_size=3), max_leaves=6)
texts = st.text(st.characters(exclude_categories=[]), max_size=8)
more = {"name": values, "tool_calls": values}
turns = st.fixed_dictionaries({"role": st.just("user") | texts, "content": texts}, optional=more)
chats = st.lists(turns | values, max_size=3) | st.lists(turns, min_size=1, max_size=3)
prompts = {"question": texts | values, "prompt": chats | values}
records = st.fixed_dictionaries({"answer": answers | values}, optional=prompts)
json_lines = (records | values).map(lambda value: json.dumps(value).encode())
good_lines = st.text(st.characters(codec="utf-8"), max_size=8).map(
    lambda text: json.dumps({"prompt": text, "answer": "2"}, ensure_ascii=False).encode()
)
lines = good_lines | st.binary(max_size=20) | json_lines | records.map(lambda record: ascii(record).encode())
contents = st.builds(lambda good, other: b"\n".join([*good, *other]), st.lists(good_lines), st.lists(lines, max_size=1))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["no template", "template"])
@given(content=contents | st.binary(), eval_content=st.none() | contents)
def test_data_are_problems_or_one_sentence(tokenizer, content, eval_content):
    config = LlamaConfig(max_position_embeddings=128, vocab_size=259)
    Path("data.jsonl").write_bytes(content)
    Path("eval.jsonl").write_bytes(eval_content or b"")
    eval_data = "" if eval_content is None else "eval.jsonl"
    args = grpo.Args(model="x", data="data.jsonl", eval_data=eval_data, num_prompts=1, max_new_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", lambda model, **options: tokenizer)
        patch.setattr(AutoConfig, "from_pretrained", lambda model, **options: config)
        try:
            _, _, train_set, held_out = grpo.load_problems(args, CPU)
        except grpo.UserError:
            return
    number = len([line for line in (content + b"\n" + (eval_content or b"")).split(b"\n") if line.strip()])
    alone = eval_content is None and len({tuple(ids) for ids, _ in train_set}) == 1  # is held out as well
    assert len(train_set) + len(held_out) in ((number, number + 1) if alone else (number,))
    for ids, problem in train_set + held_out:
        assert 0 < len(ids) <= 124
        assert grpo.final_number("#" + problem["answer"]) is not None


@pytest.mark.parametrize("template", [CHATML, PICKY, "{{ messages }}", "{{ messages[0].name + messages[1].content }}"])
@given(prompt=chats)
def test_chat_messages_of_any_shape_become_ids_or_an_error(template, prompt):
    tokenizer = copy.copy(TOKENIZERS[1])
    tokenizer.chat_template = template
    right = [isinstance(x, dict) and all(isinstance(x.get(key), str) for key in ("role", "content")) for x in prompt]
    try:
        ids = grpo.encode_prompt(tokenizer, prompt, [])
    except Exception:  # `read_problems` makes a sentence of it
        encodable = "\\ud" not in ascii(prompt)  # no surrogates
        assert not (template == CHATML and encodable and right and all(right))  # which takes every chat
        return
    assert right
    assert all(right)
    assert all(isinstance(i, int) for i in ids)


def any_arguments(script) -> st.SearchStrategy[dict]:
    """Values of the right type, of which most are far out of range."""
    types = {int: st.integers() | st.integers(0, 8), float: st.floats() | st.floats(0, 1), bool: st.booleans()}
    words = st.text(st.characters(exclude_characters="\0"), max_size=8)  # no process has an argument with a NUL
    types |= {str: words | st.sampled_from(["", ".", "..", "tiny", "a/b", "auto", "x" * 300])}
    hints = typing.get_type_hints(script.Args)
    chosen = {}
    for name, hint in hints.items():
        options = typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal:
            chosen[name] = st.sampled_from(options)
        else:
            chosen[name] = st.one_of(*[st.none() if kind is type(None) else types[kind] for kind in options or [hint]])
    # A few at a time, or else none would ever be accepted.
    few = st.lists(st.sampled_from(sorted(chosen)), max_size=3, unique=True)
    return few.flatmap(lambda names: st.fixed_dictionaries({name: chosen[name] for name in names}))


@TWINS
@given(data=st.data())
def test_flags_are_completed_or_one_sentence(script, data):
    args = script.Args(**data.draw(any_arguments(script)))
    try:
        complete = script.check_args(args)
    except script.UserError:
        return
    assert None not in [getattr(complete, name) for name in script.LEARNING_RATES]
    numbers = [value for value in vars(complete).values() if isinstance(value, int | float)]
    assert all(0 <= number < 2**31 for number in numbers)
    assert all(number > 0 for number in numbers if number not in (False, 0))
    zero = {name for name, value in vars(complete).items() if type(value) in (int, float) and value == 0}
    assert zero <= {*script.LEAST}
    assert script.check_args(complete) == complete


flags = st.sampled_from(["--seed", "--beta", "--data", "--device", "--share-prompt", "--clip-eps"])
words = flags | st.sampled_from(["-1", "1e9", "nan", "None", "="]) | st.text(st.characters(codec="utf-8"), max_size=5)


@TWINS
@given(command=st.lists(words, max_size=4).filter(lambda command: not {"-h", "--help"} & {*command}))
def test_any_command_line_is_read_or_refused_with_exit_code_2(script, command):
    exit_code, said = 0, io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            script.check_args(tyro.cli(script.Args, args=command))
    except script.UserError:
        return
    except SystemExit as error:
        exit_code = error.code
    assert (exit_code, bool(said.getvalue())) in [(0, False), (2, True)]
