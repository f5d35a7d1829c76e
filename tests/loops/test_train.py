"""The outer loop: what it logs, and that it can be stopped and killed anywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import attrs
import pytest
from runs import in_dir, parts_of, run_to_death, tiny_config

from lightrft.config.root import Config
from lightrft.errors import CheckpointError, ConfigError, InterruptedRunError
from lightrft.loops.interrupt import stop_on_signals
from lightrft.loops.run import checkpoint_dir
from lightrft.loops.state import RunState, state_from_json, state_to_json
from lightrft.loops.train import Summary, train
from lightrft.strategy import get_strategy
from lightrft.tracking.files import build_file_tracker, channel_path, read_rows


def run(config: Config, *, stop_at: int | None = None) -> Summary:
    """Run, and be asked to stop at the boundary after so many questions."""
    asked = 0

    def should_stop() -> str | None:
        nonlocal asked
        asked += 1
        return "SIGTERM" if asked == stop_at else None

    strategy = get_strategy(config)
    tracker = build_file_tracker(config.run.dir)
    return train(strategy, config, parts_of(config), tracker=tracker, should_stop=should_stop)


def metrics(config: Config) -> bytes:
    return channel_path(config.run.dir, "metrics").read_bytes()


def test_a_run_logs_every_step_and_evaluates_where_it_should(tmp_path: Path) -> None:
    """Warm-up rows, rows of reinforcement, evaluations before, in the middle and at the end, checkpoints, a model."""
    config = tiny_config(tmp_path, kl_coef=0.1)
    summary = run(config)
    rows = list(read_rows(channel_path(config.run.dir, "metrics")))
    assert [(row["kind"], row["step"]) for row in rows] == [
        *(("warmup", step) for step in (1, 2, 3)),
        ("evaluation", 3),
        ("step", 4),
        ("step", 5),
        ("evaluation", 5),
        ("step", 6),
        ("step", 7),
        ("evaluation", 7),
    ]
    assert summary.step == 7
    accuracies = [row["accuracy"] for row in rows if row["kind"] == "evaluation"]
    assert (summary.accuracy_before, summary.accuracy_after) == (accuracies[0], accuracies[-1])
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(row["logprob_difference"] < 1e-4 for row in steps)
    assert 0 < steps[0]["kl"] < steps[-1]["kl"]
    assert sorted(path.name for path in checkpoint_dir(config).iterdir()) == [f"step-{i:08d}" for i in range(1, 8)]
    assert (Path(config.run.dir) / "model" / "config.json").exists()
    assert len(list(read_rows(channel_path(config.run.dir, "timings")))) == 7
    samples = list(read_rows(channel_path(config.run.dir, "samples")))
    assert {row["step"] for row in samples} == {3, 5, 7}


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 6])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    """Stopped at any boundary of warm-up or reinforcement and started again, a run logs the same bytes."""
    config = tiny_config(tmp_path, kl_coef=0.1, reward_running_norm=True, num_epochs=2)
    whole, halves = in_dir(config, tmp_path / "whole"), in_dir(config, tmp_path / "halves")
    expected = run(whole)
    with pytest.raises(InterruptedRunError, match=f"SIGTERM: stopped after step {stop_at}"):
        run(halves, stop_at=stop_at)
    assert run(halves) == expected
    assert metrics(halves) == metrics(whole)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Killed with SIGKILL while it logs, a run that is started again logs the same bytes as one that was left alone."""
    config = tiny_config(tmp_path)
    config = attrs.evolve(config, checkpoint=attrs.evolve(config.checkpoint, save_every=2))
    whole, killed = in_dir(config, tmp_path / "whole"), in_dir(config, tmp_path / "killed")
    run(whole)
    for row_of_death in (2, 5, 7):
        run_to_death(partial(die_at_row, killed, row_of_death))
    run(killed)
    assert metrics(killed) == metrics(whole)


def die_at_row(config: Config, row_of_death: int) -> None:
    """Run until so many rows of metrics were logged, then die without any clean-up."""
    tracker = build_file_tracker(config.run.dir)

    def log(channel: str, row: dict[str, object]) -> None:
        tracker.log(channel, row)  # type: ignore[arg-type]
        if channel == "metrics" and len(metrics(config).splitlines()) == row_of_death:
            os.kill(os.getpid(), signal.SIGKILL)

    train(get_strategy(config), config, parts_of(config), tracker=attrs.evolve(tracker, log=log))


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    """Started again after its end, a run logs nothing and reports the same accuracies."""
    config = tiny_config(tmp_path)
    first = run(config)
    before = metrics(config)
    assert run(config) == first
    assert metrics(config) == before


def test_the_model_of_a_shorter_run_does_not_pass_for_that_of_a_longer_one(tmp_path: Path) -> None:
    """More steps in the directory of a finished run find its old model there, say so, and end well once it is gone."""
    config = tiny_config(tmp_path)
    run(config)
    longer = attrs.evolve(config, run=attrs.evolve(config.run, num_steps=6))
    with pytest.raises(CheckpointError, match="holds another model than this run's"):
        run(longer)
    shutil.rmtree(Path(config.run.dir) / "model")
    assert run(longer).step == 9
    assert run(longer).step == 9


def test_same_seed_same_bits_other_seed_other_bits(tmp_path: Path) -> None:
    """Two runs of one seed log the same bytes; another seed logs others."""
    config = tiny_config(tmp_path)
    first, second, other = (in_dir(config, tmp_path / name) for name in ("first", "second", "other"))
    other = attrs.evolve(other, strategy=attrs.evolve(other.strategy, seed=6))
    for one in (first, second, other):
        run(one)
    assert metrics(first) == metrics(second) != metrics(other)


def test_a_run_without_a_group_to_learn_from_says_so_and_keeps_the_weights(tmp_path: Path) -> None:
    """Where every reward is equal, dynamic sampling skips the step with a reason and nothing moves."""
    config = tiny_config(tmp_path, dynamic_sampling=True)

    def constant(prompt: str, completion: str, answer: str, /) -> float:
        del prompt, completion, answer
        return 0.5

    parts = attrs.evolve(parts_of(config), reward=constant)
    strategy = get_strategy(config)
    tracker = build_file_tracker(config.run.dir)
    train(strategy, config, parts, tracker=tracker)
    rows = [row for row in read_rows(channel_path(config.run.dir, "metrics")) if row["kind"] == "step"]
    assert {row["skipped"] for row in rows} == {"every group of the rollout has equal rewards"}
    weights = [
        (checkpoint_dir(config) / f"step-{step:08d}" / "actor.model.safetensors").read_bytes() for step in (3, 7)
    ]
    assert weights[0] == weights[1]


def test_settings_that_do_not_fit_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """A batch that does not divide the rollout raises, and so does a warm-up on more problems than there are."""
    config = tiny_config(tmp_path)
    odd = attrs.evolve(config, strategy=attrs.evolve(config.strategy, train_batch_size=12))
    with pytest.raises(ConfigError, match=r"12 does not divide .*step\(4\) \* num_samples\(4\) = 16"):
        run(odd)
    greedy = attrs.evolve(config, run=attrs.evolve(config.run, warmup_size=57))
    with pytest.raises(ConfigError, match=r"warmup_size=57 is more than the 56 training problems"):
        run(greedy)


def test_a_state_comes_back_from_json() -> None:
    """The state of a run survives JSON, and what is none is refused."""
    state = RunState(step=3, sampler={"epoch": 1, "position": 2}, accuracy=0.25)
    assert state_from_json(json.loads(json.dumps(state_to_json(state)))) == state
    with pytest.raises(CheckpointError, match="not that of a run"):
        state_from_json({"step": 3})


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """Under nohup a closing terminal does not stop the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as should_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert should_stop() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_one_acts(number: signal.Signals) -> None:
    """The first signal is only noted; the handlers from before are back for the second, and after the block."""
    before = signal.getsignal(number)
    with stop_on_signals() as should_stop:
        assert should_stop() is None
        os.kill(os.getpid(), number)
        assert should_stop() == number.name
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before
