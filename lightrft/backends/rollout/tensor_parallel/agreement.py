"""What ranks that run one engine say of a call before it returns, so that it ends alike on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import attrs

from lightrft.backends.rollout.apart.messages import decode, encode
from lightrft.backends.rollout.request_checks import RequestLimits
from lightrft.backends.rollout.tensor_parallel.ranks import RankGroup, hear_all, leave_ranks
from lightrft.backends.rollout.tensor_parallel.requests import Asked
from lightrft.errors import CollectiveError, EngineCrashError, WeightSyncError
from lightrft.failures import Failure, failure_of, raised_by
from lightrft.strategy.protocols.rollout import EngineHandle, SamplingParams

__all__ = ["Said", "State", "agreed", "hear", "raise_first", "require_whole", "tried"]

_Value = TypeVar("_Value")


@attrs.frozen(kw_only=True)
class Said:
    """What a rank says: which call it is in, with what, and how its part of it ended.

    Attributes:
        call: name of the call.
        digests: of what the engine is started from, by name.
        asked: the prompts.
        sampling: how tokens are drawn, with 0 as the number of the first prompt.
        failure: what was raised.
    """

    call: str
    digests: dict[str, str] = attrs.field(factory=dict[str, str])
    asked: Asked | None = None
    sampling: SamplingParams | None = None
    failure: Failure | None = None


@attrs.define(kw_only=True, eq=False)
class State:
    """What a rank keeps of an engine that it runs with others.

    Attributes:
        shard: the engine of this rank, which has a part of the weights.
        group: the ranks.
        limits: what the model can take.
        lost: why the ranks cannot go on together; empty while they can.
        is_given_up: whether all ranks know that the update under way has failed.
    """

    shard: EngineHandle
    group: RankGroup
    limits: RequestLimits
    lost: str = ""
    is_given_up: bool = False


def hear(group: RankGroup, said: Said) -> list[Said]:
    """Return what all ranks say, in their order.

    Args:
        group: ranks that all make this call.
        said: what this one says.

    Raises:
        EngineCrashError: a rank has ended, or did not come within the timeout.
    """
    return [decode(text, Said) for text in hear_all(group, encode(said))]


def tried(act: Callable[[], _Value]) -> tuple[_Value | None, Exception | None]:
    """Return what an act gave, or what it raised.

    Args:
        act: the part of this rank.
    """
    try:
        return act(), None
    except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must hear of it)
        return None, error


def agreed(handle: EngineHandle, state: State, said: Said, act: Callable[[], _Value]) -> tuple[_Value, list[Said]]:
    """Return what an act gave and what all ranks say, if it succeeded on all of them.

    Args:
        handle: of the engine that the ranks run together.
        state: what this rank keeps of it.
        said: what this rank says of its call.
        act: the part of this rank.

    Raises:
        EngineCrashError: a rank was lost, and with it the engine.
        CollectiveError: ranks are in different calls, and the engine is lost.
        WeightSyncError: another rank gave its update up.
        Exception: what this rank raised, or another one, whose number is named.
    """
    try:
        value, error = tried(act)
        every = hear(state.group, attrs.evolve(said, failure=None if error is None else failure_of(error)))
        _require_same_call(handle, state, every)
        raise_first(state.group, every, error)
    except (EngineCrashError, CollectiveError) as reason:
        _lose(state, reason)
        raise
    except Exception:
        raise
    except BaseException as reason:  # as Ctrl-C in the middle: all that the other ranks hear of it is the end
        _lose(state, reason)
        raise
    return value, every  # type: ignore[return-value]  # pyright: ignore[reportReturnType] (nothing was raised)


def raise_first(group: RankGroup, every: Sequence[Said], error: Exception | None) -> None:
    """Raise this rank's own error, or that of the first rank that has one; where they differ, it tells them all.

    Args:
        group: the ranks.
        every: what they said, in their order.
        error: what this rank raised.
    """
    failures = {rank: said.failure for rank, said in zip(group.ranks, every, strict=True) if said.failure is not None}
    if error is not None and len({failure.message for failure in failures.values()}) > 1:
        # where one breaks off in the middle, what the others see is that it is gone
        words = "; ".join(f"rank {rank}: {failure.message.rstrip('.')}" for rank, failure in failures.items())
        raise raised_by(attrs.evolve(failure_of(error), message=f"{words}.")) from error
    if error is not None:
        raise error
    for rank, failure in failures.items():
        raise raised_by(failure, where=f"rank {rank}: ") from RuntimeError(f"on rank {rank}:\n{failure.traceback}")


def require_whole(state: State) -> None:
    """Refuse to go on where the ranks have lost one another.

    Args:
        state: what this rank keeps.

    Raises:
        EngineCrashError: they have.
    """
    if state.lost:
        raise EngineCrashError(f"the ranks that ran this engine have lost one another ({state.lost}); start a new one.")


def _require_same_call(handle: EngineHandle, state: State, every: Sequence[Said]) -> None:
    """Refuse to go on where ranks are in different calls; an update that one of them gives up is given up by all."""
    ranks, calls = state.group.ranks, [said.call for said in every]
    mine = calls[state.group.place]
    if len(set(calls)) == 1 or mine == "abort":
        return
    if "abort" in calls:
        handle.status, state.is_given_up = "torn", True
        raise WeightSyncError(f"rank {ranks[calls.index('abort')]} gave its update up; sync the weights again.")
    other = next(place for place, call in enumerate(calls) if call != mine)
    raise CollectiveError(
        f"{mine}: rank {ranks[other]} is in {calls[other]}, and both run one engine; let every rank make the same "
        "calls in the same order, and start a new engine."
    )


def _lose(state: State, reason: BaseException) -> None:
    state.lost = str(reason).rstrip(".") or type(reason).__name__
    leave_ranks(state.group)
