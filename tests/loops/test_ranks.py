"""A run on n ranks is the run of one process: the same completions, rows and parameters, also after a stop."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_runs import RunCase, config_of, run_on_rank, run_with
from safetensors.torch import load_file
from test_learn import LIMIT, TEMPERATURE, model_of, rollout

from lightrft.backends.collectives.simulated import run_simulated
from lightrft.config.sections import AlgorithmConfig, RunConfig
from lightrft.errors import ConfigError
from lightrft.loops.checks import check_world
from lightrft.loops.learn import Learned, learn
from lightrft.loops.ranks import cut, gather_texts, num_ranks, shares
from lightrft.loops.run import checkpoint_dir
from lightrft.loops.warmup import imitate
from lightrft.strategy import get_strategy
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import StepResult
from lightrft.strategy.record import Strategy
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.simulated import run_simulated_ranks
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.replicated import build_gloo, build_simulated
from lightrft.testing.subject import RunOnRanks, subject_of
from lightrft.tracking.files import channel_path, read_rows

EXACT = {"step", "kind", "skipped", "completion_tokens", "accuracy", "prompt", "completion", "answer"}
"""What is the same in every bit; the rest are sums in another order."""

CASES = {
    "two windows a rollout": (2, RunCase(directory="")),
    "one window, kl, two epochs": (
        2,
        RunCase(
            directory="",
            algorithm='{"kl_coef": 0.1, "reward_running_norm": true, "num_epochs": 2}',
            strategy='{"train_batch_size": 16}',
        ),
    ),
    "a scale of all prompts, entropy": (
        4,
        RunCase(
            directory="",
            algorithm='{"advantage": "reinforce++", "entropy_coef": 0.01, "overlong_buffer": 2}',
            strategy='{"micro_train_batch_size": 2}',
        ),
    ),
    "sequences": (2, RunCase(directory="", algorithm='{"loss": "gspo", "aggregation": "sequence"}')),
    "groups left out": (
        3,
        RunCase(
            directory="",
            algorithm='{"dynamic_sampling": true, "num_samples": 2, "prompts_per_step": 3, "aggregation": "constant"}',
            strategy='{"train_batch_size": 6, "micro_train_batch_size": 1}',
            is_partial=True,
        ),
    ),
}


def alone(case: RunCase) -> None:
    config = config_of(case)
    strategy = get_strategy(config)
    run_with(strategy, case, rank=0)
    strategy.teardown()


def rows_of(case: RunCase, channel: str) -> list[dict[str, object]]:
    return list(read_rows(channel_path(case.directory, channel)))  # type: ignore[arg-type]


def assert_same_rows(found: list[dict[str, object]], expected: list[dict[str, object]]) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for left, right in zip(found, expected, strict=True):
        for key, value in right.items():
            if key in EXACT or value is None:
                assert left[key] == value, (key, left, right)
            else:
                assert left[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (key, left, right)


def assert_same_run(case: RunCase, expected: RunCase) -> None:
    """Rows and exported parameters are those of the other run."""
    assert_same_rows(rows_of(case, "metrics"), rows_of(expected, "metrics"))
    assert_same_rows(rows_of(case, "samples"), rows_of(expected, "samples"))
    files = [Path(each.directory) / "model" / "model.safetensors" for each in (case, expected)]
    found, wanted = (load_file(file) for file in files)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def placed(case: RunCase, tmp_path: Path, name: str) -> RunCase:
    return attrs.evolve(case, directory=str(tmp_path / name))


@pytest.mark.parametrize("name", CASES)
def test_ranks_give_the_run_of_one_process(tmp_path: Path, name: str) -> None:
    """Whatever the loss, the windows and what is left out of them, n ranks log the rows of one and train its model."""
    world_size, case = CASES[name]
    one, many = placed(case, tmp_path, "one"), placed(case, tmp_path, "many")
    alone(one)
    seen = run_simulated_ranks(subject_of(build_simulated, "strategy"), world_size)(run_on_rank, many)
    assert_same_run(many, one)
    assert len({(each.step, each.accuracy) for each in seen}) == 1
    assert [each.num_rows > 0 for each in seen] == [True, *[False] * (world_size - 1)]


def test_what_is_left_out_differs_between_steps(tmp_path: Path) -> None:
    """The case above has steps that learn from some groups and steps that learn from none."""
    case = placed(CASES["groups left out"][1], tmp_path, "one")
    alone(case)
    steps = [row for row in rows_of(case, "metrics") if row["kind"] == "step"]
    assert {row["skipped"] for row in steps} == {None, "every group of the rollout has equal rewards"}


@pytest.mark.parametrize("stop_at", [2, 6])
def test_a_stop_that_one_rank_is_asked_for_stops_all_and_they_go_on_to_the_same_bits(
    tmp_path: Path, stop_at: int
) -> None:
    """In the warm-up and after it: all ranks end at the same boundary, and started again log the same bytes."""
    base = RunCase(directory="", algorithm='{"kl_coef": 0.1, "reward_running_norm": true}')
    whole, halves = placed(base, tmp_path, "whole"), placed(base, tmp_path, "halves")
    run = run_simulated_ranks(subject_of(build_simulated, "strategy"), 2)
    run(run_on_rank, whole)
    stopped = run(run_on_rank, attrs.evolve(halves, stop_at=stop_at, stop_rank=1))
    assert all(each.stopped.startswith(f"SIGTERM: stopped after step {stop_at}") for each in stopped)
    run(run_on_rank, halves)
    metrics = [channel_path(each.directory, "metrics").read_bytes() for each in (whole, halves)]
    assert metrics[0] == metrics[1]
    models = [(Path(each.directory) / "model" / "model.safetensors").read_bytes() for each in (whole, halves)]
    assert models[0] == models[1]
    # once more: the model that is there is the run's own, on every rank
    run(run_on_rank, halves)


@pytest.mark.parametrize(("stop_at", "step"), [(4, 3), (5, 4), (6, 4)])
def test_a_stop_that_one_rank_is_asked_for_in_a_rollout_stops_all(tmp_path: Path, stop_at: int, step: int) -> None:
    """Between two batches of an evaluation and of rollouts: all ranks drop what they made, and make it again."""
    base = RunCase(directory="", algorithm='{"kl_coef": 0.1, "reward_running_norm": true}', engine='{"batch_size": 4}')
    whole, halves = placed(base, tmp_path, "whole"), placed(base, tmp_path, "halves")
    run = run_simulated_ranks(subject_of(build_simulated, "strategy"), 2)
    run(run_on_rank, whole)
    # a batch is one problem of a rollout or four of an evaluation a rank: two batches of a rollout, one of a test
    stopped = run(run_on_rank, attrs.evolve(halves, stop_at=stop_at, stop_rank=1))
    assert all(each.stopped.startswith(f"SIGTERM: stopped after step {step}") for each in stopped)
    run(run_on_rank, halves)
    for channel in ("metrics", "samples"):
        found, expected = (channel_path(each.directory, channel).read_bytes() for each in (halves, whole))
        assert found == expected


@pytest.fixture(scope="module")
def gloo(spawn: SpawnRank) -> Iterator[RunOnRanks]:
    with processes(subject_of(build_gloo, "strategy"), 2, timeout=100, spawn=spawn) as run:
        yield run


def test_processes_give_the_run_of_one_process(tmp_path: Path, gloo: RunOnRanks) -> None:
    """Two processes over gloo log the rows of one process, train its model, and go on after a stop to the same bits."""
    base = RunCase(directory="", algorithm='{"kl_coef": 0.1, "dynamic_sampling": true}', is_partial=True)
    one, many, halves = (placed(base, tmp_path, name) for name in ("one", "many", "halves"))
    alone(one)
    gloo(run_on_rank, many)
    assert_same_run(many, one)
    stopped = gloo(run_on_rank, attrs.evolve(halves, stop_at=5, stop_rank=1))
    assert all(each.stopped for each in stopped)
    gloo(run_on_rank, halves)
    assert (
        channel_path(halves.directory, "metrics").read_bytes() == channel_path(many.directory, "metrics").read_bytes()
    )


def learn_with(strategy: Strategy, algorithm: AlgorithmConfig, count: int) -> tuple[dict[str, torch.Tensor], Learned]:
    actor, *_ = strategy.prepare_models_and_optimizers(model_of(1), None, None, None)
    completions, advantages_B = rollout()
    learned = learn(
        strategy,
        actor,
        completions[:count],
        advantages_B[:count],
        algorithm=algorithm,
        temperature=TEMPERATURE,
        max_new_tokens=LIMIT,
        train_batch_size=4,
        micro_train_batch_size=1,
    )
    return {name: tensor.clone() for name, tensor in strategy.named_tensors(actor.model)}, learned


@pytest.mark.parametrize("loss", ["ppo_clip", "gspo"])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_rank_without_completions_keeps_step(loss: str, count: int) -> None:
    """Four ranks learn from 1, 3 and 6 completions, some of them from none, what one process learns."""
    algorithm = AlgorithmConfig(loss=loss, aggregation="sequence", num_epochs=2, clip_high=0.05, entropy_coef=0.1)
    config = StrategyConfig(strategy="single", actor_learning_rate=0.01, max_norm=0.0, train_batch_size=4)
    expected, learned = learn_with(get_strategy(config), algorithm, count)
    found = run_simulated(4, lambda _: learn_with(build_simulated(config), algorithm, count))
    for weights, seen in found:
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)
        assert len(seen.steps) == len(learned.steps) == 2 * math.ceil(count / 4)
        for key in ("loss", "kl", "entropy", "clipped", "logprob_difference"):
            assert getattr(seen, key) == pytest.approx(getattr(learned, key), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("micro", [1, 2, 6])
def test_imitation_is_shared_out_too(micro: int) -> None:
    """A step on answers takes no notice of how many ranks share them, nor of micro-batches; one rank may have none."""
    completions, _ = rollout()

    def imitated(strategy: Strategy, count: int, size: int) -> tuple[dict[str, torch.Tensor], StepResult, float]:
        actor, *_ = strategy.prepare_models_and_optimizers(model_of(1), None, None, None)
        result, loss = imitate(strategy, actor, completions[:count], micro_batch_size=size)
        return {name: tensor.clone() for name, tensor in strategy.named_tensors(actor.model)}, result, loss

    config = StrategyConfig(strategy="single", actor_learning_rate=0.01)
    for count in (2, 5):
        weights, result, loss = imitated(get_strategy(config), count, 6)
        for found in run_simulated(3, lambda _, count=count: imitated(build_simulated(config), count, micro)):
            assert found[2] == pytest.approx(loss, rel=1e-5)
            assert found[1].grad_norm == pytest.approx(result.grad_norm, rel=1e-4)
            for name, tensor in weights.items():
                torch.testing.assert_close(found[0][name], tensor, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_consecutive_and_even(count: int, parts: int) -> None:
    """Together they are all numbers in order, and no two differ in size by more than one."""
    found = shares(count, parts)
    assert [number for part in found for number in part] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert len(found) == parts


def test_texts_of_all_ranks_come_in_order() -> None:
    """Any text travels, also none and an empty one, and ranks may have different numbers of them."""
    texts = [["a\n", "", "äß 語"], [], ["\ud800"]]
    strategy = build_simulated(StrategyConfig())
    found = run_simulated(3, lambda rank: gather_texts(strategy, texts[rank]))
    assert found == [[text for part in texts for text in part]] * 3
    assert cut([1, 2, 3], [2, 0, 1]) == [(1, 2), (), (3,)]
    assert run_simulated(3, lambda _: num_ranks(strategy)) == [3] * 3


@pytest.mark.parametrize(
    ("strategy", "algorithm", "message"),
    [
        (
            {},
            {},
            r"^train_batch_size=8 is not divisible by micro_train_batch_size\(4\) \* world_size\(3\) = 12; use 12\.",
        ),
        (
            {"micro_train_batch_size": 2, "train_batch_size": 16},
            {},
            r"train_batch_size=16 is not divisible by .*\(2\) \* world_size\(3\) = 6; use 12 or 18\.",
        ),
        (
            {"micro_train_batch_size": 1, "train_batch_size": 6},
            {"prompts_per_step": 4, "num_samples": 3},
            r"^algorithm\.prompts_per_step=4 is not divisible by world_size\(3\); use 3 or 6\.",
        ),
    ],
)
def test_ranks_that_do_not_divide_the_work_are_refused_at_once(
    tmp_path: Path, strategy: dict[str, int], algorithm: dict[str, int], message: str
) -> None:
    """Every rank says the same before anything is trained or written, and the numbers named would do."""
    case = RunCase(directory=str(tmp_path / "run"), strategy=json.dumps(strategy), algorithm=json.dumps(algorithm))
    with pytest.raises(ConfigError, match=message):
        run_simulated_ranks(subject_of(build_simulated, "strategy"), 3)(run_on_rank, case)
    config = config_of(case)
    assert not checkpoint_dir(config).exists()
    assert isinstance(config.run, RunConfig)
    check_world(config, 1)
