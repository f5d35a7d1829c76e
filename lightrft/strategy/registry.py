"""What can be chosen: read-only dicts from a key to a builder. A builder imports its backend when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from lightrft.config.sections import EngineConfig
from lightrft.errors import ConfigError, nearest
from lightrft.strategy.assemble import assemble
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.entry_points import ENGINE_GROUP, STRATEGY_GROUP, load_builder, read_entry_points
from lightrft.strategy.protocols.rollout import BuildEngine, Engine
from lightrft.strategy.protocols.strategy import BuildStrategy
from lightrft.strategy.record import Strategy

if TYPE_CHECKING:
    from lightrft.backends.checkpointing.access import StateAccess
    from lightrft.strategy.protocols.collectives import Collectives
    from lightrft.strategy.protocols.training import Training

__all__ = [
    "ENGINES",
    "STRATEGIES",
    "find_engine",
    "find_strategy",
    "registered_engines",
    "registered_strategies",
]


def _build_single(config: StrategyConfig) -> Strategy:
    from lightrft.backends.checkpointing.canonical import build_checkpointing
    from lightrft.backends.checkpointing.live import build_live_access
    from lightrft.backends.collectives.single import build_collectives
    from lightrft.backends.rollout.serving import build_rollout
    from lightrft.backends.training.single import build_training

    collectives = build_collectives(config)
    training = build_training(config)
    return assemble(
        collectives=collectives,
        training=training,
        checkpointing=build_checkpointing(
            collectives=collectives, access=build_live_access(training.unwrap_model), strategy="single"
        ),
        rollout=build_rollout(
            config,
            collectives,
            find_engine=find_engine,
            named_tensors=training.named_tensors,
            unwrap_model=training.unwrap_model,
        ),
        capabilities=frozenset({"bf16"}),
    )


def _build_fsdp2(config: StrategyConfig) -> Strategy:
    from lightrft.backends.checkpointing.live import build_live_access
    from lightrft.backends.collectives.torch_dist import build_collectives
    from lightrft.backends.training.fsdp2 import build_training

    collectives = build_collectives(config)
    training = build_training(config, collectives)
    return _on_ranks(config, "fsdp2", collectives, training, build_live_access(training.unwrap_model))


def _build_deepspeed(config: StrategyConfig) -> Strategy:
    from lightrft.backends.zero.package import require_deepspeed

    require_deepspeed()
    from lightrft.backends.checkpointing.access_deepspeed import build_access
    from lightrft.backends.collectives.torch_dist import build_collectives
    from lightrft.backends.training.deepspeed import build_training

    collectives = build_collectives(config)
    training = build_training(config, collectives)
    return _on_ranks(config, "deepspeed", collectives, training, build_access(training.unwrap_model))


def _on_ranks(
    config: StrategyConfig, key: str, collectives: Collectives, training: Training, access: StateAccess
) -> Strategy:
    """Return the strategy of ranks that each generate their part, with its own way to train and to reach its state."""
    from lightrft.backends.checkpointing.canonical import build_checkpointing
    from lightrft.backends.rollout.serving import build_rollout

    return assemble(
        collectives=collectives,
        training=training,
        checkpointing=build_checkpointing(collectives=collectives, access=access, strategy=key),
        rollout=build_rollout(
            config,
            collectives,
            find_engine=find_engine,
            named_tensors=training.named_tensors,
            unwrap_model=training.unwrap_model,
        ),
        capabilities=frozenset({"bf16", "ranks"}),
    )


def _require_no_url(config: EngineConfig) -> None:
    if config.url:
        raise ConfigError(f"url={config.url!r} is of a server and the engine {config.type!r} has none; use 'sglang'.")


def _build_hf(config: EngineConfig) -> Engine:
    _require_no_url(config)
    from lightrft.backends.rollout.hf.engine import build_hf

    return build_hf(config)


def _build_vllm(config: EngineConfig) -> Engine:
    _require_no_url(config)
    from lightrft.backends.rollout.vllm.package import require_vllm

    require_vllm()
    from lightrft.backends.rollout.vllm.engine import build_vllm

    return build_vllm(config)


def _build_sglang(config: EngineConfig) -> Engine:
    if config.url:
        from lightrft.backends.rollout.sglang.server import build_sglang_server

        return build_sglang_server(config)
    from lightrft.backends.rollout.sglang.package import require_sglang

    require_sglang()
    from lightrft.backends.rollout.sglang.engine import build_sglang

    return build_sglang(config)


def _build_scripted(config: EngineConfig) -> Engine:
    _require_no_url(config)
    from lightrft.backends.rollout.scripted import build_scripted

    return build_scripted(config)


STRATEGIES: Mapping[str, BuildStrategy] = MappingProxyType(
    {
        "single": _build_single,
        # the same as "single": `get_fake_strategy` adds the record of calls
        "fake": _build_single,
        "fsdp2": _build_fsdp2,
        "deepspeed": _build_deepspeed,
    }
)
"""Our own strategies. For one of yours pass `registry={**STRATEGIES, "mine": build_mine}` to `get_strategy`."""

ENGINES: Mapping[str, BuildEngine] = MappingProxyType(
    {"hf": _build_hf, "vllm": _build_vllm, "sglang": _build_sglang, "scripted": _build_scripted}
)
"""Our own rollout engines. For one of yours pass `engines={**ENGINES, "mine": build_mine}` to `get_strategy`."""


def registered_strategies() -> Mapping[str, BuildStrategy]:
    """Return our own strategies and those of installed packages (entry points of the group `lightrft.strategies`).

    Raises:
        ConfigError: two of them have one name.
    """
    points = read_entry_points(STRATEGY_GROUP, STRATEGIES)
    return MappingProxyType({**STRATEGIES, **{name: _strategy_of(point) for name, point in points.items()}})


def registered_engines() -> Mapping[str, BuildEngine]:
    """Return our own engines and those of installed packages (entry points of the group `lightrft.engines`).

    Raises:
        ConfigError: two of them have one name.
    """
    points = read_entry_points(ENGINE_GROUP, ENGINES)
    return MappingProxyType({**ENGINES, **{name: _engine_of(point) for name, point in points.items()}})


def find_strategy(key: str, strategies: Mapping[str, BuildStrategy] | None = None) -> BuildStrategy:
    """Return the builder of a strategy.

    Args:
        key: its name.
        strategies: where to look; None means `registered_strategies()`.

    Raises:
        ConfigError: there is none of this name; the known ones are listed.
    """
    known = registered_strategies() if strategies is None else strategies
    if key not in known:
        raise ConfigError(f"strategy={key!r} is not registered; {nearest(key, known)}.")
    return known[key]


def find_engine(key: str, engines: Mapping[str, BuildEngine] | None = None) -> BuildEngine:
    """Return the builder of an engine.

    Args:
        key: its name.
        engines: where to look; None means `registered_engines()`.

    Raises:
        ConfigError: there is none of this name; the known ones are listed.
    """
    known = registered_engines() if engines is None else engines
    if key not in known:
        raise ConfigError(f"engine_type={key!r} is not registered; {nearest(key, known)}.")
    return known[key]


def _strategy_of(point: EntryPoint) -> BuildStrategy:
    def build(config: StrategyConfig) -> Strategy:
        return cast("BuildStrategy", load_builder(point))(config)

    return build


def _engine_of(point: EntryPoint) -> BuildEngine:
    def build(config: EngineConfig) -> Engine:
        return cast("BuildEngine", load_builder(point))(config)

    # an engine in a process of its own is built there by the function itself
    build.__module__, build.__qualname__ = point.module, point.attr
    return build
