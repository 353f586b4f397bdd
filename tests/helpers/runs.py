# SPDX-License-Identifier: MIT
"""Runs to break: a random tiny model with its tokenizer and problems in a folder, and real processes that train it."""

import contextlib
import multiprocessing.context
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import grpo
import ppo
from helpers.tiny_models import SHARING, make_model

ROOT = Path(__file__).parents[2]
SCRIPTS = pytest.mark.parametrize("script", [grpo, ppo], ids=["grpo", "ppo"])
# For what is the same text in both scripts, see test_twins.py: the quick tests try it in grpo.py alone.
TWINS = pytest.mark.parametrize("script", [grpo, pytest.param(ppo, marks=pytest.mark.slow)], ids=["grpo", "ppo"])
SMALL = dict(
    model="model", data="data.jsonl", num_prompts=4, group_size=2, max_new_tokens=6, num_steps=4, eval_every=0,
    save_every=0, learning_rate=1e-3, dtype="float32",
)  # fmt: skip
# TensorBoard reads the files of one second in the order of these numbers, as text.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)
MEASURED = ("time/step", "time/tokens_per_second")  # no two runs agree in these

# The script as it is, but for its reward: a random model never gets a sum right, so pay for variety instead.
DRIVER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
import {script} as script
script.reward = lambda completion, problem: len(set(completion)) / 10
{before}
if __name__ == "__main__":
    script.main(script.tyro.cli(script.Args))
"""


def variety(completion: str, problem: dict) -> float:
    """A reward that a random model can earn."""
    return len(set(completion)) / 10


def arguments(script, **args: object) -> grpo.Args | ppo.Args:
    """Those of a small run. PPO's first steps would train the value model only."""
    return script.Args(**SMALL | dict(run_name="a") | (dict(value_warmup_steps=0) if script is ppo else {}) | args)


def make_folder(folder: Path, family: str = "llama") -> None:
    """model/ and data.jsonl, as --model and --data take them."""
    characters = "0123456789+=#;"
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(["<end>", *characters])}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    special = SHARING.get(family, {}) | dict(vocab_size=15, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    make_model(family, torch.float32, **special).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [f'{{"prompt": "{a:02}+{7 * a % 90}=", "answer": "{a + 7 * a % 90}"}}\n' for a in range(40)]
    (folder / "data.jsonl").write_text("".join(lines))


def command(script: str, before: str = "", processes: int = 0, **args: object) -> list[str]:
    """What runs the script with SMALL and `args`, after the lines of Python in `before`; under torchrun if asked."""
    driver = Path(f"driver_{script}_{len(list(Path().glob('driver_*')))}.py")
    driver.write_text(DRIVER.format(root=str(ROOT), script=script, before=before))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    flags = []
    for name, value in (SMALL | args).items():
        flag = name.replace("_", "-")
        switch = f"--{flag}" if value else f"--no-{flag}"
        flags.append(switch if isinstance(value, bool) else f"--{flag}={value}")
    return [sys.executable, *launch, str(driver), *flags]


class Process(subprocess.Popen):
    """One that does not outlive its `with`, whatever a test that failed left it doing."""

    def __exit__(self, *error: object) -> None:
        self.terminate()  # torchrun ends its processes
        super().__exit__(*error)


def start(command: list[str]) -> Process:
    """A process of its own, with one thread: what it says goes to a pipe."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return Process(command, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)


class Forked(multiprocessing.context.ForkServerProcess, contextlib.AbstractContextManager):
    """Starts a `command` as `start` does, but for torchrun, in half a second: forked from a process that has imported
    torch already. What it says goes to a file."""

    def __init__(self, command: list[str], **environment: str):
        super().__init__(daemon=True)
        self.command, self.environment, self.folder = command, environment, os.getcwd()
        self.output = Path(self.folder, f"output_{time.monotonic_ns()}")
        self.output.touch()
        self.start()

    def run(self) -> None:
        torch.set_num_threads(1)
        os.chdir(self.folder)
        os.environ.update(self.environment)
        for stream in (1, 2):
            os.dup2(os.open(self.output, os.O_WRONLY | os.O_APPEND), stream)
        sys.argv = self.command[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")

    def wait_until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 100
        while not condition():
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.0005)

    def communicate(self, timeout: float) -> tuple[str, None]:
        self.join(timeout)
        self.returncode = self.exitcode
        return self.output.read_text(), None

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.join()


preloaded = ["torch.distributed.fsdp", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama"]
multiprocessing.set_forkserver_preload(["pytest", *preloaded])


def finish(process: Process | Forked, code: int = 0) -> str:
    """What it said, once it has ended as it should."""
    with process:
        said, _ = process.communicate(timeout=600)  # a busy machine takes long
    assert process.returncode == code, said
    return said


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def saved(run_name: str) -> dict:
    """What a checkpoint holds, but for the flags; its policy must be the one that was exported."""
    checkpoint = torch.load(f"runs/{run_name}/checkpoint.pt", weights_only=True)
    del checkpoint["args"]
    policy = weights(f"runs/{run_name}/policy")
    assert all(torch.equal(policy[name], value) for name, value in checkpoint["policy"][0].items())
    return checkpoint


def leaves(tree: object, name: str = "") -> dict[str, object]:
    """What nested dicts, lists and tuples hold, by the path to it."""
    if isinstance(tree, dict | list | tuple) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: leaf for key, value in items for path, leaf in leaves(value, f"{name}/{key}").items()}
    return {name: tree}


def assert_same(first: object, second: object) -> None:
    """The same bits wherever these trees hold a tensor, and the same of all else."""
    one, two = leaves(first), leaves(second)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name


def assert_same_run(first: str, second: str) -> None:
    """The same weights, state of the optimizers and all else of the checkpoints; the same curves."""
    assert_same(saved(first), saved(second))
    assert curves(first) == curves(second)


def curves(run_name: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, without what was measured with a clock."""
    events = EventAccumulator(f"runs/{run_name}")
    events.Reload()
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"] if t not in MEASURED}
