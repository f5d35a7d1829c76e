"""Mistakes with strategies: records, functions of one's own, calls, and what they return."""

from __future__ import annotations

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.loops.train_step import train_step
from lightrft.strategy import Strategy, StrategyConfig, Trainable, Training, get_strategy
from lightrft.strategy.protocols.training import Backward

strategy = get_strategy(StrategyConfig())
model = nn.Linear(1, 1)
optimizer = strategy.create_optimizer(model)


@attrs.frozen(kw_only=True, eq=False)
class BackwardAlone:
    """It lacks all else that a backend does."""

    backward: Backward


def fit(training: Training) -> None:
    """A loop."""


def other_name(
    value: torch.Tensor,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    weight: float | None = None,
    is_boundary: bool | None = None,
) -> None:
    """The first parameter is called `loss`."""


def other_type(
    loss: float,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    weight: float | None = None,
    is_boundary: bool | None = None,
) -> None:
    """The loss is a tensor."""


def other_result() -> str:
    """A rank is a number."""
    return "0"


def without_weight(
    loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, *, is_boundary: bool | None = None
) -> None:
    """A loop may pass a weight."""


def without_boundary(
    loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, *, weight: float | None = None
) -> None:
    """A loop may say that more micro-batches follow."""


def loss_of_text(model: nn.Module, text: str) -> torch.Tensor:
    """The micro-batches are tensors."""
    return torch.ones(())


def mean_of(model: nn.Module, batch: torch.Tensor) -> float:
    """A loss is a tensor, with its graph."""
    return 0.0


def build_nothing(config: StrategyConfig) -> None:
    """A builder returns a strategy."""


Strategy(backward=strategy.backward)  # mypy: call-arg, pyright: reportCallIssue
fit(BackwardAlone(backward=strategy.backward))  # mypy: arg-type, pyright: reportArgumentType
fit(strategy.backward)  # mypy: arg-type, pyright: reportArgumentType
named: Backward = other_name  # mypy: assignment, pyright: reportAssignmentType
attrs.evolve(strategy, backward=other_type)  # mypy: arg-type
attrs.evolve(strategy, get_rank=other_result)  # mypy: arg-type
weighted: Backward = without_weight  # mypy: assignment, pyright: reportAssignmentType
promising: Backward = without_boundary  # mypy: assignment, pyright: reportAssignmentType
strategy.backward = strategy.backward  # mypy: misc, pyright: reportAttributeAccessIssue
get_strategy({}, registry={"nothing": build_nothing})  # mypy: dict-item, pyright: reportArgumentType

strategy.backward(torch.ones(()), model, optimizer, scale=2.0)  # mypy: call-arg, pyright: reportCallIssue
strategy.backward(model, torch.ones(()), optimizer)  # mypy: arg-type, pyright: reportArgumentType
strategy.create_optimizer(model, 1e-3)  # mypy: call-arg, pyright: reportCallIssue
strategy.optimizer_step(optimizer, model)  # mypy: call-arg, pyright: reportCallIssue
strategy.all_reduce(torch.ones(()), op="average")  # mypy: arg-type, pyright: reportArgumentType
strategy.no_such_function()  # mypy: attr-defined, pyright: reportAttributeAccessIssue

alone = Trainable(model, optimizer, None)
train_step(strategy, alone, [torch.ones(1)], loss_of_text, weight_fn=len)  # mypy: misc, pyright: reportArgumentType
train_step(strategy, alone, [torch.ones(1)], mean_of, weight_fn=len)  # mypy: arg-type, pyright: reportArgumentType
train_step(strategy, alone, ["text"], loss_of_text)  # mypy: call-arg, pyright: reportCallIssue

prepared: Optimizer = strategy.prepare(model)  # mypy: assignment, pyright: reportAssignmentType
single, double = strategy.prepare((model, optimizer, None))  # mypy: misc, pyright: reportAssignmentType
strategy.prepare(model, model).optimizer  # mypy: attr-defined, pyright: reportAttributeAccessIssue
actor, critic, scorers, policy = strategy.prepare_models_and_optimizers(model, None, None, None)
critic.model  # mypy: union-attr, pyright: reportOptionalMemberAccess
strategy.save_ckpt(model, "runs", client_state={"when": object()})  # mypy: dict-item, pyright: reportArgumentType
strategy.save_ckpt(optimizer, "runs")  # mypy: arg-type, pyright: reportArgumentType
