"""Engines in processes of their own: the same contract; one that is lost is mended once; nothing is left behind."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from lightrft.backends.collectives.simulated import build_collectives, run_simulated
from lightrft.backends.rollout.apart import engine as apart_engine
from lightrft.backends.rollout.apart import memory
from lightrft.backends.rollout.apart import process as apart_process
from lightrft.backends.rollout.apart.buckets import Placed, write_bucket
from lightrft.backends.rollout.apart.mending import mend
from lightrft.backends.rollout.gathering import build_gather_and_generate
from lightrft.backends.rollout.scripted import build_scripted
from lightrft.config import EngineConfig
from lightrft.errors import (
    ConfigError,
    DataError,
    EngineCrashError,
    EngineStateError,
    UnsupportedError,
    WeightSyncError,
)
from lightrft.strategy import Completion, EngineHandle, Prompt, SamplingParams, Strategy, StrategyConfig, get_strategy
from lightrft.strategy.protocols.images import Image
from lightrft.strategy.protocols.rollout import Engine, EngineSource, GatherAndGenerate
from lightrft.weight_sync import transfer_weights

PROMPTS = [Prompt(token_ids=(1, 2, 3)), Prompt(token_ids=(4,))]
ECHO = SamplingParams(max_new_tokens=2)
PATIENCE = 200.0
COLLECTIVES = build_collectives(StrategyConfig())


@pytest.fixture
def start(programs: ModuleType, faults: Path) -> Iterator[tuple[Strategy, EngineHandle]]:
    """Yield an engine in a process; afterwards nothing is left of it, which the tests take a share in."""
    del faults
    strategy = get_strategy({"strategy": "single"}, engines={"faulty": programs.build_faulty})
    config = EngineConfig(type="faulty", process="own", timeout_seconds=PATIENCE)
    before = held()
    with strategy.setup_inference_engine(config, actor=programs.build_tiny()) as handle:
        pid = programs.pid_of(handle)
        yield strategy, handle
    assert handle.weights is None
    handle.engine.close(handle)
    assert session_of(pid) == []
    assert held() - before == set()


def held() -> set[str]:
    """Return what this process holds that an engine's process could have left: descriptors, memory, children."""
    files: set[str] = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing has a descriptor of its own, which is closed by then
            files.add(str(file.readlink()))
    kinds = ("socket:", "pipe:", "/memfd:")
    maps = {line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:lightrft" in line}
    children = {f"child {child.pid}" for child in psutil.Process().children()}
    return {file for file in files if file.startswith(kinds)} | maps | children


def session_of(pid: int) -> list[int]:
    """Return the processes that an engine's process, the head of a session, left alive."""
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if is_alive and os.getsid(process.pid) == pid:
                found.append(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def logprobs(made: Sequence[Completion]) -> list[tuple[float, ...]]:
    return [completion.logprobs for completion in made]


def difference(made: Sequence[Completion], model: nn.Module) -> float:
    """Return the largest distance of a logprob from that of the model's own forward."""
    distances = [0.0]
    for completion in made:
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            output = model(ids[:, :-1])
        logits = getattr(output, "logits", output)[0, -len(completion.token_ids) :]
        own = torch.log_softmax(logits.float(), -1).gather(-1, ids[0, -len(completion.token_ids) :, None])[:, 0]
        distances.append((own - torch.tensor(completion.logprobs)).abs().max().item())
    return max(distances)


def test_the_contract_is_kept_from_afar(  # noqa: PLR0915 (starting an engine takes seconds)
    start: tuple[Strategy, EngineHandle], programs: ModuleType, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals keep their type and words; whatever is wrong with an update tears the engine, and the next mends it."""
    strategy, handle = start
    engine, model = handle.engine, programs.build_tiny(1)
    pid = programs.pid_of(handle)
    assert os.getpgid(pid) != os.getpgid(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    right = model.state_dict()
    before = strategy.gather_and_generate(handle, PROMPTS, ECHO)
    assert [made.token_ids for made in before] == [(1, 2), (4, 4)]
    with pytest.raises(DataError, match=r"prompts\[1\]") as refused:
        engine.generate(handle, [PROMPTS[0], Prompt(token_ids=())], ECHO)
    assert "apart_programs.py" in str(refused.value.__cause__)
    image = Image(width=1, height=1, pixels=bytes(3))
    with pytest.raises(UnsupportedError, match=r"prompts\[1\] has images and the engine 'scripted' takes none"):
        engine.generate(handle, [PROMPTS[0], Prompt(token_ids=(1,), images=(image,))], ECHO)

    def spoilt(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**right, name: tensor}

    renamed = {name.replace("head.bias", "head.offset"): tensor for name, tensor in right.items()}
    not_finite = right["head.bias"].clone()
    not_finite[3] = float("nan")
    wrong = {
        "tensor='head.offset' is not in the engine; did you mean": renamed,
        "tensor='head.bias' holds values that are not finite": spoilt("head.bias", not_finite),
        r"tensor='embedding.weight' has shape \(13, 9\)": programs.build_tiny(width=9).state_dict(),
        r"1 of 4 tensors were not written \(scale\)": {k: v for k, v in right.items() if k != "scale"},
    }
    for words, tensors in wrong.items():
        engine.begin_update(handle)
        with pytest.raises(WeightSyncError, match=words):  # noqa: PT012 (which of the two refuses is not the point)
            engine.put(handle, tensors.items())
            engine.commit(handle)
        with pytest.raises(EngineStateError, match="generate: the engine is 'torn'"):
            engine.generate(handle, PROMPTS, ECHO)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "write_bucket", write_and_damage)
        with pytest.raises(WeightSyncError, match=r"tensor='head.weight' arrived with other bytes than were sent"):
            strategy.update_engine_weights(handle, model)
    assert handle.status == "torn"
    strategy.update_engine_weights(handle, model)
    assert difference(engine.generate(handle, PROMPTS, ECHO), model) < 1e-5
    engine.sleep(handle)
    assert held_memory() == []
    engine.wake(handle)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
    try:
        with pytest.raises(WeightSyncError, match=r"bytes of shared memory for weights cannot be had \(File too"):
            strategy.update_engine_weights(handle, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert handle.status == "torn"
    strategy.update_engine_weights(handle, programs.build_tiny())
    assert logprobs(engine.generate(handle, PROMPTS, ECHO)) == logprobs(before)
    assert handle.weight_version == 2
    refuse_what_cannot_be_written(handle)
    require_few_messages(start, programs, monkeypatch)
    refuse_changed_weights(start, programs)
    engine.begin_update(handle)
    with pytest.raises(WeightSyncError, match="tensor='unknown' is not in the engine"):
        engine.put(handle, [("unknown", torch.zeros(1))])  # at once
    engine.begin_update(handle)
    engine.put(handle, right.items())  # and so it is closed, with an answer on its way
    (faults / "closed").unlink(missing_ok=True)
    engine.close(handle)
    assert (faults / "closed").exists()


def test_a_crash_before_the_group_is_joined_is_one_crash(
    programs: ModuleType, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is started again, as after any other."""
    del faults
    strategy = get_strategy({"strategy": "single"}, engines={"faulty": programs.build_faulty})
    config = EngineConfig(type="faulty", process="own", transport="collective", timeout_seconds=PATIENCE)
    with strategy.setup_inference_engine(config, actor=programs.build_tiny()) as handle:
        victim, tell = programs.pid_of(handle), apart_engine.tell
        handle.engine.sleep(handle)  # it leaves the group
        handle.engine.wake(handle)

        def tell_and_kill(process: apart_engine.EngineProcess, request: apart_engine.Request, *files: int) -> None:
            is_last = request.bucket is not None and process.popen.pid == victim
            if is_last:
                os.kill(victim, signal.SIGSTOP)
            tell(process, request, *files)
            if is_last:
                kill(victim)

        monkeypatch.setattr(apart_engine, "tell", tell_and_kill)
        strategy.update_engine_weights(handle, programs.build_tiny(1))
        assert handle.state.num_crashes == 1
        assert programs.pid_of(handle) != victim
        assert difference(strategy.gather_and_generate(handle, PROMPTS, ECHO), programs.build_tiny(1)) < 1e-5


def refuse_what_cannot_be_written(handle: EngineHandle) -> None:
    """A request that is not JSON costs nothing; token ids may be NumPy's."""
    numbers = [Prompt(token_ids=tuple(np.array(prompt.token_ids))) for prompt in PROMPTS]
    right = handle.engine.generate(handle, PROMPTS, ECHO)
    assert handle.engine.generate(handle, numbers, ECHO) == right
    with pytest.raises(TypeError):
        handle.engine.generate(handle, [Prompt(token_ids=(object(),))], ECHO)  # type: ignore[arg-type]
    assert handle.state.process.is_running


def require_few_messages(
    start: tuple[Strategy, EngineHandle], programs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as buckets, in two segments; a stream that breaks off leaves no answer that another call would take."""
    strategy, handle = start
    told: list[int] = []
    tell = apart_engine.tell

    def count(process: apart_engine.EngineProcess, request: apart_engine.Request, *files: int) -> None:
        if request.bucket is not None:
            told.append(request.bucket.slot)
        tell(process, request, *files)

    monkeypatch.setattr(apart_engine, "tell", count)
    monkeypatch.setattr(apart_engine, "BUFFER_BYTES", 512)
    model = programs.build_tiny(2)  # 416 + 416 + 52 + 4 bytes
    strategy.update_engine_weights(handle, model)
    assert told == [0, 1]
    assert len([item for item in held_memory() if not item.startswith("/memfd:")]) == 2  # mapped
    assert difference(strategy.gather_and_generate(handle, PROMPTS, ECHO), model) < 1e-5

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(programs.build_tiny(3).state_dict().items())[:3]
        raise InterruptedError("no more")

    handle.engine.begin_update(handle)
    with pytest.raises(InterruptedError, match="no more"):
        handle.engine.put(handle, broken())
    assert handle.status == "torn"
    strategy.update_engine_weights(handle, model)
    assert difference(strategy.gather_and_generate(handle, PROMPTS, ECHO), model) < 1e-5


def refuse_changed_weights(start: tuple[Strategy, EngineHandle], programs: ModuleType) -> None:
    """Weights take the place of those that were lost only if they are the same, by their digests."""
    strategy, handle = start
    model = programs.build_tiny(7)
    version = strategy.update_engine_weights(handle, model).weight_version
    mend(handle, EngineCrashError("lost."))
    assert (handle.status, handle.weight_version) == ("awake", version)
    with torch.no_grad():
        model.head.bias[0] += 1e-7
    words = rf"weight_version={version} is lost .* and the trainer has other weights by now; sync the engine\. lost\.$"
    with pytest.raises(EngineCrashError, match=words):
        mend(handle, EngineCrashError("lost."))
    assert handle.status == "torn"
    assert strategy.update_engine_weights(handle, model).weight_version == version + 1


def held_memory() -> list[str]:
    return [item for item in held() if "memfd" in item]


def write_and_damage(
    buffer: torch.Tensor, tensors: Sequence[tuple[str, torch.Tensor]], *, finite: bool
) -> tuple[Placed, ...]:
    """Write a bucket as it should be, and then let something else write there."""
    placed = write_bucket(buffer, tensors, finite=finite)
    for one in placed:
        if one.name == "head.weight":
            buffer[one.offset] ^= 0x10
    return placed


def await_file(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_an_engine_that_is_killed_while_it_generates_makes_the_same_completions(
    programs: ModuleType, faults: Path
) -> None:
    """All ranks stream the weights that one lost, by a new group; when it hangs later, all hear of it."""
    config = EngineConfig(type="faulty", process="own", transport="collective", timeout_seconds=PATIENCE)
    model = programs.build_tiny(8)
    streams: list[int] = []

    def program(rank: int) -> tuple[list[list[Completion]], str]:
        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            streams.append(rank)
            for name, tensor in model.state_dict().items():
                COLLECTIVES.barrier()  # as where a model is gathered
                yield name, tensor

        engine = apart_engine.build_apart(programs.build_faulty, config) if rank else build_scripted(config)
        generate = build_gather_and_generate(COLLECTIVES, generate_locally)
        with engine.start(EngineSource(model=programs.build_tiny(), tokenizer=None)) as handle:
            handle.weights = weights
            transfer_weights(model.state_dict().items(), handle)
            made = [generate(handle, PROMPTS[rank:], ECHO)]
            if not rank:
                made.append(generate(handle, PROMPTS, ECHO))
                assert (handle.status, handle.weight_version) == ("awake", 1)
                return made, refused(generate, handle, PROMPTS)
            with killed_when_it_hangs(programs.pid_of(handle), faults):
                made.append(generate(handle, PROMPTS[rank:], ECHO))
            assert (handle.status, handle.weight_version) == ("awake", 1)
            (faults / "hang in generate").touch()
            handle.state.process.timeout = 0.5
            return made, refused(generate, handle, PROMPTS[rank:])

    ended = run_simulated(2, program)
    for fault in ("hang in generate", "hangs"):  # it may have been too slow to begin
        (faults / fault).unlink(missing_ok=True)
    for made, words in ended:
        assert made[0][-1] == made[1][-1]
        assert re.match("(rank 1: )?the process of the engine did not answer for engine.timeout_seconds=0.5", words)
        assert words.endswith("\nIt is the second time, and the engine is not started again.")
    assert sorted(streams) == [0, 0, 1, 1]  # also for an engine that is given up then: nobody knows before


def refused(generate: GatherAndGenerate, handle: EngineHandle, prompts: Sequence[Prompt]) -> str:
    """Return with what words a rank ends, whose engine may be well."""
    with pytest.raises(EngineCrashError) as error:
        generate(handle, prompts, ECHO)
    return str(error.value)


@contextmanager
def killed_when_it_hangs(pid: int, faults: Path) -> Iterator[None]:
    """Let an engine hang in the next call, and kill it then."""

    def kill_it() -> None:
        await_file(faults / "hangs")
        (faults / "hangs").unlink()
        kill(pid)

    (faults / "hang in generate").touch()
    killer = threading.Thread(target=kill_it)
    killer.start()
    yield
    killer.join()
    assert session_of(pid) == []


def test_an_engine_that_ends_between_put_and_commit_is_mended_by_the_next_update(
    start: tuple[Strategy, EngineHandle], programs: ModuleType, faults: Path
) -> None:
    """The commit says how it ended; whoever is lost asleep is missed when it should generate, and then it is over."""
    strategy, handle = start
    model = programs.build_tiny(5)
    handle.engine.begin_update(handle)
    handle.engine.put(handle, model.state_dict().items())
    kill(programs.pid_of(handle))
    with pytest.raises(EngineCrashError, match=r"ended with exit code -9 \(SIGKILL\); it printed nothing"):
        handle.engine.commit(handle)
    assert handle.status == "torn"
    assert held_memory() == []
    assert strategy.update_engine_weights(handle, model).weight_version == 1
    assert difference(strategy.gather_and_generate(handle, PROMPTS, ECHO), model) < 1e-5
    handle.engine.sleep(handle)
    (faults / "exit in flush_cache").touch()
    handle.engine.flush_cache(handle)
    handle.engine.wake(handle)
    with pytest.raises(EngineCrashError, match="exit code 3; its last lines:\nno flush_cache today\nIt is the second"):
        strategy.gather_and_generate(handle, PROMPTS, ECHO)
    assert handle.status == "torn"
    with pytest.raises(EngineCrashError, match="second time"):
        strategy.update_engine_weights(handle, model)
    assert held_memory() == []


def test_an_engine_whose_request_was_interrupted_is_mended(
    start: tuple[Strategy, EngineHandle], programs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is ended, since nobody knows what was written; whoever asks next is told, and it is mended."""
    strategy, handle = start
    model = programs.build_tiny(6)
    strategy.update_engine_weights(handle, model)
    with monkeypatch.context() as patch:
        patch.setattr(apart_process, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            handle.engine.generate(handle, PROMPTS, ECHO)
    assert not handle.state.process.is_running
    with pytest.raises(EngineCrashError, match="the process of the engine ended"):
        transfer_weights(model.state_dict().items(), handle)
    assert handle.status == "torn"
    strategy.update_engine_weights(handle, model)
    assert difference(strategy.gather_and_generate(handle, PROMPTS, ECHO), model) < 1e-5


def interrupt(*args: object) -> None:
    del args
    raise KeyboardInterrupt


def generate_locally(engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
    return engine.engine.generate(engine, prompts, sampling)


def test_what_does_not_travel_is_refused_before_anything_is_started(programs: ModuleType) -> None:
    """A model or tokenizer that only this process knows, and a builder that has no name."""
    before = held()
    config = EngineConfig(type="faulty", process="own", timeout_seconds=PATIENCE)

    def local(config: EngineConfig) -> Engine:
        return build_scripted(config)

    with pytest.raises(UnsupportedError, match=r"engine='.*local' of .* is not found by its name in another process"):
        apart_engine.build_apart(local, config)
    engine = apart_engine.build_apart(programs.build_faulty, config)
    with pytest.raises(UnsupportedError, match="model=Embedding is no model of transformers"):
        engine.start(EngineSource(model=nn.Embedding(3, 4), tokenizer=None))
    with pytest.raises(UnsupportedError, match="tokenizer=Unsaved cannot be saved, so it does not travel"):
        engine.start(EngineSource(model=programs.build_tiny(), tokenizer=Unsaved()))
    nameless = type("Nameless", (Unsaved,), {"save_pretrained": None})()
    with pytest.raises(UnsupportedError, match=r"tokenizer=Nameless is not found in .* by its name, so it does not"):
        engine.start(EngineSource(model=programs.build_tiny(), tokenizer=nameless))
    assert held() - before == set()


class Unsaved:
    """A tokenizer that lives in memory alone."""

    eos_token_id = None

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return "".join(map(chr, token_ids))


def test_an_engine_ends_with_a_trainer_that_is_killed_while_it_syncs(programs: ModuleType, faults: Path) -> None:
    """Nobody closes it then; its memory has no name, so that it is gone with the two processes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), programs.FAULTS: str(faults)}
    with subprocess.Popen(  # noqa: S603 (a program of ours)
        [sys.executable, str(programs.__file__), "memory"], stdout=subprocess.PIPE, env=environment, text=True
    ) as trainer:
        assert trainer.stdout is not None
        pids = [int(trainer.stdout.readline()) for _ in range(2)]
        trainer.kill()
    assert pids[0] == pids[1]
    deadline = time.monotonic() + PATIENCE
    while session_of(pids[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_settings_that_make_no_sense_are_refused() -> None:
    """Before anything is started."""
    with pytest.raises(ConfigError, match="process='elsewhere'"):
        EngineConfig(process="elsewhere")
    with pytest.raises(ConfigError, match="timeout_seconds=0"):
        EngineConfig(timeout_seconds=0)
    with pytest.raises(ConfigError, match=r"transport='pigeon' is not known; Known: collective, memory\."):
        EngineConfig(process="own", transport="pigeon")
    words = (
        "transport='collective' takes weights into another process, and process='trainer' has the engine in this one"
    )
    with pytest.raises(ConfigError, match=words):
        EngineConfig(transport="collective")
