"""What a run's checkpoint holds: a run that was stopped ends in the bytes of one that was not, whatever it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
from averaged import run_averaged, with_average
from rank_runs import RunCase, config_of, run_with

from lightrft.loops import run as run_module
from lightrft.loops.run import checkpoint_dir
from lightrft.loops.state import RunState, state_to_json
from lightrft.strategy import get_strategy
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.subject import RunOnRanks, subject_of
from lightrft.tracking.files import channel_path

LAST = 7
STOPS = [(2, 2), (4, 6)]
"""Number of the question whether to stop, and the step after which that is: in the warm-up and in reinforcement."""

# dr_grpo keeps the scale of the rewards, which the running statistics decide; some rollouts teach nothing
ALGORITHM = {
    "advantage": "dr_grpo",
    "reward_running_norm": True,
    "reward_running_norm_minus_mean": True,
    "dynamic_sampling": True,
    "num_samples": 2,
    "prompts_per_step": 2,
    "kl_coef": 0.1,
}
STRATEGIES: dict[str, dict[str, object]] = {
    "single": {"strategy": "single"},
    "fsdp2": {"strategy": "fsdp2"},
    "deepspeed-1": {"strategy": "deepspeed", "zero_stage": 1},
    "deepspeed-3": {"strategy": "deepspeed", "zero_stage": 3, "zero_persistence_threshold": 0},
}


def case_of(directory: Path, name: str) -> RunCase:
    settings = {**STRATEGIES[name], "train_batch_size": 4, "micro_train_batch_size": 2}
    return RunCase(
        directory=str(directory),
        algorithm=json.dumps(ALGORITHM),
        strategy=json.dumps(settings),
        is_partial=True,
        is_noisy=True,
    )


@pytest.fixture(scope="module")
def ranks(spawn: SpawnRank) -> Iterator[Callable[[int], RunOnRanks]]:
    """Pools of one and two processes, each started when it is first asked, for every strategy."""
    subject = subject_of(get_strategy, "strategy")
    with ExitStack() as stack:
        yield {n: stack.enter_context(processes(subject, n, timeout=100, spawn=spawn)) for n in (1, 2)}.__getitem__


def last_checkpoint(case: RunCase) -> dict[str, bytes]:
    path = checkpoint_dir(config_of(case)) / f"step-{LAST:08d}"
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def differences(one: RunCase, other: RunCase) -> list[str]:
    """Names of what differs in two runs: files of the last checkpoint, rows, and the model."""
    files, others = last_checkpoint(one), last_checkpoint(other)
    assert files.keys() == others.keys()
    assert {"actor.optimizer.safetensors", "average.model.safetensors", "reference.model.safetensors"} < set(files)
    found = [name for name in files if files[name] != others[name]]
    for channel in ("metrics", "samples"):
        rows = [channel_path(each.directory, channel).read_bytes() for each in (one, other)]  # type: ignore[arg-type]
        found += [channel] if rows[0] != rows[1] else []
    models = [(Path(each.directory) / "model" / "model.safetensors").read_bytes() for each in (one, other)]
    return found + (["model"] if models[0] != models[1] else [])


@pytest.mark.parametrize(
    ("name", "world_size"), [*((name, 1) for name in STRATEGIES), ("fsdp2", 2), ("deepspeed-3", 2)]
)
def test_a_stopped_run_ends_in_the_bytes_of_one_that_was_not(
    tmp_path: Path, ranks: Callable[[int], RunOnRanks], name: str, world_size: int
) -> None:
    """Policy, average, moments, statistics, sampler, weight version and streams: every byte of the last checkpoint."""
    whole, halves = (case_of(tmp_path / part, name) for part in ("whole", "halves"))
    run = ranks(world_size)
    run(run_averaged, whole)
    for asked, step in STOPS:  # the second stop is one of the run that went on from the first
        stopped = run(run_averaged, attrs.evolve(halves, stop_at=asked, stop_rank=world_size - 1))
        assert all(f"stopped after step {step} " in each.stopped for each in stopped)
    run(run_averaged, halves)
    assert differences(halves, whole) == []
    assert f"rank-0000{world_size - 1}.random.json" in last_checkpoint(halves)


def run_alone(case: RunCase, *, is_restored: bool = True) -> str:
    """Run a case with an average in this process; return why it stopped."""
    strategy = get_strategy(config_of(case))
    try:
        return run_with(with_average(strategy, is_restored=is_restored), case, rank=0).stopped
    finally:
        strategy.teardown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunCase:
    """A run of `single` from beginning to end."""
    case = case_of(tmp_path_factory.mktemp("undisturbed") / "whole", "single")
    assert run_alone(case) == ""
    return case


def test_the_run_is_one_that_would_notice(undisturbed: RunCase) -> None:
    """Its statistics, sampler and weight version are none that a new run begins with, and some step taught nothing."""
    files = last_checkpoint(undisturbed)
    state = json.loads(files["client_state.json"])
    assert state["rewards"]["count"] == 16
    assert state["rewards"]["m2"] > 0.1
    assert state["sampler"] == {"epoch": 0, "position": 8}
    assert 0 < state["weight_version"] < 4
    assert files["average.model.safetensors"] != files["actor.model.safetensors"]


def forgets(field: str) -> Callable[[RunState], dict[str, Json]]:
    def forgetful(state: RunState) -> dict[str, Json]:
        fresh = attrs.evolve(state, **{field: getattr(RunState(), field)})
        return state_to_json(state if state.step == LAST else fresh)

    return forgetful


@pytest.mark.parametrize(
    ("forgotten", "changed"),
    [
        ("rewards", {"client_state.json", "metrics", "model", "actor.model.safetensors", "average.model.safetensors"}),
        ("sampler", {"client_state.json", "metrics", "model", "actor.model.safetensors", "average.model.safetensors"}),
        ("weight_version", {"client_state.json"}),
        ("average", {"average.model.safetensors"}),
        ("streams", {"rank-00000.random.json", "metrics", "model"}),
    ],
)
def test_what_a_checkpoint_forgets_is_noticed(
    tmp_path: Path,
    undisturbed: RunCase,
    monkeypatch: pytest.MonkeyPatch,
    forgotten: str,
    changed: set[str],
) -> None:
    """Without any of these a resumed run is another one, so the test above cannot pass for lack of it."""
    case = case_of(tmp_path / "halves", "single")
    if forgotten in {"rewards", "sampler", "weight_version"}:
        monkeypatch.setattr(run_module, "state_to_json", forgets(forgotten))
    assert "stopped after step 5 " in run_alone(attrs.evolve(case, stop_at=5))
    if forgotten == "streams":
        monkeypatch.setattr("lightrft.backends.checkpointing.loading.plan_streams", lambda *_, **__: lambda: None)
    assert run_alone(case, is_restored=forgotten != "average") == ""
    assert changed <= set(differences(case, undisturbed))


def test_a_checkpoint_without_a_weight_version_counts_from_zero() -> None:
    """What an earlier version wrote is read."""
    written = state_to_json(RunState(step=3))
    del written["weight_version"]
    assert run_module.state_from_json(written) == RunState(step=3)
