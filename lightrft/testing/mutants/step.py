"""Planted bugs of backward and optimizer_step, each of which a framework has had."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.training.clipping import clip_gradients
from lightrft.backends.training.step import build_optimizer_step
from lightrft.backends.training.window import MICRO_BATCHES, PENDING
from lightrft.config import StrategyConfig
from lightrft.strategy.protocols import BuildStrategy, StepResult
from lightrft.strategy.protocols.training import OptimizerStep
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import STRATEGIES
from lightrft.testing.mutants.mutant import Mutant, strategy_mutant
from lightrft.testing.replicated import build_simulated

__all__ = ["MUTANTS"]

_SINGLE = STRATEGIES["single"]


class _Weigh(Protocol):
    """Chooses the wrong weight for a micro-batch."""

    def __call__(self, weight: float | None, optimizer: Optimizer, config: StrategyConfig, /) -> float | None: ...


def _backward_mutant(
    name: str, defect: str, weigh: _Weigh, *, of: BuildStrategy = _SINGLE, world_size: int = 1
) -> Mutant:
    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        inner = strategy.backward

        def backward(
            loss: Tensor,
            model: nn.Module,
            optimizer: Optimizer,
            *,
            weight: float | None = None,
            is_boundary: bool | None = None,
        ) -> None:
            inner(loss, model, optimizer, weight=weigh(weight, optimizer, config), is_boundary=is_boundary)

        return attrs.evolve(strategy, backward=backward)

    return strategy_mutant(f"step.{name}", defect, breaks, of=of, world_size=world_size)


@attrs.frozen(kw_only=True, eq=False)
class _Call:
    """A call of `optimizer_step`, with the right function that it stands before."""

    inner: OptimizerStep
    optimizer: Optimizer
    model: nn.Module
    scheduler: LRScheduler | None
    is_boundary: bool | None
    config: StrategyConfig


class _Around(Protocol):
    """Does something wrong around a step."""

    def __call__(self, call: _Call, /) -> StepResult: ...


def _step_mutant(
    name: str, defect: str, around: _Around, *, of: BuildStrategy = _SINGLE, world_size: int = 1
) -> Mutant:
    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        return _with_step(strategy, config, around)

    return strategy_mutant(f"step.{name}", defect, breaks, of=of, world_size=world_size)


def _with_step(strategy: Strategy, config: StrategyConfig, around: _Around) -> Strategy:
    inner = strategy.optimizer_step

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        return around(
            _Call(
                inner=inner,
                optimizer=optimizer,
                model=model,
                scheduler=scheduler,
                is_boundary=is_boundary,
                config=config,
            )
        )

    return attrs.evolve(strategy, optimizer_step=optimizer_step)


def _stepped(call: _Call) -> StepResult:
    return call.inner(call.optimizer, call.model, call.scheduler, is_boundary=call.is_boundary)


def _micro_batches(config: StrategyConfig) -> int:
    return config.train_batch_size // config.micro_train_batch_size


def _position(optimizer: Optimizer) -> int:
    return int(optimizer.param_groups[0][MICRO_BATCHES])


def _is_last(call: _Call) -> bool:
    if call.is_boundary is not None:
        return call.is_boundary
    return _position(call.optimizer) + 1 >= _micro_batches(call.config)


def _trained(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


# accumulation


def _sum(weight: float | None, optimizer: Optimizer, config: StrategyConfig, /) -> float | None:
    del optimizer, config
    return 1.0 if weight is None else weight


def _divide_wrongly(weight: float | None, optimizer: Optimizer, config: StrategyConfig, /) -> float | None:
    del optimizer
    return 1.0 / config.train_batch_size if weight is None else weight


def _lose_first(weight: float | None, optimizer: Optimizer, config: StrategyConfig, /) -> float | None:
    return 0.0 if _position(optimizer) == 0 and _micro_batches(config) > 1 else weight


def _lose_last(weight: float | None, optimizer: Optimizer, config: StrategyConfig, /) -> float | None:
    number = _micro_batches(config)
    return 0.0 if 1 < number == _position(optimizer) + 1 else weight


def _ignore_weight(weight: float | None, optimizer: Optimizer, config: StrategyConfig, /) -> float | None:
    del weight, optimizer, config
    return None


def _take_zero_for_none(weight: float | None, optimizer: Optimizer, config: StrategyConfig, /) -> float | None:
    del optimizer, config
    return weight or None


def _average_over_ranks(weight: float | None, optimizer: Optimizer, config: StrategyConfig, /) -> float | None:
    del optimizer
    return (1.0 / _micro_batches(config) if weight is None else weight) / 2


# windows


def _step_every_time(call: _Call, /) -> StepResult:
    return _stepped(attrs.evolve(call, is_boundary=True))


def _ignore_boundary(call: _Call, /) -> StepResult:
    return _stepped(attrs.evolve(call, is_boundary=None))


def _count_exactly(call: _Call, /) -> StepResult:
    is_beyond = _position(call.optimizer) + 1 > _micro_batches(call.config)
    return _stepped(attrs.evolve(call, is_boundary=False) if call.is_boundary is None and is_beyond else call)


def _schedule_every_time(call: _Call, /) -> StepResult:
    result = _stepped(call)
    if call.scheduler is not None and not result.stepped:
        call.optimizer.param_groups[0]["lr"] *= 0.5
    return result


def _schedule_twice(call: _Call, /) -> StepResult:
    result = _stepped(call)
    if call.scheduler is not None and result.stepped:
        call.scheduler.step()
    return result


def _keep_gradients(call: _Call, /) -> StepResult:
    kept = [(parameter, parameter.grad) for parameter in _trained(call.optimizer)]
    kept = [(parameter, None if gradient is None else gradient.clone()) for parameter, gradient in kept]
    result = _stepped(call)
    for parameter, gradient in kept if result.stepped else ():
        parameter.grad = gradient
    return result


def _step_without_backward(call: _Call, /) -> StepResult:
    if not call.optimizer.param_groups[0][PENDING]:
        return StepResult(stepped=False, grad_norm=None, learning_rate=0.0, skipped_reason=None)
    return _stepped(call)


def _say_stepped(call: _Call, /) -> StepResult:
    return attrs.evolve(_stepped(call), stepped=True)


def _report_next_rate(call: _Call, /) -> StepResult:
    result = _stepped(call)
    return attrs.evolve(result, learning_rate=float(call.optimizer.param_groups[0]["lr"]))


def _keep_rate_above(call: _Call, /) -> StepResult:
    for group in call.optimizer.param_groups:
        group["lr"] = max(group["lr"], 1e-6)
    return _stepped(call)


# clipping


def _clipped_in_parts(call: _Call, parts: Iterable[list[nn.Parameter]]) -> StepResult:
    """Clip each part by itself, and report the norm of the whole."""
    parameters = _trained(call.optimizer)
    norm = float(torch.nn.utils.get_total_norm(_gradients(parameters)))
    if call.config.max_norm > 0 and torch.isfinite(torch.tensor(norm)):
        for part in parts:
            torch.nn.utils.clip_grad_norm_(part, call.config.max_norm)
    unbounded = build_optimizer_step(max_norm=0.0, accumulation_steps=_micro_batches(call.config))
    result = unbounded(call.optimizer, call.model, call.scheduler, is_boundary=call.is_boundary)
    return attrs.evolve(result, grad_norm=None if result.grad_norm is None else norm)


def _clip_by_group(call: _Call, /) -> StepResult:
    if not _is_last(call):
        return _stepped(call)
    return _clipped_in_parts(call, [group["params"] for group in call.optimizer.param_groups])


def _clip_by_parameter(call: _Call, /) -> StepResult:
    if not _is_last(call):
        return _stepped(call)
    return _clipped_in_parts(call, [[parameter] for parameter in _trained(call.optimizer)])


def _clip_every_time(call: _Call, /) -> StepResult:
    if _is_last(call):
        return _stepped(call)
    return _clipped_in_parts(call, [_trained(call.optimizer)])


def _clip_to_zero(call: _Call, /) -> StepResult:
    if call.config.max_norm == 0 and _is_last(call):
        result = _clipped_in_parts(call, [])
        return attrs.evolve(result, grad_norm=0.0)
    return _stepped(call)


def _zero_at_no_bound(call: _Call, /) -> StepResult:
    if call.config.max_norm == 0 and _is_last(call):
        for gradient in _gradients(_trained(call.optimizer)):
            gradient.mul_(0.0)
    return _stepped(call)


def _report_clipped_norm(call: _Call, /) -> StepResult:
    result, bound = _stepped(call), call.config.max_norm
    return (
        result
        if not bound or result.grad_norm is None
        else attrs.evolve(result, grad_norm=min(bound, result.grad_norm))
    )


def _clip_by_rank(call: _Call, /) -> StepResult:
    if call.config.max_norm > 0:
        torch.nn.utils.clip_grad_norm_(_trained(call.optimizer), call.config.max_norm)
    return _stepped(call)


def _scaled(call: _Call, *, factor: float = 1.0, added: float = 0.0) -> StepResult:
    """Clip to the bound times a factor, with a number added to the norm; report the norm."""
    if not _is_last(call):
        return _stepped(call)
    gradients, bound = _gradients(_trained(call.optimizer)), call.config.max_norm
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if 0 < bound < norm < float("inf"):
        for gradient in gradients:
            gradient.mul_(factor * bound / (norm + added))
        return attrs.evolve(_clipped_in_parts(call, []), grad_norm=norm)
    return _stepped(call)


def _clip_too_little(call: _Call, /) -> StepResult:
    return _scaled(call, factor=1.01)


def _clip_with_epsilon(call: _Call, /) -> StepResult:
    return _scaled(call, added=1e-3)


# gradients that are not finite


def _is_finite(call: _Call) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in _gradients(_trained(call.optimizer)))


def _step_with_nan(call: _Call, /) -> StepResult:
    if _is_last(call) and not _is_finite(call):
        call.optimizer.step()
    return _stepped(call)


def _look_at_first(call: _Call, /) -> StepResult:
    gradients = _gradients(_trained(call.optimizer))
    if _is_last(call) and bool(gradients[0].isfinite().all()) and not _is_finite(call):
        call.optimizer.step()
    return _stepped(call)


def _mend_nan(call: _Call, /) -> StepResult:
    for gradient in _gradients(_trained(call.optimizer)):
        gradient.nan_to_num_(0.0, 0.0, 0.0)
    return _stepped(call)


def _schedule_when_skipped(call: _Call, /) -> StepResult:
    result = _stepped(call)
    if call.scheduler is not None and result.skipped_reason:
        call.optimizer.param_groups[0]["lr"] *= 0.5
    return result


def _skip_silently(call: _Call, /) -> StepResult:
    return attrs.evolve(_stepped(call), skipped_reason=None)


def _leak_skipped(call: _Call, /) -> StepResult:
    kept = [(parameter, parameter.grad) for parameter in _trained(call.optimizer)]
    kept = [(parameter, None if gradient is None else gradient.clone()) for parameter, gradient in kept]
    result = _stepped(call)
    for parameter, gradient in kept if result.skipped_reason else ():
        parameter.grad = None if gradient is None else torch.ones_like(gradient)
    return result


@torch.no_grad()
def _skip_alone(call: _Call, /) -> StepResult:
    if _is_finite(call):
        return _stepped(call)
    kept = [parameter.clone() for parameter in _trained(call.optimizer)]
    for gradient in _gradients(_trained(call.optimizer)):
        gradient.zero_()
    result = _stepped(call)
    for parameter, value in zip(_trained(call.optimizer), kept, strict=True):
        parameter.copy_(value)
    return attrs.evolve(result, stepped=False, grad_norm=float("nan"), skipped_reason="a loss here was NaN")


# ranks


def _step_alone(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    steps = config.train_batch_size // (config.micro_train_batch_size * 2)
    return attrs.evolve(
        strategy, optimizer_step=build_optimizer_step(max_norm=config.max_norm, accumulation_steps=max(1, steps))
    )


# what a strategy must not remember


def _clip_newest(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    newest: list[Optimizer] = []
    create = strategy.create_optimizer

    def create_optimizer(
        model: nn.Module,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> Optimizer:
        optimizer = create(model, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        newest[:] = [optimizer]
        return optimizer

    def around(call: _Call, /) -> StepResult:
        if call.optimizer in newest or not _is_last(call):
            return _stepped(call)
        if _gradients(_trained(newest[0])):
            clip_gradients(newest[0], config.max_norm)
        return _clipped_in_parts(call, [])

    return attrs.evolve(_with_step(strategy, config, around), create_optimizer=create_optimizer)


def _count_calls(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    return _counting(strategy, config, [])


def _counting(strategy: Strategy, config: StrategyConfig, calls: list[None]) -> Strategy:
    def around(call: _Call, /) -> StepResult:
        if call.is_boundary is not None or not call.optimizer.param_groups[0][PENDING]:
            return _stepped(call)
        calls.append(None)
        is_boundary = len(calls) >= _micro_batches(config)
        if is_boundary:
            calls.clear()
        return _stepped(attrs.evolve(call, is_boundary=is_boundary))

    return _with_step(strategy, config, around)


def _clear_in_evaluation(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config
    inner = strategy.create_optimizer

    def clear(module: nn.Module, inputs: object) -> None:
        del inputs
        if not module.training:
            module.zero_grad(set_to_none=False)

    def create_optimizer(
        model: nn.Module,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> Optimizer:
        model.register_forward_pre_hook(clear)
        return inner(model, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)

    return attrs.evolve(strategy, create_optimizer=create_optimizer)


MUTANTS: tuple[Mutant, ...] = (
    _backward_mutant("accumulation.summed", "Gradients of a window are summed and not averaged.", _sum),
    _backward_mutant(
        "accumulation.wrong_divisor", "A micro-batch is divided by samples where its loss is a mean.", _divide_wrongly
    ),
    _backward_mutant("accumulation.first_lost", "The first micro-batch of a window is lost.", _lose_first),
    _backward_mutant("accumulation.last_lost", "The last micro-batch of a window is lost.", _lose_last),
    _backward_mutant("partition.weight_ignored", "Weights play no part.", _ignore_weight),
    _backward_mutant("zero_weight.zero_weight_is_none", "A weight of 0 is taken for no weight.", _take_zero_for_none),
    _backward_mutant(
        "partition.averaged_over_ranks",
        "Shares of the whole window are divided by the ranks once more.",
        _average_over_ranks,
        of=build_simulated,
        world_size=2,
    ),
    _step_mutant("window.every_micro_batch", "The optimizer steps at every micro-batch.", _step_every_time),
    _step_mutant("window.boundary_ignored", "is_boundary plays no part.", _ignore_boundary),
    _step_mutant("window.counted_exactly", "A window that went on beyond the count never ends by it.", _count_exactly),
    _step_mutant("schedule.rate_every_micro_batch", "The rate moves at every micro-batch.", _schedule_every_time),
    _step_mutant("schedule.schedule_twice", "The schedule moves twice a step.", _schedule_twice),
    _step_mutant("window.gradients_kept", "Gradients stay after the step, and are in the next one.", _keep_gradients),
    _step_mutant("window.no_backward_needed", "A step without backward is no error.", _step_without_backward),
    _step_mutant("window.says_stepped", "Every call says that it stepped.", _say_stepped),
    _step_mutant("schedule.next_rate", "The reported rate is the one after the step.", _report_next_rate),
    _step_mutant("zero_rate.rate_floor", "A learning rate of 0 is raised.", _keep_rate_above),
    _step_mutant("clipping.clip_by_group", "Each parameter group is clipped by itself.", _clip_by_group),
    _step_mutant("clipping.clip_by_parameter", "Each parameter is clipped by itself.", _clip_by_parameter),
    _step_mutant(
        "clipping.clip_every_micro_batch", "What has accumulated is clipped at every micro-batch.", _clip_every_time
    ),
    _step_mutant("clipping.clip_too_little", "What is clipped is one percent beyond the bound.", _clip_too_little),
    _step_mutant(
        "clipping.clip_epsilon", "1e-3 is added to the norm that gradients are divided by.", _clip_with_epsilon
    ),
    _step_mutant("clipping.no_bound_is_zero", "max_norm=0 multiplies gradients by 0.", _zero_at_no_bound),
    _step_mutant("clipping.no_norm_without_bound", "Without a bound the norm is reported as 0.", _clip_to_zero),
    _step_mutant("clipping.norm_after_clipping", "The reported norm is the one after clipping.", _report_clipped_norm),
    _step_mutant(
        "clipping.clip_by_rank",
        "Each rank clips its own gradient before the sum.",
        _clip_by_rank,
        of=build_simulated,
        world_size=2,
    ),
    _step_mutant(
        "non_finite.nan_stepped", "A gradient that is NaN is stepped with, and then reported.", _step_with_nan
    ),
    _step_mutant(
        "non_finite.nan_in_first", "Only the first parameter's gradient is looked at for NaN.", _look_at_first
    ),
    _step_mutant("non_finite.nan_mended", "NaN is replaced by 0, and nobody hears of it.", _mend_nan),
    _step_mutant("non_finite.schedule_when_skipped", "The schedule moves at a skipped step.", _schedule_when_skipped),
    _step_mutant("non_finite.skipped_silently", "A skipped step does not say why.", _skip_silently),
    _step_mutant("non_finite.skipped_leaks", "What a skipped window accumulated is in the next one.", _leak_skipped),
    _step_mutant(
        "non_finite.skipped_alone",
        "Only the rank whose loss is NaN skips the step.",
        _skip_alone,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "step.replicas.not_synchronised",
        "Ranks step with their own gradients.",
        _step_alone,
        of=build_simulated,
        world_size=2,
    ),
    strategy_mutant(
        "step.separation.newest_clipped",
        "The optimizer that was made last is clipped in place of the present one.",
        _clip_newest,
    ),
    strategy_mutant(
        "step.separation.counted_in_strategy",
        "The position in the window is in the strategy, not with the optimizer.",
        _count_calls,
    ),
    strategy_mutant(
        "step.evaluation.evaluation_clears", "A forward pass in evaluation mode clears gradients.", _clear_in_evaluation
    ),
)
"""The mutants."""
