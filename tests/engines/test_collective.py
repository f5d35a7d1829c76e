"""Faults of a collective between a trainer and the process of its engine, each done for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import apart_programs as programs
import attrs
import psutil
import pytest
import torch.distributed as dist
from guests import installed

from lightrft.backends.rollout.apart import collective
from lightrft.backends.rollout.apart import engine as apart_engine
from lightrft.backends.rollout.apart.messages import Request
from lightrft.backends.rollout.apart.process import EngineProcess
from lightrft.config import EngineConfig
from lightrft.errors import EngineCrashError, WeightSyncError
from lightrft.strategy import EngineHandle, Prompt, SamplingParams, Strategy, get_strategy

installed("vllm", "sglang")  # elsewhere there is no time for the starts of so many processes

PATIENCE = 200.0
PROMPTS = [Prompt(token_ids=(1, 2, 3)), Prompt(token_ids=(4,))]
ECHO = SamplingParams(max_new_tokens=2)
WIDTH = 200_000  # 10 MB a matrix: more than sockets hold

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn while they are imported


@pytest.fixture
def strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Strategy:
    monkeypatch.setenv(programs.FAULTS, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return get_strategy({"strategy": "single"}, engines={"faulty": programs.build_faulty})


@pytest.fixture
def engine(strategy: Strategy) -> Iterator[EngineHandle]:
    """Yield an engine; afterwards no process and no port is left of it."""
    config = EngineConfig(type="faulty", process="own", transport="collective", timeout_seconds=PATIENCE)
    ports, children = open_ports(), set(psutil.Process().children())
    with strategy.setup_inference_engine(config, actor=programs.build_tiny(width=WIDTH)) as handle:
        yield handle
    assert open_ports() <= ports
    assert set(psutil.Process().children()) <= children
    assert not dist.is_initialized()


def open_ports() -> set[int]:
    return {one.laddr.port for one in psutil.Process().net_connections()}


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stopping(monkeypatch: pytest.MonkeyPatch, handle: EngineHandle, number: int) -> None:
    """Let the engine's process have a signal when the next bucket goes there."""
    depart = collective._depart

    def stop_and_depart(*args: object) -> object:
        monkeypatch.undo()
        os.kill(programs.pid_of(handle), number)
        return depart(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(collective, "_depart", stop_and_depart)


def ports_told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return where groups are joined from now on, as it is told to the process."""
    told: list[int] = []
    tell = apart_engine.tell

    def note(process: EngineProcess, request: Request, *files: int) -> None:
        if request.bucket is not None and request.bucket.port:
            told.append(request.bucket.port)
        tell(process, request, *files)

    monkeypatch.setattr(apart_engine, "tell", note)
    return told


def hiding_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell the process of buckets, and not where to join."""
    tell = apart_engine.tell

    def hide(process: EngineProcess, request: Request, *files: int) -> None:
        bucket = None if request.bucket is None else attrs.evolve(request.bucket, port=0)
        tell(process, attrs.evolve(request, bucket=bucket), *files)

    monkeypatch.setattr(apart_engine, "tell", hide)


def test_an_engine_that_is_lost_in_a_transfer_is_mended_with_a_new_group(
    engine: EngineHandle, strategy: Strategy
) -> None:
    """Killed, it is missed at once; stopped, after the time that a call may take, and then it is over."""
    model = programs.build_tiny(1, width=WIDTH)
    with pytest.MonkeyPatch.context() as patch:
        told = ports_told(patch)
        assert strategy.update_engine_weights(engine, model).weight_version == 1
        assert told == []  # the group is that of the start
        engine.engine.begin_update(engine)
        with pytest.MonkeyPatch.context() as inner:
            stopping(inner, engine, signal.SIGKILL)
            with pytest.raises(EngineCrashError, match=r"ended with exit code -9 \(SIGKILL\)"):  # noqa: PT012 (in whichever)
                engine.engine.put(engine, model.state_dict().items())
                engine.engine.commit(engine)
        assert engine.status == "torn"
        report = strategy.update_engine_weights(engine, model)
        assert (report.weight_version, report.max_logprob_difference) == (2, 0.0)
        assert len(told) == 1
    made = strategy.gather_and_generate(engine, PROMPTS, ECHO)
    assert [completion.token_ids for completion in made] == [(1, 2), (4, 4)]
    engine.state.process.timeout = 0.5  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, engine, signal.SIGSTOP)
        words = "did not answer for engine.timeout_seconds=0.5.*\\nIt is the second time, and the engine is not started"
        with pytest.raises(EngineCrashError, match=rf"(?s){words}"):
            strategy.update_engine_weights(engine, model)
    assert engine.status == "torn"


def test_an_engine_that_is_lost_before_the_commit_is_mended_within_the_sync(
    engine: EngineHandle, strategy: Strategy
) -> None:
    """The sync is made again; asleep, the engine holds no port; where it does not join, the sync fails and not it."""
    model = programs.build_tiny(2, width=WIDTH)
    (Path(os.environ[programs.FAULTS]) / "exit in commit").touch()
    pid, ports = programs.pid_of(engine), open_ports()
    report = strategy.update_engine_weights(engine, model)
    assert (report.weight_version, report.max_logprob_difference) == (1, 0.0)
    assert programs.pid_of(engine) != pid
    engine.engine.sleep(engine)
    assert open_ports() < ports
    engine.engine.wake(engine)
    with pytest.MonkeyPatch.context() as patch:
        hiding_ports(patch)
        with pytest.raises(
            WeightSyncError, match="the engine has left the group in which weights are sent; sync again"
        ):
            strategy.update_engine_weights(engine, model)
    assert engine.status == "torn"
    assert strategy.update_engine_weights(engine, model).weight_version == 2


def test_nothing_is_left_of_a_trainer_that_is_killed_while_it_syncs(tmp_path: Path) -> None:
    """Its engine's process ends with it, and so do their ports."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), programs.FAULTS: str(tmp_path)}
    command = [sys.executable, str(programs.__file__), "collective"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as trainer:  # noqa: S603 (ours)
        assert trainer.stdout is not None
        pids = [int(trainer.stdout.readline()) for _ in range(2)]
        listening = {one.laddr for one in psutil.Process(trainer.pid).net_connections() if one.status == "LISTEN"}
        assert {address.ip for address in listening} == {"127.0.0.1"}
        trainer.kill()
    assert pids[0] == pids[1]
    deadline = time.monotonic() + PATIENCE
    while runs(pids[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    open_now = {(one.laddr, one.pid) for one in psutil.net_connections() if one.laddr}
    assert not {one for one in open_now if one[1] in {trainer.pid, *pids}}
