# SPDX-License-Identifier: MIT
"""What README.md and the headers say still exists: every function of the map from paper to line, every equation tag,
every symbol, and every command with its flags."""

import ast
import functools
import re
import shlex
import sys
import time
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
MAP = README.partition("## From paper to line")[2].partition("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in MAP.splitlines() if line.startswith("| ")][1:]


@functools.cache
def definitions(text: str) -> set[str]:
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@functools.cache
def names_in(text: str) -> set[str]:
    """Functions, arguments and fields: every name that the code itself uses."""
    nodes = list(ast.walk(ast.parse(text)))
    found = {node.id for node in nodes if isinstance(node, ast.Name)}
    found |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return found | definitions(text)


def test_the_map_has_rows():
    assert len(ROWS) > 10
    assert all(len(row) == 3 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:40])
def test_every_function_of_the_map_exists_in_the_file_it_is_said_to_stand_in(row):
    """The files that a cell names hold its functions, before "in"; a name in parentheses is one of their arguments."""
    _, _, where = row
    files = re.findall(r"\b(?:grpo|ppo|advantage|kl)\.py", where) or list(FILES)
    functions = re.findall(r"(?<!\()`(\w+)`", where)
    assert functions
    for name in functions:
        assert any(name in definitions(FILES[file]) for file in files), name
    for name in re.findall(r"\(`(\w+)`\)", where):
        assert any(name in names_in(FILES[file]) for file in files), name


@pytest.mark.parametrize(("name", "file", "line"), sorted(set(re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README))))
def test_every_link_goes_to_the_line_of_its_function(name, file, line):
    definition = f"def {name}("
    lines = [text.startswith(definition) for text in FILES[file].splitlines()]
    assert lines.index(True) + 1 == int(line), f"README.md must say [`{name}`]({file}#L{lines.index(True) + 1})"


PLACES = [(row[1], row[2]) for row in ROWS]  # what names equations, and what names functions
PLACES += [(text, text) for text in MAP.split("\n\n") if "Eq" in text and not text.startswith("|")]


def equations(text: str) -> list[str]:
    """Eqs. 16 to 18 and 4.1.2 as 16, 18 and 4.1.2."""
    numbers = [re.findall(r"\d+", x) for x in re.findall(r"Eqs?\. \d+(?:(?:,| and| to) \d+)*", text)]
    return [*(f"Eq. {n}" for group in numbers for n in group), *re.findall(r"Algorithm \d+|\b4\.1\.\d", text)]


TAGS = [(tag, where) for text, where in PLACES for tag in equations(text)]


@pytest.mark.parametrize(("tag", "where"), TAGS, ids=lambda value: value[:24])
def test_every_equation_of_the_map_is_named_where_it_is_computed(tag, where):
    """In the source of one of the functions of its row or paragraph, or in a comment of `train`."""
    functions = set(re.findall(r"(?<!\()`(\w+)`", where)) | {"train"}
    sources = [ast.get_docstring(TREES[name]) for name in FILES]
    for name, text in FILES.items():
        for node in TREES[name].body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in functions:
                first = max(0, node.lineno - 6)  # with the comment above it
                sources.append("\n".join(text.splitlines()[first : node.end_lineno]))
    number = tag.removeprefix("Eq. ")
    pattern = rf"Eqs?\. (?:\d+(?:,| and| to) )*{number}\b" if tag.startswith("Eq") else rf"\b{re.escape(tag)}\b"
    assert any(re.search(pattern, source) for source in sources)


@pytest.mark.parametrize("script", ["grpo.py", "ppo.py"])
def test_the_symbols_and_functions_of_the_header_are_names_of_the_code(script):
    header, used = ast.get_docstring(ast.parse(FILES[script])), names_in(FILES[script])
    fields = {name for cls in (grpo.Args, ppo.Args) for name in cls.__dataclass_fields__}
    table = header.partition("symbol       name in the code")[2].partition("\n\n")[0].splitlines()[1:]
    assert len(table) > 8
    for line in table:
        for name in re.findall(r"[a-z]\w+", re.split(r"\s{2,}", line[13:].strip())[0]):
            assert name in used | fields, name
    steps = [line for line in header.splitlines() if re.match(r"\s+\d\. ", line)]
    assert len(steps) >= 4
    for line in steps:
        name = re.search(r"\s{2,}([a-z_]+)(?: \(| *$|,)", line)
        assert name, line
        assert name[1] in used, name[1]


COMMANDS = {
    match[0]
    for text in (README, *(ast.get_docstring(ast.parse(FILES[name])) for name in ("grpo.py", "ppo.py")))
    for match in re.finditer(
        r"(?:python (?:grpo|ppo)\.py|\./run\.sh (?:grpo|ppo))(?: ?[^\s`|#]+)*", re.sub(r" \\\n +", " ", text)
    )
    if "..." not in match[0]
}


def test_commands_are_found():
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_flags_that_exist(command):
    script = grpo if "grpo" in command.split()[1] else ppo
    words = shlex.split(command.replace("S`", "1"))[2:]
    words = ["1" if word == "S" else word for word in words if word != "--help"]
    script.check_args(tyro.cli(script.Args, args=words))


# ----- The examples -----

TASK, POOL, LOADING = (text.partition("```")[0] for text in README.split("```python\n")[1:])
STEPS = re.search(r"earns 0\.1:\n\n(.*?)\n\n", FILES["advantage.py"], re.DOTALL)[1] + "\n"
FLAGS = "--run-name a --eval-every {0} --num-steps {0} --device cpu --num-prompts 32 --group-size 8"


def train_copy(folder: Path, script: str, text: str, steps: int) -> dict[str, list[tuple[int, float]]]:
    """The curves of a copied script, with the files that it needs beside it."""
    for name in ("advantage.py", "kl.py"):
        (folder / name).write_text(FILES[name])
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / f"{script}.py").write_text(text)
    finish(start([sys.executable, f"{script}.py", *FLAGS.format(steps).split()]))
    return curves("a")


def with_task(script: str, *examples: str) -> str:
    """The script with the functions of these examples in place of those in the block to change."""
    before, _, rest = FILES[f"{script}.py"].partition("# ============================ CHANGE THIS")
    block, _, after = rest.partition("# ========================= end of the block to change")
    for example in examples:
        for node in ast.parse(example).body:
            block, found = re.subn(rf"def {node.name}\(.*?\n\n\n", f"{ast.unparse(node)}\n\n\n", block, flags=re.DOTALL)
            assert found == 1, node.name
    return f"{before}#{block}#{after}"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_the_worked_examples_train_in_place_of_the_functions_that_they_replace(script, tmp_path, monkeypatch):
    """And learn, with the thread pool, too. Nothing outside of the block knows the task."""
    assert len([line for line in TASK.splitlines() if line.strip()]) < 12
    monkeypatch.chdir(tmp_path)
    points = train_copy(tmp_path, script, with_task(script, TASK, POOL), 20)
    (_, first), *_, (_, last) = points["eval/sampled"]
    assert 0 < first < 0.4
    assert last > 0.75


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


@pytest.mark.slow
def test_the_trained_model_is_loaded_and_prompted_as_it_is_shown(tmp_path, monkeypatch):
    """The tiny model, as if it had been trained: `policy/` is a folder of the same kind."""
    (tmp_path / "runs/RUN_NAME").mkdir(parents=True)
    (tmp_path / "runs/RUN_NAME/policy").symlink_to(ROOT / "tests/tiny")
    (tmp_path / "load.py").write_text(LOADING)
    monkeypatch.chdir(tmp_path)
    assert "38+57=" in finish(start([sys.executable, "load.py"]))


@pytest.mark.slow
def test_process_supervision_trains_in_place_of_the_lines_that_it_replaces(tmp_path, monkeypatch):
    lines = FILES["grpo.py"].splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.startswith("        groups = rewards.view"))
    assert lines[first + 1].startswith("        advantages = group_advantages(")
    lines[first : first + 2] = [STEPS]
    text = "".join(lines).replace(".view(-1, 1).expand_as(weights)", "").replace("import group_advantages", "import group_advantages, process_advantages")
    monkeypatch.chdir(tmp_path)
    points = train_copy(tmp_path, "grpo", text, 20)
    (_, first), *_, (_, last) = points["eval/sampled"]
    assert 0 < first < 0.5
    assert last > 0.9
