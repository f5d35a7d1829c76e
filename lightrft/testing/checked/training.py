"""Training, held to its laws at every call."""

from __future__ import annotations

import hashlib

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.strategy.protocols import StepResult
from lightrft.strategy.protocols.training import Backward, CreateOptimizer, MovingAverage, OptimizerStep
from lightrft.strategy.record import Strategy
from lightrft.testing.checked.verdict import raise_on_all, require, same_on_all
from lightrft.testing.reference.digests import changed_names, digests

__all__ = ["with_checked_training"]


def with_checked_training(strategy: Strategy) -> Strategy:
    """Return the strategy with optimizers, gradients, steps and moving averages held to their laws.

    Args:
        strategy: any strategy.
    """
    return attrs.evolve(
        strategy,
        create_optimizer=_checked_create_optimizer(strategy),
        backward=_checked_backward(strategy),
        optimizer_step=_checked_optimizer_step(strategy),
        moving_average=_checked_moving_average(strategy),
    )


def _checked_create_optimizer(strategy: Strategy) -> CreateOptimizer:
    inner = strategy.create_optimizer

    def create_optimizer(
        model: nn.Module,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> Optimizer:
        optimizer = inner(model, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        for name, parameter in model.named_parameters():
            times, wanted = held.count(id(parameter)), int(parameter.requires_grad)
            require(
                times == wanted,
                "create_optimizer",
                f"the optimizer holds {name!r} {times} times and must hold it {wanted} times",
            )
        return optimizer

    return create_optimizer


def _checked_backward(strategy: Strategy) -> Backward:
    inner = strategy.backward

    def backward(
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        before, rates = _state(strategy, model), _rates(optimizer)
        inner(loss, model, optimizer, weight=weight, is_boundary=is_boundary)
        changed = changed_names(before, _state(strategy, model))
        problem = f"{changed} changed, and gradients alone may" if changed else None
        if _rates(optimizer) != rates:
            problem = f"learning rates went from {rates} to {_rates(optimizer)} and must stay"
        raise_on_all(strategy, problem, function="backward", device=loss.device)

    return backward


def _checked_optimizer_step(strategy: Strategy) -> OptimizerStep:
    inner = strategy.optimizer_step

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        before, rates, count = _state(strategy, model), _rates(optimizer), _count(scheduler)
        tied = _tied_names(strategy.unwrap_model(model))
        result = inner(optimizer, model, scheduler, is_boundary=is_boundary)
        after = _state(strategy, model)
        changed = changed_names(before, after)
        problem = (
            _problem_of_result(result)
            or _problem_of_change(strategy.unwrap_model(model), tied, result, changed, after)
            or _problem_of_schedule(result, rates, _rates(optimizer), count, _count(scheduler))
        )
        device = next(model.parameters()).device
        raise_on_all(strategy, problem, function="optimizer_step", device=device)
        whole = hashlib.blake2b(f"{after}{result.stepped}{result.grad_norm}".encode()).hexdigest()
        odd = same_on_all(strategy, whole, device)
        require(
            odd is None,
            "optimizer_step",
            f"rank {odd} has other parameters or another result than rank 0 after the step",
        )
        return result

    return optimizer_step


def _problem_of_result(result: StepResult) -> str | None:
    norm, inside = result.grad_norm, result.grad_norm is None
    if result.stepped and (norm is None or not 0 <= norm < float("inf") or result.skipped_reason is not None):
        return f"{result} says that it stepped, so grad_norm must be finite and skipped_reason None"
    if not result.stepped and inside != (result.skipped_reason is None):
        return f"{result} did not step, so it must have either a grad_norm and a skipped_reason, or neither"
    return None


def _problem_of_change(
    plain: nn.Module, tied: list[set[str]], result: StepResult, changed: list[str], after: dict[str, str]
) -> str | None:
    if not result.stepped:
        return f"{changed} changed without a step" if changed else None
    frozen = {name for name, value in plain.named_parameters(remove_duplicate=False) if not value.requires_grad}
    moved = sorted(frozen & set(changed))
    if moved:
        return f"{moved} are frozen and changed"
    torn = [sorted(names) for names in tied if len({after[name] for name in names}) > 1]
    return f"{torn[0]} are tied and differ after the step" if torn else None


def _tied_names(plain: nn.Module) -> list[set[str]]:
    names: dict[int, set[str]] = {}
    for name, value in plain.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), set()).add(name)
    return list(names.values())


def _problem_of_schedule(
    result: StepResult, before: list[float], after: list[float], count: int | None, count_after: int | None
) -> str | None:
    if not result.stepped and before != after:
        return f"learning rates went from {before} to {after} without a step"
    if count is not None and count_after is not None and count_after - count != int(result.stepped):
        return f"the schedule moved by {count_after - count} steps and must move by {int(result.stepped)}"
    return None


def _checked_moving_average(strategy: Strategy) -> MovingAverage:
    inner = strategy.moving_average

    def moving_average(model: nn.Module, model_ema: nn.Module, beta: float = 0.992) -> None:
        before, average = _state(strategy, model), _parameters(strategy, model_ema)
        inner(model, model_ema, beta)
        changed = changed_names(before, _state(strategy, model))
        require(not changed, "moving_average", f"{changed} of the model changed, and its average alone may")
        current = _parameters(strategy, model)
        for name, moved in _parameters(strategy, model_ema).items():
            old, new = average[name].double(), current[name].double()
            # a few roundings, each of the size of what is averaged: the two may cancel
            bound = 4 * torch.finfo(moved.dtype).eps * torch.maximum(old.abs(), new.abs())
            close = bool(((moved.double() - torch.lerp(old, new, 1.0 - beta)).abs() <= bound).all())
            require(close, "moving_average", f"{name!r} is not beta * average + (1 - beta) * model with beta={beta}")

    return moving_average


def _state(strategy: Strategy, model: nn.Module) -> dict[str, str]:
    return digests(strategy.named_tensors(model))


def _parameters(strategy: Strategy, model: nn.Module) -> dict[str, torch.Tensor]:
    names = {name for name, _ in strategy.unwrap_model(model).named_parameters(remove_duplicate=False)}
    return {name: tensor.detach().clone() for name, tensor in strategy.named_tensors(model) if name in names}


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _count(scheduler: LRScheduler | None) -> int | None:
    return None if scheduler is None else scheduler.last_epoch
