"""The position inside an accumulation window.

It lives in the optimizer's first parameter group, so that it travels with `optimizer.state_dict()` and no strategy
holds it.
"""

from __future__ import annotations

from torch.optim import Optimizer

from lightrft.errors import StepError

__all__ = ["MICRO_BATCHES", "PENDING", "PROMISE", "begins_window", "end_micro_batch", "mark_backward", "open_window"]

MICRO_BATCHES = "micro_batches"
"""Key of the number of micro-batches that the window holds, an int."""

PENDING = "pending_backward"
"""Key of whether `backward` was called since the last `optimizer_step`, a bool."""

PROMISE = "promised_boundary"
"""Key of what the last `backward` said about the window's end: True, False, or None if nothing."""


def open_window(optimizer: Optimizer) -> None:
    """Begin an empty window, in an optimizer that has none yet.

    Args:
        optimizer: any optimizer.
    """
    group = optimizer.param_groups[0]
    group.setdefault(MICRO_BATCHES, 0)
    group.setdefault(PENDING, False)
    group.setdefault(PROMISE, None)


def begins_window(optimizer: Optimizer) -> bool:
    """Return whether the next `backward` is the first one of a window.

    Args:
        optimizer: any optimizer.
    """
    group = optimizer.param_groups[0]
    return not group.get(PENDING) and not group.get(MICRO_BATCHES)


def mark_backward(optimizer: Optimizer, *, is_boundary: bool | None = None) -> None:
    """Note that the present micro-batch has a gradient, and what was said about the window's end.

    Args:
        optimizer: any optimizer.
        is_boundary: what `backward` was told; where it is called several times before a step, the last one counts.
    """
    group = optimizer.param_groups[0]
    group[PENDING] = True
    group[PROMISE] = is_boundary


def end_micro_batch(optimizer: Optimizer, *, steps: int, is_boundary: bool | None) -> bool:
    """Count the present micro-batch, and return whether the window is complete, in which case an empty one begins.

    Args:
        optimizer: any optimizer.
        steps: micro-batches of a window.
        is_boundary: whether the window is complete; None counts.

    Raises:
        StepError: the micro-batch has no gradient, or `backward` was told otherwise about the window's end; nothing is
            counted.
    """
    group = optimizer.param_groups[0]
    if not group.get(PENDING):
        raise StepError("optimizer_step has no gradient to step with; call backward(loss, model, optimizer) before it.")
    count = group.get(MICRO_BATCHES, 0) + 1
    complete = count >= steps if is_boundary is None else is_boundary
    promise = group.get(PROMISE)
    if promise is not None and promise != complete:
        raise StepError(_contradiction(promise=promise, count=count, steps=steps, is_boundary=is_boundary))
    group[PENDING], group[PROMISE] = False, None
    group[MICRO_BATCHES] = 0 if complete else count
    return complete


def _contradiction(*, promise: bool, count: int, steps: int, is_boundary: bool | None) -> str:
    said = f"is_boundary={is_boundary}" if is_boundary is not None else f"the count ({count} of {steps} micro-batches)"
    return (
        f"is_boundary={promise} was said to backward, and in optimizer_step {said} says "
        f"{'that the window goes on' if promise else 'that the window is complete'}; "
        f"call optimizer_step with is_boundary={promise}, and say the same to both."
    )
