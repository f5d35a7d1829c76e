"""The tensors of a model that an engine runs: whole ones under plain names, averages, and their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.copying import await_copy
from lightrft.backends.launch import device_of_process
from lightrft.backends.training.memory import move_handles
from lightrft.backends.training.parameters import named_tensors as named_whole_tensors
from lightrft.backends.training.zero.engine import unwrap_engine
from lightrft.backends.zero.model import EngineModel
from lightrft.backends.zero.package import Engine
from lightrft.backends.zero.shards import (
    cut,
    forget_second_copy,
    gathered,
    is_partitioned,
    is_whole_too,
    shard_of,
    whole_shape,
)
from lightrft.errors import ConfigError

__all__ = ["moving_average", "named_tensors", "offload", "reload"]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, full tensor) for every parameter and persistent buffer; in stage 3 all ranks gather them.

    See `NamedTensors`.

    Args:
        model: the prepared model.
    """
    module = unwrap_engine(model)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    kept: dict[nn.Parameter, torch.Tensor] = {}
    tied = _tied(parameters)
    for name, value in named_whole_tensors(module):
        parameter = parameters.get(name)
        if parameter is None or not is_partitioned(parameter):
            yield name, value
        elif parameter in kept:
            yield name, kept[parameter]
        else:
            whole = gathered(parameter)
            if parameter in tied:
                kept[parameter] = whole
            yield name, whole


def _tied(parameters: dict[str, nn.Parameter]) -> set[nn.Parameter]:
    seen: set[nn.Parameter] = set()
    again: set[nn.Parameter] = set()
    for parameter in parameters.values():
        (again if parameter in seen else seen).add(parameter)
    return again


@torch.no_grad()
def moving_average(model: nn.Module, model_ema: nn.Module, beta: float = 0.992) -> None:
    """Move `model_ema` towards the model, each of them spread over ranks or not; see `MovingAverage`.

    Args:
        model: the prepared model.
        model_ema: the average.
        beta: share that stays.

    Raises:
        ConfigError: beta is out of range, or the models' parameters differ in name or shape.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta={beta!r} is out of range; use a number in [0, 1].")
    parameters = dict(unwrap_engine(model).named_parameters())
    averages = dict(unwrap_engine(model_ema).named_parameters())
    different = sorted(parameters.keys() ^ averages.keys()) or [
        name for name, parameter in parameters.items() if whole_shape(parameter) != whole_shape(averages[name])
    ]
    if different:
        raise ConfigError(
            f"model_ema={type(model_ema).__name__} differs from the model in {different[0]!r} and "
            f"{len(different) - 1} other parameters; pass copy.deepcopy(model)."
        )
    await_copy(model_ema)
    for name, live in averages.items():
        parameter, average = _alike(parameters[name], live)
        # lerp is exact at both ends: beta=1 leaves the average alone and beta=0 copies
        average.lerp_(parameter.to(device=average.device, dtype=average.dtype), 1.0 - beta)
        forget_second_copy(live)
        if is_whole_too(live):
            shard_of(live).copy_(cut(live.detach(), live))


def _alike(parameter: torch.Tensor, average: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not is_partitioned(average) or is_whole_too(average):
        return gathered(parameter), average
    if is_partitioned(parameter):
        return shard_of(parameter), shard_of(average)
    return cut(parameter.detach(), average), shard_of(average)


def offload(*handles: nn.Module | Optimizer) -> None:
    """Move models and optimizers to main memory; the state of an optimizer that steps shards goes with its model.

    Args:
        handles: as prepared.
    """
    _move(handles, "cpu", _offload_engine)


def reload(*handles: nn.Module | Optimizer) -> None:
    """Move models and optimizers back.

    Args:
        handles: what `offload` was given.
    """
    _move(handles, device_of_process(), _reload_engine)


def _offload_engine(engine: Engine) -> None:
    engine.offload_states(pin_memory=False)


def _reload_engine(engine: Engine) -> None:
    engine.reload_states()


def _move(handles: tuple[nn.Module | Optimizer, ...], device: str, move_engine: Callable[[Engine], None]) -> None:
    await_copy(*handles)
    if device_of_process() == "cpu":
        return
    for handle in handles:
        if not isinstance(handle, EngineModel):
            move_handles((handle,), device)
            continue
        engine = cast("Engine", handle.engine)
        if engine.zero_optimization_stage():
            move_engine(engine)
        else:
            move_handles((engine.module,), device)
