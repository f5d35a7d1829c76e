"""Gradients, optimizer state and parameters spread over ranks by DeepSpeed's ZeRO, stages 0 to 3."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.launch import device_of_process
from lightrft.backends.plain_model import keep_structure
from lightrft.backends.training.autocast import wrap_autocast
from lightrft.backends.training.dataloader import build_setup_dataloader_of_ranks
from lightrft.backends.training.memory import report_memory
from lightrft.backends.training.meta_init import parameters_on_meta
from lightrft.backends.training.optimizer import create_adamw
from lightrft.backends.training.prepare import (
    build_prepare,
    build_prepare_models_and_optimizers,
    build_prepare_reward_model,
)
from lightrft.backends.training.ranks import broadcast_model, steps_of_rank
from lightrft.backends.training.record import TrainingFunctions
from lightrft.backends.training.step import build_backward
from lightrft.backends.training.window import end_micro_batch
from lightrft.backends.training.wrapping import refuse_layer_settings
from lightrft.backends.training.zero.engine import build_engine, has_elements, unwrap_engine
from lightrft.backends.training.zero.gradients import run_backward, step_window
from lightrft.backends.training.zero.partitioning import broadcast_buffers, partition_model
from lightrft.backends.training.zero.settings import clips_itself, zero_settings
from lightrft.backends.training.zero.tensors import moving_average, named_tensors, offload, reload
from lightrft.backends.world import world_of
from lightrft.backends.zero.model import EngineModel, is_own_optimizer
from lightrft.backends.zero.package import Engine
from lightrft.backends.zero.shards import is_partitioned
from lightrft.errors import ConfigError, UnsupportedError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.training import CreateOptimizer, InitModelContext, OptimizerStep, StepResult, Trainable

__all__ = ["build_training"]


def build_training(config: StrategyConfig, collectives: Collectives) -> TrainingFunctions:
    """Return the training functions of ranks that share what the ZeRO stage says.

    Parameters, gradients, their sums and the optimizer's state are float32 in every stage. With `bf16` the forward
    pass is under the same autocast as under "single", so results differ by the order of summation alone. All ranks'
    losses must reach the same parameters in stages 2 and 3, where gradients are exchanged as they come: a step checks
    it, and ranks whose tensors have different sizes end in a torch error before that. A parameter that no sample of a
    window reaches is stepped with a gradient of zero, so decay and momentum move it.

    Args:
        config: all of its settings but those of engines are used.
        collectives: what the ranks do together, over torch.distributed.

    Raises:
        UnsupportedError: a setting that it would pass over is switched on.
    """
    refuse_layer_settings(config, "deepspeed")
    _refuse_idle_settings(config)

    def place_model(model: nn.Module) -> nn.Module:
        return _placed(config, collectives, model, None)

    def place_trainable(trainable: Trainable) -> Trainable:
        return trainable._replace(model=_placed(config, collectives, trainable.model, trainable.optimizer))

    prepare = build_prepare(place_model, place_trainable)
    create_optimizer = _build_create_optimizer(config)
    return TrainingFunctions(
        create_optimizer=create_optimizer,
        init_model_context=_build_init_model_context(config),
        prepare=prepare,
        prepare_models_and_optimizers=build_prepare_models_and_optimizers(
            config, create_optimizer=create_optimizer, prepare=prepare
        ),
        prepare_reward_model=build_prepare_reward_model(place_model),
        backward=build_backward(
            equal_share=config.micro_train_batch_size / config.train_batch_size, run_backward=run_backward
        ),
        optimizer_step=_build_optimizer_step(config, collectives),
        named_tensors=named_tensors,
        unwrap_model=unwrap_engine,
        moving_average=moving_average,
        setup_dataloader=build_setup_dataloader_of_ranks(collectives, seed=config.seed),
        offload=offload,
        reload=reload,
        report_memory=report_memory,
    )


def _refuse_idle_settings(config: StrategyConfig) -> None:
    idle = [
        name
        for name, is_set, least in (
            ("zero_hpz", config.zero_hpz > 1, 3),
            ("zero_offload_param", config.zero_offload_param, 3),
            ("zero_offload_optimizer", config.zero_offload_optimizer, 1),
        )
        if is_set and config.zero_stage < least
    ]
    if idle:
        raise UnsupportedError(
            f"{idle[0]}={getattr(config, idle[0])!r} does nothing in zero_stage={config.zero_stage}; leave it out, or "
            "use zero_stage=3."
        )


def _build_create_optimizer(config: StrategyConfig) -> CreateOptimizer:
    def create_optimizer(
        model: nn.Module,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> Optimizer:
        optimizer = create_adamw(model, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        if config.zero_stage and device_of_process() == "cpu":
            # the fused kernel of a CPU rounds by the place in a tensor, and in a shard an element has another one
            for options in (optimizer.defaults, *optimizer.param_groups):
                options["fused"] = False
        return optimizer

    return create_optimizer


def _placed(
    config: StrategyConfig, collectives: Collectives, model: nn.Module, optimizer: Optimizer | None
) -> nn.Module:
    if isinstance(model, EngineModel):
        _require_own_optimizer(model, optimizer)
        return model
    world, device = world_of(collectives), device_of_process()
    # where there is nothing to step there is nothing to spread either
    is_idle = optimizer is not None and not any(has_elements(group["params"]) for group in optimizer.param_groups)
    stage = 0 if is_idle else config.zero_stage
    if optimizer is None and stage < 3:
        broadcast_model(collectives, model.to(device))
        return wrap_autocast(model) if config.bf16 else model
    _require_trainable(model, optimizer, stage=stage)
    _require_own_parameters(model, stage=stage)
    if stage == 3 and world.world_size % config.zero_hpz:
        raise ConfigError(
            f"zero_hpz={config.zero_hpz} does not divide world_size({world.world_size}); use one of its divisors."
        )
    settings = zero_settings(
        config,
        stage=stage,
        num_elements=sum(parameter.numel() for parameter in model.parameters()),
        world_size=world.world_size,
        on_cpu=device == "cpu",
        is_trained=optimizer is not None,
    )
    if stage == 3:
        keep_structure(model)
        partition_model(model, settings, device=device, optimizer=optimizer)
        broadcast_buffers(collectives, model)
    else:
        broadcast_model(collectives, model.to(device))
    return build_engine(model, settings, optimizer=optimizer, stage=stage, bf16=config.bf16)


def _require_own_optimizer(model: EngineModel, optimizer: Optimizer | None) -> None:
    engine = cast("Engine", model.engine)
    if optimizer is not None and engine.zero_optimization_stage() and not is_own_optimizer(engine, optimizer):
        raise ConfigError(
            f"optimizer={type(optimizer).__name__} is not the one that this model was prepared with; prepare a model "
            "and its optimizer together, once."
        )


def _require_own_parameters(model: nn.Module, *, stage: int) -> None:
    for name, parameter in model.named_parameters():
        if stage and (is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")):
            raise UnsupportedError(
                f"parameter {name!r} of {type(model).__name__} is that of another prepared model; give each its own "
                "parameters, prepare one module that holds both, or use zero_stage=0."
            )


def _require_trainable(model: nn.Module, optimizer: Optimizer | None, *, stage: int) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    for parameter in (parameter for group in groups for parameter in group["params"]):
        if id(parameter) not in names:
            raise ConfigError(
                f"optimizer={type(optimizer).__name__} holds a parameter of shape {tuple(parameter.shape)} that is "
                "none of the model's; make it of the model that is prepared with it."
            )
        if stage and parameter.dtype != torch.float32:
            raise UnsupportedError(
                f"zero_stage={stage} steps float32 parameters, and {names[id(parameter)]!r} is {parameter.dtype}; load "
                "the model in float32, and set bf16=True to compute in bfloat16."
            )


def _build_init_model_context(config: StrategyConfig) -> InitModelContext:
    def init_model_context(*, meta_init: bool = False) -> AbstractContextManager[None]:
        # in the other stages every rank holds the whole model anyway
        return parameters_on_meta() if meta_init and config.zero_stage == 3 else nullcontext()

    return init_model_context


def _build_optimizer_step(config: StrategyConfig, collectives: Collectives) -> OptimizerStep:
    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        learning_rate = float(optimizer.param_groups[0]["lr"])
        # only now, because building must not ask for the world; a caller who says where windows end needs no count
        steps = steps_of_rank(config, world_of(collectives).world_size) if is_boundary is None else 1
        if not end_micro_batch(optimizer, steps=steps, is_boundary=is_boundary):
            return StepResult(stepped=False, grad_norm=None, learning_rate=learning_rate, skipped_reason=None)
        is_native = clips_itself(config, stage=config.zero_stage, on_cpu=device_of_process() == "cpu")
        norm, reason = step_window(model, optimizer, max_norm=config.max_norm, clips_itself=is_native)
        if reason is None and scheduler is not None:
            scheduler.step()
        return StepResult(stepped=reason is None, grad_norm=norm, learning_rate=learning_rate, skipped_reason=reason)

    return optimizer_step
