"""Laws: which checkpoints stay."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.errors import LawError
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.checkpoint.files import (
    Loaded,
    foreign_names,
    loaded,
    on_first_rank,
    put_foreign,
    require_loaded,
    started,
    tiny,
    tree,
    turn_ages,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@attrs.frozen(kw_only=True)
class RetentionCase:
    """Checkpoints that are saved in turn, and how many stay.

    Attributes:
        gaps: by how much each step is above the one before.
        max_num: what each save was told; None keeps all.
        foreign: names of what others left there.
    """

    gaps: tuple[int, ...]
    max_num: tuple[int | None, ...]
    foreign: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Retained:
    """What stays.

    Attributes:
        kept: steps whose directories are there, after each save.
        each: what is loaded of the last of these, by step.
        before: what others left there, a copy of a checkpoint with it.
        after: the same at the end.
    """

    kept: tuple[tuple[int, ...], ...]
    each: tuple[Loaded, ...]
    before: dict[str, str]
    after: dict[str, str]


@st.composite
def _retention_case(draw: DrawFn) -> RetentionCase:
    length = draw(st.integers(2, 5))
    return RetentionCase(
        gaps=tuple(draw(st.lists(st.sampled_from([1, 4, 89]), min_size=length, max_size=length))),
        max_num=tuple(draw(st.lists(st.sampled_from([1, 2, 2, 3, None]), min_size=length, max_size=length))),
        foreign=draw(foreign_names()),
    )


def _retention_cases(world_size: int, /) -> SearchStrategy[RetentionCase]:
    del world_size
    return _retention_case()


def _steps_of(case: RetentionCase) -> list[int]:
    return [sum(case.gaps[: index + 1]) for index in range(len(case.gaps))]


def _retention(rank: Rank, case: RetentionCase) -> Retained:
    strategy, directory = started(rank), rank.directory / "run"
    paths: dict[int, Path] = {}
    kept: list[tuple[int, ...]] = []
    before: dict[str, str] = {}
    for step, max_num in zip(_steps_of(case), case.max_num, strict=True):
        saved = strategy.save_ckpt(tiny(strategy, step), directory, step=step, max_num=max_num)
        strategy.barrier()
        paths[step] = saved
        kept.append(tuple(step for step, path in paths.items() if path.exists()))
        if len(kept) == 1:
            on_first_rank(rank, strategy, put_foreign, directory, case.foreign)
            on_first_rank(rank, strategy, shutil.copytree, saved, directory / "best")
            before = _foreign_tree(directory, case)
        on_first_rank(rank, strategy, turn_ages, [paths[step] for step in kept[-1]])
    each = tuple(loaded(strategy, directory, step=step) for step in kept[-1])
    return Retained(kept=tuple(kept), each=each, before=before, after=_foreign_tree(directory, case))


def _foreign_tree(directory: Path, case: RetentionCase) -> dict[str, str]:
    roots = ("best", *(name.split("/")[0] for name in case.foreign))
    return {path: content for path, content in tree(directory).items() if path.split("/")[0] in roots}


def _retention_holds(harness: Harness, case: RetentionCase) -> None:
    must: list[int] = []
    expected: list[tuple[int, ...]] = []
    for step, max_num in zip(_steps_of(case), case.max_num, strict=True):
        must = [*must, step][-max_num if max_num is not None else 0 :]
        expected.append(tuple(must))
    for rank, seen in enumerate(harness.run(_retention, case)):
        if seen.kept != tuple(expected):
            raise LawError(f"rank {rank}: with max_num={case.max_num} steps {seen.kept} stay; it must be {expected}.")
        for step, one in zip(must, seen.each, strict=True):
            require_loaded(one, step, f"rank {rank}: loading step {step}, which stayed")
        if seen.before != seen.after:
            raise LawError(f"rank {rank}: {_changed(seen.before, seen.after)} is not the strategy's and was changed.")


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


LAWS: tuple[Law, ...] = (
    Law(
        id="checkpoint.retention",
        statement="After each save exactly the newest max_num checkpoints stay, and whatever others left there.",
        check=for_all(_retention_cases, _retention_holds),
    ),
)
"""The laws of this module."""
