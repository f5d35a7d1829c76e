"""The most memory that a phase of a run held."""

from __future__ import annotations

import re
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import attrs
import torch

from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["PeakMemory", "peak_values", "watch_peak"]

_OWN = Path("/proc/self")


@attrs.define(kw_only=True, eq=False)
class PeakMemory:
    """The most memory that this process held in a phase, in bytes; a handle that is filled at the phase's end.

    Attributes:
        resident: resident set of the process. Where the system does not let a process reset it, which Linux does, it is
            the peak since the process began.
        allocated: device memory in tensors; 0 on a CPU.
    """

    resident: int = 0
    allocated: int = 0


@contextmanager
def watch_peak(own: Path = _OWN) -> Generator[PeakMemory]:
    """Yield what holds the peaks of the block at its end; one block at a time, since they are of the whole process.

    Args:
        own: where Linux tells a process of itself.

    Example:
        >>> with watch_peak() as peak:
        ...     values = torch.zeros(1000)
        >>> peak.resident > values.nbytes
        True
    """
    peak = PeakMemory()
    _reset(own)
    try:
        yield peak
    finally:
        peak.resident = _resident_peak(own)
        peak.allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def peak_values(**phases: PeakMemory) -> dict[str, Json]:
    """Return the peaks as values of a row: `<phase>_peak_resident` and, with a device, `<phase>_peak_allocated`.

    Args:
        phases: the peaks by the name of their phase.
    """
    values: dict[str, Json] = {f"{phase}_peak_resident": peak.resident for phase, peak in phases.items()}
    if torch.cuda.is_available():
        values |= {f"{phase}_peak_allocated": peak.allocated for phase, peak in phases.items()}
    return values


def _reset(own: Path) -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        (own / "clear_refs").write_text("5", encoding="ascii")  # 5 sets the peak to what is resident now
    except OSError:
        return  # the peak goes on from where it was


def _resident_peak(own: Path) -> int:
    try:
        (kibibytes,) = re.findall(r"VmHWM:\s+(\d+)", (own / "status").read_text(encoding="ascii"))
    except (OSError, ValueError):
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kibibytes) * 1024
