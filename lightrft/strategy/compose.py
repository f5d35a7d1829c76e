"""Transforms of strategies: a record in, a record out, with the functions of some fields wrapped.

A wrapped function keeps its name, signature and contract. What a transform counts or collects lives in a handle that
the caller passes, never in the record.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

import attrs

from lightrft.errors import ConfigError, StepError, nearest
from lightrft.strategy.calls import Call, call_of
from lightrft.strategy.protocols.training import StepResult
from lightrft.strategy.record import FUNCTIONS, Strategy

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

__all__ = [
    "FaultPlan",
    "Timing",
    "Transform",
    "WrapFunction",
    "compose",
    "identity",
    "with_ema",
    "with_faults",
    "with_finite_check",
    "with_logging",
    "with_recording",
    "with_timing",
    "with_wrapped_functions",
]

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


class Transform(Protocol):
    """Makes a strategy of a strategy."""

    def __call__(self, strategy: Strategy, /) -> Strategy:
        """Return the new strategy; the old one stays as it is.

        Law: a transform preserves every law of the strategy.

        Args:
            strategy: any strategy.
        """
        ...


class WrapFunction(Protocol):
    """Makes a function of a function."""

    def __call__(self, name: str, function: Callable[_Params, _Result], /) -> Callable[_Params, _Result]:
        """Return a function of the same signature.

        Args:
            name: field of the strategy.
            function: what stands there.
        """
        ...


@attrs.frozen
class Timing:
    """How long the calls of one function took.

    Attributes:
        num_calls: calls that returned or raised.
        seconds: their wall-clock time together.
    """

    num_calls: int = 0
    seconds: float = 0.0


@attrs.define
class FaultPlan:
    """When a function fails; the caller holds it, and it counts the calls.

    Attributes:
        at: number of the call that fails, from 1.
        error: what it raises, before it does anything.
        num_calls: calls so far.
    """

    at: int
    error: Exception
    num_calls: int = 0


def identity(strategy: Strategy, /) -> Strategy:
    """Return the strategy itself."""
    return strategy


def compose(*transforms: Transform) -> Transform:
    """Return the transform that applies all of them, the first one first, so that the last one is outermost.

    Args:
        transforms: any number; none of them gives the identity.

    Example:
        >>> from lightrft.strategy import StrategyConfig, get_strategy
        >>> calls = []
        >>> def recorded(strategy):
        ...     return with_recording(strategy, calls)
        >>> strategy = compose(with_finite_check, recorded)(get_strategy(StrategyConfig(strategy="single")))
        >>> strategy.get_rank()
        0
        >>> print(*calls)
        get_rank()
    """

    def composed(strategy: Strategy, /) -> Strategy:
        return functools.reduce(_applied, transforms, strategy)

    return composed


def _applied(strategy: Strategy, transform: Transform) -> Strategy:
    return transform(strategy)


def with_wrapped_functions(strategy: Strategy, wrap: WrapFunction) -> Strategy:
    """Return the strategy with every function wrapped.

    Args:
        strategy: any strategy.
        wrap: makes the new function of (field, old function).
    """
    wrapped = {name: wrap(name, getattr(strategy, name)) for name in FUNCTIONS}
    return _evolved(strategy, wrapped)


def _evolved(strategy: Strategy, changes: Mapping[str, Callable[..., object]]) -> Strategy:
    # the names are the record's own and every wrapper keeps its function's signature, which a mapping cannot express
    return attrs.evolve(strategy, **changes)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def with_recording(strategy: Strategy, calls: MutableSequence[Call]) -> Strategy:
    """Return the strategy with every call written down before it is made.

    Args:
        strategy: any strategy.
        calls: what the calls are appended to; they hold words about tensors and models, not references to them.
    """

    def wrap(name: str, function: Callable[_Params, _Result], /) -> Callable[_Params, _Result]:
        @functools.wraps(function)
        def recorded(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
            calls.append(call_of(name, function, args, kwargs))
            return function(*args, **kwargs)

        return recorded

    return with_wrapped_functions(strategy, wrap)


def with_logging(strategy: Strategy, log: Callable[[str], object]) -> Strategy:
    """Return the strategy with every call logged before it is made, so that the last line names what hangs or fails.

    Args:
        strategy: any strategy.
        log: takes one line, such as `logger.info` or `print`.
    """

    def wrap(name: str, function: Callable[_Params, _Result], /) -> Callable[_Params, _Result]:
        @functools.wraps(function)
        def logged(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
            log(str(call_of(name, function, args, kwargs)))
            return function(*args, **kwargs)

        return logged

    return with_wrapped_functions(strategy, wrap)


def with_timing(strategy: Strategy, timings: MutableMapping[str, Timing]) -> Strategy:
    """Return the strategy with the wall-clock time of every call added up.

    A context or an iterator is timed until it is returned, not while it is used; work queued on a device is not
    waited for.

    Args:
        strategy: any strategy.
        timings: sums by field; a field that was not called is missing.
    """

    def wrap(name: str, function: Callable[_Params, _Result], /) -> Callable[_Params, _Result]:
        @functools.wraps(function)
        def timed(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                before = timings.get(name, Timing())
                timings[name] = Timing(before.num_calls + 1, before.seconds + time.perf_counter() - start)

        return timed

    return with_wrapped_functions(strategy, wrap)


def with_faults(strategy: Strategy, plans: Mapping[str, FaultPlan]) -> Strategy:
    """Return the strategy with functions that fail on one of their calls, to see what a loop makes of it.

    Args:
        strategy: any strategy.
        plans: which fields fail, and when.

    Raises:
        ConfigError: a field is unknown.
    """

    def wrap(plan: FaultPlan, function: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
        @functools.wraps(function)
        def faulty(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
            plan.num_calls += 1
            if plan.num_calls == plan.at:
                raise plan.error
            return function(*args, **kwargs)

        return faulty

    for name in plans:
        if name not in FUNCTIONS:
            raise ConfigError(f"plans={name!r} is no function of a strategy; {nearest(name, FUNCTIONS)}.")
    return _evolved(strategy, {name: wrap(plan, getattr(strategy, name)) for name, plan in plans.items()})


def with_finite_check(strategy: Strategy) -> Strategy:
    """Return the strategy with a `backward` that raises StepError on a loss that is not finite.

    It costs one host sync a call.

    Args:
        strategy: any strategy.
    """
    inner = strategy.backward

    @functools.wraps(inner)
    def backward(
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        values = loss.detach().flatten().tolist()  # a loss that is not 0-d is for the strategy to refuse
        if not all(math.isfinite(value) for value in values):
            raise StepError(f"loss={values[0]!r} is not finite; look at the batch that made it before going on.")
        inner(loss, model, optimizer, weight=weight, is_boundary=is_boundary)

    return attrs.evolve(strategy, backward=backward)


def with_ema(strategy: Strategy, model: nn.Module, model_ema: nn.Module, beta: float = 0.992) -> Strategy:
    """Return the strategy with an average that moves after every real step of one model.

    Args:
        strategy: any strategy.
        model: the prepared model; steps of other models leave the average alone.
        model_ema: its average, moved in place.
        beta: share of the average that stays.
    """
    inner = strategy.optimizer_step
    averaged = strategy.unwrap_model(model)

    @functools.wraps(inner)
    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        result = inner(optimizer, model, scheduler, is_boundary=is_boundary)
        if result.stepped and strategy.unwrap_model(model) is averaged:
            strategy.moving_average(model, model_ema, beta)
        return result

    return attrs.evolve(strategy, optimizer_step=optimizer_step)
