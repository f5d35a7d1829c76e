"""What is run from the command line with the engine whose environment this is: "vllm" or "sglang"."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guests import installed

from lightrft.cli import main
from lightrft.loops.ahead import Await, made_ahead
from lightrft.loops.collect import Request
from lightrft.loops.ranks import RolloutOnRanks
from lightrft.strategy import Completion, EngineHandle

ENGINE = installed("vllm", "sglang")

# other people's packages warn while they are imported
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.parametrize("engine", [ENGINE])]

CONFIG = """\
[strategy]
strategy = "single"
train_batch_size = 8
micro_train_batch_size = 4
actor_learning_rate = 1e-2
[model]
hidden_size = 64
num_layers = 1
num_heads = 2
max_length = 16
alphabet = "0123456789+="
[data]
path = "problems.jsonl"
heldout_size = 6
[engine]
max_new_tokens = 4
cache_gb = 0.01
[algorithm]
prompts_per_step = 2
num_samples = 4
[checkpoint]
save_every = 3
[run]
dir = "run"
num_steps = 3
threads = 1
"""


def test_the_doctor_takes_it_through_its_life(capsys: pytest.CaptureFixture[str], engine: str) -> None:
    """A start, completions, a verified sync, sleep, waking and a close, each with a row."""
    assert main(["doctor", "--engine", engine]) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = ["step", "start", "generate", "sync", "verify", "sleep", "wake", "close"]
    assert [line.split()[0] for line in lines] == steps


def make_workplace(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [json.dumps({"prompt": f"{x}+{y}=", "answer": str(x + y)}) for x in range(6) for y in range(5)]
    (directory / "problems.jsonl").write_text("\n".join(problems))
    (directory / "run.toml").write_text(CONFIG)
    monkeypatch.chdir(directory)


def test_a_configuration_runs_with_it_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """`--engine` is all that a run of the engine "hf" needs; its logprobs are the trainer's in every step."""
    make_workplace(tmp_path, monkeypatch)
    rows = {}
    for name in ("hf", engine):
        assert main(["train", "run.toml", "--engine", name, f"run.dir={name}", "--quiet"]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    assert [(row["kind"], row["step"]) for row in rows[engine]] == [(row["kind"], row["step"]) for row in rows["hf"]]
    assert all(row["logprob_difference"] < 1e-5 for row in rows[engine] if row["kind"] == "step")
    # what is greedy and made of the same weights is the same
    assert rows[engine][0]["accuracy"] == rows["hf"][0]["accuracy"]
    assert rows[engine][0]["reward"] == rows["hf"][0]["reward"]


def test_a_rollout_that_is_made_ahead_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Made in a thread while the policy learns, or after it has learnt, with older weights: metrics are the same."""
    make_workplace(tmp_path, monkeypatch)
    stale = ["algorithm.max_staleness=1", "algorithm.importance_correction=truncate"]
    written = []
    for name, make in (("thread", made_ahead), ("after", made_after)):
        with monkeypatch.context() as patch:
            patch.setattr("lightrft.loops.reinforce.made_ahead", make)
            assert main(["train", "run.toml", "--engine", engine, *stale, f"run.dir={name}", "--quiet"]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        written.append([json.loads(line) for line in lines])
    for thread, after in zip(*written, strict=True):
        assert thread.keys() == after.keys()
        for name, value in thread.items():
            # a package may sum in another order each time
            assert value == (
                pytest.approx(after[name], rel=1e-3, abs=1e-4) if isinstance(value, float) else after[name]
            )
    assert [row["staleness"] for row in written[0] if row["kind"] == "step"] == [0, 1, 1]


@contextmanager
def made_after(rollout: RolloutOnRanks, engine: EngineHandle, request: Request) -> Generator[Await]:
    """The next rollout, made after all was learnt, and before the engine is given the new weights."""

    def wait() -> list[Completion]:
        return rollout.gather_and_generate(engine, request.prompts, request.sampling)

    yield wait
