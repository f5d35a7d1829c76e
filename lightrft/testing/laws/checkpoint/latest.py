"""Laws: which checkpoint is found, and which step is refused."""

from __future__ import annotations

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
    saved_and_loaded,
    started,
    tiny,
    tree,
    turn_ages,
)
from lightrft.testing.laws.checkpoint.refusal import Refusal, refusal_of, require_refused
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@attrs.frozen(kw_only=True)
class LatestCase:
    """Checkpoints, and what else stands in their directory.

    Attributes:
        steps: of the checkpoints, in the order of saving.
        foreign: names of what others left there.
    """

    steps: tuple[int, ...]
    foreign: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Found:
    """What is found.

    Attributes:
        nowhere: the newest step of a directory that does not exist, and of one where nothing of ours is.
        refused_nowhere: error of loading there.
        paths: names of what `save_ckpt` returned.
        latest: the newest step.
        newest: what is loaded without a step.
        each: what is loaded by its step.
        missing: error of a step that is not there.
        existing: error of saving a step that is there.
        before: the directory before that.
        after: and after it.
        then: what is loaded after saving without a step.
    """

    nowhere: tuple[int | None, int | None]
    refused_nowhere: Refusal | None
    paths: tuple[str, ...]
    latest: int | None
    newest: Loaded
    each: tuple[Loaded, ...]
    missing: Refusal | None
    existing: Refusal | None
    before: dict[str, str]
    after: dict[str, str]
    then: Loaded


_MISSING = 777
_STEPS = st.sampled_from([1, 2, 3, 9, 10, 11, 99, 100, 101, 1000, 123_456_789])


@st.composite
def _latest_case(draw: DrawFn) -> LatestCase:
    steps = draw(st.lists(_STEPS, min_size=1, max_size=3, unique=True))
    return LatestCase(steps=tuple(steps), foreign=draw(foreign_names()))


def _latest_cases(world_size: int, /) -> SearchStrategy[LatestCase]:
    del world_size
    return _latest_case()


def _latest(rank: Rank, case: LatestCase) -> Found:
    strategy, directory = started(rank), rank.directory / "run"
    absent = strategy.latest_ckpt(directory)
    on_first_rank(rank, strategy, put_foreign, directory, case.foreign)
    nowhere = (absent, strategy.latest_ckpt(directory))
    refused_nowhere = refusal_of(lambda: strategy.load_ckpt(tiny(strategy, 0), directory))
    paths = [strategy.save_ckpt(tiny(strategy, step), directory, step=step) for step in case.steps]
    on_first_rank(rank, strategy, turn_ages, [path for _, path in sorted(zip(case.steps, paths, strict=True))])
    latest, newest = strategy.latest_ckpt(directory), loaded(strategy, directory)
    each = tuple(loaded(strategy, directory, step=step) for step in case.steps)
    missing = refusal_of(lambda: strategy.load_ckpt(tiny(strategy, 0), directory, step=_MISSING))
    before = tree(directory)
    existing = refusal_of(lambda: strategy.save_ckpt(tiny(strategy, 0), directory, step=case.steps[0], max_num=1))
    strategy.barrier()
    after = tree(directory)
    return Found(
        nowhere=nowhere,
        refused_nowhere=refused_nowhere,
        paths=tuple(path.name for path in paths),
        latest=latest,
        newest=newest,
        each=each,
        missing=missing,
        existing=existing,
        before=before,
        after=after,
        then=saved_and_loaded(strategy, directory, max(case.steps) + 1),
    )


def _latest_holds(harness: Harness, case: LatestCase) -> None:
    for rank, seen in enumerate(harness.run(_latest, case)):
        newest = max(case.steps)
        if seen.nowhere != (None, None):
            raise LawError(
                f"rank {rank}: without a checkpoint latest_ckpt returns {seen.nowhere}; it must return None."
            )
        require_refused(seen.refused_nowhere, f"rank {rank}: loading without a checkpoint", named=("",))
        for step, name in zip(case.steps, seen.paths, strict=True):
            prefix, _, number = name.partition("-")
            if prefix != "step" or not number.isdecimal() or int(number) != step:
                raise LawError(f"rank {rank}: step {step} is saved as {name!r}; it must be step-{step}.")
        if seen.latest != newest:
            raise LawError(f"rank {rank}: of the steps {case.steps} latest_ckpt returns {seen.latest}, not {newest}.")
        require_loaded(seen.newest, newest, f"rank {rank}: loading the newest of {case.steps}")
        for step, name, one in zip(case.steps, seen.paths, seen.each, strict=True):
            require_loaded(one, step, f"rank {rank}: loading step {step}")
            if one.path != name:
                raise LawError(f"rank {rank}: step {step} was saved as {name} and loaded from {one.path}.")
        require_refused(seen.missing, f"rank {rank}: loading a step that is not there", named=(str(_MISSING),))
        for step in case.steps:
            require_refused(seen.missing, f"rank {rank}: loading a step that is not there", named=(str(step),))
        require_refused(seen.existing, f"rank {rank}: saving a step again", named=(str(case.steps[0]),))
        if seen.before != seen.after:
            raise LawError(f"rank {rank}: saving a step again was refused and changed the directory; it must not.")
        require_loaded(seen.then, newest + 1, f"rank {rank}: saving without a step, then loading the newest")


LAWS: tuple[Law, ...] = (
    Law(
        id="checkpoint.latest",
        statement="The newest checkpoint is the one of the largest step, whatever its age and whatever else stands "
        "there; a step that is missing, and one that exists, are errors that change nothing.",
        check=for_all(_latest_cases, _latest_holds),
    ),
)
"""The laws of this module."""
