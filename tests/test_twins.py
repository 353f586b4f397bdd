# SPDX-License-Identifier: MIT
"""ppo.py and grpo.py are twins: what both need stands in both word for word, so that each can be copied alone."""

import ast
import dataclasses
import difflib
import itertools
from pathlib import Path

import pytest

import grpo
import ppo

# Renaming a function in one script is no escape: all of these must stand in both.
SHARED = {
    "Problem", "read_problem", "final_number", "reward", "tiny_problems", "tiny_demonstration", "sample_tokens",
    "generate_completions", "gathering_weights", "completion_hidden", "output_logits", "completion_logprobs",
    "loss_weights", "UserError", "first_sentence", "complete_args", "load_problems", "read_problems",
    "checked_problem", "load_tokenizer", "encode_prompt", "next_problems", "pad_prompts", "decode", "evaluate",
    "check_shapes", "completions_per_row", "split_batch", "score_batch", "optimizer_step", "Curves", "load_policy",
    "tiny_policy", "sharing_is_exact", "make_sampler", "refresh_sampler", "RoomyLayer", "reserve", "save_model",
    "digest", "world", "share", "gather", "add_up", "whole", "prepare", "full_state", "load_full_state", "main",
    "keep_memory", "seed_step", "Run",
}  # fmt: skip
# Where the papers themselves choose differently.
OWN_DEFAULTS = {"num_prompts", "group_size", "update_epochs", "num_minibatches", "beta", "kl_estimator", "kl_placement"}
OWN_HELP = {"group_size", "update_epochs", "beta", "kl_estimator", "kl_placement"}


def definitions(script: str) -> dict[str, str]:
    """Top-level functions and classes of a script, with decorators and the comments inside."""
    source = (Path(__file__).parents[1] / script).read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("Args", "train"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


IN_GRPO, IN_PPO = definitions("grpo.py"), definitions("ppo.py")


def test_the_shared_functions_are_all_there_and_all_named_here():
    assert IN_GRPO.keys() & IN_PPO.keys() == SHARED


@pytest.mark.parametrize("name", sorted(IN_GRPO.keys() & IN_PPO.keys()))
def test_functions_of_one_name_have_one_source(name):
    diff = difflib.unified_diff(IN_GRPO[name].splitlines(), IN_PPO[name].splitlines(), "grpo.py", "ppo.py", lineterm="")
    assert IN_GRPO[name] == IN_PPO[name], "\n".join(diff)


def flag_help(script: str) -> dict[str, str]:
    """The docstring under every field of Args."""
    tree = ast.parse((Path(__file__).parents[1] / script).read_text())
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
        source = (Path(__file__).parents[1] / script).read_text()
        assert {name for name in names if f"args.{name}" not in source} == set()


def test_flags_of_both_scripts_have_the_same_help_and_default():
    defaults = [{f.name: (f.type, f.default) for f in dataclasses.fields(module.Args)} for module in (grpo, ppo)]
    helps = flag_help("grpo.py"), flag_help("ppo.py")
    both = defaults[0].keys() & defaults[1].keys()
    assert {name for name in both if defaults[0][name] != defaults[1][name]} == OWN_DEFAULTS
    assert {name for name in both if helps[0][name] != helps[1][name]} == OWN_HELP


def test_the_scripts_import_only_advantage_and_kl_of_this_project():
    ours = {path.stem for path in Path(__file__).parents[1].glob("*.py")}
    for script in ("grpo.py", "ppo.py"):
        tree = ast.parse((Path(__file__).parents[1] / script).read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert modules & ours == {"advantage", "kl"}
