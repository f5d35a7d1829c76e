"""A data-parallel strategy over any collectives: every rank holds the whole model.

It is the plainest strategy that obeys the laws on n ranks, and it takes whatever collectives it is given. Over those of
`run_simulated` it needs no process but this one, and is what laws about ranks are tried on; it is correct, not fast.
"""

from __future__ import annotations

import attrs
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.checkpointing.canonical import build_checkpointing
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.collectives import simulated, torch_dist
from lightrft.backends.rollout.serving import build_rollout
from lightrft.backends.training.dataloader import build_setup_dataloader_of_ranks
from lightrft.backends.training.prepare import (
    build_prepare,
    build_prepare_models_and_optimizers,
    build_prepare_reward_model,
)
from lightrft.backends.training.ranks import broadcast_model, steps_of_rank, sum_gradients
from lightrft.backends.training.record import TrainingFunctions
from lightrft.backends.training.single import build_training
from lightrft.backends.training.step import ReduceGradients, build_optimizer_step
from lightrft.backends.world import world_of
from lightrft.strategy.assemble import assemble
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.training import OptimizerStep, StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.strategy.registry import find_engine

__all__ = ["build_gloo", "build_replicated", "build_simulated"]


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
    return assemble(
        collectives=collectives,
        training=training,
        checkpointing=build_checkpointing(collectives=collectives, access=build_live_access(training.unwrap_model)),
        rollout=build_rollout(
            config,
            collectives,
            find_engine=find_engine,
            named_tensors=training.named_tensors,
            unwrap_model=training.unwrap_model,
        ),
        capabilities=frozenset({"bf16", "ranks"}),
    )


def _build_training(config: StrategyConfig, collectives: Collectives) -> TrainingFunctions:
    # its `backward` weighs a micro-batch by its share of the whole window, which is what ranks add up
    single = build_training(config)

    def place_model(model: nn.Module) -> nn.Module:
        prepared = single.prepare(model)
        broadcast_model(collectives, prepared)
        return prepared

    def place_trainable(trainable: Trainable) -> Trainable:
        prepared = single.prepare(trainable)
        broadcast_model(collectives, prepared.model)
        return prepared

    prepare = build_prepare(place_model, place_trainable)
    return attrs.evolve(
        single,
        prepare=prepare,
        prepare_models_and_optimizers=build_prepare_models_and_optimizers(
            config, create_optimizer=single.create_optimizer, prepare=prepare
        ),
        prepare_reward_model=build_prepare_reward_model(place_model),
        optimizer_step=_build_optimizer_step(config, collectives),
        setup_dataloader=build_setup_dataloader_of_ranks(collectives, seed=config.seed),
    )


def _build_optimizer_step(config: StrategyConfig, collectives: Collectives) -> OptimizerStep:
    reduce_gradients = _build_reduce_gradients(collectives)

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        # only now, because building must not ask for the world; a caller who says where windows end needs no count
        steps = steps_of_rank(config, world_of(collectives).world_size) if is_boundary is None else 1
        step = build_optimizer_step(
            max_norm=config.max_norm, accumulation_steps=steps, reduce_gradients=reduce_gradients
        )
        return step(optimizer, model, scheduler, is_boundary=is_boundary)

    return optimizer_step


def _build_reduce_gradients(collectives: Collectives) -> ReduceGradients:
    def reduce_gradients(model: nn.Module, optimizer: Optimizer) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained: list[nn.Parameter] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        named = {names.get(id(parameter), f"number {place}"): parameter for place, parameter in enumerate(trained)}
        sum_gradients(collectives, named)

    return reduce_gradients
