"""`lightrft checkpoint verify`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightrft.cli.checkpoint.answer import Answer
from lightrft.cli.checkpoint.place import checkpoints_in, chosen_step, known_steps
from lightrft.cli.failures import EXIT_FAILED, EXIT_OK
from lightrft.cli.progress import reading_bar
from lightrft.errors import CheckpointError

__all__ = ["verify"]


def verify(args: argparse.Namespace, paths: Sequence[str]) -> Answer:
    """Read every byte of one checkpoint or of all, and return what is damaged.

    Args:
        args: `step`; None for all.
        paths: a run's directory, or that of its checkpoints.

    Raises:
        ConfigError: there is no checkpoint, or not this one.
    """
    from lightrft.backends.checkpointing.layout import checkpoint_path
    from lightrft.backends.checkpointing.manifest import find_damage

    directory = checkpoints_in(paths[0])
    known = known_steps(directory)
    steps = known if args.step is None else [chosen_step(known, args.step, directory)]
    places = {step: checkpoint_path(directory, step) for step in steps}
    total = sum(_bytes_to_read(path, step) for step, path in places.items())
    with reading_bar("verifying", total) as on_read:
        damage = {step: find_damage(path, step=step, on_read=on_read) for step, path in places.items()}
    gone = [step for step, found in damage.items() if found and not places[step].is_dir()]
    for step in gone:  # by a run that goes on meanwhile
        del places[step], damage[step]
    is_intact = not any(damage.values())
    return Answer(
        facts={
            "directory": str(directory),
            "is_intact": is_intact,
            "num_bytes": total,
            "removed_meanwhile": [*gone],
            "checkpoints": [
                {"step": step, "path": str(path), "is_intact": not damage[step], "damaged": {**damage[step]}}
                for step, path in places.items()
            ],
        },
        lines=[
            *(line for step, found in damage.items() for line in _lines(step, found)),
            *(f"step {step}: removed while it was read" for step in gone),
        ],
        code=EXIT_OK if is_intact else EXIT_FAILED,
    )


def _bytes_to_read(path: Path, step: int) -> int:
    from lightrft.backends.checkpointing.manifest import read_manifest

    try:
        return sum(record.size for record in read_manifest(path, step=step).files.values())
    except CheckpointError:  # `find_damage` says so
        return 0


def _lines(step: int, damage: dict[str, str]) -> list[str]:
    if not damage:
        return [f"step {step}: every byte is as it was written"]
    return [f"step {step}: damaged in {', '.join(damage)}", *(f"  {problem}" for problem in damage.values())]
