# SPDX-License-Identifier: MIT
"""Whatever is wrong with the flags is said in one sentence, without a traceback, and before anything is loaded. What is
right is completed by the defaults that depend on other flags."""

import inspect
import math
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
import ppo
from helpers.inputs import refusal
from helpers.runs import SCRIPTS

ROOT = Path(__file__).parents[1]


REFUSED = {
    "grpo --clip-eps nan": "--clip-eps must be positive, got nan",
    "grpo --num-minibatches 7": "must be a multiple of 7, the number of processes times --num-minibatches",
    "grpo --resume": "--resume needs the --run-name of the run to resume",
    "grpo --group-size 1": "--group-size must be at least 2, got 1",
    "grpo --kl-importance-weight --kl-estimator k2": "--kl-importance-weight needs k1 or k3",
    "ppo --gamma 1.01": "--gamma and --gae-lambda must be at most 1",
    "ppo --gae-lambda 1.01": "--gamma and --gae-lambda must be at most 1",
}


@pytest.mark.parametrize("command", REFUSED)
def test_flags_that_cannot_work_are_refused_before_anything_is_loaded(command, monkeypatch):
    name, *flags = command.split()
    script = {"grpo": grpo, "ppo": ppo}[name]
    monkeypatch.setattr(script, "load_policy", lambda *_: pytest.fail("not refused before"))
    assert REFUSED[command] in refusal(script, tyro.cli(script.Args, args=flags))


MAY_BE_0 = {"beta", "ref_refresh_every", "seed", "save_every", "eval_every", "gamma", "gae_lambda", "entropy_coef",
            "value_warmup_steps"}  # fmt: skip


@SCRIPTS
def test_check_args_has_a_least_value_for_every_number(script):
    """A gamma of 0 and a lambda of 0 are right: GAE Eq. 17 is lambda = 0."""
    for name, hint in typing.get_type_hints(script.Args).items():
        if hint not in (int, float, float | None):
            continue
        says = f"^--{name.replace('_', '-')} must be (positive|at least .*), got "
        for bad in (-1, math.nan, *([] if name in MAY_BE_0 else [0])):
            with pytest.raises(script.UserError, match=says):
                script.check_args(script.Args(**{name: bad}))
        if name in MAY_BE_0:
            script.check_args(script.Args(**{name: 0}))


@SCRIPTS
def test_check_args_refuses_choices_that_only_tyro_knew(script):
    """From Python, dtype="float16" failed after sampling and evaluation, and kl_estimator="k4" did not fail."""
    for name, hint in typing.get_type_hints(script.Args).items():
        if typing.get_origin(hint) is typing.Literal:
            with pytest.raises(script.UserError, match=f"^{name} must be one of .*, got 'other'"):
                script.check_args(script.Args(**{name: "other"}))


@SCRIPTS
def test_check_args_knows_held_out_problems_of_the_tiny_ones_alone(script):
    assert script.check_args(script.Args()) == script.Args(eval_data=str(script.TINY / "test.jsonl"))
    for args in (dict(data="x"), dict(eval_data="y"), dict(eval_data="")):  # "" is a file that cannot be read
        assert script.check_args(script.Args(**args)) == script.Args(**args)


@settings(max_examples=30)
@given(st.data())
def test_any_command_line_is_completed_or_refused(data):
    """Flags, each with a value of its type or with something else."""
    line = []
    for name, hint in data.draw(st.lists(st.sampled_from([*typing.get_type_hints(ppo.Args).items()]), max_size=3)):
        value = st.sampled_from(["-1", "1e9", "nan", "None", "=", ""]) | st.from_type(hint).map(str)
        line += [f"--{name.replace('_', '-')}", data.draw(value)]
    try:
        args = ppo.check_args(tyro.cli(ppo.Args, args=line))
    except (ppo.UserError, SystemExit):  # of tyro
        return
    assert ppo.check_args(args) == args


@pytest.mark.slow
def test_a_real_process_ends_with_one_sentence_and_exit_code_1():
    command = [sys.executable, "grpo.py", "--data", "nothing.jsonl"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.startswith("grpo.py: cannot read nothing.jsonl: ")
    assert len((result.stdout + result.stderr).splitlines()) == 1


@SCRIPTS
def test_help_fits_a_terminal_of_80_columns(script, monkeypatch, capsys):
    """What the script does, its steps and commands, then the flags. Words were broken, and flags began at line 74."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [script.__file__, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(script.__file__, run_name="__main__")
    said = capsys.readouterr().out
    head, flags = said.split(" options ")
    assert max(map(len, head.splitlines())) < 80
    assert len(said.splitlines()) <= 112  # 110, and two more where the folder has a long name
    assert all(f"    {i}. " in head for i in (1, 2, 3, 4))
    assert head.count(f"    python {script.__name__}.py") == 2
    text = " ".join(" ".join(line.strip("│| ") for line in flags.splitlines()).split())
    helps = re.findall('"""(.*)"""', inspect.getsource(script.Args))
    assert [one for one in helps if one.startswith('"') or one not in text] == []  # no word is broken
