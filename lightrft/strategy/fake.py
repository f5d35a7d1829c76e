"""The strategy for tests: it does everything that "single" does, and writes down what was asked of it."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence

import attrs

from lightrft.config.root import Config
from lightrft.strategy.build import get_strategy, strategy_config
from lightrft.strategy.calls import Call
from lightrft.strategy.compose import with_recording
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.record import Strategy

__all__ = ["get_fake_strategy"]


def get_fake_strategy(config: object = None, *, calls: MutableSequence[Call] | None = None) -> Strategy:
    """Return a strategy for tests of a training loop, which needs no launcher, no device and no engine.

    It is no mock: it trains, steps, checkpoints and generates as "single" does. Its engine is "scripted", which gives
    out prepared completions, unless the config names one; a `StrategyConfig` always does.

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
    settings = StrategyConfig() if config is None else strategy_config(config)
    engine_type = settings.engine_type if _names_engine(config) else "scripted"
    strategy = get_strategy(attrs.evolve(settings, strategy="fake", engine_type=engine_type))
    return strategy if calls is None else with_recording(strategy, calls)


def _names_engine(config: object) -> bool:
    if isinstance(config, Mapping):
        return "engine_type" in config
    return isinstance(config, Config) or hasattr(config, "engine_type")
