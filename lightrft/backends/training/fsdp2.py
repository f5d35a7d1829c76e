"""Parameters, gradients and optimizer state spread over ranks by torch's `fully_shard`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.launch import device_of_process
from lightrft.backends.training.dataloader import build_setup_dataloader_of_ranks
from lightrft.backends.training.memory import move_handles, report_memory
from lightrft.backends.training.meta_init import parameters_on_meta
from lightrft.backends.training.optimizer import create_adamw_of_shards
from lightrft.backends.training.prepare import (
    build_prepare,
    build_prepare_models_and_optimizers,
    build_prepare_reward_model,
)
from lightrft.backends.training.ranks import steps_of_rank
from lightrft.backends.training.record import TrainingFunctions
from lightrft.backends.training.sharded_gradients import clip_shards, explain_shards, forget_reached
from lightrft.backends.training.sharded_tensors import moving_average, named_tensors, point_to_shards
from lightrft.backends.training.sharding import gather_less, put_off_sums, require_sharding, shard_model
from lightrft.backends.training.step import build_backward, build_optimizer_step
from lightrft.backends.training.window import begins_window
from lightrft.backends.world import world_of
from lightrft.errors import UnsupportedError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.training import Backward, OptimizerStep, Reload, StepResult, Trainable

__all__ = ["build_training"]

_NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "Rprop")
"""Optimizers that look at whole tensors, or that torch has not for shards."""


def build_training(config: StrategyConfig, collectives: Collectives) -> TrainingFunctions:
    """Return the training functions of ranks that share parameters, gradients and optimizer state.

    With `bf16` the layers compute in bfloat16 throughout, with parameters that are rounded when they are gathered;
    gradients are summed in float32, and parameters stay as they are. Under "single" autocast chooses operator by
    operator, so norms and the residual stream are float32 there.

    Args:
        config: all of its settings but those of engines are used.
        collectives: what the ranks do together, over torch.distributed.
    """

    def place_model(model: nn.Module) -> nn.Module:
        shard_model(model, config, collectives, world_of(collectives))
        return model

    def place_trainable(trainable: Trainable) -> Trainable:
        _refuse_whole_tensors(trainable.optimizer)
        gather_less(trainable.model)  # where it is sharded already, its names are those of shards
        names = {parameter: name for name, parameter in trainable.model.named_parameters()}
        placed = trainable._replace(model=place_model(trainable.model))
        point_to_shards(trainable.optimizer, names, placed.model)
        return placed

    prepare = build_prepare(place_model, place_trainable)
    return TrainingFunctions(
        create_optimizer=create_adamw_of_shards,
        init_model_context=_init_model_context,
        prepare=prepare,
        prepare_models_and_optimizers=build_prepare_models_and_optimizers(
            config, create_optimizer=create_adamw_of_shards, prepare=prepare
        ),
        prepare_reward_model=build_prepare_reward_model(place_model),
        backward=_build_backward(config),
        optimizer_step=_build_optimizer_step(config),
        named_tensors=named_tensors,
        unwrap_model=_unwrap_model,
        moving_average=moving_average,
        setup_dataloader=build_setup_dataloader_of_ranks(collectives, seed=config.seed),
        offload=_offload,
        reload=_build_reload(config),
        report_memory=report_memory,
    )


def _refuse_whole_tensors(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if name in _NOT_ELEMENTWISE:
        raise UnsupportedError(f"optimizer={name} looks at whole tensors and steps shards here; use AdamW.")


def _init_model_context(*, meta_init: bool = False) -> AbstractContextManager[None]:
    return parameters_on_meta() if meta_init else nullcontext()


def _unwrap_model(model: nn.Module) -> nn.Module:
    gather_less(model)  # who looks at the parameters sees shards, whatever was computed before
    return model


def _build_backward(config: StrategyConfig) -> Backward:
    run = build_backward(
        equal_share=config.micro_train_batch_size / config.train_batch_size,
        set_gradient_sync=_set_gradient_sync if config.fsdp_sum_once else None,
    )

    def backward(
        loss: Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        if begins_window(optimizer):  # a checkpoint may have been loaded in the middle of the last one
            forget_reached(model, optimizer)
        run(loss, model, optimizer, weight=weight, is_boundary=is_boundary)

    return backward


def _set_gradient_sync(model: nn.Module, sync: bool) -> None:
    put_off_sums(model, is_put_off=not sync)


def _build_optimizer_step(config: StrategyConfig) -> OptimizerStep:
    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        world_size = require_sharding(model).mesh.size()
        gather_less(model)
        step = build_optimizer_step(
            max_norm=config.max_norm,
            # a caller who says where windows end needs no count
            accumulation_steps=steps_of_rank(config, world_size) if is_boundary is None else 1,
            clip=clip_shards,
            explain=explain_shards,
        )
        with implicit_replication():  # what is whole on every rank is stepped together with shards
            return step(optimizer, model, scheduler, is_boundary=is_boundary)

    return optimizer_step


def _offload(*handles: nn.Module | Optimizer) -> None:
    _move(handles, "cpu")


def _build_reload(config: StrategyConfig) -> Reload:
    def reload(*handles: nn.Module | Optimizer) -> None:
        if not config.fsdp_cpu_offload:  # else their place is the host
            _move(handles, device_of_process())

    return reload


def _move(handles: tuple[nn.Module | Optimizer, ...], device: str) -> None:
    for handle in handles:
        if isinstance(handle, nn.Module):
            gather_less(handle)
    move_handles(handles, device)
