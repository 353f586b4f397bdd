# SPDX-License-Identifier: MIT
"""What can go wrong in a run, done to it: it is killed, resumed with something changed, its disk is full, its
checkpoint damaged, its reward fails, its gradient is not finite. Nothing that was learned and kept may be lost, and a
sentence says what happened. In the folder of every test are model/, data.jsonl, runs/whole, a run of 4 steps to which
nothing has happened, and runs/half, the same one stopped after 2; a test's own run is runs/a.
"""

import contextlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import grpo
import helpers.runs
import ppo
from helpers.runs import Forked, assert_same_run, command, curves, finish, make_folder, variety

CHECKPOINT, ASIDE, HALF = map(Path, ("runs/a/checkpoint.pt", "runs/a/checkpoint.aside", "runs/half/checkpoint.pt"))
arguments = partial(helpers.runs.arguments, eval_every=2)


@pytest.fixture(scope="module", params=[grpo, pytest.param(ppo, marks=pytest.mark.slow)], ids=["grpo", "ppo"])
def prepared(request, tmp_path_factory) -> tuple:
    """One of the scripts, and a folder with what every test begins with."""
    script, folder = request.param, tmp_path_factory.mktemp("prepared")
    make_folder(folder)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "reward", variety)
        script.train(arguments(script, run_name="whole"))
        script.train(arguments(script, run_name="half", num_steps=2))
    return script, folder


@pytest.fixture
def script(prepared, tmp_path, monkeypatch):
    script, folder = prepared
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "reward", variety)
    return script


@pytest.fixture
def run(script, capsys) -> Callable[..., str]:
    def run(code: int = 0, **args: object) -> str:
        """What `main` says on its way to this exit code; it is one sentence if it is 2."""
        capsys.readouterr()
        assert script.main(arguments(script, **args)) == code, capsys.readouterr().err
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.count(f"{script.__name__}.py: ") == (code == 2), said
        return said

    return run


def evaluated() -> Counter:
    """How many completions of each step are kept; an evaluation has 5 + 5."""
    lines = Path("runs/a/completions.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["step"] for line in lines)


# ----- SIGKILL at any moment -----


def time_of_save() -> int:
    return CHECKPOINT.stat().st_mtime_ns if CHECKPOINT.exists() else 0


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_never_killed(script, run):
    """Before the first checkpoint, between saves and inside them: the checkpoint and the curves have the same bits."""
    kills, seed, inside = 10, random.randrange(1000), 0
    moments = random.Random(seed)
    args = dict(num_steps=2 * kills + 2, save_every=1, eval_every=3, beta=0.05)
    args |= dict(adaptive_kl_target=0.01, value_warmup_steps=5) if script is ppo else dict(ref_refresh_every=4)
    run(run_name="never_killed", **args)
    again = command(script.__name__, run_name="a", resume=True, **args)
    for kill in range(kills):
        with Forked(again) as process:
            process.wait_until(Path("runs/a").exists)
            for _ in range(moments.randint(1, 2) if kill else 0):  # the first one before there is a checkpoint
                before = time_of_save()
                process.wait_until(lambda: time_of_save() != before)  # noqa: B023
            if kill % 3 == 0:
                time.sleep(moments.uniform(0, 0.1))
            elif kill % 3 == 1:  # inside a save, while the file is being written
                process.wait_until(ASIDE.exists)
                time.sleep(moments.choice([0, 0, 0.001]))
            process.kill()  # kill % 3 == 2: inside a save, while policy/ is being written
            inside += ASIDE.exists()
    finish(Forked(again))
    assert inside, f"no kill of seed {seed} came inside a save"
    assert_same_run("never_killed", "a")
    assert [step for step, _ in curves("a")["reward/mean"]] == [*range(args["num_steps"])]
    assert set(evaluated().values()) == {10}
    assert not ASIDE.exists(), "what a killed save leaves behind is written over"




# ----- Exact resume -----
















# ----- Refused -----








@pytest.mark.slow
def test_two_processes_do_not_resume_one_run_at_the_same_time(script, run):
    slow = "script.reward = lambda completion, problem: time.sleep(0.01) or len(set(completion)) / 10"
    warmup = dict(value_warmup_steps=0) if script is ppo else {}
    again = command(script.__name__, slow, run_name="half", num_steps=1000, resume=True, **warmup)
    with Forked(again) as process:
        process.wait_until_it_says("in runs/half")
        said = run(2, run_name="half", resume=True)
        assert "runs/half (to resume a run: --resume auto, once at a time): The file lock" in said
    run(run_name="half", num_steps=3, resume=True)  # a kill opens the lock


# ----- SIGTERM and SIGINT (see also test_training.py) -----


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [grpo], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(script, number):
    step_of_minutes = "script.reward = lambda *texts: print('rewarding', flush=True) or time.sleep(60)"
    with Forked(command("grpo", step_of_minutes, run_name="a")) as process:
        for text in ("rewarding", "finishing this step, then saving; a second signal exits at once"):
            process.wait_until_it_says(text)
            assert process.is_alive()
            os.kill(process.pid, number)
        process.join(20)
        assert process.exitcode == -number


# ----- A full disk -----


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[Callable[[int], None]]:
    """No file can grow beyond `size` bytes: writing more fails, as on a full disk, with OSError (EFBIG). Gives a
    function that sets another size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    allow = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    allow(size)
    try:
        yield allow
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)










# ----- Damaged checkpoints -----


def altered(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def middles() -> dict[str, int]:
    """A place in the middle of every file within the zip file that a checkpoint is."""
    content, places = HALF.read_bytes(), {}
    for file in zipfile.ZipFile(HALF).infolist():
        sizes = struct.unpack_from("<HH", content, file.header_offset + 26)  # of its name and of what else is there
        places[file.filename] = file.header_offset + 30 + sum(sizes) + file.file_size // 2
    return places






# ----- A reward that fails -----


def good_rewards_until(call: int, wrong: object) -> Callable[[str, dict], float]:
    """A reward whose call of this number, counted from 0, raises or returns what is wrong."""
    calls = itertools.count()

    def failing(*texts: object) -> object:
        if next(calls) != call:
            return variety(*texts)
        if isinstance(wrong, type):
            raise wrong
        return wrong

    return failing


TOO_LARGE = "the reward is {}, not a number below 1e15, for '"
WRONG = [  # what the reward raises or returns, and what the run ends with
    (ZeroDivisionError, ZeroDivisionError, None),
    (SystemExit, RuntimeError, "compute_rewards ended the program"),
    (KeyboardInterrupt, KeyboardInterrupt, None),  # in a notebook
    (math.nan, ValueError, TOO_LARGE.format("nan")),
    (math.inf, ValueError, TOO_LARGE.format("inf")),
    (-1e39, ValueError, TOO_LARGE.format("-1e[+]39")),  # infinite in float32
    (1e20, ValueError, TOO_LARGE.format("1e[+]20")),  # infinite in float32 when it is squared
    ([1.0], TypeError, None),
    (None, TypeError, None),
]






# ----- A gradient that is not finite -----


