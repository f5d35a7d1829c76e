"""A model out of a checkpoint: the same bytes as from the live one, and one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.backends.checkpointing.export import StoredModel, difference_to, export_model, open_model
from lightrft.backends.checkpointing.manifest import read_manifest
from lightrft.backends.checkpointing.stored import open_tensors, read_stored, stored_tensors
from lightrft.backends.collectives.single import build_collectives
from lightrft.errors import CheckpointError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import Trainable

COLLECTIVES = build_collectives(StrategyConfig(strategy="single"))


@pytest.fixture
def live(make_trainable: Callable[..., Trainable]) -> nn.Module:
    return make_trainable(5).model


@pytest.fixture
def stored(tmp_path: Path, checkpointing: CheckpointFunctions, live: nn.Module) -> StoredModel:
    path = checkpointing.save_ckpt({"policy": live}, tmp_path / "checkpoints", step=4)
    return open_model(path, read_manifest(path, step=4), "policy")


def test_an_exported_model_has_the_bytes_of_a_saved_one(
    tmp_path: Path, checkpointing: CheckpointFunctions, live: nn.Module, stored: StoredModel
) -> None:
    """Tied, empty, bfloat16 and complex tensors come out of a checkpoint as out of the live model."""
    checkpointing.save_model(live, tmp_path / "saved")
    assert export_model(stored, tmp_path / "exported", collectives=COLLECTIVES) == tmp_path / "exported"
    written = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "exported")}
    assert written["saved"] == written["exported"]
    assert stored.aliases["head.weight"] == "embed.weight"


def test_stored_tensors_are_those_that_are_read_at_once(tmp_path: Path, stored: StoredModel) -> None:
    """Names, shapes, dtypes and values are the same, also of what the format keeps as bytes."""
    path = tmp_path / "checkpoints" / "step-00000004" / "policy.model.safetensors"
    with open_tensors(path) as tensors:
        whole = {name: read_stored(tensor) for name, tensor in tensors.items()}
    lazy = stored_tensors(path)
    assert lazy.keys() == whole.keys() == stored.tensors.keys()
    for name, tensor in whole.items():
        assert (list(lazy[name].shape), lazy[name].dtype) == (list(tensor.shape), tensor.dtype)
        assert torch.equal(read_stored(lazy[name]), tensor)
    assert whole["complex"].dtype is torch.complex128


def test_a_stored_tensor_of_a_file_that_changed_is_an_error(tmp_path: Path, stored: StoredModel) -> None:
    """What was cut off since it was opened is refused when it is read, and what is no such file at once."""
    path = tmp_path / "checkpoints" / "step-00000004" / "policy.model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_stored(stored.tensors["low"])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        stored_tensors(path)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        export_model(stored, tmp_path / "exported", collectives=COLLECTIVES)
    assert not (tmp_path / "exported").exists()


def test_the_difference_to_a_model_is_in_names_and_shapes(live: nn.Module, stored: StoredModel) -> None:
    """The model that was saved differs in nothing; a wider one, and one of other modules, do."""
    assert difference_to(live, stored) is None
    assert difference_to(live.to("meta"), stored) is None
    assert difference_to(type(live)(6), stored) is not None
    words = difference_to(nn.Linear(1, 1), stored)
    assert words is not None
    assert words.startswith("lacks weight, bias")


def test_a_model_that_is_not_there_is_named(tmp_path: Path, stored: StoredModel) -> None:
    """A name that was not saved is an error with the file that would hold it."""
    assert stored.tensors
    path = tmp_path / "checkpoints" / "step-00000004"
    with pytest.raises(CheckpointError, match=r"holds no critic\.model\.safetensors"):
        open_model(path, read_manifest(path, step=4), "critic")
