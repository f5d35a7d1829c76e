"""Backward and optimizer step, for gradients that autograd puts on the parameters."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.backends.copying import await_copy
from lightrft.backends.training.clipping import clip_gradients, not_finite_reason
from lightrft.backends.training.window import end_micro_batch, mark_backward
from lightrft.errors import StepError
from lightrft.strategy.protocols.training import Backward, OptimizerStep, StepResult

__all__ = [
    "ClipGradients",
    "ExplainGradients",
    "ReduceGradients",
    "RunBackward",
    "SetGradientSync",
    "build_backward",
    "build_optimizer_step",
]


class ReduceGradients(Protocol):
    """Makes the gradients of a complete window those of all ranks."""

    def __call__(self, model: nn.Module, optimizer: Optimizer, /) -> None:
        """Replace each gradient by its sum over ranks, of the same bits on all of them.

        Args:
            model: names the parameters.
            optimizer: holds those that are trained.
        """
        ...


class ClipGradients(Protocol):
    """Bounds the global norm of a complete window's gradient."""

    def __call__(self, model: nn.Module, optimizer: Optimizer, max_norm: float, /) -> float:
        """Return the norm before clipping, the same on all ranks; a gradient that is not finite is left alone.

        Args:
            model: names the parameters.
            optimizer: holds those that are trained.
            max_norm: bound on the norm; 0 means none.

        Raises:
            StepError: no parameter has a gradient.
        """
        ...


class ExplainGradients(Protocol):
    """Says what is wrong with a gradient."""

    def __call__(self, norm: float, model: nn.Module, optimizer: Optimizer, /) -> str:
        """Return why the step is skipped, in the same words on all ranks.

        Args:
            norm: the global norm, not finite.
            model: names the parameters.
            optimizer: holds those that are trained.
        """
        ...


class SetGradientSync(Protocol):
    """Says whether the next backward exchanges gradients with the other ranks, or keeps its sum for a later one."""

    def __call__(self, model: nn.Module, sync: bool, /) -> None:
        """Set it, for a model whose gradients are exchanged inside of backward.

        Args:
            model: the prepared model.
            sync: False where more micro-batches of the window certainly follow.
        """
        ...


class RunBackward(Protocol):
    """Runs the backward pass."""

    def __call__(self, loss: torch.Tensor, model: nn.Module, /) -> None:
        """Add the gradient of a loss to what the model has.

        Args:
            loss: 0-d, weighed.
            model: the prepared model.
        """
        ...


def _run_backward(loss: torch.Tensor, model: nn.Module) -> None:
    del model
    loss.backward()  # type: ignore[no-untyped-call]  # so in torch


def build_backward(
    *,
    equal_share: float,
    set_gradient_sync: SetGradientSync | None = None,
    run_backward: RunBackward = _run_backward,
) -> Backward:
    """Return the function that adds a micro-batch's gradient to the window.

    Args:
        equal_share: weight of a micro-batch that comes without: 1 over the micro-batches of a window on all ranks.
        set_gradient_sync: called before each backward; None where backward exchanges nothing.
        run_backward: runs the backward pass of the weighed loss.
    """

    def backward(
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        share = equal_share if weight is None else weight
        if loss.dim() or not loss.requires_grad:
            raise StepError(_loss_problem(loss))
        if not math.isfinite(share):
            raise StepError(f"weight={weight!r} is not finite; pass the micro-batch's share of the window.")
        if set_gradient_sync is not None:
            set_gradient_sync(model, is_boundary is not False)
        run_backward(loss if share == 1.0 else loss * share, model)
        mark_backward(optimizer, is_boundary=is_boundary)

    return backward


def _loss_problem(loss: torch.Tensor) -> str:
    if loss.dim():
        return f"loss has shape {tuple(loss.shape)} and must be 0-d; pass its mean over the micro-batch."
    return "loss asks for no gradient; compute it from the model's output, outside torch.no_grad()."


def _clip_whole(model: nn.Module, optimizer: Optimizer, max_norm: float) -> float:
    del model
    return clip_gradients(optimizer, max_norm)


def build_optimizer_step(
    *,
    max_norm: float,
    accumulation_steps: int,
    reduce_gradients: ReduceGradients | None = None,
    clip: ClipGradients = _clip_whole,
    explain: ExplainGradients = not_finite_reason,
) -> OptimizerStep:
    """Return the function that ends a micro-batch, and the window when it is complete.

    Args:
        max_norm: bound on the global gradient norm; 0 means none.
        accumulation_steps: micro-batches of a window.
        reduce_gradients: called once a window, before its norm is taken; None where one rank has the whole gradient.
        clip: takes the norm of the gradient and bounds it.
        explain: says why a gradient whose norm is not finite is refused.
    """

    def optimizer_step(
        optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        learning_rate = float(optimizer.param_groups[0]["lr"])
        if not end_micro_batch(optimizer, steps=accumulation_steps, is_boundary=is_boundary):
            return StepResult(stepped=False, grad_norm=None, learning_rate=learning_rate, skipped_reason=None)
        if reduce_gradients is not None:
            reduce_gradients(model, optimizer)
        norm = clip(model, optimizer, max_norm)
        reason = None if math.isfinite(norm) else explain(norm, model, optimizer)
        if reason is None:
            await_copy(optimizer, model)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return StepResult(stepped=reason is None, grad_norm=norm, learning_rate=learning_rate, skipped_reason=reason)

    return optimizer_step
