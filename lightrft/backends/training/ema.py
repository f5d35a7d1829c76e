"""The moving average of a model's parameters."""

from __future__ import annotations

import torch
from torch import nn

from lightrft.backends.training.autocast import unwrap_autocast
from lightrft.errors import ConfigError

__all__ = ["moving_average"]


@torch.no_grad()
def _move(average: nn.Parameter, parameter: nn.Parameter, beta: float) -> None:
    # lerp is exact at both ends: beta=1 leaves the average alone and beta=0 copies
    average.lerp_(parameter.to(device=average.device, dtype=average.dtype), 1.0 - beta)


def moving_average(model: nn.Module, model_ema: nn.Module, beta: float = 0.992) -> None:
    """Move `model_ema` towards the model; see `MovingAverage`.

    Example:
        >>> model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0), average.weight.fill_(0.0)
        >>> moving_average(model, average, beta=0.75)
        >>> average.weight.item()
        0.25
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta={beta!r} is out of range; use a number in [0, 1].")
    parameters = dict(unwrap_autocast(model).named_parameters())
    averages = dict(unwrap_autocast(model_ema).named_parameters())
    different = sorted(parameters.keys() ^ averages.keys()) or [
        name for name, parameter in parameters.items() if parameter.shape != averages[name].shape
    ]
    if different:
        raise ConfigError(
            f"model_ema={type(model_ema).__name__} differs from the model in {different[0]!r} and "
            f"{len(different) - 1} other parameters; pass copy.deepcopy(model)."
        )
    for name, average in averages.items():
        _move(average, parameters[name], beta)
