"""Models and optimizers whose state another thread is copying: what changes them waits until the copy is there.

The mark stands on the handle itself, so that every strategy sees it and none holds it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import cast

from torch import nn
from torch.optim import Optimizer

__all__ = ["await_copy", "mark_copied"]

_MARK = "_lightrft_copy"
"""Name of the attribute by which a handle carries its `_Mark`."""

_WAITS = "_lightrft_waits_for_copy"
"""Name of the attribute of optimizers whose own `step` waits."""


class _Mark:
    """Says when a handle's state has been copied."""

    def __init__(self, copied: threading.Event) -> None:
        self.copied = copied

    def __reduce__(self) -> tuple[object, tuple[()]]:
        """Let a copy of the handle, or a file of it, have a mark that nobody waits for."""
        return _no_mark, ()


def _no_mark() -> _Mark:
    copied = threading.Event()
    copied.set()
    return _Mark(copied)


def mark_copied(handles: Iterable[nn.Module | Optimizer], copied: threading.Event) -> None:
    """Let whatever changes these handles wait, an optimizer's own `step` too.

    Args:
        handles: models and optimizers; those that an earlier copy is made of are waited for.
        copied: set once their state has been copied.
    """
    found = list(handles)  # one may stand there twice
    await_copy(*found)
    for handle in found:
        if isinstance(handle, Optimizer) and _WAITS not in vars(handle):
            handle.register_step_pre_hook(_wait_to_step)
            vars(handle)[_WAITS] = True
        vars(handle)[_MARK] = _Mark(copied)


def await_copy(*handles: object) -> None:
    """Return when the state of handles may be changed; at once where nobody copies it.

    Args:
        handles: models and optimizers.
    """
    for handle in handles:
        mark = cast("_Mark | None", vars(handle).get(_MARK))
        if mark is not None:
            mark.copied.wait()
            vars(handle).pop(_MARK, None)


def _wait_to_step(optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    del args, kwargs
    await_copy(optimizer)
