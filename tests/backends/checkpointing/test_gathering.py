from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.backends.checkpointing import parts, turns
from lightrft.backends.checkpointing.access import LiveTensor, Part
from lightrft.backends.checkpointing.gathering import agreed_tables, taking_turns
from lightrft.backends.checkpointing.tensor_files import bytes_of, writing_order
from lightrft.backends.checkpointing.turns import Computed
from lightrft.backends.collectives.simulated import build_collectives, run_simulated
from lightrft.backends.world import world_of
from lightrft.errors import CheckpointError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import Collectives

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.complex64, torch.float8_e4m3fn]


def random_tensor(dtype: torch.dtype, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Random bytes: NaN payloads and negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    size = math.prod(shape) * dtype.itemsize
    return torch.randint(high, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def in_parts(tensor: torch.Tensor, cuts: Sequence[int], rank: int, world_size: int) -> LiveTensor:
    """A tensor of which each rank has the elements between two cuts; ranks take them in an order of their own."""
    flat = tensor.reshape(-1)
    places = [0, *sorted(min(cut, flat.numel()) for cut in cuts[: world_size - 1]), flat.numel()]
    number = (rank + 1) % world_size  # parts need not lie in the order of the ranks
    begin, end = places[number], places[number + 1]

    def part() -> Part:
        return Part(values=flat[begin:end], start=begin)

    return LiveTensor(shape=tensor.shape, dtype=tensor.dtype, part=part, is_whole=False)


def whole(tensor: torch.Tensor) -> LiveTensor:
    def part() -> Part:
        return Part(values=tensor, start=0)

    return LiveTensor(shape=tensor.shape, dtype=tensor.dtype, part=part, is_whole=True)


def gathered(tables: Mapping[str, Mapping[str, LiveTensor | Computed]], collectives: Collectives) -> bytes:
    """All bytes as they come, in the order of the files."""
    world = world_of(collectives)
    agreed = agreed_tables(collectives, world, lambda: tables)
    with taking_turns(agreed.turns, collectives, world) as pieces:
        return b"".join(bytes(piece.tolist()) for piece in pieces) if world.rank == 0 else b""


def expected(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return b"".join(bytes(bytes_of(tensors[name]).tolist()) for name in writing_order(tensors))


cases = st.lists(
    st.tuples(
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 4), max_size=3),
        st.booleans(),
        st.lists(st.integers(0, 30), min_size=2, max_size=2),
    ),
    max_size=6,
)


@pytest.mark.parametrize("piece_size", [16, 64, 1 << 20])
@given(cases, st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_parts_make_up_the_whole(piece_size: int, made: list[tuple[object, ...]], world_size: int) -> None:
    """Whatever the dtypes and shapes, wherever parts are cut and however ranks have them, rank 0 gets every bit."""
    tensors = {f"tensor {n}": random_tensor(dtype, shape, n) for n, (dtype, shape, _, _) in enumerate(made)}  # type: ignore[arg-type]

    def program(rank: int) -> bytes:
        table: dict[str, LiveTensor | Computed] = {}
        for (name, tensor), (_, _, is_whole, cuts) in zip(tensors.items(), made, strict=True):
            table[name] = whole(tensor) if is_whole else in_parts(tensor, cuts, rank, world_size)  # type: ignore[arg-type]
        return gathered({"file": table}, build_collectives(StrategyConfig()))

    with pytest.MonkeyPatch.context() as patch:
        for module in (parts, turns):
            patch.setattr(module, "PIECE_SIZE", piece_size)
        assert run_simulated(world_size, program) == [expected(tensors), *[b""] * (world_size - 1)]


def error_of(rank: int, table: Mapping[str, LiveTensor | Computed]) -> str:
    del rank
    try:
        gathered({"file": table}, build_collectives(StrategyConfig()))
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("first", "second"), [((0, 3), (2, 6)), ((0, 2), (3, 6)), ((0, 3), (3, 5)), ((0, 6), (0, 6))])
def test_parts_that_do_not_fit_are_refused(first: tuple[int, int], second: tuple[int, int]) -> None:
    """Parts that overlap, or leave a gap, are an error of all ranks that names the tensor, before anything is sent."""
    whole = torch.arange(6.0)

    def program(rank: int) -> str:
        begin, end = (first, second)[rank]
        tensor = LiveTensor(
            shape=[6], dtype=whole.dtype, part=lambda: Part(values=whole[begin:end], start=begin), is_whole=False
        )
        return error_of(rank, {"w": tensor})

    errors = run_simulated(2, program)
    assert all("the parts that the ranks have of w do not make it up" in error for error in errors)


def test_a_part_that_is_not_what_was_said_is_refused() -> None:
    """A part of another dtype, or larger than its tensor, is an error with both in words, on all ranks."""

    def program(rank: int) -> str:
        tensor = LiveTensor(
            shape=[3],
            dtype=torch.float32,
            part=lambda: Part(values=torch.zeros(2, dtype=torch.bfloat16), start=0),
            is_whole=rank > 5,
        )
        return error_of(rank, {"a": tensor})

    errors = run_simulated(2, program)
    assert all("a was said to be float32[3] and is read as bfloat16[2]" in error for error in errors)


def test_a_tensor_that_cannot_be_computed_leaves_no_rank_waiting() -> None:
    """What fails on rank 0 while it computes is raised there, and what follows is gathered all the same."""

    def fail(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise CheckpointError(f"no sum of {sorted(tensors)}")

    tensors = {name: torch.arange(4.0) for name in ("a", "b", "c")}

    def program(rank: int) -> str:
        table: dict[str, LiveTensor | Computed] = {
            name: in_parts(tensor, [2], rank, 2) for name, tensor in tensors.items()
        }
        sources = {"a": table["a"], "c": table["c"]}
        table["b"] = Computed(shape=[4], dtype=torch.float32, sources=sources, compute=fail)  # type: ignore[arg-type]
        return error_of(rank, table)

    assert run_simulated(2, program) == ["no sum of ['a', 'c']", ""]


def test_a_computed_tensor_is_made_of_whole_ones() -> None:
    """Rank 0 computes from all of the sources, whichever rank has which part, and whatever is whole."""

    def add(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return tensors["a"] + tensors["b"]

    one, other = torch.arange(6.0).reshape(2, 3), torch.full((2, 3), 0.5)

    def program(rank: int) -> bytes:
        sources = {"a": in_parts(one, [4], rank, 2), "b": whole(other)}
        table = {"sum": Computed(shape=[2, 3], dtype=torch.float32, sources=sources, compute=add)}
        return gathered({"file": table}, build_collectives(StrategyConfig()))

    assert run_simulated(2, program) == [expected({"sum": one + other}), b""]


def test_tensors_are_let_go_of_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that nobody else holds is gone once its bytes have been taken."""
    monkeypatch.setattr(turns, "PIECE_SIZE", 16)
    held: list[weakref.ref[torch.Tensor]] = []

    def only_here(number: int) -> LiveTensor:
        tensor = torch.full([10], float(number))
        held.append(weakref.ref(tensor))
        return whole(tensor)

    collectives = build_collectives(StrategyConfig())

    def program(rank: int) -> list[int]:
        del rank
        world = world_of(collectives)
        agreed = agreed_tables(collectives, world, lambda: {"f": {str(n): only_here(n) for n in range(4)}})
        with taking_turns(agreed.turns, collectives, world) as pieces:
            return [sum(one() is not None for one in held) for piece in pieces if piece is not None]

    assert run_simulated(1, program) == [[4, 3, 2, 1]]
