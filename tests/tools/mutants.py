# SPDX-License-Identifier: MIT
"""Mutation testing: change the math a little, a thousand times, and see whether a test fails every time.

    .venv/bin/python tests/tools/mutants.py                      all mutants
    .venv/bin/python tests/tools/mutants.py "ppo.x_value_loss*"    the mutants of one function

Prints the score and, as diffs, the mutants that no test notices; fails if one of them is not in survivors.txt, which
says why it changes nothing. WORKERS=2 takes two processes. Works in a temporary folder, into which it also installs
mutmut where the interpreter lacks it. What stands word for word in both scripts (test_twins.py) is mutated in grpo.py
alone; the sentences of errors are not mutated.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# By default every function of a file.
MUTATED = {
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
TIMEOUT = {-24, 24, 36, 152, 255}
KILLED = {1, 3} | TIMEOUT  # a test failed, or took far too long


def fenced(source: str, names: set[str] | None) -> str:
    """The source, with mutmut's comments around what it shall leave alone: other functions, and errors."""
    lines, left_alone = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            mutated = names is None or node.name in names
            left_alone += [x for x in ast.walk(node) if isinstance(x, ast.Raise)] if mutated else [node]
    for node in sorted(left_alone, key=lambda node: -node.lineno):
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        lines.insert(node.end_lineno, " " * node.col_offset + "# pragma: no mutate end")
        lines.insert(first - 1, " " * node.col_offset + "# pragma: no mutate start")
    return "\n".join(lines) + "\n"


def known_survivors() -> set[str]:
    """The diffs of survivors.txt, without the reasons."""
    text = re.sub(r"^#.*\n", "", (HERE / "survivors.txt").read_text(), flags=re.MULTILINE)
    return {block.strip() for block in text.split("\n\n") if block.strip()}


def survivors(results: dict[str, int]) -> set[str]:
    """What no test has noticed: the function, and the changed lines before and after, without comments."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    found = set()
    for name in (name for name, code in results.items() if code not in KILLED):
        diff = get_diff_for_mutant(name).splitlines()[3:]
        changed = [f"{line[0]} {re.sub(r'  #.*', '', line[1:]).strip()}" for line in diff if line[0] in "+-"]
        function = re.sub(r"x_|xǁ", "", name.partition("__mutmut_")[0]).replace("ǁ", ".")
        found.add("\n".join([function, *changed]))
    return found


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="mutants-of-") as folder:
        folder, tools = Path(folder), Path(folder, "tools")
        for name, names in MUTATED.items():
            (folder / name).write_text(fenced((ROOT / name).read_text(), names))
        (folder / "setup.cfg").write_text(SETTINGS)
        shutil.copy(ROOT / ".pytest.ini", folder)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        if VERSION not in [x.version for x in metadata.distributions(name="mutmut")]:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tools, f"mutmut=={VERSION}"]
            subprocess.run(pip, check=True)
        sys.path.append(str(tools))  # last: everything else stays as the tests have it

        os.chdir(folder)
        os.environ |= {"HYPOTHESIS_PROFILE": "mutation", "OMP_NUM_THREADS": "1"}
        start = time.monotonic()
        run = [sys.executable, "-c", MUTMUT, tools, "run", "--max-children", os.environ.get("WORKERS", "1")]
        subprocess.run(run + sys.argv[1:], check=True)
        results = {}
        for name in MUTATED:
            results |= json.loads((folder / "mutants" / f"{name}.meta").read_text())["exit_code_by_key"]
        if sys.argv[1:]:
            results = {name: code for name, code in results.items() if code is not None}
        found, minutes = survivors(results), (time.monotonic() - start) / 60

    known = known_survivors()
    killed, slow = (sum(code in codes for code in results.values()) for codes in (KILLED, TIMEOUT))
    print(f"\n{killed} of {len(results)} mutants killed ({slow} by the time limit), ", end="")
    print(f"{100 * killed / len(results):.1f} %, in {minutes:.0f} minutes")
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
