# SPDX-License-Identifier: MIT
"""Whatever is wrong with the flags is said in one sentence with exit code 2, without a traceback, and before anything
that takes longer is loaded. What is right is completed by the defaults that depend on other flags.
"""

import contextlib
import io
import math
import os
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
import ppo
from helpers.inputs import main
from helpers.runs import SCRIPTS, SMALL, TWINS, make_folder

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


@cases(
    ("--temperature 1e-40", "--temperature must be at least 0.001"),  # which is 0 in float32
    ("--clip-eps nan", "--clip-eps must be positive, got nan"),
    ("--clip-eps 1.5", "--clip-eps must be at most 1, got 1.5"),
    ("--num-prompts 1048577", "--num-prompts must be at most 1048576"),
    ("--group-size 65537", "--group-size must be at most 65536"),
    ("--num-minibatches 7", "must be a multiple of 7, the number of processes times --num-minibatches"),
    ("--num-prompts 2 --num-minibatches 4", "--num-prompts 2 must be a multiple of 4"),
    ("--resume auto", "--resume auto needs the --run-name"),
    ("--run-name ''", "--run-name must be the name of a folder in runs/, got ''"),
    ("--run-name ..", "--run-name must be the name of a folder in runs/, got '..'"),
    ("--run-name .", "--run-name must be the name"),
    ("--run-name a/b", "--run-name must be the name"),
    ("--run-name 'a\nb'", "--run-name must be the name"),
    ("--run-name 'a\udcff'", r"--run-name must be the name of a folder in runs/, got 'a\udcff'"),
    (grpo, "--group-size 1", "--group-size must be at least 2, got 1"),
    (ppo, "--gamma 1.01", "--gamma must be at most 1, got 1.01"),
    (ppo, "--gae-lambda 1.01", "--gae-lambda must be at most 1, got 1.01"),
    # A flag that would do nothing, because another one has switched off what it changes.
    ("--kl-estimator k2 --beta 0", "--kl-estimator has no effect with --beta 0"),
    (grpo, "--kl-placement reward --beta 0", "--kl-placement has no effect with --beta 0"),
    (grpo, "--kl-importance-weight --beta 0", "--kl-importance-weight has no effect with --beta 0"),
    (grpo, "--ref-refresh-every 1 --beta 0", "--ref-refresh-every has no effect with --beta 0"),
    (grpo, "--kl-importance-weight --kl-placement reward", "--kl-importance-weight has no effect with --kl-placement"),
    (ppo, "--kl-placement loss --beta 0", "--kl-placement has no effect with --beta 0"),
    (ppo, "--adaptive-kl-target 6 --beta 0", "--adaptive-kl-target has no effect with --beta 0"),
    (ppo, "--early-stop-kl 0.1 --update-epochs 1", "--early-stop-kl has no effect with --update-epochs 1"),
    (ppo, "--penalty-kl-target 1 --clip-eps 0.1", "--clip-eps has no effect with --penalty-kl-target"),
    (ppo, "--penalty-kl-target 1 --clip-eps-high 0.1", "--clip-eps-high has no effect with --penalty-kl-target"),
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_flags_that_cannot_work_are_refused_before_anything_is_loaded(script, flags, says, capsys):
    assert says in main(script, tyro.cli(script.Args, args=shlex.split(flags)), capsys, exit_code=2)


MAY_BE_0 = {"beta", "ref_refresh_every", "seed", "save_every", "eval_every", "gamma", "gae_lambda", "entropy_coef",
            "value_warmup_steps"}  # fmt: skip


@SCRIPTS
def test_every_number_has_a_range(script):
    for name, hint in typing.get_type_hints(script.Args).items():
        if hint not in (int, float, float | None):
            continue
        says = f"^--{name.replace('_', '-')} must be (positive|at (least|most) .*), got "
        for bad in (-1, math.nan, math.inf, 2**31, *([] if name in MAY_BE_0 else [0])):
            with pytest.raises(script.UserError, match=says):
                script.check_args(script.Args(**{name: bad}))
        if name in MAY_BE_0:
            script.check_args(script.Args(**{name: 0}))


@TWINS
@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_device_that_is_not_there_is_refused(script, device, capsys):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there may be one")
    assert f"--device {device}: not available" in main(script, script.Args(device=device), capsys, exit_code=2)


@TWINS
@pytest.mark.parametrize(
    "variables",
    [
        dict(RANK="0", WORLD_SIZE="2"),
        dict(MASTER_ADDR="localhost"),
        dict(MASTER_ADDR="localhost", MASTER_PORT="x", RANK="0", WORLD_SIZE="2"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_launch_variables_that_are_set_by_half_are_refused(script, variables, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = main(script, script.Args(device="cpu"), capsys, exit_code=2)
    assert "cannot join the other processes, which torchrun starts: " in said


@TWINS
def test_one_process_that_is_called_the_first_of_one_works_alone(script, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert script.start(script.Args(device="cpu")).type == "cpu"
    assert script.world() == (0, 1)


@TWINS
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (dict(run_name="x" * 300), "cannot write the run to runs/xxx"),
        (dict(run_name="x" * 300, resume="auto"), "runs/xxx"),
        (dict(run_name="file", resume="auto"), "cannot write the run to runs/file (to resume a run"),
        (dict(resume="x" * 300), f"{'x' * 300} cannot be loaded: "),
        (dict(resume="nowhere"), "nowhere cannot be loaded: "),
    ],
    ids=["long name", "long name resumed", "a file", "long checkpoint", "no checkpoint"],
)
def test_run_folders_and_checkpoints_that_cannot_be_are_refused(script, flags, says, folder, capsys):
    make_folder(folder)
    Path("runs").mkdir()
    Path("runs/file").touch()
    assert says in main(script, script.Args(**SMALL | dict(run_name="new") | flags), capsys, exit_code=2)
    assert [*Path("runs").iterdir()] == [Path("runs/file")]


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


@SCRIPTS
def test_what_depends_on_other_flags_is_filled_in(script):
    """The tiny model has a learning rate and a test set of its own, however its folder is spelled."""

    def filled(**args) -> dict:
        before = script.Args(**args)
        after = vars(script.check_args(before))
        return {name: value for name, value in after.items() if value != getattr(before, name)}

    tiny, other = {"learning_rate": 5e-4}, {"learning_rate": 1e-6}
    if script is ppo:
        tiny, other = tiny | {"value_learning_rate": 1e-3}, other | {"value_learning_rate": 1e-5}
    test_set = {"eval_data": str(script.TINY / "test.jsonl")}
    assert filled() == tiny | test_set
    assert filled(model="x") == other | test_set
    assert filled(data="x") == filled(data="x", eval_data="y") == filled(eval_data="y") == tiny
    assert filled(model="x", eval_data="y", **dict.fromkeys(tiny, 0.5)) == {}
    os.chdir(ROOT)
    for spelled in ("tests/tiny", "./tests/tiny/", "tests/../tests/tiny", str(ROOT / "tests/tiny")):
        assert filled(model=spelled, data=f"{spelled}/train.jsonl") == tiny | test_set
    assert filled(data="tests/tiny/test.jsonl") == tiny


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


@TWINS
@settings(max_examples=30)
@given(data=st.data())
def test_any_command_line_is_completed_or_refused(script, data):
    line, exit_code, complete, said = data.draw(command_lines(script)), 0, None, io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            complete = script.check_args(tyro.cli(script.Args, args=line))
    except script.UserError:
        return
    except SystemExit as error:
        exit_code = error.code
    assert (exit_code, bool(said.getvalue())) in [(0, False), (2, True)]
    if complete:
        assert None not in [getattr(complete, name) for name in script.LEARNING_RATES]
        assert script.check_args(complete) == complete
