"""How a run goes, live: a bar with figures on a terminal, and a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import IO, Protocol

import attrs
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from lightrft.strategy.protocols.checkpointing import Json
from lightrft.tracking.tracker import Channel, Tracker

__all__ = ["Clock", "build_progress_tracker", "describe_row"]

_FIGURES = (
    ("loss", "loss", ".3f"),
    ("reward", "reward", ".3f"),
    ("kl", "KL", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("grad_norm", "grad norm", ".3f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)
"""Key of a row, what it is called, and how it is written."""

_OF_WARMUP = frozenset({"loss", "grad_norm"})


class Clock(Protocol):
    """Tells the time."""

    def __call__(self) -> float:
        """Return seconds since any fixed moment."""
        ...


@attrs.define
class _Seen:
    """What the display knows so far: the newest figures, and when it last spoke.

    Attributes:
        row: figures of the newest step.
        spoke: when the last line was written; None before the first.
        has_ended: whether the display was closed.
    """

    row: dict[str, Json] = attrs.field(factory=dict[str, Json])
    spoke: float | None = None
    has_ended: bool = False


def describe_row(row: Mapping[str, Json]) -> str:
    """Return the figures of a row in one line, those that it has.

    Args:
        row: metrics and timings of a step.

    Example:
        >>> describe_row({"step": 3, "kind": "step", "reward": 0.5, "kl": 0.001, "tokens_per_second": 5120.4})
        'reward 0.500  KL 0.0010  tokens/s 5,120'
    """
    shown = [figure for figure in _FIGURES if row.get("kind") != "warmup" or figure[0] in _OF_WARMUP]
    values = [(name, row.get(key), form) for key, name, form in shown if key != "loss" or row.get("kind") == "warmup"]
    figures = [f"{name} {value:{form}}" for name, value, form in values if isinstance(value, (int, float))]
    skipped = row.get("skipped")
    return "  ".join([*figures, *([f"skipped: {skipped}"] if skipped else [])])


def build_progress_tracker(
    *,
    warmup_steps: int,
    num_steps: int,
    file: IO[str],
    every_seconds: float = 5.0,
    clock: Clock = time.monotonic,
) -> Tracker:
    """Return a tracker that shows each step's figures and each evaluation.

    Args:
        warmup_steps: steps of the warm-up.
        num_steps: steps of reinforcement.
        file: where to; a terminal gets a bar that moves, anything else plain lines.
        every_seconds: least time between two plain lines of steps; evaluations always get theirs.
        clock: tells the time.
    """
    if file.isatty():
        return _build_bar(warmup_steps, num_steps, Console(file=file))
    return _build_lines(warmup_steps + num_steps, file, every_seconds, clock)


def _build_lines(total: int, file: IO[str], every_seconds: float, clock: Clock) -> Tracker:
    seen = _Seen()

    def write(step: Json, text: str) -> None:
        file.write(f"step {step}/{total}  {text}\n")
        file.flush()

    def resume(step: int, *, is_evaluated: bool = True) -> None:
        """Do nothing: lines that were written stay."""

    def log(channel: Channel, row: Mapping[str, Json]) -> None:
        if channel == "metrics" and row.get("kind") == "evaluation":
            write(row.get("step"), _evaluated(row))
        elif channel == "metrics":
            seen.row = dict(row)
        elif channel == "timings":  # comes after the metrics of its step
            now = clock()
            is_due = seen.spoke is None or now - seen.spoke >= every_seconds
            if is_due or row.get("step") == total:
                seen.spoke = now
                write(row.get("step"), describe_row({**row, **seen.row}))

    def close() -> None:
        """Do nothing: every line is written already."""

    return Tracker(resume=resume, log=log, close=close)


def _build_bar(warmup_steps: int, num_steps: int, console: Console) -> Tracker:
    progress = Progress(
        TextColumn("{task.description:<13}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    live = Live(progress, console=console)
    seen = _Seen()
    warmup = progress.add_task("warm-up", total=warmup_steps, start=False, visible=warmup_steps > 0)
    reinforcement = progress.add_task("reinforcement", total=num_steps, start=False, visible=warmup_steps == 0)

    def move(step: int) -> None:
        progress.update(warmup, completed=max(0, min(step, warmup_steps)))
        progress.update(reinforcement, completed=max(0, step - warmup_steps))

    def resume(step: int, *, is_evaluated: bool = True) -> None:
        del is_evaluated
        move(step)
        live.start()

    def log(channel: Channel, row: Mapping[str, Json]) -> None:
        if channel == "metrics" and row.get("kind") == "evaluation":
            live.console.print(f"step {row.get('step')}: {_evaluated(row)}", highlight=False)
        elif channel == "metrics":
            seen.row = dict(row)
        elif channel == "timings":
            _start(progress, warmup if seen.row.get("kind") == "warmup" else reinforcement)
            move(_step(row))
            # the figures have a line of their own: beside the bar they would not fit into 80 columns
            live.update(Group(progress, Text(describe_row({**row, **seen.row}))))

    def close() -> None:
        if not seen.has_ended:
            seen.has_ended = True
            live.stop()

    return Tracker(resume=resume, log=log, close=close)


def _start(progress: Progress, task: TaskID) -> None:
    """Let the clock of a phase begin with its first step, so that the time that remains is that of its own steps."""
    if progress.tasks[task].start_time is None:
        progress.start_task(task)
        progress.update(task, visible=True)


def _evaluated(row: Mapping[str, Json]) -> str:
    accuracy, reward = row.get("accuracy"), row.get("reward")
    figures = [f"held-out accuracy {accuracy:.1%}"] if isinstance(accuracy, (int, float)) else []
    return "  ".join([*figures, *([f"reward {reward:.3f}"] if isinstance(reward, (int, float)) else [])])


def _step(row: Mapping[str, Json]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0
