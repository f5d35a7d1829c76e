"""Where things stand in a directory of checkpoints.

save_dir/
  step-00000042/
    manifest.json                   size and digest of every other file
    client_state.json               what the user passed
    rank-00000.random.json          random streams of rank 0; one file a rank
    rank-00000.<name>.gradients.safetensors
                                    gradients that rank 0 has in an open accumulation window; if there are any
    <name>.model.safetensors        parameters and persistent buffers
    <name>.optimizer.safetensors    optimizer state by parameter; of trained models alone
    <name>.state.json               tied names, optimizer groups, schedule
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lightrft.errors import CheckpointError, ConfigError

__all__ = [
    "CLIENT_STATE",
    "MANIFEST",
    "STEP_PATTERN",
    "checkpoint_path",
    "committed_steps",
    "ever_committed_steps",
    "gradients_file",
    "model_file",
    "model_names",
    "newest_step",
    "optimizer_file",
    "random_file",
    "require_entry_names",
    "state_file",
    "step_directories",
    "step_of",
    "was_committed",
]

MANIFEST = "manifest.json"
"""File that makes a directory a checkpoint."""
CLIENT_STATE = "client_state.json"
"""File of what the user passed as `client_state`."""
STEP_PATTERN = r"step-(?:[0-9]{8}|[1-9][0-9]{8,})"
"""Regular expression of the directories of checkpoints; one step has one name."""


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the directory of a step.

    Args:
        directory: directory of all checkpoints of the run.
        step: its number.
    """
    return directory / f"step-{step:08d}"


def step_of(name: str) -> int:
    """Return the step of a directory.

    Args:
        name: of the form of `STEP_PATTERN`.
    """
    return int(name.removeprefix("step-"))


def committed_steps(directory: Path) -> list[int]:
    """Return the steps that have a manifest, in ascending order.

    Args:
        directory: directory of all checkpoints of the run; it need not exist.
    """
    return [step for step, path in step_directories(directory) if (path / MANIFEST).is_file()]


def newest_step(directory: Path) -> int | None:
    """Return the newest step that was ever committed, with or without its manifest now; None without one.

    A committed checkpoint that lost its manifest is damaged, and must not be passed over for an older one.

    Args:
        directory: directory of all checkpoints of the run; it need not exist.
    """
    return next(reversed(ever_committed_steps(directory)), None)


def ever_committed_steps(directory: Path) -> list[int]:
    """Return the steps that were ever committed, with or without their manifest now, in ascending order.

    Args:
        directory: directory of all checkpoints of the run; it need not exist.
    """
    return [step for step, path in step_directories(directory) if was_committed(path)]


def require_entry_names(names: Iterable[str]) -> None:
    """Check the names of models, which become file names.

    Args:
        names: keys of the mapping that is saved.

    Raises:
        ConfigError: one is not an ASCII identifier, or two differ in case alone.
    """
    seen: dict[str, str] = {}
    for name in names:
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", str(name)) is None:
            raise ConfigError(
                f"model={name!r} is no name for a model; use letters, digits and underscores, a letter first, "
                "at most 64."
            )
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ConfigError(
                f"model={name!r} differs from {other!r} in case alone, and some disks ignore case; rename one."
            )


def model_file(name: str) -> str:
    """Return the file of a model's parameters and buffers."""
    return f"{name}.model.safetensors"


def model_names(files: Iterable[str]) -> list[str]:
    """Return the names of the models whose parameters are among the files, in alphabetical order.

    Args:
        files: names of the files of a checkpoint.
    """
    suffix = model_file("")
    return sorted(file.removesuffix(suffix) for file in files if file.endswith(suffix))


def optimizer_file(name: str) -> str:
    """Return the file of a model's optimizer state."""
    return f"{name}.optimizer.safetensors"


def gradients_file(name: str, rank: int) -> str:
    """Return the file of a model's gradients that a rank has accumulated; ranks add them up when a window ends."""
    return f"rank-{rank:05d}.{name}.gradients.safetensors"


def state_file(name: str) -> str:
    """Return the file of what is no tensor of a model, its optimizer and its schedule."""
    return f"{name}.state.json"


def random_file(rank: int) -> str:
    """Return the file of a rank's random streams."""
    return f"rank-{rank:05d}.random.json"


def was_committed(path: Path) -> bool:
    """Return whether a directory of a step was ever a checkpoint; one that lost its manifest is a damaged one.

    Args:
        path: the directory.
    """
    return (path / MANIFEST).is_file() or (path / random_file(0)).is_file()


def step_directories(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of all that have the name of a checkpoint, whatever they hold, by step.

    Args:
        directory: directory of all checkpoints of the run; it need not exist.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not directory.exists():
        return []
    try:
        paths = [path for path in directory.iterdir() if re.fullmatch(STEP_PATTERN, path.name) and path.is_dir()]
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be read: {error.strerror}; pass a directory of checkpoints."
        ) from error
    return sorted((step_of(path.name), path) for path in paths)
