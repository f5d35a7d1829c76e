"""The loop by hand, run as a program."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

from lightrft.strategy import get_strategy

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "custom_loop.py"


def losses_of(*words: str) -> list[float]:
    """Return the losses that the example's own functions give for a command line."""
    example = runpy.run_path(str(SCRIPT))
    args = example["parse_args"](list(words))
    losses: list[float] = example["train"](example["get_strategy"](args), args)
    return losses


def test_the_script_runs(tmp_path: Path) -> None:
    """As a program it prints one line a step and leaves a checkpoint of the last one."""
    command = [sys.executable, str(SCRIPT), "--max_steps", "3", "--save_dir", str(tmp_path / "loop")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S603 (our own script)
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["step 1", "step 2", "step 3"]
    assert get_strategy({"strategy": "single"}).latest_ckpt(tmp_path / "loop") == 3


def test_the_model_gets_better(tmp_path: Path) -> None:
    """Sixty steps bring the loss below a tenth of what it was."""
    losses = losses_of("--max_steps", "60", "--save_dir", str(tmp_path))
    assert losses[-1] < losses[0] / 10


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Stopped after four of ten steps, in the middle of an epoch, and started again, it has the losses of one run."""
    whole = losses_of("--max_steps", "10", "--save_dir", str(tmp_path / "whole"))
    first = losses_of("--max_steps", "10", "--save_dir", str(tmp_path / "parts"), "--stop_after", "4")
    second = losses_of("--max_steps", "10", "--save_dir", str(tmp_path / "parts"))
    assert len(first) == 4
    assert first + second == whole
