# SPDX-License-Identifier: MIT
"""ppo.py and grpo.py are twins: what both need stands in both, word for word and in the same order, so that each can be
copied alone and `diff grpo.py ppo.py` shows the differences between the algorithms."""

import ast
import dataclasses
import itertools
from pathlib import Path

import grpo
import ppo

ROOT = Path(__file__).parents[1]
# What is each algorithm's own. Renaming a function in one script is no escape: it would have to stand here.
OWN = {"grpo.py": {"grpo_loss"}, "ppo.py": {"ValueModel", "completion_values", "rewards_with_kl", "policy_loss",
                                            "value_loss"}}  # fmt: skip
DIFFERENT = {"Args", "Batch", "train"}  # in both, but not alike
OWN_CONSTANTS = {"LEARNING_RATES", "LEAST", "MOST", "NO_EFFECT"}
OWN_IMPORTS = {"grpo.py": {"advantage", "kl"}}
OWN_IMPORTS["ppo.py"] = OWN_IMPORTS["grpo.py"] | {"transformers.modeling_outputs", "transformers.modeling_utils"}
OWN_DEFAULTS = {"num_prompts", "group_size", "update_epochs", "num_minibatches", "beta", "kl_estimator", "kl_placement"}
OWN_HELP = {"group_size", "update_epochs", "beta", "kl_estimator", "kl_placement"}


def definitions(script: str) -> dict[str, str]:
    """Top-level functions and classes of a script in their order, with decorators and the comments inside."""
    source = (ROOT / script).read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


IN_GRPO, IN_PPO = definitions("grpo.py"), definitions("ppo.py")
SHARED = [name for name in IN_GRPO if name not in OWN["grpo.py"] | DIFFERENT]


def test_all_but_the_algorithms_own_functions_are_shared_and_stand_in_one_order():
    assert IN_GRPO.keys() - IN_PPO.keys() == OWN["grpo.py"]
    assert IN_PPO.keys() - IN_GRPO.keys() == OWN["ppo.py"]
    assert len(SHARED) > 35
    assert [name for name in IN_PPO if name not in OWN["ppo.py"] | DIFFERENT] == SHARED




def without_its_own(script: str) -> str:
    """A script without the constants and imports that are the algorithm's own."""
    source, own = (ROOT / script).read_text(), []
    for node in ast.parse(source).body:
        names = {target.id for target in node.targets} if isinstance(node, ast.Assign) else set()
        own += [node] if names & OWN_CONSTANTS or getattr(node, "module", None) in OWN_IMPORTS[script] else []
    assert len(own) == len(OWN_CONSTANTS) + len(OWN_IMPORTS[script])
    dropped = {number for node in own for number in range(node.lineno, node.end_lineno + 1)}
    return "".join(x for number, x in enumerate(source.splitlines(True), start=1) if number not in dropped)






def flag_help(script: str) -> dict[str, str]:
    """The docstring under every field of Args."""
    tree = ast.parse((ROOT / script).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def test_every_flag_has_its_help_and_is_read():
    for script, module in (("grpo.py", grpo), ("ppo.py", ppo)):
        names = {field.name for field in dataclasses.fields(module.Args)}
        assert flag_help(script).keys() == names
        source = (ROOT / script).read_text()
        unread = {name for name in names if f"args.{name}" not in source}
        assert unread == set()




def test_the_scripts_import_only_advantage_and_kl_of_this_project():
    ours = {path.stem for path in ROOT.glob("*.py")}
    for script in ("grpo.py", "ppo.py"):
        tree = ast.parse((ROOT / script).read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert modules & ours == {"advantage", "kl"}
