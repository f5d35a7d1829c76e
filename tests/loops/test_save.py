"""When a run saves, which checkpoints stay, and that a stop in the middle of a rollout costs no bit."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import pytest
from runs import in_dir, parts_of, tiny_config

from lightrft.config.root import Config
from lightrft.errors import CheckpointError, InterruptedRunError
from lightrft.loops.collect import collect, sampling_params
from lightrft.loops.parts import Parts
from lightrft.loops.run import checkpoint_dir
from lightrft.loops.train import Summary, train
from lightrft.strategy import background_saves, get_strategy
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.strategy.record import Strategy
from lightrft.testing.ranks.simulated import run_simulated
from lightrft.testing.replicated import build_simulated
from lightrft.tracking.files import build_file_tracker, channel_path, read_rows
from lightrft.tracking.tracker import Channel, Tracker, no_tracker


def saving(config: Config, **settings: object) -> Config:
    """Return the run with other settings of its checkpoints."""
    return attrs.evolve(config, checkpoint=attrs.evolve(config.checkpoint, **settings))  # type: ignore[arg-type]


def saved_steps(config: Config) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in checkpoint_dir(config).iterdir())


def minute_a_step(tracker: Tracker) -> tuple[Tracker, Callable[[], float]]:
    """Return a tracker, and a clock by which each step takes a minute."""
    seconds = 0.0

    def log(channel: Channel, row: Mapping[str, Json]) -> None:
        nonlocal seconds
        seconds += 60.0 * (channel == "metrics" and row["kind"] != "evaluation")
        tracker.log(channel, row)

    def clock() -> float:
        return 1000.0 + seconds

    return attrs.evolve(tracker, log=log), clock


def test_a_checkpoint_is_written_so_many_minutes_after_the_last_one(tmp_path: Path) -> None:
    """Steps of a minute, saved every two: after 2, and after 5 because the warm-up's end at 3 was saved anyhow."""
    config = saving(tiny_config(tmp_path), save_every=0, save_minutes=2)
    tracker, clock = minute_a_step(no_tracker())
    train(get_strategy(config), config, parts_of(config), tracker=tracker, clock=clock)
    assert saved_steps(config) == [2, 3, 5, 7]
    never = in_dir(saving(config, save_minutes=0), tmp_path / "never")
    train(get_strategy(never), never, parts_of(never), tracker=tracker, clock=clock)
    assert saved_steps(never) == [3, 7]


def test_minutes_are_those_of_rank_0(tmp_path: Path) -> None:
    """Ranks whose clocks disagree save together: a clock that stands still or races makes no difference on rank 1."""
    for seconds in (0.0, 1e9):
        config = saving(tiny_config(tmp_path), save_every=0, save_minutes=2)
        config = in_dir(config, tmp_path / f"{seconds}")
        strategy = build_simulated(config.strategy)

        def run(rank: int, config: Config = config, strategy: Strategy = strategy, wrong: float = seconds) -> Summary:
            tracker, clock = minute_a_step(no_tracker())
            calls = 0

            def other() -> float:
                nonlocal calls
                calls += 1
                return wrong * calls

            parts = parts_of(config)
            return train(strategy, config, parts, tracker=tracker, clock=clock if rank == 0 else other)

        run_simulated(2, run)
        assert saved_steps(config) == [2, 3, 5, 7]


def test_what_a_run_is_to_keep_is_written_and_stays(tmp_path: Path) -> None:
    """Multiples of keep_every are there beside the newest, and with keep_best the evaluated step of most accuracy."""
    config = saving(tiny_config(tmp_path), save_every=0, max_num=1, keep_every=2)
    run(config)
    assert saved_steps(config) == [2, 4, 6, 7]


@pytest.mark.parametrize("save_every", [0, 1])
def test_the_best_evaluated_step_stays(tmp_path: Path, save_every: int) -> None:
    """Evaluated steps are written, and the best one stays; a step that was not evaluated does not pass for one."""
    config = saving(tiny_config(tmp_path), save_every=save_every, max_num=1, keep_best=1)
    parts = parts_of(config)
    num_scored = 0

    def right_at_first(prompt: str, completion: str, answer: str, /) -> float:
        nonlocal num_scored
        num_scored += 1
        return 1.0 if num_scored <= len(parts.heldout) else parts.reward(prompt, completion, answer) / 100

    run(config, attrs.evolve(parts, reward=right_at_first))
    accuracies = {row["step"]: row["accuracy"] for row in rows_of(config) if row["kind"] == "evaluation"}
    assert accuracies == {3: 1.0, 5: 0.0, 7: 0.0}
    assert saved_steps(config) == [3, 7]


def in_batches(folder: Path) -> Config:
    """Return a run whose rollouts have 4 batches, evaluations 2 and the checks of the warm-up 14."""
    config = tiny_config(folder, kl_coef=0.1, reward_running_norm=True)
    return attrs.evolve(
        saving(config, save_every=0),
        engine=attrs.evolve(config.engine, batch_size=4),
        run=attrs.evolve(config.run, warmup_steps=6, warmup_until=0.9, num_steps=3),
    )


def drawing_parts(config: Config) -> Parts:
    """Return the parts with a reward that draws from Python's own stream: a lost or repeated draw shows in the rows."""
    parts = parts_of(config)

    def reward(prompt: str, completion: str, answer: str, /) -> float:
        return 0.5 * parts.reward(prompt, completion, answer) + 0.1 * random.random()  # noqa: S311

    return attrs.evolve(parts, reward=reward)


def run(config: Config, parts: Parts | None = None, *, stop_at: int = 0, asked: list[int] | None = None) -> Summary:
    """Run, and be asked to stop at one of the questions; `asked` gets the number of rows at each of them."""
    questions: list[int] = [] if asked is None else asked

    def should_stop() -> str | None:
        questions.append(len(rows_of(config)))
        return "SIGTERM" if len(questions) == stop_at else None

    strategy = get_strategy(config)
    strategy.setup_distributed()  # seeds, if this is the first run of this process; what comes now stays
    random.seed(len(rows_of(config)))  # a run that goes on has to find its own place in the stream
    tracker = build_file_tracker(config.run.dir)
    return train(strategy, config, parts or drawing_parts(config), tracker=tracker, should_stop=should_stop)


def rows_of(config: Config) -> list[dict[str, Json]]:
    path = channel_path(config.run.dir, "metrics")
    return list(read_rows(path)) if path.exists() else []


def logged(config: Config) -> list[bytes]:
    return [channel_path(config.run.dir, channel).read_bytes() for channel in ("metrics", "samples")]


QUESTIONS = {
    "warm-up": (1, 5),
    "check of the warm-up": (6, 12, 18),
    "evaluation before": (19,),
    "rollout": (21, 23, 26),
    "evaluation": (28,),
    "last rollout": (30, 32),
    "last evaluation": (33,),
    "end": (34,),
}
"""By their number, counted from 1."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Summary]:
    """A run from beginning to end."""
    config = in_batches(tmp_path_factory.mktemp("whole"))
    return config, run(config)


def test_a_run_is_asked_between_batches_too(tmp_path: Path) -> None:
    """Rows that are logged at each question: 13 times in the check of the warm-up, 3 in a rollout, once in a test."""
    asked: list[int] = []
    run(in_batches(tmp_path), asked=asked)
    counts = {rows: asked.count(rows) for rows in asked}
    assert counts == {1: 1, 2: 1, 3: 1, 4: 1, 5: 14, 6: 1, 7: 4, 8: 4, 9: 1, 10: 4, 11: 1, 12: 1}


@pytest.mark.parametrize("question", [one for each in QUESTIONS.values() for one in each])
def test_a_run_that_is_stopped_between_batches_goes_on_to_the_same_bits(
    tmp_path: Path, whole: tuple[Config, Summary], question: int
) -> None:
    """What was made of a rollout, an evaluation or a check is dropped and made again, and no draw is lost by it."""
    expected, summary = whole
    config = in_dir(expected, tmp_path / "run")
    with pytest.raises(InterruptedRunError, match="SIGTERM: stopped after step") as caught:
        run(config, stop_at=question)
    done = sum(row["kind"] != "evaluation" for row in rows_of(config))
    assert f"stopped after step {done} with a checkpoint" in str(caught.value)
    assert saved_steps(config)[-1] == done
    assert run(config) == summary
    assert logged(config) == logged(expected)


def test_a_run_that_is_stopped_again_and_again_goes_on_to_the_same_bits(
    tmp_path: Path, whole: tuple[Config, Summary]
) -> None:
    """Also where it is stopped twice at one step, whose checkpoint is there already."""
    expected, summary = whole
    config = in_dir(expected, tmp_path / "run")
    stops = 0
    for question in (7, 2, 4, 15, 1, 2, 3, 5, 1, 4, 5, 3, 2, 2, 1):
        with pytest.raises(InterruptedRunError):
            run(config, stop_at=question)
        stops += 1
    assert stops == 15
    assert run(config) == summary
    assert logged(config) == logged(expected)


def test_an_evaluation_that_was_made_up_for_is_logged_once(tmp_path: Path, whole: tuple[Config, Summary]) -> None:
    """Stopped in an evaluation, then killed when it was made up for: what starts again drops its rows."""
    expected, summary = whole
    config = in_dir(expected, tmp_path / "run")
    with pytest.raises(InterruptedRunError, match="stopped after step 8"):
        run(config, stop_at=28)
    assert [row["kind"] for row in rows_of(config)][-1] == "step"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            killed_after(config, num_rows=10)
        assert [row["kind"] for row in rows_of(config)][-1] == "evaluation"
    assert run(config) == summary
    assert logged(config) == logged(expected)


def killed_after(config: Config, *, num_rows: int) -> None:
    """Run until so many rows are logged, and end without a checkpoint at the next question."""

    def should_stop() -> str | None:
        if len(rows_of(config)) == num_rows:
            raise KeyboardInterrupt
        return None

    random.seed(1)
    tracker = build_file_tracker(config.run.dir)
    train(get_strategy(config), config, drawing_parts(config), tracker=tracker, should_stop=should_stop)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_make_the_rollout_that_is_made_at_once(tmp_path: Path, world_size: int) -> None:
    """Whatever the size of a batch and the number of ranks: the same tokens and rewards, in the problems' order."""
    config = tiny_config(tmp_path)
    parts = parts_of(config)
    strategy = get_strategy(config) if world_size == 1 else build_simulated(config.strategy)

    def rolled_out(batch_size: int | None) -> tuple[list[tuple[str, tuple[int, ...], int, str, float]], int]:
        turns = 0

        def between_batches() -> None:
            nonlocal turns
            turns += 1

        engine = strategy.setup_inference_engine(config.engine, actor=parts.model, tokenizer=parts.tokenizer)
        scored = collect(
            strategy,
            engine,
            parts.train[:7],
            tokenizer=parts.tokenizer,
            reward=parts.reward,
            sampling=sampling_params(config.engine, parts.tokenizer, num_samples=3, seed=1),
            batch_size=batch_size,
            between_batches=between_batches,
        )
        rows = zip(scored.problems, scored.completions, scored.texts, scored.rewards_B.tolist(), strict=True)
        made = [(p.question, c.token_ids, c.sample_index, text, reward) for p, c, text, reward in rows]
        assert all(
            c.prompt_ids == tuple(parts.tokenizer.encode(p.question))
            for p, c in zip(scored.problems, scored.completions, strict=True)
        )
        return made, turns

    def every(_: int) -> list[tuple[list[tuple[str, tuple[int, ...], int, str, float]], int]]:
        return [rolled_out(batch_size) for batch_size in (None, 1, 7, 12, 1000)]

    for found in [every(0)] if world_size == 1 else run_simulated(world_size, every):
        at_once = found[0][0]
        assert [row[0] for row in at_once] == [problem.question for problem in parts.train[:7] for _ in range(3)]
        assert len({row[1] for row in at_once}) > 10
        assert all(made == at_once for made, _ in found)
        # 7 problems in batches of 1, 2 and 4 a rank
        assert [turns for _, turns in found] == [0, *(-(-7 // (each * world_size)) - 1 for each in (1, 2, 4)), 0]


def test_a_run_that_saves_in_the_background_is_the_same_run(tmp_path: Path) -> None:
    """Its checkpoints hold the same bytes as one that waits for them, and the last one is there when it has ended."""
    config = saving(tiny_config(tmp_path), keep_best=1)
    whole, behind = in_dir(config, tmp_path / "whole"), in_dir(config, tmp_path / "behind")
    train(get_strategy(whole), whole, parts_of(whole))
    strategy = get_strategy(behind)
    with background_saves(strategy) as background:
        train(strategy, behind, parts_of(behind), background=background)
        assert saved_steps(behind) == saved_steps(whole) == list(range(1, 8))
    files = {
        config.run.dir: {
            str(path.relative_to(checkpoint_dir(config))): path.read_bytes()
            for path in checkpoint_dir(config).rglob("*.*")
        }
        for config in (whole, behind)
    }
    assert files[whole.run.dir] == files[behind.run.dir]


def test_a_run_that_is_stopped_has_its_checkpoint_when_it_says_so(tmp_path: Path) -> None:
    """Asked to stop, a run that saves in the background ends when the checkpoint is committed."""
    config = saving(tiny_config(tmp_path), save_every=0)
    strategy, asked = get_strategy(config), iter([None, None, "SIGTERM"])
    with background_saves(strategy) as background:
        with pytest.raises(InterruptedRunError, match="stopped after step"):
            train(strategy, config, parts_of(config), should_stop=lambda: next(asked), background=background)
        assert len(saved_steps(config)) == 1


def test_a_run_whose_last_save_failed_fails(tmp_path: Path) -> None:
    """An error of the background ends the run, at the latest when it is over."""
    config = saving(tiny_config(tmp_path), save_every=0)
    strategy = get_strategy(config)

    def fail(save: Callable[[], None], /) -> None:
        def save_nowhere() -> None:
            save()
            raise CheckpointError("the disk is full")

        background.start(save_nowhere)

    with background_saves(strategy) as background:
        failing = attrs.evolve(background, start=fail)
        with pytest.raises(CheckpointError, match="the disk is full"):
            train(strategy, config, parts_of(config), background=failing)


def test_a_run_that_is_stopped_saves_after_a_save_that_failed(tmp_path: Path) -> None:
    """A stop is tried, and told, although the save before it failed in the background; that is told, too."""
    config = saving(tiny_config(tmp_path), save_every=2)
    strategy, asked, is_bad = get_strategy(config), iter([None, None, "SIGTERM"]), iter([True, False])

    def fail_first(save: Callable[[], None], /) -> None:
        is_failing = next(is_bad)

        def save_or_fail() -> None:
            save()
            if is_failing:
                raise CheckpointError("the disk is full.")

        background.start(save_or_fail)

    with background_saves(strategy) as background:
        failing = attrs.evolve(background, start=fail_first)
        words = r"^SIGTERM: stopped after step 3 .* to go on\. Before that, the disk is full\.$"
        with pytest.raises(InterruptedRunError, match=words):
            train(strategy, config, parts_of(config), should_stop=lambda: next(asked), background=failing)
    assert saved_steps(config) == [2, 3]


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_stop_at_the_step_of_a_save_that_failed_leaves_its_checkpoint(tmp_path: Path, is_committed: bool) -> None:
    """A rollout is stopped, and the state before it is that of the failed save, which may be committed."""
    config = saving(in_batches(tmp_path), save_every=1)
    strategy, num_saves = get_strategy(config), 0

    def fail_last(save: Callable[[], None], /) -> None:
        nonlocal num_saves
        num_saves += 1
        is_failing = num_saves == 7

        def save_or_fail() -> None:
            save()
            if is_failing and not is_committed:
                shutil.rmtree(max(checkpoint_dir(config).iterdir()))
            if is_failing:
                raise CheckpointError("the disk is full.")

        background.start(save_or_fail)

    with background_saves(strategy) as background:
        failing = attrs.evolve(background, start=fail_last)
        words = r"^SIGTERM: stopped after step 7 .* to go on\. Before that, the disk is full\.$"
        with pytest.raises(InterruptedRunError, match=words):
            train(
                strategy,
                config,
                parts_of(config),
                should_stop=lambda: "SIGTERM" if num_saves == 7 else None,
                background=failing,
            )
    assert saved_steps(config)[-1] == 7
    assert num_saves == (7 if is_committed else 8)
