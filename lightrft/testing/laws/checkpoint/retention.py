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

_LINKED = 1
"""Step of a checkpoint that stands elsewhere; it is older than all others."""


@attrs.frozen(kw_only=True)
class RetentionCase:
    """Checkpoints that are saved in turn, and how many stay.

    Attributes:
        steps: their numbers; a run that was resumed from an old one saves older steps beside newer ones.
        max_num: what each save was told; None keeps all.
        foreign: names of what others left there.
    """

    steps: tuple[int, ...]
    max_num: tuple[int | None, ...]
    foreign: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Retained:
    """What stays.

    Attributes:
        kept: steps whose directories are there, after each save.
        each: what is loaded of the last of these, by step.
        before: what others left there, with a copy of a checkpoint and a link to one that stands elsewhere.
        after: the same at the end.
    """

    kept: tuple[tuple[int, ...], ...]
    each: tuple[Loaded, ...]
    before: dict[str, str]
    after: dict[str, str]


@st.composite
def _retention_case(draw: DrawFn) -> RetentionCase:
    length = draw(st.integers(2, 5))
    gaps = draw(st.lists(st.sampled_from([1, 4, 89]), min_size=length, max_size=length))
    steps = [_LINKED + sum(gaps[: index + 1]) for index in range(length)]
    return RetentionCase(
        steps=tuple(draw(st.sampled_from([steps, steps[::-1]]) | st.permutations(steps))),
        max_num=tuple(draw(st.lists(st.sampled_from([1, 2, 2, 3, None]), min_size=length, max_size=length))),
        foreign=draw(foreign_names()),
    )


def _retention_cases(world_size: int, /) -> SearchStrategy[RetentionCase]:
    del world_size
    return _retention_case()


def _retention(rank: Rank, case: RetentionCase) -> Retained:
    strategy, directory = started(rank), rank.directory / "run"
    linked = strategy.save_ckpt(tiny(strategy, _LINKED), rank.directory / "elsewhere", step=_LINKED)
    paths: dict[int, Path] = {}
    kept: list[tuple[int, ...]] = []
    before: dict[str, str] = {}
    for step, max_num in zip(case.steps, case.max_num, strict=True):
        saved = strategy.save_ckpt(tiny(strategy, step), directory, step=step, max_num=max_num)
        strategy.barrier()
        paths[step] = saved
        kept.append(tuple(sorted(step for step, path in paths.items() if path.exists())))
        if len(kept) == 1:
            on_first_rank(rank, strategy, put_foreign, directory, case.foreign)
            on_first_rank(rank, strategy, shutil.copytree, saved, directory / "best")
            on_first_rank(rank, strategy, (directory / linked.name).symlink_to, linked)
            before = _foreign_tree(rank.directory, linked.name, case)
        on_first_rank(rank, strategy, turn_ages, [paths[step] for step in kept[-1]])
    each = tuple(loaded(strategy, directory, step=step) for step in kept[-1])
    return Retained(kept=tuple(kept), each=each, before=before, after=_foreign_tree(rank.directory, linked.name, case))


def _foreign_tree(directory: Path, link: str, case: RetentionCase) -> dict[str, str]:
    roots = ("best", link, *(name.split("/")[0] for name in case.foreign))
    beside = {path: content for path, content in tree(directory / "run").items() if path.split("/")[0] in roots}
    return {**beside, **{f"../{path}": content for path, content in tree(directory / "elsewhere").items()}}


def _retention_holds(harness: Harness, case: RetentionCase) -> None:
    must: list[int] = []
    expected: list[tuple[int, ...]] = []
    for step, max_num in zip(case.steps, case.max_num, strict=True):
        newest = sorted([*must, step])[-max_num if max_num is not None else 0 :]
        must = sorted({*newest, step})  # whoever is handed a path finds it, also where newer steps stand beside it
        expected.append(tuple(must))
    for rank, seen in enumerate(harness.run(_retention, case)):
        if seen.kept != tuple(expected):
            raise LawError(
                f"rank {rank}: after saving {case.steps} with max_num={case.max_num} {seen.kept} stay; "
                f"it must be {expected}."
            )
        for step, one in zip(must, seen.each, strict=True):
            require_loaded(one, step, f"rank {rank}: loading step {step}, which stayed")
        if seen.before != seen.after:
            raise LawError(f"rank {rank}: {_changed(seen.before, seen.after)} is not the strategy's and was changed.")


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


LAWS: tuple[Law, ...] = (
    Law(
        id="checkpoint.retention",
        statement="After each save exactly the newest max_num checkpoints stay, the one just saved, and whatever "
        "others left there, links to checkpoints with it.",
        check=for_all(_retention_cases, _retention_holds),
    ),
)
"""The laws of this module."""
