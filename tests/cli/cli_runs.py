"""A small run in files, and what running a command gives."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import attrs

import lightrft

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


class Launch(Protocol):
    def __call__(self, *argv: str, cwd: Path, signal_at: str = "") -> Outcome: ...


class EditRewards(Protocol):
    def __call__(self, text: str) -> None: ...


def make_workplace(directory: Path) -> None:
    """Fill a directory with a run's configuration, problems and rewards."""
    lines = [f'{{"prompt": "{x}+{y}=", "answer": "{x + y}"}}\n' for x in range(6) for y in range(5)]
    (directory / "problems.jsonl").write_text("".join(lines))
    (directory / "rewards.py").write_text(REWARDS)
    (directory / "run.toml").write_text(CONFIG)
