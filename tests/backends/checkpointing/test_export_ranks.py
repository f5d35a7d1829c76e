"""Exports of prepared models: in several files, gathered one tensor at a time, whatever the strategy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightrft.strategy.config import StrategyConfig
from lightrft.testing.conformance.hold import run_on
from lightrft.testing.subject import RunOnRanks, subject_of

SETTINGS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {"strategy": "single"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "stage 3": (2, {"strategy": "deepspeed", "zero_stage": 3, "zero_persistence_threshold": 0}),
}

MESSAGES = 512  # bytes in which ranks tell one another that they are ready


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield import_module("export_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module", params=SETTINGS)
def run(programs: ModuleType, request: pytest.FixtureRequest) -> Iterator[RunOnRanks]:
    del programs
    world_size, settings = SETTINGS[request.param]
    config = StrategyConfig.from_mapping(settings)
    subject = subject_of(str(config.strategy), "strategy", config=config)
    with run_on(subject, "here" if world_size == 1 else "processes", world_size) as runner:
        yield runner


@pytest.mark.parametrize("tied", [True, False])
def test_prepared_models_are_exported_in_files(
    tmp_path: Path, programs: ModuleType, run: RunOnRanks, tied: bool
) -> None:
    """Three files hold the plain model, bit for bit for transformers and for `load_model`.

    Neither saving nor loading ever has more than two of the largest tensor in memory, and the model has fifteen.
    """
    out = tmp_path / "out"
    size = 4 * sum(parameter.numel() for parameter in programs.llama(0, tied=tied).parameters())
    seen = run(programs.export, programs.Case(directory=str(out), tied=tied, max_file_size=size * 4 // 10))
    assert [file.name for file in sorted(out.glob("*.safetensors"))] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    plain = programs.llama(0, tied=tied).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert theirs.keys() == plain.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in plain.items())
    for rank in seen:
        assert rank.loaded.keys() == rank.live.keys()
        assert all(torch.equal(rank.loaded[name], tensor) for name, tensor in rank.live.items())
        assert max(rank.peaks) <= 2 * rank.largest + MESSAGES, (rank.peaks, rank.largest, rank.total)
        assert rank.total > 15 * rank.largest
