"""The engine "sglang" with `engine.url`: completions of a server of SGLang that somebody started on this machine.

Weights go to it by files: the public endpoints that take them otherwise read pickles, or want a group of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast
from uuid import uuid4

import attrs
import torch
from safetensors.torch import save_file

from lightrft.backends.rollout.lifecycle import guarded
from lightrft.backends.rollout.random_streams import stream_keys
from lightrft.backends.rollout.request_checks import RequestLimits, check_taken, check_within, limits_of
from lightrft.backends.rollout.sglang.load import one_by_one
from lightrft.backends.rollout.sglang.server_calls import Server, ask, draw, said_by
from lightrft.backends.rollout.sglang.server_model import require_fitting
from lightrft.backends.rollout.sglang.server_sleep import flush, put_to_sleep, wake_up
from lightrft.backends.rollout.weights import checked, require_all
from lightrft.errors import ConfigError, EngineCrashError, UnsupportedError, WeightSyncError
from lightrft.models.images import read_prompts
from lightrft.strategy.protocols.rollout import (
    Completion,
    Engine,
    EngineHandle,
    EngineSource,
    FinishReason,
    Prompt,
    SamplingParams,
)
from lightrft.weight_sync import probe_engine

if TYPE_CHECKING:
    from lightrft.config.sections import EngineConfig

__all__ = ["build_sglang_server"]


@attrs.define(kw_only=True, eq=False)
class _State:
    server: Server
    limits: RequestLimits
    shapes: dict[str, torch.Size]
    run: str  # names the weights of this engine, among those that others may give the server
    version: str = ""
    num_updates: int = 0
    written: set[str] = attrs.field(factory=set[str])
    files: TemporaryDirectory[str] | None = None
    num_files: int = 0
    unanswered: list[TemporaryDirectory[str]] = attrs.field(factory=list["TemporaryDirectory[str]"])
    is_asleep: bool = False


def build_sglang_server(config: EngineConfig) -> Engine:
    """Return the engine "sglang" of a server.

    The server runs on this machine, with the model that is trained and in its dtype. It draws by temperature, by no
    seed of ours. It is left running, awake, with the last weights.

    Args:
        config: `url` is the server's, `timeout_seconds` how long a call may take. How many sequences it decodes at once
            and what memory its cache has were said when it was started, and not by `batch_size` and `cache_gb`.

    Raises:
        ConfigError: the engine is to be in a process of its own, which a server is.
    """
    if config.process != "trainer":
        raise ConfigError(
            f"process={config.process!r} is for an engine that is started here and url={config.url!r} runs already; "
            "leave one of them out."
        )
    server = Server(url=config.url, timeout_seconds=config.timeout_seconds)

    def start(source: EngineSource) -> EngineHandle:
        state = _State(
            server=server,
            limits=limits_of(source.model),
            shapes={name: tensor.shape for name, tensor in source.model.state_dict().items()},
            run=uuid4().hex,
        )
        require_fitting(server, source)
        handle = EngineHandle(engine=engine, status="awake", weight_version=0, state=state)
        try:
            begin_update(handle)
            put(handle, source.model.state_dict().items())
            commit(handle)
            flush_cache(handle)
            _require_same(handle, source)
        except BaseException:
            close(handle)
            raise
        return handle

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        return _generate(handle, prompts, sampling)

    def begin_update(handle: EngineHandle) -> None:
        state = _state(handle)
        _forget_files(state)
        state.written.clear()
        wake_up(server)  # a trainer that ended, or another one, may have left it asleep
        state.files = TemporaryDirectory(prefix="lightrft-weights-")

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        _write(_state(handle), tensors)

    def commit(handle: EngineHandle) -> int:
        state = _state(handle)
        require_all(state.shapes, state.written)
        _load(state)
        return handle.weight_version + 1

    def abort(handle: EngineHandle) -> None:
        _forget_files(_state(handle))

    def sleep(handle: EngineHandle) -> None:
        state = _state(handle)
        state.is_asleep = put_to_sleep(server, state.version)

    def wake(handle: EngineHandle) -> None:
        _wake(_state(handle))

    def flush_cache(handle: EngineHandle) -> None:
        del handle
        flush(server)

    def close(handle: EngineHandle) -> None:
        state, handle.state = _state(handle), None
        _forget_files(state)
        _forget_unanswered(state)
        _wake(state)

    engine = Engine(
        capabilities=frozenset(),
        start=start,
        generate=generate,
        begin_update=begin_update,
        put=put,
        commit=commit,
        abort=abort,
        sleep=sleep,
        wake=wake,
        flush_cache=flush_cache,
        close=close,
    )
    return guarded(engine)


def _require_same(handle: EngineHandle, source: EngineSource) -> None:
    """Refuse a server that computes otherwise, before anything is made of it."""
    url, found = _state(handle).server.url, probe_engine(handle, source.model)
    if not found.agrees:
        raise UnsupportedError(
            f"url={url!r} computes otherwise: a logprob is {found.difference:.3g} nats from that of the model's own "
            f"forward; start it with this model and --dtype {_dtype(source)}."
        )
    if not probe_engine(handle, source.model, temperature=2.0).agrees:
        raise UnsupportedError(
            f"url={url!r} gives logprobs that heed no temperature; start it without SGLANG_RETURN_ORIGINAL_LOGPROB."
        )


def _dtype(source: EngineSource) -> str:
    return str(next(source.model.parameters()).dtype).removeprefix("torch.")


def _generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
    state = _state(handle)
    check_taken(prompts, engine="sglang with engine.url", takes=handle.engine.capabilities)
    _check_sampling(sampling)
    read = read_prompts(prompts, None)
    check_within(state.limits, [prompt.token_ids for prompt in read], sampling)
    numbers = [sampling.first_prompt + index for index in range(len(read)) for _ in range(sampling.n)]
    seeds = stream_keys(sampling.seed, numbers, list(range(sampling.n)) * len(read)).tolist()
    asked = [prompt.token_ids for prompt in read for _ in range(sampling.n)]
    made = draw(state.server, asked, sampling, seeds=seeds, version=state.version)
    return [
        Completion(
            prompt_ids=asked[place],
            token_ids=one.token_ids,
            logprobs=one.logprobs,
            finish_reason=cast("FinishReason", one.finish_reason),
            weight_version=handle.weight_version,
            sample_index=place % sampling.n,
        )
        for place, one in enumerate(made)
    ]


def _check_sampling(sampling: SamplingParams) -> None:
    settings = {
        "top_p": (sampling.top_p, 1.0),
        "top_k": (sampling.top_k, 0),
        "min_new_tokens": (sampling.min_new_tokens, 0),
    }
    for name, (value, off) in settings.items():
        if value != off:
            raise UnsupportedError(
                f"{name}={value!r} means something else to a server of SGLang; leave it at {off!r}, or engine.url out."
            )


def _write(state: _State, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    assert state.files is not None  # noqa: S101 (the life cycle of engines allows no other order)
    taken = checked(tensors, shapes=state.shapes, written=state.written)
    # copies, because a file takes no two tensors of one storage: tied ones, or the experts of a layer
    bucket = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in one_by_one(taken)
    }
    save_file(bucket, Path(state.files.name) / f"model-{state.num_files:05}.safetensors")
    state.num_files += 1


def _load(state: _State) -> None:
    """Let the server read the files; it says nothing of what is missing in them, which `checked` has seen to."""
    assert state.files is not None  # noqa: S101 (the life cycle of engines allows no other order)
    state.num_updates += 1
    state.version = f"{state.run}-{state.num_updates}"
    wanted = {
        "model_path": state.files.name,
        "load_format": "safetensors",
        "weight_version": state.version,
        # a commit flushes afterwards, and waits for requests that nobody waits for any more; this would fail on them
        "flush_cache": False,
    }
    state.unanswered.append(state.files)
    state.files = None
    try:
        answer = ask(state.server, "/update_weights_from_disk", wanted)
    except EngineCrashError as error:  # as such it would be tried again at once, while the server may still be reading
        raise WeightSyncError(str(error)) from error
    _forget_unanswered(state)  # it makes one update after the other, so earlier ones are done, too
    success = isinstance(answer.content, dict) and cast("dict[str, object]", answer.content).get("success") is True
    if answer.status != 200 or not success:
        raise WeightSyncError(
            f"SGLang's server takes no weights: it says {said_by(answer)}; see that it reads the files."
        )


def _wake(state: _State) -> None:
    """Wake the server if it is the one that was put to sleep; where it is not, whoever generates is told."""
    if state.is_asleep:
        state.is_asleep = False
        with suppress(EngineCrashError):
            wake_up(state.server, state.version)


def _forget_files(state: _State) -> None:
    if state.files is not None:
        state.files.cleanup()
        state.files = None


def _forget_unanswered(state: _State) -> None:
    while state.unanswered:
        state.unanswered.pop().cleanup()


def _state(handle: EngineHandle) -> _State:
    assert isinstance(handle.state, _State)  # noqa: S101 (the handle was made by `start` above)
    return handle.state
