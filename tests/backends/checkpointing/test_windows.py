"""Checkpoints of several ranks inside an accumulation window, where each rank has gradients of its own."""

from __future__ import annotations

# ruff: noqa: ARG001 (a program is handed its rank, wanted or not)
from pathlib import Path

import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing.canonical import CheckpointFunctions, build_checkpointing
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.collectives.simulated import build_collectives, run_simulated
from lightrft.errors import CheckpointError
from lightrft.strategy.config import StrategyConfig


def unwrap_model(model: nn.Module) -> nn.Module:
    return model


CHECKPOINTING: CheckpointFunctions = build_checkpointing(
    collectives=build_collectives(StrategyConfig()), access=build_live_access(unwrap_model)
)


def model_of(rank: int, world_size: int) -> nn.Linear:
    """Return a model whose bias has a gradient on all ranks, and whose weight has one on the last rank alone."""
    model = nn.Linear(2, 2)
    model.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    model.bias.grad = torch.full((2,), rank + 1.0)
    if rank == world_size - 1:
        model.weight.grad = torch.full((2, 2), -1.0)
    return model


def save(directory: Path, world_size: int) -> None:
    run_simulated(world_size, lambda rank: CHECKPOINTING.save_ckpt(model_of(rank, world_size), directory, step=1))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_gets_its_own_gradients_back(tmp_path: Path, world_size: int) -> None:
    """What a rank had accumulated is what it goes on with, and what it had not it has not afterwards."""
    save(tmp_path, world_size)

    def load(rank: int) -> tuple[list[float], bool]:
        model = nn.Linear(2, 2)
        model.weight.grad = torch.ones(2, 2)
        CHECKPOINTING.load_ckpt(model, tmp_path)
        assert model.bias.grad is not None
        return model.bias.grad.tolist(), model.weight.grad is not None

    assert run_simulated(world_size, load) == [([rank + 1.0] * 2, rank == world_size - 1) for rank in range(world_size)]


@pytest.mark.parametrize(("saved", "loaded"), [(2, 1), (1, 2), (3, 2)])
def test_an_open_window_is_not_split_over_other_ranks(tmp_path: Path, saved: int, loaded: int) -> None:
    """Loading with another number of ranks is refused on all of them, and changes nothing."""
    save(tmp_path, saved)

    def load(rank: int) -> str:
        model = nn.Linear(2, 2)
        weight = model.weight.detach().clone()
        with pytest.raises(CheckpointError) as refused:
            CHECKPOINTING.load_ckpt(model, tmp_path)
        assert torch.equal(model.weight, weight)
        assert model.bias.grad is None
        return str(refused.value)

    for message in run_simulated(loaded, load):
        assert f"was saved by {saved} ranks inside an accumulation window, and world_size is {loaded}" in message


def test_between_windows_any_number_of_ranks_loads(tmp_path: Path) -> None:
    """Without gradients a checkpoint of two ranks loads on one and on three."""
    plain = nn.Linear(2, 2)
    run_simulated(2, lambda _: CHECKPOINTING.save_ckpt(plain, tmp_path))
    for world_size in (1, 3):

        def load(rank: int) -> bool:
            del rank
            model = nn.Linear(2, 2)
            CHECKPOINTING.load_ckpt(model, tmp_path)
            return torch.equal(model.weight, plain.weight)

        assert all(run_simulated(world_size, load))
