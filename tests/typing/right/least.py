"""Loops that ask for no more than they need, and what may be passed to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.loops.train_step import train_step
from lightrft.strategy import StepResult, Strategy, StrategyProtocol, Training
from lightrft.strategy.protocols.training import Backward, OptimizerStep, Trainable


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
        steps.backward(loss, model, optimizer, weight=0.5, is_boundary=True)
        taken += steps.optimizer_step(optimizer, model, None, is_boundary=True).stepped
    return taken


def fit_anything(training: Training, model: nn.Module) -> nn.Module:
    """A loop over what a backend does to models."""
    optimizer = training.create_optimizer(model)
    fit(training, model, optimizer, [])
    return training.unwrap_model(model)


def backward(
    loss: torch.Tensor,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    weight: float | None = None,
    is_boundary: bool | None = None,
) -> None:
    """A user's own."""
    torch.autograd.backward(loss if weight is None else weight * loss)


def optimizer_step(
    optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
) -> StepResult:
    """A user's own."""
    optimizer.step()
    return StepResult(stepped=True, grad_norm=None, learning_rate=0.0, skipped_reason=None)


@attrs.frozen(kw_only=True, eq=False)
class Words:
    """A micro-batch of a user's own."""

    token_ids: torch.Tensor
    num_words: int


def words_loss(model: nn.Module, words: Words) -> torch.Tensor:
    """The functions of a step take whatever its micro-batches are."""
    loss: torch.Tensor = model(words.token_ids).mean()
    return loss


def num_words(words: Words) -> int:
    """A whole number is a weight too."""
    return words.num_words


def step_over_words(strategy: Strategy, actor: Trainable, batches: Sequence[Words]) -> StepResult:
    """The strategy is all that a step needs."""
    return train_step(strategy, actor, batches, words_loss, weight_fn=num_words)


def pass_records(strategy: Strategy, model: nn.Module) -> StrategyProtocol:
    """The whole record and the record of two functions satisfy what the loops ask for."""
    fit(TwoFunctions(backward=backward, optimizer_step=optimizer_step), model, torch.optim.SGD(model.parameters()), [])
    fit_anything(strategy, model)
    return strategy
