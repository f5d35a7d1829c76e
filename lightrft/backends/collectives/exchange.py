"""How ranks meet over torch.distributed: no value moves before all ranks have said the same of their call.

Every collective begins with the same small one, in which ranks compare a fingerprint of what they are about to do, so
two ranks that are in different calls meet there and nowhere else. Only if fingerprints differ, descriptions follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import cast

import attrs
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from lightrft.backends.collectives.agreement import (
    SAME_CALLS,
    CallDescription,
    decode_call,
    describe_call,
    encode_call,
    find_disagreement,
    fingerprint,
)
from lightrft.backends.collectives.process_group import control_device
from lightrft.backends.collectives.rendezvous import reason_of
from lightrft.errors import CollectiveError

__all__ = ["Meeting", "broadcast_bytes", "gather_bytes", "meet", "reduce_in_place"]


@attrs.frozen(kw_only=True, eq=False)
class Meeting:
    """A collective that all ranks have entered, and in which they agree.

    Attributes:
        group: the process group.
        call: what all ranks say.
        sizes: how many bytes each rank has for the others, in rank order.
    """

    group: dist.ProcessGroup
    call: CallDescription
    sizes: tuple[int, ...]


def meet(
    group: dist.ProcessGroup,
    name: str,
    data: object,
    *,
    options: Mapping[str, object] | None = None,
    is_dim_0_free: bool = False,
    num_bytes: int = 0,
) -> Meeting:
    """Return when all ranks have entered the same collective.

    Args:
        group: the process group.
        name: of the collective.
        data: what this rank passes.
        options: the arguments that must be equal on all ranks.
        is_dim_0_free: whether ranks may differ in the size of dim 0.
        num_bytes: how many bytes this rank has for the others.

    Raises:
        CollectiveError: the ranks do not agree, or not all of them came within the timeout of the group; it says who
            is missing.
    """
    call = _announced(group, name, data, options, is_dim_0_free=is_dim_0_free)
    said = _gather_numbers(group, call, (fingerprint(call), num_bytes))
    if len({row[0] for row in said}) > 1:
        raise CollectiveError(_disagreement(group, call))
    return Meeting(group=group, call=call, sizes=tuple(row[1] for row in said))


def gather_bytes(meeting: Meeting, mine: torch.Tensor) -> list[torch.Tensor]:
    """Return what every rank passes, in rank order.

    Args:
        meeting: told how many bytes each rank has.
        mine: uint8 (size,), on a device of the group.

    Raises:
        CollectiveError: a rank was lost.
    """
    longest = max(meeting.sizes)
    if longest == 0 or len(meeting.sizes) == 1:  # a world of one has nobody to talk to, not even in a fork of it
        return [mine.clone() for _ in meeting.sizes]
    padded = torch.zeros(longest, dtype=torch.uint8, device=mine.device)
    padded[: mine.numel()] = mine
    parts = [torch.empty_like(padded) for _ in meeting.sizes]
    with _named_failures(meeting.group, meeting.call):
        dist.all_gather(parts, padded, group=meeting.group)
    return [part[:size] for part, size in zip(parts, meeting.sizes, strict=True)]


def broadcast_bytes(meeting: Meeting, mine: torch.Tensor, src: int) -> torch.Tensor:
    """Return what rank `src` passes.

    Args:
        meeting: told how many bytes that rank has.
        mine: uint8 (size,), on a device of the group.
        src: whose bytes are taken.

    Raises:
        CollectiveError: a rank was lost.
    """
    whole = mine if src == dist.get_rank() else torch.empty(meeting.sizes[src], dtype=torch.uint8, device=mine.device)
    if whole.numel() and len(meeting.sizes) > 1:
        with _named_failures(meeting.group, meeting.call):
            dist.broadcast(whole, src, group=meeting.group)
    return whole


def reduce_in_place(meeting: Meeting, buffer: torch.Tensor, op: str) -> None:
    """Set the buffer to its reduction over ranks.

    Args:
        meeting: where ranks agreed on its dtype and size.
        buffer: float32, float64 or int64 (size,), on a device of the group.
        op: "sum", "max" or "min".

    Raises:
        CollectiveError: a rank was lost.
    """
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    if buffer.numel() and len(meeting.sizes) > 1:
        with _named_failures(meeting.group, meeting.call):
            dist.all_reduce(buffer, op=operations[op], group=meeting.group)


def _count_key(rank: int) -> str:
    return f"calls/{rank}"


def _last_key(rank: int) -> str:
    return f"last/{rank}"


def _announced(
    group: dist.ProcessGroup, name: str, data: object, options: Mapping[str, object] | None, *, is_dim_0_free: bool
) -> CallDescription:
    """Return the description of a call, which the store keeps too: a rank that is missing later cannot tell its own."""
    store, rank = group.get_group_store(), dist.get_rank()
    try:
        number = store.add(_count_key(rank), 1)
        call = describe_call(name, number, data, options=options, is_dim_0_free=is_dim_0_free)
        store.set(_last_key(rank), encode_call(call).decode("ascii"))
    except dist.DistError as error:
        raise CollectiveError(
            f"{name}: the store of the process group is gone ({reason_of(error)}), so the rank that held it has ended; "
            f"{SAME_CALLS}."
        ) from error
    return call


def _gather_numbers(group: dist.ProcessGroup, call: CallDescription, numbers: Sequence[int]) -> list[tuple[int, ...]]:
    if dist.get_world_size() == 1:
        return [tuple(numbers)]
    mine = torch.tensor(numbers, dtype=torch.int64, device=control_device(group))
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    with _named_failures(group, call):
        dist.all_gather(table, mine, group=group)
        return [tuple(row) for row in torch.stack(table).tolist()]


def _disagreement(group: dist.ProcessGroup, call: CallDescription) -> str:
    mine = torch.frombuffer(bytearray(encode_call(call)), dtype=torch.uint8).to(control_device(group))
    sizes = tuple(row[0] for row in _gather_numbers(group, call, (mine.numel(),)))
    written = gather_bytes(Meeting(group=group, call=call, sizes=sizes), mine)
    calls = [decode_call(bytes(part.tolist())) for part in written]
    return cast("str", find_disagreement(calls))  # the fingerprints differ, so the descriptions do


@contextlib.contextmanager
def _named_failures(group: dist.ProcessGroup, call: CallDescription) -> Generator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo raises no narrower type
        absent = "; ".join(_absent(group, call)) or "all ranks have entered it, and one of them was lost"
        raise CollectiveError(
            f"{call.name} (call {call.number}): {absent} ({reason_of(error)}); {SAME_CALLS}, and start the ranks "
            "again, because the process group is of no use any more."
        ) from error


def _absent(group: dist.ProcessGroup, call: CallDescription) -> Generator[str]:
    """Yield a sentence for every rank that has not entered the call."""
    store = group.get_group_store()
    try:
        for rank in range(dist.get_world_size()):
            if store.add(_count_key(rank), 0) < call.number:
                yield f"rank {rank} did not enter it and {_last_of(store, rank)}"
    except RuntimeError as error:
        yield f"a rank is missing, and so is the store that knew which ({reason_of(error)})"


def _last_of(store: Store, rank: int) -> str:
    if not store.check([_last_key(rank)]):
        return "has entered none before"
    last = decode_call(store.get(_last_key(rank)))
    return f"was last in {last.name} (call {last.number})"
