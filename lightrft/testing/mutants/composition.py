"""Planted bugs that show when a strategy is wrapped."""

from __future__ import annotations

from typing import cast

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import OptimizerStep, StepResult
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.mutant import Mutant, strategy_mutant

__all__ = ["MUTANTS"]


def _steps_by_position(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, is_boundary: bool | None = None, /
    ) -> StepResult:
        return strategy.optimizer_step(optimizer, model, scheduler, is_boundary=is_boundary)

    return attrs.evolve(strategy, optimizer_step=cast("OptimizerStep", optimizer_step))


def _knows_its_first_model(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config
    known = list[nn.Module]()

    def backward(
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        known.append(model)
        # what belongs to a later model is scaled by what was meant for the first one
        strategy.backward(
            loss if model is known[0] else loss * 2, model, optimizer, weight=weight, is_boundary=is_boundary
        )

    return attrs.evolve(strategy, backward=backward)


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant(
        "composition.transparent.positional",
        "A function cannot be called with the keyword of its contract.",
        _steps_by_position,
    ),
    strategy_mutant(
        "composition.transparent.first_model",
        "The strategy remembers the first model that it saw.",
        _knows_its_first_model,
    ),
)
"""Bugs that the laws of the section "composition" find."""
