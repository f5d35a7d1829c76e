"""An engine that two ranks run together, with the engine "hf" as the shard of each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lightrft.backends.rollout.hf.engine import build_hf
from lightrft.backends.rollout.tensor_parallel.engine import build_tensor_parallel
from lightrft.config import EngineConfig
from lightrft.errors import ConfigError, UnsupportedError
from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.strategy.protocols import EngineSource, Prompt
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.replicated import build_gloo
from lightrft.testing.subject import RunOnRanks, subject_of


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield importlib.import_module("joint_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def run(programs: ModuleType, spawn: SpawnRank) -> Iterator[RunOnRanks]:
    del programs
    with processes(subject_of(build_gloo, "strategy"), 2, spawn=spawn) as run_on_ranks:
        yield run_on_ranks


def test_ranks_generate_as_one_engine_and_fail_as_one(run: RunOnRanks, programs: ModuleType) -> None:
    """Each gets its own completions back; what fails on one rank is told both, and mended by the next update."""
    right, wrong = run(programs.run, "")
    assert [made.token_ids for made in [*right.split, *wrong.split]] == [made.token_ids for made in right.whole]
    assert [made.prompt_ids for made in right.split] == [(2,), (2,), (3, 4), (3, 4)]
    assert [made.prompt_ids for made in wrong.other] == [(5,), (5,), (6,)]
    # one call for numbers that follow one another, one a rank else; one of what both ask for
    assert right.calls == wrong.calls == [3, 2, 1, 1, 1]
    words = {name: (told.words, right.told[name].words) for name, told in wrong.told.items()}
    states = {name: (told.status, told.version) for name, told in right.told.items()}
    assert states == {name: (told.status, told.version) for name, told in wrong.told.items()}
    assert states["update"] == ("awake", 1)
    assert words["empty"][1].startswith("DataError: rank 1: prompts[0]=[] is empty")
    assert words["empty"][0].startswith("DataError: prompts[0]=[] is empty")
    assert words["sampling"][0] == words["sampling"][1]
    assert "on rank 1 is not that of rank 0" in words["sampling"][0]
    assert words["unknown"][1] == words["unknown"][0].replace("tensor=", "rank 1: tensor=")
    assert states["unknown"] == ("torn", 1)
    assert states["torn"] == ("awake", 2)
    assert words["one gives up"] == ("", "WeightSyncError: rank 1 gave its update up; sync the weights again.")
    assert states["one gives up"] == ("torn", 2)
    assert states["mended"] == ("awake", 3)
    assert "WeightSyncError: rank 1: 1 of" in words["missing"][1]
    assert states["mended again"] == ("awake", 4)
    assert words["sleep"] == ("", "")
    assert states["both abort"] == ("torn", 4)
    assert states["mended for good"] == ("awake", 5)
    assert words["crash"] == ("EngineCrashError: a shard broke off", "EngineCrashError: rank 1: a shard broke off")
    assert "EngineCrashError: the ranks that ran this engine have lost one another" in words["lost"][1]
    assert words["given up"] == ("", "")


def test_four_ranks_are_two_engines(programs: ModuleType, spawn: SpawnRank) -> None:
    """Neighbours run one, and completions are those of one engine for all prompts."""
    with processes(subject_of(build_gloo, "strategy"), 4, spawn=spawn) as run_on_ranks:
        seen = run_on_ranks(programs.beside, "")
    engine, prompts = build_hf(EngineConfig()), [Prompt(token_ids=(2 + rank,)) for rank in range(4)]
    with engine.start(EngineSource(model=programs.small(), tokenizer=None)) as alone:
        whole = engine.generate(alone, prompts, programs.HOT)
    assert [made.token_ids for rank in seen for made in rank] == [made.token_ids for made in whole]


def test_ranks_that_differ_are_told_so(run: RunOnRanks, programs: ModuleType) -> None:
    """Different calls, different models, a start that fails on one rank, and a rank that has left, end with a line."""
    right, wrong = run(programs.differ, "")
    assert wrong[0].startswith("CollectiveError: sleep: rank 0 is in flush_cache, and both run one engine;")
    assert right[0].startswith("CollectiveError: flush_cache: rank 1 is in sleep, and both run one engine;")
    assert right[1].startswith("EngineCrashError: the ranks that ran this engine have lost one another")
    assert right[2] == wrong[2]
    assert "ConfigError: model=LlamaForCausalLM on rank 1 is not that of rank 0" in wrong[2]
    assert (right[3], wrong[3]) == ("MemoryError: rank 1: no room", "MemoryError: no room")
    assert right[4] == wrong[4]
    assert "ConfigError: processor=None on rank 1 is not that of rank 0" in wrong[4]
    assert right[5].startswith("ConfigError: tensor_parallel_size=3 does not divide the number of ranks, 2; ")
    assert right[6].startswith("EngineCrashError: ranks 0, 1 run one engine, and one of them has ended or did not come")


def test_one_rank_is_no_group(programs: ModuleType) -> None:
    """Where one process runs alone, such an engine is refused when it starts."""
    config = EngineConfig(tensor_parallel_size=2)
    engine = build_tensor_parallel(build_hf(config), config)
    with pytest.raises(ConfigError, match=r"size=2 does not divide the number of ranks, 1; .* start 2 ranks"):
        engine.start(EngineSource(model=programs.small(), tokenizer=None))


@pytest.mark.parametrize("kind", ["hf", "scripted"])
def test_engines_that_run_whole_refuse_it(programs: ModuleType, kind: str) -> None:
    """An engine that does not claim it is refused with the setting's name before it starts."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    config = EngineConfig(type=kind, tensor_parallel_size=2)
    with pytest.raises(UnsupportedError, match=f"tensor_parallel_size=2 is not for engine.type='{kind}'"):
        strategy.setup_inference_engine(config, actor=programs.small())
