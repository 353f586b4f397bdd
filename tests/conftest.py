# SPDX-License-Identifier: MIT
"""Everything here runs offline, on the CPU, with random tiny models built in code.

HYPOTHESIS_PROFILE=dev (the default) is quick; ci draws more examples, the same ones every time, and adds what is slow:
several processes, kills, the simulated device, the plumbing of ppo.py. mutation is what tests/mutation uses: few
examples, the same ones every time, and a failure is not made smaller.
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


PLUMBING = ("test_bad_input.py", "test_data.py", "test_faults.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the quick profile the plumbing is tested in grpo.py only: in ppo.py it is the same text, see test_twins.py."""
    if os.environ.get("HYPOTHESIS_PROFILE", "dev") == "dev":
        names, plumbing = {item.nodeid for item in items}, [item for item in items if item.path.name in PLUMBING]
        again = [x for x in plumbing if "ppo" in x.nodeid and x.nodeid.replace("ppo", "grpo") in names]
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item not in again]
