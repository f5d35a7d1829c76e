"""Gradients of an accumulation window under an engine: added up, bounded, stepped with or dropped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.training.clipping import clip_gradients, norm_of_gradients, not_finite_reason, reason_of
from lightrft.backends.training.zero.engine import engine_of
from lightrft.backends.training.zero.partitioning import set_gathered
from lightrft.backends.zero.model import EngineModel, is_own_optimizer
from lightrft.backends.zero.package import Engine, ZeroOptimizer
from lightrft.backends.zero.shards import is_partitioned, whole_shape
from lightrft.errors import StepError

__all__ = ["run_backward", "step_window"]

_MIXED = (
    "zero_stage=2 exchanges gradients as they come, and the ranks' losses reached different parameters, or the same "
    "ones in another order; reach all of them on every rank, or use zero_stage=1."
)
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
        StepError: the model was prepared without an optimizer, or with another one.
    """
    engine = engine_of(model)
    if engine.zero_optimization_stage() == 0:
        return _step_whole(engine, optimizer, max_norm)
    if not is_own_optimizer(engine, optimizer):
        raise StepError(
            f"optimizer={type(optimizer).__name__} is not the one that this model was prepared with; pass its own."
        )
    _complete(engine)
    reached, cast("EngineModel", model).reached = cast("EngineModel", model).reached, 0
    taken = _step_native(engine) if clips_itself else _step_bounded(engine, reached, max_norm)
    # schedules of torch ask the optimizer whether it stepped, and it was a copy of it that did
    vars(optimizer)["_opt_called"] = True
    return taken


def _step_whole(engine: Engine, optimizer: Optimizer, max_norm: float) -> tuple[float, str | None]:
    engine.buffered_allreduce_fallback()
    norm = clip_gradients(optimizer, max_norm)
    reason = None if math.isfinite(norm) else not_finite_reason(norm, engine.module, optimizer)
    if reason is None:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, reason


def _complete(engine: Engine) -> None:
    zero = engine.optimizer
    if engine.zero_optimization_stage() > 1:
        zero.finalize_gradient_accumulation_boundary()
    else:
        for parameter in (parameter for group in zero.bit16_groups for parameter in group):
            if parameter.grad is None:  # reached on other ranks, perhaps, and all ranks must send the same
                parameter.grad = torch.zeros_like(parameter)
        zero.set_gradient_accumulation_boundary(True)
        zero.reduce_gradients()
    zero.set_gradient_accumulation_boundary(False)


def _step_bounded(engine: Engine, reached: int, max_norm: float) -> tuple[float, str | None]:
    zero = engine.optimizer
    shards = [gradient for gradients in zero.averaged_gradients.values() for gradient in gradients or ()]
    norm, is_alike = _global_norm(shards, reached)
    if not math.isfinite(norm):
        name = _name_at_fault(engine, _faulty_in_groups(zero))
        _drop(zero)
        return norm, reason_of(norm, name)
    if not is_alike:
        _drop(zero)
        raise StepError(_MIXED)
    if 0 < max_norm < norm:
        for shard in shards:
            shard.mul_(max_norm / (norm + _EPSILON))
    zero.step()
    zero.zero_grad()
    return norm, None


def _drop(zero: ZeroOptimizer) -> None:
    for number in zero.averaged_gradients:
        zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
    zero.zero_grad()


def _global_norm(shards: list[torch.Tensor], reached: int) -> tuple[float, bool]:
    """Return the norm over all ranks, and whether all of them reached the same parameters in one order."""
    norm, is_alike = _sum_of_ranks(norm_of_gradients(shards), reached)
    if norm == math.inf:  # the sum of squares may have overflowed, and a large gradient is still a gradient
        norm, is_alike = _sum_of_ranks(norm_of_gradients(shards, is_large=True), reached)
    return norm, is_alike


def _sum_of_ranks(norm: torch.Tensor, reached: int) -> tuple[float, bool]:
    total = torch.stack([norm.double().square(), *norm.new_tensor([reached, reached**2], dtype=torch.float64)])
    dist.all_reduce(total)
    squares, first, second = total.tolist()
    # numbers are equal if and only if their variance is zero; whole ones of this size are summed exactly
    return math.sqrt(squares) if squares >= 0 else math.nan, second * dist.get_world_size() == first**2


def _step_native(engine: Engine) -> tuple[float, str | None]:
    zero = engine.optimizer
    empty = [each for each in engine.module.parameters() if is_partitioned(each) and not math.prod(whole_shape(each))]
    for parameter in empty:  # a step begins with nothing gathered, and these always are
        set_gathered(parameter, is_gathered=False)
    zero.step()
    for parameter in empty:
        set_gathered(parameter, is_gathered=True)
    norm = float(zero._global_grad_norm)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # the engine's is of its own step
    name = None
    if zero.overflow and engine.zero_optimization_stage() == 3:
        name = _name_at_fault(engine, _faulty_shards(zero))
    zero.zero_grad()
    _clear_buffer(engine)
    return (math.inf, reason_of(math.inf, name)) if zero.overflow else (norm, None)


def _clear_buffer(engine: Engine) -> None:
    if engine.zero_optimization_stage() == 3:
        # a parameter that the next window does not reach must not find the gradient of this one
        engine.optimizer.grad_partitions_flat_buffer.zero_()


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


def _name_at_fault(engine: Engine, faulty: Iterator[nn.Parameter]) -> str | None:
    """Return the name of the first parameter at fault on any rank, the same on all of them."""
    found = {id(parameter) for parameter in faulty}
    names = [name for name, _ in engine.module.named_parameters()]
    places = [place for place, parameter in enumerate(engine.module.parameters()) if id(parameter) in found]
    device = next(engine.module.parameters()).device
    first = torch.tensor(min(places, default=len(names)), device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    return names[int(first)] if int(first) < len(names) else None
