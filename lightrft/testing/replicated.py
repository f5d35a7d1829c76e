"""A data-parallel strategy over any collectives: every rank holds the whole model.

It is the plainest strategy that obeys the laws on n ranks, and it takes whatever collectives it is given. Over those of
`run_simulated` it needs no process but this one, and is what laws about ranks are tried on; it is correct, not fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from lightrft.backends.checkpointing.canonical import build_checkpointing
from lightrft.backends.collectives import simulated, torch_dist
from lightrft.backends.collectives.streams import capture_streams, restore_streams
from lightrft.backends.rollout.serving import RolloutFunctions, build_rollout
from lightrft.backends.training.dataloader import build_setup_dataloader
from lightrft.backends.training.prepare import (
    build_prepare,
    build_prepare_models_and_optimizers,
    build_prepare_reward_model,
)
from lightrft.backends.training.record import TrainingFunctions
from lightrft.backends.training.single import build_training
from lightrft.backends.training.step import ReduceGradients, build_optimizer_step
from lightrft.errors import ConfigError, UnsupportedError
from lightrft.strategy.assemble import assemble
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import Collectives, World
from lightrft.strategy.protocols.rollout import Completion, EngineHandle, GatherAndGenerate, Prompt, SamplingParams
from lightrft.strategy.protocols.training import OptimizerStep, SetupDataloader, StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import find_engine

__all__ = ["build_gloo", "build_replicated", "build_simulated"]

_Sample = TypeVar("_Sample")


def build_gloo(config: StrategyConfig) -> Strategy:
    """Return the replicated strategy of processes, over torch.distributed.

    Args:
        config: all of its settings.

    Example:
        >>> strategy = build_gloo(StrategyConfig())
        >>> strategy.all_reduce(2, "sum")
        2
        >>> strategy.teardown()
    """
    return build_replicated(config, torch_dist.build_collectives(config))


def build_simulated(config: StrategyConfig) -> Strategy:
    """Return the replicated strategy of the ranks of `lightrft.backends.collectives.simulated.run_simulated`.

    Args:
        config: all of its settings.

    Example:
        >>> from lightrft.backends.collectives.simulated import run_simulated
        >>> strategy = build_simulated(StrategyConfig())
        >>> run_simulated(2, lambda rank: strategy.all_reduce(rank, "sum"))
        [1, 1]
    """
    return build_replicated(config, simulated.build_collectives(config))


def build_replicated(config: StrategyConfig, collectives: Collectives) -> Strategy:
    """Return a strategy whose ranks all hold the whole model, and sum their gradients when a window is complete.

    A step is the same for any partition of the window's samples over ranks and micro-batches: a `weight` is the
    micro-batch's share of the window of all ranks.

    Args:
        config: all of its settings.
        collectives: what the ranks do together.
    """
    training = _build_training(config, collectives)
    rollout = build_rollout(
        config, find_engine=find_engine, named_tensors=training.named_tensors, unwrap_model=training.unwrap_model
    )
    return assemble(
        collectives=collectives,
        training=training,
        checkpointing=build_checkpointing(collectives=collectives, unwrap_model=training.unwrap_model),
        rollout=attrs.evolve(rollout, gather_and_generate=_build_gather_and_generate(collectives, rollout)),
        capabilities=frozenset({"bf16", "ranks"}),
    )


def _build_training(config: StrategyConfig, collectives: Collectives) -> TrainingFunctions:
    # its `backward` weighs a micro-batch by its share of the whole window, which is what ranks add up
    single = build_training(config)

    def place_model(model: nn.Module) -> nn.Module:
        return _replicate(collectives, single.prepare(model))

    def place_trainable(trainable: Trainable) -> Trainable:
        prepared = single.prepare(trainable)
        return prepared._replace(model=_replicate(collectives, prepared.model))

    prepare = build_prepare(place_model, place_trainable)
    return attrs.evolve(
        single,
        prepare=prepare,
        prepare_models_and_optimizers=build_prepare_models_and_optimizers(
            config, create_optimizer=single.create_optimizer, prepare=prepare
        ),
        prepare_reward_model=build_prepare_reward_model(place_model),
        optimizer_step=_build_optimizer_step(config, collectives),
        setup_dataloader=_build_setup_dataloader(config, collectives),
    )


@torch.no_grad()
def _replicate(collectives: Collectives, model: nn.Module) -> nn.Module:
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in collectives.broadcast(tensors).items():
        tensors[name].copy_(value)
    return model


def _world(collectives: Collectives) -> World:
    # asked in the middle of a run, perhaps after the user's own seeding, which must stand
    streams = capture_streams()
    world = collectives.setup_distributed()
    restore_streams(streams)
    return world


def _build_optimizer_step(config: StrategyConfig, collectives: Collectives) -> OptimizerStep:
    reduce_gradients = _build_reduce_gradients(collectives)

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        # only now, because building must not ask for the world; a caller who says where windows end needs no count
        steps = _steps_of_rank(config, _world(collectives).world_size) if is_boundary is None else 1
        step = build_optimizer_step(
            max_norm=config.max_norm, accumulation_steps=steps, reduce_gradients=reduce_gradients
        )
        return step(optimizer, model, scheduler, is_boundary=is_boundary)

    return optimizer_step


def _steps_of_rank(config: StrategyConfig, world_size: int) -> int:
    at_once = config.micro_train_batch_size * world_size
    if config.train_batch_size % at_once:
        low = config.train_batch_size // at_once * at_once
        raise ConfigError(
            f"train_batch_size={config.train_batch_size} is not divisible by micro_train_batch_size"
            f"({config.micro_train_batch_size}) * world_size({world_size}) = {at_once}; "
            f"use {f'{low} or ' if low else ''}{low + at_once}."
        )
    return config.train_batch_size // at_once


def _build_reduce_gradients(collectives: Collectives) -> ReduceGradients:
    def reduce_gradients(model: nn.Module, optimizer: Optimizer) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained: list[nn.Parameter] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        named = {names.get(id(parameter), f"number {place}"): parameter for place, parameter in enumerate(trained)}
        # a parameter that the samples of a rank did not reach counts as zero there, and has none if none reached it
        gradients = {name: _gradient_or_zero(parameter) for name, parameter in named.items()}
        holders = {name: torch.tensor(parameter.grad is not None).long() for name, parameter in named.items()}
        total = collectives.all_reduce({"gradients": gradients, "holders": holders}, "sum")
        for name, parameter in named.items():
            parameter.grad = total["gradients"][name] if total["holders"][name] else None

    return reduce_gradients


def _gradient_or_zero(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _build_setup_dataloader(config: StrategyConfig, collectives: Collectives) -> SetupDataloader:
    def setup_dataloader(
        dataset: Dataset[_Sample],
        batch_size: int,
        *,
        shuffle: bool = True,
        collate_fn: Callable[[list[_Sample]], object] | None = None,
        drop_last: bool = True,
    ) -> DataLoader[_Sample]:
        world = _world(collectives)
        setup = build_setup_dataloader(seed=config.seed, rank=world.rank, world_size=world.world_size)
        return setup(dataset, batch_size, shuffle=shuffle, collate_fn=collate_fn, drop_last=drop_last)

    return setup_dataloader


def _build_gather_and_generate(collectives: Collectives, rollout: RolloutFunctions) -> GatherAndGenerate:
    def gather_and_generate(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        gathered, before = _gathered(collectives, prompts)
        # a draw is by the place of a prompt among all of them, so every rank makes all completions and keeps its own
        completions = rollout.engine_generate_local(engine, gathered, sampling)
        return completions[before * sampling.n : (before + len(prompts)) * sampling.n]

    return gather_and_generate


def _gathered(collectives: Collectives, prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    """Return the prompts of all ranks in rank order, and how many come before this rank's own."""
    message = {
        "num_prompts": torch.tensor(len(prompts)),
        "num_images": torch.tensor(sum(len(prompt.images) for prompt in prompts)),
        "lengths": torch.tensor([len(prompt.token_ids) for prompt in prompts], dtype=torch.int64),
        "token_ids": torch.tensor([token for prompt in prompts for token in prompt.token_ids], dtype=torch.int64),
    }
    every = collectives.all_gather(message)
    if every["num_images"].any():
        rank = int(every["num_images"].nonzero()[0])
        raise UnsupportedError(f"prompts of rank {rank} have images, which are not gathered; leave them out.")
    token_ids = iter(every["token_ids"].tolist())
    gathered = [Prompt(token_ids=tuple(islice(token_ids, length))) for length in every["lengths"].tolist()]
    return gathered, int(every["num_prompts"][: collectives.get_rank()].sum())
