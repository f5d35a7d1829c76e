"""The life of an engine, gone through on this machine from start to end."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightrft.cli.trial import take_step, tiny_actor, tiny_strategy
from lightrft.errors import EngineStateError
from lightrft.strategy.protocols.rollout import EngineStatus, Prompt, SamplingParams
from lightrft.weight_sync import probe_engine

if TYPE_CHECKING:
    from lightrft.config import EngineConfig
    from lightrft.strategy.protocols.rollout import Completion, EngineHandle
    from lightrft.strategy.protocols.training import Trainable
    from lightrft.strategy.record import Strategy

__all__ = ["STEPS", "live"]

STEPS = ("start", "generate", "sync", "verify", "sleep", "wake", "close")
"""What an engine goes through, in order."""

_PROMPTS = tuple(Prompt(token_ids=ids) for ids in ((1, 2, 3), (4,), (5, 6)))
_SAMPLING = SamplingParams(max_new_tokens=6, n=2, seed=1)


def live(config: EngineConfig) -> Generator[str]:
    """Yield what was seen of each of `STEPS`, as soon as it is done; an error of a step ends the engine.

    Args:
        config: the engine.

    Raises:
        ConfigError: no such engine is registered.
        MissingPackageError: what it needs is not installed.
        RuntimeError: a step did not do its work.
    """
    strategy = tiny_strategy()
    strategy.setup_distributed()
    try:
        children = _children()
        actor, tokenizer = tiny_actor(strategy)
        with strategy.setup_inference_engine(config, actor=actor.model, tokenizer=tokenizer) as engine:
            yield _started(engine, actor)
            yield _generated(_made(strategy, engine))
            before = _changed(strategy, engine, actor)
            yield _synced(strategy, engine, actor)
            yield _verified(engine, actor, before=before)
            expected = _made(strategy, engine)
            yield _slept(strategy, engine)
            yield _woken(strategy, engine, expected)
        yield _closed(strategy, engine, children)
    finally:
        strategy.teardown()


def _started(engine: EngineHandle, actor: Trainable) -> str:
    _require_status(engine, "awake")
    num_parameters = sum(parameter.numel() for parameter in actor.model.parameters())
    return f"{type(actor.model).__name__} of {num_parameters:,} parameters, weight version {engine.weight_version}"


def _made(strategy: Strategy, engine: EngineHandle) -> list[Completion]:
    return strategy.gather_and_generate(engine, _PROMPTS, _SAMPLING)


def _generated(made: Sequence[Completion]) -> str:
    wanted = [prompt.token_ids for prompt in _PROMPTS for _ in range(_SAMPLING.n)]
    if [completion.prompt_ids for completion in made] != wanted:
        raise RuntimeError(f"{len(made)} completions came, and not {_SAMPLING.n} of each of {len(_PROMPTS)} prompts")
    if not all(math.isfinite(logprob) for completion in made for logprob in completion.logprobs):
        raise RuntimeError("a logprob is not finite")
    num_tokens = sum(len(completion.token_ids) for completion in made)
    return f"{len(made)} completions of {len(_PROMPTS)} prompts, {num_tokens} tokens"


def _changed(strategy: Strategy, engine: EngineHandle, actor: Trainable) -> float:
    """Return how far the engine is from a model that was trained on, so that a sync that does nothing is found."""
    take_step(strategy, actor)
    found = probe_engine(engine, actor.model)
    if found.agrees:
        raise RuntimeError(
            f"the engine agrees with new weights that it was not given (a difference of {found.difference:.1g})"
        )
    return found.difference


def _synced(strategy: Strategy, engine: EngineHandle, actor: Trainable) -> str:
    report = strategy.update_engine_weights(engine, actor.model)
    return f"{report.num_tensors} tensors, {report.num_bytes:,} bytes, weight version {report.weight_version}"


def _verified(engine: EngineHandle, actor: Trainable, *, before: float) -> str:
    found = probe_engine(engine, actor.model)
    if not found.agrees:
        raise RuntimeError(f"a logprob is {found.difference:.2g} nats from the trainer's (bound {found.bound:.2g})")
    return f"logprobs within {found.difference:.1g} nats of the trainer's; {before:.1g} before the sync"


def _slept(strategy: Strategy, engine: EngineHandle) -> str:
    awake = strategy.report_memory().resident
    engine.engine.sleep(engine)
    _require_status(engine, "asleep")
    _require_refused(strategy, engine)
    return f"{_mebibytes(awake)} resident awake, {_mebibytes(strategy.report_memory().resident)} asleep"


def _woken(strategy: Strategy, engine: EngineHandle, expected: Sequence[Completion]) -> str:
    engine.engine.wake(engine)
    _require_status(engine, "awake")
    tokens = [completion.token_ids for completion in _made(strategy, engine)]
    if tokens != [completion.token_ids for completion in expected]:
        raise RuntimeError(f"{tokens!r} after waking is not what the same request gave before sleeping")
    return "the same request gives the same tokens as before"


def _closed(strategy: Strategy, engine: EngineHandle, children: frozenset[int]) -> str:
    _require_status(engine, "closed")
    _require_refused(strategy, engine)
    left = _children() - children
    if left:
        raise RuntimeError(f"processes {sorted(left)} are left")
    return "a request is refused; no process is left"


def _require_status(engine: EngineHandle, status: EngineStatus) -> None:
    if engine.status != status:
        raise RuntimeError(f"the engine is {engine.status!r} and must be {status!r}")


def _require_refused(strategy: Strategy, engine: EngineHandle) -> None:
    try:
        _made(strategy, engine)
    except EngineStateError:
        return
    raise RuntimeError(f"the engine is {engine.status!r} and generates all the same")


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _children(tasks: Path = Path("/proc/self/task")) -> frozenset[int]:
    """Return the processes that this one has started; none where the system does not tell."""
    numbers = [int(word) for path in tasks.glob("*/children") for word in _read(path).split()]
    # Python's own tracker of shared memory stays until this process ends
    tracker = b"multiprocessing.resource_tracker"
    return frozenset(number for number in numbers if tracker not in _read(Path(f"/proc/{number}/cmdline")))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # the thread or process has ended meanwhile
        return b""
