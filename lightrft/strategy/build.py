"""From settings to a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import attrs

from lightrft.config.root import Config
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.rollout import BuildEngine
from lightrft.strategy.protocols.strategy import BuildStrategy
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import find_engine, find_strategy

__all__ = ["chosen_key", "get_strategy", "strategy_config"]


def get_strategy(
    args: object,
    *,
    registry: Mapping[str, BuildStrategy] | None = None,
    engines: Mapping[str, BuildEngine] | None = None,
) -> Strategy:
    """Return the strategy that the settings choose.

    Laws: the same settings give interchangeable strategies; nothing is started (no process group, no device), and no
    backend is imported that was not chosen.

    Args:
        args: an `argparse.Namespace`, any object with attributes, a mapping, a `StrategyConfig`, or the `Config` of a
            whole run, whose section `strategy` is taken.
        registry: strategies by key; None means `registered_strategies()`.
        engines: rollout engines by key; None means `registered_engines()`.

    Raises:
        ConfigError: a setting is wrong, or nothing is registered under the key.
        UnsupportedError: the strategy cannot work under these settings.
        MissingPackageError: a package behind the strategy is not installed.

    Example:
        >>> strategy = get_strategy({"strategy": "single", "seed": 7})
        >>> strategy.setup_distributed().world_size
        1
        >>> strategy.teardown()
    """
    config = strategy_config(args)
    strategy = find_strategy(chosen_key(config), registry)(config)
    return strategy if engines is None else _with_engines(strategy, config, engines)


def strategy_config(args: object) -> StrategyConfig:
    """Return the settings of a strategy in whatever `get_strategy` takes.

    Args:
        args: see `get_strategy`.

    Raises:
        ConfigError: a setting is wrong.
    """
    if isinstance(args, Config):
        return args.strategy
    if isinstance(args, Mapping):
        given = cast("Mapping[str, object]", args)
        # `vars` of a config is a mapping of settings too, with `args` as the memory of where it came from
        return StrategyConfig.from_mapping({name: value for name, value in given.items() if name != "args"})
    return StrategyConfig.from_args(args)


def chosen_key(config: StrategyConfig) -> str:
    """Return the registry key that the settings choose: `strategy`, or "fsdp2" if `fsdp`, or "deepspeed".

    Args:
        config: the settings.

    Example:
        >>> chosen_key(StrategyConfig(fsdp=True))
        'fsdp2'
    """
    return config.strategy or ("fsdp2" if config.fsdp else "deepspeed")


def _with_engines(strategy: Strategy, config: StrategyConfig, engines: Mapping[str, BuildEngine]) -> Strategy:
    from lightrft.backends.rollout.serving import build_setup_inference_engine

    def find(key: str, /) -> BuildEngine:
        return find_engine(key, engines)

    setup = build_setup_inference_engine(
        config, strategy, find_engine=find, named_tensors=strategy.named_tensors, unwrap_model=strategy.unwrap_model
    )
    return attrs.evolve(strategy, setup_inference_engine=setup)
