"""Models and optimizers whose state another thread is copying: what changes them waits until the copy is there.

The mark stands on the handle itself, so that every strategy sees it and none holds it. Every optimizer of the process
waits that steps memory which is copied, whoever made it: torch does not count what its fused kernels write.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["await_copy", "mark_copied"]

_MARK = "_lightrft_copy"
"""Name of the attribute by which a handle carries its `_Mark`."""


class _Mark:
    """Says when a handle's state has been copied, and lets optimizers wait for it."""

    def __init__(self, copied: threading.Event, hook: RemovableHandle | None = None) -> None:
        self.copied, self.hook = copied, hook

    def __reduce__(self) -> tuple[object, tuple[()]]:
        """Let a copy of the handle, or a file of it, have a mark that nobody waits for."""
        return _no_mark, ()


def _no_mark() -> _Mark:
    copied = threading.Event()
    copied.set()
    return _Mark(copied)


def mark_copied(handles: Iterable[nn.Module | Optimizer], copied: threading.Event) -> None:
    """Let whatever changes these handles wait, and the `step` of every optimizer that shares their parameters.

    Args:
        handles: models and optimizers; those that an earlier copy is made of are waited for.
        copied: set once their state has been copied.
    """
    found = list(handles)  # one may stand there twice
    await_copy(*found)
    memory = {place for handle in found for place in _memory_of(handle)}

    def wait_to_step(optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        del args, kwargs
        if not copied.is_set() and not memory.isdisjoint(_memory_of(optimizer)):
            copied.wait()

    mark = _Mark(copied, register_optimizer_step_pre_hook(wait_to_step))
    for handle in found:
        vars(handle)[_MARK] = mark


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
            if mark.hook is not None:
                mark.hook.remove()


def _memory_of(handle: nn.Module | Optimizer) -> set[int]:
    """Return where the parameters of a model or an optimizer lie on this rank."""
    if isinstance(handle, nn.Module):
        parameters: list[torch.Tensor] = [*handle.parameters()]
    else:
        groups = cast("list[dict[str, list[torch.Tensor]]]", handle.param_groups)
        parameters = [parameter for group in groups for parameter in group["params"]]
    parts = [cast("torch.Tensor", getattr(parameter, "_local_tensor", parameter)) for parameter in parameters]
    return {part.untyped_storage().data_ptr() for part in parts} - {0}
