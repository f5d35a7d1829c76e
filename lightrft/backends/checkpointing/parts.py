"""The bytes of whole tensors out of the parts that ranks have, on the rank that writes, which is rank 0.

What every rank has is not sent. Other ranks drop at once what they have received.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lightrft.backends.checkpointing.tensor_files import bytes_of
from lightrft.backends.checkpointing.turns import (
    BUCKET_SIZE,
    PIECE_SIZE,
    Computation,
    Range,
    Turn,
    checked_part,
    words_of,
)
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.collectives import Collectives, World

__all__ = ["gather_turn"]


def gather_turn(turn: Turn, collectives: Collectives, world: World) -> Iterator[torch.Tensor]:
    """Yield the bytes of a turn on rank 0 as uint8 (size,) on the CPU, and nothing elsewhere; all ranks call it.

    All is gathered before the first are yielded, and before anything can fail.

    Args:
        turn: the same on all ranks.
        collectives: what the ranks do together.
        world: this process's place.

    Raises:
        CheckpointError: on rank 0, a tensor is not what was said, or cannot be computed.
    """
    if not isinstance(turn, Computation):
        yield from _gathered(turn, collectives, world)
        return
    sources: dict[str, torch.Tensor] = {}
    for key, ranges in turn.sources.items():  # all is gathered before anything can fail
        pieces = [piece.clone() for each in ranges for piece in _gathered([each], collectives, world)]
        if world.rank == 0:
            source = turn.tensor.sources[key]
            whole = torch.cat([torch.empty(0, dtype=torch.uint8), *pieces])
            sources[key] = whole.view(source.dtype).view(torch.Size(source.shape))
    if world.rank == 0:
        computed = turn.tensor.compute(sources)
        if (computed.dtype, tuple(computed.shape)) != (turn.tensor.dtype, tuple(turn.tensor.shape)):
            raise CheckpointError(
                f"{turn.name} was said to be {words_of(turn.tensor)} and was computed as {words_of(computed)}; pass "
                "adapters='alone'."
            )
        yield bytes_of(computed.cpu())


def _gathered(ranges: Sequence[Range], collectives: Collectives, world: World) -> Iterator[torch.Tensor]:
    sent = [each for each in ranges if each.spans is not None]
    found = _exchanged(sent, collectives, world) if sent else {}
    if world.rank == 0:
        for each in ranges:
            yield from [found[each]] if each in found else _own_pieces(each)


def _own_pieces(whole: Range) -> Iterator[torch.Tensor]:
    flat = bytes_of(checked_part(whole.name, whole.tensor).values)
    for begin in range(0, flat.numel(), BUCKET_SIZE):  # so that a device sends no more at once
        yield flat[begin : begin + BUCKET_SIZE].cpu()


def _exchanged(ranges: Sequence[Range], collectives: Collectives, world: World) -> dict[Range, torch.Tensor]:
    """Return the bytes of ranges, gathered, on the rank that writes; on others nothing."""
    own = [_own_bytes(each, world.rank) for each in ranges]
    mine = torch.cat([each.to(own[0].device) for each in own])
    lengths = [[_overlap(each, rank)[1] for each in ranges] for rank in range(world.world_size)]
    received = _received(mine, [sum(each) for each in lengths], collectives, world)
    if world.rank != 0:
        return {}
    cut = [torch.split(blob, each) for blob, each in zip(received, lengths, strict=True)]
    found: dict[Range, torch.Tensor] = {}
    for place, each in enumerate(ranges):
        ranks = [rank for rank in range(world.world_size) if lengths[rank][place]]
        ranks.sort(key=[_overlap(each, rank)[0] for rank in range(world.world_size)].__getitem__)
        pieces = [cut[rank][place] for rank in ranks]
        found[each] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).cpu()
    return found


def _overlap(each: Range, rank: int) -> tuple[int, int]:
    """Return where a rank's bytes of a range begin in the tensor, and how many there are."""
    begin, end = (each.spans or ())[rank]
    first = max(begin, each.begin)
    return first, max(0, min(end, each.end) - first)


def _own_bytes(each: Range, rank: int) -> torch.Tensor:
    (first, length), (begin, _) = _overlap(each, rank), (each.spans or ())[rank]
    flat = bytes_of(each.tensor.part().values)
    return flat[first - begin :][:length] if length else flat[:0]


def _received(
    mine: torch.Tensor, sizes: Sequence[int], collectives: Collectives, world: World
) -> Sequence[torch.Tensor]:
    """Return the bytes that each rank sends: all at once where they have about as many, or else one rank's at a time.

    Gathered at once, each rank takes the place of the one that has the most.
    """
    if world.world_size == 1:
        return [mine]
    if max(sizes) * world.world_size <= 2 * PIECE_SIZE:
        return torch.split(collectives.all_gather(mine), list(sizes))
    blobs = [mine if rank == world.rank else mine.new_empty(size) for rank, size in enumerate(sizes)]
    return [collectives.broadcast(blob, src=rank) if sizes[rank] else blob for rank, blob in enumerate(blobs)]
