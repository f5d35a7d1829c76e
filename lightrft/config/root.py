"""The root of a run's configuration."""

from __future__ import annotations

import attrs

from lightrft.config.sections import AlgorithmConfig, CheckpointConfig, DataConfig, EngineConfig, ModelConfig, RunConfig
from lightrft.config.strategy import StrategyConfig

__all__ = ["Config"]


@attrs.frozen(kw_only=True)
class Config:
    """All settings of a run: one record per concern, each a table of the TOML file.

    Attributes:
        strategy: how the model is trained on the machine's processes.
        engine: how completions are made.
        algorithm: how completions and rewards become a loss.
        data: where prompts come from and who scores the answers.
        model: the model that is trained.
        checkpoint: when checkpoints are written and how many stay.
        run: how long the run is and where it is kept.
    """

    strategy: StrategyConfig = attrs.field(factory=StrategyConfig)
    engine: EngineConfig = attrs.field(factory=EngineConfig)
    algorithm: AlgorithmConfig = attrs.field(factory=AlgorithmConfig)
    data: DataConfig = attrs.field(factory=DataConfig)
    model: ModelConfig = attrs.field(factory=ModelConfig)
    checkpoint: CheckpointConfig = attrs.field(factory=CheckpointConfig)
    run: RunConfig = attrs.field(factory=RunConfig)
