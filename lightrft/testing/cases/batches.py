"""Batches as plain data: samples, micro-batches with their weights, and windows that ranks share.

B batch, T tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

__all__ = [
    "BROKEN",
    "FAULTS",
    "Fault",
    "LossKind",
    "MicroBatch",
    "Sample",
    "Window",
    "equal_windows",
    "input_ids_of",
    "is_power_of_two",
    "micro_batch_loss",
    "sample_losses",
    "samples_of",
    "uneven_windows",
]

LossKind: TypeAlias = Literal["linear", "cross_entropy"]
"""What is minimised: "linear" in the logits, with gradients that float32 holds exactly, or the usual one."""

Fault: TypeAlias = Literal[
    "loss is nan", "loss is inf", "gradient is nan", "first gradient is nan", "last gradient is nan"
]
"""What is wrong with a micro-batch."""

FAULTS: tuple[Fault, ...] = (
    "loss is nan",
    "loss is inf",
    "gradient is nan",
    "first gradient is nan",
    "last gradient is nan",
)
"""All of them."""


BROKEN: Mapping[Fault, int] = MappingProxyType({"first gradient is nan": 0, "last gradient is nan": -1})
"""Place of the one parameter whose gradient is wrong, for the faults that a model is asked for."""


@attrs.frozen(kw_only=True)
class Sample:
    """Two tokens, what should follow them, and how much that matters.

    Attributes:
        input_ids: token ids.
        labels: a token id for each of them.
        coefficient: of the linear loss, a whole number.
    """

    input_ids: tuple[int, int]
    labels: tuple[int, int]
    coefficient: int


@attrs.frozen(kw_only=True)
class MicroBatch:
    """Samples of one forward and backward.

    Attributes:
        samples: at least one.
        weight: their share of the window; None leaves it to the strategy, which takes equal shares.
        fault: what is wrong with its loss; None is right.
    """

    samples: tuple[Sample, ...]
    weight: float | None = None
    fault: Fault | None = None


@attrs.frozen(kw_only=True)
class Window:
    """What one optimizer step is made of.

    Attributes:
        ranks: the micro-batches of each rank, at least one for each.
        is_counted: whether the strategy finds the end by counting; False says it with `is_boundary`.
    """

    ranks: tuple[tuple[MicroBatch, ...], ...]
    is_counted: bool = False


def is_power_of_two(number: int) -> bool:
    """Return whether a positive number divides others without rounding.

    Args:
        number: at least 1.
    """
    return number & (number - 1) == 0


def input_ids_of(samples: tuple[Sample, ...]) -> Tensor:
    """Return the token ids (B, T), int64.

    Args:
        samples: at least one.
    """
    return torch.tensor([sample.input_ids for sample in samples])


def samples_of(window: Window) -> tuple[Sample, ...]:
    """Return the samples of all ranks, in rank order.

    Args:
        window: any window.
    """
    return tuple(sample for micro_batches in window.ranks for batch in micro_batches for sample in batch.samples)


def sample_losses(logits_BTV: Tensor, samples: tuple[Sample, ...], kind: LossKind) -> Tensor:
    """Return the loss of each sample (B,).

    Args:
        logits_BTV: (B, T, V) of the samples.
        samples: B of them.
        kind: which loss.
    """
    labels_BT = torch.tensor([sample.labels for sample in samples])
    if kind == "cross_entropy":
        logits_BTV = logits_BTV.float().log_softmax(-1)
        factor_B = -torch.ones(len(samples))
    else:
        factor_B = torch.tensor([float(sample.coefficient) for sample in samples])
    return factor_B * logits_BTV.gather(2, labels_BT[..., None]).sum((1, 2))


def micro_batch_loss(logits_BTV: Tensor, batch: MicroBatch, kind: LossKind) -> Tensor:
    """Return the mean loss of a micro-batch, 0-d, with its fault.

    Args:
        logits_BTV: (B, T, V) of its samples.
        batch: the micro-batch.
        kind: which loss.
    """
    loss = sample_losses(logits_BTV, batch.samples, kind).mean()
    if batch.fault is None or batch.fault in BROKEN:  # what is in BROKEN is the model's to do
        return loss
    if batch.fault == "gradient is nan":  # the loss stays finite: the slope of a root at zero is infinite
        return loss + (logits_BTV.float().sum() * 0.0).abs().sqrt()
    return loss * float("nan") if batch.fault == "loss is nan" else loss + logits_BTV.float().exp().sum() * torch.inf


_COEFFICIENTS = (1, -1, 2, 3, -2, -3, 0)


def _samples(vocabulary: int) -> SearchStrategy[Sample]:
    # one number for a whole sample, because drawing takes longer than training on what was drawn
    return st.integers(0, vocabulary**4 * len(_COEFFICIENTS) - 1).map(lambda number: _sample(number, vocabulary))


def _sample(number: int, vocabulary: int) -> Sample:
    rest, coefficient = divmod(number, len(_COEFFICIENTS))
    tokens: list[int] = []
    for _ in range(4):
        rest, token = divmod(rest, vocabulary)
        tokens.append(token)
    first, second, label, next_label = tokens
    return Sample(input_ids=(first, second), labels=(label, next_label), coefficient=_COEFFICIENTS[coefficient])


@st.composite
def equal_windows(
    draw: DrawFn, *, vocabulary: int, world_size: int, micro_batches: int, size: int, is_weighted: bool = False
) -> Window:
    """Return a strategy for windows of equal micro-batches, as many on every rank.

    Args:
        draw: hypothesis' own.
        vocabulary: number of token ids.
        world_size: number of ranks.
        micro_batches: of each rank.
        size: samples of each micro-batch.
        is_weighted: whether the shares are said, and the end of the window too.
    """
    number = world_size * micro_batches
    samples = draw(st.lists(_samples(vocabulary), min_size=number * size, max_size=number * size))
    weight = 1 / number if is_weighted else None
    batches = [MicroBatch(samples=tuple(samples[place * size :][:size]), weight=weight) for place in range(number)]
    ranks = tuple(tuple(batches[rank * micro_batches :][:micro_batches]) for rank in range(world_size))
    return Window(ranks=ranks, is_counted=not is_weighted)


@st.composite
def uneven_windows(draw: DrawFn, *, vocabulary: int, world_size: int, num_samples: int, exact: bool) -> Window:
    """Return a strategy for all partitions of samples over ranks and micro-batches, in any order.

    All ranks have equally many micro-batches, as `Backward` asks: one that got fewer repeats its first with weight 0.

    Args:
        draw: hypothesis' own.
        vocabulary: number of token ids.
        world_size: number of ranks; each gets a micro-batch or more.
        num_samples: at least as many; their weights are shares of it.
        exact: draw micro-batches of 1, 2, 4 or 8 samples alone, whose means do not round.
    """
    samples = draw(st.lists(_samples(vocabulary), min_size=num_samples, max_size=num_samples))
    sizes = [num_samples]
    while len(sizes) < world_size or (max(sizes) > 1 and draw(st.booleans())):
        largest = sizes.pop(sizes.index(max(sizes)))
        part = largest // 2 if exact else draw(st.integers(1, largest - 1))
        sizes += [part, largest - part]
    shuffled = draw(st.permutations(sizes))
    owners = [
        *range(world_size),
        *draw(
            st.lists(st.integers(0, world_size - 1), min_size=len(sizes) - world_size, max_size=len(sizes) - world_size)
        ),
    ]
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    for owner, size in zip(owners, shuffled, strict=True):
        ranks[owner].append(MicroBatch(samples=tuple(samples[:size]), weight=size / num_samples))
        del samples[:size]
    most = max(map(len, ranks))
    idle = [[attrs.evolve(batches[0], weight=0.0)] * (most - len(batches)) for batches in ranks]
    return Window(ranks=tuple((*batches, *more) for batches, more in zip(ranks, idle, strict=True)))
