"""What was seen against what must be, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightrft.errors import LawError
from lightrft.strategy.protocols import StepResult
from lightrft.strategy.protocols.training import CreateOptimizer
from lightrft.testing.cases.models import build_model
from lightrft.testing.cases.runs import RunCase, RunEvidence, rates_of
from lightrft.testing.reference.training import BETAS, exact_run, expected_run

__all__ = [
    "require_close",
    "require_close_run",
    "require_exact_run",
    "require_near",
    "require_same",
    "require_same_run",
    "require_stepped",
]


def require_same(seen: Mapping[str, Tensor], must: Mapping[str, Tensor], where: str) -> None:
    """Return if names, their order, shapes, dtypes and values are the same, a zero's sign apart.

    Args:
        seen: tensors by name.
        must: what they must be.
        where: when it was seen, for the message.

    Raises:
        LawError: something differs.
    """
    _require_names(seen, must, where)
    for name, tensor in must.items():
        found = seen[name]
        if found.dtype != tensor.dtype or found.shape != tensor.shape:
            raise LawError(f"{where}: {name!r} is {_kind(found)} and must be {_kind(tensor)}.")
        if not torch.equal(found, tensor):
            raise LawError(f"{where}: {_difference(name, found, tensor)}, exactly.")


def require_close(
    seen: Mapping[str, Tensor], must: Mapping[str, Tensor], tolerances: Mapping[str, Tensor], where: str
) -> None:
    """Return if names are the same and no element is further off than its tolerance.

    Args:
        seen: tensors by name.
        must: what they must be.
        tolerances: what each element may be off by.
        where: when it was seen, for the message.

    Raises:
        LawError: something differs.
    """
    _require_names(seen, must, where)
    for name, tensor in must.items():
        if seen[name].shape != tensor.shape:
            raise LawError(f"{where}: {name!r} is {_kind(seen[name])} and must be {_kind(tensor)}.")
        is_near = (seen[name].double() - tensor.double()).abs() <= tolerances[name]
        if not is_near.all():
            wrong = is_near.logical_not()
            place = int(wrong.flatten().long().argmax())
            raise LawError(
                f"{where}: {name!r} is {seen[name].flatten()[place].item()!r} at its element {place} and must be "
                f"{tensor.flatten()[place].item()!r}, within {tolerances[name].flatten()[place].item():.3g}."
            )


def _require_names(seen: Mapping[str, Tensor], must: Mapping[str, Tensor], where: str) -> None:
    if list(seen) != list(must):
        raise LawError(f"{where}: tensors are {list(seen)} and must be {list(must)}.")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _difference(name: str, seen: Tensor, must: Tensor) -> str:
    apart = ((seen.double() - must.double()).abs().nan_to_num(torch.inf)).flatten()
    place = int(apart.argmax())
    return (
        f"{name!r} is {seen.flatten()[place].item()!r} at its element {place} "
        f"and must be {must.flatten()[place].item()!r}"
    )


def require_stepped(results: Sequence[StepResult], where: str) -> None:
    """Return if the last micro-batch of a window stepped, and no other one did.

    Args:
        results: one for each micro-batch.
        where: when it was seen, for the message.

    Raises:
        LawError: another one stepped, or says that it was skipped.
    """
    for number, result in enumerate(results, start=1):
        is_last = number == len(results)
        if result.stepped != is_last or result.skipped_reason is not None or (result.grad_norm is None) == is_last:
            raise LawError(
                f"{where}, micro-batch {number} of {len(results)}: the result is {result} and must say that "
                f"{'it stepped, with a norm' if is_last else 'nothing was stepped'}."
            )


def require_same_run(seen: RunEvidence, must: RunEvidence, where: str) -> None:
    """Return if two trainings on the same samples did the same: tensors, losses and results.

    Args:
        seen: one of them.
        must: the other one.
        where: what they are, for the message.

    Raises:
        LawError: something differs.
    """
    require_same(seen.before, must.before, f"{where}, before the first window")
    for number, (one, other) in enumerate(zip(seen.windows, must.windows, strict=True), start=1):
        at = f"{where}, window {number}"
        if one.losses != other.losses:
            raise LawError(f"{at}: losses are {one.losses} and must be {other.losses}.")
        if one.results != other.results:
            raise LawError(f"{at}: results are {one.results} and must be {other.results}.")
        require_same(one.tensors, other.tensors, at)


def require_exact_run(seen: Sequence[RunEvidence], case: RunCase, create_optimizer: CreateOptimizer) -> None:
    """Return if all ranks stepped as the loop of raw torch does, and have exactly its tensors.

    Args:
        seen: what each rank saw.
        case: the training.
        create_optimizer: the strategy's.

    Raises:
        LawError: something differs.
    """
    steps, rates = exact_run(case, create_optimizer), rates_of(case)
    for rank, evidence in enumerate(seen):
        require_same(evidence.before, build_model(case.model).state_dict(), f"rank {rank}, prepared")
        for number, (window, step, rate) in enumerate(zip(evidence.windows, steps, rates, strict=True)):
            where = f"rank {rank}, window {number + 1}"
            require_stepped(window.results, where)
            _require_rate(window.results, rate, where)
            # the gradient is exact, and its norm rounds in float32
            require_near("grad_norm", window.results[-1].grad_norm, step.grad_norm, 1e-5 * step.grad_norm, where)
            require_same(window.tensors, step.tensors, where)


def require_close_run(
    seen: Sequence[RunEvidence],
    case: RunCase,
    create_optimizer: CreateOptimizer,
    *,
    betas: tuple[float, float] = BETAS,
    rates: Sequence[float] | None = None,
) -> None:
    """Return if all ranks stepped as the loop of raw torch does, with its losses, norms and tensors but for rounding.

    Args:
        seen: what each rank saw.
        case: the training.
        create_optimizer: the strategy's.
        betas: of the optimizer.
        rates: learning rate of each window; None takes those of the case.

    Raises:
        LawError: something differs.
    """
    expected = expected_run(case, create_optimizer, seen[0], betas=betas, rates=rates)
    for rank, evidence in enumerate(seen):
        require_same(evidence.before, build_model(case.model).state_dict(), f"rank {rank}, prepared")
        for number, (window, must) in enumerate(zip(evidence.windows, expected, strict=True)):
            where = f"rank {rank}, window {number + 1}"
            require_stepped(window.results, where)
            _require_rate(window.results, (rates or rates_of(case))[number], where)
            for loss, wanted in zip(window.losses, must.step.losses[rank], strict=True):
                require_near("a loss", loss, wanted, must.loss_tolerance, where)
            require_near("grad_norm", window.results[-1].grad_norm, must.step.grad_norm, must.norm_tolerance, where)
            require_close(window.tensors, must.step.tensors, must.tolerances, where)


def _require_rate(results: Sequence[StepResult], rate: float, where: str) -> None:
    for result in results:
        # the same product of a peak and a share, perhaps in another order
        require_near("learning_rate", result.learning_rate, rate, 1e-9 * rate, where)


def require_near(name: str, seen: float | None, must: float, tolerance: float, where: str) -> None:
    """Return if a number is one, and near enough.

    Args:
        name: what it is, for the message.
        seen: the number.
        must: what it must be.
        tolerance: what it may be off by.
        where: when it was seen, for the message.

    Raises:
        LawError: it is not.
    """
    if seen is None or not abs(seen - must) <= tolerance:  # so that NaN is far
        raise LawError(f"{where}: {name} is {seen!r} and must be {must!r}, within {tolerance:.3g}.")
