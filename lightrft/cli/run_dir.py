"""The directory of a run: made, locked while the run goes on, and bound to one configuration."""

from __future__ import annotations

import fcntl
import os
import tomllib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from lightrft.config import Config, to_toml
from lightrft.config.redaction import shown
from lightrft.errors import ConfigError

__all__ = ["CONFIG_NAME", "bind_config", "find_config", "open_run_dir"]

CONFIG_NAME = "config.toml"
"""The configuration that a run began with; written at its first start."""

_FREE = (
    "checkpoint.",
    "run.threads",
    "run.dir",
    "run.offload_while_generating",
    # who computes, and where parts lie: a checkpoint goes into any strategy and any number of ranks
    "strategy.strategy",
    "strategy.fsdp",  # and all that begin so
    "strategy.zero_",
    "strategy.timeout",
    "strategy.enable_engine_sleep",
    # how much at a time: the window, which is what a step learns from, stays
    "strategy.micro_train_batch_size",
    "strategy.gradient_checkpointing",
    "strategy.compile_layers",
    "engine.adapters",
    "engine.batch_size",
    "engine.process",
    "engine.timeout_seconds",
    "engine.tensor_parallel_size",
    "engine.transport",
)
"""What settings begin with that change how a run computes, and not what, but for rounding."""

_FREE_WHERE_SET = ("engine.url",)
"""What may change from one value to another, and neither to none nor from none: a server draws by no seed of ours."""

_NUM_SHOWN = 3


@contextmanager
def open_run_dir(path: str) -> Generator[Path]:
    """Yield the directory, made if need be, which no other process runs in meanwhile.

    Args:
        path: the setting `run.dir`.

    Raises:
        ConfigError: it cannot be written, or another process runs in it.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"run.dir={path!r} cannot be written ({reason}); choose another directory.") from error
    try:
        _lock(descriptor, path)
        yield directory
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"run.dir={path!r} is in use by another process; wait for it, or choose another.") from error


def bind_config(directory: Path, config: Config, *, is_resumed: bool) -> None:
    """Write the configuration at the first start; later, refuse one under which the run would not be the same.

    Args:
        directory: the run's directory.
        config: what the run is started with now.
        is_resumed: whether the directory holds a checkpoint.

    Raises:
        ConfigError: the run began with other settings, or the directory holds the model of another run.
    """
    path = directory / CONFIG_NAME
    if is_resumed and path.exists():
        _check_same(path, config)
        return
    if not is_resumed and (directory / "model").exists():
        raise ConfigError(
            f"run.dir={str(directory)!r} holds a finished model and no checkpoint to go on from; "
            "choose another directory, or remove it."
        )
    temporary = path.with_suffix(".toml.tmp")
    temporary.write_text(to_toml(config), encoding="utf-8")
    temporary.replace(path)


def find_config(run_dir: str) -> Path:
    """Return the configuration file of a run.

    Args:
        run_dir: directory of the run.

    Raises:
        ConfigError: there is none.
    """
    path = Path(run_dir) / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"run_dir={run_dir!r} holds no {CONFIG_NAME}; name the directory of a run.")
    return path


def _check_same(path: Path, config: Config) -> None:
    try:
        before = _flat(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"config={str(path)!r} cannot be read ({error}); choose another run.dir.") from error
    now = _flat(tomllib.loads(to_toml(config)))
    # a setting that an older release did not know had its default
    before = {**_flat(tomllib.loads(to_toml(Config()))), **before}
    changed = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    free = (*_FREE, *(key for key in _FREE_WHERE_SET if now.get(key) and before.get(key)))
    changed = [key for key in changed if not key.startswith(free)]
    if not changed:
        return
    described = [f"{key}={_shown(now, key)} (was {_shown(before, key)})" for key in changed[:_NUM_SHOWN]]
    more = f" and {len(changed) - _NUM_SHOWN} more" if len(changed) > _NUM_SHOWN else ""
    raise ConfigError(
        f"{', '.join(described)}{more} would change a run that goes on from a checkpoint; "
        f"set what {path} says, or choose another run.dir."
    )


def _flat(mapping: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flat(cast("Mapping[str, object]", value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(flat: Mapping[str, object], key: str) -> str:
    return shown(flat[key], name=key.rpartition(".")[2]) if key in flat else "not set"
