"""Laws: which checkpoints stay."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.errors import LawError
from lightrft.strategy.record import Strategy
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
class Saved:
    """A checkpoint, and which ones its save was told to leave there.

    Attributes:
        step: its number; a run that was resumed from an old one saves older steps beside newer ones.
        metric: how good it is.
        padding: bytes that are saved with it, so that checkpoints differ in size.
        max_num: how many newest ones stay.
        max_kilobytes: how many thousand bytes stay.
        keep_every: multiples of it stay.
        keep_best: so many with the largest metric stay.
    """

    step: int
    metric: float | None
    padding: int
    max_num: int | None
    max_kilobytes: int | None
    keep_every: int
    keep_best: int


@attrs.frozen(kw_only=True)
class RetentionCase:
    """Checkpoints that are saved in turn.

    Attributes:
        saves: one after the other.
        foreign: names of what others left there.
    """

    saves: tuple[Saved, ...]
    foreign: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Retained:
    """What stays.

    Attributes:
        kept: steps whose directories are there, after each save.
        sizes: bytes of the files of each checkpoint, in the order of saving.
        each: what is loaded of those that are there in the end, by step.
        before: what others left there, with a copy of a checkpoint and a link to one that stands elsewhere.
        after: the same at the end.
    """

    kept: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    each: tuple[Loaded, ...]
    before: dict[str, str]
    after: dict[str, str]


_METRICS = st.sampled_from([None, -2.5, 0.0, 0.0, 0.125, 1e300])
"""Some are equal, and zero is a metric like any other."""


@st.composite
def _retention_case(draw: DrawFn) -> RetentionCase:
    length = draw(st.integers(2, 5))
    gaps = draw(st.lists(st.sampled_from([1, 4, 89]), min_size=length, max_size=length))
    steps = [_LINKED + sum(gaps[: index + 1]) for index in range(length)]
    order = draw(st.sampled_from([steps, steps[::-1]]) | st.permutations(steps))
    has_rules = draw(st.booleans())
    saves = [
        Saved(
            step=step,
            metric=draw(_METRICS) if has_rules else None,
            padding=draw(st.integers(0, 30_000)),
            max_num=draw(st.sampled_from([1, 2, 2, 3, None])),
            max_kilobytes=draw(st.none() | st.integers(0, 90)),
            keep_every=draw(st.sampled_from([0, 2, 5])) if has_rules else 0,
            keep_best=draw(st.sampled_from([0, 1, 2])) if has_rules else 0,
        )
        for step in order
    ]
    return RetentionCase(saves=tuple(saves), foreign=draw(foreign_names()))


def _retention_cases(world_size: int, /) -> SearchStrategy[RetentionCase]:
    del world_size
    return _retention_case()


def _save(strategy: Strategy, directory: Path, save: Saved) -> Path:
    return strategy.save_ckpt(
        tiny(strategy, save.step),
        directory,
        step=save.step,
        client_state={"padding": "x" * save.padding},
        max_num=save.max_num,
        max_mem=None if save.max_kilobytes is None else save.max_kilobytes * 1e-6,
        keep_every=save.keep_every,
        keep_best=save.keep_best,
        metric=save.metric,
    )


def _retention(rank: Rank, case: RetentionCase) -> Retained:
    strategy, directory = started(rank), rank.directory / "run"
    linked = strategy.save_ckpt(tiny(strategy, _LINKED), rank.directory / "elsewhere", step=_LINKED)
    paths: dict[int, Path] = {}
    kept: list[tuple[int, ...]] = []
    sizes: list[int] = []
    before: dict[str, str] = {}
    for save in case.saves:
        saved = _save(strategy, directory, save)
        strategy.barrier()
        paths[save.step] = saved
        kept.append(tuple(sorted(step for step, path in paths.items() if path.exists())))
        sizes.append(sum(file.stat().st_size for file in saved.rglob("*") if file.is_file()))
        if len(kept) == 1:
            on_first_rank(rank, strategy, put_foreign, directory, case.foreign)
            on_first_rank(rank, strategy, shutil.copytree, saved, directory / "best")
            on_first_rank(rank, strategy, (directory / linked.name).symlink_to, linked)
            before = _foreign_tree(rank.directory, linked.name, case)
        on_first_rank(rank, strategy, turn_ages, [paths[step] for step in kept[-1]])
    return Retained(
        kept=tuple(kept),
        sizes=tuple(sizes),
        each=tuple(loaded(strategy, directory, step=step) for step in kept[-1]),
        before=before,
        after=_foreign_tree(rank.directory, linked.name, case),
    )


def _foreign_tree(directory: Path, link: str, case: RetentionCase) -> dict[str, str]:
    roots = ("best", link, *(name.split("/")[0] for name in case.foreign))
    beside = {path: content for path, content in tree(directory / "run").items() if path.split("/")[0] in roots}
    return {**beside, **{f"../{path}": content for path, content in tree(directory / "elsewhere").items()}}


def _retention_holds(harness: Harness, case: RetentionCase) -> None:
    for rank, seen in enumerate(harness.run(_retention, case)):
        expected = _expected(case.saves, seen.sizes)
        for save, found, must in zip(case.saves, seen.kept, expected, strict=True):
            if found != must:
                raise LawError(f"rank {rank}: after {save} the steps {found} stay; it must be {must} of {case.saves}.")
        for step, one in zip(expected[-1], seen.each, strict=True):
            require_loaded(one, step, f"rank {rank}: loading step {step}, which stayed")
        if seen.before != seen.after:
            raise LawError(f"rank {rank}: {_changed(seen.before, seen.after)} is not the strategy's and was changed.")


def _expected(saves: Sequence[Saved], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the steps that must stay after each save, by the size of each checkpoint."""
    num_bytes = {save.step: size for save, size in zip(saves, sizes, strict=True)}
    there: dict[int, Saved] = {}
    expected: list[tuple[int, ...]] = []
    for save in saves:
        there[save.step] = save
        spared = _spared(list(there.values()), save)
        there = {
            step: one for step, one in there.items() if step in spared or _fits(step, there, spared, num_bytes, save)
        }
        expected.append(tuple(sorted(there)))
    return expected


def _spared(there: Sequence[Saved], last: Saved) -> set[int]:
    ranked = sorted((one.metric, one.step) for one in there if one.metric is not None)
    return {
        last.step,  # whoever is handed a path finds it, also where newer steps stand beside it
        max(one.step for one in there),
        *(one.step for one in there if last.keep_every and one.step % last.keep_every == 0),
        *(step for _, step in ranked[::-1][: last.keep_best]),
    }


def _fits(step: int, there: Mapping[int, Saved], spared: set[int], num_bytes: Mapping[int, int], last: Saved) -> bool:
    """Return whether a step that nothing spares is within the limits: of these, newer ones come first."""
    newer = [other for other in there if other > step]
    if last.max_num is not None and len(newer) >= last.max_num:
        return False
    total = sum(num_bytes[one] for one in {*spared, *newer, step})
    return last.max_kilobytes is None or total <= 1000 * last.max_kilobytes


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


LAWS: tuple[Law, ...] = (
    Law(
        id="checkpoint.retention",
        statement="After each save exactly these checkpoints stay: the newest, the one just saved, multiples of "
        "keep_every, the keep_best best, and of the others the newest that max_num and max_mem leave room for; and "
        "whatever others left there, links to checkpoints with it.",
        check=for_all(_retention_cases, _retention_holds),
    ),
)
"""The laws of this module."""
