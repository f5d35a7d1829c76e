"""Rows on disk: what is logged is read back, and resuming forgets what came after."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightrft.errors import DataError
from lightrft.tracking.files import build_file_tracker, channel_path, read_rows
from lightrft.tracking.tracker import combine, no_tracker


def test_rows_come_back_as_they_were_logged(tmp_path: Path) -> None:
    """Every row stands in the file of its channel at once, floats bit for bit."""
    tracker = build_file_tracker(tmp_path / "run")
    tracker.resume(-1)
    rows = [{"step": 1, "kind": "step", "loss": 0.1 + 0.2, "text": "é\n"}, {"step": 2, "kind": "step", "loss": None}]
    for row in rows:
        tracker.log("metrics", row)
    tracker.log("samples", {"step": 1, "kind": "evaluation"})
    tracker.close()
    assert list(read_rows(channel_path(tmp_path / "run", "metrics"))) == rows
    assert len(list(read_rows(channel_path(tmp_path / "run", "samples")))) == 1


def test_resuming_keeps_the_rows_up_to_the_step_byte_for_byte(tmp_path: Path) -> None:
    """Rows after the step and a torn last line are gone; the bytes of the others are untouched."""
    tracker = build_file_tracker(tmp_path)
    tracker.resume(-1)
    for step in range(1, 6):
        tracker.log("metrics", {"step": step, "kind": "step", "loss": step / 3})
    path = channel_path(tmp_path, "metrics")
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    with path.open("a") as file:
        file.write('{"step": 6, "ki')
    tracker.resume(3)
    assert path.read_bytes() == kept
    tracker.resume(-1)
    assert path.read_bytes() == b""


def test_resuming_before_an_evaluation_forgets_it_alone(tmp_path: Path) -> None:
    """The row of the step itself stays, and so does every earlier evaluation."""
    tracker = combine(build_file_tracker(tmp_path))
    rows = [{"step": step, "kind": kind} for step in (1, 2, 3) for kind in ("step", "evaluation")]
    for row in rows:
        tracker.log("metrics", row)
        tracker.log("samples", row)
    tracker.resume(2)
    assert list(read_rows(channel_path(tmp_path, "metrics"))) == rows[:4]
    tracker.resume(2, is_evaluated=False)
    for channel in ("metrics", "samples"):
        assert list(read_rows(channel_path(tmp_path, channel))) == rows[:3]  # type: ignore[arg-type]


@pytest.mark.parametrize("line", ["{broken", "[1]"])
def test_a_damaged_row_is_named(tmp_path: Path, line: str) -> None:
    """A line in the middle that is no JSON object is an error with its number, not skipped."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_rows(path))


def test_trackers_combine(tmp_path: Path) -> None:
    """A combined tracker passes resume, log and close on to each; none keeps nothing and fails nothing."""
    both = combine(build_file_tracker(tmp_path / "a"), build_file_tracker(tmp_path / "b"), no_tracker())
    both.resume(-1)
    both.log("timings", {"step": 1, "kind": "step"})
    both.resume(0)
    both.close()
    assert [list(read_rows(channel_path(tmp_path / name, "timings"))) for name in "ab"] == [[], []]
