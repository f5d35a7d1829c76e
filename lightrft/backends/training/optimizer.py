"""AdamW over the parameters that are trained."""

from __future__ import annotations

import torch
from torch import nn

from lightrft.backends.launch import device_of_process
from lightrft.backends.training.window import open_window
from lightrft.errors import ConfigError

__all__ = ["create_adamw", "create_adamw_of_shards"]


def create_adamw(
    model: nn.Module,
    *,
    lr: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Return fused AdamW; `CreateOptimizer` states its laws.

    Reference: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019. Fused, because on a CPU it takes a
    quarter of the time of the loop over parameters and a sixth of `foreach`.
    """
    return _adamw(model, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, is_fused=True)


def create_adamw_of_shards(
    model: nn.Module,
    *,
    lr: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Return AdamW that steps a shard by the bits by which it steps the whole; `CreateOptimizer` states its laws.

    On a CPU that is `foreach`: the fused kernel there rounds an element by where it lies in its tensor.
    """
    is_fused = device_of_process() != "cpu"
    return _adamw(model, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, is_fused=is_fused)


def _adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, eps: float, is_fused: bool
) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # a tied parameter comes once
    if not trained:
        raise ConfigError(
            f"model={type(model).__name__} has no parameter that asks for gradients; unfreeze some of them."
        )
    groups = _groups(trained, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=is_fused, foreach=not is_fused)
    open_window(optimizer)
    return optimizer


def _groups(trained: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    if not weight_decay:
        return [{"params": trained, "weight_decay": 0.0}]  # one group is one fused call fewer a step
    groups = [
        ([parameter for parameter in trained if parameter.dim() >= 2], weight_decay),
        ([parameter for parameter in trained if parameter.dim() < 2], 0.0),
    ]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
