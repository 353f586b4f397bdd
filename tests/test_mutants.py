# SPDX-License-Identifier: MIT
"""The table of tests/tools/pitfalls.py fits the source: a commit that changes a line of it changes its row, too. And
tests/tools/mutants.py changes what it says it changes."""

import ast
from pathlib import Path

import pytest

from tools import mutants
from tools.pitfalls import PITFALLS, with_the_bug

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("pitfall", PITFALLS, ids=lambda x: f"{x.file} {x.what}")
def test_every_pitfall_fits_the_source_and_its_test_exists(pitfall):
    assert with_the_bug(pitfall) != (ROOT / pitfall.file).read_text()
    file, name = pitfall.test.partition("[")[0].split("::")
    assert name in {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}


def test_a_pitfall_that_does_not_fit_is_an_error():
    for change in (dict(old="no such text"), dict(old="a"), dict(function="no_such"), dict(new="(")):
        with pytest.raises((ValueError, SyntaxError)):
            with_the_bug(PITFALLS[0]._replace(**change))


SCRIPT = """
class Args:
    beta: float = 0.04
def other(args): return args.beta
def train(args): return {}
# = SPEED =
# = PLUMBING =
"""


def test_wiring_mutants_are_all_changes_of_every_kind_once(tmp_path, monkeypatch):
    """In `train`, not in another function; what both scripts have is changed in one."""
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    for file in ("grpo.py", "ppo.py"):
        (tmp_path / file).write_text(SCRIPT.format("f(a, -args.beta, g=(b < 1) + 2)"))
    expected = {
        ("flag", "f(a, -0.04, g=(b < 1) + 2)"), ("argument", "f(-args.beta, a, g=(b < 1) + 2)"),
        ("keyword", "f(a, -args.beta, )"), ("sign", "f(a, args.beta, g=(b < 1) + 2)"),
        ("sign", "f(a, -args.beta, g=(b <= 1) + 2)"), ("sign", "f(a, -args.beta, g=(b < 1) - 2)"),
    }  # fmt: skip
    found = mutants.wiring_mutants("*")
    assert {(kind, source) for kind, _, _, source in found} == {(kind, SCRIPT.format(x)) for kind, x in expected}
    assert {(function, file) for _, function, file, _ in found} == {("grpo.train", "grpo.py")}
