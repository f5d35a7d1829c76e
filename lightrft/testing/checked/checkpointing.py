"""Checkpoints, held to their laws at every call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.strategy.protocols import BackgroundSaves, Checkpointable, Json, LoadedCheckpoint, Trainable
from lightrft.strategy.protocols.checkpointing import LoadCkpt, SaveCkpt
from lightrft.strategy.record import Strategy
from lightrft.testing.checked.verdict import require
from lightrft.testing.reference.digests import changed_names, digest, digests

__all__ = ["with_checked_checkpoints"]


def with_checked_checkpoints(strategy: Strategy) -> Strategy:
    """Return the strategy with `save_ckpt` and `load_ckpt` held to their laws.

    Args:
        strategy: any strategy.
    """
    return attrs.evolve(strategy, save_ckpt=_checked_save(strategy), load_ckpt=_checked_load(strategy))


def _checked_save(strategy: Strategy) -> SaveCkpt:
    inner = strategy.save_ckpt

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
        newest, before = strategy.latest_ckpt(save_dir), _state(strategy, model)
        path = inner(
            model,
            save_dir,
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
        changed = changed_names(before, _state(strategy, model))
        require(not changed, "save_ckpt", f"{changed} changed by saving")
        wanted = step if step is not None else 0 if newest is None else newest + 1
        if background is None and (newest is None or wanted > newest):
            found = strategy.latest_ckpt(save_dir)
            require(path.is_dir(), "save_ckpt", f"returned {path}, which is no directory")
            if newest is not None or step is not None:  # the number of a first checkpoint is the backend's choice
                require(found == wanted, "save_ckpt", f"the newest checkpoint is {found} and must be {wanted}")
        return path

    return save_ckpt


def _checked_load(strategy: Strategy) -> LoadCkpt:
    inner = strategy.load_ckpt

    def load_ckpt(
        model: Checkpointable,
        load_dir: str | os.PathLike[str],
        *,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        step: int | None = None,
    ) -> LoadedCheckpoint:
        before = _state(strategy, model)
        try:
            loaded = inner(model, load_dir, optimizer=optimizer, scheduler=scheduler, step=step)
        except Exception as error:
            changed = changed_names(before, _state(strategy, model))
            require(not changed, "load_ckpt", f"was refused ({error}), and {changed} changed all the same")
            raise
        wanted = strategy.latest_ckpt(load_dir) if step is None else step
        require(loaded.step == wanted, "load_ckpt", f"loaded step {loaded.step} and must load {wanted}")
        return loaded

    return load_ckpt


def _state(strategy: Strategy, model: Checkpointable) -> dict[str, str]:
    """Return fingerprints of every tensor of the models, and of this process's random stream."""
    named = model if isinstance(model, Mapping) else {"model": model}
    return {
        "random stream": digest(torch.get_rng_state()),
        **{
            f"{key}: {name}": value
            for key, one in named.items()
            for name, value in digests(strategy.named_tensors(_model_of(one))).items()
        },
    }


def _model_of(one: nn.Module | Trainable) -> nn.Module:
    return one.model if isinstance(one, Trainable) else one
