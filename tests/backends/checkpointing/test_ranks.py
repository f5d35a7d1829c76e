from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing.canonical import CheckpointFunctions, build_checkpointing
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.collectives.single import build_collectives
from lightrft.errors import CheckpointError, ConfigError, LightRFTError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import Collectives, TensorTree, World
from lightrft.strategy.protocols.training import Trainable


def unwrap_model(model: nn.Module) -> nn.Module:
    return model


def world_of(barrier: threading.Barrier) -> list[Collectives]:
    """Collectives of ranks that are threads of this process and meet at the barrier."""
    world_size = barrier.parties
    slots: list[TensorTree] = [0] * world_size

    def rank_of(rank: int) -> Collectives:
        def setup_distributed(timeout: timedelta | float | None = None) -> World:
            del timeout
            return World(rank=rank, local_rank=rank, world_size=world_size, device="cpu")

        def all_gather(data: TensorTree) -> TensorTree:
            slots[rank] = data
            barrier.wait()
            gathered = torch.cat([slot for slot in slots if isinstance(slot, torch.Tensor)])
            barrier.wait()
            return gathered

        one = build_collectives(StrategyConfig(strategy="single"))
        return attrs.evolve(one, setup_distributed=setup_distributed, all_gather=all_gather)

    return [rank_of(rank) for rank in range(world_size)]


def on_ranks(world_size: int, action: Callable[[CheckpointFunctions, int], object]) -> list[object]:
    """What every rank returned or raised."""
    barrier = threading.Barrier(world_size, timeout=20)

    def run(rank: int, collectives: Collectives) -> object:
        try:
            return action(build_checkpointing(collectives=collectives, access=build_live_access(unwrap_model)), rank)
        except LightRFTError as error:  # ranks agree on these, so nobody is left waiting
            return error
        except Exception as error:  # noqa: BLE001 (it is compared)
            barrier.abort()
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size), world_of(barrier)))


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2), (3, 2), (2, 3)])
def test_any_world_size_reads_what_any_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    """Every rank returns the same path and loads the same weights; each writing rank has a file of random streams."""
    weight = torch.arange(4.0).reshape(2, 2)

    def save(functions: CheckpointFunctions, rank: int) -> object:
        del rank
        model = nn.Linear(2, 2, bias=False)
        model.weight = nn.Parameter(weight.clone())
        return functions.save_ckpt(model, tmp_path, client_state={"a": 1}, max_num=1)

    def load(functions: CheckpointFunctions, rank: int) -> object:
        model = nn.Linear(2, 2, bias=False)
        loaded = functions.load_ckpt(model, tmp_path)
        return (rank, loaded.step, loaded.client_state, model.weight.tolist())

    for _ in range(2):
        paths = on_ranks(writers, save)
    assert paths == [tmp_path / "step-00000002"] * writers
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert len(list(tmp_path.glob("step-00000002/rank-*.random.json"))) == writers
    assert on_ranks(readers, load) == [(rank, 2, {"a": 1}, weight.tolist()) for rank in range(readers)]


def test_an_error_of_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    """A rank whose model does not fit stops all ranks, which name it; so does a directory that rank 0 cannot write."""

    def save(functions: CheckpointFunctions, rank: int) -> object:
        del rank
        return functions.save_ckpt(nn.Linear(2, 2), tmp_path / "run")

    def load(functions: CheckpointFunctions, rank: int) -> object:
        return functions.load_ckpt(nn.Linear(2, 2 + rank), tmp_path / "run")

    on_ranks(2, save)
    first, second = on_ranks(2, load)
    assert isinstance(first, CheckpointError)
    assert isinstance(second, CheckpointError)
    assert str(first).startswith("rank 1: ")
    assert str(first).removeprefix("rank 1: ") == str(second)

    def save_again(functions: CheckpointFunctions, rank: int) -> object:
        del rank
        return functions.save_ckpt(nn.Linear(2, 2), tmp_path / "run", step=1)

    assert [type(error) for error in on_ranks(2, save_again)] == [CheckpointError] * 2


def test_ranks_with_different_models_save_nothing(tmp_path: Path) -> None:
    """Ranks that would gather different tensors are told so before anything is written, by both kinds of saving."""

    def save(functions: CheckpointFunctions, rank: int) -> object:
        return functions.save_ckpt(nn.Linear(2, 2 + rank // 2), tmp_path / "run")

    def export(functions: CheckpointFunctions, rank: int) -> object:
        return functions.save_model(nn.Linear(2, 2 + rank // 2), tmp_path / "out")

    for action in (save, export):
        for error in on_ranks(3, action):
            assert isinstance(error, CheckpointError)
            assert str(error).startswith("rank 2 has tensors of other names, shapes or dtypes than rank 0")
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_that_one_rank_refuses_changes_none(tmp_path: Path) -> None:
    """Where the schedule of rank 1 fails while it is restored, no rank has another rate, parameter or schedule."""

    class Refusing(torch.optim.lr_scheduler.LambdaLR):
        def load_state_dict(self, state_dict: dict[str, object]) -> None:
            if state_dict["last_epoch"] == 3:
                raise RuntimeError("not mine")
            super().load_state_dict(state_dict)

    def trainable(kind: type[torch.optim.lr_scheduler.LambdaLR]) -> Trainable:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return Trainable(model, optimizer, kind(optimizer, lambda step: 1 / (1 + step)))

    def save(functions: CheckpointFunctions, rank: int) -> object:
        del rank
        saved = trainable(torch.optim.lr_scheduler.LambdaLR)
        for _ in range(3):
            saved.optimizer.step()
            saved.scheduler.step()
        return functions.save_ckpt(saved, tmp_path)

    def load(functions: CheckpointFunctions, rank: int) -> object:
        live = trainable(Refusing if rank == 1 else torch.optim.lr_scheduler.LambdaLR)
        weight = live.model.weight.detach().clone()
        with pytest.raises(CheckpointError, match=r"the schedule refuses .*not mine"):
            functions.load_ckpt(live, tmp_path)
        untouched = torch.equal(live.model.weight, weight)
        return untouched, live.scheduler.last_epoch, live.optimizer.param_groups[0]["lr"]

    on_ranks(2, save)
    assert on_ranks(2, load) == [(True, 0, 1.0)] * 2


def test_models_are_exported_once(tmp_path: Path) -> None:
    """Rank 0 writes, every rank returns the directory, and every rank reads it."""

    def export(functions: CheckpointFunctions, rank: int) -> object:
        del rank
        return functions.save_model(nn.Linear(2, 2), tmp_path / "out")

    def read(functions: CheckpointFunctions, rank: int) -> object:
        del rank
        model = nn.Linear(2, 2)
        functions.load_model(model, tmp_path / "out")
        return model.weight.tolist()

    assert on_ranks(2, export) == [tmp_path / "out"] * 2
    weights = on_ranks(2, read)
    assert isinstance(weights[0], list)
    assert weights[0] == weights[1]


def test_saving_does_not_seed_the_streams(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """Saving leaves the streams of a process that was never set up, or seeded by hand, as they were."""
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    checkpointing.save_ckpt(nn.Linear(1, 1).to_empty(device="cpu"), tmp_path)
    torch.manual_seed(123)
    checkpointing.save_ckpt(nn.Module(), tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_wrong_argument_needs_no_other_rank(tmp_path: Path, checkpointing: CheckpointFunctions) -> None:
    """Arguments are checked before ranks meet, so that one that is wrong everywhere is one error everywhere."""
    with pytest.raises(ConfigError, match="step=-1"):
        checkpointing.save_ckpt(nn.Module(), tmp_path, step=-1)
