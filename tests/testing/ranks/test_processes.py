"""A pool of real processes: what it passes on, and what it says of ranks that raise, skip, hang and die."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from lightrft.config import EngineConfig, StrategyConfig
from lightrft.errors import CollectiveError, ConfigError, DataError, LawError
from lightrft.strategy.record import Strategy
from lightrft.testing.ranks.here import run_here
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.watchdog import StuckError
from lightrft.testing.replicated import build_gloo
from lightrft.testing.subject import RunOnRanks, Subject, subject_of

RANKS = 2
CONFIG = StrategyConfig(seed=5, extra_args={"note": "of mine", "api_key": "hidden from readers"})


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield importlib.import_module("rank_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def run(programs: ModuleType) -> Iterator[RunOnRanks]:
    del programs
    # long enough for anything but what hangs on purpose
    with processes(subject_of(build_gloo, "strategy", config=CONFIG), RANKS, timeout=10) as run_on_ranks:
        yield run_on_ranks


def are_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = [pid for pid in pids if psutil.pid_exists(pid) and not is_zombie(pid)]
        if not left:
            return True
        time.sleep(0.02)
    return False


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # whoever adopted it has not looked yet
    except psutil.NoSuchProcess:
        return True


def can_go_on(run: RunOnRanks, programs: ModuleType) -> bool:
    return [seen.rank for seen in run(programs.report, programs.Sample(rows=((1.0,),), name=""))] == [0, 1]


def test_a_slow_start_of_one_rank_ends_no_other(programs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that have started are not taken for ranks that have ended while another one still starts."""
    del programs
    late = importlib.import_module("late_programs")
    monkeypatch.setattr("lightrft.testing.ranks.processes._PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr("lightrft.testing.ranks.processes._CLOSING_SECONDS", 0.5)
    with processes(subject_of(late.build_late, "strategy"), RANKS, timeout=60) as run_on_ranks:
        assert run_on_ranks(late.number, 5) == [5, 6]


def test_cases_and_evidence_travel_by_type(run: RunOnRanks, programs: ModuleType) -> None:
    """Records, tensors, settings and secrets arrive as they are, and what programs print disturbs nobody."""
    case = programs.Sample(rows=((0.1, 2.0), (3.0, float("inf"))), name="two\nlines")
    seen = run(programs.report, case)
    assert [(each.rank, each.world_size, each.name, each.extra) for each in seen] == [
        (rank, RANKS, "two\nlines", "of mine") for rank in range(RANKS)
    ]
    expected = torch.tensor(case.rows, dtype=torch.float64) * 1 + torch.tensor(case.rows, dtype=torch.float64) * 2
    assert all(torch.equal(each.total, expected) for each in seen)


def test_every_program_begins_with_the_same_streams(run: RunOnRanks, programs: ModuleType) -> None:
    """Each rank has streams of its own, and every program finds them where the one before found them."""
    case = programs.Sample(rows=((1.0,),), name="")
    first, second = run(programs.report, case), run(programs.report, case)
    assert [(each.draw, each.python_draw) for each in first] == [(each.draw, each.python_draw) for each in second]
    assert first[0].draw != first[1].draw


def test_real_ranks_train_as_one_process_does(run: RunOnRanks, programs: ModuleType) -> None:
    """Six steps on two processes equal the same six steps in one, but for the order of sums."""
    alone = run_here(subject_of("single", "strategy", config=CONFIG))(programs.train, 6)[0]
    for losses in run(programs.train, 6):
        assert losses == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0]


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("ours", DataError, "prompts.jsonl:3 is empty."),
        ("Python's", ZeroDivisionError, "by nothing"),
        ("somebody's", LawError, "OwnError: of mine"),
        ("strange", LawError, "StrangeError: 1 and 2"),
        ("exit", SystemExit, "enough"),
    ],
)
def test_what_a_rank_raises_is_raised(
    run: RunOnRanks, programs: ModuleType, kind: str, error: type[BaseException], words: str
) -> None:
    """The type is kept if it is Python's or ours; notes tell the rank and where; waiting ranks keep nobody waiting."""
    with pytest.raises(error) as caught:
        run(programs.fails, kind)
    assert type(caught.value) is error
    assert str(caught.value) == words
    own, rank, traceback = caught.value.__notes__
    assert (own, rank) == ("a note of its own", "on rank 1")
    assert "rank_programs.py" in traceback
    assert can_go_on(run, programs)


@pytest.mark.parametrize("odd", range(RANKS))
def test_a_rank_that_ends_too_early_is_named(run: RunOnRanks, programs: ModuleType, odd: int) -> None:
    """Whoever waits for a rank that has ended its program gets an error that names it, long before the timeout."""
    with pytest.raises(CollectiveError, match=f"rank {odd} did not enter it and was last in barrier"):
        run(programs.skips, odd)
    assert can_go_on(run, programs)


def test_a_rank_that_ends_too_early_is_named_although_its_group_is_kept(run: RunOnRanks, programs: ModuleType) -> None:
    """What keeps the connections of a rank open, as caches of packages do, makes nobody wait for it."""
    with pytest.raises(CollectiveError, match="rank 0 did not enter it and was last in barrier"):
        run(programs.keeps_and_skips, 0)
    assert can_go_on(run, programs)


def test_a_slow_rank_is_waited_for(run: RunOnRanks, programs: ModuleType) -> None:
    """A rank may go on alone after the others have ended."""
    assert run(programs.is_slow, 1.5) == [0, 1]
    assert can_go_on(run, programs)


def test_ranks_that_disagree_are_told_how(run: RunOnRanks, programs: ModuleType) -> None:
    """The error names rank and difference."""
    with pytest.raises(CollectiveError, match=r"data\['0'\] is a float on rank 0 and missing on rank 1"):
        run(programs.disagrees, 0)
    assert can_go_on(run, programs)


def test_a_program_may_destroy_its_process_group(run: RunOnRanks, programs: ModuleType) -> None:
    """The next program finds a group again."""
    assert run(programs.destroys, 3) == [3, 3]
    assert can_go_on(run, programs)


def test_a_hang_ends_with_the_last_call_of_every_rank(programs: ModuleType) -> None:
    """A program that takes too long is a LawError, its workers are killed, and the next program finds new ones."""
    with processes(subject_of(build_gloo, "strategy", config=CONFIG), RANKS, timeout=3) as run:
        before = [pid for each in run(programs.pids, True) for pid in each]
        with pytest.raises(StuckError) as caught:
            run(programs.hangs, 1)
        assert "timeout=3 seconds were not enough" in str(caught.value)
        assert "rank 0 is in all_reduce since" in str(caught.value)
        assert "rank 1 was last in barrier" in str(caught.value)
        assert are_gone(before)
        assert can_go_on(run, programs)
        after = [pid for each in run(programs.pids, True) for pid in each]
    assert are_gone(after)


def test_nothing_is_left_when_the_parent_is_killed(programs: ModuleType, tmp_path: Path) -> None:
    """Workers and what they started end with their parent, however it ends."""
    code = f"import rank_programs; rank_programs.own_pids({str(tmp_path)!r})"
    path = os.pathsep.join(each or str(Path.cwd()) for each in sys.path)
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}) as parent:  # noqa: S603
        while not (tmp_path / programs.SEEN).exists():
            assert parent.poll() is None
            time.sleep(0.02)
        pids = [int(pid) for pid in (tmp_path / programs.SEEN).read_text().split()]
        files = [Path(file.path) for file in psutil.Process(pids[0]).open_files()]
        parent.kill()
    assert len(pids) == 2
    assert are_gone(pids)
    for folder in {file.parent for file in files if file.name == "printed-0"}:
        shutil.rmtree(folder)  # a parent that is killed cannot


def test_a_subject_that_cannot_be_built_there_is_refused_here(programs: ModuleType) -> None:
    """What a builder raises in the worker is raised; what it has no name for is a ConfigError before any process."""

    def build(config: StrategyConfig) -> Strategy:
        return build_gloo(config)

    refused: list[Subject] = [subject_of(build, "strategy")]
    refused.append(subject_of(build_gloo, "strategy", config=StrategyConfig(extra_args={"handle": object()})))
    for subject, words in zip(refused, ("package.module:build", "plain data"), strict=True):
        with pytest.raises(ConfigError, match=words), processes(subject, RANKS):
            pass
    with processes(subject_of("rank_programs:build_unreadable", "strategy"), 1) as run, pytest.raises(DataError):
        run(programs.report, programs.Sample(rows=(), name=""))


def test_a_program_without_name_or_types_is_refused(programs: ModuleType) -> None:
    """Programs that cannot be found, or whose data cannot travel, are a ConfigError before any process starts."""

    def local(rank: object, case: int) -> int:
        del rank
        return case

    with processes(subject_of(build_gloo, "strategy", engine=EngineConfig(type="scripted")), RANKS) as run:
        with pytest.raises(ConfigError, match="not found by its name"):
            run(local, 1)
        with pytest.raises(ConfigError, match="not annotated"):
            run(programs.unannotated, 1)


@pytest.mark.parametrize(("world_size", "timeout"), [(0, 1.0), (2, 0.0), (2, math.nan)])
def test_numbers_of_a_pool_are_positive(world_size: int, timeout: float) -> None:
    """A pool without ranks, or one that never waits, is a ConfigError."""
    with (
        pytest.raises(ConfigError, match="must be positive"),
        processes(subject_of("single", "strategy"), world_size, timeout=timeout),
    ):
        pass


def test_a_rank_that_dies_is_noticed_at_once(run: RunOnRanks, programs: ModuleType) -> None:
    """The error names the rank, how it ended and what it said last, and an exception leaves no worker behind."""
    pids = [pid for each in run(programs.pids, True) for pid in each]
    with pytest.raises(LawError) as caught:
        run(programs.dies, 1)
    assert str(caught.value).startswith("rank 1 ended with exit code -9 (SIGKILL)\nlast words\nrank 0 ")
    assert are_gone(pids)
