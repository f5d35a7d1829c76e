"""Syncing the engines of all ranks: nobody waits for a rank whose engine fails, and no engine goes on alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import attrs
import pytest
import torch
from torch import nn

from lightrft.backends.collectives.simulated import build_collectives, run_simulated
from lightrft.backends.rollout.scripted import build_scripted
from lightrft.backends.rollout.serving import RolloutFunctions, build_rollout
from lightrft.config.sections import EngineConfig
from lightrft.errors import EngineCrashError, EngineStateError, WeightSyncError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.rollout import BuildEngine, Engine, EngineHandle, EngineSource, Prompt, SamplingParams
from lightrft.weight_sync import in_buckets, transfer

COLLECTIVES = build_collectives(StrategyConfig())


class Gathered(nn.Module):
    """A model that is a matter of all ranks: its tensors are gathered one by one, and so is a layer in a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        COLLECTIVES.barrier()
        return self.inner(ids)


def serve(build: BuildEngine = build_scripted) -> RolloutFunctions:
    def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model.state_dict().items():
            COLLECTIVES.barrier()
            yield name.removeprefix("inner."), tensor

    def find_engine(key: str, /) -> BuildEngine:
        del key
        return build

    def unwrap_model(model: nn.Module) -> nn.Module:
        return getattr(model, "inner", model)

    return build_rollout(
        StrategyConfig(),
        COLLECTIVES,
        find_engine=find_engine,
        named_tensors=named_tensors,
        unwrap_model=unwrap_model,
    )


def start(rollout: RolloutFunctions) -> tuple[EngineHandle, Gathered]:
    model = Gathered()
    return rollout.setup_inference_engine(EngineConfig(type="scripted"), actor=model), model


def fails_once(call: Callable[..., object], error: Exception) -> Callable[..., object]:
    left = [error]

    def called(*arguments: object) -> object:
        if left:
            raise left.pop()
        return call(*arguments)

    return called


FAULTS = {
    "begin_update": EngineStateError("it is elsewhere."),
    "put": InterruptedError("it broke off."),
    "commit": WeightSyncError("some are missing."),
    "generate": KeyError("a token"),
}


@pytest.mark.parametrize("call", FAULTS)
def test_all_ranks_raise_what_the_engine_of_one_raises(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left of the stream is taken, whoever waits for a forward is told, and all engines are torn."""
    monkeypatch.setattr(transfer, "in_buckets", partial(in_buckets, bucket_bytes=1))  # a bucket a tensor
    error = FAULTS[call]

    def program(rank: int) -> tuple[str, str, str, int]:
        rollout = serve()
        engine, model = start(rollout)
        right = engine.engine
        if rank == 1:
            planted = {call: fails_once(getattr(right, call), error)}
            engine.engine = attrs.evolve(right, **planted)  # type: ignore[arg-type]
        with pytest.raises(type(error)) as raised:
            rollout.update_engine_weights(engine, model)
        status = engine.status
        with pytest.raises(EngineStateError) as refused:
            rollout.gather_and_generate(engine, [Prompt(token_ids=(1,))], SamplingParams())
        rollout.update_engine_weights(engine, model)
        rollout.gather_and_generate(engine, [Prompt(token_ids=(1,))], SamplingParams(max_new_tokens=1))
        return str(raised.value), status, str(refused.value), engine.weight_version

    (first, *others) = run_simulated(3, program)
    assert others == [first, first]
    words, status, refused, version = first
    assert words == str(type(error)(f"rank 1: {error}"))
    assert status == "torn"
    assert refused == "rank 0: generate: the engine is 'torn'; sync its weights first."
    assert version == 2  # the others had committed the first one


def test_a_probe_that_one_rank_fails_tears_all_engines() -> None:
    """The engine of one rank holds other weights than it was given; the error tells which rank's."""

    def program(rank: int) -> tuple[str, str]:
        rollout = serve()
        engine, model = start(rollout)
        right = engine.engine

        def spoil(handle: EngineHandle, tensors: list[tuple[str, torch.Tensor]]) -> None:
            right.put(handle, [(name, tensor * 2 if name == "1.weight" else tensor) for name, tensor in tensors])

        if rank == 2:
            engine.engine = attrs.evolve(right, put=spoil)
        with pytest.raises(WeightSyncError, match=r"^rank 2: weight_version=1 does not hold") as raised:
            rollout.update_engine_weights(engine, model)
        return str(raised.value), engine.status

    found = run_simulated(3, program)
    assert found == [(found[0][0], "torn")] * 3


def test_a_sync_that_lost_an_engine_is_made_again_by_all_ranks_once() -> None:
    """All of them stream twice, and their versions count one sync; a second loss is raised on all."""
    streams: list[int] = []

    def program(rank: int) -> tuple[int, str, str]:
        rollout = serve()
        engine, model = start(rollout)
        right = engine.engine

        def lose(times: int) -> None:
            crash = [EngineCrashError(f"it is lost, {left} left.") for left in range(times)]

            def commit(handle: EngineHandle) -> int:
                streams.append(rank)
                version = right.commit(handle)
                if rank == 1 and crash:
                    handle.status = "torn"
                    raise crash.pop()
                return version

            engine.engine = attrs.evolve(right, commit=commit)

        lose(1)
        report = rollout.update_engine_weights(engine, model)
        assert report.weight_version == engine.weight_version
        lose(2)
        with pytest.raises(EngineCrashError) as raised:
            rollout.update_engine_weights(engine, model)
        return report.weight_version, engine.status, str(raised.value)

    assert run_simulated(2, program) == [(1, "torn", "rank 1: it is lost, 0 left.")] * 2
    assert sorted(streams) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_an_asleep_engine_of_one_rank_stays_asleep() -> None:
    """Its refusal changes nothing there, and the others do not go on without it."""

    def program(rank: int) -> tuple[str, str]:
        rollout = serve()
        engine, model = start(rollout)
        if rank == 0:
            engine.engine.sleep(engine)
        with pytest.raises(EngineStateError) as raised:
            rollout.update_engine_weights(engine, model)
        return str(raised.value), engine.status

    words = "rank 0: begin_update: the engine is 'asleep'; wake it first."
    assert run_simulated(2, program) == [(words, "asleep"), (words, "torn")]


def test_an_engine_that_one_rank_cannot_start_is_started_on_none() -> None:
    """Who has started its own closes it, and all hear why."""

    def program(rank: int) -> tuple[str, list[str]]:
        started: list[EngineHandle] = []

        def build(config: EngineConfig) -> Engine:
            inner = build_scripted(config)

            def start(source: EngineSource) -> EngineHandle:
                if rank == 1:
                    raise MemoryError("it does not fit.")
                started.append(inner.start(source))
                return started[0]

            return attrs.evolve(inner, start=start)

        with pytest.raises(MemoryError) as raised:
            serve(build).setup_inference_engine(EngineConfig(type="scripted"), actor=Gathered())
        return str(raised.value), [handle.status for handle in started]

    words = "rank 1: it does not fit."
    assert run_simulated(3, program) == [(words, ["closed"]), (words, []), (words, ["closed"])]


def test_an_interrupt_is_not_shared_and_tears_the_engine() -> None:
    """Who interrupts one rank ends it, and what ranks do together tells the others."""

    def program(rank: int) -> str:
        del rank
        rollout = serve()
        engine, model = start(rollout)

        def interrupted(*arguments: object) -> list[object]:
            del arguments
            raise KeyboardInterrupt

        engine.engine = attrs.evolve(engine.engine, generate=interrupted)
        with pytest.raises(KeyboardInterrupt):
            rollout.update_engine_weights(engine, model)
        return engine.status

    assert run_simulated(1, program) == ["torn"]
