"""Where a process stands among all: its place, its random streams, what it prints, and what a barrier orders."""

from __future__ import annotations

import contextlib
import io
import random
import sys
from datetime import timedelta

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lightrft.errors import ConfigError, LawError
from lightrft.strategy.protocols.collectives import World
from lightrft.strategy.record import Strategy
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@attrs.frozen(kw_only=True)
class SeedCase:
    """Seeds, and how much is drawn.

    Attributes:
        seed: the config's.
        other: another one.
        count: numbers that are drawn from every stream.
        timeout: a good one, in seconds.
        bad_timeout: one that no collective could keep.
    """

    seed: int
    other: int
    count: int
    timeout: float
    bad_timeout: float


@attrs.frozen(kw_only=True)
class PrintCase:
    """What is printed.

    Attributes:
        texts: the values, in order.
        numbers: more of them.
    """

    texts: tuple[str, ...]
    numbers: tuple[int, ...]


@attrs.frozen(kw_only=True)
class BarrierCase:
    """Files that every rank writes.

    Attributes:
        rounds: how often all ranks write and wait.
    """

    rounds: int


@attrs.frozen(kw_only=True, eq=False)
class SeenWorld:
    """What a rank knows of itself.

    Attributes:
        worlds: what the first, a second and a set-up after `teardown` returned.
        rank: what `get_rank` says.
        is_rank_0: what `is_rank_0` says.
        refusal: message of the error about a bad timeout; empty if there was none.
    """

    worlds: list[World]
    rank: int
    is_rank_0: bool
    refusal: str


@attrs.frozen(kw_only=True, eq=False)
class SeenStreams:
    """What the random streams gave.

    Attributes:
        first: numbers by stream, before a second set-up.
        second: as many, after it.
        whole: as many as both in one go, after a teardown and a set-up.
        same: the same of another strategy of the same seed.
        other: the same of a strategy of another seed.
    """

    first: dict[str, list[float]]
    second: dict[str, list[float]]
    whole: dict[str, list[float]]
    same: dict[str, list[float]]
    other: dict[str, list[float]]


def _seen_files(rank: Rank, case: BarrierCase) -> list[int]:
    strategy, counts = rank.build(rank.config), list[int]()
    strategy.setup_distributed()
    for number in range(case.rounds):
        (rank.directory / f"{number}-{rank.rank}").write_text(str(rank.rank), encoding="ascii")
        strategy.barrier()
        counts.append(len(list(rank.directory.glob(f"{number}-*"))))
    return counts


def _barrier_cases(world_size: int) -> SearchStrategy[BarrierCase]:
    del world_size
    return st.builds(BarrierCase, rounds=st.integers(1, 3))


def _orders_effects(harness: Harness, case: BarrierCase) -> None:
    for rank, counts in enumerate(harness.run(_seen_files, case)):
        if counts != [harness.world_size] * case.rounds:
            raise LawError(
                f"every rank wrote a file before the barrier; after it, rank {rank} saw {counts} files in its rounds, "
                f"and must see {harness.world_size} in each."
            )


def _seen_world(rank: Rank, case: SeedCase) -> SeenWorld:
    strategy = rank.build(attrs.evolve(rank.config, seed=case.seed))
    strategy.teardown()  # without a set-up, it does nothing
    refusal = ""
    try:
        strategy.setup_distributed(case.bad_timeout)
    except ConfigError as error:
        refusal = str(error)
    worlds = [strategy.setup_distributed(case.timeout), strategy.setup_distributed(timedelta(seconds=case.timeout))]
    number, is_first = strategy.get_rank(), strategy.is_rank_0()
    strategy.barrier()
    strategy.teardown()
    strategy.teardown()
    worlds.append(strategy.setup_distributed())
    strategy.barrier()
    return SeenWorld(worlds=worlds, rank=number, is_rank_0=is_first, refusal=refusal)


def _seed_cases(world_size: int) -> SearchStrategy[SeedCase]:
    del world_size
    return st.builds(
        SeedCase,
        seed=st.integers(0, 3),
        other=st.integers(4, 2**40),
        count=st.integers(1, 3),
        timeout=st.floats(60, 3600),
        bad_timeout=st.sampled_from([0.0, -0.0, -1.0, float("-inf"), float("nan")]),
    )


def _is_placed(harness: Harness, case: SeedCase) -> None:
    size = harness.world_size
    for rank, seen in enumerate(harness.run(_seen_world, case)):
        if not seen.refusal:
            raise LawError(f"timeout={case.bad_timeout!r} must raise ConfigError on rank {rank}, and was accepted.")
        first = seen.worlds[0]
        if any(world != first for world in seen.worlds):
            raise LawError(f"set-ups on rank {rank} returned {seen.worlds}, which must be equal.")
        if (first.rank, first.world_size, seen.rank, seen.is_rank_0) != (rank, size, rank, rank == 0):
            raise LawError(
                f"rank {rank} of {size} got {first}, get_rank()={seen.rank} and is_rank_0()={seen.is_rank_0}."
            )
        if not 0 <= first.local_rank < size:
            raise LawError(f"local_rank={first.local_rank} on rank {rank} is none of {size} processes.")
        torch.device(first.device)  # raises RuntimeError for what torch does not write


def _seen_streams(rank: Rank, case: SeedCase) -> SeenStreams:
    strategy = rank.build(attrs.evolve(rank.config, seed=case.seed))
    strategy.setup_distributed()
    first = _drawn(case.count)
    strategy.setup_distributed()
    second = _drawn(case.count)
    strategy.teardown()
    return SeenStreams(
        first=first,
        second=second,
        whole=_drawn_after_setup(strategy, 2 * case.count),
        same=_drawn_after_setup(rank.build(attrs.evolve(rank.config, seed=case.seed)), 2 * case.count),
        other=_drawn_after_setup(rank.build(attrs.evolve(rank.config, seed=case.other)), 2 * case.count),
    )


def _drawn_after_setup(strategy: Strategy, count: int) -> dict[str, list[float]]:
    strategy.setup_distributed()
    drawn = _drawn(count)
    strategy.teardown()
    return drawn


def _drawn(count: int) -> dict[str, list[float]]:
    drawn = {
        "torch": [torch.rand(()).item() for _ in range(count)],
        "random": [random.random() for _ in range(count)],  # noqa: S311 (the stream itself is looked at)
    }
    numpy = sys.modules.get("numpy")  # seeded where it is loaded
    return drawn if numpy is None else {**drawn, "numpy": [float(numpy.random.random()) for _ in range(count)]}


def _seeds(harness: Harness, case: SeedCase) -> None:
    every = harness.run(_seen_streams, case)
    for rank, seen in enumerate(every):
        for stream, whole in seen.whole.items():
            where = f"stream {stream!r} on rank {rank} with seed={case.seed}"
            if [*seen.first[stream], *seen.second[stream]] != whole:
                raise LawError(
                    f"{where} gave {seen.first[stream]}, after a second set-up {seen.second[stream]}, and after a "
                    f"teardown {whole}; a second set-up must not seed, and one after a teardown must seed the same."
                )
            if seen.same[stream] != whole:
                raise LawError(f"{where} gave {whole}, and of another strategy of equal config {seen.same[stream]}.")
            if seen.other[stream] == whole:
                raise LawError(f"{where} gave {whole}, and the same with seed={case.other}.")
            if any(other.whole[stream] == whole for other in every[:rank]):
                raise LawError(f"{where} gave {whole}, and the same on another rank.")


def _printed(rank: Rank, case: PrintCase) -> str:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    with contextlib.redirect_stdout(io.StringIO()) as output:  # no rank waits inside, so it is this rank's alone
        strategy.print(*case.texts, *case.numbers)
    return output.getvalue()


def _print_cases(world_size: int) -> SearchStrategy[PrintCase]:
    del world_size
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    return st.builds(
        PrintCase,
        texts=st.lists(texts, max_size=3).map(tuple),
        numbers=st.lists(st.integers(), max_size=2).map(tuple),
    )


def _prints_once(harness: Harness, case: PrintCase) -> None:
    line = " ".join(map(str, (*case.texts, *case.numbers))) + "\n"
    for rank, printed in enumerate(harness.run(_printed, case)):
        wanted = "" if rank else line
        if printed != wanted:
            raise LawError(f"rank {rank} printed {printed!r} and must print {wanted!r}.")


LAWS: tuple[Law, ...] = (
    Law(
        id="collectives.barrier",
        statement="What a rank wrote before a barrier is seen by all ranks after it.",
        check=for_all(_barrier_cases, _orders_effects),
        worlds="several",
    ),
    Law(
        id="collectives.world",
        statement="setup_distributed tells every rank its place, again and again; a second teardown does nothing.",
        check=for_all(_seed_cases, _is_placed),
    ),
    Law(
        id="collectives.seeds",
        statement="Random streams are a function of seed and rank, and only the first set-up seeds them.",
        check=for_all(_seed_cases, _seeds),
    ),
    Law(
        id="collectives.print",
        statement="print prints on rank 0 alone, as Python's own does.",
        check=for_all(_print_cases, _prints_once),
    ),
)
"""Laws of the section "collectives" about the process itself."""
