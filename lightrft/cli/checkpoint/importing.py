"""`lightrft checkpoint import`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from lightrft.cli.checkpoint.answer import Answer
from lightrft.cli.checkpoint.place import CHECKPOINTS_NAME
from lightrft.cli.progress import reading_bar
from lightrft.errors import CheckpointError, ConfigError, MissingPackageError
from lightrft.strategy.protocols.checkpointing import Json

if TYPE_CHECKING:
    from torch import nn

    from lightrft.backends.checkpointing.access import LiveTensor
    from lightrft.backends.checkpointing.foreign.record import ForeignModel

__all__ = ["import_checkpoint"]

_USUAL = "actor"  # what `lightrft train` calls the model that it trains
_MISSING = "missing: the schedule, the random streams and the client state, which are not read from other programs."


def import_checkpoint(args: argparse.Namespace, paths: Sequence[str]) -> Answer:
    """Write another program's checkpoint as one of ours, and return what was written and what is missing.

    Args:
        args: `step`, the source's own if None, `model`, `like` and `dry_run`.
        paths: the source, and a directory of checkpoints or that of a run.

    Raises:
        ConfigError: the source is none, or describes another model than `like`.
        CheckpointError: the source is damaged or holds more than data, or the checkpoint cannot be written.
        UnsupportedError: the source is of a kind that is not read.
    """
    from lightrft.backends.checkpointing.foreign.opening import open_foreign
    from lightrft.backends.checkpointing.foreign.writing import require_free, tables_of, write_imported

    name: str = _USUAL if args.model is None else args.model
    directory = _directory(paths[1])
    with open_foreign(Path(paths[0]), name=name) as opened:
        found, notes = _tied(opened, Path(paths[0]), args.like)
        step = _step(args.step, found)
        target = require_free(directory, step)
        tables = [*tables_of(found, name=name).values()]
        num_bytes = sum(prod(each.shape) * each.dtype.itemsize for table in tables for each in table.values())
        if not args.dry_run:
            with reading_bar("importing", num_bytes) as on_write:
                write_imported(found, directory, step=step, name=name, on_write=on_write)
    counts = [_counts(table) for table in tables]
    notes = [*notes, *found.notes, _MISSING]
    words = ["{num_tensors:,} tensors, {num_elements:,} elements".format(**each) for each in counts]
    head = f"{'would write' if args.dry_run else 'wrote'} {target}: {name} of {found.kind}, {words[0]}"
    return Answer(
        facts={
            "path": str(target),
            "source": paths[0],
            "kind": found.kind,
            "step": step,
            "model": {name: {**counts[0], "optimizer": {**counts[1]} if len(counts) > 1 else None}},
            "num_bytes": num_bytes,
            "is_dry_run": bool(args.dry_run),
            "notes": [*notes],
        },
        lines=[head, *([f"optimizer: {words[1]}"] if len(words) > 1 else []), *notes],
    )


def _directory(path: str) -> Path:
    inner = Path(path) / CHECKPOINTS_NAME
    return inner if inner.is_dir() else Path(path)


def _step(asked: int | None, found: ForeignModel) -> int:
    step = asked if asked is not None else found.step or 0
    if step < 0:
        raise ConfigError(f"--step={step} is no step; use 0 or more.")
    return step


def _tied(opened: ForeignModel, source: Path, like: str | None) -> tuple[ForeignModel, list[str]]:
    """Return what was found with its ties, from the model that is named, or else from the source's configuration."""
    from lightrft.backends.checkpointing.foreign.ties import tied_like

    if like is not None:
        return tied_like(opened, _described(like)), []
    if opened.kind != "huggingface":
        return opened, []
    try:
        return tied_like(opened, _described(str(source))), []
    except (CheckpointError, ConfigError, MissingPackageError) as error:
        return opened, [f"missing: which weights are tied. {error}"]


def _described(path: str) -> nn.Module:
    from lightrft.backends.training.meta_init import parameters_on_meta
    from lightrft.models.build import build_untrained_model

    with parameters_on_meta():
        return build_untrained_model(path)


def _counts(table: Mapping[str, LiveTensor]) -> dict[str, Json]:
    return {"num_tensors": len(table), "num_elements": sum(prod(tensor.shape) for tensor in table.values())}
