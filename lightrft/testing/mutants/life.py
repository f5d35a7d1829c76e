"""Planted bugs that show in some order of calls alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import attrs
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.errors import StepError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.checkpointing import Checkpointable, LoadedCheckpoint
from lightrft.strategy.protocols.training import StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.checkpoint.calls import SaveCall, broken_save, do_save
from lightrft.testing.mutants.mutant import Mutant, strategy_mutant

__all__ = ["MUTANTS"]


def _steps_without_backward(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        try:
            return strategy.optimizer_step(optimizer, model, scheduler, is_boundary=is_boundary)
        except StepError:
            return StepResult(stepped=False, grad_norm=None, learning_rate=0.0, skipped_reason=None)

    return attrs.evolve(strategy, optimizer_step=optimizer_step)


def _overwrites(strategy: Strategy, call: SaveCall, /) -> Path:
    shutil.rmtree(call.save_dir / f"step-{call.step or 0:08d}", ignore_errors=True)
    return do_save(strategy, call)


def _drops_the_window(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def load_ckpt(
        model: Checkpointable,
        load_dir: str | os.PathLike[str],
        *,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        step: int | None = None,
    ) -> LoadedCheckpoint:
        loaded = strategy.load_ckpt(model, load_dir, optimizer=optimizer, scheduler=scheduler, step=step)
        if isinstance(model, Trainable):
            model.optimizer.zero_grad()
        return loaded

    return attrs.evolve(strategy, load_ckpt=load_ckpt)


def _finds_none(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def latest_ckpt(load_dir: str | os.PathLike[str]) -> int | None:
        return strategy.latest_ckpt(load_dir) or None  # step 0 counts as none

    return attrs.evolve(strategy, latest_ckpt=latest_ckpt)


def _averages_before_it_checks(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def moving_average(model: nn.Module, model_ema: nn.Module, beta: float = 0.992) -> None:
        strategy.moving_average(model, model_ema, min(max(beta, 0.0), 1.0))
        strategy.moving_average(model, model_ema, beta if not 0 <= beta <= 1 else 1.0)

    return attrs.evolve(strategy, moving_average=moving_average)


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant("life.strategy.empty_step", "A step without a backward is accepted.", _steps_without_backward),
    strategy_mutant("life.strategy.overwritten", "Saving a step that exists overwrites it.", broken_save(_overwrites)),
    strategy_mutant(
        "life.strategy.dropped_window", "Loading drops the gradients of an open window.", _drops_the_window
    ),
    strategy_mutant("life.strategy.step_0", "A checkpoint of step 0 is not found.", _finds_none),
    strategy_mutant(
        "life.strategy.late_check", "A refused moving average has moved already.", _averages_before_it_checks
    ),
)
"""Bugs that the law about whole lives finds."""
