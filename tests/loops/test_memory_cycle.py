"""Learning and generating take turns: who has the memory when, and that no bit depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import torch
from runs import in_dir, parts_of, tiny_config
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft.config import EngineConfig
from lightrft.config.root import Config
from lightrft.errors import EngineStateError, InterruptedRunError
from lightrft.loops.memory_cycle import generating
from lightrft.loops.train import train
from lightrft.strategy import Call, EngineHandle, Strategy, get_fake_strategy, get_strategy
from lightrft.tracking.files import build_file_tracker, channel_path, read_rows


def tensors_of(handle: nn.Module | Optimizer) -> list[Tensor]:
    if isinstance(handle, nn.Module):
        return [*handle.parameters(), *handle.buffers()]
    return [value for state in handle.state.values() for value in state.values() if isinstance(value, Tensor)]


def with_far_memory(strategy: Strategy) -> Strategy:
    """Return the strategy with an offload that takes the values away: what is used all the same is not a number."""
    away: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def offload(*handles: nn.Module | Optimizer) -> None:
        for handle in handles:
            if id(handle) not in away:
                away[id(handle)] = [tensor.clone() for tensor in tensors_of(handle)]
                for tensor in tensors_of(handle):
                    tensor.fill_(float("nan"))

    @torch.no_grad()
    def reload(*handles: nn.Module | Optimizer) -> None:
        for handle in handles:
            for tensor, value in zip(tensors_of(handle), away.pop(id(handle), tensors_of(handle)), strict=True):
                tensor.copy_(value)

    return attrs.evolve(strategy, offload=offload, reload=reload)


def taking_turns(config: Config, *, is_on: bool) -> Config:
    return attrs.evolve(
        config,
        strategy=attrs.evolve(config.strategy, enable_engine_sleep=is_on),
        run=attrs.evolve(config.run, offload_while_generating=is_on),
    )


def run(strategy: Strategy, config: Config, *, stop_at: int = 0) -> None:
    asked = 0

    def should_stop() -> str | None:
        nonlocal asked
        asked += 1
        return "SIGTERM" if asked == stop_at else None

    train(strategy, config, parts_of(config), tracker=build_file_tracker(config.run.dir), should_stop=should_stop)


def results(config: Config) -> list[bytes]:
    folder = Path(config.run.dir)
    paths = [channel_path(folder, "metrics"), channel_path(folder, "samples"), folder / "model" / "model.safetensors"]
    return [path.read_bytes() for path in paths]


def test_what_a_run_computes_does_not_depend_on_turns(tmp_path: Path) -> None:
    """With policy, optimizer and reference out of reach while the engine generates, every bit is the same."""
    base = tiny_config(tmp_path, kl_coef=0.1, num_epochs=2)
    base = attrs.evolve(base, run=attrs.evolve(base.run, warmup_steps=6, warmup_until=1.0))  # looks once meanwhile
    with_turns = taking_turns(in_dir(base, tmp_path / "with"), is_on=True)
    without = taking_turns(in_dir(base, tmp_path / "without"), is_on=False)
    run(with_far_memory(get_strategy(with_turns)), with_turns)
    run(get_strategy(without), without)
    assert results(with_turns) == results(without)


@pytest.mark.parametrize(("stop_at", "step"), [(10, 4), (12, 5)])
def test_a_stop_in_a_rollout_saves_what_was_offloaded(tmp_path: Path, stop_at: int, step: int) -> None:
    """Asked to stop in a rollout or an evaluation, with the learners away, a run saves their values and goes on."""
    base = tiny_config(tmp_path, kl_coef=0.1)
    base = attrs.evolve(
        base,
        engine=attrs.evolve(base.engine, batch_size=4),  # four batches a rollout, two an evaluation
        checkpoint=attrs.evolve(base.checkpoint, save_every=0),
    )
    whole = taking_turns(in_dir(base, tmp_path / "whole"), is_on=False)
    halves = taking_turns(in_dir(base, tmp_path / "halves"), is_on=True)
    run(get_strategy(whole), whole)
    with pytest.raises(InterruptedRunError, match=f"stopped after step {step} "):
        run(with_far_memory(get_strategy(halves)), halves, stop_at=stop_at)
    run(with_far_memory(get_strategy(halves)), halves)
    assert results(halves) == results(whole)


def names_of(calls: Sequence[Call]) -> list[str]:
    told = {
        "offload",
        "wakeup_inference_engine",
        "gather_and_generate",
        "maybe_sleep_inference_engine",
        "reload",
        "backward",
        "update_engine_weights",
    }
    names = [call.name for call in calls if call.name in told]
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


def test_who_has_the_memory_when(tmp_path: Path) -> None:
    """In a step the learners leave, the engine wakes and generates and sleeps, the learners come back and learn."""
    config = taking_turns(tiny_config(tmp_path), is_on=True)
    config = attrs.evolve(config, run=attrs.evolve(config.run, warmup_steps=0, num_steps=1))
    calls: list[Call] = []
    train(get_fake_strategy(calls=calls, config=config), config, parts_of(config))
    turn = [
        "offload",
        "wakeup_inference_engine",
        "gather_and_generate",
        "maybe_sleep_inference_engine",
        "reload",
    ]
    learnt = ["backward", "wakeup_inference_engine", "update_engine_weights"]
    assert names_of(calls) == [*turn, *turn, *learnt, *turn]  # an evaluation, a step, an evaluation


def test_without_the_setting_nothing_is_moved(tmp_path: Path) -> None:
    """The learners stay where they are, also at a stop."""
    config = tiny_config(tmp_path)
    calls: list[Call] = []
    with pytest.raises(InterruptedRunError):
        run(get_fake_strategy(calls=calls, config=config), config, stop_at=5)
    assert {"offload", "reload"}.isdisjoint(call.name for call in calls)
    assert "wakeup_inference_engine" in {call.name for call in calls}


def engine_of(strategy: Strategy, model: nn.Module) -> EngineHandle:
    return strategy.setup_inference_engine(EngineConfig(type="scripted"), actor=model)


def test_after_an_exception_the_learners_are_back() -> None:
    """What ends the block is what the caller sees, and the values are there again; the engine is as it was left."""
    strategy = with_far_memory(get_strategy({"strategy": "single", "enable_engine_sleep": True}))
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    engine = engine_of(strategy, nn.Linear(2, 2))
    seen: list[bool] = []

    def fail() -> None:
        seen.append(bool(model.weight.isnan().all()))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), generating(strategy, engine, model):
        fail()
    assert seen == [True]
    assert model.weight.equal(before)
    assert engine.status == "awake"


def test_an_engine_that_cannot_wake_leaves_the_learners_where_they_were() -> None:
    """A torn engine is refused, and nothing stays away."""
    strategy = with_far_memory(get_strategy({"strategy": "single"}))
    model = nn.Linear(2, 2)
    engine = engine_of(strategy, nn.Linear(2, 2))
    engine.engine.abort(engine)
    with pytest.raises(EngineStateError, match="torn"), generating(strategy, engine, model):
        pass
    assert model.weight.isfinite().all()


def test_the_peak_of_each_phase_is_a_timing(tmp_path: Path) -> None:
    """Rows of steps tell the most memory of generating, learning and syncing, and rows of metrics do not."""
    config = taking_turns(tiny_config(tmp_path), is_on=True)
    run(get_strategy(config), config)
    keys = {f"{phase}_peak_resident" for phase in ("collect", "learn", "sync")}
    rows = {channel: list(read_rows(channel_path(config.run.dir, channel))) for channel in ("timings", "metrics")}  # type: ignore[arg-type]
    steps = [row for row in rows["timings"] if row["kind"] == "step"]
    assert len(steps) == 4
    assert all(2**24 < row[key] < 2**40 for row in steps for key in keys)
    assert all(keys.isdisjoint(row) for row in rows["metrics"])
