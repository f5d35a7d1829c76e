"""Memory of a process: measured, and moved between device and host."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.copying import await_copy
from lightrft.strategy.protocols.training import MemoryReport

__all__ = ["move_handles", "report_memory"]


def report_memory(label: str = "") -> MemoryReport:
    """Return the memory that this process holds now; see `ReportMemory`."""
    on_device = torch.cuda.is_available()
    return MemoryReport(
        label=label,
        resident=_resident_bytes(),
        allocated=torch.cuda.memory_allocated() if on_device else 0,
        peak_allocated=torch.cuda.max_memory_allocated() if on_device else 0,
    )


def _resident_bytes(statm: Path = Path("/proc/self/statm")) -> int:
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # elsewhere only the peak is known, in KiB as POSIX systems count it
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def move_handles(handles: tuple[nn.Module | Optimizer, ...], device: str) -> None:
    """Move models, their gradients and the state of optimizers; what is there already stays as it is.

    Args:
        handles: models and optimizers.
        device: where to.
    """
    await_copy(*handles)
    for handle in handles:
        if isinstance(handle, nn.Module):
            handle.to(device)
        else:
            _move_optimizer(handle, torch.device(device))


def _move_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    for group in optimizer.param_groups:
        # torch keeps the step counts of optimizers that are neither fused nor capturable on the host
        counts_move = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and (key != "step" or counts_move):
                    state[key] = value.to(device)
