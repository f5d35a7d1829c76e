"""One optimizer step over micro-batches of any size, as many or few on each rank as there happen to be.

A mean over unequal parts is not the mean of their means, so each part needs its share of the whole, and the whole lies
on all ranks. `train_step` finds the shares, and keeps ranks in step that have fewer micro-batches than others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import attrs
import torch

from lightrft.errors import DataError
from lightrft.strategy.protocols.collectives import AllGather
from lightrft.strategy.protocols.training import Backward, OptimizerStep, StepResult, Trainable

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LossFunction", "StepFunctions", "WeightFunction", "train_step"]

_Batch = TypeVar("_Batch")
_Batch_contra = TypeVar("_Batch_contra", contravariant=True)


class LossFunction(Protocol[_Batch_contra]):
    """Computes the loss of a micro-batch."""

    def __call__(self, model: nn.Module, batch: _Batch_contra, /) -> Tensor:
        """Return the mean loss, 0-d, over what the weight of the micro-batch counts.

        Where all micro-batches of a rank weigh 0, one of them is computed all the same, since other ranks may wait for
        this one inside the model. Its loss must be finite then: divide by `max(num_tokens, 1)`.

        Args:
            model: the prepared model; call it, so that a sharded one can gather its parameters.
            batch: the micro-batch.
        """
        ...


class WeightFunction(Protocol[_Batch_contra]):
    """Says how much a micro-batch counts."""

    def __call__(self, batch: _Batch_contra, /) -> float:
        """Return what the loss is a mean over, such as the number of tokens or samples: finite, and at least 0.

        Args:
            batch: the micro-batch.
        """
        ...


class StepFunctions(Protocol):
    """What `train_step` calls; every strategy has it."""

    @property
    def backward(self) -> Backward: ...  # noqa: D102 (the callback protocol is the documentation)
    @property
    def optimizer_step(self) -> OptimizerStep: ...  # noqa: D102
    @property
    def all_gather(self) -> AllGather: ...  # noqa: D102


def train_step(
    strategy: StepFunctions,
    trainable: Trainable,
    micro_batches: Sequence[_Batch],
    loss_fn: LossFunction[_Batch],
    *,
    weight_fn: WeightFunction[_Batch],
) -> StepResult:
    """Return what one optimizer step did with the micro-batches of all ranks.

    Law: however samples are split into micro-batches and over ranks, the step is that of one batch of them all.

    Micro-batches of weight 0 are left out. A rank with fewer than another one repeats its first with weight 0, because
    all ranks of a sharded model compute together; what forward draws or counts (dropout, statistics) it does then too.
    A weight of 0 over all ranks skips the step, before anything is computed. One collective is called before the first
    micro-batch; the rest are those of `backward` and `optimizer_step`.

    Args:
        strategy: the strategy.
        trainable: what is trained; no accumulation window is open.
        micro_batches: of this rank, at least one; every rank calls with its own.
        loss_fn: the mean loss of a micro-batch.
        weight_fn: how much a micro-batch counts.

    Raises:
        DataError: on all ranks, if one of them has no micro-batch, or a weight that is negative or not finite.

    Example:
        >>> from torch import nn
        >>> from lightrft.strategy import StrategyConfig, get_strategy
        >>> strategy = get_strategy(StrategyConfig(strategy="single"))
        >>> model = nn.Linear(1, 1)
        >>> actor = strategy.prepare((model, strategy.create_optimizer(model), None))
        >>> def loss_fn(model, inputs):
        ...     return model(inputs).square().mean()
        >>> train_step(strategy, actor, [torch.ones(3, 1), torch.ones(1, 1)], loss_fn, weight_fn=len).stepped
        True
    """
    weights = [float(weight_fn(batch)) for batch in micro_batches]
    ranks = _ranks(strategy.all_gather, weights)
    _require_usable(ranks)
    total = sum(rank.weight for rank in ranks)
    if not total:
        return _skipped(trainable)
    shares = [(batch, weight / total) for batch, weight in zip(micro_batches, weights, strict=True)]
    parts = _padded(shares, max(rank.num_weighted for rank in ranks))
    return _step(strategy, trainable, parts, loss_fn)


@attrs.frozen(kw_only=True)
class _Rank:
    """What every rank tells the others.

    Attributes:
        weight: of its micro-batches together.
        num_micro_batches: all of them.
        num_weighted: those whose weight is not 0.
        unusable: place of the first one whose weight cannot be used, or -1.
        unusable_weight: its weight, or 0.
    """

    weight: float
    num_micro_batches: int
    num_weighted: int
    unusable: int
    unusable_weight: float


def _ranks(all_gather: AllGather, weights: Sequence[float]) -> list[_Rank]:
    bad = next(((place, one) for place, one in enumerate(weights) if not 0 <= one < math.inf), (-1, 0.0))
    row = [math.fsum(weights) if bad[0] < 0 else 0.0, len(weights), sum(map(bool, weights)), *bad]
    rows = all_gather(torch.tensor([row], dtype=torch.float64)).tolist()
    return [
        _Rank(
            weight=weight,
            num_micro_batches=int(num_micro_batches),
            num_weighted=int(num_weighted),
            unusable=int(unusable),
            unusable_weight=unusable_weight,
        )
        for weight, num_micro_batches, num_weighted, unusable, unusable_weight in rows
    ]


def _require_usable(ranks: Sequence[_Rank]) -> None:
    for number, rank in enumerate(ranks):
        if rank.unusable >= 0:
            raise DataError(
                f"weight={rank.unusable_weight!r} of micro-batch {rank.unusable} on rank {number} is not a finite "
                "number of at least 0; return from weight_fn what the loss is a mean over, such as its tokens."
            )
        if not rank.num_micro_batches:
            others = max(ranks, key=_num_micro_batches)
            raise DataError(
                f"micro_batches=[] of rank {number} is empty, with up to {others.num_micro_batches} on another rank; "
                "spread samples so that each rank has one (balance_by_tokens does), or pass any with weight 0."
            )


def _num_micro_batches(rank: _Rank) -> int:
    return rank.num_micro_batches


def _padded(shares: Sequence[tuple[_Batch, float]], length: int) -> list[tuple[_Batch, float]]:
    # what is repeated counts in this step anyway, so it makes nothing NaN that is not NaN already
    weighted = [(batch, share) for batch, share in shares if share]
    idle, _ = (weighted or shares)[0]
    return [*weighted, *[(idle, 0.0)] * (length - len(weighted))]


def _skipped(trainable: Trainable) -> StepResult:
    return StepResult(
        stepped=False,
        grad_norm=0.0,
        learning_rate=float(trainable.optimizer.param_groups[0]["lr"]),
        skipped_reason="all micro-batches of all ranks weigh 0; the step was skipped.",
    )


def _step(
    strategy: StepFunctions,
    trainable: Trainable,
    parts: Sequence[tuple[_Batch, float]],
    loss_fn: LossFunction[_Batch],
) -> StepResult:
    model, optimizer, scheduler = trainable

    def micro_step(batch: _Batch, share: float, *, is_last: bool) -> StepResult:
        strategy.backward(loss_fn(model, batch), model, optimizer, weight=share, is_boundary=is_last)
        return strategy.optimizer_step(optimizer, model, scheduler, is_boundary=is_last)

    *inside, last = parts
    for batch, share in inside:
        micro_step(batch, share, is_last=False)
    return micro_step(*last, is_last=True)
