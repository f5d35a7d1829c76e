"""Checkpoints of a model with one weight, and what else stands in their directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ParamSpec

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from lightrft.errors import LawError
from lightrft.strategy.record import Strategy
from lightrft.testing.laws.checkpoint.refusal import refusal_of
from lightrft.testing.subject import Rank

__all__ = [
    "Loaded",
    "foreign_names",
    "loaded",
    "on_first_rank",
    "put_foreign",
    "require_loaded",
    "saved_and_loaded",
    "started",
    "tiny",
    "tree",
    "turn_ages",
]

_P = ParamSpec("_P")


@attrs.frozen(kw_only=True)
class Loaded:
    """What came of loading a checkpoint of `tiny`.

    Attributes:
        step: that was loaded; None if none was.
        value: of the weight; `value_of` the step if all is well.
        path: name of the directory.
        error: why nothing was loaded, or None.
    """

    step: int | None
    value: float | None
    path: str | None
    error: str | None


def tree(directory: Path) -> dict[str, str]:
    """Return what stands in a directory: for each path the digest of its content.

    Args:
        directory: where to look; it need not exist.
    """
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for path in sorted(directory.rglob("*"))
    }


def value_of(step: int) -> float:
    """Return the weight of the model that a step is saved with; float32 holds it.

    Args:
        step: of the checkpoint.
    """
    return float(step % 4095)


def tiny(strategy: Strategy, step: int) -> nn.Module:
    """Return a prepared model whose one weight tells the step.

    Args:
        strategy: what prepares it.
        step: that it is saved as.
    """
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(value_of(step))
    return strategy.prepare(model)


def loaded(strategy: Strategy, directory: Path, *, step: int | None = None) -> Loaded:
    """Load a checkpoint into a new tiny model and return what came of it.

    Args:
        strategy: what loads.
        directory: of the checkpoints.
        step: which; None takes the newest.
    """
    model = tiny(strategy, -1)  # no step has its value
    try:
        found = strategy.load_ckpt(model, directory, step=step)
    except Exception as error:  # noqa: BLE001 (what is refused is evidence)
        return Loaded(step=None, value=None, path=None, error=f"{type(error).__name__}: {error}")
    ((_, weight),) = strategy.named_tensors(model)
    return Loaded(step=found.step, value=float(weight), path=found.path.name, error=None)


def saved_and_loaded(strategy: Strategy, directory: Path, step: int) -> Loaded:
    """Save a tiny model without naming its step, and return what comes of loading the newest checkpoint.

    Args:
        strategy: what saves and loads.
        directory: of the checkpoints.
        step: that the checkpoint must get.
    """
    refusal = refusal_of(lambda: strategy.save_ckpt(tiny(strategy, step), directory))
    if refusal is not None:
        return Loaded(step=None, value=None, path=None, error=f"{refusal.kinds[0]}: {refusal.message}")
    return loaded(strategy, directory)


def require_loaded(seen: Loaded, step: int, what: str) -> None:
    """Check that a checkpoint of `tiny` was found and is whole.

    Args:
        seen: what came of loading it.
        step: of the checkpoint.
        what: what was done, in words.

    Raises:
        LawError: it was not.
    """
    if (seen.step, seen.value) != (step, value_of(step)):
        reason = seen.error or f"gave step {seen.step} with the weight {seen.value}"
        raise LawError(f"{what}: {reason}; it must be step {step} as it was saved.")


def started(rank: Rank) -> Strategy:
    """Return a strategy that is set up.

    Args:
        rank: where.
    """
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    return strategy


def on_first_rank(
    rank: Rank, strategy: Strategy, action: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs
) -> None:
    """Do something to the disk on the first rank while the others wait.

    Args:
        rank: this one.
        strategy: whose ranks they are.
        action: what to do.
        args: its arguments.
        kwargs: and those by name.
    """
    strategy.barrier()
    if rank.rank == 0:
        action(*args, **kwargs)
    strategy.barrier()


_FOREIGN: Mapping[str, str | None] = {
    "latest": "1",
    "latest_checkpointed_iteration.txt": "1",
    "notes.txt": "mine",
    "step-00009001": "a file of this name",
    "step-9002": None,
    "step-00009003": None,
    "step-00000000/notes.txt": "mine",
    "step-0/notes.txt": "mine",
    "step-9004.tmp/half": "half",
    ".step-00009005.tmp-0123456789abcdef/mine/notes.txt": "mine",
    "tmp-step-00009006/half": "half",
    "STEP-9007/notes.txt": "mine",
    "step-9008 (copy)/notes.txt": "mine",
    "checkpoint-9009/notes.txt": "mine",
    "global_step9010/notes.txt": "mine",
}
"""What others leave beside checkpoints: files with their content, and (None) empty directories."""


def put_foreign(directory: Path, names: tuple[str, ...]) -> None:
    """Make foreign files and directories.

    Args:
        directory: where.
        names: which.
    """
    for name in names:
        path, content = directory / name, _FOREIGN[name]
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_text(content)


def foreign_names() -> SearchStrategy[tuple[str, ...]]:
    """Return a strategy for names of what others leave beside checkpoints."""
    return st.sets(st.sampled_from(sorted(_FOREIGN)), max_size=4).map(_sorted)


def _sorted(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


def turn_ages(paths: list[Path]) -> None:
    """Make the first the youngest by its time, and so on: the order of times is no order of steps.

    Args:
        paths: checkpoints.
    """
    for age, path in enumerate(paths):
        for found in (path, *path.rglob("*")):
            os.utime(found, (1e9 - 1000 * age, 1e9 - 1000 * age))
