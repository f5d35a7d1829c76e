"""Rollouts that are made while the policy learns: by the schedule, whatever is faster, and over every kind of end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from rank_runs import RunCase, config_of, run_on_rank
from runs import in_dir, parts_of, run_to_death, tiny_config
from torch import nn

from lightrft.backends.checkpointing.lossless import decode, dumps, encode_client_state, loads
from lightrft.backends.collectives.simulated import run_simulated
from lightrft.config.root import Config
from lightrft.data.prompts import Problem
from lightrft.errors import CheckpointError, ConfigError, EngineStateError, InterruptedRunError, UnsupportedError
from lightrft.loops.ahead import Await, check_draws, made_ahead
from lightrft.loops.checks import check_settings
from lightrft.loops.collect import Request, Scored, request_of
from lightrft.loops.ranks import RolloutOnRanks
from lightrft.loops.rollout_json import rollout_from_json, rollout_to_json
from lightrft.loops.state import RunState, state_from_json, state_to_json
from lightrft.loops.train import train
from lightrft.strategy import Completion, EngineHandle, Prompt, SamplingParams, Strategy, StrategyConfig, get_strategy
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.testing.ranks.simulated import run_simulated_ranks
from lightrft.testing.replicated import build_simulated
from lightrft.testing.subject import subject_of
from lightrft.tracking.files import build_file_tracker, channel_path, read_rows

STALE = {"max_staleness": 1, "importance_correction": "truncate"}

PATIENCE = 120.0
"""Seconds; what is waited for comes at once where nothing is broken."""


def stale_config(folder: Path, **algorithm: object) -> Config:
    config = tiny_config(folder, **STALE, **algorithm)
    return attrs.evolve(config, engine=attrs.evolve(config.engine, batch_size=8))  # two batches a rollout


def run(config: Config, strategy: Strategy | None = None, *, stop_at: int = 0) -> None:
    asked = 0

    def should_stop() -> str | None:
        nonlocal asked
        asked += 1
        return "SIGTERM" if asked == stop_at else None

    train(
        strategy or get_strategy(config),
        config,
        parts_of(config),
        tracker=build_file_tracker(config.run.dir),
        should_stop=should_stop,
    )


def results(config: Config) -> list[bytes]:
    folder = Path(config.run.dir)
    paths = [channel_path(folder, "metrics"), channel_path(folder, "samples"), folder / "model" / "model.safetensors"]
    return [path.read_bytes() for path in paths]


def steps_of(folder: str) -> list[dict[str, object]]:
    return [row for row in read_rows(channel_path(folder, "metrics")) if row["kind"] == "step"]  # type: ignore[misc]


def in_line(rollout: RolloutOnRanks, engine: EngineHandle, request: Request) -> list[Completion]:
    """Return what a rollout of one rank is, by the plain way to make one."""
    made: list[Completion] = []
    for (batch,) in request.order:
        sampling = attrs.evolve(request.sampling, first_prompt=request.sampling.first_prompt + batch.start)
        made += rollout.gather_and_generate(engine, [request.prompts[index] for index in batch], sampling)
    return made


@contextmanager
def made_before(rollout: RolloutOnRanks, engine: EngineHandle, request: Request) -> Generator[Await]:
    """The next rollout, made before anything is learnt."""
    made = in_line(rollout, engine, request)
    yield lambda: made


@contextmanager
def made_after(rollout: RolloutOnRanks, engine: EngineHandle, request: Request) -> Generator[Await]:
    """The next rollout, made after all was learnt, and before the engine is given the new weights."""
    yield lambda: in_line(rollout, engine, request)


def test_what_comes_out_does_not_depend_on_when_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in a thread, wholly before learning, or wholly after it: metrics, samples and model are bit-equal."""
    base = stale_config(tmp_path, kl_coef=0.1, num_epochs=2)
    found: list[list[bytes]] = []
    for name, make in (("thread", made_ahead), ("before", made_before), ("after", made_after)):
        config = in_dir(base, tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr("lightrft.loops.reinforce.made_ahead", make)
            run(config)
        found.append(results(config))
    assert found[0] == found[1]
    assert found[0] == found[2]


def test_learning_and_generating_go_on_at_the_same_time(tmp_path: Path) -> None:
    """A rollout that is made ahead may wait for the backward pass of the one before: it is no part of the caller."""
    config = stale_config(tmp_path)
    strategy = get_strategy(config)
    has_learnt = threading.Event()

    def backward(*arguments: object, **names: object) -> None:
        strategy.backward(*arguments, **names)  # type: ignore[arg-type]
        has_learnt.set()

    def engine_generate_local(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        assert has_learnt.wait(PATIENCE)
        return strategy.engine_generate_local(engine, prompts, sampling)

    config = attrs.evolve(config, run=attrs.evolve(config.run, warmup_steps=0))
    run(config, attrs.evolve(strategy, backward=backward, engine_generate_local=engine_generate_local))
    assert has_learnt.is_set()


def test_on_policy_is_the_loop_without_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With max_staleness=0 nothing is made ahead, and staleness is 0 in every row."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr("lightrft.loops.reinforce.made_ahead", refuse)
    config = tiny_config(tmp_path)
    run(config)
    assert [row["staleness"] for row in steps_of(config.run.dir)] == [0, 0, 0, 0]


def test_staleness_is_bounded_and_told(tmp_path: Path) -> None:
    """The first rollout is made with the weights that learn from it; each later one with those of one step before."""
    config = stale_config(tmp_path)
    run(config)
    rows = steps_of(config.run.dir)
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    # older weights give other logprobs, which on-policy rows do not have
    assert rows[0]["logprob_difference"] < 1e-4  # type: ignore[operator]
    assert all(row["logprob_difference"] > 1e-3 for row in rows[1:])  # type: ignore[operator]


def test_a_step_that_learns_nothing_makes_nothing_stale(tmp_path: Path) -> None:
    """Where every group has equal rewards the weights stay, and so does their version."""
    case = RunCase(
        directory=str(tmp_path / "run"),
        algorithm='{"dynamic_sampling": true, "num_samples": 2, "prompts_per_step": 3, "max_staleness": 1, '
        '"importance_correction": "mask"}',
        strategy='{"train_batch_size": 6, "micro_train_batch_size": 1}',
        is_partial=True,
    )
    run_on_rank_alone(case)
    rows = steps_of(case.directory)
    learnt = [row["skipped"] is None for row in rows]
    assert set(learnt) == {True, False}
    assert [row["staleness"] for row in rows] == [0, *map(int, learnt[:-1])]


def run_on_rank_alone(case: RunCase) -> None:
    from rank_runs import run_with

    run_with(get_strategy(config_of(case)), case, rank=0)


@pytest.mark.parametrize("stop_at", [5, 6, 7])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    """Stopped in the first rollout or after steps: the rollout at hand is saved, and learnt from later."""
    base = stale_config(tmp_path, kl_coef=0.1, reward_running_norm=True)
    whole, halves = in_dir(base, tmp_path / "whole"), in_dir(base, tmp_path / "halves")
    run(whole)
    with pytest.raises(InterruptedRunError):
        run(halves, stop_at=stop_at)
    run(halves)
    assert results(halves) == results(whole)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Killed with SIGKILL while a rollout is made ahead, a run goes on from the checkpoint before to the same bytes."""
    base = stale_config(tmp_path)
    base = attrs.evolve(base, checkpoint=attrs.evolve(base.checkpoint, save_every=2))
    whole, killed = in_dir(base, tmp_path / "whole"), in_dir(base, tmp_path / "killed")
    run(whole)
    for call_of_death in (1, 3, 4):
        run_to_death(partial(die_while_generating, killed, call_of_death))
    run(killed)
    assert results(killed) == results(whole)


def die_while_generating(config: Config, call_of_death: int) -> None:
    """Run until a thread has made so many batches, then die without any clean-up."""
    strategy = get_strategy(config)
    calls = 0

    def engine_generate_local(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        nonlocal calls
        calls += 1
        if calls == call_of_death:
            os.kill(os.getpid(), signal.SIGKILL)
        return strategy.engine_generate_local(engine, prompts, sampling)

    run(config, attrs.evolve(strategy, engine_generate_local=engine_generate_local))


def failing_at(strategy: Strategy, call: int, error: Exception) -> Strategy:
    """Return the strategy whose generation in a thread fails at a call."""
    calls = 0

    def engine_generate_local(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return strategy.engine_generate_local(engine, prompts, sampling)

    return attrs.evolve(strategy, engine_generate_local=engine_generate_local)


@pytest.mark.parametrize("error", [EngineStateError("it is gone"), KeyError("nobody foresaw it")])
def test_an_error_of_the_thread_ends_the_run(tmp_path: Path, error: Exception) -> None:
    """It comes out where the rollout is waited for; the checkpoint before is whole, and no thread is left."""
    config = stale_config(tmp_path)
    with pytest.raises(type(error), match=str(error.args[0])):
        run(config, failing_at(get_strategy(config), 3, error))
    assert [row["step"] for row in steps_of(config.run.dir)] == [4]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollout")]
    run(config)
    expected = in_dir(config, tmp_path / "whole")
    run(expected)
    assert results(config) == results(expected)


def test_an_error_of_learning_gives_the_rollout_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails meanwhile is what the caller sees, after the batch under way and without the rest."""
    is_given_up, has_begun, made = threading.Event(), threading.Event(), []
    monkeypatch.setattr("lightrft.loops.ahead.Event", lambda: is_given_up)

    def engine_generate_local(
        engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        del engine, prompts, sampling
        has_begun.set()
        assert is_given_up.wait(PATIENCE)
        made.append(threading.current_thread().name)
        return []

    strategy = attrs.evolve(get_strategy({"strategy": "single"}), engine_generate_local=engine_generate_local)
    request = Request(problems=(), prompts=(), sampling=SamplingParams(), order=((range(0),), (range(0),), (range(0),)))

    def learn() -> None:
        assert has_begun.wait(PATIENCE)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), made_ahead(strategy, EngineHandle.__new__(EngineHandle), request):
        learn()
    assert len(made) == 1
    assert made[0].startswith("rollout")


def test_ranks_give_the_run_of_one_process(tmp_path: Path) -> None:
    """Every rank makes its share ahead; rows are those of one process, stops on one rank are stops on all."""
    base = RunCase(
        directory="",
        algorithm='{"kl_coef": 0.1, "max_staleness": 1, "importance_correction": "truncate"}',
        engine='{"batch_size": 4}',
    )
    one, many, halves = (attrs.evolve(base, directory=str(tmp_path / name)) for name in ("one", "many", "halves"))
    run_on_rank_alone(one)
    on_ranks = run_simulated_ranks(subject_of(build_simulated, "strategy"), 2)
    on_ranks(run_on_rank, many)
    found, expected = steps_of(many.directory), steps_of(one.directory)
    assert [row["completion_tokens"] for row in found] == [row["completion_tokens"] for row in expected]
    assert [row["staleness"] for row in found] == [0, 1, 1, 1]
    for left, right in zip(found, expected, strict=True):
        for key in ("reward", "loss", "kl", "grad_norm", "logprob_difference"):
            assert left[key] == pytest.approx(right[key], rel=1e-4, abs=1e-6), key
    stopped = on_ranks(run_on_rank, attrs.evolve(halves, stop_at=7, stop_rank=1))
    assert all(each.stopped for each in stopped)
    on_ranks(run_on_rank, halves)
    assert results(config_of(halves)) == results(config_of(many))


def test_what_one_rank_cannot_make_all_ranks_hear_of() -> None:
    """The same type of error on all ranks, and the number of the one that it comes from."""
    strategy = build_simulated(StrategyConfig())

    def on_rank(rank: int) -> str:
        error = EngineStateError("it is gone")
        calls = 1 if rank == 1 else 99
        mine = failing_at(attrs.evolve(strategy, engine_generate_local=nothing_made), calls, error)
        request = request_of(mine, [], tokenizer=None, sampling=SamplingParams(), batch_size=None)  # type: ignore[arg-type]
        with made_ahead(mine, EngineHandle.__new__(EngineHandle), request) as wait:
            try:
                wait()
            except EngineStateError as seen:
                return str(seen)
        return ""

    assert run_simulated(3, on_rank) == ["rank 1: it is gone"] * 3


def nothing_made(engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
    del engine, prompts, sampling
    return []


@pytest.mark.parametrize("engine", ["hf", "scripted"])
def test_an_engines_weights_are_its_own(tmp_path: Path, engine: str) -> None:
    """Weights that the trainer changes reach no engine without a sync: one may generate while the other learns."""
    config = tiny_config(tmp_path)
    strategy, model = get_strategy(config), parts_of(config).model
    settings = attrs.evolve(config.engine, type=engine)
    prompts, sampling = [Prompt(token_ids=(1, 2, 3))], SamplingParams(max_new_tokens=4, seed=1)
    with strategy.setup_inference_engine(settings, actor=model) as handle:
        strategy.update_engine_weights(handle, model)
        before = strategy.engine_generate_local(handle, prompts, sampling)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        assert strategy.engine_generate_local(handle, prompts, sampling) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"algorithm": {"importance_correction": "none"}},
            "importance_correction='none' takes it for the policy's own",
        ),
        ({"strategy": {"enable_engine_sleep": True}}, "strategy.enable_engine_sleep=True has them take turns"),
        ({"run": {"offload_while_generating": True}}, "run.offload_while_generating=True has them take turns"),
        ({"strategy": {"compile_layers": True}}, "leave strategy.compile_layers=True out"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(
    tmp_path: Path, change: Mapping[str, Mapping[str, object]], message: str
) -> None:
    """What would be biased, at odds in memory, or by timing is said before anything is computed; without it, all go."""
    config = stale_config(tmp_path)
    check_settings(config)
    for section, settings in change.items():
        config = attrs.evolve(config, **{section: attrs.evolve(getattr(config, section), **settings)})
    with pytest.raises(ConfigError, match=message):
        check_settings(config)
    check_settings(attrs.evolve(config, algorithm=attrs.evolve(config.algorithm, max_staleness=0)))


def test_a_model_that_draws_while_it_learns_is_refused(tmp_path: Path) -> None:
    """Engine and dropout would draw from one stream, in an order that nobody decides."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))
    with pytest.raises(UnsupportedError, match=r"'1' of the model drops out a share of 0\.1"):
        check_draws(model)
    check_draws(model.eval())
    check_draws(nn.Sequential(nn.Dropout(0.0)))
    config = stale_config(tmp_path)
    parts = parts_of(config)
    attention = next(module for module in parts.model.modules() if hasattr(module, "attention_dropout"))
    attention.attention_dropout = 0.5  # type: ignore[assignment]
    parts.model.train()
    with pytest.raises(UnsupportedError, match=r"drops out a share of 0\.5"):
        train(get_strategy(config), config, parts)


def test_a_rollout_goes_through_a_checkpoint_bit_for_bit() -> None:
    """Tokens, logprobs, texts of any kind, rewards, versions and problems come back equal, and of equal order."""
    first = Problem(question="1+1=", answer="2", metadata={"level": [1, None]})
    second = Problem(question="\ud800", answer="")
    made = [
        completion((3, 1, 2**40), (-0.1, -1e-30, float("-inf")), problem=0, sample=0),
        completion((5,), (-1 / 3,), problem=0, sample=1),
        completion((7, 7), (0.0, -2.5), problem=1, sample=0),
        completion((8,), (-7e-5,), problem=1, sample=1),
    ]
    scored = Scored(
        problems=(first, first, second, second),
        completions=tuple(made),
        texts=("2", "", "\ud800", "ä語"),
        rewards_B=torch.tensor([0.1, -1.0, 1e-20, 3.0]),
    )
    written = dumps(encode_client_state(state_to_json(RunState(step=3, ahead=scored))))
    state = state_from_json(decode(loads(written, source="test")))  # type: ignore[arg-type]
    assert state.step == 3
    assert state.ahead is not None
    assert attrs.asdict(state.ahead, filter=attrs.filters.exclude("rewards_B")) == attrs.asdict(
        scored, filter=attrs.filters.exclude("rewards_B")
    )
    assert state.ahead.rewards_B.dtype == torch.float32
    assert state.ahead.rewards_B.equal(scored.rewards_B)


def completion(token_ids: tuple[int, ...], logprobs: tuple[float, ...], *, problem: int, sample: int) -> Completion:
    return Completion(
        prompt_ids=(1, problem),
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason="stop" if sample else "length",
        weight_version=4 + problem,
        sample_index=sample,
    )


@pytest.mark.parametrize("change", [{"lengths": [1, 2]}, {"token_ids": "!"}, {"problems": [{}]}, {"rewards": ["x"]}])
def test_a_rollout_that_does_not_fit_together_is_refused(change: dict[str, Json]) -> None:
    """A state whose rollout is no rollout is not that of a run."""
    whole = Scored(
        problems=(Problem(question="a", answer="b"),),
        completions=(completion((1,), (-1.0,), problem=0, sample=0),),
        texts=("a",),
        rewards_B=torch.ones(1),
    )
    assert rollout_from_json(rollout_to_json(whole)).texts == ("a",)
    state = state_to_json(RunState(ahead=whole))
    state["ahead"] = {**rollout_to_json(whole), **change}
    with pytest.raises(CheckpointError, match="is not that of a run"):
        state_from_json(state)


def test_a_state_of_before_rollouts_were_made_ahead_is_read() -> None:
    """A checkpoint of an older release has no word of it."""
    written = state_to_json(RunState(step=2))
    del written["ahead"]
    assert state_from_json(written) == RunState(step=2)
