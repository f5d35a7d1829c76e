"""The loop of raw torch that strategies are compared with: one process, one batch a step, nothing clever.

B batch
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft.strategy.protocols.training import CreateOptimizer
from lightrft.testing.cases.batches import Window, input_ids_of, sample_losses, samples_of
from lightrft.testing.cases.models import build_model
from lightrft.testing.cases.runs import RunCase, RunEvidence, rates_of

__all__ = ["BETAS", "Expected", "Step", "exact_run", "expected_run", "global_norm", "rate_factors"]

BETAS = (0.9, 0.95)
"""Betas of an optimizer that was asked for without any, as `CreateOptimizer` has them."""

_TOLERANCE = 1e-5
"""What losses and norms may be off by, beside the largest term of them."""

_NUDGE = 1e-5
"""Size of the disturbance of gradients, beside the largest term of them; float32 rounds a hundred times finer."""


@attrs.frozen(kw_only=True, eq=False)
class Step:
    """What one step of the loop does.

    Attributes:
        losses: mean loss of each micro-batch, rank by rank, before the step.
        grad_norm: global L2 norm before clipping.
        tensors: of the model, by name, after the step.
    """

    losses: tuple[tuple[float, ...], ...]
    grad_norm: float
    tensors: Mapping[str, Tensor]


@attrs.frozen(kw_only=True, eq=False)
class Expected:
    """A step, and how far from it another right way of computing it may end.

    Attributes:
        step: what the loop does.
        tolerances: what each element of `step.tensors` may be off by.
        loss_tolerance: what each loss may be off by.
        norm_tolerance: what the norm may be off by.
    """

    step: Step
    tolerances: Mapping[str, Tensor]
    loss_tolerance: float
    norm_tolerance: float


def exact_run(case: RunCase, create_optimizer: CreateOptimizer) -> list[Step]:
    """Return what the loop does at each window of a training.

    Args:
        case: the training.
        create_optimizer: makes the optimizer of the plain model.
    """
    return _run(case, create_optimizer)


def expected_run(
    case: RunCase,
    create_optimizer: CreateOptimizer,
    seen: RunEvidence,
    *,
    betas: tuple[float, float] = BETAS,
    rates: Sequence[float] | None = None,
    relative: float = 2e-6,
) -> list[Expected]:
    """Return what the loop does at each window from the tensors that were seen before it, and what rounding may add.

    Every step begins where the strategy stands, so that rounding in one does not spread into the next.

    How much a step magnifies rounding depends on the optimizer: the first step of Adam or Lion is a sign, so that an
    element whose gradient is nothing but rounding has no defined direction. That is measured instead of guessed: the
    loop runs again with gradients that are disturbed in one direction and in the other, far above their rounding,
    and where this moves the result, so much of a difference is allowed; elsewhere `relative` is.

    Args:
        case: the training.
        create_optimizer: makes the optimizer of the plain model.
        seen: what a rank saw of the training.
        betas: of the optimizer.
        rates: learning rate of each step; None takes those of the case.
        relative: what is allowed of the largest number that a tensor's step is made of; float32 rounds at 6e-8.
    """
    starts = [seen.before, *(window.tensors for window in seen.windows[:-1])]
    plain, up, down = (
        _run(case, create_optimizer, starts=starts, betas=betas, rates=rates, nudge=nudge)
        for nudge in (0.0, _NUDGE, -_NUDGE)
    )
    steps = zip(starts, rates_of(case) if rates is None else rates, plain, up, down, strict=True)
    return [
        _expected(step, others, before=before, rate=rate, relative=relative) for before, rate, step, *others in steps
    ]


def _run(
    case: RunCase,
    create_optimizer: CreateOptimizer,
    *,
    starts: Sequence[Mapping[str, Tensor]] | None = None,
    betas: tuple[float, float] = BETAS,
    rates: Sequence[float] | None = None,
    nudge: float = 0.0,
) -> list[Step]:
    model = build_model(case.model)
    optimizer = create_optimizer(model, lr=case.lr, betas=betas, weight_decay=case.weight_decay)
    steps: list[Step] = []
    for number, rate in enumerate(rates_of(case) if rates is None else rates):
        if starts is not None:
            model.load_state_dict(starts[number])
        losses = _backward(model, case.windows[number], case)
        _disturb(model, nudge)
        norm = global_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        _clip(model, norm, case.max_norm)
        _step(optimizer, rate)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        steps.append(Step(losses=losses, grad_norm=norm, tensors=tensors))
    return steps


def _expected(
    plain: Step, disturbed: Sequence[Step], *, before: Mapping[str, Tensor], rate: float, relative: float
) -> Expected:
    largest = max(abs(loss) for losses in plain.losses for loss in losses)
    return Expected(
        step=plain,
        tolerances={
            name: 2 * _moved(tensor, [step.tensors[name] for step in disturbed])
            # a step rounds like the weight and the move that it adds, also where these cancel to almost nothing
            + relative * max(rate, _largest(before[name]), _largest(tensor))
            for name, tensor in plain.tensors.items()
        },
        # sums of terms of the size of 1 round by what these round, also where they cancel
        loss_tolerance=_TOLERANCE * max(1.0, largest),
        norm_tolerance=_TOLERANCE * max(1.0, plain.grad_norm),
    )


def _moved(tensor: Tensor, disturbed: Sequence[Tensor]) -> Tensor:
    return torch.stack([(other.double() - tensor.double()).abs() for other in disturbed]).amax(0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _backward(model: nn.Module, window: Window, case: RunCase) -> tuple[tuple[float, ...], ...]:
    """Leave the gradient of the whole window, from one batch of all its samples; return the micro-batches' losses."""
    number = len(window.ranks) * case.micro_batches
    batches = [batch for micro_batches in window.ranks for batch in micro_batches]
    shares = [
        (1 / number if batch.weight is None else batch.weight) / len(batch.samples)
        for batch in batches
        for _ in batch.samples
    ]
    samples = samples_of(window)
    losses_B = sample_losses(model(input_ids_of(samples)), samples, case.loss)
    (losses_B * torch.tensor(shares)).sum().backward()  # type: ignore[no-untyped-call]  # so in torch
    sizes = [len(batch.samples) for batch in batches]
    means = iter(part_B.mean().item() for part_B in torch.split(losses_B.detach(), sizes))
    return tuple(tuple(next(means) for _ in micro_batches) for micro_batches in window.ranks)


def _disturb(model: nn.Module, nudge: float) -> None:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # what a gradient rounds like is the size of its terms, which are about 1 also where they cancel
    largest = max([1.0, *(float(gradient.abs().max()) for gradient in gradients if gradient.numel())])
    for gradient in gradients:
        gradient.add_(nudge * largest)


def global_norm(tensors: Sequence[Tensor]) -> float:
    """Return the L2 norm of all elements of all tensors, in double precision.

    Args:
        tensors: any number.
    """
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _clip(model: nn.Module, norm: float, max_norm: float) -> None:
    if 0 < max_norm < norm:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(max_norm / norm)


def _step(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def rate_factors(kind: str, *, num_steps: int, warmup_ratio: float, min_ratio: float) -> list[float]:
    """Return the share of the peak rate that each step of a run uses.

    The first floor(warmup_ratio * num_steps) steps rise evenly from above 0 to below the peak, which the next one uses.
    From there the rate is constant, or falls on a line or half a cosine to `min_ratio` at the last step.

    Args:
        kind: "constant", "linear" or "cosine".
        num_steps: optimizer steps of the whole run.
        warmup_ratio: share of them that the warm-up takes.
        min_ratio: share of the peak at the end of a decay.

    Example:
        >>> rate_factors("linear", num_steps=4, warmup_ratio=0.25, min_ratio=0.0)
        [0.5, 1.0, 0.5, 0.0]
    """
    num_warmup = math.floor(warmup_ratio * num_steps)
    rising = [number / (num_warmup + 1) for number in range(1, num_warmup + 1)]
    num_rest = num_steps - num_warmup
    if kind == "constant":
        return rising + [1.0] * num_rest
    shares = [place / max(1, num_rest - 1) for place in range(num_rest)]
    if kind == "cosine":
        shares = [(1 - math.cos(math.pi * share)) / 2 for share in shares]
    return rising + [1.0 + share * (min_ratio - 1.0) for share in shares]
