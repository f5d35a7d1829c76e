"""Laws of the order of samples: what each rank reads, epoch by epoch, and where a saved position continues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch.utils.data import DataLoader, Dataset

from lightrft.data.sampler import ResumableSampler
from lightrft.errors import ConfigError, LawError
from lightrft.strategy.record import Strategy
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_EPOCHS = 2


@attrs.frozen(kw_only=True)
class _LoadedCase:
    """Samples 0 to size - 1, read for two epochs.

    Attributes:
        size: number of samples; so many that two random orders of them are never the same.
        batch_size: samples of a batch on one rank.
        shuffle: whether the order is random.
        drop_last: whether the last batch of an epoch is left out if it is not full.
        seed: of the settings.
        resume_at: number of the batch of the first epoch after which another loader continues.
    """

    size: int
    batch_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    resume_at: int


@attrs.frozen(kw_only=True)
class _LoadedEvidence:
    """Batches by epoch; those of another seed; the rest of the first epoch twice: read on, and resumed."""

    epochs: list[list[list[int]]]
    again: list[list[int]]
    reseeded: list[list[int]]
    rest: list[list[int]]
    resumed: list[list[int]]
    refused: list[str]


@st.composite
def _loaded_cases(draw: DrawFn, world_size: int) -> _LoadedCase:
    size, batch_size = draw(st.integers(24, 40)), draw(st.integers(1, 5))
    least = size // world_size // batch_size
    return _LoadedCase(
        size=size,
        batch_size=batch_size,
        shuffle=draw(st.booleans()),
        drop_last=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        resume_at=draw(st.integers(0, least)),
    )


def _numbers(size: int) -> Dataset[int]:
    return cast("Dataset[int]", range(size))  # a sequence is a map-style dataset with a length


def _loader(strategy: Strategy, case: _LoadedCase) -> DataLoader[int]:
    return strategy.setup_dataloader(
        _numbers(case.size), case.batch_size, shuffle=case.shuffle, collate_fn=list, drop_last=case.drop_last
    )


def _batches(loader: DataLoader[int]) -> list[list[int]]:
    return [list(batch) for batch in cast("Iterator[list[int]]", iter(loader))]


def _load(rank: Rank, case: _LoadedCase) -> _LoadedEvidence:
    strategy = rank.build(attrs.evolve(rank.config, seed=case.seed))
    other = rank.build(attrs.evolve(rank.config, seed=case.seed + 1))
    strategy.setup_distributed()
    loader = _loader(strategy, case)
    epochs = [_batches(loader) for _ in range(_EPOCHS)]
    interrupted, resumed = _loader(strategy, case), _loader(strategy, case)
    going = cast("Iterator[list[int]]", iter(interrupted))
    for _ in range(case.resume_at):
        next(going)
    _sampler(resumed).load_state_dict(_sampler(interrupted).state_dict())
    return _LoadedEvidence(
        epochs=epochs,
        again=_batches(_loader(strategy, case)),
        reseeded=_batches(_loader(other, case)),
        rest=[list(batch) for batch in going],
        resumed=_batches(resumed),
        refused=[_refused(strategy, iter(range(8))), _refused(strategy, range(2))],
    )


def _sampler(loader: DataLoader[int]) -> ResumableSampler:
    if not isinstance(loader.sampler, ResumableSampler):
        raise LawError(f"the loader's sampler is a {type(loader.sampler).__name__} and must be a ResumableSampler.")
    return loader.sampler


def _refused(strategy: Strategy, dataset: object) -> str:
    try:
        strategy.setup_dataloader(cast("Dataset[int]", dataset), 3)
    except ConfigError:
        return "ConfigError"
    return "accepted"


def _loading_holds(harness: Harness, case: _LoadedCase) -> None:
    seen = harness.run(_load, case)
    for epoch in range(_EPOCHS):
        _require_epoch(case, [evidence.epochs[epoch] for evidence in seen], f"epoch {epoch}")
    for rank, evidence in enumerate(seen):
        where = f"rank {rank}, {case}"
        if evidence.again != evidence.epochs[0]:
            raise LawError(f"{where}: the first epoch is {evidence.epochs[0]} and then {evidence.again}.")
        if evidence.resumed != evidence.rest:
            raise LawError(f"{where}: a resumed loader gives {evidence.resumed} and must give {evidence.rest}.")
        if evidence.refused != ["ConfigError", "ConfigError"]:
            raise LawError(f"{where}: no length and too few samples are {evidence.refused} and must be ConfigError.")
    first, second = (_joined([evidence.epochs[epoch] for evidence in seen]) for epoch in range(_EPOCHS))
    reseeded = _joined([evidence.reseeded for evidence in seen])
    if case.shuffle and first in (second, reseeded):
        raise LawError(f"{case}: the order {first} is that of another epoch or another seed and must be its own.")
    if not case.shuffle and any(_flat(evidence.epochs[0]) != sorted(_flat(evidence.epochs[0])) for evidence in seen):
        raise LawError(f"{case}: the order is {first} and must rise on every rank.")


def _require_epoch(case: _LoadedCase, ranks: list[list[list[int]]], where: str) -> None:
    read = _joined(ranks)
    fewest = case.size - (len(ranks) * (case.batch_size - 1) if case.drop_last else 0)
    if len(set(read)) != len(read) or not set(read) <= set(range(case.size)) or len(read) < fewest:
        raise LawError(f"{where}, {case}: the ranks read {ranks}, and must share the samples without overlap or gap.")
    for rank, batches in enumerate(ranks):
        sizes = [len(batch) for batch in batches]
        whole = sizes if case.drop_last else sizes[:-1]
        if any(size != case.batch_size for size in whole) or any(size > case.batch_size for size in sizes):
            raise LawError(f"{where}, rank {rank}, {case}: batches hold {sizes} samples.")


def _flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def _joined(ranks: list[list[list[int]]]) -> list[int]:
    return [number for batches in ranks for number in _flat(batches)]


LAWS: tuple[Law, ...] = (
    Law(
        id="training.setup_dataloader",
        statement="The shares of the ranks are disjoint and cover an epoch; the order follows from seed and epoch, and "
        "a loader whose position was restored continues where the other one was.",
        check=for_all(_loaded_cases, _loading_holds),
    ),
)
"""The laws."""
