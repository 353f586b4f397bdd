# SPDX-License-Identifier: MIT
"""Whatever a user, a data file or a model folder gets wrong is told in one sentence with exit code 2, without a
traceback, where possible before any weight is loaded; and nothing that they hold is run as code.
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
from pathlib import Path

import pytest
import torch
import tyro
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

import grpo
import ppo
from families import make_model
from test_data import CHATML, make_tokenizer

ROOT = Path(__file__).parents[1]
PICKY = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user\nfirst') }}{% endif %}" + CHATML
FOLDERS = {"--model": "models/good", "--data": "good.jsonl"}


class Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("boom"),)


# ----- The files of data, as (file, bytes), and the model folders, each a change of a good one -----

LINE = b'{"question": "one and one?", "answer": "2"}\n'
DATA = {
    "good": LINE * 8,
    "chat": b'{"prompt": [{"role": "user", "content": "one and one?"}], "answer": "2"}\n' * 8,
    "empty": b"",
    "blank": b"\n \n\r\n",
    "three": LINE * 3,
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
    "null_prompt": LINE + b'{"prompt": null, "answer": "2"}',
    "object_prompt": LINE + b'{"prompt": {"role": "user", "content": "x"}, "answer": "2"}',
    "texts_prompt": LINE + b'{"prompt": ["one and one?"], "answer": "2"}',
    "no_turn": LINE + b'{"prompt": [], "answer": "2"}',
    "no_content": LINE + b'{"prompt": [{"role": "user"}], "answer": "2"}',
    "null_content": LINE + b'{"prompt": [{"role": "user", "content": null}], "answer": "2"}',
    "surrogate": LINE + b'{"prompt": "\\ud800", "answer": "2"}',
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
    """The one sentence that the command would end with."""
    exit_code, lines = outcome(script, flags, capsys)
    assert exit_code == 2, lines
    assert len([line for line in lines if line.startswith(f"{script.__name__}.py: ")]) == 1
    assert lines[-1].startswith(f"{script.__name__}.py: ")
    assert not Path("runs/new").exists()
    return lines[-1]


@pytest.fixture
def loaded(monkeypatch) -> list:
    """What was asked for weights, by both scripts."""
    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *x, **y: asked.append(x) or load(*x, **y))
    return asked


def for_both(*cases: tuple) -> pytest.MarkDecorator:
    """A test for every case of a table, of which (script, ...) is for one script, and else for both."""
    rows = [row for case in cases for row in ([case] if case[0] in (grpo, ppo) else [(grpo, *case), (ppo, *case)])]
    names = [f"{row[0].__name__} {row[1][:60]}" for row in rows]
    return pytest.mark.parametrize(("script", "flags", "says"), rows, ids=names)


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
    (ppo, "--process-supervision", "--process-supervision"),
)
def test_unknown_flags_and_values_are_named(script, flags, says, capsys):
    exit_code, lines = outcome(script, flags, capsys)
    assert exit_code == 2
    assert says in "".join(lines)


@for_both(
    ("--temperature 0", "--temperature must be positive, got 0.0"),
    ("--temperature inf", "--temperature must be at most 2147483648, got inf"),
    ("--beta -1", "--beta must be 0 or more, got -1.0"),
    ("--beta nan", "--beta must be 0 or more, got nan"),
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
    ("--seed -1", "--seed must be 0 or more"),
    ("--seed 99999999999999999999", "--seed must be at most"),
    ("--save-every -1", "--save-every must be 0 or more"),
    ("--group-size 0", "--group-size must be positive"),
    ("--group-size 99999999999", "--group-size must be at most"),
    ("--num-minibatches 7", "--num-minibatches 7 must divide --num-prompts"),
    ("--data good.jsonl", "--data needs a --model"),
    ("--eval-data good.jsonl", "--data needs a --model"),
    ("--model models/good", "--model models/good needs --data"),
    ("--resume auto", "--resume auto needs the --run-name"),
    ("--resume nowhere", "--resume nowhere: there is no such folder"),
    ("--run-name ''", "--run-name must be the name of a folder in runs/, got ''"),
    ("--run-name ..", "--run-name must be the name of a folder in runs/, got '..'"),
    ("--run-name .", "--run-name must be the name"),
    ("--run-name a/b", "--run-name must be the name"),
    ("--run-name /tmp", "--run-name must be the name"),
    (grpo, "--group-size 1", "--group-size must be at least 2, got 1"),
    (grpo, "--ref-refresh-every -1", "--ref-refresh-every must be 0 or more"),
    (grpo, "--process-supervision --kl-placement reward", "--process-supervision needs"),
    (ppo, "--gamma 1.01", "--gamma must be at most 1"),
    (ppo, "--gae-lambda nan", "--gae-lambda must be 0 or more, got nan"),
    (ppo, "--gae-lambda -0.1", "--gae-lambda must be 0 or more"),
    (ppo, "--value-clip-eps 0", "--value-clip-eps must be positive"),
    (ppo, "--value-learning-rate inf", "--value-learning-rate must be at most"),
    (ppo, "--value-warmup-steps -1", "--value-warmup-steps must be 0 or more"),
    (ppo, "--adaptive-kl-target 0", "--adaptive-kl-target must be positive"),
    (ppo, "--adaptive-kl-target 6 --beta 0", "--adaptive-kl-target needs a --beta"),
    (ppo, "--penalty-kl-target nan", "--penalty-kl-target must be positive"),
    (ppo, "--early-stop-kl -1", "--early-stop-kl must be positive"),
    (ppo, "--entropy-coef -1", "--entropy-coef must be 0 or more"),
)
def test_flags_that_cannot_work_are_refused_before_anything_is_loaded(script, flags, says, capsys, monkeypatch):
    monkeypatch.setattr(script, "load_problems", lambda args: pytest.fail("problems and tokenizer were loaded"))
    assert says in refusal(script, flags, capsys)


@for_both(("--device cuda", "--device cuda: there is none"), ("--device mps", "--device mps: there is none"))
def test_a_device_that_is_not_there_is_refused(script, flags, says, capsys):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there may be one")
    assert says in refusal(script, flags, capsys)


# ----- Data and models -----

SMALL = "--num-prompts 2 --max-new-tokens 4 --num-steps 1 --eval-every 0 --device cpu"
TYPES = '"question" must be a string, "prompt" a string or a list of {"role": ..., "content": ...}'


@for_both(
    ("--data nothing.jsonl", "cannot read nothing.jsonl: [Errno 2] No such file"),
    ("--data models", "cannot read models: [Errno 21] Is a directory"),
    ("--data good.jsonl --eval-data nothing.jsonl", "cannot read nothing.jsonl"),
    ("--data good.jsonl --eval-data empty.jsonl", "empty.jsonl is empty"),
    ("--data empty.jsonl", "empty.jsonl is empty: it must hold one JSON object a line"),
    ("--data blank.jsonl", "blank.jsonl is empty"),
    ("--data cut.jsonl", "cut.jsonl, line 4 is not JSON: Unterminated string"),
    ("--data list.jsonl", "list.jsonl, line 3: must be a JSON object"),
    ("--data utf8.jsonl", "utf8.jsonl, line 5: 'utf-8' codec can't decode byte 0xff in position 14"),
    ("--data utf16.jsonl", "utf16.jsonl, line 1: 'utf-8' codec can't decode byte 0xff"),
    ("--data no_answer.jsonl", "no_answer.jsonl, line 2: the field 'answer' is missing"),
    ("--data no_question.jsonl", "no_question.jsonl, line 2: the field 'prompt' is missing"),
    ("--data no_content.jsonl", "no_content.jsonl, line 2: the field 'content' is missing"),
    ("--data number_answer.jsonl", 'number_answer.jsonl, line 2: "answer" must be a string that ends in one number'),
    ("--data word_answer.jsonl", 'word_answer.jsonl, line 2: "answer" must be a string'),
    ("--data null_answer.jsonl", 'null_answer.jsonl, line 2: "answer" must be a string'),
    ("--data number_question.jsonl", f"number_question.jsonl, line 2: {TYPES}"),
    ("--data null_prompt.jsonl", f"null_prompt.jsonl, line 2: {TYPES}"),
    ("--data object_prompt.jsonl", f"object_prompt.jsonl, line 2: {TYPES}"),
    ("--data texts_prompt.jsonl", f"texts_prompt.jsonl, line 2: {TYPES}"),
    ("--data no_turn.jsonl", f"no_turn.jsonl, line 2: {TYPES}"),
    ("--data null_content.jsonl", f"null_content.jsonl, line 2: {TYPES}"),
    ("--data surrogate.jsonl", "surrogate.jsonl, line 2: 'utf-8' codec can't encode"),
    ("--data deep.jsonl", "deep.jsonl, line 2: maximum recursion depth"),
    ("--data three.jsonl --num-prompts 4", "--num-prompts 4 is more than the 2 training problems"),
    ("--data long.jsonl", "a prompt has 151 tokens; with --max-new-tokens 4 this model's context of 128 takes"),
    ("--data good.jsonl --max-new-tokens 500", "with --max-new-tokens 500 this model's context of 128"),
    ("--data good.jsonl --eval-data long.jsonl", "a prompt has 151 tokens"),
    ("--data nothing_asked.jsonl --model models/plain", "a prompt has 0 tokens"),
    ("--data chat.jsonl", "the prompts are chat messages, but this model's tokenizer has no chat template"),
    ("--data system.jsonl --model models/picky", "chat template refuses \"[{'role': 'system'"),
    ("--data system.jsonl --model models/picky", "user first"),
    ("--model models/broken_template", "chat template refuses 'one and one?"),
    ("--model models/adding_template", "chat template refuses 'one and one?"),
    ("--model models/empty", "--model models/empty is no model folder"),
    ("--model models/nowhere", "--model models/nowhere is no model folder and no hub id in reach"),
    ("--model nobody/nothing", "--model nobody/nothing is no model folder and no hub id in reach"),
    ("--model ../..", "--model ../.. is no model folder"),
    ("--model good.jsonl", "--model good.jsonl is no model folder"),
    ("--model models/no_config", "--model models/no_config is no model folder"),
    ("--model models/broken_config", "is not a valid JSON file"),
    ("--model models/list_config", "--model models/list_config is no model folder"),
    ("--model models/unknown_type", "`nothing_of_the_kind`"),
    ("--model models/wrong_config", "'hidden_size' expected int"),
    ("--model models/no_tokenizer", "--model models/no_tokenizer is no model folder"),
    ("--model models/broken_tokenizer", "--model models/broken_tokenizer is no model folder"),
    ("--model models/fewer_ids", "its tokenizer has more tokens than the model, 99"),
)
def test_bad_data_and_models_are_refused_before_weights_are_loaded(script, flags, says, capsys, loaded):
    defaults = " ".join(f"{flag} {value}" for flag, value in FOLDERS.items() if flag not in flags.split())
    assert says in refusal(script, f"{SMALL} --run-name new {defaults} {flags}", capsys)
    assert not loaded


@for_both(
    ("--model models/no_weights", "models/no_weights cannot be loaded: Error no file named model.safetensors"),
    ("--model models/cut_weights", "models/cut_weights cannot be loaded: Error while deserializing header"),
    ("--model models/no_layer", "it has no weights, or none of the right shape, for model.layers.2."),
    ("--model models/other_config", "it has no weights, or none of the right shape, for model.layers.0.mlp.down_proj"),
    ("--model models/no_end", "--model models/no_end has no end token"),
    ("--model models/pickled_weights", "models/pickled_weights cannot be loaded: Weights only load failed."),
    (f"--model models/good --run-name {'x' * 300}", "the run cannot be kept in runs/xxx"),
)
def test_bad_weights_and_run_folders_are_refused(script, flags, says, capsys, loaded):
    name = "" if "--run-name" in flags else "--run-name new"
    assert says in refusal(script, f"{SMALL} --data good.jsonl {name} {flags}", capsys)
    assert loaded


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("grpo", "--clip-eps nan", "grpo.py: --clip-eps must be positive, got nan"),
        ("ppo", "--kl-estimator k4", "--kl-estimator"),
        ("ppo", "--model models/good --data utf8.jsonl", "ppo.py: utf8.jsonl, line 5: "),
        ("grpo", "--model models/cut_weights --data good.jsonl", "grpo.py: --model models/cut_weights cannot"),
    ],
)
def test_a_real_process_ends_with_the_sentence_and_exit_code_2(name, flags, says):
    command = [sys.executable, str(ROOT / f"{name}.py"), *SMALL.split(), *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
def test_memory_that_is_not_there_is_told_and_a_fault_of_the_script_is_not_hidden(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "train", lambda args: torch.empty(2**55))
    assert "out of memory: a lower --micro-batch-tokens" in refusal(script, "", capsys)
    monkeypatch.setattr(script, "train", lambda args: torch.empty(2) @ torch.empty(3))
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


@pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
class TestRuns:
    def test_a_folder_of_another_run_is_refused(self, script, again, capsys, loaded):
        said = refusal(script, f"{again} --run-name {script.__name__}", capsys)
        assert f"runs/{script.__name__} holds a run" in said
        assert not loaded

    def test_every_changed_argument_is_listed(self, script, again, capsys):
        changed = f"{again} --seed 7 --learning-rate 0.5 --temperature 0.9 --max-new-tokens 3 --kl-estimator k2"
        changed += " --eval-data good.jsonl"  # what was held out would be trained on
        said = refusal(script, f"{changed} --run-name {script.__name__} --resume auto", capsys)
        assert f"runs/{script.__name__}/step_000001 is of a run with other arguments: " in said
        listed = set(said.split("other arguments: ")[1].split(", --"))
        assert {name.removeprefix("--") for name in listed} == {
            "max-new-tokens was 4, is 3", "temperature was 1.0, is 0.9", "learning-rate was 1e-06, is 0.5",
            f"kl-estimator was {script.Args.kl_estimator}, is k2", "seed was 1, is 7",
            "eval-data was None, is good.jsonl",
        }  # fmt: skip

    def test_a_checkpoint_of_the_other_script_is_refused(self, script, again, capsys):
        other = {"grpo": "ppo", "ppo": "grpo"}[script.__name__]
        said = refusal(script, f"{again} --run-name new --resume runs/{other}/step_000001", capsys)
        assert f"script was {other}, is {script.__name__}" in said

    def test_a_folder_that_is_no_checkpoint_is_refused(self, script, again, capsys):
        for folder in ("models/good", "."):
            said = refusal(script, f"{again} --run-name new --resume {folder}", capsys)
            assert f"--resume {folder}: no checkpoint that can be loaded" in said

    @pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "sha256.json", "config.json"])
    def test_a_damaged_checkpoint_is_refused(self, script, again, capsys, name):
        file = Path("runs", script.__name__, "step_000001", name)
        content = file.read_bytes()
        for damaged in (content[:-20], content[:-1] + bytes([content[-1] ^ 1]), b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            said = refusal(script, f"{again} --run-name {script.__name__} --resume auto", capsys)
            assert "--resume auto: no checkpoint that can be loaded" in said

    def test_going_on_without_a_checkpoint_starts_from_the_beginning_and_says_so(self, script, again, capsys):
        exit_code, lines = outcome(script, f"{again} --run-name fresh --resume auto", capsys)
        assert exit_code == 0
        assert "runs/fresh holds no checkpoint yet: starting from the beginning" in lines


# ----- Trust: nothing that data or models hold is run -----


@pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
@pytest.mark.parametrize("save", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, 2))])
def test_a_pickle_in_a_checkpoint_is_not_run(script, save, again, capsys):
    file = Path("runs", script.__name__, "step_000001", "state.pt")
    save(Bomb(), file)
    refusal(script, f"{again} --run-name {script.__name__} --resume {file.parent}", capsys)
    assert not Path("boom").exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle is loaded, and only then found to be none of torch's
        torch.load(file, weights_only=False)
    assert Path("boom").exists()


@pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
def test_a_pickle_of_weights_is_not_run(script, capsys):
    refusal(script, f"{SMALL} --data good.jsonl --model models/pickled_weights --run-name new", capsys)
    assert not Path("boom").exists()
    torch.load("models/pickled_weights/pytorch_model.bin", weights_only=False)
    assert Path("boom").exists()


@pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
def test_code_beside_a_model_is_not_run_nor_is_the_user_asked_to(script, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    said = refusal(script, f"{SMALL} --data good.jsonl --model models/code_of_unknown --run-name new", capsys)
    assert "contains custom code" in said
    for model in ("models/code_of_config", "models/code_of_tokenizer"):
        tokenizer, policy, _ = script.load_policy(model, torch.device("cpu"))
        assert policy.__class__.__module__.startswith("transformers.")
        assert tokenizer.__class__.__module__.startswith("transformers.")
    assert not Path("boom").exists()


TOKENIZERS = [make_tokenizer(), make_tokenizer(CHATML)]
pieces = st.sampled_from(["<s>", "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "a", " ", "\n", "\ue000", "\ue001"])


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["no template", "template"])
@given(st.lists(pieces, min_size=1, max_size=12).map("".join))
def test_no_text_of_a_prompt_becomes_a_control_token(tokenizer, text):
    honest, attack = (grpo.encode_prompt(tokenizer, prompt) for prompt in ("x", text))
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
    eval_data = None if eval_content is None else "eval.jsonl"
    args = grpo.Args(model="x", data="data.jsonl", eval_data=eval_data, num_prompts=1, max_new_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "load_tokenizer", lambda model: (tokenizer, config))
        try:
            train_set, held_out = grpo.load_problems(args)
        except grpo.UserError:
            return
    number = len([line for line in (content + b"\n" + (eval_content or b"")).split(b"\n") if line.strip()])
    assert len(train_set) + len(held_out) == number
    for ids, answer in train_set + held_out:
        assert 0 < len(ids) <= 124
        assert grpo.final_number("#" + answer) is not None


@pytest.mark.parametrize("template", [CHATML, PICKY, "{{ messages }}", "{{ messages[0].name + messages[1].content }}"])
@given(prompt=chats)
def test_chat_messages_of_any_shape_become_ids_or_one_sentence(template, prompt):
    try:
        problem = grpo.checked_problem({"prompt": prompt, "answer": "1"})
    except (KeyError, ValueError):  # what read_problems makes a sentence of
        return
    tokenizer = copy.copy(TOKENIZERS[1])
    tokenizer.chat_template = template
    try:
        ids = grpo.encode_prompt(tokenizer, problem.prompt)
    except grpo.UserError:
        assert template != CHATML  # which takes every chat
        return
    assert all(isinstance(i, int) for i in ids)


def any_arguments(script) -> st.SearchStrategy[dict]:
    """Values of the right type, of which most are far out of range."""
    types = {int: st.integers() | st.integers(0, 8), float: st.floats() | st.floats(0, 1), bool: st.booleans()}
    types |= {str: st.text(max_size=8) | st.sampled_from(["", ".", "..", "tiny", "a/b", "auto", "x" * 300])}
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


@pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
@given(data=st.data())
def test_flags_are_completed_or_one_sentence(script, data):
    args = script.Args(**data.draw(any_arguments(script)))
    try:
        complete = script.complete_args(args)
    except script.UserError:
        return
    assert None not in (complete.max_new_tokens, complete.num_steps, complete.learning_rate)
    numbers = [value for value in vars(complete).values() if isinstance(value, int | float)]
    assert all(0 <= number <= 2**31 for number in numbers)
    assert complete.num_prompts % complete.num_minibatches == 0


flags = st.sampled_from(["--seed", "--beta", "--data", "--device", "--share-prompt", "--clip-eps"])
words = flags | st.sampled_from(["-1", "1e9", "nan", "None", "="]) | st.text(st.characters(codec="utf-8"), max_size=5)


@pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
@given(command=st.lists(words, max_size=4).filter(lambda command: not {"-h", "--help"} & {*command}))
def test_any_command_line_is_read_or_refused_with_exit_code_2(script, command):
    exit_code, said = 0, io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            script.complete_args(tyro.cli(script.Args, args=command))
    except script.UserError:
        return
    except SystemExit as error:
        exit_code = error.code
    assert (exit_code, bool(said.getvalue())) in [(0, False), (2, True)]
