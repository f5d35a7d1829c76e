"""`lightrft checkpoint prune`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightrft.cli.checkpoint.answer import Answer
from lightrft.cli.checkpoint.place import checkpoints_in, known_steps
from lightrft.cli.terminal import table
from lightrft.errors import CheckpointError, ConfigError
from lightrft.planning.line import readable_bytes

if TYPE_CHECKING:
    from lightrft.backends.checkpointing.retention import Retention

__all__ = ["prune"]


def prune(args: argparse.Namespace, paths: Sequence[str]) -> Answer:
    """Remove the checkpoints that `save_ckpt` would remove by the same rules, and return what went.

    Args:
        args: `max_num`, `max_mem`, `keep_every`, `keep_best` and `dry_run`.
        paths: a run's directory, or that of its checkpoints.

    Raises:
        ConfigError: there is no limit, a number makes no sense, or there is no checkpoint.
        CheckpointError: the newest one is damaged, or one cannot be removed.
    """
    from lightrft.backends.checkpointing.durable import disk_errors
    from lightrft.backends.checkpointing.inventory import size_of
    from lightrft.backends.checkpointing.retention import remove, surplus

    retention = _retention(args)
    directory = checkpoints_in(paths[0])
    known = known_steps(directory)
    going = surplus(directory, retention)
    sizes = {step: size_of(path) for step, path in going.items()}
    if not args.dry_run and going:
        _require_newest(directory, max(known))
        for path in going.values():
            with disk_errors("directory", path, advice="those that are newer stay as they were"):
                remove(path)
    staying = [step for step in known if step not in going]
    verb = "would be removed" if args.dry_run else "removed"
    rows = [(str(step), readable_bytes(sizes[step]), str(path)) for step, path in going.items()]
    total = sum(sizes.values())
    stay = f"steps that stay: {', '.join(map(str, staying))}"
    return Answer(
        facts={
            "directory": str(directory),
            "is_dry_run": bool(args.dry_run),
            "removed": [{"step": step, "path": str(path), "num_bytes": sizes[step]} for step, path in going.items()],
            "num_bytes": total,
            "staying": [*staying],
        },
        lines=[
            *(table(("step", "size", verb), rows) if rows else []),
            f"{len(going)} {verb}, {readable_bytes(total)} ({total:,} bytes); {stay}",
        ],
    )


def _require_newest(directory: Path, step: int) -> None:
    """Check that what a run would go on from is whole before older ones go."""
    from lightrft.backends.checkpointing.layout import checkpoint_path
    from lightrft.backends.checkpointing.manifest import find_damage

    damage = find_damage(checkpoint_path(directory, step), step=step)
    if damage:
        raise CheckpointError(
            f"{next(iter(damage.values()))} That is the newest one, so nothing was removed; remove "
            f"{checkpoint_path(directory, step)} by hand first."
        )


def _retention(args: argparse.Namespace) -> Retention:
    from lightrft.backends.checkpointing.retention import Retention

    max_num: int | None = args.max_num
    max_mem: float | None = args.max_mem
    if max_num is None and max_mem is None:
        raise ConfigError(
            "--max-num and --max-mem are missing, and nothing goes without a limit; say how many of the newest stay, "
            "such as --max-num 3."
        )
    if max_num is not None and max_num < 1:
        raise ConfigError(f"--max-num={max_num} would remove the newest checkpoint; use 1 or more.")
    if max_mem is not None and not 0 <= max_mem < math.inf:
        raise ConfigError(f"--max-mem={max_mem} is not a finite number of at least 0; give GB, such as --max-mem 500.")
    return Retention(
        max_num=max_num,
        max_mem=max_mem,
        keep_every=_count("--keep-every", args.keep_every),
        keep_best=_count("--keep-best", args.keep_best),
    )


def _count(flag: str, value: int | None) -> int:
    if value is not None and value < 0:
        raise ConfigError(f"{flag}={value} is below 0; use 0 to spare none, or leave it out.")
    return value or 0
