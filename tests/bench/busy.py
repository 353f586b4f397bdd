# SPDX-License-Identifier: MIT
"""How much slower is training on a machine that is busy with other work?

    python tests/bench/busy.py                        grpo.py, 100 steps, alone and next to four busy processes
    python tests/bench/busy.py --script ppo --steps 20 --busy 8

Runs the default training in turn alone and busy, and prints seconds and their ratio. With N busy processes on C cores,
a fair share of the cores makes a run about (N + C) / C times slower. OMP_WAIT_POLICY=ACTIVE in the environment shows
what spinning threads cost.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def spin() -> None:
    while True:
        pass


def seconds(script: str, steps: int) -> float:
    """Of one whole run, with its imports."""
    flags = ["--num-steps", str(steps), "--eval-every", "0", "--save-every", "0"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--busy", type=int, default=4, help="busy processes")
    parser.add_argument("--rounds", type=int, default=1, help="how often alone and busy take turns")
    args = parser.parse_args()
    taken = {"alone": [], "busy": []}
    for _ in range(args.rounds):
        taken["alone"].append(seconds(args.script, args.steps))
        others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(args.busy)]
        for process in others:
            process.start()
        taken["busy"].append(seconds(args.script, args.steps))
        for process in others:
            process.kill()
    alone, busy = (statistics.median(taken[name]) for name in ("alone", "busy"))
    fair = (args.busy + os.cpu_count()) / os.cpu_count()
    print(f"{args.script}.py, {args.steps} steps: {alone:.1f} s alone, {busy:.1f} s next to {args.busy} busy ones,")
    print(f"{busy / alone:.1f} times as long; a fair share of {os.cpu_count()} cores is {fair:.1f} times")


if __name__ == "__main__":
    main()
