"""The record behind the protocol `Training`, which every backend of this folder returns."""

from __future__ import annotations

import attrs

from lightrft.strategy.protocols.training import (
    Backward,
    CreateOptimizer,
    InitModelContext,
    MovingAverage,
    NamedTensors,
    Offload,
    OptimizerStep,
    Prepare,
    PrepareModelsAndOptimizers,
    PrepareRewardModel,
    Reload,
    ReportMemory,
    SetupDataloader,
    UnwrapModel,
)

__all__ = ["TrainingFunctions"]


@attrs.frozen(kw_only=True, eq=False)
class TrainingFunctions:
    """What a backend does to models and optimizers; each field's contract stands on its callback protocol."""

    create_optimizer: CreateOptimizer
    init_model_context: InitModelContext
    prepare: Prepare
    prepare_models_and_optimizers: PrepareModelsAndOptimizers
    prepare_reward_model: PrepareRewardModel
    backward: Backward
    optimizer_step: OptimizerStep
    named_tensors: NamedTensors
    unwrap_model: UnwrapModel
    moving_average: MovingAverage
    setup_dataloader: SetupDataloader
    offload: Offload
    reload: Reload
    report_memory: ReportMemory
