"""Ranks that are simulated in one process: their collectives against numpy, and how they disagree."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.backends.collectives.record import CollectiveFunctions
from lightrft.backends.collectives.seeding import stream_seed
from lightrft.backends.collectives.simulated import build_collectives, run_simulated
from lightrft.backends.launch import device_of_process
from lightrft.errors import CollectiveError, ConfigError, UnsupportedError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import World
from lightrft.testing.signatures import signature_differences_of_record

WORLD_SIZES = [1, 2, 3, 4]
SHAPES = [(), (0,), (3,), (2, 0, 3), (2, 3)]
DTYPES = [torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
NUMPY = {"mean": np.mean, "sum": np.sum, "max": np.max, "min": np.min}
COLLECTIVES = build_collectives(StrategyConfig(seed=3))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


def value_of(rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    if dtype == torch.int64:  # not representable in floating point
        return torch.randint(2**53 + 1, 2**55, shape, generator=generator)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def is_allowed(dtype: torch.dtype, op: str) -> bool:
    return {
        "mean": dtype.is_floating_point or dtype.is_complex,
        "sum": dtype != torch.bool,
        "max": not dtype.is_complex,
        "min": not dtype.is_complex,
    }[op]


def errors_of(world_size: int, program: Callable[[int], object]) -> list[str]:
    """Message of the CollectiveError that each rank gets."""

    def caught(rank: int) -> str:
        with pytest.raises(CollectiveError) as error:
            program(rank)
        return str(error.value)

    return run_simulated(world_size, caught)


# all_reduce


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", NUMPY)
def test_all_reduce_is_numpy_s_reduction(op: str, dtype: torch.dtype, world_size: int) -> None:
    """Every shape is reduced as numpy does in the same dtype, with the same bits on all ranks, or refused on all."""
    for shape in SHAPES:
        values = [value_of(rank, dtype, shape) for rank in range(world_size)]

        def program(rank: int) -> torch.Tensor:
            return COLLECTIVES.all_reduce({"x": values[rank]}, op)["x"]  # noqa: B023 (called in this turn of the loop)

        if not is_allowed(dtype, op):
            with pytest.raises(ConfigError, match=r"no meaning for data\['x'\]"):
                run_simulated(world_size, program)
            continue
        results = run_simulated(world_size, program)
        stacked = np.stack([value.numpy() for value in values])
        # numpy widens small integers when it adds them; the dtype must stay
        expected = (
            NUMPY[op](stacked, axis=0) if op in {"max", "min"} else NUMPY[op](stacked, axis=0, dtype=stacked.dtype)
        )
        for result in results:
            assert (result.dtype, result.shape) == (dtype, shape)
            assert torch.equal(result, results[0])
            np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6 if dtype.is_floating_point else 1e-5)
            if not (dtype.is_floating_point or dtype.is_complex):
                assert np.array_equal(result.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_added_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """256 + 1 + 1 + 1 loses every 1 in bfloat16, and a mean of large numbers its sum in float16; neither happens."""
    large = 256.0 if dtype == torch.bfloat16 else 2048.0

    def total(rank: int) -> torch.Tensor:
        return COLLECTIVES.all_reduce(torch.tensor([large if rank == 0 else 1.0, 30000.0], dtype=dtype), "sum")

    def mean(rank: int) -> torch.Tensor:
        del rank
        return COLLECTIVES.all_reduce(torch.tensor([60000.0], dtype=dtype), "mean")

    expected = torch.tensor([large + 3.0, 120000.0]).to(dtype)
    assert all(torch.equal(found, expected) for found in run_simulated(4, total))
    assert all(torch.equal(found, torch.tensor([60000.0], dtype=dtype)) for found in run_simulated(4, mean))


@pytest.mark.parametrize("op", ["max", "min", "sum", "mean"])
def test_what_is_not_finite_is_passed_on(op: str) -> None:
    """A NaN on one rank is a NaN on all, in tensors and in numbers, wherever it stands."""
    for place in range(3):

        def program(rank: int) -> tuple[torch.Tensor, float]:
            value = float("nan") if rank == place else 1.0  # noqa: B023 (called in this turn of the loop)
            return COLLECTIVES.all_reduce(torch.tensor([value, 2.0]), op), COLLECTIVES.all_reduce(value, op)

        for tensor, number in run_simulated(3, program):
            assert tensor.isnan().tolist() == [True, False]
            assert np.isnan(number)


def test_numbers_keep_their_type() -> None:
    """Ints are exact beyond any tensor, bools take any and all, floats are numpy's; the type is the one that came."""

    def program(rank: int) -> list[object]:
        return [
            COLLECTIVES.all_reduce(2**70 + rank, "sum"),
            COLLECTIVES.all_reduce(rank, "max"),
            COLLECTIVES.all_reduce(rank, "min"),
            COLLECTIVES.all_reduce(rank == 1, "max"),
            COLLECTIVES.all_reduce(rank == 1, "min"),
            COLLECTIVES.all_reduce(rank + 0.1),
            COLLECTIVES.broadcast(rank, src=2),
        ]

    expected = [3 * 2**70 + 3, 2, 0, True, False, float(np.mean([0.1, 1.1, 2.1])), 2]
    for results in run_simulated(3, program):
        assert results == expected
        assert [type(result) for result in results] == [int, int, int, bool, bool, float, int]


# all_gather, broadcast


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
def test_all_gather_is_a_concatenation_in_rank_order(dtype: torch.dtype, world_size: int) -> None:
    """Ranks bring rows of their own number, also none; numbers without a dim become a row."""
    rows = [value_of(rank, dtype, ((rank + 2) % 3, 2)) for rank in range(world_size)]
    scalars = [value_of(rank, dtype, ()) for rank in range(world_size)]

    def program(rank: int) -> dict[str, torch.Tensor]:
        return COLLECTIVES.all_gather({"rows": rows[rank], "scalars": scalars[rank]})

    for found in run_simulated(world_size, program):
        assert found["rows"].dtype == found["scalars"].dtype == dtype
        assert found["rows"].tolist() == [row for part in rows for row in part.tolist()]
        assert found["scalars"].tolist() == [scalar.item() for scalar in scalars]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_broadcast_gives_every_rank_the_value_of_one(dtype: torch.dtype, world_size: int) -> None:
    """Each rank can be the source, for every shape; a second time changes nothing."""
    for shape in SHAPES:
        values = [value_of(rank, dtype, shape) for rank in range(world_size)]
        for src in range(world_size):

            def program(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
                once = COLLECTIVES.broadcast(values[rank], src=src)  # noqa: B023 (called in this turn of the loop)
                return once, COLLECTIVES.broadcast(once, src=src)  # noqa: B023

            for once, twice in run_simulated(world_size, program):
                assert torch.equal(once, values[src])
                assert torch.equal(twice, values[src])
                assert once.dtype == dtype


TREES = st.recursive(
    st.lists(st.floats(-10, 10, width=32), max_size=3).map(torch.tensor) | st.floats(-10, 10),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(TREES, st.integers(1, 3))
def test_trees_of_any_depth_come_back_with_their_structure(tree: object, world_size: int) -> None:
    """Any nesting keeps its keys and their order on each rank, though ranks may order them differently."""

    def program(rank: int) -> list[object]:
        mine = reordered(tree) if rank == 1 else tree
        return [mine, COLLECTIVES.broadcast(mine), COLLECTIVES.all_reduce(mine, "max"), COLLECTIVES.all_reduce(mine)]

    for mine, *results in run_simulated(world_size, program):
        for result in results:
            assert_same_tree(result, mine)


def reordered(tree: object) -> object:
    return {key: reordered(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree


def assert_same_tree(found: object, expected: object) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found is not expected
        assert list(found) == list(expected)
        for key, branch in expected.items():
            assert_same_tree(found[key], branch)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected)  # the mean of equal values may round
    else:
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "broadcast"])
def test_nothing_is_aliased_and_nothing_is_written(name: str, world_size: int) -> None:
    """What a rank writes into its input or result reaches neither its other one nor those of other ranks."""
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda whole: whole,
        lambda whole: whole[1:5:2],
        lambda whole: whole.reshape(2, 3).t(),
        lambda whole: whole[0].expand(3),
        lambda whole: whole[0],
    ]
    for view in views:

        def program(rank: int) -> torch.Tensor:
            storage = torch.arange(6, dtype=torch.float32)
            result = getattr(COLLECTIVES, name)({"a": {"b": view(storage)}})["a"]["b"]  # noqa: B023 (called in this turn)
            assert torch.equal(storage, torch.arange(6, dtype=torch.float32))
            expected = result.clone()
            storage.fill_(-1.0 - rank)
            COLLECTIVES.barrier()
            assert torch.equal(result, expected)
            result.fill_(100.0 + rank)
            COLLECTIVES.barrier()
            assert torch.equal(result, torch.full_like(result, 100.0 + rank))
            assert torch.equal(storage, torch.full_like(storage, -1.0 - rank))
            return expected

        results = run_simulated(world_size, program)
        assert all(torch.equal(result, results[0]) for result in results)


def test_views_and_graphs_are_taken_by_value() -> None:
    """Ranks pass slices of one strided tensor that asks for gradients; the result is the sum, and has no history."""
    shared = torch.arange(6, dtype=torch.float32).reshape(2, 3).t().requires_grad_()

    def program(rank: int) -> torch.Tensor:
        return COLLECTIVES.all_reduce(shared[rank], "sum")

    for result in run_simulated(3, program):
        assert not result.requires_grad
        assert torch.equal(result, shared.detach().sum(0))


# the world


def test_ranks_know_their_place() -> None:
    """Set-up and the two questions agree on every rank; building needs no world and has the contracts' signatures."""

    def program(rank: int) -> tuple[World, int, bool]:
        del rank
        COLLECTIVES.teardown()
        return COLLECTIVES.setup_distributed(timedelta(seconds=1)), COLLECTIVES.get_rank(), COLLECTIVES.is_rank_0()

    assert run_simulated(3, program) == [
        (World(rank=rank, local_rank=rank, world_size=3, device=device_of_process()), rank, rank == 0)
        for rank in range(3)
    ]
    assert signature_differences_of_record(COLLECTIVES) == []


def test_outside_of_a_simulated_rank_every_function_says_so() -> None:
    """Without a world there is no rank to speak for, neither here nor in a thread that a rank starts."""
    calls = {"all_reduce": (1.0,), "all_gather": (torch.ones(1),), "broadcast": (1.0,), "print": ("x",)}
    for field in CollectiveFunctions.__attrs_attrs__:
        with pytest.raises(UnsupportedError, match=r"run_simulated\(world_size, program\)"):
            getattr(COLLECTIVES, field.name)(*calls.get(field.name, ()))

    def program(rank: int) -> list[type]:
        del rank
        seen: list[type] = []

        def other_thread() -> None:
            try:
                COLLECTIVES.get_rank()
            except UnsupportedError as error:
                seen.append(type(error))

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        return seen

    assert run_simulated(2, program) == [[UnsupportedError]] * 2


def test_only_rank_0_prints(capfd: pytest.CaptureFixture[str]) -> None:
    """A line comes once."""

    def program(rank: int) -> None:
        COLLECTIVES.print("rank", rank)

    run_simulated(3, program)
    assert capfd.readouterr().out == "rank 0\n"


@pytest.mark.parametrize("order", [None, [0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_ranks_run_one_at_a_time_in_a_fixed_order(order: list[int] | None) -> None:
    """Between two collectives each rank runs once, in the order that was asked for; results come in rank order."""
    events: list[tuple[int, str]] = []

    def program(rank: int) -> int:
        for moment in ("first", "second", "third"):
            events.append((rank, moment))
            COLLECTIVES.barrier()
        return rank * 10

    assert run_simulated(3, program, order=order) == [0, 10, 20]
    expected = order or [0, 1, 2]
    assert events == [(rank, moment) for moment in ("first", "second", "third") for rank in expected]


def test_a_barrier_orders_effects() -> None:
    """What every rank did before it is visible to all after it, whatever the order."""
    for order in ([0, 1, 2], [2, 1, 0]):
        done: list[int] = []

        def program(rank: int) -> int:
            done.append(rank)  # noqa: B023 (called in this turn of the loop)
            COLLECTIVES.barrier()
            return len(done)  # noqa: B023

        assert run_simulated(3, program, order=order) == [3, 3, 3]


def test_impossible_worlds_are_refused() -> None:
    """No rank, or an order that misses one, is an error before anything runs."""
    with pytest.raises(ConfigError, match="world_size=0 is too small"):
        run_simulated(0, str)
    for order in ([0], [0, 0], [1, 2]):
        with pytest.raises(ConfigError, match="does not hold each of 2 ranks once"):
            run_simulated(2, str, order=order)


def test_worlds_can_be_nested() -> None:
    """A rank may simulate a world of its own, and is itself again afterwards."""

    def inner(rank: int) -> int:
        return COLLECTIVES.all_reduce(rank, "sum")

    def program(rank: int) -> tuple[list[int], int]:
        return run_simulated(3, inner), COLLECTIVES.all_reduce(rank, "sum")

    assert run_simulated(2, program) == [([3, 3, 3], 1)] * 2


# disagreement


SAME_CALLS = "let every rank make the same calls in the same order."


def _op(rank: int) -> object:
    return COLLECTIVES.all_reduce(1.0, "mean" if rank == 0 else "sum")


def _src(rank: int) -> object:
    return COLLECTIVES.broadcast(1.0, src=rank)


def _call(rank: int) -> object:
    return COLLECTIVES.all_gather(torch.ones(1)) if rank == 1 else COLLECTIVES.all_reduce(torch.ones(1))


def _order(rank: int) -> object:
    return COLLECTIVES.barrier() if rank == 1 else COLLECTIVES.broadcast(1.0)


def _shape(rank: int) -> object:
    return COLLECTIVES.all_reduce({"loss": torch.zeros(2 + rank // 2)})


def _dtype(rank: int) -> object:
    return COLLECTIVES.all_gather(torch.zeros(2, dtype=torch.int64 if rank == 1 else torch.int32))


def _rows(rank: int) -> object:
    return COLLECTIVES.all_gather(torch.zeros(rank, 2 + rank // 2))


def _keys(rank: int) -> object:
    return COLLECTIVES.broadcast({"loss" if rank else "losses": 1.0})


def _kind(rank: int) -> object:
    return COLLECTIVES.all_reduce({"n": 1 if rank else 1.0}, "sum")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (_call, f"all_reduce (call 3): rank 1 is in all_gather (call 3); {SAME_CALLS}"),
        (_order, f"broadcast (call 3): rank 1 is in barrier (call 3); {SAME_CALLS}"),
        (_op, "all_reduce (call 3): op is 'mean' on rank 0 and 'sum' on rank 1; "),
        (_src, "broadcast (call 3): src is 0 on rank 0 and 1 on rank 1; "),
        (_shape, "all_reduce (call 3): data['loss'] is float32 of shape (2,) on rank 0 and float32 of shape (3,) on "),
        (_dtype, "all_gather (call 3): data is int32 of shape (*,) on rank 0 and int64 of shape (*,) on rank 1; "),
        (_rows, "all_gather (call 3): data is float32 of shape (*, 2) on rank 0 and float32 of shape (*, 3) on rank 2"),
        (_keys, "broadcast (call 3): data['loss'] is missing on rank 0 and a float on rank 1; "),
        (_kind, "all_reduce (call 3): data['n'] is a float on rank 0 and an int on rank 1; "),
    ],
)
def test_a_disagreement_is_the_same_error_on_every_rank(program: Callable[[int], object], message: str) -> None:
    """Whatever ranks disagree on, each of them is told which rank differs and how, and all can go on together."""

    def later(rank: int) -> object:
        COLLECTIVES.barrier()
        COLLECTIVES.all_reduce(rank, "sum")
        return program(rank)

    messages = errors_of(3, later)
    assert len(set(messages)) == 1
    assert messages[0].startswith(message)

    def going_on(rank: int) -> int:
        with pytest.raises(CollectiveError):
            program(rank)
        return COLLECTIVES.all_reduce(rank, "sum")

    assert run_simulated(3, going_on) == [3, 3, 3]


@pytest.mark.parametrize(("num_calls", "last"), [(0, "no call"), (1, "barrier (call 1)"), (2, "barrier (call 2)")])
def test_a_rank_that_ended_is_not_waited_for(num_calls: int, last: str) -> None:
    """The others are told after which call it ended, whether it is the first to run or the last."""
    for missing in range(3):

        def program(rank: int) -> str:
            for _ in range(num_calls):
                COLLECTIVES.barrier()
            if rank == missing:  # noqa: B023 (called in this turn of the loop)
                return "ended"
            with pytest.raises(CollectiveError) as error:
                COLLECTIVES.all_reduce(1.0)
            return str(error.value)

        results = run_simulated(3, program)
        assert results.pop(missing) == "ended"
        expected = f"all_reduce (call {num_calls + 1}): rank {missing} ended after {last}; {SAME_CALLS}"
        assert results == [expected] * 2


def test_arguments_that_no_rank_may_pass_are_refused_on_all() -> None:
    """An unknown op, a rank that is not there and an unusable value are the same ConfigError everywhere."""
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: COLLECTIVES.all_reduce(1.0, "men"), r"op='men' is not known; did you mean 'mean'\?"),
        (lambda: COLLECTIVES.all_reduce(1), "op='mean' has no meaning for data, which is torch.int64"),
        (lambda: COLLECTIVES.broadcast(1.0, src=2), "src=2 is no rank of a world of 2; use a number from 0 to 1"),
        (lambda: COLLECTIVES.broadcast(1.0, src=-1), "src=-1 is no rank"),
        (lambda: COLLECTIVES.all_gather({"n": 3}), r"data\['n'\]=3 is a number"),
        (lambda: COLLECTIVES.all_reduce({"x": [1.0]}), r"data\['x'\] is a list; pass tensors"),
        (lambda: COLLECTIVES.setup_distributed(timeout=0), "timeout=0 is not a positive number of seconds"),
    ]
    for call, match in calls:

        def program(rank: int) -> int:
            with pytest.raises(ConfigError, match=match):  # noqa: B023 (called in this turn of the loop)
                call()  # noqa: B023
            return rank

        assert run_simulated(2, program) == [0, 1]


# errors of a program


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_the_error_of_a_rank_ends_all_and_is_raised_in_the_caller(failing: int, moment: str) -> None:
    """Its type and message stay, a note names the rank, and the others run their `finally` and nothing else."""
    left: list[int] = []
    went_on: list[int] = []

    def program(rank: int) -> None:
        def maybe_fail(now: str) -> None:
            if (rank, moment) == (failing, now):
                raise KeyError("gone")

        try:
            maybe_fail("before")
            COLLECTIVES.barrier()
            maybe_fail("between")
            COLLECTIVES.barrier()
            maybe_fail("after")
            COLLECTIVES.barrier()
            went_on.append(rank)
        except Exception:
            assert rank == failing
            raise
        finally:
            left.append(rank)
            COLLECTIVES.teardown()

    with pytest.raises(KeyError, match="gone") as error:
        run_simulated(3, program)
    assert error.value.__notes__ == [f"on rank {failing}"]
    assert went_on == []
    began = {rank for rank in range(3) if moment != "before" or rank <= failing}
    assert set(left) == began


def test_a_collective_while_a_rank_is_being_ended_ends_it_too() -> None:
    """A clean-up that meets the others finds none, and does not hang."""
    reached: list[str] = []

    def program(rank: int) -> None:
        if rank == 1:
            raise ValueError("first")
        try:
            COLLECTIVES.barrier()
        finally:
            reached.append("finally")
            COLLECTIVES.barrier()

    with pytest.raises(ValueError, match="first") as error:
        run_simulated(2, program)
    assert error.value.__notes__ == ["on rank 1"]
    assert reached == ["finally"]


def test_an_uncaught_disagreement_reaches_the_caller() -> None:
    """The error of the first rank that did not catch it is raised."""

    def program(rank: int) -> None:
        try:
            _op(rank)
        except CollectiveError:
            if rank == 1:
                raise

    with pytest.raises(CollectiveError, match="op is 'mean' on rank 0") as error:
        run_simulated(2, program)
    assert error.value.__notes__ == ["on rank 1"]


def test_an_exit_of_a_rank_is_an_error_of_the_run() -> None:
    """`SystemExit` of a program is not lost in its thread."""

    def program(rank: int) -> None:
        if rank == 1:
            raise SystemExit(3)
        COLLECTIVES.barrier()

    with pytest.raises(SystemExit) as error:
        run_simulated(2, program)
    assert error.value.code == 3


def test_an_interrupted_caller_leaves_no_rank_running() -> None:
    """Ctrl-C in the caller ends every rank at its next collective, and is raised."""
    caller = threading.get_ident()

    def program(rank: int) -> None:
        if rank == 1:
            signal.pthread_kill(caller, signal.SIGINT)
        while True:
            COLLECTIVES.barrier()

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_simulated(3, program)
    finally:
        signal.signal(signal.SIGINT, handler)


# random streams


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.random())]  # noqa: NPY002, S311 (global streams)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (numpy's global stream)


def test_every_rank_has_the_streams_of_its_own_process() -> None:
    """A rank draws what it draws alone, though others draw between its draws; other ranks draw other numbers."""

    def program(rank: int) -> list[list[float]]:
        COLLECTIVES.setup_distributed()
        drawn = [draws()]
        for _ in range(3):
            COLLECTIVES.barrier()
            drawn.append(draws())
        assert torch.initial_seed() == stream_seed(3, rank)
        return drawn

    together = run_simulated(3, program)
    for rank, drawn in enumerate(together):
        seed_all(0)
        number = stream_seed(3, rank)
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002 (numpy's global stream)
        assert drawn == [draws() for _ in range(4)]
    assert len({first for drawn in together for first, _, _ in drawn}) == 12


def test_the_caller_s_streams_are_left_alone() -> None:
    """After a run, and after one that failed, the caller draws what it would have drawn without it."""

    def program(rank: int) -> None:
        seed_all(rank + 100)
        draws()
        COLLECTIVES.barrier()
        draws()
        if rank:
            raise ValueError("stop")

    seed_all(7)
    expected = draws()
    seed_all(7)
    with pytest.raises(ValueError, match="stop"):
        run_simulated(2, program)
    assert draws() == expected
    seed_all(7)
    run_simulated(1, program)
    assert draws() == expected


def test_ranks_begin_unseeded_and_alike_in_each_run() -> None:
    """Before set-up the streams are none of the caller's: different on each rank, the same in each run."""

    def program(rank: int) -> list[float]:
        del rank
        return draws()

    seed_all(1)
    first = run_simulated(2, program)
    seed_all(2)
    assert run_simulated(2, program) == first
    assert first[0] != first[1]


def test_set_up_seeds_once_and_again_after_teardown() -> None:
    """A second set-up leaves the streams alone; after a teardown the next one begins anew."""

    def program(rank: int) -> list[list[float]]:
        del rank
        COLLECTIVES.setup_distributed()
        first = draws()
        COLLECTIVES.setup_distributed()
        second = draws()
        COLLECTIVES.teardown()
        COLLECTIVES.setup_distributed()
        return [first, second, draws()]

    for first, second, third in run_simulated(2, program):
        assert first != second
        assert first == third
