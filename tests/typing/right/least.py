"""Loops that ask for no more than they need, and what may be passed to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.strategy import StepResult, Strategy, StrategyProtocol, Training
from lightrft.strategy.protocols.training import Backward, OptimizerStep


class Steps(Protocol):
    """The two functions that this loop calls."""

    @property
    def backward(self) -> Backward: ...
    @property
    def optimizer_step(self) -> OptimizerStep: ...


@attrs.frozen(kw_only=True, eq=False)
class TwoFunctions:
    """A record for a test of the loop: nothing else is needed."""

    backward: Backward
    optimizer_step: OptimizerStep


def fit(steps: Steps, model: nn.Module, optimizer: Optimizer, losses: Iterable[torch.Tensor]) -> int:
    """Return how many steps were taken."""
    taken = 0
    for loss in losses:
        steps.backward(loss, model, optimizer, weight=0.5)
        taken += steps.optimizer_step(optimizer, model, None, is_boundary=True).stepped
    return taken


def fit_anything(training: Training, model: nn.Module) -> nn.Module:
    """A loop over what a backend does to models."""
    optimizer = training.create_optimizer(model)
    fit(training, model, optimizer, [])
    return training.unwrap_model(model)


def backward(loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, *, weight: float | None = None) -> None:
    """A user's own."""
    torch.autograd.backward(loss if weight is None else weight * loss)


def optimizer_step(
    optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
) -> StepResult:
    """A user's own."""
    optimizer.step()
    return StepResult(stepped=True, grad_norm=None, learning_rate=0.0, skipped_reason=None)


def pass_records(strategy: Strategy, model: nn.Module) -> StrategyProtocol:
    """The whole record and the record of two functions satisfy what the loops ask for."""
    fit(TwoFunctions(backward=backward, optimizer_step=optimizer_step), model, torch.optim.SGD(model.parameters()), [])
    fit_anything(strategy, model)
    return strategy
