"""Strategies that save in the background wrongly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs
import torch

from lightrft.backends.checkpointing.layout import checkpoint_path
from lightrft.config import StrategyConfig
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols import BackgroundSaves
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.checkpoint.calls import SaveCall, broken_save, do_save, parts_of
from lightrft.testing.mutants.mutant import Mutant, strategy_mutant

__all__ = ["MUTANTS"]


def _no_copy(strategy: Strategy, call: SaveCall, /) -> Path:
    """Save the live state, whenever the thread comes to it."""
    background = call.background
    if background is None or call.step is None:
        return do_save(strategy, call)

    def save() -> None:
        background.collectives.all_gather(torch.zeros(1))  # where ranks would meet
        do_save(strategy, attrs.evolve(call, background=None))

    background.start(save)
    return checkpoint_path(call.save_dir, call.step)


def _unmarked(strategy: Strategy, call: SaveCall, /) -> Path:
    """Save as always, and let nothing wait for the copy."""
    path = do_save(strategy, call)
    for model, optimizer, _ in parts_of(call).values():
        for marked in (model, optimizer, *(parameter.untyped_storage() for parameter in model.parameters())):
            if marked is not None:
                vars(marked).pop("_lightrft_copy", None)
    return path


def _silent(background: BackgroundSaves) -> BackgroundSaves:
    def start(save: Callable[[], None], /) -> None:
        def save_silently() -> None:
            with suppress(CheckpointError):
                save()

        background.start(save_silently)

    return attrs.evolve(background, start=start)


def _swallowing(strategy: Strategy, call: SaveCall, /) -> Path:
    background = None if call.background is None else _silent(call.background)
    return do_save(strategy, attrs.evolve(call, background=background))


def _told_by_waiting_alone(strategy: Strategy, call: SaveCall, /) -> Path:
    background = call.background
    if background is not None:
        with suppress(CheckpointError):
            background.wait()
    return do_save(strategy, call)


def _two_at_a_time(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    """Begin the first of two saves with the second one."""
    postponed: list[Callable[[], None]] = []

    def save_ckpt(strategy: Strategy, call: SaveCall, /) -> Path:
        background = call.background
        if background is None:
            return do_save(strategy, call)

        def start(save: Callable[[], None], /) -> None:
            postponed.append(save)
            if len(postponed) == _PAIR:
                background.start(save_both)

        def save_both() -> None:
            while postponed:
                postponed.pop(0)()

        return do_save(strategy, attrs.evolve(call, background=attrs.evolve(background, start=start)))

    return broken_save(save_ckpt)(strategy, config)


_PAIR = 2

MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant(
        "checkpoint.background_snapshot.no_copy",
        "The live state is saved, whenever the background comes to it.",
        broken_save(_no_copy),
    ),
    strategy_mutant(
        "checkpoint.background_waits.nothing_waits",
        "A step does not wait until the state that it changes is copied.",
        broken_save(_unmarked),
    ),
    strategy_mutant(
        "checkpoint.background_errors.swallowed",
        "An error of the background is told to nobody.",
        broken_save(_swallowing),
    ),
    strategy_mutant(
        "checkpoint.background_errors.forgotten_by_the_next",
        "The next save forgets the error of the one before it.",
        broken_save(_told_by_waiting_alone),
    ),
    strategy_mutant(
        "checkpoint.background_order.two_at_a_time",
        "A save is begun while the one before it is not committed.",
        _two_at_a_time,
    ),
)
"""What a save in the background gets wrong."""
