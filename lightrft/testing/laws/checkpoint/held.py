"""Saves in the background that wait for a gate.

What is late in a program of a law is late because it waits for a gate, never because of a time: the background is held
before it copies, or before it writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import attrs

from lightrft.strategy.protocols import BackgroundSaves
from lightrft.strategy.protocols.collectives import Collectives, TensorTree

__all__ = ["held_copying", "held_writing"]

_Tree = TypeVar("_Tree", bound=TensorTree)


def held_copying(background: BackgroundSaves, gate: threading.Event) -> BackgroundSaves:
    """Return the handle, its saves held before they copy anything.

    Args:
        background: the handle.
        gate: lets them go on.
    """

    def start(save: Callable[[], None], /) -> None:
        def wait_and_save() -> None:
            gate.wait()
            save()

        background.start(wait_and_save)

    return attrs.evolve(background, start=start)


def held_writing(background: BackgroundSaves, gate: threading.Event) -> BackgroundSaves:
    """Return the handle, its saves held after they have copied, where ranks meet.

    Args:
        background: the handle.
        gate: lets them go on.
    """
    inner = background.collectives

    def all_gather(data: _Tree) -> _Tree:
        gate.wait()
        return inner.all_gather(data)

    held: Collectives = attrs.evolve(inner, all_gather=all_gather)  # type: ignore[misc]  # of ours, a record
    return attrs.evolve(background, collectives=held)
