"""What the processes of these tests find by its name: a model, an engine that fails when it is told to, a trainer."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import nn

from lightrft.backends.rollout.apart.engine import ApartState, build_apart
from lightrft.backends.rollout.scripted import build_scripted
from lightrft.config.sections import EngineConfig
from lightrft.strategy.protocols.rollout import Completion, Engine, EngineHandle, EngineSource, Prompt, SamplingParams

FAULTS = "LIGHTRFT_TEST_FAULTS"
"""Names the directory in which an empty file asks for a fault, once."""

VOCABULARY = 13


class TinyConfig:
    """What is asked of a configuration of transformers, which takes seconds to import."""

    def __init__(self, *, width: int) -> None:
        self.width = width

    def to_dict(self) -> dict[str, object]:
        return dict(vars(self))

    def to_json_string(self, *, use_diff: bool) -> str:
        assert not use_diff
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, settings: Mapping[str, int]) -> TinyConfig:
        return cls(**settings)


class TinyModel(nn.Module):
    """Logits of the next token from the token before it; the head may be the embedding."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.head = nn.Linear(config.width, VOCABULARY)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("offset", torch.zeros(1), persistent=False)

    @classmethod
    def _from_config(cls, config: TinyConfig) -> TinyModel:
        return cls(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids)) * self.scale + self.offset


def build_tiny(seed: int = 0, *, width: int = 8) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return TinyModel(TinyConfig(width=width))


def is_asked_for(fault: str) -> bool:
    """Return whether a fault is asked for, and see that it is not a second time."""
    try:
        (Path(os.environ[FAULTS]) / fault).unlink()
    except FileNotFoundError:
        return False
    return True


def hang() -> None:
    os.write(1, b"it hangs\n")
    (Path(os.environ[FAULTS]) / "hangs").touch()
    while True:
        time.sleep(1)


def build_faulty(config: EngineConfig) -> Engine:
    """Return the engine "scripted", which fails where it is asked to."""
    inner = build_scripted(config)

    def start(source: EngineSource) -> EngineHandle:
        handle = inner.start(source)
        handle.engine = faulty
        return handle

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        if is_asked_for("hang in generate"):
            hang()
        return inner.generate(handle, prompts, sampling)

    def exits(name: str, call: Callable[[EngineHandle], object]) -> Callable[[EngineHandle], None]:
        def called(handle: EngineHandle) -> None:
            if is_asked_for(f"exit in {name}"):
                os.write(2, f"no {name} today".encode())
                os._exit(3)
            call(handle)

        return called

    def commit(handle: EngineHandle) -> int:
        exits("commit", inner.flush_cache)(handle)
        return inner.commit(handle)

    def close(handle: EngineHandle) -> None:
        inner.close(handle)
        (Path(os.environ[FAULTS]) / "closed").touch()

    faulty = attrs.evolve(
        inner,
        start=start,
        close=close,
        generate=generate,
        commit=commit,
        wake=exits("wake", inner.wake),
        flush_cache=exits("flush_cache", inner.flush_cache),
    )
    return faulty


def pid_of(handle: EngineHandle) -> int:
    assert isinstance(handle.state, ApartState)
    return handle.state.process.popen.pid


def train_and_sync(transport: str) -> None:
    """Sync again and again, after the number of the engine's process was printed."""
    model = build_tiny(width=4096)
    engine = build_apart(build_faulty, EngineConfig(type="scripted", process="own", transport=transport))
    with engine.start(EngineSource(model=model, tokenizer=None)) as handle:
        while True:
            handle.engine.begin_update(handle)
            handle.engine.put(handle, model.state_dict().items())
            os.write(1, f"{pid_of(handle)}\n".encode())
            handle.engine.commit(handle)


if __name__ == "__main__":
    # the engine finds its builder and model by the name of this module
    from apart_programs import train_and_sync as run

    run(sys.argv[1])
