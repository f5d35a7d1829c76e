"""The most memory that a phase held."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from lightrft.tracking.peaks import PeakMemory, peak_values, watch_peak

LARGE = 2**28
"""Bytes: malloc maps so much by itself and gives it back at once."""


def test_the_peak_of_a_block_is_its_own() -> None:
    """What was held and given up inside counts; what an earlier block held does not."""
    with watch_peak() as large:
        torch.ones(LARGE // 4)
    with watch_peak() as small:
        torch.ones(1)
    assert large.resident > LARGE
    assert large.resident - small.resident > LARGE // 2
    assert (large.allocated > 0) == torch.cuda.is_available()


def test_the_peak_is_known_after_an_exception() -> None:
    """However the block ends, its peak is there."""
    with pytest.raises(KeyError), watch_peak() as peak:
        raise KeyError
    assert peak.resident > 2**20


def test_where_nothing_can_be_reset_the_peak_is_that_of_the_process(tmp_path: Path) -> None:
    """A system without Linux's files gives what POSIX knows."""
    with watch_peak(tmp_path / "nowhere") as peak:
        pass
    assert 2**20 < peak.resident <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_values_are_named_by_their_phases() -> None:
    """Each phase is a key; device memory is told where there is a device."""
    values = peak_values(one=PeakMemory(resident=3), two=PeakMemory(resident=4))
    assert {key: value for key, value in values.items() if key.endswith("resident")} == {
        "one_peak_resident": 3,
        "two_peak_resident": 4,
    }
    assert len(values) == (4 if torch.cuda.is_available() else 2)
