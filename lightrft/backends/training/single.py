"""One process that holds whole models: the reference that every other backend is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.optim import Optimizer

from lightrft.backends.launch import device_of_process
from lightrft.backends.training.autocast import unwrap_autocast, wrap_autocast
from lightrft.backends.training.dataloader import build_setup_dataloader
from lightrft.backends.training.ema import moving_average
from lightrft.backends.training.memory import move_handles, report_memory
from lightrft.backends.training.optimizer import create_adamw
from lightrft.backends.training.parameters import named_tensors
from lightrft.backends.training.prepare import (
    build_prepare,
    build_prepare_models_and_optimizers,
    build_prepare_reward_model,
)
from lightrft.backends.training.record import TrainingFunctions
from lightrft.backends.training.step import build_backward, build_optimizer_step
from lightrft.backends.training.wrapping import refuse_layer_settings
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import Trainable

__all__ = ["build_training"]


def build_training(config: StrategyConfig) -> TrainingFunctions:
    """Return the training functions of one process.

    Args:
        config: all of its settings but those of engines and collectives are used.

    Raises:
        UnsupportedError: a setting that it would pass over is switched on.
    """
    refuse_layer_settings(config, "single")
    accumulation_steps = config.train_batch_size // config.micro_train_batch_size

    def place_model(model: nn.Module) -> nn.Module:
        placed = model.to(device_of_process())
        return wrap_autocast(placed) if config.bf16 else placed

    def place_trainable(trainable: Trainable) -> Trainable:
        placed = trainable._replace(model=place_model(trainable.model))
        move_handles((trainable.optimizer,), device_of_process())
        return placed

    prepare = build_prepare(place_model, place_trainable)
    return TrainingFunctions(
        create_optimizer=create_adamw,
        init_model_context=_init_model_context,
        prepare=prepare,
        prepare_models_and_optimizers=build_prepare_models_and_optimizers(
            config, create_optimizer=create_adamw, prepare=prepare
        ),
        prepare_reward_model=build_prepare_reward_model(place_model),
        backward=build_backward(equal_share=config.micro_train_batch_size / config.train_batch_size),
        optimizer_step=build_optimizer_step(max_norm=config.max_norm, accumulation_steps=accumulation_steps),
        named_tensors=named_tensors,
        unwrap_model=unwrap_autocast,
        moving_average=moving_average,
        setup_dataloader=build_setup_dataloader(seed=config.seed, rank=0, world_size=1),
        offload=_offload,
        reload=_reload,
        report_memory=report_memory,
    )


def _init_model_context(*, meta_init: bool = False) -> AbstractContextManager[None]:
    # one process holds every weight anyway, so a model for weights that are loaded later is built like any other;
    # on the host, so that the same seed gives the same weights on every device
    del meta_init
    return nullcontext()


def _offload(*handles: nn.Module | Optimizer) -> None:
    move_handles(handles, "cpu")


def _reload(*handles: nn.Module | Optimizer) -> None:
    move_handles(handles, device_of_process())
