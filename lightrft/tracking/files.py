"""A run's rows as JSON Lines files, one file a channel."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from lightrft.errors import DataError
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.tracking.tracker import CHANNELS, Channel, Tracker

__all__ = ["build_file_tracker", "channel_path", "read_rows"]


def channel_path(run_dir: str | os.PathLike[str], channel: Channel) -> Path:
    """Return the file of a channel.

    Args:
        run_dir: the run's directory.
        channel: the channel.
    """
    return Path(run_dir) / f"{channel}.jsonl"


def build_file_tracker(run_dir: str | os.PathLike[str]) -> Tracker:
    """Return a tracker that appends each row to `<run_dir>/<channel>.jsonl` at once.

    A killed run leaves whole rows, and at most one torn last line, which resuming removes.

    Args:
        run_dir: made if it does not exist.
    """

    def resume(step: int, *, is_evaluated: bool = True) -> None:
        def stays(row: Mapping[str, Json]) -> bool:
            return _step(row) < step or (_step(row) == step and (is_evaluated or row.get("kind") != "evaluation"))

        Path(run_dir).mkdir(parents=True, exist_ok=True)
        for channel in CHANNELS:
            path = channel_path(run_dir, channel)
            if path.exists():
                _rewrite(path, list(filter(stays, read_rows(path))))

    def log(channel: Channel, row: Mapping[str, Json]) -> None:
        path = channel_path(run_dir, channel)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:  # a full disk names no file by itself
            raise OSError(error.errno, error.strerror, str(path)) from error

    def close() -> None:
        """Do nothing: every row is in its file already."""

    return Tracker(resume=resume, log=log, close=close)


def read_rows(path: Path) -> Iterator[dict[str, Json]]:
    """Yield the rows of a JSON Lines file; a torn last line, which a killed writer leaves, is left out.

    Args:
        path: the file.

    Raises:
        DataError: another line is no JSON object.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row: object = json.loads(line) if line else None
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer was killed
                return
            raise DataError(f"{path}: line {number} is not JSON ({error}); remove it.") from error
        if isinstance(row, dict):
            yield cast("dict[str, Json]", row)
        elif line:
            raise DataError(f"{path}: line {number} is not a JSON object; remove it.")


def _line(row: Mapping[str, Json]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n"


def _step(row: Mapping[str, Json]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0


def _rewrite(path: Path, rows: list[dict[str, Json]]) -> None:
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
