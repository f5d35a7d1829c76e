"""The strategy for tests: it does everything that "single" does, and writes down what was asked of it."""

from __future__ import annotations

from collections.abc import MutableSequence

import attrs

from lightrft.strategy.build import get_strategy
from lightrft.strategy.calls import Call
from lightrft.strategy.compose import with_recording
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.record import Strategy

__all__ = ["get_fake_strategy"]


def get_fake_strategy(config: object = None, *, calls: MutableSequence[Call] | None = None) -> Strategy:
    """Return a strategy for tests of a training loop, which needs no launcher, no device and no engine.

    It is no mock: it trains, steps, checkpoints and generates as "single" does. Without a config its engine is
    "scripted", which gives out prepared completions.

    Args:
        config: what `get_strategy` takes; None takes the defaults.
        calls: every call is appended to it before it is made; see `Call`. It holds words about tensors and models,
            not references to them.

    Raises:
        ConfigError: a setting is wrong.
        UnsupportedError: the launcher started several processes.

    Example:
        >>> calls = []
        >>> strategy = get_fake_strategy(calls=calls)
        >>> strategy.is_rank_0()
        True
        >>> [call.name for call in calls]
        ['is_rank_0']
    """
    settings = StrategyConfig.from_args({"engine_type": "scripted"} if config is None else config)
    strategy = get_strategy(attrs.evolve(settings, strategy="fake"))
    return strategy if calls is None else with_recording(strategy, calls)
