# SPDX-License-Identifier: MIT
"""ppo.py and grpo.py are twins: what both need stands in both, word for word and in the same order, so that each can be
copied alone and `diff grpo.py ppo.py` shows the differences between the algorithms."""

import ast
import dataclasses
import difflib
import itertools
from pathlib import Path

import pytest

import grpo
import ppo

ROOT = Path(__file__).parents[1]
SCRIPTS = {"grpo.py": grpo, "ppo.py": ppo}
SOURCES = {script: (ROOT / script).read_text() for script in SCRIPTS}
# What is each algorithm's own. Renaming a function in one script is no escape: it would have to stand here.
OWN = {
    "grpo.py": {"grpo_loss"},
    "ppo.py": {"ValueModel", "completion_values", "rewards_with_kl", "policy_loss", "value_loss",
               "transformers.modeling_outputs", "transformers.modeling_utils"},
}  # fmt: skip
DIFFERENT = {"Args", "Batch", "train", "LEAST", "check_args", "advantage", "kl"}  # in both, but not alike
OWN_BANNERS = ("# ----- Update: ", "# ----- The loop: ")
OWN_DEFAULTS = {"num_prompts", "group_size", "update_epochs", "num_minibatches", "beta", "kl_estimator"}
OWN_HELP = {"group_size", "update_epochs", "beta", "kl_estimator"}


def pieces(script: str) -> list[tuple[str, str]]:
    """The statements at the top level: the name that each defines, or its module, and its lines of text, from the end
    of the one before on: with decorators, comments and banners."""
    lines, found, end = SOURCES[script].splitlines(), [], 0
    for node in ast.parse(SOURCES[script]).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", None)
        found.append((name or getattr(node, "module", None) or "", "\n".join(lines[end : node.end_lineno])))
        end = node.end_lineno
    return found[1:]  # after the docstring


def test_what_both_scripts_need_is_the_same_text_in_the_same_order():
    shared = []
    for script in SCRIPTS:
        text = "\n".join(text for name, text in pieces(script) if name not in OWN[script] | DIFFERENT)
        shared.append([line for line in text.splitlines() if line and not line.startswith(OWN_BANNERS)])
    assert len(shared[0]) > 600
    assert shared[0] == shared[1], "\n".join(difflib.unified_diff(*shared, "grpo.py", "ppo.py", lineterm=""))


def test_nothing_is_listed_as_an_algorithms_own_that_is_not():
    in_grpo, in_ppo = (dict(pieces(script)) for script in SCRIPTS)
    assert in_grpo.keys() - in_ppo.keys() == OWN["grpo.py"]
    assert in_ppo.keys() - in_grpo.keys() == OWN["ppo.py"]
    assert {name for name in in_grpo.keys() & in_ppo.keys() if in_grpo[name] != in_ppo[name] and name} >= DIFFERENT


def flag_help(script: str) -> dict[str, str]:
    """The docstring under every field of Args."""
    body = next(node for node in ast.parse(SOURCES[script]).body if getattr(node, "name", "") == "Args").body
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def test_every_flag_has_a_help_and_those_of_both_scripts_the_same_and_the_same_default():
    defaults = [{f.name: (f.type, f.default) for f in dataclasses.fields(x.Args)} for x in SCRIPTS.values()]
    helps = [flag_help(script) for script in SCRIPTS]
    assert [help.keys() for help in helps] == [flags.keys() for flags in defaults]
    both = defaults[0].keys() & defaults[1].keys()
    assert {name for name in both if defaults[0][name] != defaults[1][name]} == OWN_DEFAULTS
    assert {name for name in both if helps[0][name] != helps[1][name]} == OWN_HELP


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_import_only_advantage_and_kl_of_this_project(script):
    tree = ast.walk(ast.parse(SOURCES[script]))
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name.name for node in imports for name in node.names} | {getattr(x, "module", "") for x in imports}
    assert modules & {path.stem for path in ROOT.glob("*.py")} == {"advantage", "kl"}
