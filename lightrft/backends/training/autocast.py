"""Compute in bfloat16 over float32 parameters."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["AutocastModel", "unwrap_autocast", "wrap_autocast"]


class AutocastModel(nn.Module):
    """A model whose forward runs under autocast to bfloat16; everything else is the model's own.

    Attributes that it lacks are looked up in the model. Its output keeps the dtype that autocast gives it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return what the model returns for these arguments."""
        device_type = next((parameter.device.type for parameter in self.module.parameters()), "cpu")
        with torch.autocast(device_type, dtype=torch.bfloat16):
            return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        """Return an attribute of the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found: torch.Tensor | nn.Module = getattr(super().__getattr__("module"), name)
            return found


def wrap_autocast(model: nn.Module) -> nn.Module:
    """Return the model under autocast; one that is already stays as it is.

    Args:
        model: plain or wrapped.
    """
    return model if isinstance(model, AutocastModel) else AutocastModel(model)


def unwrap_autocast(model: nn.Module) -> nn.Module:
    """Return the plain model inside; a plain model is returned as it is.

    Args:
        model: plain or wrapped.
    """
    return model.module if isinstance(model, AutocastModel) else model
