"""Mistakes with records of one's own: missing fields, functions that are bound wrongly, and what can change."""

from __future__ import annotations

import functools

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import EngineConfig
from lightrft.strategy import ENGINES, Strategy, StrategyConfig, get_strategy
from lightrft.strategy.protocols import Engine
from lightrft.strategy.protocols.collectives import Broadcast, GetRank
from lightrft.strategy.protocols.training import Backward

strategy = get_strategy(StrategyConfig())
engine = ENGINES["scripted"](EngineConfig())


def first(
    loss: torch.Tensor,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    weight: float | None = None,
    is_boundary: bool | None = None,
) -> int:
    """A backward that returns something."""
    return 0


@attrs.define(kw_only=True, eq=False)
class Mutable:
    """A record that can be changed, and is no `Strategy`."""

    backward: Backward


def build_mutable(config: StrategyConfig) -> Mutable:
    """A builder returns the frozen record."""
    return Mutable(backward=get_strategy(config).backward)


def rank_of(world: int) -> int:
    """A rank is asked for without arguments."""
    return world


of_first = functools.partial(first)

Strategy()  # mypy: call-arg, pyright: reportCallIssue
Engine(capabilities=frozenset(), generate=engine.generate)  # mypy: call-arg, pyright: reportCallIssue
attrs.evolve(strategy, capabilities={"bf16"})  # mypy: arg-type
attrs.evolve(strategy, capabilities=frozenset({"flying"}))  # mypy: arg-type
returned: Backward = of_first  # mypy: assignment, pyright: reportAssignmentType
get_strategy({}, registry={"mutable": build_mutable})  # mypy: dict-item, pyright: reportArgumentType
strategy.print = strategy.print  # mypy: misc, pyright: reportAttributeAccessIssue
engine.close = engine.close  # mypy: misc, pyright: reportAttributeAccessIssue
engine.capabilities.add("images")  # mypy: attr-defined, pyright: reportAttributeAccessIssue
no_strategy: Strategy = Mutable(backward=strategy.backward)  # mypy: assignment, pyright: reportAssignmentType

# what checkers do not see of a partial, the law `record.signatures` does
of_two: GetRank = functools.partial(rank_of)
bound: Broadcast = functools.partial(strategy.all_reduce, op="sum")
