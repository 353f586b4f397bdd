# SPDX-License-Identifier: MIT
"""Everything here runs offline, on the CPU, with random tiny models built in code.

HYPOTHESIS_PROFILE chooses the examples of a property: dev (the default), few; ci, more, always the same ones; mutation,
for tests/tools, few, always the same ones, and a failure is not made smaller.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # over matrices this small a second one only waits

slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=20, deadline=None, suppress_health_check=slow_is_fine)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True, suppress_health_check=slow_is_fine)
settings.register_profile(
    "mutation", settings.get_profile("dev"), derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """`main` is a program, which leaves its handlers behind: Ctrl-C must go on to end the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
