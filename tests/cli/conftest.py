from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import attrs
import pytest

import lightrft
from lightrft.cli import main

REPOSITORY = Path(lightrft.__file__).parents[1]

CONFIG = """\
[strategy]
strategy = "single"
seed = 3
train_batch_size = 8
micro_train_batch_size = 4
actor_learning_rate = 1e-2
[model]
hidden_size = 16
num_layers = 1
num_heads = 2
max_length = 16
alphabet = "0123456789+="
[data]
path = "problems.jsonl"
heldout_size = 6
reward = "rewards:share_of_odd_digits"
[engine]
max_new_tokens = 4
[algorithm]
prompts_per_step = 2
num_samples = 4
kl_coef = 0.01
reward_running_norm = true
[checkpoint]
save_every = 3
[run]
dir = "run"
warmup_steps = 12
warmup_batch_size = 8
num_steps = 12
evaluate_every = 5
threads = 1
"""

REWARDS = """\
import os, signal, threading, time

def share_of_odd_digits(prompt, completion, answer):
    return sum(character in "13579" for character in completion) / 4

def raises(prompt, completion, answer):
    raise KeyError("no such rubric")

def not_a_number(prompt, completion, answer):
    return float("nan")

def signal_myself(rows, number):
    while True:
        try:
            if open("run/metrics.jsonl").read().count("\\n") >= rows:
                os.kill(os.getpid(), number)
                return
        except FileNotFoundError:
            pass
        time.sleep(0.0005)

# "9:15" sends this process signal 15 when it has logged 9 rows
plan = os.environ.get("SIGNAL_AT", "")
if plan:
    threading.Thread(target=signal_myself, args=[int(part) for part in plan.split(":")], daemon=True).start()
"""


@attrs.frozen(kw_only=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


class Cli(Protocol):
    def __call__(self, *argv: str) -> Outcome: ...


@pytest.fixture(scope="session")
def make_workplace() -> Callable[[Path], Path]:
    """A function that fills a directory with a run's files and returns the configuration's path."""

    def make(directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        lines = [f'{{"prompt": "{x}+{y}=", "answer": "{x + y}"}}\n' for x in range(6) for y in range(5)]
        (directory / "problems.jsonl").write_text("".join(lines))
        (directory / "rewards.py").write_text(REWARDS)
        (directory / "run.toml").write_text(CONFIG)
        return directory / "run.toml"

    return make


@pytest.fixture
def workplace(tmp_path: Path, make_workplace: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which holds a small run's configuration, problems and rewards."""
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    yield tmp_path
    sys.modules.pop("rewards", None)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process."""

    def run(*argv: str) -> Outcome:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        return Outcome(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def launch() -> Callable[..., Outcome]:
    """Runs a command in a process of its own."""

    def run(*argv: str, cwd: Path, signal_at: str = "") -> Outcome:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "SIGNAL_AT": signal_at}
        done = subprocess.run(
            [sys.executable, "-m", "lightrft", *argv],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        return Outcome(code=done.returncode, out=done.stdout, err=done.stderr)

    return run
