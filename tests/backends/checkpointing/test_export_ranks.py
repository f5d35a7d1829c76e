"""Exports of prepared models: in several files, gathered piece by piece, whatever the strategy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightrft.strategy.config import StrategyConfig
from lightrft.testing.ranks.here import run_here
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.subject import RunOnRanks, subject_of

SETTINGS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {"strategy": "single"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "stage 3": (2, {"strategy": "deepspeed", "zero_stage": 3, "zero_persistence_threshold": 0}),
}

# of the largest tensor: its parts together, the whole, and what gloo's threads let go of only a moment later
MOST_AT_ONCE = 6


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield import_module("export_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module", params=SETTINGS)
def run(programs: ModuleType, spawn: SpawnRank, request: pytest.FixtureRequest) -> Iterator[RunOnRanks]:
    del programs
    world_size, settings = SETTINGS[request.param]
    config = StrategyConfig.from_mapping(settings)
    subject = subject_of(str(config.strategy), "strategy", config=config)
    alone = nullcontext(run_here(subject))
    with alone if world_size == 1 else processes(subject, world_size, timeout=90, spawn=spawn) as runner:
        yield runner


@pytest.mark.parametrize("tied", [True, False])
def test_prepared_models_are_exported_in_files(
    tmp_path: Path, programs: ModuleType, run: RunOnRanks, tied: bool
) -> None:
    """Three files hold the plain model, bit for bit for transformers and for `load_model`.

    Neither saving nor loading allocates more at once than a few of the largest tensor; the model has 25 of its size.
    """
    out = tmp_path / "out"
    sizes = [4 * parameter.numel() for parameter in programs.llama(0, tied=tied).parameters()]
    case = programs.Case(directory=str(out), tied=tied, max_file_size=sum(sizes) * 4 // 10, piece_size=max(sizes))
    seen = run(programs.export, case)
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
        assert max(rank.peaks) <= MOST_AT_ONCE * rank.largest, (rank.peaks, rank.largest, rank.total)
        assert rank.total > 3 * MOST_AT_ONCE * rank.largest


@pytest.mark.parametrize("variant", ["plain", "dora", "head"])
def test_adapters_of_prepared_models_are_merged(
    tmp_path: Path, programs: ModuleType, run: RunOnRanks, variant: str
) -> None:
    """The files are the bits of peft's own merging, transformers loads them, and the live model stays as it was."""
    out = tmp_path / "out"
    seen = run(programs.export_adapters, programs.AdapterCase(directory=str(out), variant=variant, adapters="merged"))
    merged = programs.adapted_llama(0, variant, tied=variant == "plain").merge_and_unload().state_dict()
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    theirs = loaded.state_dict()
    assert theirs.keys() == merged.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in merged.items())
    require_untouched(seen)


@pytest.mark.parametrize("variant", ["plain", "dora", "head"])
def test_adapters_of_prepared_models_are_exported_alone(
    tmp_path: Path, programs: ModuleType, run: RunOnRanks, variant: str
) -> None:
    """Peft loads the directory onto the base, bit for bit; the base is not in it."""
    out = tmp_path / "out"
    seen = run(programs.export_adapters, programs.AdapterCase(directory=str(out), variant=variant, adapters="alone"))
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (out / "adapter_model.safetensors").stat().st_size < 20_000
    tied = variant == "plain"
    live = programs.adapted_llama(0, variant, tied=tied).state_dict()
    theirs = PeftModel.from_pretrained(programs.llama(0, tied=tied), out).state_dict()
    assert theirs.keys() == live.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in live.items())
    require_untouched(seen)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_layer_that_cannot_be_merged_is_an_error_of_all(
    tmp_path: Path, programs: ModuleType, run: RunOnRanks, broken: int
) -> None:
    """In the middle of an export the error reaches every rank, nothing is left and no bit is changed.

    Where it is another rank than the writer's, its copy is not needed and nothing fails.
    """
    case = programs.AdapterCase(directory=str(tmp_path / "out"), variant="plain", adapters="merged", broken=broken)
    seen = run(programs.export_adapters, case)
    for rank, one in enumerate(seen):
        words = "base_layer.weight cannot be merged (KeyError('default')); pass adapters='alone'."
        assert one.error.endswith(words if broken == 0 else "")
        assert one.error.startswith("rank 0: ") == (broken == 0 and rank > 0)
    assert (tmp_path / "out").exists() == (broken != 0)
    require_untouched(seen, with_error=broken == 0)


def test_a_failing_tokenizer_is_an_error_of_all(tmp_path: Path, programs: ModuleType, run: RunOnRanks) -> None:
    """Rank 0 raises the tokenizer's own error, the others name rank 0 instead of waiting, and nothing is left."""
    first, *others = run(programs.export_with_a_failing_tokenizer, str(tmp_path / "out"))
    assert first == "KeyError('vocabulary')"
    assert all(error == """CheckpointError("rank 0: KeyError('vocabulary')")""" for error in others)
    assert list(tmp_path.iterdir()) == []


def require_untouched(seen: list[Any], *, with_error: bool = False) -> None:
    """Check that no rank's tensors have changed, nor any layer's note of what it has merged."""
    for rank in seen:
        assert bool(rank.error) == with_error
        assert rank.num_merged == 0
        assert rank.before.keys() == rank.after.keys()
        assert all(torch.equal(rank.before[name], tensor) for name, tensor in rank.after.items())
