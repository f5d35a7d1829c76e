"""Typed configuration: frozen records that are checked while they are built, read from TOML and written to it."""

from __future__ import annotations

from lightrft.config.dump import as_mapping, config_digest, to_json, to_toml
from lightrft.config.load import apply_overrides, from_mapping, from_toml, load_config
from lightrft.config.root import Config
from lightrft.config.sections import AlgorithmConfig, CheckpointConfig, DataConfig, EngineConfig, ModelConfig, RunConfig
from lightrft.config.strategy import StrategyConfig

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "RunConfig",
    "StrategyConfig",
    "apply_overrides",
    "as_mapping",
    "config_digest",
    "from_mapping",
    "from_toml",
    "load_config",
    "to_json",
    "to_toml",
]
