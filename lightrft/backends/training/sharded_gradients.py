"""The gradients of a sharded model at the end of a window: those of all ranks, their norm, and the fault in them.

Shards of gradients are summed by the backward pass itself. What is left is one all-reduce a window: of the norm, and of
which parameters any rank reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from lightrft.backends.training.clipping import NO_GRADIENT, norm_of_gradients, reason_of
from lightrft.backends.training.sharding import Sharding, require_sharding
from lightrft.errors import StepError

__all__ = ["clip_shards", "explain_shards", "forget_reached"]


def clip_shards(model: nn.Module, optimizer: Optimizer, max_norm: float) -> float:
    """Return the global norm of the gradient, which is bounded; see `ClipGradients`.

    Afterwards gradients of parameters that are whole on every rank are sums over ranks, as those of shards are already.

    Args:
        model: sharded.
        optimizer: holds the parameters that are trained.
        max_norm: bound on the norm; 0 means none.

    Raises:
        StepError: no rank has a gradient.
    """
    sharding, (shards, whole) = require_sharding(model), _trained(model, optimizer)
    norm = _agree(sharding, shards, whole)
    if 0 < max_norm < norm < math.inf:
        total = torch.tensor(norm, dtype=torch.float64)  # large gradients have a norm that float32 has not
        for parameters in (shards, whole):  # of which torch takes no mixture
            clip_grads_with_norm_(parameters.values(), max_norm, total)
    return norm


def forget_reached(model: nn.Module, optimizer: Optimizer) -> None:
    """Begin a window in which no rank has reached what an optimizer trains.

    Args:
        model: sharded.
        optimizer: holds the parameters that are trained.
    """
    sharding = require_sharding(model)
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    if sharding.reached:
        sharding.reached.difference_update(sharding.names.get(parameter, "") for parameter in trained)


def _trained(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return what an optimizer trains by name, in one order on all ranks: shards, and what is whole on every rank."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained: list[nn.Parameter] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    named = {names.get(parameter, f"number {place}"): parameter for place, parameter in enumerate(trained)}
    sharded = {name for name, parameter in named.items() if isinstance(parameter, DTensor)}
    shards = {name: parameter for name, parameter in named.items() if name in sharded}
    return shards, {name: parameter for name, parameter in named.items() if name not in sharded}


def _agree(sharding: Sharding, shards: Mapping[str, nn.Parameter], whole: Mapping[str, nn.Parameter]) -> float:
    """Return the global norm, and let a parameter have a gradient if any rank reached it, and else none."""
    reached = [name in sharding.reached or _is_nonzero(parameter) for name, parameter in shards.items()]
    sharding.reached.difference_update(shards)
    reached += [parameter.grad is not None for parameter in whole.values()]
    # what is whole on every rank has no dims or no elements, so it can travel with the rest
    wide = [_gradient_or_zero(parameter).reshape(-1) for parameter in whole.values()]
    total = _sum_of_ranks(sharding, _square(sharding, _gradients(shards)), _flags(reached, sharding), *wide)
    square, *counts = total[: 1 + len(reached)].tolist()
    if not any(counts):
        raise StepError(NO_GRADIENT)
    summed = torch.split(total[1 + len(reached) :], [gradient.numel() for gradient in wide])
    for parameter, gradient in zip(whole.values(), summed, strict=True):
        parameter.grad = gradient.reshape(parameter.shape).to(parameter)
    for parameter, count in zip([*shards.values(), *whole.values()], counts, strict=True):
        if not count:
            parameter.grad = None
    if math.isinf(square):  # the sum of squares may have overflowed, and a large gradient is still a gradient
        square = _sum_of_ranks(sharding, _square(sharding, _gradients(shards), is_large=True)).item()
    return math.sqrt(square + sum(gradient.double().square().sum().item() for gradient in _gradients(whole)))


def _is_nonzero(parameter: nn.Parameter) -> bool:
    # what a checkpoint has brought back nobody has reached in this process
    return any(bool(gradient.any()) for gradient in _gradients({"": parameter}))


def _gradient_or_zero(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _square(sharding: Sharding, gradients: list[torch.Tensor], *, is_large: bool = False) -> torch.Tensor:
    """Return this rank's share of the squared norm, (1,); shards that several ranks hold are shared among them."""
    square = torch.zeros(1, dtype=torch.float64, device=sharding.mesh.device_type)
    if gradients:
        copies = sharding.mesh.size() // sharding.mesh.size(-1)
        square += norm_of_gradients(gradients, is_large=is_large).to(square) ** 2 / copies
    return square


def _gradients(parameters: Mapping[str, nn.Parameter]) -> list[torch.Tensor]:
    """Return what this rank holds of each gradient."""
    gradients = (parameter.grad for parameter in parameters.values())
    return [
        gradient.to_local() if isinstance(gradient, DTensor) else gradient
        for gradient in gradients
        if gradient is not None
    ]


def _flags(flags: Sequence[bool], sharding: Sharding) -> torch.Tensor:
    return torch.tensor(flags, dtype=torch.float64, device=sharding.mesh.device_type)


def _sum_of_ranks(sharding: Sharding, *parts: torch.Tensor) -> torch.Tensor:
    total = torch.cat([part.to(dtype=torch.float64, device=sharding.mesh.device_type) for part in parts])
    dist.all_reduce(total)
    return total


def explain_shards(norm: float, model: nn.Module, optimizer: Optimizer) -> str:
    """Return why a gradient is refused, with the name of the first parameter that is at fault on any rank.

    Args:
        norm: the global norm, not finite.
        model: names the parameters.
        optimizer: holds those that are trained.
    """
    shards, whole = _trained(model, optimizer)
    named = {**shards, **whole}
    sharding = require_sharding(model)
    flags = _flags([_is_faulty(parameter) for parameter in named.values()], sharding)
    faults: list[float] = _sum_of_ranks(sharding, flags).tolist()
    return reason_of(norm, next((name for name, fault in zip(named, faults, strict=True) if fault), None))


def _is_faulty(parameter: nn.Parameter) -> bool:
    return not all(bool(gradient.isfinite().all()) for gradient in _gradients({"": parameter}))
