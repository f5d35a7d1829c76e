"""The tensors of a sharded model: whole ones under plain names, averages, and what an optimizer holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightrft.backends.training.ema import average_parameters
from lightrft.backends.training.sharding import gather_less
from lightrft.errors import UnsupportedError

__all__ = ["moving_average", "named_tensors", "point_to_shards"]


@torch.no_grad()
def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, full tensor) for every parameter and persistent buffer, which all ranks gather; see `NamedTensors`.

    Args:
        model: sharded, or any other one.
    """
    gather_less(model)
    shared = _shared_names(model)
    kept: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.rpartition(".")[2] == "_extra_state":  # that of a module is neither parameter nor buffer
            continue
        first = shared.get(name)
        if first is None:
            yield name, _whole(value)
            continue
        if first not in kept:
            kept[first] = _whole(value)
        yield name, kept[first]


def _shared_names(model: nn.Module) -> dict[str, str]:
    """Return the names of tied parameters, each with the first one of them."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {name: tied[0] for tied in names.values() if len(tied) > 1 for name in tied}


def _whole(value: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, DTensor):
        return value
    # shards that were offloaded are gathered where their ranks can meet
    return cast("DTensor", value.to(value.device_mesh.device_type)).full_tensor()


def moving_average(model: nn.Module, model_ema: nn.Module, beta: float = 0.992) -> None:
    """Move `model_ema` towards the model, each of them sharded or plain; see `MovingAverage`.

    Args:
        model: the prepared model.
        model_ema: the average.
        beta: share that stays.
    """
    gather_less(model)
    gather_less(model_ema)
    average_parameters(model, model_ema, beta, alike=_alike)


def _alike(parameter: torch.Tensor, average: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as plain tensors of this rank that hold the same part; the second one is the average's own memory."""
    if not isinstance(average, DTensor):
        return _whole(parameter), average
    if not isinstance(parameter, DTensor) or parameter.placements != average.placements:
        whole = _whole(parameter)
        parameter = distribute_tensor(whole, average.device_mesh, average.placements, src_data_rank=None)
    return parameter.to_local(), average.to_local()


def point_to_shards(optimizer: Optimizer, names: dict[nn.Parameter, str], model: nn.Module) -> None:
    """Let an optimizer of the plain model train the shards, with the state that it has; it stays the same object.

    Args:
        optimizer: made of the plain model.
        names: of the plain model's parameters, from before it was sharded.
        model: sharded.

    Raises:
        UnsupportedError: a parameter is none of the model's, or a state cannot be sharded as its parameter is.
    """
    shards = dict(model.named_parameters())
    for group in cast("list[dict[str, list[nn.Parameter]]]", optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter not in names:
                raise UnsupportedError(
                    f"optimizer={type(optimizer).__name__} holds a parameter of shape {tuple(parameter.shape)} that is "
                    "none of the model's; make it of the model that is prepared with it."
                )
            shard = shards[names[parameter]]
            group["params"][place] = shard
            if parameter in optimizer.state and parameter is not shard:
                state = cast("dict[str, object]", optimizer.state.pop(parameter))
                optimizer.state[shard] = {key: _like(value, parameter, shard) for key, value in state.items()}


def _like(value: object, parameter: nn.Parameter, shard: nn.Parameter) -> object:
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or not isinstance(shard, DTensor):
        return value
    if value.shape != parameter.shape:
        raise UnsupportedError(
            f"optimizer state of shape {tuple(value.shape)} belongs to a parameter of shape {tuple(parameter.shape)} "
            "and cannot be sharded as that is; prepare the optimizer before its first step."
        )
    return distribute_tensor(value, shard.device_mesh, shard.placements)
