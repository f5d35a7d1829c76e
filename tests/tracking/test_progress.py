"""What is shown while a run goes on."""

from __future__ import annotations

import io
import itertools

from lightrft.tracking.progress import build_progress_tracker, describe_row
from lightrft.tracking.tracker import Tracker


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _play(tracker: Tracker) -> None:
    tracker.resume(-1)
    for step in (1, 2):
        tracker.log("metrics", {"step": step, "kind": "warmup", "loss": 2.0, "grad_norm": 1.0, "reward": 9.0})
        tracker.log("timings", {"step": step, "kind": "step", "seconds": 0.1})
    tracker.log("metrics", {"step": 2, "kind": "evaluation", "accuracy": 0.25, "reward": 0.5})
    tracker.log("samples", {"step": 2, "kind": "evaluation"})
    for step in (3, 4, 5):
        row = {"reward": step / 10, "kl": 0.01, "entropy": 1.5, "grad_norm": None, "loss": 7.0}
        tracker.log("metrics", {"step": step, "kind": "step", **row})
        tracker.log("timings", {"step": step, "kind": "step", "tokens_per_second": 1234.5})
    tracker.close()
    tracker.close()


def test_without_a_terminal_there_is_a_line_every_few_seconds() -> None:
    """Steps share a line's time, evaluations and the last step always have theirs, and nothing moves the cursor."""
    clock = itertools.count(0.0, 2.0)

    def now() -> float:
        return next(clock)

    file = io.StringIO()
    _play(build_progress_tracker(warmup_steps=2, num_steps=3, file=file, every_seconds=5.0, clock=now))
    assert file.getvalue().splitlines() == [
        "step 1/5  loss 2.000  grad norm 1.000",
        "step 2/5  held-out accuracy 25.0%  reward 0.500",
        "step 4/5  reward 0.400  KL 0.0100  entropy 1.500  tokens/s 1,234",
        "step 5/5  reward 0.500  KL 0.0100  entropy 1.500  tokens/s 1,234",
    ]


def test_on_a_terminal_there_is_a_bar_with_the_newest_figures() -> None:
    """The bar shows the phase, how many of its steps are done, and the figures; evaluations stay above it."""
    file = _Terminal()
    _play(build_progress_tracker(warmup_steps=2, num_steps=3, file=file))
    shown = file.getvalue()
    assert "step 2: held-out accuracy 25.0%  reward 0.500" in shown
    last = shown.rsplit("reinforcement", 1)[1]
    assert "3/3" in last
    assert "tokens/s" in last
    assert "warm-up" in shown


def test_a_row_is_described_by_what_it_has() -> None:
    """Figures that are missing are left out, and why a step was skipped is said."""
    assert (
        describe_row({"kind": "step", "reward": 0.5, "skipped": "equal rewards"})
        == "reward 0.500  skipped: equal rewards"
    )
    assert describe_row({}) == ""
