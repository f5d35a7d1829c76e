"""The position inside an accumulation window.

It lives in the optimizer's first parameter group, so that it travels with `optimizer.state_dict()` and no strategy
holds it.
"""

from __future__ import annotations

from torch.optim import Optimizer

from lightrft.errors import StepError

__all__ = ["MICRO_BATCHES", "PENDING", "end_micro_batch", "mark_backward", "open_window"]

MICRO_BATCHES = "micro_batches"
"""Key of the number of micro-batches that the window holds, an int."""

PENDING = "pending_backward"
"""Key of whether `backward` was called since the last `optimizer_step`, a bool."""


def open_window(optimizer: Optimizer) -> None:
    """Begin an empty window, in an optimizer that has none yet.

    Args:
        optimizer: any optimizer.
    """
    group = optimizer.param_groups[0]
    group.setdefault(MICRO_BATCHES, 0)
    group.setdefault(PENDING, False)


def mark_backward(optimizer: Optimizer) -> None:
    """Note that the present micro-batch has a gradient.

    Args:
        optimizer: any optimizer.
    """
    optimizer.param_groups[0][PENDING] = True


def end_micro_batch(optimizer: Optimizer, *, steps: int, is_boundary: bool | None) -> bool:
    """Count the present micro-batch, and return whether the window is complete, in which case an empty one begins.

    Args:
        optimizer: any optimizer.
        steps: micro-batches of a window.
        is_boundary: whether the window is complete; None counts.

    Raises:
        StepError: the micro-batch has no gradient.
    """
    group = optimizer.param_groups[0]
    if not group.get(PENDING):
        raise StepError("optimizer_step has no gradient to step with; call backward(loss, model, optimizer) before it.")
    count = group.get(MICRO_BATCHES, 0) + 1
    complete = count >= steps if is_boundary is None else is_boundary
    group[PENDING] = False
    group[MICRO_BATCHES] = 0 if complete else count
    return complete
