# SPDX-License-Identifier: MIT
"""Whatever is wrong with the flags is said in one sentence with exit code 2, without a traceback, and before anything
that takes longer is loaded. What is right is completed by the defaults that depend on other flags.
"""

import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import tyro
from hypothesis import strategies as st

import grpo
import ppo
from helpers.runs import TWINS

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty one to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_is_loaded(monkeypatch) -> None:
    for script in (grpo, ppo):
        monkeypatch.setattr(script, "load_problems", lambda *_: pytest.fail("not refused before"))


def cases(*rows: tuple) -> pytest.MarkDecorator:
    """A test for every row (flags, what is said) in both scripts, and for every (script, flags, what is said)."""
    both = [(script, *row) for row in rows if len(row) == 2 for script in (grpo, ppo)]
    one = [row for row in rows if len(row) == 3]
    params = [pytest.param(*row, id=f"{row[0].__name__} {row[1]}") for row in both + one]
    return pytest.mark.parametrize(("script", "flags", "says"), params)


# ----- Flags that are refused -----


@cases(
    ("--no-such-flag 1", "--no-such-flag"),
    ("--seed x", "--seed"),
    ("--num-prompts 2.5", "--num-prompts"),
    ("--kl-estimator k4", "--kl-estimator"),
    ("--loss-average mean", "--loss-average"),
    ("--device tpu", "--device"),
    ("--dtype float16", "--dtype"),
    ("loose", "loose"),
    (grpo, "--gamma 1", "--gamma"),
    (grpo, "--process-supervision", "--process-supervision"),
    (ppo, "--mask-truncated", "--mask-truncated"),
)
def test_unknown_flags_and_values_are_named(script, flags, says, capsys):
    with pytest.raises(SystemExit) as exit_of_tyro:
        tyro.cli(script.Args, args=shlex.split(flags))
    assert exit_of_tyro.value.code == 2
    assert says in capsys.readouterr().err




MAY_BE_0 = {"beta", "ref_refresh_every", "seed", "save_every", "eval_every", "gamma", "gae_lambda", "entropy_coef",
            "value_warmup_steps"}  # fmt: skip












@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("grpo.py --clip-eps nan", "grpo.py: --clip-eps must be positive, got nan"),
        ("ppo.py --data nothing.jsonl", "ppo.py: cannot read nothing.jsonl: "),
    ],
)
def test_a_real_process_ends_with_the_sentence_and_exit_code_2(command, says):
    result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@TWINS
def test_a_fault_of_the_script_is_not_hidden(script, monkeypatch):
    monkeypatch.setattr(script, "train", lambda args, stop: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError):
        script.main(script.Args())


# ----- Flags that are completed -----




words = st.text(st.characters(codec="utf-8"), max_size=5) | st.sampled_from(["-1", "1e9", "nan", "None", "=", "--beta"])


def command_lines(script) -> st.SearchStrategy[list[str]]:
    """Some of the flags, with values of their types and others, and other words."""
    hints = typing.get_type_hints(script.Args)
    flags = st.sampled_from(sorted(hints)).flatmap(
        lambda name: st.tuples(st.just(f"--{name.replace('_', '-')}"), st.from_type(hints[name]).map(str) | words)
    )
    lines = st.lists(flags | st.tuples(words), max_size=3).map(lambda parts: [word for part in parts for word in part])
    # Help ends with exit code 0, and no process has an argument with a NUL.
    return lines.filter(lambda line: not {"-h", "--help"} & {*line} and "\0" not in "".join(line))


