"""The life of an engine, checked as a state machine against a table written independently."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightrft.backends.rollout.scripted import build_scripted
from lightrft.config.sections import EngineConfig
from lightrft.errors import EngineStateError, LightRFTError, WeightSyncError
from lightrft.strategy.protocols.rollout import EngineHandle, EngineSource, EngineStatus, Prompt, SamplingParams

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
            with pytest.raises(EngineStateError, match=name.removeprefix("bad_")):
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
