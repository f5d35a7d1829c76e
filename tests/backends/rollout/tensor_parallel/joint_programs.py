"""What two ranks that run one engine do: `test_engine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
from torch import nn

from lightrft.backends.rollout.hf.engine import build_hf
from lightrft.backends.rollout.tensor_parallel.engine import build_tensor_parallel
from lightrft.config import EngineConfig, ModelConfig
from lightrft.errors import EngineCrashError
from lightrft.models.build import build_model_and_tokenizer
from lightrft.strategy.protocols import Completion, Engine, EngineHandle, EngineSource, Prompt, SamplingParams
from lightrft.testing.cases.vision import build_processor
from lightrft.testing.subject import Rank

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=3)
HOT = SamplingParams(max_new_tokens=3, n=2, seed=4)
CONFIG = EngineConfig(tensor_parallel_size=2, timeout_seconds=120)


@attrs.frozen(kw_only=True)
class Told:
    """What a rank was told in a call, and its engine's status and version afterwards."""

    words: str
    status: str
    version: int


@attrs.frozen(kw_only=True)
class Seen:
    """What a rank saw.

    Attributes:
        calls: how many prompts its engine was asked for in each call.
        split: completions of prompts whose numbers follow one another over the ranks.
        whole: of all these prompts, on one engine alone.
        other: of prompts whose numbers begin anew on each rank.
        told: what it was told in calls that fail.
    """

    calls: list[int]
    split: list[Completion]
    whole: list[Completion]
    other: list[Completion]
    told: dict[str, Told]


def small() -> nn.Module:
    size = ModelConfig(
        architecture="llama", hidden_size=8, num_layers=1, num_heads=1, max_length=16, alphabet="0123456"
    )
    return build_model_and_tokenizer(size, seed=0)[0].eval()


def run(rank: Rank, case: str) -> Seen:
    """Generate together, and fail in every way."""
    del case
    rank.build(rank.config).setup_distributed()
    model, is_wrong, asked = small(), rank.rank == 1, list[int]()
    shard = build_hf(CONFIG)

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        asked.append(len(prompts))
        if sampling.seed == 13 and is_wrong:
            raise EngineCrashError("a shard broke off")
        return shard.generate(handle, prompts, sampling)

    engine = build_tensor_parallel(attrs.evolve(shard, generate=generate), CONFIG)
    source = EngineSource(model=model, tokenizer=None)
    with shard.start(source) as alone:
        whole = shard.generate(alone, _prompts((2,), (3, 4), (5,)), HOT)
    with engine.start(source) as handle:
        mine = _prompts((2,), (3, 4)) if rank.rank == 0 else _prompts((5,))
        split = engine.generate(handle, mine, attrs.evolve(HOT, first_prompt=0 if rank.rank == 0 else 2))
        other = engine.generate(handle, mine, HOT)
        nothing = engine.generate(handle, [] if is_wrong else _prompts((2,)), HOT)
        other += engine.generate(handle, _prompts((6,)), GREEDY)
        assert not is_wrong or nothing == []
        calls = asked.copy()
        told = _failures(engine, handle, model, is_wrong=is_wrong)
    return Seen(calls=calls, split=split, whole=whole, other=other, told=told)


def _failures(engine: Engine, handle: EngineHandle, model: nn.Module, *, is_wrong: bool) -> dict[str, Told]:
    told: dict[str, Told] = {}
    weights = list(model.state_dict().items())

    def tell(name: str, *calls: Callable[[], object]) -> None:
        words = ""
        try:
            for call in calls:
                call()
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            words = f"{type(error).__name__}: {error}"
        told[name] = Told(words=words, status=handle.status, version=handle.weight_version)

    def begin() -> None:
        engine.begin_update(handle)

    def put() -> None:
        engine.put(handle, weights)

    def commit() -> None:
        engine.commit(handle)

    def abort() -> None:
        engine.abort(handle)

    def empty() -> None:
        engine.generate(handle, _prompts(() if is_wrong else (1,)), GREEDY)

    def sample() -> None:
        engine.generate(handle, _prompts((1,)), attrs.evolve(GREEDY, top_k=1 + is_wrong))

    def put_unknown() -> None:
        engine.put(handle, [("unknown", weights[0][1])] if is_wrong else weights[:1])

    def put_some() -> None:
        engine.put(handle, weights[is_wrong:])

    def break_off() -> None:
        engine.generate(handle, _prompts((1,)), attrs.evolve(GREEDY, seed=13))

    tell("update", begin, put, commit)
    tell("empty", empty)
    tell("sampling", sample)
    tell("unknown", begin, put_unknown)
    tell("torn", abort, begin, put, commit)
    tell("one gives up", begin, abort if is_wrong else put)
    tell("mended", *([] if is_wrong else [abort]), begin, put, commit)
    tell("missing", begin, put_some, commit)
    tell("mended again", begin, put, commit)
    tell("sleep", lambda: engine.sleep(handle), lambda: engine.wake(handle), lambda: engine.flush_cache(handle))
    tell("both abort", abort)
    tell("mended for good", begin, put, commit)
    tell("crash", break_off)
    tell("lost", begin)
    tell("given up", abort)
    return told


def beside(rank: Rank, case: str) -> list[Completion]:
    """Generate in groups beside one another; each rank has another prompt, and its number is the rank's."""
    del case
    rank.build(rank.config).setup_distributed()
    engine = build_tensor_parallel(build_hf(CONFIG), CONFIG)
    with engine.start(EngineSource(model=small(), tokenizer=None)) as handle:
        return engine.generate(handle, _prompts((2 + rank.rank,)), attrs.evolve(HOT, first_prompt=rank.rank))


def differ(rank: Rank, case: str) -> list[str]:
    """Be in different calls, be given different models, and start where one cannot; return what this rank was told."""
    del case
    rank.build(rank.config).setup_distributed()
    is_wrong, told, shard = rank.rank == 1, list[str](), build_hf(CONFIG)
    engine = build_tensor_parallel(shard, CONFIG)

    def start(source: EngineSource) -> EngineHandle:
        if is_wrong:
            raise MemoryError("no room")
        return shard.start(source)

    def told_by(call: Callable[[], object]) -> str:
        try:
            call()
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            return f"{type(error).__name__}: {error}"
        return ""

    source = EngineSource(model=small(), tokenizer=None)
    other = EngineSource(model=small().double() if is_wrong else small(), tokenizer=None)
    with engine.start(source) as handle:
        told.append(told_by(lambda: engine.sleep(handle) if is_wrong else engine.flush_cache(handle)))
        told.append(told_by(lambda: engine.flush_cache(handle)))
    told.append(told_by(lambda: engine.start(other)))
    told.append(told_by(lambda: build_tensor_parallel(attrs.evolve(shard, start=start), CONFIG).start(source)))
    reads = None if is_wrong else build_processor()
    told.append(told_by(lambda: engine.start(attrs.evolve(source, processor=reads))))
    three = attrs.evolve(CONFIG, tensor_parallel_size=3)
    told.append(told_by(lambda: build_tensor_parallel(shard, three).start(source)))
    with engine.start(source) as handle:
        if is_wrong:  # it leaves, and the other one is told so
            return told
        told.append(told_by(lambda: engine.generate(handle, _prompts((1,)), GREEDY)))
    return told


def _prompts(*token_ids: tuple[int, ...]) -> list[Prompt]:
    return [Prompt(token_ids=ids) for ids in token_ids]
