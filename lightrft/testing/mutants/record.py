"""Planted bugs of the record itself, and of building it."""

# ruff: noqa: ARG001 (a wrong signature is the bug, and what is in it plays no part)
from __future__ import annotations

import functools
import os
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar, cast

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols import BuildStrategy, TensorTree
from lightrft.strategy.protocols.capabilities import Capabilities
from lightrft.strategy.protocols.training import StepResult
from lightrft.strategy.record import FUNCTIONS, Strategy
from lightrft.strategy.registry import STRATEGIES
from lightrft.testing.mutants.mutant import BreakStrategy, Mutant, strategy_mutant

__all__ = ["MUTANTS"]

_Tree = TypeVar("_Tree", bound=TensorTree)
_single = STRATEGIES["single"]


def _with_field(name: str, function: object) -> BreakStrategy:
    """Return the bug of a function that is not what the type of its field says."""

    def breaks(strategy: Strategy, config: StrategyConfig) -> Strategy:
        del config
        return attrs.evolve(strategy, **{name: function})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    return breaks


def _misnamed(tree: _Tree, src: int = 0) -> _Tree:
    return tree


def _other_default(data: _Tree, src: int = 1) -> _Tree:
    return data


def _keyword_only(data: _Tree, *, src: int = 0) -> _Tree:
    return data


def _swallowing(*args: object, **kwargs: object) -> object:
    return args[0]


def _bound(data: _Tree, src: int, backend: str) -> _Tree:
    return data


def _binds_with_partial(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config
    return attrs.evolve(strategy, barrier=functools.partial(strategy.barrier))


@attrs.define
class _Counter:
    calls: int = 0

    def barrier(self) -> None:
        self.calls += 1


def _uses_a_method(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config
    return attrs.evolve(strategy, barrier=_Counter().barrier)


def _is_mutable(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config
    return cast("Strategy", SimpleNamespace(**_fields(strategy)))


def _lacks_a_field(strategy: Strategy, config: StrategyConfig) -> Strategy:
    del config
    left = {name: value for name, value in _fields(strategy).items() if name != "moving_average"}
    kind = attrs.make_class("Partly", list(left), frozen=True, eq=False)
    return cast("Strategy", kind(**left))


def _fields(strategy: Strategy) -> dict[str, object]:
    return {name: getattr(strategy, name) for name in ("capabilities", *FUNCTIONS)}


def _with_claims(*names: str) -> BreakStrategy:
    def breaks(strategy: Strategy, config: StrategyConfig) -> Strategy:
        del config
        return attrs.evolve(strategy, capabilities=cast("Capabilities", frozenset(names)))

    return breaks


def _ignoring(name: str) -> BuildStrategy:
    """Return a builder of "single" that drops a setting."""

    def build(config: StrategyConfig) -> Strategy:
        default: object = getattr(StrategyConfig(), name)
        return _single(attrs.evolve(config, **{name: default}))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    return build


def _unlaunched(config: StrategyConfig) -> Strategy:
    """Return "single", whatever the launcher says, as a backend does that never asks."""
    before = os.environ.pop("WORLD_SIZE", None)
    try:
        return _single(config)
    finally:
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def _with_effect(effect: Callable[[StrategyConfig], object]) -> BreakStrategy:
    """Return the bug of a builder that does something besides."""

    def breaks(strategy: Strategy, config: StrategyConfig) -> Strategy:
        effect(config)
        return strategy

    return breaks


def _seeds(config: StrategyConfig) -> None:
    torch.manual_seed(config.seed)


def _shuffles(config: StrategyConfig) -> None:
    random.seed(config.seed)


def _sets_environment(config: StrategyConfig) -> None:
    # another value each time, as a free port is
    os.environ["LIGHTRFT_PLANTED_PORT"] = str(int(os.environ.get("LIGHTRFT_PLANTED_PORT", "29500")) + 1)


def _imports_an_engine(config: StrategyConfig) -> None:
    try:
        import vllm  # type: ignore[import-not-found, unused-ignore]  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError:
        sys.modules.pop("vllm", None)


def _counts_calls(strategy: Strategy, config: StrategyConfig) -> Strategy:
    """Return the strategy with a window that the closure counts, where it cannot be saved, loaded or handed over."""
    window = config.train_batch_size // config.micro_train_batch_size
    calls = 0

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        nonlocal calls
        calls += 1
        is_last = calls % window == 0 if is_boundary is None else is_boundary
        return strategy.optimizer_step(optimizer, model, scheduler, is_boundary=is_last)

    return attrs.evolve(strategy, optimizer_step=optimizer_step)


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant(
        "record.signatures.name",
        "A parameter has another name than in the contract.",
        _with_field("broadcast", _misnamed),
    ),
    strategy_mutant(
        "record.signatures.default", "A parameter has another default.", _with_field("broadcast", _other_default)
    ),
    strategy_mutant(
        "record.signatures.kind", "A parameter can be passed by keyword alone.", _with_field("broadcast", _keyword_only)
    ),
    strategy_mutant(
        "record.signatures.swallowed", "A function takes whatever it is given.", _with_field("broadcast", _swallowing)
    ),
    strategy_mutant("record.signatures.partial", "A function is a functools.partial.", _binds_with_partial),
    strategy_mutant(
        "record.signatures.partial_settings",
        "A function has its settings bound by functools.partial.",
        _with_field("broadcast", functools.partial(_bound, backend="gloo")),
    ),
    strategy_mutant("record.signatures.method", "A function is a method of an object that counts.", _uses_a_method),
    strategy_mutant(
        "record.signatures.none", "A function that the backend lacks is None.", _with_field("report_memory", None)
    ),
    strategy_mutant("record.frozen.mutable", "The record can be changed.", _is_mutable),
    strategy_mutant("record.signatures.missing", "The record lacks a function.", _lacks_a_field),
    strategy_mutant(
        "record.frozen.unknown_claim", "A capability is claimed that nobody knows.", _with_claims("bf16", "fp7")
    ),
    strategy_mutant(
        "record.claims.false_claim", "Several ranks are claimed and refused.", _with_claims("bf16", "ranks")
    ),
    strategy_mutant("record.claims.silent_bf16", "bf16 is not claimed, and is accepted.", _with_claims()),
    strategy_mutant(
        "record.claims.ignored_bf16",
        "bf16 is claimed, and float32 is used.",
        _with_claims("bf16"),
        of=_ignoring("bf16"),
    ),
    strategy_mutant(
        "record.claims.silent_ranks",
        "Each of several processes would train alone.",
        _with_claims("bf16"),
        of=_unlaunched,
    ),
    strategy_mutant("config.building.seeding", "Building seeds torch's random stream.", _with_effect(_seeds)),
    strategy_mutant("config.building.shuffling", "Building seeds Python's random stream.", _with_effect(_shuffles)),
    strategy_mutant(
        "config.building.environment", "Building changes the environment.", _with_effect(_sets_environment)
    ),
    strategy_mutant(
        "config.building.import", "Building imports an engine that was not chosen.", _with_effect(_imports_an_engine)
    ),
    strategy_mutant(
        "config.interchangeable.hidden_window",
        "The position in the window is counted inside of the strategy.",
        _counts_calls,
    ),
)
"""Bugs that the laws of the sections "record" and "config" find."""
