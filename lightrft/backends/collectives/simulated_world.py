"""n ranks in one process, which run one at a time and in an order that never changes.

Each rank is a thread, and a baton says which of them runs. A rank keeps it until it enters a collective or ends; then
the next one has it. A round is over when the last rank has passed the baton on: all ranks stand in a collective or have
ended, and either they agree or all that wait are told how they do not. So nothing waits for a time, and nothing depends
on one.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import attrs
import torch

from lightrft.backends.collectives.agreement import (
    SAME_CALLS,
    CallDescription,
    describe_call,
    find_disagreement,
    named_leaves,
)
from lightrft.backends.streams import Streams, capture_streams, new_streams, restore_streams
from lightrft.errors import CollectiveError, ConfigError, UnsupportedError

__all__ = ["SimulatedRank", "SimulatedWorld", "current_rank", "exchange", "meeting_apart", "run_simulated"]

_Result = TypeVar("_Result")

_GLANCE = 0.1
"""Seconds after which the caller looks for signals: one that comes just before it waits does not end the wait."""

_PATIENCE = 5.0
"""Seconds that interrupted ranks have to reach a collective, where they end; right ones take milliseconds."""


_LONG = 60.0
"""Seconds after which a second thread gives up on those of other ranks."""


def _held() -> threading.Semaphore:
    return threading.Semaphore(0)


@attrs.define(kw_only=True, eq=False)
class SimulatedRank:
    """One rank and where it is.

    Attributes:
        number: from 0 to world_size - 1.
        world: where it lives.
        streams: its random streams, while it does not run.
        baton: held by others until this rank may run.
        num_calls: collectives that it has entered.
        call: the last one; None before the first.
        leaves: what it brought there, by path.
        is_ended: whether its program has returned or raised.
    """

    number: int
    world: SimulatedWorld
    streams: Streams
    baton: threading.Semaphore = attrs.field(factory=_held)
    num_calls: int = 0
    call: CallDescription | None = None
    leaves: Mapping[str, object] = attrs.field(factory=dict[str, object])
    is_ended: bool = False


@attrs.define(kw_only=True, eq=False)
class SimulatedWorld:
    """All ranks, and what their last round came to.

    Attributes:
        ranks: in rank order.
        order: the same ranks in the order in which they run.
        gathered: what each rank brought to the last round, in rank order.
        disagreement: how the ranks of the last round differ; None if they agree.
        failure: rank and error of the first program that raised.
        finished: held by the ranks until all of them have ended.
        apart: where second threads of the ranks meet, and what each has brought there.
    """

    ranks: list[SimulatedRank] = attrs.field(factory=list[SimulatedRank])
    order: list[SimulatedRank] = attrs.field(factory=list[SimulatedRank])
    gathered: list[Mapping[str, object]] = attrs.field(factory=list[Mapping[str, object]])
    disagreement: str | None = None
    failure: tuple[int, BaseException] | None = None
    finished: threading.Semaphore = attrs.field(factory=_held)
    apart: tuple[threading.Barrier, list[Mapping[str, object]]] | None = None


# the analogue of the default process group: it tells a function without a handle which rank is calling
_RANK: contextvars.ContextVar[SimulatedRank | None] = contextvars.ContextVar("simulated_rank", default=None)


def current_rank() -> SimulatedRank:
    """Return the rank that is calling.

    Raises:
        UnsupportedError: none is; the caller is no program of `run_simulated`.
    """
    rank = _RANK.get()
    if rank is None:
        raise UnsupportedError(
            "rank=None: no simulated rank is running here; call this from the program of "
            "run_simulated(world_size, program)."
        )
    return rank


def run_simulated(
    world_size: int, program: Callable[[int], _Result], *, order: Sequence[int] | None = None
) -> list[_Result]:
    """Run a program once on every rank, and return the results in rank order.

    Only one rank runs at any moment, from one collective to the next, so that results never depend on timing. Every
    rank begins with random streams of its own, the same in each run; the caller's are left as they were.

    Args:
        world_size: number of ranks.
        program: called with the rank.
        order: the order in which ranks run between two collectives; None means by number.

    Returns:
        What the program returned on each rank.

    Raises:
        ConfigError: there is no rank, or the order does not hold each rank once.
        Exception: the first that a rank raised, with a note that names the rank; it ends all others.

    Example:
        >>> run_simulated(3, lambda rank: rank * rank)
        [0, 1, 4]
    """
    world = _build_world(world_size, order)
    results: dict[int, _Result] = {}
    streams = capture_streams()
    try:
        _run_threads(world, program, results)
    finally:
        restore_streams(streams)
    if world.failure is not None:
        number, error = world.failure
        error.add_note(f"on rank {number}")
        raise error
    return [results[number] for number in range(world_size)]


def exchange(
    name: str, data: object, *, options: Mapping[str, object] | None = None, is_dim_0_free: bool = False
) -> list[Mapping[str, object]]:
    """Return what every rank passes, as leaves by path, in rank order, once all ranks have entered and agree.

    The tensors are copies that all ranks share, so they are for reading.

    Args:
        name: of the collective.
        data: what this rank passes.
        options: the arguments that must be equal on all ranks.
        is_dim_0_free: whether ranks may differ in the size of dim 0.

    Raises:
        CollectiveError: the ranks do not agree; every rank gets the same message.
        UnsupportedError: the caller is no program of `run_simulated`.
    """
    rank = current_rank()
    _leave_if_failed(rank)
    rank.num_calls += 1
    rank.call = describe_call(name, rank.num_calls, data, options=options, is_dim_0_free=is_dim_0_free)
    # copied now: another rank may go on first, and write into what it has passed
    rank.leaves = {path: _copied(leaf) for path, leaf in named_leaves(data)}
    _pass_baton(rank)
    _await_baton(rank)
    if rank.world.disagreement is not None:
        raise CollectiveError(rank.world.disagreement)
    return rank.world.gathered


def meeting_apart() -> Callable[[object], list[Mapping[str, object]]] | None:
    """Return what second threads of the ranks exchange values by, as `exchange` does; None where no rank is simulated.

    Second threads run when they like, so they meet at a barrier, while a rank is held by the baton.
    """
    rank = _RANK.get()
    if rank is None:
        return None
    number, world_size = rank.number, len(rank.world.ranks)
    if rank.world.apart is None:
        rank.world.apart = threading.Barrier(world_size, timeout=_LONG), [{} for _ in range(world_size)]
    barrier, brought = rank.world.apart

    def meet(data: object) -> list[Mapping[str, object]]:
        brought[number] = {path: _copied(leaf) for path, leaf in named_leaves(data)}
        barrier.wait()
        gathered = list(brought)
        barrier.wait()
        return gathered

    return meet


def _copied(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _build_world(world_size: int, order: Sequence[int] | None) -> SimulatedWorld:
    if world_size < 1:
        raise ConfigError(f"world_size={world_size!r} is too small; use 1 or more.")
    numbers = list(range(world_size)) if order is None else list(order)
    if sorted(numbers) != list(range(world_size)):
        raise ConfigError(f"order={order!r} does not hold each of {world_size} ranks once; write a permutation.")
    world = SimulatedWorld()
    # a new process has streams that no other one has; here they are the same in each run too
    world.ranks = [SimulatedRank(number=n, world=world, streams=new_streams(seed=n)) for n in range(world_size)]
    world.order = [world.ranks[number] for number in numbers]
    return world


def _run_threads(world: SimulatedWorld, program: Callable[[int], _Result], results: dict[int, _Result]) -> None:
    threads = [
        threading.Thread(
            target=contextvars.copy_context().run,
            args=(_run_rank, rank, program, results),
            name=f"simulated-rank-{rank.number}",
            daemon=True,
        )
        for rank in world.ranks
    ]
    for thread in threads:
        thread.start()
    try:
        world.order[0].baton.release()
        while not world.finished.acquire(timeout=_GLANCE):
            pass
    except BaseException as error:  # the caller was interrupted, so the ranks are too, at their next collective
        world.failure = world.failure or (world.order[0].number, error)
        if world.finished.acquire(timeout=_PATIENCE):
            _join(threads)
        raise  # a rank that waits for ever is left behind: its thread is a daemon, which ends with the process
    _join(threads)


def _join(threads: list[threading.Thread]) -> None:
    # not before they are finished: a `join` that is interrupted may take a thread for ended that still runs
    for thread in threads:
        thread.join()


def _run_rank(rank: SimulatedRank, program: Callable[[int], _Result], results: dict[int, _Result]) -> None:
    _RANK.set(rank)
    try:
        _await_baton(rank)
        results[rank.number] = program(rank.number)
    except BaseException as error:  # noqa: BLE001 (the caller raises it)
        rank.world.failure = rank.world.failure or (rank.number, error)
    finally:
        rank.is_ended = True
        _pass_baton(rank)


def _await_baton(rank: SimulatedRank) -> None:
    rank.baton.acquire()
    _leave_if_failed(rank)
    restore_streams(rank.streams)


def _leave_if_failed(rank: SimulatedRank) -> None:
    if rank.world.failure is not None:
        # as a launcher ends the other processes: `except Exception` does not catch it, `finally` runs
        raise SystemExit(f"rank {rank.number} was ended because rank {rank.world.failure[0]} failed")


def _pass_baton(rank: SimulatedRank) -> None:
    world = rank.world
    rank.streams = capture_streams()
    later = [other for other in world.order[world.order.index(rank) + 1 :] if not other.is_ended]
    if not later:
        _end_round(world)
        later = [other for other in world.order if not other.is_ended]
    (later[0].baton if later else world.finished).release()


def _end_round(world: SimulatedWorld) -> None:
    world.gathered = [rank.leaves for rank in world.ranks]
    waiting = [rank for rank in world.ranks if not rank.is_ended]
    ended = [rank for rank in world.ranks if rank.is_ended]
    if waiting and ended:
        call = cast("CallDescription", waiting[0].call)
        world.disagreement = (
            f"{call.name} (call {call.number}): rank {ended[0].number} ended after {_calls(ended[0])}; {SAME_CALLS}."
        )
    elif waiting:
        world.disagreement = find_disagreement([cast("CallDescription", rank.call) for rank in waiting])


def _calls(rank: SimulatedRank) -> str:
    if rank.call is None:
        return "no call"
    return f"{rank.call.name} (call {rank.num_calls})"
