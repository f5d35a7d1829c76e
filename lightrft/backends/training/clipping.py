"""The global norm of a gradient: measured, clipped, and found not finite."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lightrft.errors import StepError

__all__ = ["NO_GRADIENT", "clip_gradients", "norm_of_gradients", "not_finite_reason", "reason_of"]

NO_GRADIENT = "optimizer has no parameter with a gradient, so the loss does not depend on it; pass the model's own."
"""What is said where there is nothing to step with."""

_HALF = (torch.bfloat16, torch.float16)


def clip_gradients(optimizer: Optimizer, max_norm: float) -> float:
    """Return the global L2 norm of the gradient of all parameters, which is scaled down to `max_norm` if it is larger.

    The norm is read on the host once. A norm that is not finite is returned as it is, and the gradient is left alone.

    Args:
        optimizer: its parameters are those of the model that are trained.
        max_norm: bound on the norm; 0 means none.

    Raises:
        StepError: no parameter has a gradient.

    Reference: Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, algorithm 1.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise StepError(NO_GRADIENT)
    total = norm_of_gradients(gradients)
    norm = total.item()
    if norm == math.inf:  # the sum of squares may have overflowed, and a large gradient is still a gradient
        total = norm_of_gradients(gradients, is_large=True)
        norm = total.item()
    if 0 < max_norm < norm < math.inf:
        clip_grads_with_norm_(parameters, max_norm, total)
    return norm


def norm_of_gradients(gradients: list[torch.Tensor], *, is_large: bool = False) -> torch.Tensor:
    """Return the L2 norm of all gradients together, 0-d.

    Args:
        gradients: whole tensors, or the parts of them that are here.
        is_large: in double precision, for those whose sum of squares is more than their dtype holds.
    """
    if is_large:
        return _norm_of_norms([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
    if not any(gradient.dtype in _HALF for gradient in gradients):
        return get_total_norm(gradients)
    wide = (torch.float32 if gradient.dtype in _HALF else None for gradient in gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient, dtype in zip(gradients, wide, strict=True)]
    return _norm_of_norms(norms)


def _norm_of_norms(norms: list[torch.Tensor]) -> torch.Tensor:
    if not norms:  # a rank may hold no part of any gradient
        return torch.zeros(())
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total


def not_finite_reason(norm: float, model: nn.Module, optimizer: Optimizer) -> str:
    """Return why a gradient is refused, with the name of the first parameter that is at fault.

    Args:
        norm: the global norm, not finite.
        model: names the parameters.
        optimizer: holds those that are trained.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if id(parameter) in trained and gradient is not None and not gradient.isfinite().all():
            return reason_of(norm, name)
    return reason_of(norm, None)


def reason_of(norm: float, name: str | None) -> str:
    """Return why a gradient is refused, in words.

    Args:
        norm: the global norm, not finite.
        name: of the parameter that is at fault; None if it is not known.
    """
    blame = "" if name is None else f": the gradient of {name!r} is at fault"
    return f"grad_norm={norm} is not finite{blame}; the step was skipped."
