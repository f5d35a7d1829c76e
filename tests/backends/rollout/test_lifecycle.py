"""The life of an engine, checked as a state machine against a table written independently."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightrft.backends.rollout.lifecycle import guarded
from lightrft.backends.rollout.scripted import build_scripted
from lightrft.config.sections import EngineConfig
from lightrft.errors import EngineStateError, LightRFTError, WeightSyncError
from lightrft.strategy.protocols.rollout import (
    Completion,
    Engine,
    EngineHandle,
    EngineSource,
    EngineStatus,
    Prompt,
    SamplingParams,
)

# what each call makes of each status; a status that is missing here refuses the call
NEXT: dict[str, dict[EngineStatus, EngineStatus]] = {
    "generate": {"awake": "awake"},
    "begin_update": {"awake": "updating", "torn": "updating"},
    "put": {"updating": "updating"},
    "bad_put": {"updating": "torn"},
    "commit": {"updating": "awake"},
    "abort": {"updating": "torn", "awake": "torn", "torn": "torn"},
    "sleep": {"awake": "asleep", "asleep": "asleep"},
    "wake": {"asleep": "awake", "awake": "awake"},
    "flush_cache": {"awake": "awake", "asleep": "asleep", "updating": "updating", "torn": "torn"},
    "close": {
        "awake": "closed",
        "asleep": "closed",
        "updating": "closed",
        "torn": "closed",
        "closed": "closed",
    },
}


def tiny_model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Embedding(16, 4), nn.Linear(4, 16))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def start(model: nn.Module) -> EngineHandle:
    return build_scripted(EngineConfig(type="scripted")).start(EngineSource(model=model, tokenizer=None))


def call(handle: EngineHandle, name: str, model: nn.Module) -> None:
    engine = handle.engine
    if name == "generate":
        engine.generate(handle, [Prompt(token_ids=(1, 2))], SamplingParams(max_new_tokens=2))
    elif name == "put":
        engine.put(handle, [])
    elif name == "bad_put":
        engine.put(handle, [("no such tensor", torch.zeros(1))])
    elif name == "commit":
        # everything is written just before, so that a legal commit succeeds
        if handle.status == "updating":
            engine.put(handle, list(model.state_dict().items()))
        engine.commit(handle)
    else:
        getattr(engine, name)(handle)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(NEXT)), max_size=12))
def test_every_call_is_legal_or_refused_as_the_table_says(calls: list[str]) -> None:
    """A legal call leads to the table's status; any other raises, names the call and changes nothing."""
    model = tiny_model()
    handle = start(model)
    expected: EngineStatus = "awake"
    version = 0
    for name in calls:
        legal = NEXT[name]
        if expected not in legal:
            with pytest.raises(EngineStateError, match=rf"^{name.removeprefix('bad_')}: the engine is"):
                call(handle, name, model)
        elif name == "bad_put":
            with pytest.raises(WeightSyncError, match="no such tensor"):
                call(handle, name, model)
            expected = "torn"
        else:
            call(handle, name, model)
            expected = legal[expected]
            version += name == "commit"
        assert handle.status == expected
        assert handle.weight_version == version


def test_a_commit_without_every_tensor_is_torn_and_mended_by_the_next_update() -> None:
    """Missing tensors are named, the engine refuses to generate, and a whole update makes it whole."""
    model = tiny_model()
    handle = start(model)
    first, *others = model.state_dict().items()
    handle.engine.begin_update(handle)
    handle.engine.put(handle, [first])
    with pytest.raises(WeightSyncError, match=r"2 of 3 tensors were not written \(1\.bias, 1\.weight\)"):
        handle.engine.commit(handle)
    with pytest.raises(EngineStateError, match="torn"):
        call(handle, "generate", model)
    handle.engine.begin_update(handle)
    handle.engine.put(handle, [first, *others])
    assert handle.engine.commit(handle) == 1
    call(handle, "generate", model)


def test_a_with_block_closes_the_engine_after_an_exception() -> None:
    """Leaving the block by an exception closes the engine and lets the exception through."""
    handle = start(tiny_model())
    with pytest.raises(LightRFTError), handle:
        raise LightRFTError
    assert handle.status == "closed"
    assert handle.state is None


WAY_TO: dict[EngineStatus, list[str]] = {
    "awake": [],
    "asleep": ["sleep"],
    "updating": ["begin_update"],
    "torn": ["abort"],
    "closed": ["close"],
}


@pytest.mark.parametrize("status", sorted(WAY_TO))
@pytest.mark.parametrize("name", sorted(NEXT))
def test_each_call_in_each_status(name: str, status: EngineStatus) -> None:
    """From every status, each call leads where the table says or is refused, with its name and the status."""
    model = tiny_model()
    handle = start(model)
    for step in WAY_TO[status]:
        call(handle, step, model)
    assert handle.status == status
    if status not in NEXT[name]:
        with pytest.raises(EngineStateError, match=rf"^{name.removeprefix('bad_')}: the engine is '{status}'; "):
            call(handle, name, model)
        assert handle.status == status
        return
    if name == "bad_put":
        with pytest.raises(WeightSyncError, match="tensor='no such tensor' is not in the engine"):
            call(handle, name, model)
    else:
        call(handle, name, model)
    assert handle.status == NEXT[name][status]


def test_versions_are_counted() -> None:
    """Each commit adds one to the version, returns it, and is what later completions carry."""
    model = tiny_model()
    handle = start(model)
    versions = []
    for _ in range(3):
        handle.engine.begin_update(handle)
        handle.engine.put(handle, list(model.state_dict().items()))
        versions.append(handle.engine.commit(handle))
        (completion,) = handle.engine.generate(handle, [Prompt(token_ids=(1,))], SamplingParams(max_new_tokens=1))
        versions.append(completion.weight_version)
    assert versions == [1, 1, 2, 2, 3, 3]


@attrs.define
class Told:
    """What an engine of somebody's own was asked to do, and the call that it fails."""

    calls: list[str]
    fails: str = ""


def recorder(told: Told) -> Engine:
    """An engine without weights that writes down each call it gets, if it is for the handle that it started."""
    made: list[EngineHandle] = []

    def note(name: str, handle: EngineHandle) -> None:
        assert [handle] == made
        told.calls.append(name)
        if name == told.fails:
            raise OSError(name)

    def start(source: EngineSource) -> EngineHandle:
        del source
        made.append(EngineHandle(engine=engine, status="awake", weight_version=0, state=None))
        return made[0]

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        del prompts, sampling
        note("generate", handle)
        return []

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        del tensors
        note("put", handle)

    def commit(handle: EngineHandle) -> int:
        note("commit", handle)
        return handle.weight_version + 1

    def named(name: str) -> object:
        def act(handle: EngineHandle) -> None:
            note(name, handle)

        return act

    others = ("begin_update", "abort", "sleep", "wake", "flush_cache", "close")
    engine = Engine(
        capabilities=frozenset(),
        start=start,
        generate=generate,
        put=put,
        commit=commit,
        **{name: named(name) for name in others},
    )
    return engine


UPDATE = ["begin_update", "put", "commit"]


def test_every_legal_call_reaches_the_engine_once() -> None:
    """The guarded functions call those of the engine with its handle; a commit also flushes what was cached."""
    told = Told([])
    handle = guarded(recorder(told)).start(EngineSource(model=tiny_model(), tokenizer=None))
    model = nn.Identity()  # without tensors
    for name in ("generate", *UPDATE, "sleep", "sleep", "wake", "wake", "flush_cache", "abort", "close", "close"):
        call(handle, name, model)
    put = ["begin_update", "put", "put", "commit", "flush_cache"]  # `call` puts once more before it commits
    assert told.calls == ["generate", *put, "sleep", "wake", "flush_cache", "abort", "close"]
    assert handle.engine.capabilities == frozenset()


@pytest.mark.parametrize(
    ("fails", "calls"),
    [
        ("begin_update", UPDATE[:1]),
        ("put", UPDATE[:2]),
        ("commit", UPDATE),
        ("flush_cache", UPDATE),
        ("abort", ["abort"]),
    ],
)
def test_an_update_that_fails_anywhere_leaves_the_engine_torn(fails: str, calls: list[str]) -> None:
    """An error of the engine while its weights change is passed on, and the engine is torn and keeps its version."""
    handle = guarded(recorder(Told([], fails=fails))).start(EngineSource(model=tiny_model(), tokenizer=None))

    def update() -> None:
        for name in calls:
            call(handle, name, nn.Identity())

    with pytest.raises(OSError, match=fails):
        update()
    assert (handle.status, handle.weight_version) == ("torn", 0)


@pytest.mark.parametrize(("name", "status"), [("sleep", "awake"), ("wake", "asleep")])
def test_a_sleep_or_wake_that_fails_changes_no_status(name: str, status: EngineStatus) -> None:
    """An engine that could not go to sleep is awake, and one that could not wake is asleep."""
    told = Told([])
    handle = guarded(recorder(told)).start(EngineSource(model=tiny_model(), tokenizer=None))
    for step in WAY_TO[status]:
        call(handle, step, nn.Identity())
    told.fails = name
    with pytest.raises(OSError, match=name):
        call(handle, name, nn.Identity())
    assert handle.status == status
