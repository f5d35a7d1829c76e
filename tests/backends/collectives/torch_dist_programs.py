"""What the tests of torch_dist run on every rank of a pool of processes."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.backends.collectives.probe import probe_reductions
from lightrft.errors import CollectiveError, LightRFTError
from lightrft.strategy.record import Strategy
from lightrft.testing.subject import Rank

LAUNCH = {name: os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")}


@attrs.frozen(kw_only=True)
class Case:
    dtype: str
    shape: tuple[int, ...]
    op: str = "sum"
    is_strided: bool = False


@attrs.frozen(kw_only=True)
class Seen:
    value: Tensor
    after: Tensor
    result: Tensor | None = None
    error: str = ""


def joined(rank: Rank) -> Strategy:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    return strategy


def value_of(case: Case, rank: int) -> Tensor:
    dtype = getattr(torch, case.dtype)
    shape = (*case.shape, 2) if case.is_strided else case.shape
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_floating_point or dtype.is_complex:
        value = torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float64)
    else:  # of 64 bits, not representable in floating point
        high = 2 if dtype == torch.bool else 2**55 if dtype.itemsize == 8 else 100
        value = torch.randint(0, high, shape, generator=generator)
    value = value.to(dtype)
    return value[..., 0] if case.is_strided else value


def dense(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)


def seen(call: Callable[[Tensor], Tensor], value: Tensor) -> Seen:
    before = dense(value)
    try:
        result = call(value)
    except LightRFTError as error:
        return Seen(value=before, after=dense(value), error=f"{type(error).__name__}: {error}")
    kept = dense(result)
    result.zero_()  # if it shared memory with the input, this would show
    return Seen(value=before, after=dense(value), result=kept)


def reduce_all(rank: Rank, cases: tuple[Case, ...]) -> list[Seen]:
    strategy = joined(rank)
    return [
        seen(
            lambda value, op=case.op: strategy.all_reduce({"a": {"b": value}}, op)["a"]["b"], value_of(case, rank.rank)
        )
        for case in cases
    ]


def gather_all(rank: Rank, cases: tuple[Case, ...]) -> list[Seen]:
    strategy = joined(rank)
    grown = [attrs.evolve(case, shape=(case.shape[0] + rank.rank, *case.shape[1:])) for case in cases if case.shape]
    flat = [case for case in cases if not case.shape]
    return [seen(strategy.all_gather, value_of(case, rank.rank)) for case in [*grown, *flat]]


def broadcast_all(rank: Rank, cases: tuple[Case, ...]) -> list[Seen]:
    strategy = joined(rank)
    return [seen(lambda value: strategy.broadcast(value, 2), value_of(case, rank.rank)) for case in cases]


def numbers(rank: Rank, op: str) -> dict[str, str]:
    """The reduction of numbers, as texts, so that nothing is rounded on the way here."""
    strategy = joined(rank)
    mine: dict[str, float] = {"float": 0.1 * (rank.rank + 1)}
    if op != "mean":
        mine |= {"long": 2**70 + rank.rank, "negative": -rank.rank}
    if op in {"max", "min"}:
        mine |= {"bool": rank.rank == 1, "nan": float("nan") if rank.rank == 1 else 1.0}
    return {name: repr(value) for name, value in strategy.all_reduce(mine, op).items()}


def broadcast_numbers(rank: Rank, src: int) -> dict[str, str]:
    """Numbers whose texts differ in length."""
    strategy = joined(rank)
    mine = {"long": 10 ** (40 * rank.rank), "float": 0.1 ** (rank.rank + 1), "bool": rank.rank == 1, "t": torch.ones(2)}
    return {name: repr(value) for name, value in strategy.broadcast(mine, src).items()}


def extremes_with_nan(rank: Rank, place: int) -> dict[str, Tensor]:
    strategy = joined(rank)
    value = torch.tensor([1.0, 2.0, float("-inf"), float("inf")]) * (rank.rank + 1)
    if rank.rank == place:
        value[0] = float("nan")
    return {"max": strategy.all_reduce(value, "max"), "min": strategy.all_reduce(value, "min")}


def reordered(rank: Rank, case: int) -> dict[str, Tensor]:
    """Keys in an order that differs between ranks."""
    strategy = joined(rank)
    names = ["b", "a", "c"][rank.rank :] + ["b", "a", "c"][: rank.rank]
    return strategy.all_reduce({name: torch.tensor(float(case + ord(name))) for name in names}, "sum")


def num_operations(rank: Rank, case: int) -> int:
    """How many operations of the group one call with many leaves takes."""
    strategy = joined(rank)
    data = {
        f"{i}": {"f": torch.ones(i), "h": torch.ones(3).bfloat16(), "i": torch.tensor(i), "n": 1.0} for i in range(case)
    }
    group = dist.group.WORLD
    before = group._get_sequence_number_for_group()
    strategy.all_reduce(data, "sum")
    return group._get_sequence_number_for_group() - before


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except (LightRFTError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def disagreements(rank: Rank, odd: int) -> list[str]:
    """Calls in which one rank is at odds with the others; afterwards all of them can go on."""
    strategy = joined(rank)
    is_odd = rank.rank == odd
    return [
        refused(lambda: strategy.all_reduce({"a": 1.0} if is_odd else {"b": 1.0})),
        refused(lambda: strategy.all_reduce(torch.ones(3 if is_odd else 2))),
        refused(lambda: strategy.all_reduce(torch.ones(2, dtype=torch.float64 if is_odd else torch.float32))),
        refused(lambda: strategy.all_reduce(1.0, "max" if is_odd else "min")),
        refused(lambda: strategy.broadcast(1.0, 1 if is_odd else 0)),
        refused(lambda: strategy.all_gather(torch.ones(2, 3 if is_odd else 2))),
        refused(lambda: strategy.barrier() if is_odd else strategy.all_reduce(1.0)),
        refused(lambda: strategy.all_reduce([1.0])),  # on all ranks alike
        refused(lambda: strategy.broadcast(1.0, 7)),
        refused(lambda: strategy.all_gather(1.0)),
        refused(lambda: strategy.all_reduce(1.0, "median")),
        refused(lambda: strategy.all_reduce(torch.ones(1, dtype=torch.uint64), "max")),
        str(strategy.all_reduce(1.0, "sum")),
    ]


def absent(rank: Rank, odd: int) -> str:
    """One rank skips a collective and lives on; the others are told within the timeout of the group."""
    dist.destroy_process_group()
    strategy = rank.build(rank.config)
    strategy.setup_distributed(timeout=1.0)
    strategy.barrier()
    told = rank.directory / "told"
    if rank.rank == odd:
        while len(list(rank.directory.iterdir())) < rank.world_size - 1:
            time.sleep(0.01)
        return ""
    try:
        strategy.all_reduce(1.0)
    except CollectiveError as error:
        return str(error)
    finally:
        told.with_name(f"told-{rank.rank}").touch()
    return "nothing was raised"


def group_of_ours(rank: Rank, seed: int) -> list[bool]:
    """What becomes of a group that the strategy finds, and of one that it makes, twice."""
    found = joined(rank)
    found.teardown()
    stays = dist.is_initialized()
    dist.destroy_process_group()
    facts = [stays]
    for _ in range(2):
        strategy = rank.build(attrs.evolve(rank.config, seed=seed))
        known = strategy.get_rank() == rank.rank and not dist.is_initialized()
        world = strategy.setup_distributed()
        group = dist.group.WORLD
        first = torch.rand(1)
        is_same = strategy.setup_distributed() == world and dist.group.WORLD is group
        torch.manual_seed(7)
        strategy.barrier()
        is_kept = torch.initial_seed() == 7
        facts += [known, world.world_size == rank.world_size, is_same, is_kept, bool(first.isfinite())]
        strategy.teardown()
        strategy.teardown()
        facts.append(not dist.is_initialized())
    return facts


def first_draws(rank: Rank, seed: int) -> float:
    strategy = rank.build(attrs.evolve(rank.config, seed=seed))
    strategy.setup_distributed()
    return float(torch.rand(()))


def printed(rank: Rank, text: str) -> str:
    strategy = joined(rank)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        strategy.print(text, rank.rank)
    return output.getvalue()


def store_gone(rank: Rank, port: int) -> str:
    """Rank 0 holds the store of a group and ends before the others; what they are told on their next call."""
    dist.destroy_process_group()
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    try:
        strategy = joined(rank)
        strategy.barrier()
        if rank.rank == 0:
            strategy.teardown()
            (rank.directory / "gone").touch()
            return ""
        while not (rank.directory / "gone").exists():
            time.sleep(0.01)
        return refused(strategy.barrier)
    finally:
        os.environ.update(LAUNCH)


def probe_cost(rank: Rank, case: int) -> int:
    """How many operations of the group the probe takes."""
    del case
    joined(rank)
    group = dist.group.WORLD
    before = group._get_sequence_number_for_group()
    probe_reductions(torch.device("cpu"))
    return group._get_sequence_number_for_group() - before


def probe_of_sums(rank: Rank, name: str) -> str:
    """What the probe says of a backend that sums where it should average, as gloo once did."""
    joined(rank)
    right = getattr(dist, name)

    def sums(*tensors: Tensor, op: object) -> object:
        del op
        return right(*tensors, op=dist.ReduceOp.SUM)

    setattr(dist, name, sums)
    try:
        return refused(lambda: probe_reductions(torch.device("cpu")))
    finally:
        setattr(dist, name, right)
