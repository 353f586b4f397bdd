# SPDX-License-Identifier: MIT
"""Would a GPU refuse a script in which one move between devices was forgotten? Takes out each in turn, trains on the
device of second_device.py, and says which go unnoticed: python tests/forgotten_moves.py, a few minutes."""

import ast
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import torch

import conftest  # noqa: F401, finds the scripts
import grpo
import ppo
import second_device
import test_second_device
from running import SMALL, leaves, make_folder

SCRIPTS = {"grpo": grpo, "ppo": ppo}
KEYWORDS = ("device", "map_location", "cpu_offload")


class Forget(ast.NodeTransformer):
    """Take out one move; `moves` lists all."""

    def __init__(self, number: int):
        self.number, self.moves = number, []

    def forget(self, node: ast.expr, text: str) -> bool:
        self.moves.append(f"{node.lineno}: {text}")
        return len(self.moves) - 1 == self.number

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        for keyword in [x for x in node.keywords if x.arg in KEYWORDS]:
            if self.forget(node, ast.unparse(node)[:60] + f" without {keyword.arg}="):
                node.keywords.remove(keyword)
        name, given = getattr(node.func, "attr", ""), " ".join(map(ast.unparse, node.args))
        moves = name == "cpu" or (name == "to" and "device" in given)
        return node.func.value if moves and self.forget(node, ast.unparse(node)) else node


def mutant(name: str, number: int) -> tuple[ast.Module, list[str]]:
    forget = Forget(number)
    tree = forget.visit(ast.parse(Path(SCRIPTS[name].__file__).read_text()))
    return tree, forget.moves


def learned(folder: str, name: str) -> dict[str, torch.Tensor]:
    saved = torch.load(f"{folder}/runs/{name}_there/checkpoint.pt", weights_only=True)
    return {name: x for name, x in leaves(saved).items() if isinstance(x, torch.Tensor)}


def attempt(name: str, number: int) -> tuple[str, int]:
    """Train without a move. Returns how this was noticed, if it was, and the waits."""
    script, folder = SCRIPTS[name], f"{name}_{number}"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    shutil.copytree("start", folder)
    os.chdir(folder)
    exec(compile(mutant(name, number)[0], script.__file__, "exec"), vars(script))
    try:
        seen = test_second_device.observe(script)
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}", 0
    there, expected = learned(".", name), learned(f"../{name}_-1", name)
    same = all(torch.allclose(there[key], x, atol=1e-5) for key, x in expected.items())
    noticed = "" if same else "it learns something else"
    return noticed if seen["sharing"] == [True, True] else "no prompt is shared", sum(seen["waits"].values())


def main() -> None:
    second_device.use()
    make_folder(Path("start"))
    for script in SCRIPTS.values():  # imports what training will, once for all processes
        args = script.Args(**SMALL | dict(model="start/model", data="start/data.jsonl"))
        script.load_policy(args.model, script.load_problems(args)[0], torch.device("cpu"))
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for name in SCRIPTS:
            noticed, usual = pool.apply(attempt, (name, -1))
            assert not noticed, noticed
            print(f"{name}.py: {usual} waits")
            moves = mutant(name, -1)[1]
            results = pool.starmap(attempt, [(name, number) for number in range(len(moves))], chunksize=1)
            for move, (noticed, waits) in zip(moves, results, strict=True):
                print(f"{name}.py:{move}\n        {noticed or f'UNNOTICED, {waits - usual:+} waits'}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
