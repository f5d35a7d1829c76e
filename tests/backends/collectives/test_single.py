"""The collectives of one process, held against numpy."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.backends.collectives.record import CollectiveFunctions
from lightrft.backends.collectives.seeding import stream_seed
from lightrft.backends.collectives.single import build_collectives
from lightrft.backends.launch import device_of_process, local_rank_of_launch
from lightrft.errors import ConfigError, UnsupportedError
from lightrft.strategy.config import StrategyConfig

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
SHAPES = [(), (0,), (3,), (2, 0, 3), (2, 3)]
ONE_RANK = {"mean": np.mean, "sum": np.sum, "max": np.max, "min": np.min}


@pytest.fixture
def collectives() -> Iterator[CollectiveFunctions]:
    """Return the collectives, and leave the random streams as a first set-up finds them."""
    built = build_collectives(StrategyConfig(seed=3))
    yield built
    built.teardown()


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = int(np.prod(shape))
    values = torch.arange(count, dtype=torch.float64) * 3 - 2
    if dtype == torch.int64:
        return (values.long() + 2**53 + 1).reshape(shape)  # not representable in floating point
    return values.remainder(2).bool().reshape(shape) if dtype == torch.bool else values.to(dtype).reshape(shape)


def is_allowed(dtype: torch.dtype, op: str) -> bool:
    inexact = dtype.is_floating_point or dtype.is_complex
    return {
        "mean": inexact,
        "sum": dtype != torch.bool,
        "max": not dtype.is_complex,
        "min": not dtype.is_complex,
    }[op]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ONE_RANK)
def test_all_reduce_is_numpy_s_reduction_over_one_rank(
    collectives: CollectiveFunctions, op: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """All_reduce is numpy's reduction over an axis of one rank, in the same dtype, or refused for every shape alike."""
    value = tensor_of(dtype, shape)
    if not is_allowed(dtype, op):
        with pytest.raises(ConfigError, match="no meaning"):
            collectives.all_reduce(value, op)
        return
    result = collectives.all_reduce(value, op)
    assert (result.dtype, result.device, result.shape) == (value.dtype, value.device, value.shape)
    assert torch.equal(result, value)
    if dtype != torch.bfloat16:  # numpy has none
        expected = ONE_RANK[op](value.numpy()[None], axis=0)
        assert np.array_equal(result.numpy(), expected.astype(value.numpy().dtype))


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "broadcast"])
def test_results_share_no_memory_with_their_inputs(collectives: CollectiveFunctions, name: str) -> None:
    """Writing into a result leaves the input alone, also for slices and expanded tensors."""
    storage = torch.arange(6, dtype=torch.float32)
    for value in (storage, storage[1:3], torch.zeros(1).expand(3), torch.tensor(1.0)):
        before = value.clone()
        result = getattr(collectives, name)({"a": {"b": value}})["a"]["b"]
        result.add_(1)
        assert torch.equal(value, before)


def test_results_are_detached_from_the_graph(collectives: CollectiveFunctions) -> None:
    """A collective's result has no gradient history, as that of many ranks has none."""
    value = torch.ones(2, requires_grad=True)
    assert not collectives.all_reduce(value).requires_grad
    assert not collectives.all_gather(value).requires_grad


def test_all_gather_makes_scalars_one_dimensional(collectives: CollectiveFunctions) -> None:
    """All_gather of a 0-d tensor is 1-d with one entry per rank; other shapes stay."""
    gathered = collectives.all_gather({"loss": torch.tensor(2.5), "ids": torch.zeros(0, 4, dtype=torch.int64)})
    assert torch.equal(gathered["loss"], torch.tensor([2.5]))
    assert gathered["ids"].shape == (0, 4)


def test_numbers_are_reduced_and_broadcast_but_not_gathered(collectives: CollectiveFunctions) -> None:
    """Python numbers keep their type; gathering them is refused with the tensor to pass instead."""
    assert collectives.all_reduce({"x": 1.5, "n": {"k": 2.0}}) == {"x": 1.5, "n": {"k": 2.0}}
    total = collectives.all_reduce(2**60 + 1, "sum")
    assert total == 2**60 + 1
    assert type(total) is int
    assert collectives.all_reduce(True, "max") is True
    assert collectives.broadcast(7) == 7
    with pytest.raises(ConfigError, match=r"data\['n'\]=3 is a number.*torch.tensor\(3\)"):
        collectives.all_gather({"n": 3})


@pytest.mark.parametrize("value", [1, True, torch.tensor(1), torch.tensor(data=True)])
def test_mean_of_whole_numbers_is_refused(collectives: CollectiveFunctions, value: object) -> None:
    """The mean of integers and bools over several ranks is no integer and no bool, so one rank refuses it too."""
    with pytest.raises(ConfigError, match=r"op='mean' has no meaning for data\['v'\]"):
        collectives.all_reduce({"v": value})


def test_unknown_ops_and_values_are_named(collectives: CollectiveFunctions) -> None:
    """An unknown reduction, an unusable value and a rank that is not there are each an error that says what to do."""
    with pytest.raises(ConfigError, match=r"op='men' is not known; did you mean 'mean'\?"):
        collectives.all_reduce(torch.ones(1), "men")
    with pytest.raises(ConfigError, match=r"data\['x'\] is a list; pass tensors"):
        collectives.all_reduce({"x": [1.0]})
    with pytest.raises(ConfigError, match="src=1 is no rank"):
        collectives.broadcast(torch.ones(1), src=1)


@settings(deadline=None, max_examples=30)
@given(
    st.recursive(
        st.floats(-10, 10) | st.lists(st.floats(-10, 10, width=32), max_size=3).map(torch.tensor),
        lambda children: st.dictionaries(st.text(max_size=3), children, max_size=3),
        max_leaves=6,
    )
)
def test_structures_come_back_with_equal_leaves_and_new_dicts(data: object) -> None:
    """Any nesting of dicts comes back with the same keys in the same order, equal leaves and no dict shared."""
    collectives = build_collectives(StrategyConfig())
    for result in (collectives.all_reduce(data), collectives.broadcast(data)):
        assert_same_tree(result, data)


def assert_same_tree(found: object, expected: object) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found is not expected
        assert list(found) == list(expected)
        for key, branch in expected.items():
            assert_same_tree(found[key], branch)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    else:
        assert found == expected


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(()).item()  # noqa: NPY002, S311


def test_set_up_seeds_all_streams_from_the_seed_alone(collectives: CollectiveFunctions) -> None:
    """After set-up the draws of Python, numpy and torch are a function of the seed, whatever was drawn before."""
    draws()
    collectives.setup_distributed()
    first = draws()
    collectives.teardown()
    draws()
    collectives.setup_distributed(timeout=timedelta(seconds=5))
    assert draws() == first
    other = build_collectives(StrategyConfig(seed=4))
    other.setup_distributed(timeout=1.0)
    assert draws() != first
    other.teardown()


def test_every_stream_differs_from_seed_to_seed() -> None:
    """Eight seeds give eight first draws of each of Python, numpy and torch."""
    first = []
    for seed in range(8):
        built = build_collectives(StrategyConfig(seed=seed))
        built.setup_distributed()
        first.append((random.random(), float(np.random.random()), torch.rand(()).item()))  # noqa: NPY002, S311 (the global streams)
        built.teardown()
    assert [len(set(stream)) for stream in zip(*first, strict=True)] == [8, 8, 8]


def test_set_up_works_without_numpy(collectives: CollectiveFunctions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numpy is not loaded, the streams of Python and torch are seeded all the same."""
    collectives.setup_distributed()
    expected = draws()
    collectives.teardown()
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "numpy")
        collectives.setup_distributed()
    found = draws()
    assert (found[0], found[2]) == (expected[0], expected[2])


def test_second_set_up_does_nothing(collectives: CollectiveFunctions) -> None:
    """A second set-up, by this strategy or by another one of an equal config, leaves the streams where they were."""
    world = collectives.setup_distributed()
    first, second = draws(), draws()
    collectives.teardown()
    collectives.setup_distributed()
    assert draws() == first
    assert collectives.setup_distributed() == world
    assert build_collectives(StrategyConfig(seed=3)).setup_distributed() == world
    assert draws() == second


def test_set_up_leaves_restored_streams_alone(collectives: CollectiveFunctions) -> None:
    """A process that restored torch's stream of a run with this seed is not seeded again by set-up."""
    collectives.setup_distributed()
    torch.rand(5)
    saved = torch.get_rng_state()
    expected = torch.rand(3)
    collectives.teardown()
    torch.manual_seed(0)
    torch.set_rng_state(saved)
    collectives.setup_distributed()
    assert torch.equal(torch.rand(3), expected)


def test_teardown_without_set_up_does_nothing(collectives: CollectiveFunctions) -> None:
    """Teardown leaves streams that no set-up seeded as they are, and a second teardown does nothing."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    collectives.teardown()
    assert torch.equal(torch.get_rng_state(), before)
    collectives.setup_distributed()
    collectives.teardown()
    before = torch.get_rng_state()
    collectives.teardown()
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_after_a_teardown_are_a_function_of_the_seed() -> None:
    """Teardown leaves a stream that differs from seed to seed, and from every stream that a set-up seeds."""
    numbers: list[int] = []
    for seed in range(4):
        built = build_collectives(StrategyConfig(seed=seed))
        for after in (built.setup_distributed, built.teardown):
            after()
            numbers.append(torch.initial_seed())
    assert len(set(numbers)) == len(numbers)


@given(st.integers(0, 2**64), st.integers(0, 1000))
def test_streams_of_different_ranks_differ(seed: int, rank: int) -> None:
    """Stream seeds fit torch's range and differ between neighbouring seeds and ranks."""
    numbers = {stream_seed(seed, rank), stream_seed(seed, rank + 1), stream_seed(seed + 1, rank)}
    assert len(numbers) == 3
    assert all(0 <= number < 2**63 for number in numbers)


def test_world_of_one(collectives: CollectiveFunctions, capsys: pytest.CaptureFixture[str]) -> None:
    """One process is rank 0 of 1 on this machine's device, speaks for all and need not wait."""
    world = collectives.setup_distributed()
    assert (world.rank, world.local_rank, world.world_size, world.device) == (0, 0, 1, device_of_process())
    assert collectives.get_rank() == 0
    assert collectives.is_rank_0()
    assert collectives.barrier() is None
    collectives.print("step", 3)
    assert capsys.readouterr().out == "step 3\n"


def test_what_is_printed_is_there_at_once(collectives: CollectiveFunctions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A printed line is flushed, so that the log of a run that is killed ends with it."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(written), encoding="utf-8"))
    collectives.print("step", 4)
    assert written.getvalue() == b"step 4\n"


@pytest.mark.parametrize("timeout", [0, -1.0, timedelta(0), float("nan")])
def test_timeouts_must_be_positive(collectives: CollectiveFunctions, timeout: object) -> None:
    """A timeout of nothing, less than nothing or NaN is refused, although one process never waits."""
    with pytest.raises(ConfigError, match="timeout="):
        collectives.setup_distributed(timeout=timeout)


def test_several_processes_are_refused(collectives: CollectiveFunctions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher of several processes both building and set-up refuse, because each would train alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match=r"WORLD_SIZE=2 .*--nproc-per-node=1"):
        build_collectives(StrategyConfig())
    with pytest.raises(UnsupportedError, match="train alone"):
        collectives.setup_distributed()


@pytest.mark.parametrize("written", ["two", "", "-1", "0", "1.0", "²"])
def test_a_malformed_launch_is_named(monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    """A WORLD_SIZE that is no positive integer is an error that shows it."""
    monkeypatch.setenv("WORLD_SIZE", written)
    with pytest.raises(ConfigError, match="WORLD_SIZE="):
        build_collectives(StrategyConfig())


def test_torchrun_with_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of `torchrun --nproc-per-node=1` is accepted, and its LOCAL_RANK reported."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    collectives = build_collectives(StrategyConfig(seed=3))
    assert collectives.setup_distributed().local_rank == 0
    collectives.teardown()


def test_the_local_rank_is_the_launcher_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCAL_RANK numbers the processes of a machine; without a launcher there is one, number 0."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_rank_of_launch() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_rank_of_launch() == 3
    monkeypatch.setenv("LOCAL_RANK", "-1")
    with pytest.raises(ConfigError, match="LOCAL_RANK='-1' is not an integer from 0 up"):
        local_rank_of_launch()
