"""What ranks that run one vLLM together are asked: `test_vllm_tensor_parallel`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import attrs
import psutil
import pytest
from torch import Tensor, nn

from lightrft.config import ModelConfig
from lightrft.models.build import build_model
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy.protocols import Completion, EngineHandle, Prompt, SamplingParams
from lightrft.strategy.record import Strategy
from lightrft.testing.subject import Rank
from lightrft.weight_sync import transfer_weights

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
HOT = SamplingParams(temperature=1.3, max_new_tokens=5, n=2, seed=7)
SHARES = (((1, 2, 3), (4,), (0, 5, 6, 7, 8, 9, 10, 11, 12)), ())
"""Prompts of each rank: all on one, and none on the other."""


@attrs.frozen(kw_only=True)
class Made:
    """Completions of one rank: of the engine that both run, of one on each, and of the first after a sleep."""

    greedy: list[Completion]
    hot: list[Completion]
    own_greedy: list[Completion]
    own_hot: list[Completion]
    woken: list[Completion]
    shard_bytes: int
    whole_bytes: int


@attrs.frozen(kw_only=True)
class Told:
    """What a rank was told in a call, and the status of its engine afterwards."""

    kind: str
    message: str
    status: str


@attrs.frozen(kw_only=True)
class Lost:
    """What a rank whose neighbour was killed was told, and what it holds before the engine started and afterwards."""

    told: Told
    seconds: float
    before: list[str]
    after: list[str]


def policy(*, num_heads: int = 2, num_layers: int = 2, seed: int = 0) -> nn.Module:
    config = ModelConfig(
        architecture="qwen3",
        hidden_size=32 * num_heads,  # heads of 32, the smallest that vLLM's attention takes on a CPU
        intermediate_size=48,
        num_layers=num_layers,
        num_heads=num_heads,
        max_length=32,
        initializer_range=0.25,
    )
    return build_model(config, build_character_tokenizer("0123456789+"), seed=seed).eval()


def make(rank: Rank, case: str) -> Made:
    """Generate with one engine on both ranks, and with one on each."""
    del case
    strategy, model = _strategy(rank), policy()
    with strategy.setup_inference_engine(rank.engine, actor=model) as engine:
        greedy, hot = _generate(rank, strategy, engine, GREEDY), _generate(rank, strategy, engine, HOT)
        engine.engine.sleep(engine)
        engine.engine.wake(engine)
        woken, shard = _generate(rank, strategy, engine, HOT), _bytes_of(_inside(engine).model)
    with strategy.setup_inference_engine(attrs.evolve(rank.engine, tensor_parallel_size=1), actor=model) as engine:
        return Made(
            greedy=greedy,
            hot=hot,
            own_greedy=_generate(rank, strategy, engine, GREEDY),
            own_hot=_generate(rank, strategy, engine, HOT),
            woken=woken,
            shard_bytes=shard,
            whole_bytes=_bytes_of(cast("Any", engine.state).inside.model),
        )


def fail(rank: Rank, case: str) -> dict[str, Told]:
    """Let one rank do wrong in every way, and sync again after each; return what this rank was told."""
    del case
    strategy, model = _strategy(rank), policy()
    weights, is_wrong = model.state_dict(), rank.rank == 1
    told: dict[str, Told] = {}
    with strategy.setup_inference_engine(rank.engine, actor=model) as engine:

        def tell(name: str, call: Callable[[], object]) -> None:
            told[name] = _told(engine, call)

        def mended(name: str) -> None:
            strategy.update_engine_weights(engine, model)
            told[name] = Told(
                kind="", message=str(_ids(_generate(rank, strategy, engine, GREEDY))), status=engine.status
            )

        def generate(prompt: tuple[int, ...], sampling: SamplingParams) -> list[Completion]:
            return engine.engine.generate(engine, [Prompt(token_ids=prompt)], sampling)

        def put_wrong() -> None:
            engine.engine.begin_update(engine)
            tensors = {name: tensor[:1] if is_wrong else tensor for name, tensor in weights.items()}
            engine.engine.put(engine, tensors.items())

        def break_off() -> None:
            transfer_weights(_broken(weights) if is_wrong else weights.items(), engine)

        def leave_out() -> None:
            transfer_weights(list(weights.items())[is_wrong:], engine)

        mended("first")
        tell("token", lambda: generate((99,) if is_wrong else (1,), GREEDY))
        tell("gathered", lambda: strategy.gather_and_generate(engine, _prompts(((99,),) if is_wrong else ()), GREEDY))
        tell("sampling", lambda: generate((1,), attrs.evolve(GREEDY, top_k=1 + rank.rank)))
        tell("shape", put_wrong)
        mended("after shape")
        tell("stream", break_off)
        mended("after stream")
        tell("missing", leave_out)
        mended("after missing")
        count = [0]

        def raise_at_third(module: nn.Module, args: object) -> None:
            del module, args
            count[0] += 1
            if is_wrong and count[0] == 3:
                raise ValueError("the third forward")

        _inside(engine).model.register_forward_pre_hook(raise_at_third)
        tell("forward", lambda: generate((1, 2), GREEDY))
        tell("after forward", lambda: strategy.update_engine_weights(engine, model))
    with strategy.setup_inference_engine(rank.engine, actor=model) as engine:
        mended("new engine")
        tell("calls", lambda: engine.engine.sleep(engine) if is_wrong else engine.engine.flush_cache(engine))
    return told


def refuse(rank: Rank, case: str) -> dict[str, Told]:
    """Start what cannot be started; return what this rank was told."""
    del case
    strategy, is_wrong = _strategy(rank), rank.rank == 1

    def start(model: nn.Module, **changes: object) -> Told:
        def call() -> None:
            config = attrs.evolve(rank.engine, **cast("dict[str, Any]", changes))
            strategy.setup_inference_engine(config, actor=model)

        return _told(None, call)

    def start_without_room() -> None:
        with pytest.MonkeyPatch.context() as patch:
            if is_wrong:
                patch.setattr(import_module("vllm.model_executor.models.qwen3").Qwen3ForCausalLM, "__init__", _no_room)
            strategy.setup_inference_engine(rank.engine, actor=policy())

    return {
        "divisor": start(policy(), tensor_parallel_size=3),
        "heads": start(policy(num_heads=3)),
        "model": start(policy(num_layers=1 + is_wrong)),
        "middle": _told(None, start_without_room),
        "hf": start(policy(), type="hf"),
        "right": start(policy()),
    }


def be_killed(rank: Rank, case: str) -> Lost:
    """Generate until rank 1 is killed by itself, in the middle of a forward pass; return how rank 0 found out.

    Args:
        rank: its place.
        case: file into which rank 1 writes what it holds before its end.
    """
    strategy, model = _strategy(rank), policy()
    before, began = _held(), time.monotonic()
    with strategy.setup_inference_engine(rank.engine, actor=model) as engine:
        count = [0]

        def die_at_fourth(module: nn.Module, args: object) -> None:
            del module, args
            count[0] += 1
            if rank.rank == 1 and count[0] == 4:
                Path(case).write_text("\n".join(_held()), encoding="utf-8")
                os.kill(os.getpid(), signal.SIGKILL)

        _inside(engine).model.register_forward_pre_hook(die_at_fourth)
        began = time.monotonic()
        told = _told(engine, lambda: _generate(rank, strategy, engine, GREEDY))
        seconds = time.monotonic() - began
    return Lost(told=told, seconds=seconds, before=before, after=_held())


def _strategy(rank: Rank) -> Strategy:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    return strategy


def _generate(rank: Rank, strategy: Strategy, engine: EngineHandle, sampling: SamplingParams) -> list[Completion]:
    return strategy.gather_and_generate(engine, _prompts(SHARES[rank.rank]), sampling)


def _prompts(token_ids: tuple[tuple[int, ...], ...]) -> list[Prompt]:
    return [Prompt(token_ids=ids) for ids in token_ids]


def _ids(made: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in made]


def _inside(engine: EngineHandle) -> Any:
    return cast("Any", engine.state).shard.state.inside


def _bytes_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _broken(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield next(iter(weights.items()))
    raise InterruptedError("the stream broke off")


def _no_room(*args: object, **settings: object) -> None:
    del args, settings
    raise MemoryError("no room")


def _told(engine: EngineHandle | None, call: Callable[[], object]) -> Told:
    kind, message = "", ""
    try:
        call()
    except Exception as error:  # noqa: BLE001 (the test looks at it)
        kind, message = type(error).__name__, str(error)
    return Told(kind=kind, message=message, status="" if engine is None else engine.status)


def _held() -> list[str]:
    """Return what this process holds that could outlive it or an engine: processes, ports, shared memory."""
    process = psutil.Process()
    children = [f"process {child.pid} {child.name()}" for child in process.children(recursive=True)]
    ports = [f"port {each.laddr.port}" for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    memory = {f"memory {line.split(maxsplit=5)[5]}" for line in maps if "/dev/shm/" in line}  # noqa: S108 (looked at)
    return sorted({*children, *ports, *memory})
