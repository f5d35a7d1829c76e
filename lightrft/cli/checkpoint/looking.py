"""`lightrft checkpoint list` and `lightrft checkpoint show`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from lightrft.cli.checkpoint.answer import Answer, local_time, written_at
from lightrft.cli.checkpoint.place import checkpoints_in, chosen_step, known_steps, no_checkpoint
from lightrft.cli.terminal import table
from lightrft.errors import CheckpointError
from lightrft.planning.line import readable_bytes
from lightrft.strategy.protocols.checkpointing import Json

if TYPE_CHECKING:
    from lightrft.backends.checkpointing.inventory import FoundCheckpoint
    from lightrft.backends.checkpointing.manifest import Manifest

__all__ = ["list_checkpoints", "show"]

_NUM_SHOWN = 200  # characters of one value of client_state that are shown on a terminal


def list_checkpoints(args: argparse.Namespace, paths: Sequence[str]) -> Answer:
    """Return a row for everything that is a checkpoint or looks like one.

    Args:
        args: no option counts.
        paths: a run's directory, or that of its checkpoints.

    Raises:
        ConfigError: there is nothing.
    """
    del args
    from lightrft.backends.checkpointing.inventory import find_checkpoints

    directory = checkpoints_in(paths[0])
    found = find_checkpoints(directory)
    if not found:
        raise no_checkpoint(directory)
    headers = ("step", "written", "size", "strategy", "ranks", "committed")
    return Answer(
        facts={"directory": str(directory), "checkpoints": [_facts(one) for one in found]},
        lines=table(headers, [_row(one) for one in found]),
    )


def show(args: argparse.Namespace, paths: Sequence[str]) -> Answer:
    """Return what one checkpoint holds; of its tensors the headers alone are read.

    Args:
        args: `step`; None for the newest.
        paths: a run's directory, or that of its checkpoints.

    Raises:
        ConfigError: there is no checkpoint, or not this one.
        CheckpointError: its manifest, its client state or a header is damaged.
    """
    from lightrft.backends.checkpointing.inventory import find_checkpoint, read_client_state

    directory = checkpoints_in(paths[0])
    found = find_checkpoint(directory, chosen_step(known_steps(directory), args.step, directory))
    if found.manifest is None:
        raise CheckpointError(found.problem)
    tensors = _tensors(found.path, found.manifest)
    client_state = read_client_state(found.path, found.manifest)
    facts: dict[str, Json] = {
        **_facts(found),
        "libraries": {**found.manifest.libraries},
        "files": {name: record.size for name, record in found.manifest.files.items()},
        "models": {
            name: {**_counts(of_model), "optimizer": None if of_optimizer is None else _counts(of_optimizer)}
            for name, (of_model, of_optimizer) in tensors.items()
        },
        "client_state": client_state,
    }
    head = [f"{name:<12}{value}" for name, value in _head(found, found.manifest)]
    headers = ("model", "tensors", "elements", "dtypes", "optimizer")
    rows = [(name, *_cells(of_model), _optimizer_cell(other)) for name, (of_model, other) in tensors.items()]
    return Answer(facts=facts, lines=[*head, "", *table(headers, rows), "", *_state_lines(client_state)])


@attrs.frozen(kw_only=True)
class _Tensors:
    """The tensors of a file.

    Attributes:
        number: how many there are.
        elements: how many elements they have together, by dtype.
    """

    number: int
    elements: Mapping[str, int]


def _facts(found: FoundCheckpoint) -> dict[str, Json]:
    manifest = found.manifest
    return {
        "step": found.step,
        "path": str(found.path),
        "written": written_at(found.modified),
        "num_bytes": found.num_bytes,
        "strategy": None if manifest is None else manifest.strategy,
        "world_size": None if manifest is None else manifest.world_size,
        "is_committed": found.is_committed,
        "problem": found.problem,
    }


def _row(found: FoundCheckpoint) -> tuple[str, ...]:
    strategy, ranks = _writer(found.manifest)
    committed = "yes" if found.is_committed else "no"
    return (
        str(found.step),
        local_time(found.modified),
        readable_bytes(found.num_bytes),
        strategy,
        ranks,
        committed if found.problem is None else f"{committed}: {found.problem}",
    )


def _writer(manifest: Manifest | None) -> tuple[str, str]:
    if manifest is None:
        return "-", "-"
    return manifest.strategy or "-", str(manifest.world_size)


def _tensors(path: Path, manifest: Manifest) -> dict[str, tuple[_Tensors, _Tensors | None]]:
    """Return of each model the tensors of its parameters and buffers, and those of its optimizer if it has one."""
    from lightrft.backends.checkpointing.layout import model_file, model_names, optimizer_file

    found: dict[str, tuple[_Tensors, _Tensors | None]] = {}
    for name in model_names(manifest.files):
        file = optimizer_file(name)
        of_optimizer = _tensors_of(path / file) if file in manifest.files else None
        found[name] = _tensors_of(path / model_file(name)), of_optimizer
    return found


def _tensors_of(path: Path) -> _Tensors:
    from lightrft.backends.checkpointing.stored import stored_tensors

    tensors = stored_tensors(path)
    elements: Counter[str] = Counter()
    for tensor in tensors.values():
        elements[str(tensor.dtype).removeprefix("torch.")] += prod(tensor.shape)
    return _Tensors(number=len(tensors), elements=elements)


def _counts(tensors: _Tensors) -> dict[str, Json]:
    total = sum(tensors.elements.values())
    return {"num_tensors": tensors.number, "num_elements": total, "dtypes": {**tensors.elements}}


def _cells(tensors: _Tensors) -> tuple[str, str, str]:
    total = sum(tensors.elements.values())
    dtypes = ", ".join(f"{dtype} {number:,}" for dtype, number in tensors.elements.items())
    return f"{tensors.number:,}", f"{total:,}", dtypes


def _optimizer_cell(tensors: _Tensors | None) -> str:
    return "none" if tensors is None else "{} tensors, {} elements".format(*_cells(tensors)[:2])


def _head(found: FoundCheckpoint, manifest: Manifest) -> list[tuple[str, str]]:
    strategy, ranks = _writer(manifest)
    return [
        ("checkpoint", str(found.path)),
        ("written", local_time(found.modified)),
        ("strategy", strategy),
        ("ranks", ranks),
        ("libraries", ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())),
        ("size", f"{readable_bytes(found.num_bytes)} ({found.num_bytes:,} bytes, {len(manifest.files) + 1} files)"),
    ]


def _state_lines(client_state: Mapping[str, Json]) -> list[str]:
    if not client_state:
        return ["client state: none"]
    return ["client state", *(f"  {name}: {_shortened(json.dumps(value))}" for name, value in client_state.items())]


def _shortened(text: str) -> str:
    if len(text) <= _NUM_SHOWN:
        return text
    return f"{text[:_NUM_SHOWN]}... ({len(text):,} characters; --json shows them all)"
