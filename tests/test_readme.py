# SPDX-License-Identifier: MIT
"""What README.md and the headers say is so: every function of the map from paper to line, every equation, every symbol,
every command with its flags; the examples train; and run.sh finds its folder.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in MAP.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:40])
def test_every_row_of_the_map_links_a_function_and_its_arguments_exist(row):
    files = re.findall(r"\[`\w+`\]\((\w+\.py)#", row[2])
    assert files
    for argument in re.findall(r"\(`(\w+)`\)", row[2]):
        assert any(argument in NAMES[file] for file in files), argument


LINKS = sorted(set(re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)))




PLACES = [(row[1], row[2]) for row in ROWS]  # what names equations, and what names functions
PLACES += [(text, text) for text in MAP.split("\n\n") if "Eq" in text and not text.startswith("|")]


def equations(text: str) -> list[str]:
    """Eqs. 16 to 18 and 4.1.2 as 16, 18 and 4.1.2."""
    numbers = [re.findall(r"\d+", x) for x in re.findall(r"Eqs?\. \d+(?:(?:,| and| to) \d+)*", text)]
    return [*(f"Eq. {n}" for group in numbers for n in group), *re.findall(r"Algorithm \d+|\b4\.1\.\d", text)]


TAGS = [(tag, where) for text, where in PLACES for tag in equations(text)]


@pytest.mark.parametrize(("tag", "where"), TAGS, ids=lambda value: value[:24])
def test_every_equation_of_the_map_is_named_where_it_is_computed(tag, where):
    """In one of the functions of its row or paragraph or in `train`, or above it; or in a header."""
    functions, sources = set(re.findall(r"(?<!\()`(\w+)`", where)) | {"train"}, [*HEADERS.values()]
    for name, text in FILES.items():
        for node in TREES[name].body:
            if getattr(node, "name", None) in functions:
                sources.append("\n".join(text.splitlines()[max(0, node.lineno - 6) : node.end_lineno]))
    number = re.escape(tag.removeprefix("Eq. "))
    pattern = rf"Eqs?\. (?:\d+(?:,| and| to) )*{number}\b" if tag.startswith("Eq") else rf"\b{number}\b"
    assert any(re.search(pattern, source) for source in sources)


@pytest.mark.parametrize("script", ["grpo.py", "ppo.py"])
def test_the_symbols_and_functions_of_the_header_are_names_of_the_code(script):
    header, used = HEADERS[script], NAMES[script] | {*grpo.Args.__annotations__, *ppo.Args.__annotations__}
    table = header.partition("symbol       name in the code")[2].partition("\n\n")[0].splitlines()[1:]
    assert len(table) > 8
    for line in table:
        names = re.split(r"\s{2,}", line[13:].strip())[0]
        assert {*re.findall(r"[a-z]\w+", names)} <= used
    steps = re.findall(r"^ +\d\. .*?  +([a-z_]+)", header, re.MULTILINE)  # the function that a step of the list names
    assert len(steps) >= 4
    assert {*steps} <= used


COMMANDS = {
    command
    for text in (README, HEADERS["grpo.py"], HEADERS["ppo.py"])
    for command in re.findall(r"(?:python |\./run\.sh )(?:grpo|ppo)(?: ?[^\s`|#]+)*", re.sub(r" \\\n +", " ", text))
    if "..." not in command
}


def test_there_are_rows_links_equations_and_commands_to_check():
    assert min(len(ROWS), len(LINKS), len(TAGS), len(COMMANDS)) > 10
    assert all(len(row) == 3 for row in ROWS)




# ----- The examples -----

TASK, POOL, LOADING = (text.partition("```")[0] for text in README.split("```python\n")[1:])
STEPS = re.search(r"earns 0\.1:\n\n(.*?)\n\n", FILES["advantage.py"], re.DOTALL)[1] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "args"), [(grpo, dict(num_steps=8)), (ppo, dict(num_steps=4, value_warmup_steps=0))]
)
def test_the_worked_examples_train_in_place_of_the_functions_that_they_replace(script, args, tmp_path, monkeypatch):
    """With the thread pool, too, and nothing outside of these functions knows the task."""
    assert len([line for line in TASK.splitlines() if line.strip()]) < 12
    monkeypatch.chdir(tmp_path)
    for node in ast.parse(TASK + POOL).body:
        monkeypatch.setattr(script, node.name, None)  # put back in the end
    exec(TASK + POOL, vars(script))
    script.train(script.Args(run_name="a", eval_every=8, num_prompts=32, group_size=8, **args))
    (_, before), (_, after) = curves("a")["eval/sampled"]
    assert 0 < before < 0.4
    assert after > 0.65


def test_the_thread_pool_waits_together_and_not_longer_than_its_limit():
    """Sixteen rewards that wait take as long as one; one that waits for too long earns 0, the others keep theirs."""

    def reward(completion: str, problem: dict) -> float:
        time.sleep(problem["seconds"])
        return float(completion)

    namespace = {"reward": reward}
    exec(POOL.replace("timeout=10", "timeout=1"), namespace)
    began = time.monotonic()
    problems = [{"seconds": 0.3}] * 15 + [{"seconds": 3.0}]
    assert namespace["compute_rewards"]([str(i) for i in range(16)], problems) == [*map(float, range(15)), 0.0]
    assert time.monotonic() - began < 2.9


def test_the_trained_model_is_loaded_and_prompted_as_it_is_shown(tmp_path, monkeypatch, capsys):
    """The tiny model, as if it had been trained: `policy/` is a folder of the same kind."""
    (tmp_path / "runs/RUN_NAME").mkdir(parents=True)
    (tmp_path / "runs/RUN_NAME/policy").symlink_to(ROOT / "tests/tiny")
    monkeypatch.chdir(tmp_path)
    exec(LOADING, {})
    assert "38+57=" in capsys.readouterr().out


@pytest.mark.slow
def test_process_supervision_trains_in_place_of_the_lines_that_it_replaces(tmp_path, monkeypatch):
    """In a copy of grpo.py with what it needs beside it, as its docstring tells the user to do."""
    lines = FILES["grpo.py"].splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.startswith("        groups = rewards.view"))
    assert lines[first + 1].startswith("        advantages = group_advantages(")
    lines[first : first + 2] = [STEPS]
    text = "".join(lines).replace(".view(-1, 1).expand_as(weights)", "")
    text = text.replace("import group_advantages", "import group_advantages, process_advantages")
    for name, content in (FILES | {"grpo.py": text}).items():
        (tmp_path / name).write_text(content)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    flags = ["--run-name=a", "--num-steps=8", "--eval-every=8", "--device=cpu"]
    finish(start([sys.executable, "grpo.py", *flags]))
    (_, before), (_, after) = curves("a")["eval/sampled"]
    assert 0 < before < 0.5
    assert after > 0.8


# ----- run.sh -----


@pytest.mark.parametrize("called_as", ["p/run.sh", "q/run.sh", "./r"])
@pytest.mark.parametrize("environment", [{}, {"CDPATH": "."}], ids=str)
def test_run_sh_finds_its_folder(tmp_path, called_as, environment, monkeypatch):
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
    environment = os.environ | {"PYTHON": "false"} | environment
    done = subprocess.run([called_as, "grpo", "--seed", "2"], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/p/grpo.py --seed 2\n", done.stderr
    assert sorted(str(path) for path in [*Path().iterdir(), *Path("q").iterdir()]) == ["p", "q", "q/run.sh", "r"]
