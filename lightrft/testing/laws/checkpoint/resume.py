"""Laws: a resumed run is the uninterrupted one, and saving is not seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import nn

from lightrft.errors import LawError
from lightrft.strategy.protocols import Json
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.checkpoint.files import tree
from lightrft.testing.laws.checkpoint.refusal import Refusal, refusal_of, require_refused
from lightrft.testing.laws.checkpoint.runs import (
    RunCase,
    Trace,
    begin,
    continue_data,
    data_state,
    load,
    require_equal_traces,
    run_cases,
    save,
    trace,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@attrs.frozen(kw_only=True)
class ResumeCase:
    """A run that is stopped and resumed.

    Attributes:
        run: the run.
        before: micro-batches before it is saved, at any position of a window.
        after: micro-batches after it.
        wasted: micro-batches that the run it is loaded into has done on its own.
    """

    run: RunCase
    before: int
    after: int
    wasted: int


@attrs.frozen(kw_only=True)
class Resumed:
    """What is seen of the same stretch, without and after an interruption."""

    uninterrupted: Trace
    resumed: Trace
    step: int


@st.composite
def _resume_case(draw: DrawFn) -> ResumeCase:
    run = draw(run_cases())
    return ResumeCase(
        run=run,
        before=draw(st.integers(0, 2 * run.accumulation_steps + 1)),
        # far enough to see by what rate the second step is done
        after=draw(st.integers(run.accumulation_steps, 2 * run.accumulation_steps + 1)),
        wasted=draw(st.integers(0, 2)),
    )


def _resume_cases(world_size: int, /) -> SearchStrategy[ResumeCase]:
    del world_size
    return _resume_case()


def _resume(rank: Rank, case: ResumeCase) -> Resumed:
    live = begin(rank, case.run)
    trace(live, case.before)
    save(live, rank.directory / "run", step=case.before, client_state={"data": data_state(live)})
    uninterrupted = trace(live, case.after)
    fresh = begin(rank, case.run, seed=case.run.seed + 1)
    trace(fresh, case.wasted)
    loaded = load(fresh, rank.directory / "run")
    fresh = continue_data(fresh, loaded.client_state.get("data", {"epoch": 0, "position": 0}))
    return Resumed(uninterrupted=uninterrupted, resumed=trace(fresh, case.after), step=loaded.step)


def _resume_holds(harness: Harness, case: ResumeCase) -> None:
    for rank, seen in enumerate(harness.run(_resume, case)):
        if seen.step != case.before:
            raise LawError(f"rank {rank}: step {seen.step} was loaded; the newest is {case.before}.")
        require_equal_traces(
            seen.resumed, seen.uninterrupted, f"rank {rank}, resumed after {case.before} micro-batches"
        )


@attrs.frozen(kw_only=True)
class SavingCase:
    """A run that is saved now and then.

    Attributes:
        run: the run.
        micro_batches: how many it has.
        saved: before which of them it is saved.
    """

    run: RunCase
    micro_batches: int
    saved: tuple[int, ...]


@attrs.frozen(kw_only=True)
class Saved:
    """What is seen of a run, without and with saving."""

    without: Trace
    with_saving: Trace


@st.composite
def _saving_case(draw: DrawFn) -> SavingCase:
    micro_batches = draw(st.sampled_from([3, 2, 4, 1]))
    saved = draw(st.sets(st.integers(0, micro_batches - 1), min_size=1))
    return SavingCase(run=draw(run_cases()), micro_batches=micro_batches, saved=tuple(sorted(saved)))


def _saving_cases(world_size: int, /) -> SearchStrategy[SavingCase]:
    del world_size
    return _saving_case()


def _saving(rank: Rank, case: SavingCase) -> Saved:
    without = trace(begin(rank, case.run), case.micro_batches)
    live = begin(rank, case.run)

    def save_it() -> None:
        save(live, rank.directory / "run", client_state={"data": data_state(live)})

    return Saved(without=without, with_saving=trace(live, case.micro_batches, at=dict.fromkeys(case.saved, save_it)))


def _saving_holds(harness: Harness, case: SavingCase) -> None:
    for rank, seen in enumerate(harness.run(_saving, case)):
        require_equal_traces(seen.with_saving, seen.without, f"rank {rank}, saved before micro-batches {case.saved}")


@attrs.frozen(kw_only=True)
class ClientStateCase:
    """What a user saves beside a model, as the text of a JSON object."""

    text: str


_KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(["$int", "$float", "__class__"])
_EDGES = st.sampled_from([-0.0, 5e-324, -5e-324, 2.2250738585072009e-308, 0.1, 1.7976931348623157e308, 2**53 + 1])
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_NUMBERS = st.integers() | st.integers(-(2**200), 2**200) | _EDGES | _FLOATS
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=6,
)


def _client_state_cases(world_size: int, /) -> SearchStrategy[ClientStateCase]:
    del world_size
    return st.dictionaries(_KEYS, _NUMBERS | _VALUES, min_size=1, max_size=4).map(_client_state_case)


def _client_state_case(state: Mapping[str, object]) -> ClientStateCase:
    return ClientStateCase(text=_text(state))


def _text(state: Mapping[str, object]) -> str:
    return json.dumps(state, sort_keys=True)  # tells 1, 1.0 and true apart, and gives every bit of a float


def _client_state(rank: Rank, case: ClientStateCase) -> str:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model = strategy.prepare(nn.Linear(1, 1))
    strategy.save_ckpt(model, rank.directory / "run", client_state=cast("dict[str, Json]", json.loads(case.text)))
    return _text(strategy.load_ckpt(model, rank.directory / "run").client_state)


def _client_state_holds(harness: Harness, case: ClientStateCase) -> None:
    for rank, seen in enumerate(harness.run(_client_state, case)):
        if seen != case.text:
            raise LawError(f"rank {rank}: client_state came back as {seen} and must be {case.text}.")


@attrs.frozen(kw_only=True)
class NotFiniteCase:
    """A float that is no finite number, as `float` reads it."""

    text: str


@attrs.frozen(kw_only=True)
class SavedOrRefused:
    """What came back from a checkpoint, or why nothing was written."""

    text: str
    refusal: Refusal | None


def _not_finite_cases(world_size: int, /) -> SearchStrategy[NotFiniteCase]:
    del world_size
    return st.builds(NotFiniteCase, text=st.sampled_from(["nan", "inf", "-inf"]))


def _not_finite(rank: Rank, case: NotFiniteCase) -> SavedOrRefused:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model, directory = strategy.prepare(nn.Linear(1, 1)), rank.directory / "run"
    state: dict[str, Json] = {"culprit": [float(case.text)]}
    refusal = refusal_of(lambda: strategy.save_ckpt(model, directory, client_state=state))
    text = "" if refusal is not None else _text(strategy.load_ckpt(model, directory).client_state)
    return SavedOrRefused(text=text, refusal=refusal)


def _not_finite_holds(harness: Harness, case: NotFiniteCase) -> None:
    must = _text({"culprit": [float(case.text)]})
    for rank, seen in enumerate(harness.run(_not_finite, case)):
        what = f"rank {rank}: saving {case.text} as client_state"
        if seen.refusal is not None:
            require_refused(seen.refusal, what, kind="ConfigError", named=("culprit",))
        elif seen.text != must:
            raise LawError(f"{what} gave {seen.text}; it must be {must}, or a ConfigError.")


_UNWRITABLE: Mapping[str, object] = {
    "set": {1},
    "frozenset": frozenset({1}),
    "tuple": (1, 2),
    "bytes": b"x",
    "complex": 1j,
    "object": object(),
    "key": {1: "x"},
    "tensor": torch.zeros(2),
}
"""What JSON cannot hold."""


@attrs.frozen(kw_only=True)
class UnwritableCase:
    """Something that JSON cannot hold, in a table of the user's.

    Attributes:
        kind: which.
        depth: lists around it.
    """

    kind: str
    depth: int


@attrs.frozen(kw_only=True)
class Unwritten:
    """What came of saving it."""

    refusal: Refusal | None
    before: dict[str, str]
    after: dict[str, str]


def _unwritable_cases(world_size: int, /) -> SearchStrategy[UnwritableCase]:
    del world_size
    return st.builds(UnwritableCase, kind=st.sampled_from(sorted(_UNWRITABLE)), depth=st.integers(0, 2))


def _unwritable(rank: Rank, case: UnwritableCase) -> Unwritten:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model, directory = strategy.prepare(nn.Linear(1, 1)), rank.directory / "run"
    strategy.save_ckpt(model, directory)
    before = tree(directory)
    value = _UNWRITABLE[case.kind]
    for _ in range(case.depth):
        value = [value]
    state = cast("dict[str, Json]", {"fine": 1, "culprit": value})
    refusal = refusal_of(lambda: strategy.save_ckpt(model, directory, client_state=state, max_num=1))
    strategy.barrier()
    return Unwritten(refusal=refusal, before=before, after=tree(directory))


def _unwritable_holds(harness: Harness, case: UnwritableCase) -> None:
    for rank, seen in enumerate(harness.run(_unwritable, case)):
        what = f"rank {rank}: saving a {case.kind} as client_state"
        require_refused(seen.refusal, what, kind="ConfigError", named=("culprit",))
        if seen.before != seen.after:
            raise LawError(f"{what} was refused and left {sorted(seen.after)}; it must leave {sorted(seen.before)}.")


LAWS: tuple[Law, ...] = (
    Law(
        id="checkpoint.resume",
        statement="A run that is saved at any micro-batch and loaded into new models, optimizers, schedules and data "
        "goes on like the uninterrupted one, bit for bit, with the random streams of every rank.",
        check=for_all(_resume_cases, _resume_holds),
    ),
    Law(
        id="checkpoint.saving_changes_nothing",
        statement="A run that is saved at any micro-batches equals, bit for bit, the same run without saving.",
        check=for_all(_saving_cases, _saving_holds),
    ),
    Law(
        id="checkpoint.client_state",
        statement="Whatever JSON can hold comes back from a checkpoint as it was: any text, integers of any size, "
        "every bit of a float.",
        check=for_all(_client_state_cases, _client_state_holds),
    ),
    Law(
        id="checkpoint.client_state_not_finite",
        statement="NaN and infinities of client_state, which strict JSON lacks, come back as they were or are a "
        "ConfigError that names their path.",
        check=for_all(_not_finite_cases, _not_finite_holds),
    ),
    Law(
        id="checkpoint.client_state_refused",
        statement="What JSON cannot hold is a ConfigError that names its path, and nothing is written.",
        check=for_all(_unwritable_cases, _unwritable_holds),
    ),
)
"""The laws of this module."""
