"""Models that a DeepSpeed engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.zero.package import Engine

__all__ = ["REACHED_BELOW", "EngineModel", "engine_inside", "is_own_optimizer"]


REACHED_BELOW = 1_000_003
"""What `EngineModel.reached` is below: a prime whose square a double holds exactly."""


class EngineModel(nn.Module):
    """A model that a DeepSpeed engine runs; everything but its forward pass is the model's own."""

    def __init__(self, engine: nn.Module, *, bf16: bool, stepped: Sequence[Sequence[str]]) -> None:
        """Wrap an engine.

        Args:
            engine: a `DeepSpeedEngine`.
            bf16: whether the forward pass is under autocast to bfloat16.
            stepped: names of the parameters of each of the optimizer's groups, which holds shards instead; none for a
                model that is not trained.
        """
        super().__init__()
        self.engine = engine
        self.bf16 = bf16
        self.stepped = stepped
        # which parameters the backward passes of the window have reached, and in what order, as one number (stage 2)
        self.reached = 0
        self.training: bool = cast("Engine", engine).module.training

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return what the model returns for these arguments."""
        with self._precision():
            return self.engine(*args, **kwargs)

    def _precision(self) -> AbstractContextManager[object]:
        if not self.bf16:
            return nullcontext()
        device_type = next((parameter.device.type for parameter in self.engine.parameters()), "cpu")
        # a cache would keep the rounded weights of layers whose weights were given up
        return torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False)

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        """Return an attribute of the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            engine = cast("Engine", super().__getattr__("engine"))
            found: torch.Tensor | nn.Module = getattr(engine.module, name)
            return found


def engine_inside(model: nn.Module) -> Engine | None:
    """Return the engine of a prepared model, or None where there is none.

    Args:
        model: prepared or plain.
    """
    return cast("Engine", model.engine) if isinstance(model, EngineModel) else None


def is_own_optimizer(engine: Engine, optimizer: Optimizer) -> bool:
    """Return whether an engine of stage 1, 2 or 3 steps by the options of this optimizer.

    Args:
        engine: of a model that is trained.
        optimizer: as the user has it.
    """
    own = engine.optimizer.optimizer.param_groups
    return any(group is options for group in own for options in optimizer.param_groups)
