"""Laws: what is damaged or does not fit is refused, leaves the live run alone, and no file can carry code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from lightrft.strategy.protocols import Checkpointable
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.models import build_model
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.checkpoint.files import on_first_rank, started
from lightrft.testing.laws.checkpoint.refusal import Refusal, refusal_of, require_refused
from lightrft.testing.laws.checkpoint.runs import (
    Live,
    RunCase,
    Trace,
    begin,
    load,
    require_equal_traces,
    run_cases,
    save,
    trace,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS", "files_of"]

_Attempt: TypeAlias = "tuple[Callable[[Live], object], tuple[str, ...]]"
Kind: TypeAlias = Literal["flipped", "cut", "emptied", "removed", "swapped"]


@attrs.frozen(kw_only=True)
class Damage:
    """What is done to one file of a checkpoint.

    Attributes:
        file: number of the file, modulo how many there are.
        kind: what is done to it.
        place: number of the bit, or byte, modulo how many there are; negative ones count from the end.
        named: whether it is loaded by its step.
    """

    file: int
    kind: Kind
    place: int
    named: bool


@attrs.frozen(kw_only=True)
class DamageCase:
    """A checkpoint of which one file after another is damaged, and made good again.

    Attributes:
        run: what is saved, and trained on when loading is refused.
        before: micro-batches before.
        after: micro-batches after.
        damages: what is done.
    """

    run: RunCase
    before: int
    after: int
    damages: tuple[Damage, ...]


@attrs.frozen(kw_only=True)
class Refused:
    """What came of loading.

    Attributes:
        refusals: the error of each attempt, or None.
        named: texts of which each message must hold one.
        undisturbed: what the run goes on like if nothing is loaded.
        disturbed: what it went on like.
    """

    refusals: tuple[Refusal | None, ...]
    named: tuple[tuple[str, ...], ...]
    undisturbed: Trace
    disturbed: Trace


# what is refused only by those who look at every bit comes more often
_KINDS: tuple[Kind, ...] = ("flipped", "flipped", "flipped", "swapped", "swapped", "cut", "emptied", "removed")


@st.composite
def _damage_case(draw: DrawFn) -> DamageCase:
    damages = st.builds(
        Damage,
        file=st.integers(0, 2**10),
        kind=st.sampled_from(_KINDS),
        place=st.integers(-(2**20), 2**20),
        named=st.booleans(),
    )
    return DamageCase(
        run=draw(run_cases()),
        before=draw(st.integers(0, 3)),
        after=draw(st.integers(0, 2)),
        damages=tuple(draw(st.lists(damages, min_size=2, max_size=3))),
    )


def _damage_cases(world_size: int, /) -> SearchStrategy[DamageCase]:
    del world_size
    return _damage_case()


def files_of(directory: Path) -> list[Path]:
    """Return all files below a directory, in order.

    Args:
        directory: where to look.
    """
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _damaged(rank: Rank, case: DamageCase) -> Refused:
    directory = rank.directory / "run"
    live = begin(rank, case.run, seed=case.run.seed + 1)
    older = save(live, directory, step=1)
    trace(live, case.before + 1)
    path = save(live, directory, step=2)

    files = files_of(path)

    def attempt(damage: Damage) -> _Attempt:
        file = files[damage.file % len(files)]
        # a checkpoint that lost a file may look like one that was never finished, which is found by its step alone
        step = 2 if damage.named or damage.kind not in {"flipped", "swapped"} else None

        def loads(live: Live) -> object:
            content = file.read_bytes()
            on_first_rank(rank, live.strategy, _spoil, file, older / file.relative_to(path), damage)
            try:
                return load(live, directory, step=step)
            finally:
                on_first_rank(rank, live.strategy, file.write_bytes, content)

        return loads, (path.name, "step=2")

    return _refused(rank, case, [attempt(damage) for damage in case.damages])


def _spoil(file: Path, other: Path, damage: Damage) -> None:
    content = file.read_bytes()
    replaced = other.read_bytes() if damage.kind == "swapped" and other.is_file() else content
    if damage.kind == "removed" or not content:
        file.unlink()
    elif damage.kind == "emptied":
        file.write_bytes(b"")
    elif damage.kind == "cut":
        file.write_bytes(content[: damage.place % len(content)])
    elif replaced != content:
        file.write_bytes(replaced)
    else:  # flipped, and swapped where both steps have the same file
        flipped = bytearray(content)
        flipped[damage.place // 8 % len(content)] ^= 1 << damage.place % 8
        file.write_bytes(flipped)


def _refused(rank: Rank, case: DamageCase | MismatchCase, attempts: Sequence[_Attempt]) -> Refused:
    """Train the same run twice, load into the second one in the middle, and return how both went on."""
    control = begin(rank, case.run)
    trace(control, case.before)
    undisturbed = trace(control, case.after)
    live = begin(rank, case.run)
    trace(live, case.before)
    refusals = tuple(refusal_of(loads, live) for loads, _ in attempts)
    return Refused(
        refusals=refusals,
        named=tuple(named for _, named in attempts),
        undisturbed=undisturbed,
        disturbed=trace(live, case.after),
    )


def _damaged_holds(harness: Harness, case: DamageCase) -> None:
    words = [f"loading where file {damage.file} is {damage.kind}" for damage in case.damages]
    _require_all_refused(harness.run(_damaged, case), words)


def _require_all_refused(ranks: list[Refused], words: list[str]) -> None:
    for rank, seen in enumerate(ranks):
        for what, refusal, named in zip(words, seen.refusals, seen.named, strict=True):
            require_refused(refusal, f"rank {rank}: {what}", named=named)
        require_equal_traces(seen.disturbed, seen.undisturbed, f"rank {rank}, after {' and '.join(words)} was refused")


@attrs.frozen(kw_only=True)
class MismatchCase:
    """A checkpoint of something else.

    Attributes:
        run: what is loaded into.
        before: micro-batches before.
        after: micro-batches after.
        differences: how what was saved differs, each time.
    """

    run: RunCase
    before: int
    after: int
    differences: tuple[str, ...]


_DIFFERENCES: Mapping[str, tuple[str, ...]] = {
    "shape": ("odd",),
    "dtype": ("offset",),
    "missing parameter": ("odd",),
    "extra parameter": ("extra",),
    "parameter groups": ("middle.weight",),
    "missing optimizer": ("optimizer",),
    "extra optimizer": ("optimizer",),
    "missing schedule": ("schedul",),
    "extra schedule": ("schedul",),
    "other schedule": ("the schedule", "T_max", "step_size", "StepLR", "CosineAnnealingLR"),
    "AdamW for SGD": ("optimizer",),
    "SGD for AdamW": ("optimizer",),
    "ties": ("tied", "embedding.weight", "head.weight"),
    "name": ("actor", "model"),
}
"""How what was saved differs from what it is loaded into, and of what texts the error must hold one."""


_OPTIMIZERS: Mapping[str, tuple[type[SGD | AdamW], type[SGD | AdamW]]] = {
    "AdamW for SGD": (AdamW, SGD),
    "SGD for AdamW": (SGD, AdamW),
}
"""The optimizers of torch that were saved and that are loaded into."""


@st.composite
def _mismatch_case(draw: DrawFn) -> MismatchCase:
    run = draw(run_cases())
    schedule: Literal["step", "cosine"] = draw(st.sampled_from(("step", "cosine")))
    return MismatchCase(
        run=attrs.evolve(run, form="trainable", schedule=schedule, model=attrs.evolve(run.model, frozen=())),
        before=draw(st.integers(0, 3)),
        after=draw(st.integers(1, 2)),
        differences=tuple(draw(st.lists(st.sampled_from(sorted(_DIFFERENCES)), min_size=4, max_size=5, unique=True))),
    )


def _mismatch_cases(world_size: int, /) -> SearchStrategy[MismatchCase]:
    del world_size
    return _mismatch_case()


def _mismatched(rank: Rank, case: MismatchCase) -> Refused:
    strategy = started(rank)

    def attempt(difference: str) -> _Attempt:
        directory = rank.directory / difference.replace(" ", "-")

        def loads(live: Live) -> object:
            only = live.trained["model"]
            if difference in _OPTIMIZERS:
                saved, live_kind = _OPTIMIZERS[difference]
                model = strategy.prepare(build_model(attrs.evolve(case.run.model, seed=case.run.seed + 1)))
                strategy.save_ckpt(model, directory, optimizer=saved(model.parameters(), lr=0.5))
                return strategy.load_ckpt(only.model, directory, optimizer=live_kind(only.model.parameters(), lr=0.5))
            strategy.save_ckpt(_other(strategy, case.run, difference), directory)
            if difference == "extra optimizer":
                return strategy.load_ckpt(only.model, directory)
            if difference == "extra schedule":
                return strategy.load_ckpt(only._replace(scheduler=None), directory)
            return load(live, directory)

        return loads, _DIFFERENCES[difference]

    return _refused(rank, case, [attempt(difference) for difference in case.differences])


def _other(strategy: Strategy, run: RunCase, difference: str) -> Checkpointable:
    """Return what is saved: the run's like, but for one difference."""
    tied = run.model.tied != (difference == "ties")
    model = build_model(attrs.evolve(run.model, seed=run.seed + 1, tied=tied))
    if difference == "shape":
        model.odd = nn.Parameter(torch.zeros((*run.model.odd, 2)))
    elif difference == "dtype":
        model.offset = model.offset.double()  # no parameter, because a backend may train in float32 alone
    elif difference == "missing parameter":
        del model.odd
    elif difference == "extra parameter":
        model.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    elif difference == "parameter groups":
        model.middle.weight.requires_grad = False
    # with the run's own decay, because other groups of parameters would be a difference of their own
    optimizer = strategy.create_optimizer(model, lr=0.5, weight_decay=0.25)
    scheduler = None if difference == "missing schedule" else _schedule(optimizer, run, difference)
    trainable = strategy.prepare((model, optimizer, scheduler))
    if difference == "missing optimizer":
        return trainable.model
    return {"actor": trainable} if difference == "name" else trainable


def _schedule(optimizer: Optimizer, run: RunCase, difference: str) -> LRScheduler:
    is_step = (run.schedule == "step") != (difference == "other schedule")
    return StepLR(optimizer, 1) if is_step else CosineAnnealingLR(optimizer, 7)


def _mismatched_holds(harness: Harness, case: MismatchCase) -> None:
    words = [f"loading what differs ({difference})" for difference in case.differences]
    _require_all_refused(harness.run(_mismatched, case), words)


LAWS: tuple[Law, ...] = (
    Law(
        id="checkpoint.damage",
        statement="A checkpoint of which any file misses, is cut, has one bit flipped or is of another step is refused "
        "with a CheckpointError that names it, and the live run goes on as if nothing had been loaded.",
        check=for_all(_damage_cases, _damaged_holds),
    ),
    Law(
        id="checkpoint.mismatch",
        statement="A checkpoint of another structure is refused with a CheckpointError that names the difference, and "
        "the live run goes on as if nothing had been loaded.",
        check=for_all(_mismatch_cases, _mismatched_holds),
    ),
)
"""The laws of this module."""
