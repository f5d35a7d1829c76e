"""Calls of `save_ckpt` and `load_ckpt` as records, so that a planted bug is one small function."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import attrs
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.config import StrategyConfig
from lightrft.strategy.protocols import BackgroundSaves, Checkpointable, Json, LoadedCheckpoint, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.mutant import BreakStrategy

__all__ = [
    "LoadCall",
    "SaveCall",
    "WrongLoad",
    "WrongSave",
    "broken_load",
    "broken_save",
    "do_load",
    "do_save",
    "parts_of",
]


@attrs.frozen(kw_only=True, eq=False)
class SaveCall:
    """What `save_ckpt` was given; the fields are its parameters."""

    model: Checkpointable
    save_dir: Path
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    step: int | None
    client_state: Mapping[str, Json] | None
    max_num: int | None
    max_mem: float | None
    keep_every: int
    keep_best: int
    metric: float | None
    background: BackgroundSaves | None = None


@attrs.frozen(kw_only=True, eq=False)
class LoadCall:
    """What `load_ckpt` was given; the fields are its parameters."""

    model: Checkpointable
    load_dir: Path
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    step: int | None


class WrongSave(Protocol):
    """Saves wrongly."""

    def __call__(self, strategy: Strategy, call: SaveCall, /) -> Path:
        """Return what `save_ckpt` returns.

        Args:
            strategy: a right one.
            call: what `save_ckpt` was given.
        """
        ...


class WrongLoad(Protocol):
    """Loads wrongly."""

    def __call__(self, strategy: Strategy, call: LoadCall, /) -> LoadedCheckpoint:
        """Return what `load_ckpt` returns.

        Args:
            strategy: a right one.
            call: what `load_ckpt` was given.
        """
        ...


def broken_save(wrong: WrongSave) -> BreakStrategy:
    """Return what plants another `save_ckpt`.

    Args:
        wrong: saves.
    """

    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        del config

        def save_ckpt(
            model: Checkpointable,
            save_dir: str | os.PathLike[str],
            *,
            optimizer: Optimizer | None = None,
            scheduler: LRScheduler | None = None,
            step: int | None = None,
            client_state: Mapping[str, Json] | None = None,
            max_num: int | None = None,
            max_mem: float | None = None,
            keep_every: int = 0,
            keep_best: int = 0,
            metric: float | None = None,
            background: BackgroundSaves | None = None,
        ) -> Path:
            call = SaveCall(
                model=model,
                save_dir=Path(save_dir),
                optimizer=optimizer,
                scheduler=scheduler,
                step=step,
                client_state=client_state,
                max_num=max_num,
                max_mem=max_mem,
                keep_every=keep_every,
                keep_best=keep_best,
                metric=metric,
                background=background,
            )
            return wrong(strategy, call)

        return attrs.evolve(strategy, save_ckpt=save_ckpt)

    return breaks


def broken_load(wrong: WrongLoad) -> BreakStrategy:
    """Return what plants another `load_ckpt`.

    Args:
        wrong: loads.
    """

    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        del config

        def load_ckpt(
            model: Checkpointable,
            load_dir: str | os.PathLike[str],
            *,
            optimizer: Optimizer | None = None,
            scheduler: LRScheduler | None = None,
            step: int | None = None,
        ) -> LoadedCheckpoint:
            call = LoadCall(model=model, load_dir=Path(load_dir), optimizer=optimizer, scheduler=scheduler, step=step)
            return wrong(strategy, call)

        return attrs.evolve(strategy, load_ckpt=load_ckpt)

    return breaks


def do_save(strategy: Strategy, call: SaveCall) -> Path:
    """Save as the strategy does.

    Args:
        strategy: a right one.
        call: what `save_ckpt` was given.
    """
    return strategy.save_ckpt(
        call.model,
        call.save_dir,
        optimizer=call.optimizer,
        scheduler=call.scheduler,
        step=call.step,
        client_state=call.client_state,
        max_num=call.max_num,
        max_mem=call.max_mem,
        keep_every=call.keep_every,
        keep_best=call.keep_best,
        metric=call.metric,
        background=call.background,
    )


def do_load(strategy: Strategy, call: LoadCall) -> LoadedCheckpoint:
    """Load as the strategy does.

    Args:
        strategy: a right one.
        call: what `load_ckpt` was given.
    """
    return strategy.load_ckpt(
        call.model, call.load_dir, optimizer=call.optimizer, scheduler=call.scheduler, step=call.step
    )


def parts_of(call: SaveCall | LoadCall) -> dict[str, tuple[nn.Module, Optimizer | None, LRScheduler | None]]:
    """Return every model with what trains it, by name.

    Args:
        call: of either function.
    """
    if isinstance(call.model, nn.Module):
        return {"model": (call.model, call.optimizer, call.scheduler)}
    named: Mapping[str, nn.Module | Trainable] = (
        {"model": call.model} if isinstance(call.model, Trainable) else call.model
    )
    return {
        name: (part, None, None) if isinstance(part, nn.Module) else (part.model, part.optimizer, part.scheduler)
        for name, part in named.items()
    }
