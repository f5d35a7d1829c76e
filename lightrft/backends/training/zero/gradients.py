"""Gradients of an accumulation window under an engine: added up, bounded, stepped with or dropped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.copying import await_copy
from lightrft.backends.training.clipping import (
    NO_GRADIENT,
    clip_gradients,
    norm_of_gradients,
    not_finite_reason,
    reason_of,
)
from lightrft.backends.training.zero.engine import engine_of
from lightrft.backends.training.zero.partitioning import set_gathered
from lightrft.backends.zero.model import EngineModel, is_own_optimizer
from lightrft.backends.zero.package import Engine, ZeroOptimizer
from lightrft.backends.zero.shards import is_partitioned, whole_shape
from lightrft.errors import StepError

__all__ = ["run_backward", "step_window"]

_EPSILON = 1e-6
"""Added to the norm that a gradient is divided by, as torch does."""


def run_backward(loss: torch.Tensor, model: nn.Module) -> None:
    """Add the gradient of a loss; stages 2 and 3 average it over ranks at once, stages 0 and 1 when the window ends.

    Args:
        loss: 0-d, weighed.
        model: the prepared model.
    """
    engine = engine_of(model)
    if engine.zero_optimization_stage() == 3:
        # the buffer was cleared after the last step, and is added to, whatever passes forward came in between
        engine.optimizer.clear_backward_seen_flag()
        engine.optimizer.micro_step_id = 1
    # an engine averages over ranks, and what is wanted is the sum
    engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)


@torch.no_grad()
def step_window(
    model: nn.Module, optimizer: Optimizer, *, max_norm: float, clips_itself: bool
) -> tuple[float, str | None]:
    """Step with the gradient of the window unless it is not finite; return its norm, and why it was not stepped with.

    Args:
        model: the prepared model.
        optimizer: its optimizer.
        max_norm: bound on the norm; 0 means none.
        clips_itself: whether DeepSpeed takes the norm and bounds it.

    Raises:
        StepError: the model was prepared without an optimizer, or with another one; or no rank reached a parameter
            (a first window of stages 1 and 2 ends in an IndexError of DeepSpeed's instead), or not all ranks the same
            ones (stages 2 and 3), and what they had is dropped.
    """
    engine = engine_of(model)
    if engine.zero_optimization_stage() == 0:
        return _step_whole(engine, optimizer, max_norm)
    if not is_own_optimizer(engine, optimizer):
        raise StepError(
            f"optimizer={type(optimizer).__name__} is not the one that this model was prepared with; pass its own."
        )
    await_copy(optimizer, model)  # here, because it is a copy of the optimizer that steps
    reached = _complete(engine, cast("EngineModel", model))
    taken = _step_shards(engine, reached, max_norm=max_norm, clips_itself=clips_itself)
    # schedules of torch ask the optimizer whether it stepped, and it was a copy of it that did
    vars(optimizer)["_opt_called"] = True
    return taken


def _step_whole(engine: Engine, optimizer: Optimizer, max_norm: float) -> tuple[float, str | None]:
    engine.buffered_allreduce_fallback()
    norm = clip_gradients(optimizer, max_norm)
    reason = None if math.isfinite(norm) else not_finite_reason(norm, engine.module, optimizer)
    if reason is None:
        await_copy(optimizer, engine.module)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, reason


def _complete(engine: Engine, model: EngineModel) -> int:
    """Make the window's gradients averages over ranks, and return a number that says what this rank reached."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() > 1:
        zero.finalize_gradient_accumulation_boundary()
        reached, model.reached = model.reached, 0
    else:
        reached = 0
        for parameter in (parameter for group in zero.bit16_groups for parameter in group):
            if parameter.grad is None:  # reached on other ranks, perhaps, and all ranks must send the same
                parameter.grad = torch.zeros_like(parameter)
            else:
                reached = 1
        zero.set_gradient_accumulation_boundary(True)
        zero.reduce_gradients()
    zero.set_gradient_accumulation_boundary(False)
    return reached


def _step_shards(engine: Engine, reached: int, *, max_norm: float, clips_itself: bool) -> tuple[float, str | None]:
    zero = engine.optimizer
    # with the norm the ranks tell one another what they reached, so that both are one collective
    shards = [] if clips_itself else [shard for several in zero.averaged_gradients.values() for shard in several or ()]
    norm, problem = _global_norm(engine, shards, reached)
    if problem is not None:
        _drop(engine)
        _forget_order(engine)
        raise StepError(problem)
    if not math.isfinite(norm):
        name = _name_at_fault(engine)
        _drop(engine)
        return norm, reason_of(norm, name)
    if 0 < max_norm < norm:
        for shard in shards:
            shard.mul_(max_norm / (norm + _EPSILON))
    _step_zero(engine)
    if clips_itself:
        norm = float(zero._global_grad_norm)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # the engine's is of its own step
    name = _name_at_fault(engine) if zero.overflow else None
    zero.zero_grad()
    _clear_buffer(engine)
    return (math.inf, reason_of(math.inf, name)) if zero.overflow else (norm, None)


def _step_zero(engine: Engine) -> None:
    empty = [each for each in engine.module.parameters() if is_partitioned(each) and not math.prod(whole_shape(each))]
    for parameter in empty:  # a step begins with nothing gathered, and these always are
        set_gathered(parameter, is_gathered=False)
    engine.optimizer.step()
    for parameter in empty:
        set_gathered(parameter, is_gathered=True)


def _drop(engine: Engine) -> None:
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        for number in zero.averaged_gradients:
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
    zero.zero_grad()
    _clear_buffer(engine)


def _forget_order(engine: Engine) -> None:
    """Let stage 3 learn anew in which order layers come, which ranks must have in common."""
    if engine.zero_optimization_stage() == 3:
        coordinator = vars(engine.optimizer)["parameter_offload"].get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _clear_buffer(engine: Engine) -> None:
    if engine.zero_optimization_stage() == 3:
        # a parameter that the next window does not reach must not find the gradient of this one
        engine.optimizer.grad_partitions_flat_buffer.zero_()


def _global_norm(engine: Engine, shards: list[torch.Tensor], reached: int) -> tuple[float, str | None]:
    """Return the norm over all ranks, and what is wrong with what they reached."""
    device = next(engine.module.parameters()).device
    squares, first, second = _sum_of_ranks(norm_of_gradients(shards).to(device), reached)
    if squares == math.inf:  # the sum may have overflowed, and a large gradient is still a gradient
        squares, *_ = _sum_of_ranks(norm_of_gradients(shards, is_large=True).to(device), reached)
    stage = engine.zero_optimization_stage()
    # numbers are equal if and only if their variance is zero; whole ones of this size are summed exactly
    is_alike = stage == 1 or second * dist.get_world_size() == first**2
    mixed = (
        f"zero_stage={stage} exchanges gradients as they come, and the ranks' losses reached different parameters, or "
        "the same ones in another order; reach all of them on every rank, or use zero_stage=1."
    )
    norm = math.sqrt(squares) if squares >= 0 else math.nan
    if not first and not norm:  # a checkpoint's gradient nobody has reached in this process
        return norm, NO_GRADIENT
    return norm, None if is_alike or not math.isfinite(norm) else mixed


def _sum_of_ranks(norm: torch.Tensor, reached: int) -> list[float]:
    total = torch.stack([norm.double().square(), *norm.new_tensor([reached, reached**2], dtype=torch.float64)])
    dist.all_reduce(total)
    sums: list[float] = total.tolist()
    return sums


def _faulty_in_groups(zero: ZeroOptimizer) -> Iterator[nn.Parameter]:
    for number, parameters in enumerate(zero.params_in_partition):
        # behind the last one there may be zeros, up to the size of the other ranks' shards
        for parameter, gradient in zip(parameters, zero.averaged_gradients[number] or (), strict=False):
            if not gradient.isfinite().all():
                yield parameter


def _faulty_shards(zero: ZeroOptimizer) -> Iterator[nn.Parameter]:
    for parameter in (parameter for group in zero.fp16_groups for parameter in group):
        if not zero.get_local_fp32_grad_for_param(parameter).isfinite().all():
            yield parameter


def _name_at_fault(engine: Engine) -> str | None:
    """Return the name of the first parameter at fault on any rank, the same on all of them."""
    zero = engine.optimizer
    faulty = _faulty_shards(zero) if engine.zero_optimization_stage() == 3 else _faulty_in_groups(zero)
    found = {id(parameter) for parameter in faulty}
    names = [name for name, _ in engine.module.named_parameters()]
    places = [place for place, parameter in enumerate(engine.module.parameters()) if id(parameter) in found]
    device = next(engine.module.parameters()).device
    first = torch.tensor(min(places, default=len(names)), device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    return names[int(first)] if int(first) < len(names) else None
