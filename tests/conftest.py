"""What every test stands on: one thread, no network, and examples drawn the same way on every machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# before torch is imported: with small tensors a second thread only adds waiting, and two test processes share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# a shell that starts the tests in the background has its children ignore Ctrl-C, which some tests send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from lightrft.testing.ranks.spawn import SpawnRank

sys.path.insert(0, str(Path(__file__).parent / "forks"))  # files beside the tests, which are no package

# `default` draws the same examples every time, so that a check means the same on every machine; `fast` is for a quick
# look; `explore` draws new ones each time, to look for what the fixed ones miss: HYPOTHESIS_PROFILE=explore
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fast", parent=settings.get_profile("default"), max_examples=10)
settings.register_profile("explore", parent=settings.get_profile("default"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def spawn() -> Iterator[SpawnRank]:
    """Starts ranks of a pool in milliseconds: `processes(subject, 2, spawn=spawn)`."""
    from forked_ranks import forks

    with forks() as spawned:
        yield spawned
