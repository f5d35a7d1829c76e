"""What the ranks of a data-parallel backend share: the window, the first weights, and the sum of gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lightrft.errors import ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["broadcast_model", "steps_of_rank", "sum_gradients"]


def steps_of_rank(config: StrategyConfig, world_size: int) -> int:
    """Return how many micro-batches of a window each rank takes.

    Args:
        config: `train_batch_size` samples are a window of all ranks, `micro_train_batch_size` a micro-batch of one.
        world_size: number of ranks.

    Raises:
        ConfigError: the samples of a window are no whole number of micro-batches for each rank.

    Example:
        >>> steps_of_rank(StrategyConfig(train_batch_size=12, micro_train_batch_size=2), 3)
        2
    """
    at_once = config.micro_train_batch_size * world_size
    if config.train_batch_size % at_once:
        low = config.train_batch_size // at_once * at_once
        raise ConfigError(
            f"train_batch_size={config.train_batch_size} is not divisible by micro_train_batch_size"
            f"({config.micro_train_batch_size}) * world_size({world_size}) = {at_once}; "
            f"use {f'{low} or ' if low else ''}{low + at_once}."
        )
    return config.train_batch_size // at_once


@torch.no_grad()
def broadcast_model(collectives: Collectives, model: nn.Module) -> None:
    """Make parameters and buffers those of rank 0 on all ranks.

    Args:
        collectives: what the ranks do together.
        model: whole on every rank.
    """
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in collectives.broadcast(tensors).items():
        tensors[name].copy_(value)


def sum_gradients(collectives: Collectives, parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace each gradient by its sum over ranks.

    A parameter that the samples of a rank did not reach counts as zero there, and has no gradient if none reached it.

    Args:
        collectives: what the ranks do together.
        parameters: whole on every rank, under the same names.
    """
    gradients = {name: _gradient_or_zero(parameter) for name, parameter in parameters.items()}
    holders = {name: torch.tensor(parameter.grad is not None).long() for name, parameter in parameters.items()}
    total = collectives.all_reduce({"gradients": gradients, "holders": holders}, "sum")
    for name, parameter in parameters.items():
        parameter.grad = total["gradients"][name] if total["holders"][name] else None


def _gradient_or_zero(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
