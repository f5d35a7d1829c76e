"""The moving average of a model's parameters."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from lightrft.backends.copying import await_copy
from lightrft.backends.training.autocast import unwrap_autocast
from lightrft.errors import ConfigError

__all__ = ["Alike", "average_parameters", "moving_average"]


class Alike(Protocol):
    """Brings two parameters together whose parts may lie differently."""

    def __call__(self, parameter: torch.Tensor, average: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both as plain tensors of one shape; the second one is the average's own memory.

        Args:
            parameter: of the model.
            average: of the average.
        """
        ...


def _as_they_are(parameter: torch.Tensor, average: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return parameter, average


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
    average_parameters(unwrap_autocast(model), unwrap_autocast(model_ema), beta)


@torch.no_grad()
def average_parameters(model: nn.Module, model_ema: nn.Module, beta: float, *, alike: Alike = _as_they_are) -> None:
    """Move `model_ema` towards the model; see `MovingAverage`.

    Args:
        model: without a wrapper.
        model_ema: without a wrapper.
        beta: share that stays.
        alike: brings a parameter and its average together.

    Raises:
        ConfigError: beta is out of range, or the models' parameters differ in name or shape.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta={beta!r} is out of range; use a number in [0, 1].")
    parameters, averages = dict(model.named_parameters()), dict(model_ema.named_parameters())
    different = sorted(parameters.keys() ^ averages.keys()) or [
        name for name, parameter in parameters.items() if parameter.shape != averages[name].shape
    ]
    if different:
        raise ConfigError(
            f"model_ema={type(model_ema).__name__} differs from the model in {different[0]!r} and "
            f"{len(different) - 1} other parameters; pass copy.deepcopy(model)."
        )
    await_copy(model_ema)
    for name, whole in averages.items():
        parameter, average = alike(parameters[name], whole)
        # lerp is exact at both ends: beta=1 leaves the average alone and beta=0 copies
        average.lerp_(parameter.to(device=average.device, dtype=average.dtype), 1.0 - beta)
