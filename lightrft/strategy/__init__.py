"""What a training loop imports: `get_strategy`, its configuration, its contracts.

Importing it loads neither torch nor any backend; building a strategy loads the one that was chosen.
"""

from lightrft.strategy.background import background_saves
from lightrft.strategy.build import get_strategy
from lightrft.strategy.calls import Call
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.fake import get_fake_strategy
from lightrft.strategy.protocols import (
    BackgroundSaves,
    Checkpointing,
    Collectives,
    Completion,
    EngineHandle,
    Image,
    Prompt,
    Rollout,
    SamplingParams,
    StepResult,
    StrategyProtocol,
    Trainable,
    Training,
    Video,
    World,
)
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import ENGINES, STRATEGIES, registered_engines, registered_strategies

__all__ = [
    "ENGINES",
    "STRATEGIES",
    "BackgroundSaves",
    "Call",
    "Checkpointing",
    "Collectives",
    "Completion",
    "EngineHandle",
    "Image",
    "Prompt",
    "Rollout",
    "SamplingParams",
    "StepResult",
    "Strategy",
    "StrategyConfig",
    "StrategyProtocol",
    "Trainable",
    "Training",
    "Video",
    "World",
    "background_saves",
    "get_fake_strategy",
    "get_strategy",
    "registered_engines",
    "registered_strategies",
]
