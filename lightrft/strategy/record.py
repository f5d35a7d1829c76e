"""The record behind `StrategyProtocol`."""

from __future__ import annotations

import attrs

from lightrft.strategy.protocols.capabilities import Capabilities
from lightrft.strategy.protocols.checkpointing import LatestCkpt, LoadCkpt, LoadModel, SaveCkpt, SaveModel
from lightrft.strategy.protocols.collectives import (
    AllGather,
    AllReduce,
    Barrier,
    Broadcast,
    GetRank,
    IsRank0,
    Print,
    SetupDistributed,
    Teardown,
)
from lightrft.strategy.protocols.rollout import (
    EngineGenerateLocal,
    GatherAndGenerate,
    MaybeSleepInferenceEngine,
    SetupInferenceEngine,
    UpdateEngineWeights,
    WakeupInferenceEngine,
)
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

__all__ = ["FUNCTIONS", "Strategy"]


@attrs.frozen(kw_only=True, eq=False)
class Strategy:
    """What one strategy can do, and its functions, flat; the contract of each stands on its callback protocol.

    A strategy holds no state: what changes lives in the models, optimizers and engines that are passed in. Change a
    field with `attrs.evolve`, or with the transforms of `lightrft.strategy.compose`.
    """

    capabilities: Capabilities
    # collectives
    setup_distributed: SetupDistributed
    teardown: Teardown
    all_reduce: AllReduce
    all_gather: AllGather
    broadcast: Broadcast
    barrier: Barrier
    get_rank: GetRank
    is_rank_0: IsRank0
    print: Print
    # training
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
    # checkpointing
    save_ckpt: SaveCkpt
    load_ckpt: LoadCkpt
    latest_ckpt: LatestCkpt
    save_model: SaveModel
    load_model: LoadModel
    # rollout
    setup_inference_engine: SetupInferenceEngine
    engine_generate_local: EngineGenerateLocal
    gather_and_generate: GatherAndGenerate
    update_engine_weights: UpdateEngineWeights
    maybe_sleep_inference_engine: MaybeSleepInferenceEngine
    wakeup_inference_engine: WakeupInferenceEngine


FUNCTIONS = tuple(field.name for field in attrs.fields(Strategy) if field.name != "capabilities")
"""Names of the fields that are functions."""
