# SPDX-License-Identifier: MIT
"""The table of tests/tools/pitfalls.py fits the source: a commit that changes a line of it changes its row, too."""

from pathlib import Path

import pytest

from tools.pitfalls import PITFALLS, with_the_bug

ROOT = Path(__file__).parents[1]




def test_a_pitfall_that_does_not_fit_is_an_error():
    for change in (dict(old="no such text"), dict(old="a"), dict(function="no_such"), dict(new="(")):
        with pytest.raises((ValueError, SyntaxError)):
            with_the_bug(PITFALLS[0]._replace(**change))
