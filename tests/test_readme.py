# SPDX-License-Identifier: MIT
"""What README.md and the headers say is so: every link from paper to line, every equation, every symbol, every command
with its flags; the examples run; and run.sh finds its folder. Nothing here needs a GPU or a hub.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tyro

import grpo
import ppo
from helpers.runs import curves, finish, start

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FILES = {name: (ROOT / name).read_text() for name in ("grpo.py", "ppo.py", "advantage.py", "kl.py")}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
HEADERS = {name: ast.get_docstring(tree) for name, tree in TREES.items()}
NAMES = {  # every variable, function and argument that the code itself uses
    file: {x.id if isinstance(x, ast.Name) else x.arg for x in ast.walk(tree) if isinstance(x, ast.Name | ast.arg)}
    for file, tree in TREES.items()
}
MAP = README.partition("## From paper to line")[2].partition("\n## ")[0]
ROWS = [line.strip("|").split("|") for line in MAP.splitlines() if line.startswith("| ")][1:]
LINKS = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)(?: \(`(\w+)`\))?", README)  # perhaps with an argument


def test_every_link_goes_to_the_line_of_its_function_and_its_argument_exists():
    moved = []
    for name, file, line, argument in LINKS:
        right = FILES[file].partition(f"\ndef {name}(")[0].count("\n") + 2
        if right != int(line):
            moved.append(f"{file}#L{line} of {name} is now {file}#L{right}")
        assert not argument or argument in NAMES[file], argument
    assert moved == []
    assert min(len(LINKS), len(TAGS), len(COMMANDS)) > 10


PLACES = [(row[1], row[2]) for row in ROWS]  # what names equations, and what names functions
PLACES += [(text, text) for text in MAP.split("\n\n") if "Eq" in text and not text.startswith("|")]


def equations(text: str) -> list[str]:
    """Eqs. 16 to 18 and 4.1.2 as 16, 18 and 4.1.2."""
    numbers = [re.findall(r"\d+", x) for x in re.findall(r"Eqs?\. \d+(?:(?:,| and| to) \d+)*", text)]
    return [*(f"Eq. {n}" for group in numbers for n in group), *re.findall(r"Algorithm \d+|\b4\.1\.\d", text)]


TAGS = [(tag, where) for text, where in PLACES for tag in equations(text)]


@pytest.mark.parametrize(("tag", "where"), TAGS, ids=lambda value: value[:24])
def test_every_equation_of_the_map_is_named_where_it_is_computed(tag, where):
    """In one of the functions of its row or paragraph or in `train` or `Args`, or above it; or in a header."""
    functions, sources = set(re.findall(r"(?<!\()`(\w+)`", where)) | {"train", "Args"}, [*HEADERS.values()]
    for name, text in FILES.items():
        for node in TREES[name].body:
            if getattr(node, "name", None) in functions:
                sources.append("\n".join(text.splitlines()[max(0, node.lineno - 6) : node.end_lineno]))
    number = re.escape(tag.removeprefix("Eq. "))
    pattern = rf"Eqs?\. (?:\d+(?:,| and| to) )*{number}\b" if tag.startswith("Eq") else rf"\b{number}\b"
    assert any(re.search(pattern, source) for source in sources)


@pytest.mark.parametrize("script", ["grpo.py", "ppo.py"])
def test_the_symbols_and_functions_of_the_header_are_names_of_the_code(script):
    """The second column of its table, and what stands behind its list of steps."""
    table = HEADERS[script].partition("symbol  ")[2].partition("\n\n")[0].splitlines()[1:]
    named = re.findall(r"[a-z]\w+", " ".join(line[17:37] for line in table))
    named += re.findall(r"^ +\d\. .* ([a-z_]+)$", HEADERS[script], re.MULTILINE)
    assert len(named) > 18
    assert {*named} <= NAMES[script] | {*grpo.Args.__annotations__, *ppo.Args.__annotations__}


TEXT = re.sub(r" \\\n +", " ", "\n".join([README, *HEADERS.values()]))  # with commands of two lines in one
START = r"(?:python|\./run\.sh|torchrun --nproc-per-node 8)"
COMMANDS = set(re.findall(START + r" ((?:grpo|ppo)(?:\.py)?(?: [^\s`|#]+)*)", TEXT))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_flags_that_exist(command):
    name, *words = shlex.split(command)
    script = grpo if name.startswith("grpo") else ppo
    script.check_args(tyro.cli(script.Args, args=[word for word in words if word != "--help"]))


# ----- The examples -----

TASK, LOADING, NOTEBOOK = (text.partition("```")[0] for text in README.split("```python\n")[1:])
STEPS = re.search(r"earns 0\.1:\n\n(.*?)\n\n", FILES["advantage.py"], re.DOTALL)[1] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "args"), [(grpo, dict(num_steps=8)), (ppo, dict(num_steps=4, value_warmup_steps=0))]
)
def test_the_worked_example_trains_in_place_of_the_functions_that_it_replaces(script, args, tmp_path, monkeypatch):
    """And nothing outside of these functions knows the task."""
    monkeypatch.chdir(tmp_path)
    for node in ast.parse(TASK).body:
        monkeypatch.setattr(script, node.name, None)  # put back in the end
    exec(TASK, vars(script))
    script.train(script.Args(run_name="a", eval_every=8, num_prompts=32, group_size=8, **args))
    (_, before), (_, after) = curves("a")["eval/sampled"]
    assert 0 < before < 0.4 < 0.65 < after


def test_the_trained_model_is_loaded_and_prompted_as_it_is_shown(tmp_path, monkeypatch, capsys):
    """The tiny model, as if it had been trained: `policy/` is a folder of the same kind."""
    (tmp_path / "runs/RUN_NAME").mkdir(parents=True)
    (tmp_path / "runs/RUN_NAME/policy").symlink_to(ROOT / "tests/tiny")
    monkeypatch.chdir(tmp_path)
    exec(LOADING, {})
    assert "38+57=" in capsys.readouterr().out


@pytest.mark.slow
def test_the_run_of_a_notebook_trains_until_it_is_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = {}
    exec(NOTEBOOK, notebook)
    notebook["stop"].set()
    next(thread for thread in threading.enumerate() if "train" in thread.name).join()
    (run,) = Path("runs").iterdir()
    assert (run / "policy").is_dir()
    assert len(curves(run.name).get("reward/mean", [])) < 20


@pytest.mark.slow
def test_process_supervision_trains_in_place_of_the_lines_that_it_replaces(tmp_path, monkeypatch):
    """In a copy of grpo.py with what it needs beside it, as the docstring of the function tells the user to do."""
    before, _, text = FILES["grpo.py"].partition("        per_completion = ")
    after = text.partition("        advantages = ")[2].partition("\n")[2]
    text = (before + STEPS + after).replace("import group_advantages", "import process_advantages")
    for name, content in (FILES | {"grpo.py": text}).items():
        (tmp_path / name).write_text(content)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    finish(start([sys.executable, "grpo.py", "--run-name=a", "--num-steps=8", "--eval-every=8"]))
    (_, before), (_, after) = curves("a")["eval/sampled"]
    assert 0 < before < 0.5 < 0.8 < after


# ----- run.sh -----


@pytest.mark.parametrize("called_as", ["p/run.sh", "q/run.sh", "./r"])
def test_run_sh_finds_its_folder(tmp_path, called_as, monkeypatch):
    """CDPATH was set, or run.sh was called through a link in a folder of programs: another .venv was set up."""
    monkeypatch.chdir(tmp_path)
    Path("p/.venv/bin").mkdir(parents=True)
    for place in ("p/run.sh", "p/requirements.txt", "p/.venv/requirements.txt"):  # as if it had been set up already
        shutil.copy(ROOT / Path(place).name, place)
    Path("p/.venv/bin/python").write_text('#!/bin/sh\necho "$@"\n')
    Path("p/.venv/bin/python").chmod(0o755)
    Path("q").mkdir()
    Path("q/run.sh").symlink_to("../p/run.sh")
    Path("r").symlink_to("q/run.sh")
    environment = os.environ | {"PYTHON": "false", "CDPATH": "."}
    done = subprocess.run([called_as, "grpo", "--seed", "2"], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/p/grpo.py --seed 2\n", done.stderr
