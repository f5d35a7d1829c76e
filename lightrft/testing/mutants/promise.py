"""Planted bugs of what backward is told about the end of its window."""

from __future__ import annotations

from typing import Protocol

import attrs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.training.window import MICRO_BATCHES, PENDING, PROMISE
from lightrft.config import StrategyConfig
from lightrft.strategy.protocols import StepResult
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.mutant import Mutant, strategy_mutant

__all__ = ["MUTANTS"]


class _Tell(Protocol):
    """Chooses what backward is told."""

    def __call__(self, is_boundary: bool | None, /) -> bool | None: ...


def _telling_mutant(name: str, defect: str, tell: _Tell) -> Mutant:
    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        del config
        inner = strategy.backward

        def backward(
            loss: Tensor,
            model: nn.Module,
            optimizer: Optimizer,
            *,
            weight: float | None = None,
            is_boundary: bool | None = None,
        ) -> None:
            inner(loss, model, optimizer, weight=weight, is_boundary=tell(is_boundary))

        return attrs.evolve(strategy, backward=backward)

    return strategy_mutant(f"step.{name}", defect, breaks)


def _nothing(is_boundary: bool | None, /) -> bool | None:
    del is_boundary
    return None


def _ends_alone(is_boundary: bool | None, /) -> bool | None:
    return is_boundary or None


def _more_alone(is_boundary: bool | None, /) -> bool | None:
    return None if is_boundary else is_boundary


def _none_as_end(is_boundary: bool | None, /) -> bool | None:
    return is_boundary is not False


def _lose_promised(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.backward

    def backward(
        loss: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        inner(loss, model, optimizer, weight=0.0 if is_boundary is False else weight, is_boundary=is_boundary)

    return attrs.evolve(strategy, backward=backward)


class _Before(Protocol):
    """Does something wrong before a step that contradicts what backward was told."""

    def __call__(self, optimizer: Optimizer, is_boundary: bool | None, /) -> None: ...


def _contradiction_mutant(name: str, defect: str, before: _Before) -> Mutant:
    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        inner, number = strategy.optimizer_step, config.train_batch_size // config.micro_train_batch_size

        def optimizer_step(
            optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
        ) -> StepResult:
            if _contradicts(optimizer, number, is_boundary):
                before(optimizer, is_boundary)
            return inner(optimizer, model, scheduler, is_boundary=is_boundary)

        return attrs.evolve(strategy, optimizer_step=optimizer_step)

    return strategy_mutant(f"step.{name}", defect, breaks)


def _contradicts(optimizer: Optimizer, number: int, is_boundary: bool | None) -> bool:
    group = optimizer.param_groups[0]
    is_last = group[MICRO_BATCHES] + 1 >= number if is_boundary is None else is_boundary
    return group[PROMISE] is not None and group[PROMISE] != is_last


def _believe_count(optimizer: Optimizer, is_boundary: bool | None, /) -> None:
    if is_boundary is None:
        optimizer.param_groups[0][PROMISE] = None


def _count(optimizer: Optimizer, is_boundary: bool | None, /) -> None:
    del is_boundary
    optimizer.param_groups[0][MICRO_BATCHES] += 1


def _end(optimizer: Optimizer, is_boundary: bool | None, /) -> None:
    del is_boundary
    optimizer.param_groups[0][PENDING] = False


def _clear(optimizer: Optimizer, is_boundary: bool | None, /) -> None:
    del is_boundary
    optimizer.zero_grad()


def _step(optimizer: Optimizer, is_boundary: bool | None, /) -> None:
    del is_boundary
    optimizer.step()


MUTANTS: tuple[Mutant, ...] = (
    _telling_mutant("promise.promise_forgotten", "A step may contradict what backward was told.", _nothing),
    _telling_mutant("promise.promise_of_more_forgotten", "A window ends where more was promised.", _ends_alone),
    _telling_mutant("promise.promise_of_end_forgotten", "A window goes on where its end was promised.", _more_alone),
    _telling_mutant(
        "promise.end_assumed", "Backward that was told nothing takes it for the window's end.", _none_as_end
    ),
    strategy_mutant("step.promise.promised_lost", "What waits for the end of the window is lost.", _lose_promised),
    _contradiction_mutant(
        "promise.promise_below_count", "The count may contradict what backward was told.", _believe_count
    ),
    _contradiction_mutant("promise.refused_counts", "A step that is refused counts as a micro-batch.", _count),
    _contradiction_mutant("promise.refused_ends", "After a step that was refused the right one is refused too.", _end),
    _contradiction_mutant("promise.refused_clears", "A step that is refused clears the gradients.", _clear),
    _contradiction_mutant("promise.refused_steps", "A step that is refused has moved the parameters.", _step),
)
"""The mutants."""
