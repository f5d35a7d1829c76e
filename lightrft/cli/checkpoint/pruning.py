"""`lightrft checkpoint prune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightrft.cli.checkpoint.answer import Answer
from lightrft.cli.checkpoint.place import checkpoints_in, known_steps
from lightrft.cli.terminal import table
from lightrft.errors import ConfigError
from lightrft.planning.line import readable_bytes

__all__ = ["prune"]


def prune(args: argparse.Namespace, paths: Sequence[str]) -> Answer:
    """Remove all checkpoints but the newest, by the same rule as `save_ckpt`, and return what went.

    Args:
        args: `max_num` and `dry_run`.
        paths: a run's directory, or that of its checkpoints.

    Raises:
        ConfigError: the number is missing or below 1, or there is no checkpoint.
        CheckpointError: one cannot be removed.
    """
    from lightrft.backends.checkpointing.durable import disk_errors, retire
    from lightrft.backends.checkpointing.inventory import size_of
    from lightrft.backends.checkpointing.retention import Retention, surplus

    max_num = _max_num(args)
    directory = checkpoints_in(paths[0])
    known = known_steps(directory)
    going = surplus(directory, Retention(max_num=max_num))
    sizes = {step: size_of(path) for step, path in going.items()}
    if not args.dry_run:
        for path in going.values():
            with disk_errors("directory", path, advice="those that are newer stay as they were"):
                retire(path)
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


def _max_num(args: argparse.Namespace) -> int:
    max_num: int | None = args.max_num
    if max_num is None:
        raise ConfigError("--max-num is missing; say how many of the newest stay, such as --max-num 3.")
    if max_num < 1:
        raise ConfigError(f"--max-num={max_num} would remove the newest checkpoint; use 1 or more.")
    return max_num
