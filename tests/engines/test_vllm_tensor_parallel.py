"""One vLLM that two ranks run together, each with a shard of its weights: `make test-vllm`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
import sync_rounds
import tensor_parallel_programs as programs
from forked_ranks import PRELOADED, forks
from guests import installed, logprob_difference
from torch._C._distributed_c10d import TCPStore

from lightrft.config import EngineConfig, StrategyConfig
from lightrft.testing.conformance.hold import draw_settings, hold_law
from lightrft.testing.law import Harness
from lightrft.testing.laws.registry import STRATEGY_LAWS
from lightrft.testing.plain import from_json, to_json
from lightrft.testing.ranks.messages import Job, Reply, start_of_subject
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank, end_workers, say, start_workers
from lightrft.testing.subject import RunOnRanks, Subject, subject_of

installed("vllm")

pytestmark = pytest.mark.filterwarnings("ignore")

TIMEOUT = 120.0
ENGINE = EngineConfig(type="vllm", cache_gb=0.01, batch_size=8, tensor_parallel_size=2, timeout_seconds=TIMEOUT)


def subject(strategy: str, **settings: object) -> Subject:
    config = StrategyConfig.from_mapping({"strategy": strategy, "timeout": TIMEOUT, **settings})
    return subject_of(strategy, "strategy", config=config, engine=ENGINE)


FSDP2 = subject("fsdp2")
STAGE_3 = subject("deepspeed", zero_stage=3, zero_persistence_threshold=0)


@pytest.fixture(scope="module")
def spawned() -> Iterator[SpawnRank]:
    """Starts ranks that have imported vLLM."""
    with forks((*PRELOADED, "preload_vllm")) as spawn:
        yield spawn


@pytest.fixture(scope="module")
def run(spawned: SpawnRank) -> Iterator[RunOnRanks]:
    with processes(FSDP2, 2, timeout=2 * TIMEOUT, spawn=spawned) as run:
        yield run


def test_two_ranks_generate_what_one_does(run: RunOnRanks) -> None:
    """Greedy and sampled completions are those of an engine on each rank, of half the weights, after a sleep, too."""
    seen = run(programs.make, "")
    model = programs.policy()
    for share, made in zip(programs.SHARES, seen, strict=True):
        assert [each.token_ids for each in made.greedy] == [each.token_ids for each in made.own_greedy]
        assert [each.token_ids for each in made.hot] == [each.token_ids for each in made.own_hot]
        assert [each.prompt_ids for each in made.hot] == [prompt for prompt in share for _ in range(2)]
        assert made.woken == made.hot
        assert logprob_difference(made.greedy, model, temperature=1.0) < 1e-5
        assert logprob_difference(made.hot, model, temperature=programs.HOT.temperature) < 1e-5
        assert made.shard_bytes < 0.6 * made.whole_bytes


# sums of two ranks are rounded once more: with an adapter, and logits of 5, it was 1.1e-5 where one rank has 7e-6
BOUNDS: dict[sync_rounds.Kind, float] = {"tied": 1e-5, "adapter": 2e-5}


@pytest.mark.parametrize("kind", BOUNDS)
def test_weights_arrive_in_the_shards(run: RunOnRanks, kind: sync_rounds.Kind) -> None:
    """Under fsdp2 logprobs are the trainer's after each round of training."""
    _check_rounds(run, kind)


def test_weights_of_stage_3_arrive_in_the_shards(spawned: SpawnRank) -> None:
    """Under stage 3 of DeepSpeed likewise."""
    with processes(STAGE_3, 2, timeout=2 * TIMEOUT, spawn=spawned) as run:
        _check_rounds(run, "tied")


def _check_rounds(run: RunOnRanks, kind: sync_rounds.Kind) -> None:
    seen = run(sync_rounds.run, sync_rounds.Case(kind=kind, num_rounds=5))
    for each in seen:
        assert max(each.probed) < 1e-5
        assert max(each.differences) < BOUNDS[kind]
        assert each.moved > 1e-2
        assert each.kept
    assert seen[0].probed == seen[1].probed  # the ranks saw the same engine, bit for bit


@pytest.mark.parametrize("name", ["rollout.generate", "rollout.failed_update"])
def test_laws_of_rollouts_hold(run: RunOnRanks, name: str) -> None:
    """Those of engines are held by `lightrft conformance vllm tensor_parallel_size=2 --world-size 2`."""
    harness = Harness(subject=FSDP2, run=run, world_size=2, settings=draw_settings(1), seed=0, example=None)
    finding = hold_law(STRATEGY_LAWS[name], harness, claims=frozenset({"ranks", "sampling", "tensor_parallel"}))
    assert finding.outcome == "holds", finding.message


def test_what_fails_on_one_rank_fails_on_both(run: RunOnRanks) -> None:
    """Each is told which rank it was and why, and what can be mended is mended by the next sync."""
    right, wrong = run(programs.fail, "")
    said = {name: (told.kind, right[name].kind) for name, told in wrong.items() if told.kind}
    assert said == {
        "token": ("DataError", "DataError"),
        "gathered": ("DataError", "DataError"),
        "sampling": ("ConfigError", "ConfigError"),
        "shape": ("WeightSyncError", "WeightSyncError"),
        "stream": ("InterruptedError", "WeightSyncError"),
        "missing": ("WeightSyncError", "WeightSyncError"),
        "forward": ("EngineCrashError", "EngineCrashError"),
        "after forward": ("EngineCrashError", "EngineCrashError"),
        "calls": ("CollectiveError", "CollectiveError"),
    }
    assert right["token"].message == f"rank 1: {wrong['token'].message}"
    assert right["gathered"].message.endswith(wrong["token"].message)
    assert "rank 1" in right["sampling"].message
    assert right["shape"].message == f"rank 1: {wrong['shape'].message}"
    assert "rank 1 gave its update up" in right["stream"].message
    for told in (right, wrong):
        assert "rank 1: vLLM broke off (the third forward)" in told["forward"].message
        assert "the third forward" in told["after forward"].message
        assert [told[name].status for name in ("token", "sampling", "shape", "stream", "missing", "forward")] == [
            *["awake"] * 2,
            *["torn"] * 4,
        ]
        for name in ("after shape", "after stream", "after missing", "new engine"):
            assert told[name] == told["first"]


def test_what_cannot_be_started_is_refused_on_both(run: RunOnRanks) -> None:
    """The line says which setting it is, and an engine that can be starts afterwards."""
    seen = run(programs.refuse, "")
    for told in seen:
        words = {name: f"{each.kind}: {each.message}" for name, each in told.items()}
        assert words["divisor"].startswith(
            "ConfigError: rank 0: tensor_parallel_size=3 does not divide the number of ranks, 2;"
        )
        assert words["heads"].startswith(
            "ConfigError: rank 0: tensor_parallel_size=2 does not divide the 3 attention heads of"
        )
        assert words["model"].startswith("ConfigError: rank 0: model=Qwen3ForCausalLM on rank 1 is not that of rank 0")
        assert words["hf"].startswith("UnsupportedError: rank 0: tensor_parallel_size=2 is not for engine.type='hf'")
        assert words["right"] == ": "
        assert words["middle"].startswith("UnsupportedError: rank 0: model=Qwen3ForCausalLM does not start in vLLM (")
        assert "; rank 1: model=Qwen3ForCausalLM does not start in vLLM (no room)" in words["middle"]


def test_a_rank_that_is_killed_ends_the_other_with_one_line(spawned: SpawnRank, tmp_path: Path) -> None:
    """The other one is told so before the timeout, and no process, port or shared memory is left."""
    note, lines = tmp_path / "held", SimpleQueue[tuple[int, str | None]]()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start = start_of_subject(FSDP2, timeout=TIMEOUT)
    workers = start_workers(start, 2, spawn=spawned, port=store.port, directory=tmp_path, lines=lines)
    try:
        assert all(lines.get(timeout=TIMEOUT)[1] for _ in workers)  # they are ready
        name = f"{programs.__name__}:{programs.be_killed.__name__}"
        job = Job(program=name, case=to_json(str(note), str), directory=str(tmp_path), group=1)
        for worker in workers:
            say(worker, to_json(job, Job))
        said = dict(lines.get(timeout=2 * TIMEOUT) for _ in workers)
        assert workers[1].process.wait() == -9
        left = [each.pid for each in psutil.process_iter() if _group_of(each.pid) == workers[1].process.pid]
    finally:
        end_workers(workers)
    assert said[1] is None
    reply = from_json(said[0] or "", Reply)
    assert reply.evidence is not None, reply.failure
    seen = from_json(reply.evidence, programs.Lost)
    assert seen.told.kind == "CollectiveError"
    assert "rank 1 did not enter it" in seen.told.message
    assert "\n" not in seen.told.message
    assert seen.seconds < TIMEOUT
    assert seen.told.status == "torn"
    assert set(seen.after) <= set(seen.before)
    held = note.read_text(encoding="utf-8").splitlines()
    assert [each for each in held if not each.startswith("port ")] == []  # nothing that could outlive it
    assert left == []


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0
