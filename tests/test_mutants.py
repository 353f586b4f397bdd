# SPDX-License-Identifier: MIT
"""The table of tests/tools/pitfalls.py fits the source: a commit that changes a line of it changes its row, too."""

import ast
from pathlib import Path

import pytest

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
