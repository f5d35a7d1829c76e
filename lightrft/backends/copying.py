"""Models and optimizers whose state another thread is copying: what changes them waits until the copy is there.

The mark stands on the handle itself, and on the memory of its parameters, so that every strategy sees it and none holds
it. Every optimizer of the process waits that steps memory which is copied, whoever made it: torch does not count what
its fused kernels write.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import cache
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["await_copy", "mark_copied"]

_MARK = "_lightrft_copy"
"""Name of the attribute by which a handle, or memory, carries its `_Mark`."""


class _Mark:
    """Says when what carries it has been copied."""

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
    """Let whatever changes these handles wait, and the `step` of every optimizer that shares their parameters.

    Args:
        handles: models and optimizers; those that an earlier copy is made of are waited for.
        copied: set once their state has been copied.
    """
    found = list(handles)  # one may stand there twice
    memory = [storage for handle in found for storage in _memory_of(handle)]
    await_copy(*found, *memory)
    _let_optimizers_wait()
    mark = _Mark(copied)
    for marked in (*found, *memory):
        vars(marked)[_MARK] = mark


def await_copy(*handles: object) -> None:
    """Return when the state of handles may be changed; at once where nobody copies it.

    Args:
        handles: models and optimizers, or memory of their parameters.
    """
    for handle in handles:
        mark = cast("_Mark | None", vars(handle).get(_MARK))
        if mark is not None:
            mark.copied.wait()
            vars(handle).pop(_MARK, None)


@cache
def _let_optimizers_wait() -> None:
    """Register, once and for good: torch breaks off a step that waits if a hook is removed meanwhile."""
    register_optimizer_step_pre_hook(_wait_to_step)


def _wait_to_step(optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    del args, kwargs
    await_copy(*_memory_of(optimizer))


def _memory_of(handle: nn.Module | Optimizer) -> list[torch.UntypedStorage]:
    """Return the memory on this rank of the parameters of a model or an optimizer."""
    if isinstance(handle, nn.Module):
        parameters: list[torch.Tensor] = [*handle.parameters()]
    else:
        groups = cast("list[dict[str, list[torch.Tensor]]]", handle.param_groups)
        parameters = [parameter for group in groups for parameter in group["params"]]
    parts = [cast("torch.Tensor", getattr(parameter, "_local_tensor", parameter)) for parameter in parameters]
    return [part.untyped_storage() for part in parts if part.layout is torch.strided]  # others have none
