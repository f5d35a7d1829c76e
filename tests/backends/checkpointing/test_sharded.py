"""Checkpoints of raw sharded models; what strategies write and read of one another is in test_any_to_any.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import attrs
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightrft.config import StrategyConfig
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.replicated import build_gloo
from lightrft.testing.subject import RunOnRanks, subject_of

MAKERS = [(1, False), (2, False), (1, True), (2, True), (3, True)]


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield importlib.import_module("sharded_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def ranks(programs: ModuleType, spawn: SpawnRank) -> Iterator[Callable[[int], RunOnRanks]]:
    """Pools of one, two and three processes, each started when it is first asked."""
    del programs
    subject = subject_of(build_gloo, "strategy", config=StrategyConfig(seed=5))
    with ExitStack() as stack:
        yield {n: stack.enter_context(processes(subject, n, timeout=60, spawn=spawn)) for n in (1, 2, 3)}.__getitem__


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_replicated_shards_are_read_and_written_too(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> None:
    """A mesh that replicates as well as shards writes what any world reads, and reads what any wrote."""
    job = programs.Job(directory=str(tmp_path), is_sharded=True, num_steps=2)
    replicas = attrs.evolve(job, num_replicas=2)
    saved = ranks(2)(programs.save, replicas)[0].tensors
    assert all(same(loaded.tensors, saved) for loaded in ranks(3)(programs.load, attrs.evolve(job, seed=9)))
    saved = ranks(3)(programs.save, job)[0].tensors
    assert all(same(loaded.tensors, saved) for loaded in ranks(2)(programs.load, attrs.evolve(replicas, seed=9)))


def test_the_files_are_those_of_the_whole_model(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> None:
    """Of equal values, ranks that hold shards write the same bytes as one process that holds the whole."""
    files: list[list[tuple[str, bytes]]] = []
    for world_size, is_sharded in MAKERS:
        directory = tmp_path / f"{world_size}-{is_sharded}"
        ranks(world_size)(programs.save, programs.Job(directory=str(directory), is_sharded=is_sharded))
        step = directory / "step-00000001"
        files.append([(path.name, path.read_bytes()) for path in sorted(step.glob("actor.*"))])
    assert [name for name, _ in files[0]] == [
        "actor.model.safetensors",
        "actor.optimizer.safetensors",
        "actor.state.json",
    ]
    assert all(other == files[0] for other in files)


def test_training_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> None:
    """Two steps, a checkpoint and two more steps end with the bits of four steps."""
    ranks(2)(programs.save, programs.Job(directory=str(tmp_path), is_sharded=True, num_steps=2))
    job = programs.Job(directory=str(tmp_path), is_sharded=True, num_steps=4)
    resumed, straight = ranks(2)(programs.load_and_go_on, job), ranks(2)(programs.train, job)
    assert all(same(one.tensors, other.tensors) for one, other in zip(resumed, straight, strict=True))


def test_an_open_window_goes_back_to_equal_ranks_alone(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> None:
    """Each rank gets the shards of its gradients back; other world sizes and whole models are refused and unchanged."""
    job = programs.Job(directory=str(tmp_path), is_sharded=True, num_steps=1)
    saved = ranks(2)(programs.save_inside_a_window, job)
    assert "gradient of narrow.bias" in saved[1].tensors
    back = ranks(2)(programs.load, programs.Job(directory=str(tmp_path), is_sharded=True, seed=9))
    assert all(same(one.tensors, other.tensors) for one, other in zip(back, saved, strict=True))
    for readers, is_sharded in ((1, True), (3, True), (1, False)):
        for seen in ranks(readers)(programs.load, programs.Job(directory=str(tmp_path), is_sharded=is_sharded, seed=9)):
            assert f"was saved by 2 ranks inside an accumulation window, and world_size is {readers}" in seen.error
    for seen in ranks(2)(programs.load, programs.Job(directory=str(tmp_path), is_sharded=False, seed=9)):
        assert "(gradients) has what the live state lacks: shard." in seen.error


def test_gradients_that_were_not_reduced_are_refused(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> None:
    """Saving them is refused and leaves nothing behind; loading drops them, and the next step knows nothing of them."""
    job = programs.Job(directory=str(tmp_path), is_sharded=True, num_steps=1)
    seen = ranks(2)(programs.save_with_deferred_gradients, job)
    assert seen[0].error.startswith("actor has gradients that its ranks have not reduced")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    ranks(2)(programs.save, programs.Job(directory=str(tmp_path), is_sharded=True, num_steps=1))
    clean = programs.Job(directory=str(tmp_path / "clean"), is_sharded=True, num_steps=1)
    ranks(2)(programs.save, clean)
    expected = ranks(2)(programs.load_and_step, clean)
    assert same(seen[1].tensors, expected[1].tensors)


# the largest file but one has 25 kB, the model's 40 kB and the optimizer's 80 kB
@pytest.mark.parametrize(("size", "num_errors"), [(1_000, 2), (30_000, 2), (60_000, 1)])
def test_a_full_disk_of_rank_0_is_an_error_of_all(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks], size: int, num_errors: int
) -> None:
    """Wherever rank 0 stops writing, nobody waits for it, all are told, nothing is left, and the next save succeeds."""
    job = programs.Job(directory=str(tmp_path), is_sharded=True, num_steps=1, num_tokens=2000, disk_size=size)
    first, second = ranks(2)(programs.save_on_a_full_disk, job)
    for line, told in zip(first.error.splitlines(), second.error.splitlines(), strict=True):
        assert "File too large" in line
        assert told == f"rank 0: {line}"
    assert len(first.error.splitlines()) == num_errors
    assert (tmp_path / "step-00000001" / "manifest.json").is_file()


def test_a_full_disk_of_another_rank_is_an_error_of_all(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> None:
    """A rank that cannot write the file of its own streams is named by the others, and no checkpoint comes of it."""
    job = programs.Job(directory=str(tmp_path), is_sharded=True, num_steps=1, disk_size=1_000, full_rank=1)
    first, second = ranks(2)(programs.save_on_a_full_disk, job)
    assert "File too large; free space" in second.error
    assert "\n" not in second.error
    assert first.error == f"rank 1: {second.error}"
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-00000001"]  # of the save that came after


def test_a_part_is_read_as_torch_cuts_it(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> None:
    """Of a tensor in a file every rank reads its own part, in any layout, also where some have fewer rows or none."""
    for world_size in (2, 3):
        directory = tmp_path / str(world_size)
        directory.mkdir()
        assert (
            ranks(world_size)(programs.parts_of_a_file, programs.Job(directory=str(directory), is_sharded=True))
            == [[]] * world_size
        )


def test_a_sharded_model_is_exported_as_itself(
    tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]
) -> None:
    """Transformers reads what shards were exported, under the class of the plain model, and shards read it back."""
    out = tmp_path / "out"
    loaded = ranks(2)(programs.export_llama, programs.Job(directory=str(out), is_sharded=True, seed=3))
    ranks(1)(programs.export_llama, programs.Job(directory=str(tmp_path / "plain"), is_sharded=False, seed=3))
    assert (out / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    assert '"LlamaForCausalLM"' in (out / "config.json").read_text()
    assert same(load_file(out / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors"))
    theirs = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(same(dict(one.tensors), dict(theirs)) for one in loaded)


def test_columns_are_refused(tmp_path: Path, programs: ModuleType, ranks: Callable[[int], RunOnRanks]) -> None:
    """Parts that are no runs of a tensor's elements are an error that names the tensor, and nothing is written."""
    for seen in ranks(2)(programs.save_columns, programs.Job(directory=str(tmp_path / "run"), is_sharded=True)):
        assert "model.weight is placed as" in seen.error
        assert "shard it along dim 0" in seen.error
    assert not (tmp_path / "run").exists()
