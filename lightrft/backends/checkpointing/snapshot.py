"""What a checkpoint holds, copied into main memory, so that training may go on while it is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import attrs
import torch

from lightrft.backends.checkpointing.access import LiveTensor, Part
from lightrft.backends.checkpointing.turns import Computation, Range, Turn
from lightrft.backends.checkpointing.writing import CheckpointContent
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.collectives import World

__all__ = ["Snapshot", "snapshot_of"]


@attrs.frozen(kw_only=True, eq=False)
class Snapshot:
    """Content that becomes independent of the live state.

    Attributes:
        content: what is written; to be read after `copy`. It alone holds the copies.
        copy: copies what was not copied at once; callable from another thread, once, while nothing of it is changed.
    """

    content: CheckpointContent
    copy: Callable[[], None]


@attrs.define(kw_only=True, eq=False)
class _Copy:
    """Values on their way into main memory.

    Attributes:
        name: what they are called in errors.
        values: the live ones, until they are copied.
        start: number of the first of them in the whole tensor.
        is_live: whether they are not copied yet.
        counted: where torch counts the writes to the live values.
        versions: how many there had been.
    """

    name: str
    values: torch.Tensor
    start: int
    is_live: bool
    counted: list[torch.Tensor]
    versions: list[int]


def snapshot_of(content: CheckpointContent, world: World) -> Snapshot:
    """Return content whose tensors are copies of this rank's parts.

    What a forward pass may change, or a backward pass, is copied now; the rest, which only a step, an average, a load
    or a move changes, when `copy` is called.

    Args:
        content: its tensors live ones.
        world: this process's place.
    """
    copies: deque[_Copy] = deque()
    stream = torch.cuda.current_stream() if _uses_cuda() else None
    turns = _with_copies(content.agreed.turns, world, copies)
    gradients = {
        file: {name: gradient.detach().clone() for name, gradient in table.items()}
        for file, table in content.gradients.items()
    }

    def copy() -> None:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            while copies:
                _copy(copies.popleft())
            for table in gradients.values():
                table.update({name: gradient.cpu() for name, gradient in table.items()})

    return Snapshot(
        content=attrs.evolve(content, agreed=attrs.evolve(content.agreed, turns=turns), gradients=gradients),
        copy=copy,
    )


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch leaves it unannotated


def _with_copies(turns: Sequence[Turn], world: World, copies: deque[_Copy]) -> deque[Turn]:
    known: dict[LiveTensor, LiveTensor] = {}
    replaced: deque[Turn] = deque()

    def copied(ranges: Sequence[Range]) -> Sequence[Range]:
        for each in ranges:
            if each.tensor not in known:
                known[each.tensor] = _copied(each, world, copies)
        return [attrs.evolve(each, tensor=known[each.tensor]) for each in ranges]

    for turn in turns:
        if isinstance(turn, Computation):
            sources = {key: copied(ranges) for key, ranges in turn.sources.items()}
            replaced.append(attrs.evolve(turn, sources=sources))
        else:
            replaced.append(copied(turn))
    return replaced


def _copied(each: Range, world: World, copies: deque[_Copy]) -> LiveTensor:
    tensor = each.tensor
    if tensor.is_whole and world.rank != 0:  # which rank 0 alone reads
        return tensor
    part = tensor.part()
    live = part.values.detach()
    is_now = tensor.is_buffer or live.is_inference()  # of which nobody counts the writes
    copy = _Copy(
        name=each.name,
        values=live.clone() if is_now else live,
        start=part.start,
        is_live=not is_now,
        counted=[each for each in (live, tensor.counted) if each is not None],
        versions=[],
    )
    copy.versions = _versions(copy)
    copies.append(copy)

    def copied_part() -> Part:
        return Part(values=copy.values, start=copy.start)

    return attrs.evolve(tensor, part=copied_part)


@torch.no_grad()
def _copy(copy: _Copy) -> None:
    live = copy.values
    if not copy.is_live:
        copy.values = live.cpu()
        return
    copy.values = torch.empty_like(live, device="cpu", memory_format=torch.contiguous_format).copy_(live)
    if _versions(copy) != copy.versions:
        raise CheckpointError(
            f"{copy.name} was changed while it was copied; change models and optimizers through the strategy, or call "
            "background.wait() before."
        )


def _versions(copy: _Copy) -> list[int]:
    if not copy.is_live:
        return []
    return [each._version for each in copy.counted]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # no public name
