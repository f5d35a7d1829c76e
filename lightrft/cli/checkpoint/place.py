"""Which checkpoints a command line means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lightrft.cli.run_dir import CONFIG_NAME
from lightrft.errors import ConfigError

__all__ = ["CHECKPOINTS_NAME", "checkpoints_in", "chosen_step", "known_steps", "no_checkpoint", "run_dir_of"]

CHECKPOINTS_NAME = "checkpoints"
"""Where a run keeps its checkpoints, inside of its directory."""

_NUM_NEAREST = 3


def checkpoints_in(path: str) -> Path:
    """Return the directory of checkpoints that is meant by a run's directory, or by itself.

    Args:
        path: what the user named.

    Raises:
        ConfigError: there is no such directory.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(
            f"directory={path!r} is not a directory; name the directory of a run, or that of its checkpoints."
        )
    inner = directory / CHECKPOINTS_NAME
    return inner if inner.is_dir() else directory


def run_dir_of(directory: Path) -> Path:
    """Return the directory of the run to which a directory of checkpoints belongs; it may be no run's.

    Args:
        directory: from `checkpoints_in`.
    """
    absolute = directory.absolute()
    return absolute if (absolute / CONFIG_NAME).is_file() else absolute.parent


def known_steps(directory: Path) -> list[int]:
    """Return the steps that were committed, damaged ones too, in ascending order; there is one at least.

    Args:
        directory: from `checkpoints_in`.

    Raises:
        ConfigError: it holds no checkpoint.
    """
    from lightrft.backends.checkpointing.layout import ever_committed_steps

    steps = ever_committed_steps(directory)
    if not steps:
        raise no_checkpoint(directory)
    return steps


def chosen_step(steps: Sequence[int], step: int | None, directory: Path) -> int:
    """Return the step that is asked for, or the newest.

    Args:
        steps: from `known_steps`.
        step: what the user asked for.
        directory: from `checkpoints_in`, for the error.

    Raises:
        ConfigError: there is no such step; the nearest ones are named.
    """
    if step is None:
        return steps[-1]
    if step not in steps:

        def distance(known: int) -> int:
            return abs(known - step)

        near = ", ".join(str(known) for known in sorted(sorted(steps, key=distance)[:_NUM_NEAREST]))
        raise ConfigError(f"--step={step} is not in {str(directory)!r}; use a step that is, such as {near}.")
    return step


def no_checkpoint(directory: Path) -> ConfigError:
    """Return the error for a directory without checkpoints.

    Args:
        directory: from `checkpoints_in`.
    """
    from lightrft.backends.checkpointing.layout import STEP_PATTERN, step_of

    if re.fullmatch(STEP_PATTERN, directory.absolute().name):
        step = step_of(directory.absolute().name)
        return ConfigError(f"directory={str(directory)!r} is one checkpoint; name the one above, and --step={step}.")
    return ConfigError(
        f"directory={str(directory)!r} holds no checkpoint; name the directory of a run, or that of its checkpoints."
    )
