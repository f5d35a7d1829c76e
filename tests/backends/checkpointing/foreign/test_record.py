"""What is read of an optimizer, and of a tensor in pieces."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightrft.backends.checkpointing.foreign.opening import open_foreign
from lightrft.backends.checkpointing.foreign.record import foreign_optimizer, foreign_parameter, in_memory, joined
from lightrft.errors import CheckpointError


@pytest.mark.parametrize(
    ("state", "options"),
    [({"step": torch.tensor(3.0)}, {}), ({"step": 3}, {}), ({}, {"step": 3}), ({"step": 3.0}, {"step": 9})],
)
def test_steps_are_counted_as_torch_counts_them(state: dict[str, object], options: dict[str, object]) -> None:
    """Some optimizers have a number, some have it in the group; torch's have a float32 tensor of no dims."""
    moments = {"exp_avg": in_memory(torch.ones(2)), "seen": True}
    parameter = foreign_parameter({**moments, **state}, options)
    step = parameter.tensors["step"].read()
    assert torch.equal(step, torch.tensor(3.0))
    assert step.dtype == torch.float32
    assert {**parameter.tensors, "step": None}.keys() == {"exp_avg", "step"}
    assert parameter.values == {"seen": True}


def test_options_that_say_how_are_left_out() -> None:
    """A live optimizer has its own way to compute, and names of parameters are no option."""
    options = {"lr": 0.1, "fused": True, "foreach": None, "params": [0], "param_names": ["w"], "bias_correction": True}
    (group,) = foreign_optimizer([(options, ["w"])], {}).groups
    assert group.options == {"lr": 0.1}


@pytest.mark.parametrize(("pieces", "shape"), [([3], [2]), ([1, 2], [2, 2]), ([], [0])])
def test_pieces_that_are_no_whole_are_refused(pieces: list[int], shape: list[int]) -> None:
    """Too many elements, too few, or none of which the dtype would be known."""
    with pytest.raises(CheckpointError, match="exp_avg of w has"):
        joined([torch.ones(size) for size in pieces], shape, source="exp_avg of w")


def shorten(directory: Path) -> None:
    path = next(directory.rglob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    content = torch.load(path, weights_only=False)
    flats = content["optimizer_state_dict"]
    flats = flats["fp32_flat_groups" if "fp32_flat_groups" in flats else "single_partition_of_fp32_groups"]
    flats[0] = flats[0][:-7].detach()
    torch.save(content, path)


@pytest.mark.parametrize(
    ("name", "words"), [("zero2", "has .* elements in the files"), ("zero3", "rank 0 has .* elements")]
)
def test_flat_tensors_that_are_too_short_are_refused(
    sources: Callable[[int], Path], tmp_path: Path, name: str, words: str
) -> None:
    """In stages 1 and 2 a parameter lacks elements then, in stage 3 the group has not the size of its parameters."""
    shutil.copytree(sources(1) / name, tmp_path / name)
    shorten(tmp_path / name)
    with pytest.raises(CheckpointError, match=words), open_foreign(tmp_path / name, name="actor"):
        pass


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_two_optimizers_of_one_model_are_none(tmp_path: Path) -> None:
    """Which of them is meant is not guessed."""
    weights = {"w": torch.ones(2)}
    optimizer = {"state": {"w": {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": ["w"], "lr": 0.1}]}
    saved = {"model": weights, "first": optimizer, "second": optimizer}
    dcp.save(saved, checkpoint_id=tmp_path / "both", no_dist=True)
    with open_foreign(tmp_path / "both", name="actor") as found:
        assert found.optimizer is None
        assert [*found.notes] == ["missing: the optimizer; 2 fit the model."]
