"""Backward and optimizer step of a process that holds whole parameters and whole gradients."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.training.clipping import clip_gradients, not_finite_reason
from lightrft.backends.training.window import end_micro_batch, mark_backward
from lightrft.errors import StepError
from lightrft.strategy.protocols.training import Backward, OptimizerStep, StepResult

__all__ = ["ReduceGradients", "build_backward", "build_optimizer_step"]


class ReduceGradients(Protocol):
    """Makes the gradients of a complete window those of all ranks."""

    def __call__(self, model: nn.Module, optimizer: Optimizer, /) -> None:
        """Replace each gradient by its sum over ranks, of the same bits on all of them.

        Args:
            model: names the parameters.
            optimizer: holds those that are trained.
        """
        ...


def build_backward(*, accumulation_steps: int) -> Backward:
    """Return the function that adds a micro-batch's gradient to the window.

    Args:
        accumulation_steps: micro-batches of a window, which have equal shares unless told otherwise.
    """
    equal_share = 1.0 / accumulation_steps

    def backward(loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, *, weight: float | None = None) -> None:
        del model
        share = equal_share if weight is None else weight
        if loss.dim() or not loss.requires_grad:
            raise StepError(_loss_problem(loss))
        if not math.isfinite(share):
            raise StepError(f"weight={weight!r} is not finite; pass the micro-batch's share of the window.")
        (loss if share == 1.0 else loss * share).backward()  # type: ignore[no-untyped-call]  # so in torch
        mark_backward(optimizer)

    return backward


def _loss_problem(loss: torch.Tensor) -> str:
    if loss.dim():
        return f"loss has shape {tuple(loss.shape)} and must be 0-d; pass its mean over the micro-batch."
    return "loss asks for no gradient; compute it from the model's output, outside torch.no_grad()."


def build_optimizer_step(
    *, max_norm: float, accumulation_steps: int, reduce_gradients: ReduceGradients | None = None
) -> OptimizerStep:
    """Return the function that ends a micro-batch, and the window when it is complete.

    Args:
        max_norm: bound on the global gradient norm; 0 means none.
        accumulation_steps: micro-batches of a window.
        reduce_gradients: called once a window, before its norm is taken; None where one rank has the whole gradient.
    """

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        learning_rate = float(optimizer.param_groups[0]["lr"])
        if not end_micro_batch(optimizer, steps=accumulation_steps, is_boundary=is_boundary):
            return StepResult(stepped=False, grad_norm=None, learning_rate=learning_rate, skipped_reason=None)
        if reduce_gradients is not None:
            reduce_gradients(model, optimizer)
        norm = clip_gradients(optimizer, max_norm)
        reason = None if math.isfinite(norm) else not_finite_reason(norm, model, optimizer)
        if reason is None:
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return StepResult(stepped=reason is None, grad_norm=norm, learning_rate=learning_rate, skipped_reason=reason)

    return optimizer_step
