# SPDX-License-Identifier: MIT
"""How a step of grpo.py grows, on random Llamas of 4 layers that are built here; the root's requirements.txt will do.

    python tests/bench/scaling.py scaling    seconds and peak memory against group size, length and width, each with the
                                             exponent of the power that fits, and how near they come to the floor
    python tests/bench/scaling.py memory     peak memory of the update at a vocabulary of 150,000: it grows with the
                                             micro-batch, up to 2^26 logits, and not with N x T x V

The floor is the time of 2 (sampling) and 6 (update) operations per parameter and token, at the rate of a product of two
2048 x 2048 matrices in the same process. A prompt, shared by its group, counts once, and without the output head.
Memory is peak resident memory less that before the model is loaded. Every row comes from a process of its own.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import compare

LAYERS, PROMPT = 4, "?" * 64  # the tokenizer reads bytes: 64 tokens
AXES = {  # what varies: its values, the width and the case at a value
    "group size": ((4, 8, 16, 32), lambda value: (256, f"4x{value}x64")),
    "length": ((32, 64, 128, 256, 512), lambda value: (256, f"4x8x{value}")),
    "width": ((128, 256, 512, 1024), lambda value: (value, "4x8x64")),
}


def a_step(job: dict, case: compare.Case) -> dict:
    """Train for a few steps; and how fast this process multiplies matrices, in operations per second."""
    import torch

    import grpo

    shape = dict(
        model_type="llama", vocab_size=job["vocab"], hidden_size=job["width"], intermediate_size=3 * job["width"],
        num_hidden_layers=LAYERS, num_attention_heads=job["width"] // 32, tie_word_embeddings=True,
    )  # fmt: skip
    Path("prompts").write_text((json.dumps({"prompt": PROMPT, "answer": "0"}) + "\n") * case.num_prompts)
    if job["update_only"]:  # sampling holds (N, V) numbers, which would hide what the update needs: random tokens
        tokens = torch.randint(job["vocab"], (case.num_prompts * case.group_size, case.max_new_tokens))
        grpo.generate_completions = lambda *_: (tokens, torch.ones_like(tokens, dtype=torch.bool), tokens * 0.0)
    model = compare.random_model(Path("model"), shape, None)
    found = compare.train_ours(job | {"model": model, "prompts": "prompts"}, case)
    matrix, seconds = torch.randn(2048, 2048, dtype=getattr(torch, case.dtype), device=job["device"]), []
    for _ in range(5):
        started = time.perf_counter()
        (matrix @ matrix).sum().item()
        seconds.append(time.perf_counter() - started)
    return found | {"rate": 2 * 2048**3 / min(seconds)}


def scaling(job: dict, flags: str, points: int | None) -> None:
    print(f"{'width':>6}{'B x G x T':>10}{'sample s':>10}{'of floor':>9}{'update s':>10}{'of floor':>9}{'MiB':>7}")
    for axis, (values, at) in AXES.items():
        costs = []
        for width, name in map(at, values[:points]):
            run = compare.in_a_process("a_step", job | {"width": width, "vocab": 4096}, name + flags, __file__)
            case = compare.parse_case(name)
            head, body = 4096 * width, LAYERS * (4 + 3 * 3) * width**2  # q, k, v, o; three matrices 3 times as wide
            work = (head + body) * run["tokens"] + body * case.num_prompts * len(PROMPT)  # parameters x tokens
            shares = 2 * work / run["rate"] / run["sample"], 6 * work / run["rate"] / run["update"]
            print(f"{width:6}{name:>10}{run['sample']:10.3f}{shares[0]:9.0%}{run['update']:10.3f}{shares[1]:9.0%}"
                  f"{run['memory']:7.0f}", flush=True)  # fmt: skip
            costs.append((run["s/step"], run["memory"]))
        sizes, *costs = ([math.log(x) for x in column] for column in (values[: len(costs)], *zip(*costs, strict=True)))
        powers = [statistics.linear_regression(sizes, cost).slope for cost in costs]
        print(f"{'':6}seconds ~ {axis} ^ {powers[0]:.2f}, memory ~ {axis} ^ {powers[1]:.2f}")


def memory(job: dict, flags: str, points: int | None) -> None:
    print(f"{'B x G x T':>10}{'micro-batch tokens':>20}{'peak MiB':>10}{'N x T x V in float32, MiB':>27}")
    cases = [(16, size) for size in (256, 512, 1024, 2048, 4096)] + [(num_prompts, 1024) for num_prompts in (8, 32, 64)]
    for num_prompts, size in cases[:points]:
        more = {"width": 64, "vocab": 150_000, "micro_batch_tokens": size, "update_only": True}
        run = compare.in_a_process("a_step", job | more, f"{num_prompts}x4x32" + flags, __file__)
        logits = run["tokens"] * more["vocab"] * 4 / 2**20
        print(f"{num_prompts:4}x4x32{size:20}{run['memory']:10.0f}{logits:27.0f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-a-process"]:
        compare.child({"a_step": a_step})
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scaling", "memory"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run, after one that is left out")
    parser.add_argument("--bf16", action="store_const", const="-bf16", default="", help="bfloat16 computation")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--points", type=int, help="only so many rows of each series")
    args = parser.parse_args()
    job = vars(args) | {"micro_batch_tokens": 8192, "update_only": False}
    {"scaling": scaling, "memory": memory}[args.what](job, args.bf16, args.points)
