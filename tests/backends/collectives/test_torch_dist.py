"""Collectives of real processes over gloo, held against numpy, and what they say of ranks that do not agree."""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightrft.backends.collectives import single, torch_dist
from lightrft.errors import CollectiveError, ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import World
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.signatures import signature_differences_of_record
from lightrft.testing.subject import RunOnRanks, subject_of

RANKS = 3
DTYPES = ["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "uint8", "bool", "complex64"]
SHAPES = [(), (0,), (3,), (2, 0, 3), (2, 3)]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
NUMPY = {"mean": np.mean, "sum": np.sum, "max": np.max, "min": np.min}


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # workers get this path
    yield importlib.import_module("torch_dist_programs")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def run(programs: ModuleType, spawn: SpawnRank) -> Iterator[RunOnRanks]:
    del programs
    with processes(
        subject_of("lightrft.testing.replicated:build_gloo", "strategy"), RANKS, spawn=spawn
    ) as run_on_ranks:
        yield run_on_ranks


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def cases(programs: ModuleType, ops: list[str]) -> tuple[Any, ...]:
    return tuple(
        programs.Case(dtype=dtype, shape=shape, op=op, is_strided=is_strided)
        for op in ops
        for dtype in DTYPES
        for shape in SHAPES
        for is_strided in (False, True)
    )


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def is_allowed(dtype: torch.dtype, op: str) -> bool:
    return {
        "mean": dtype.is_floating_point or dtype.is_complex,
        "sum": dtype != torch.bool,
        "max": not dtype.is_complex,
        "min": not dtype.is_complex,
    }[op]


@pytest.mark.parametrize("op", NUMPY)
def test_all_reduce_is_numpy_s_reduction_over_ranks(run: RunOnRanks, programs: ModuleType, op: str) -> None:
    """All_reduce equals numpy's reduction in every dtype, with the same bits on all ranks, and leaves inputs alone."""
    for case, *ranks in zip(cases(programs, [op]), *run(programs.reduce_all, cases(programs, [op])), strict=True):
        dtype = getattr(torch, case.dtype)
        assert all(torch.equal(rank.value, rank.after) for rank in ranks), case
        if not is_allowed(dtype, op):
            assert all(rank.error.startswith("ConfigError: op=") for rank in ranks), (case, ranks[0].error)
            continue
        values = np.stack([numpy_of(rank.value) for rank in ranks])
        narrow = dtype.is_floating_point and dtype.itemsize == 2
        expected = NUMPY[op](values.astype(np.float32) if narrow else values, axis=0)
        if not narrow:
            expected = expected.astype(values.dtype)  # numpy adds narrow integers in wide ones
        for rank in ranks:
            assert (rank.result.dtype, rank.result.shape) == (dtype, ranks[0].value.shape), case
            assert torch.equal(rank.result, ranks[0].result), case
            if dtype.is_floating_point or dtype.is_complex:
                # the order of three terms is the backend's; float16 and bfloat16 are rounded once more at the end
                tolerance = {2: 2.0**-7, 4: 1e-6, 8: 1e-6 if dtype.is_complex else 1e-15}[dtype.itemsize]
                np.testing.assert_allclose(numpy_of(rank.result), expected, rtol=tolerance, atol=tolerance)
            else:
                assert np.array_equal(rank.result.numpy(), expected), case


def test_narrow_floats_are_rounded_once(run: RunOnRanks, programs: ModuleType) -> None:
    """A sum in bfloat16 or float16 is the float32 sum of the same values, rounded to nearest at the end."""
    wanted = [programs.Case(dtype=dtype, shape=(64,), op="sum") for dtype in ("bfloat16", "float16")]
    for dtype, *ranks in zip((torch.bfloat16, torch.float16), *run(programs.reduce_all, tuple(wanted)), strict=True):
        # sums of three such values fit into float64 without rounding, and into float32 up to its last bits
        exact = sum(rank.value.double() for rank in ranks)
        assert torch.equal(ranks[0].result, exact.float().to(dtype))


def test_all_gather_takes_shares_of_any_size(run: RunOnRanks, programs: ModuleType) -> None:
    """All_gather concatenates in rank order, with dims 0 that differ between ranks, in every dtype, also 0-d."""
    for ranks in zip(*run(programs.gather_all, cases(programs, ["sum"])), strict=True):
        parts = [rank.value.reshape(1) if rank.value.dim() == 0 else rank.value for rank in ranks]
        for rank in ranks:
            assert rank.result is not None
            assert rank.result.dtype == rank.value.dtype
            assert torch.equal(rank.result, torch.cat(parts))
            assert torch.equal(rank.value, rank.after)


def test_broadcast_is_the_value_of_the_source(run: RunOnRanks, programs: ModuleType) -> None:
    """Broadcast gives every rank what rank 2 has, bit for bit, and leaves the inputs alone."""
    for ranks in zip(*run(programs.broadcast_all, cases(programs, ["sum"])), strict=True):
        for rank in ranks:
            assert rank.result is not None
            assert rank.result.dtype == ranks[2].value.dtype
            assert torch.equal(rank.result, ranks[2].value)
            assert torch.equal(rank.value, rank.after)


def test_numbers_stay_exact(run: RunOnRanks, programs: ModuleType) -> None:
    """Python's integers are reduced exactly at any size, floats in float64, bools to bools, and nan is not lost."""
    sums, means, largest, least = (run(programs.numbers, op)[1] for op in ("sum", "mean", "max", "min"))
    floats = [0.1 * (rank + 1) for rank in range(RANKS)]
    assert (sums["long"], sums["negative"]) == (repr(3 * 2**70 + 3), "-3")
    assert float(sums["float"]) == pytest.approx(sum(floats), rel=1e-15)
    assert float(means["float"]) == pytest.approx(np.mean(floats), rel=1e-15)
    assert largest == {
        "float": repr(floats[2]),
        "long": repr(2**70 + 2),
        "negative": "0",
        "bool": "True",
        "nan": "nan",
    }
    assert least == {"float": repr(floats[0]), "long": repr(2**70), "negative": "-2", "bool": "False", "nan": "nan"}


@pytest.mark.parametrize("src", range(RANKS))
def test_broadcast_numbers_of_any_length(run: RunOnRanks, programs: ModuleType, src: int) -> None:
    """Numbers travel exactly, though their texts have another length on each rank."""
    expected = {
        "long": repr(10 ** (40 * src)),
        "float": repr(0.1 ** (src + 1)),
        "bool": repr(src == 1),
        "t": "tensor([1., 1.])",
    }
    assert run(programs.broadcast_numbers, src) == [expected] * RANKS


@pytest.mark.parametrize("place", range(RANKS))
def test_nan_wins_on_whichever_rank_it_is(run: RunOnRanks, programs: ModuleType, place: int) -> None:
    """Max and min of a tensor are nan where any rank has one, as numpy's are."""
    for found in run(programs.extremes_with_nan, place):
        inf = float("inf")
        assert np.array_equal(found["max"].numpy(), [float("nan"), 6.0, -inf, inf], equal_nan=True)
        assert np.array_equal(found["min"].numpy(), [float("nan"), 2.0, -inf, inf], equal_nan=True)


def test_the_order_of_keys_plays_no_part(run: RunOnRanks, programs: ModuleType) -> None:
    """Ranks whose dicts have the same keys in another order reduce the same leaves."""
    for found in run(programs.reordered, 1):
        assert {name: float(value) for name, value in found.items()} == {
            name: 3.0 * (1 + ord(name)) for name in ("a", "b", "c")
        }


def test_many_leaves_travel_at_once(run: RunOnRanks, programs: ModuleType) -> None:
    """A call with hundreds of leaves takes as many operations as one with a leaf of each kind."""
    assert run(programs.num_operations, 1) == run(programs.num_operations, 50) == [4] * RANKS


@pytest.mark.parametrize("odd", range(RANKS))
def test_ranks_that_disagree_are_told_how(run: RunOnRanks, programs: ModuleType, odd: int) -> None:
    """Every rank gets the same message, which names the rank at odds and the difference, and all can go on."""
    first, *others = run(programs.disagreements, odd)
    assert all(other == first for other in others)
    parts = [("all_reduce", "data['a']"), ("all_reduce", "shape (3,)"), ("all_reduce", "float64"), ("all_reduce", "op")]
    parts += [("broadcast", "src"), ("all_gather", "shape (*, 3)"), ("all_reduce", f"rank {odd} is in barrier")]
    for message, wanted in zip(first, parts, strict=False):
        assert message.startswith("CollectiveError: ")
        assert all(part in message for part in (*wanted, f"rank {odd}")), message
    refused = ["data is a list", "src=7", "data=1.0 is a number", "op='median'", "torch.uint64"]
    for message, part in zip(first[7:], refused, strict=False):
        assert message.startswith("ConfigError: ")
        assert part in message
    assert first[-1] == "3.0"


@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_skips_a_collective_is_named(run: RunOnRanks, programs: ModuleType, odd: int) -> None:
    """The others get an error within the timeout of the group, which names the missing rank and its last call."""
    for rank, message in enumerate(run(programs.absent, odd)):
        if rank != odd:
            assert message.startswith("all_reduce (call 2): ")
            assert f"rank {odd} did not enter it and was last in barrier (call 1)" in message


def test_a_rank_that_takes_the_store_along_is_an_error(run: RunOnRanks, programs: ModuleType) -> None:
    """Where ranks meet on a store that rank 0 holds, its end is an error of the others, on their next call."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, *others = run(programs.store_gone, port)
    assert first == ""
    for message in others:
        assert message.startswith("CollectiveError: barrier: the store of the process group is gone (")


def test_teardown_destroys_what_setup_made_and_nothing_else(run: RunOnRanks, programs: ModuleType) -> None:
    """A group that was found stays; one of ours ends, and can be made again; set-up happens once and seeds once."""
    for facts in run(programs.group_of_ours, 11):
        assert facts == [True] * 13


def test_streams_follow_from_seed_and_rank(run: RunOnRanks, programs: ModuleType) -> None:
    """Equal seeds give equal draws, other seeds and other ranks other ones."""
    draws = run(programs.first_draws, 3)
    assert run(programs.first_draws, 3) == draws
    assert len({*draws, *run(programs.first_draws, 4)}) == 2 * RANKS


def test_print_prints_once(run: RunOnRanks, programs: ModuleType) -> None:
    """Rank 0 prints, separated by spaces, and the others do not."""
    assert run(programs.printed, "step") == ["step 0\n", "", ""]


def test_the_probe_takes_four_operations(run: RunOnRanks, programs: ModuleType) -> None:
    """Sum and mean by all_reduce and by reduce_scatter: what a new group costs at its start, and no more."""
    assert run(programs.probe_cost, 0) == [4] * RANKS


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter"])
def test_sums_in_the_place_of_means_are_found(run: RunOnRanks, programs: ModuleType, name: str) -> None:
    """A backend that sums where it should average is an error on all ranks, with its name and torch's version."""
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    for message in run(programs.probe_of_sums, scatter if name == "reduce_scatter" else name):
        assert f"the AVG of the numbers 1 to 3 over ranks by {name} is 6 and must be 2" in message
        assert "gloo" in message
        assert torch.__version__ in message


def test_without_a_launcher_the_world_has_one_rank(no_launcher: pytest.MonkeyPatch) -> None:
    """One process needs no address and no port, and its collectives equal those of "single"."""
    del no_launcher
    collectives = torch_dist.build_collectives(StrategyConfig(seed=3))
    assert not dist.is_initialized()
    data = {"a": torch.arange(3.0), "b": {"c": 2**70, "d": 0.1}}
    try:
        assert collectives.get_rank() == 0
        assert not dist.is_initialized()
        reduced = collectives.all_reduce(data, "sum")  # sets up what it needs
        assert collectives.setup_distributed() == World(rank=0, local_rank=0, world_size=1, device="cpu")
        alone = single.build_collectives(StrategyConfig(seed=3)).all_reduce(data, "sum")
        assert torch.equal(reduced["a"], alone["a"])
        assert reduced["b"] == alone["b"]
        assert torch.equal(collectives.all_gather(torch.tensor(4)), torch.tensor([4]))
        collectives.barrier()
    finally:
        collectives.teardown()
    assert not dist.is_initialized()


def test_functions_match_their_contracts(no_launcher: pytest.MonkeyPatch) -> None:
    """Every function of the record has the names, kinds and defaults of its callback protocol."""
    del no_launcher
    assert signature_differences_of_record(torch_dist.build_collectives(StrategyConfig())) == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR|RANK is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "RANK='2' is not an integer from 0 to 1",
        ),
        ({"WORLD_SIZE": "2", "RANK": "one", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK='one'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(
    no_launcher: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    """Variables that are missing or contradict one another are a ConfigError, before any group exists."""
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        torch_dist.build_collectives(StrategyConfig()).setup_distributed()
    assert not dist.is_initialized()


@pytest.mark.parametrize("timeout", [0, -1.0, timedelta(0), float("nan")])
def test_a_timeout_is_positive(no_launcher: pytest.MonkeyPatch, timeout: float) -> None:
    """A timeout that no rank could meet is a ConfigError."""
    del no_launcher
    with pytest.raises(ConfigError, match="not a positive number of seconds"):
        torch_dist.build_collectives(StrategyConfig()).setup_distributed(timeout)


def test_a_busy_port_is_named(no_launcher: pytest.MonkeyPatch) -> None:
    """Where another program has the port, the rank that was to hold the store says so."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            no_launcher.setenv(name, value)
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} is in use on 127.0.0.1"):
            torch_dist.build_collectives(StrategyConfig()).setup_distributed(1.0)


def test_ranks_that_never_start_are_an_error(no_launcher: pytest.MonkeyPatch) -> None:
    """Set-up does not wait longer than its timeout for ranks that do not come."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        no_launcher.setenv(name, value)
    with pytest.raises(CollectiveError, match="rank 0 of 2 met no process group within 1 seconds"):
        torch_dist.build_collectives(StrategyConfig()).setup_distributed(1.0)
