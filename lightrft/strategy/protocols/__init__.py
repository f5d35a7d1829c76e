"""Contracts and laws, one module per concern; a loop asks for the least it needs."""

from lightrft.strategy.protocols.capabilities import CAPABILITIES, Capabilities, Capability
from lightrft.strategy.protocols.checkpointing import (
    BackgroundSaves,
    Checkpointable,
    Checkpointing,
    Json,
    LoadedCheckpoint,
)
from lightrft.strategy.protocols.collectives import Collectives, ReduceOp, TensorTree, World
from lightrft.strategy.protocols.images import Image, Processor, Video, VideoProcessor
from lightrft.strategy.protocols.rollout import (
    BuildEngine,
    Completion,
    Engine,
    EngineHandle,
    EngineProtocol,
    EngineSource,
    Prompt,
    Rollout,
    SamplingParams,
    SyncReport,
    Tokenizer,
)
from lightrft.strategy.protocols.strategy import BuildStrategy, StrategyProtocol
from lightrft.strategy.protocols.training import MemoryReport, StepResult, Trainable, Training

__all__ = [
    "CAPABILITIES",
    "BackgroundSaves",
    "BuildEngine",
    "BuildStrategy",
    "Capabilities",
    "Capability",
    "Checkpointable",
    "Checkpointing",
    "Collectives",
    "Completion",
    "Engine",
    "EngineHandle",
    "EngineProtocol",
    "EngineSource",
    "Image",
    "Json",
    "LoadedCheckpoint",
    "MemoryReport",
    "Processor",
    "Prompt",
    "ReduceOp",
    "Rollout",
    "SamplingParams",
    "StepResult",
    "StrategyProtocol",
    "SyncReport",
    "TensorTree",
    "Tokenizer",
    "Trainable",
    "Training",
    "Video",
    "VideoProcessor",
    "World",
]
