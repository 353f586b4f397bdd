# SPDX-License-Identifier: MIT
"""Mutation testing: change the scripts a little, 1,300 times, and see whether a quick test fails every time.

    .venv/bin/python tests/tools/mutants.py                 all mutants
    .venv/bin/python tests/tools/mutants.py ppo.value_loss  those of one function, or of all that fit: "ppo.*_loss"

mutmut changes the formulas; it is installed into a temporary folder where the interpreter lacks it. The wiring, which
is `train`, what it calls in every step, and all under the banner SPEED, is changed here, in four ways:

    flag       args.beta becomes the default of --beta, as if nothing read the flag
    argument   two neighbouring arguments of a call are swapped
    keyword    an argument with a name is left out
    sign       + becomes -, < becomes <=, `and` becomes `or`, `not` is left out, and so on

Prints a score for each kind and, as diffs, the mutants that no test notices; fails if one of them is not in
survivors.txt, which says why no quick test can see it. WORKERS=2 takes two processes. What stands word for word in both
scripts (test_twins.py) is mutated in grpo.py alone; the sentences of errors are not mutated.
"""

import ast
import difflib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKERS = int(os.environ.get("WORKERS", "1"))
Result = tuple[str, str, bool]  # of a mutant: its kind, its lines in survivors.txt, and whether a test noticed it


def changed_lines(function: str, diff: list[str]) -> str:
    """As survivors.txt shows a diff, which has a header of three lines."""
    changed = [f"{line[0]} {re.sub(r'  #.*', '', line[1:]).strip()}" for line in diff[3:] if line[0] in "+-"]
    return "\n".join([function, *changed])


def copy_tree(folder: Path) -> None:
    for path in (*ROOT.glob("*.py"), ROOT / ".pytest.ini"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))


# ----- The formulas, by mutmut -----

FORMULAS = {  # by default every function of a file
    "advantage.py": None,
    "kl.py": None,
    "grpo.py": {"loss_weights", "grpo_loss", "predict_completions", "completion_logprobs", "token_entropy"},
    "ppo.py": {"policy_loss", "value_loss", "rewards_with_kl", "completion_values", "ValueModel"},
}
VERSION = "3.8.1"  # of mutmut
SETTINGS = """
[mutmut]
source_paths=
    advantage.py
    kl.py
    grpo.py
    ppo.py
# torch does not like to be forked from a process that has used it.
process_isolation=forkserver
also_copy=
    .pytest.ini
pytest_add_cli_args_test_selection=
    -knot qwen3_5_text and (not __mutmut_ or __mutmut_orig)
    tests/test_advantage.py
    tests/test_kl.py
    tests/test_losses.py
    tests/test_logprobs.py
# A mutant may take four times as long as its tests and a minute: nothing here can run forever, so this is for load.
timeout_multiplier=4
timeout_constant=60
"""
MUTMUT = "import sys; sys.path.append(sys.argv.pop(1)); from mutmut.__main__ import cli; cli(prog_name='mutmut')"
NOTICED = {1, 3, -24, 24, 36, 152, 255}  # a test failed, or took far too long


def fenced(file: str, pattern: str) -> str:
    """The source, with mutmut's comments around what it shall leave alone: other functions, and errors."""
    lines, left_alone = (ROOT / file).read_text().splitlines(), []
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            is_formula = FORMULAS[file] is None or node.name in FORMULAS[file]
            is_mutated = is_formula and fnmatch(f"{file[:-3]}.{node.name}", pattern)
            left_alone += [x for x in ast.walk(node) if isinstance(x, ast.Raise)] if is_mutated else [node]
    for node in sorted(left_alone, key=lambda node: -node.lineno):
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        lines.insert(node.end_lineno, " " * node.col_offset + "# pragma: no mutate end")
        lines.insert(first - 1, " " * node.col_offset + "# pragma: no mutate start")
    return "\n".join(lines) + "\n"


def try_formulas(pattern: str, folder: Path) -> list[Result]:
    """All mutants of the formulas whose names fit."""
    if all(fenced(file, pattern) == fenced(file, "") for file in FORMULAS):
        return []
    copy_tree(folder)
    for file in FORMULAS:
        (folder / file).write_text(fenced(file, pattern))
    (folder / "setup.cfg").write_text(SETTINGS)
    tools, pip = folder / "tools", [sys.executable, "-m", "pip", "install", "--quiet", f"mutmut=={VERSION}", "--target"]
    if VERSION not in [x.version for x in metadata.distributions(name="mutmut")]:
        subprocess.run([*pip, tools], check=True)
    sys.path.append(str(tools))  # last: everything else stays as the tests have it
    os.chdir(folder)
    subprocess.run([sys.executable, "-c", MUTMUT, tools, "run", "--max-children", str(WORKERS)], check=True)
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    results = []
    for file in FORMULAS:
        for name, code in json.loads(Path("mutants", f"{file}.meta").read_text())["exit_code_by_key"].items():
            function = re.sub(r"x_|xǁ", "", name.partition("__mutmut_")[0]).replace("ǁ", ".")
            diff = changed_lines(function, get_diff_for_mutant(name).splitlines())
            results.append(("formula", diff, code in NOTICED))
    os.chdir(ROOT)
    return results


# ----- The wiring -----

WIRING = {"train", "rollout", "evaluate", "optimizer_step"}  # and all under the banner SPEED
TESTS = [f"tests/test_{x}.py" for x in ("wiring", "batching", "training", "sampling", "logprobs", "checkpoints")]
TIME_LIMIT = 600  # seconds: a mutant may run forever
SIGNS = {
    "+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "&": "|", "and": "or", "or": "and",
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is",
}  # fmt: skip
# Left out, these change nothing on a CPU (test_device.py, which is slow, sees `device`), or only the speed.
UNSEEN = {"device", "use_cache", "stable", "fused"}
# The tests of a mutant are forked from a process that has imported these, which takes longer than most of them.
IMPORTED = (
    "pytest", "tyro", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2",
)  # fmt: skip


def wiring_mutants(pattern: str) -> list[tuple[str, str, str, str]]:
    """(kind, function, file, changed source) of all mutants of the functions whose names fit, each source once."""
    mutants, seen = {}, set()
    for file in ("grpo.py", "ppo.py"):
        source = (ROOT / file).read_text()
        assert source.isascii(), "ast counts columns in bytes"
        lines = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
        tree = ast.parse(source)
        for node in (node for node in ast.walk(tree) if hasattr(node, "lineno")):
            node.first = lines[node.lineno - 1] + node.col_offset
            node.last = lines[node.end_lineno - 1] + node.end_col_offset
        speed, plumbing = (source.index(f"= {banner} =") for banner in ("SPEED", "PLUMBING"))
        flags = next(node for node in tree.body if getattr(node, "name", "") == "Args").body
        flags = [flag for flag in flags if isinstance(flag, ast.AnnAssign) and isinstance(flag.value, ast.Constant)]
        defaults = {flag.target.id: flag.value.value for flag in flags}
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            name, text = f"{file[:-3]}.{function.name}", ast.unparse(function)
            is_wiring = function.name in WIRING or speed < function.first < plumbing
            if not is_wiring or text in seen or not fnmatch(name, pattern):
                continue
            seen.add(text)
            for node in itertools.chain(*map(ast.walk, function.body)):
                for kind, first, last, new in changes(source, node, defaults):
                    changed = source[:first] + new + source[last:]
                    if changed != source:
                        mutants.setdefault(changed, (kind, name, file, changed))
    return list(mutants.values())


def changes(source: str, node: ast.AST, defaults: dict) -> Iterator[tuple[str, int, int, str]]:
    """All that is changed about a node: the kind, from where to where, and the new text."""
    operands = []
    match node:
        case ast.Attribute(value=ast.Name("args"), attr=name) if name in defaults:
            yield "flag", node.first, node.last, repr(defaults[name])
        case ast.Call():
            for a, b in itertools.pairwise(node.args if ast.unparse(node.func) not in ("min", "max") else []):
                texts = source[b.first : b.last], source[a.last : b.first], source[a.first : a.last]
                yield "argument", a.first, b.last, "".join(texts)
            for keyword in (x for x in node.keywords if x.arg not in UNSEEN):
                comma = re.compile(r",?\s*").match(source, keyword.last)
                yield "keyword", keyword.first, comma.end(), ""
        case ast.UnaryOp() if not isinstance(node.operand, ast.Constant):  # -1 is an axis, or the last place
            yield "sign", node.first, node.operand.first, ""
        case ast.BinOp():
            operands = [node.left, node.right]
        case ast.BoolOp():
            operands = node.values
        case ast.Compare():
            operands = [node.left, *node.comparators]
    for a, b in itertools.pairwise(operands):
        between = source[a.last : b.first]
        sign = between.strip("() \n")
        if sign in SIGNS:
            yield "sign", a.last, b.first, between.replace(sign, SIGNS[sign])


def run_tests(folder: str, script: str) -> None:
    """End with exit code 0 if all tests pass. Those of the wiring of this script notice most: they come first."""
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("output", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    options = ["-x", "-q", "--basetemp=temporary", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
    sys.exit(int(pytest.main([*options, TESTS[0], "-k", script]) or pytest.main([*options, *TESTS[1:]])))


def try_mutant(kind: str, function: str, file: str, source: str) -> Result:
    before = (ROOT / file).read_text()
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        Path(folder, file).write_text(source)
        process = multiprocessing.get_context("forkserver").Process(target=run_tests, args=[folder, file[:-3]])
        process.start()
        process.join(TIME_LIMIT)
        process.kill()
        process.join()
        if process.exitcode and source == before:
            raise RuntimeError("without a mutant:\n" + Path(folder, "output").read_text())
    diff = difflib.unified_diff(before.splitlines(), source.splitlines(), lineterm="", n=0)
    print("." if process.exitcode else "S", end="", flush=True)
    return kind, changed_lines(function, [*diff]), process.exitcode != 0


def main() -> int:
    os.environ |= dict(HYPOTHESIS_PROFILE="mutation", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    multiprocessing.set_forkserver_preload([*IMPORTED])
    pattern, start = sys.argv[1] if sys.argv[1:] else "*", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-of-") as folder:
        results = try_formulas(pattern, Path(folder))
    if mutants := wiring_mutants(pattern):
        try_mutant("", "", "ppo.py", (ROOT / "ppo.py").read_text())
        with ThreadPoolExecutor(WORKERS) as pool:
            results += pool.map(lambda mutant: try_mutant(*mutant), mutants)
    print(f"\n{len(results)} mutants in {(time.monotonic() - start) / 60:.0f} minutes")
    for kind in sorted({kind for kind, _, _ in results}):
        noticed = [is_noticed for its_kind, _, is_noticed in results if its_kind == kind]
        print(f"{kind:10}{sum(noticed)} of {len(noticed)} noticed, {sum(noticed) / len(noticed):.1%}")
    without_reasons = re.sub(r"(?m)^#.*\n", "", (ROOT / "tests/tools/survivors.txt").read_text())
    known = {block.strip() for block in without_reasons.split("\n\n")} - {""}
    found = {diff for _, diff, is_noticed in results if not is_noticed}
    for title, diffs in (
        ("survive, as survivors.txt explains", found & known),
        ("are in survivors.txt, but no longer survive", set() if sys.argv[1:] else known - found),
        ("SURVIVE", found - known),
    ):
        print(f"\n{len(diffs)} {title}\n")
        print("\n\n".join(sorted(diffs)))
    return 1 if found - known else 0


if __name__ == "__main__":
    sys.exit(main())
