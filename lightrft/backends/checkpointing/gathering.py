"""Whole tensors out of the parts that ranks have, in pieces, for the one rank that writes.

What every rank has is not sent. Of the rest, pieces of a constant size are gathered one after the other, several small
tensors or a run of a large one in each; ranks that do not write drop them at once. So beside its own parts no rank
needs more memory than for two buckets, however large the tensors are.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import attrs
import torch

from lightrft.backends.checkpointing.access import LiveTensor
from lightrft.backends.checkpointing.agreement import together
from lightrft.backends.checkpointing.lossless import dumps
from lightrft.backends.checkpointing.named import describe
from lightrft.backends.checkpointing.parts import gather_turn
from lightrft.backends.checkpointing.tensor_files import Described
from lightrft.backends.checkpointing.turns import Gatherable, Turn, checked_part, size_of, turns_of
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json
from lightrft.strategy.protocols.collectives import Collectives, World

__all__ = ["Agreed", "agreed_tables", "taking_turns"]


@attrs.frozen(kw_only=True, eq=False)
class Agreed:
    """What all ranks have said alike that they will write.

    Attributes:
        tables: shapes and dtypes by file and name.
        turns: how the bytes are gathered, in the order in which the files take them; `taking_turns` empties it.
    """

    tables: Mapping[str, Mapping[str, Described]]
    turns: deque[Turn]


@attrs.frozen(kw_only=True, eq=False)
class _Form:
    shape: Sequence[int]
    dtype: torch.dtype


def agreed_tables(
    collectives: Collectives, world: World, describe_live: Callable[[], Mapping[str, Mapping[str, Gatherable]]]
) -> Agreed:
    """Return tables of tensors by file, which are the same on all ranks, and how they are gathered.

    Args:
        collectives: what the ranks do together.
        world: this process's place.
        describe_live: makes the tables of this rank.

    Raises:
        LightRFTError: this rank could not make them.
        CheckpointError: another could not, or made others; or the ranks' parts do not make up a tensor.
    """
    tables: dict[str, Mapping[str, Gatherable]] = {}
    mine: list[tuple[int, int]] = []

    def tell() -> dict[str, Json]:
        tables.update(describe_live())
        mine.extend(_own_span(name, tensor) for tensor, name in _tensors_in_parts(tables).items())
        described: list[Json] = [
            [file, [[name, words, _kind(table[name])] for name, words in describe(table).items()]]
            for file, table in tables.items()
        ]
        return {"tables": hashlib.sha256(dumps(described)).hexdigest()}

    told = together(collectives, tell)
    other = next((rank for rank, one in enumerate(told) if one != told[0]), None)
    if other is not None:  # gathering them would mix their values, or wait for ever
        raise CheckpointError(
            f"rank {other} has tensors of other names, shapes or dtypes than rank 0; pass the same model on all ranks."
        )
    spans = _agreed_spans(collectives, world, _tensors_in_parts(tables), mine)
    return Agreed(
        tables={
            file: {name: _Form(shape=each.shape, dtype=each.dtype) for name, each in table.items()}
            for file, table in tables.items()
        },
        turns=deque(turns_of(tables, spans)),
    )


@contextmanager
def taking_turns(
    turns: deque[Turn], collectives: Collectives, world: World
) -> Generator[Iterator[torch.Tensor], None, None]:
    """Yield the bytes of all tensors in the order of the turns, on rank 0; what is left at the end is gathered, too.

    So a rank that writes nothing takes part, and so does one that fails halfway, before its error goes on.

    Args:
        turns: the same on all ranks; each is let go of when it has been taken, with all that it held.
        collectives: what the ranks do together.
        world: this process's place.
    """

    def pieces() -> Iterator[torch.Tensor]:
        while turns:
            yield from gather_turn(turns.popleft(), collectives, world)
            _give_back(world)

    try:
        yield pieces()
    finally:
        while turns:
            with suppress(CheckpointError):  # whoever writes it says what is wrong with it
                for _ in gather_turn(turns.popleft(), collectives, world):
                    pass
            _give_back(world)


def _give_back(world: World) -> None:
    """Let the system have what was freed: where sizes differ, glibc keeps several times as much as is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libraries have none, and need none
    if trim is not None and world.world_size > 1:
        trim(0)


def _kind(tensor: Gatherable) -> Json:
    return tensor.is_whole if isinstance(tensor, LiveTensor) else [each.is_whole for each in tensor.sources.values()]


def _tensors_in_parts(tables: Mapping[str, Mapping[str, Gatherable]]) -> dict[LiveTensor, str]:
    """Return the names of the tensors that no rank has as a whole, each tensor once, in one order on all ranks."""
    found: dict[LiveTensor, str] = {}
    for table in tables.values():
        for name, tensor in table.items():
            sources = [tensor] if isinstance(tensor, LiveTensor) else [*tensor.sources.values()]
            found |= {source: name for source in sources if not source.is_whole}
    return found


def _own_span(name: str, tensor: LiveTensor) -> tuple[int, int]:
    part, itemsize = checked_part(name, tensor), tensor.dtype.itemsize
    return part.start * itemsize, (part.start + part.values.numel()) * itemsize


def _agreed_spans(
    collectives: Collectives, world: World, tensors: Mapping[LiveTensor, str], mine: Sequence[tuple[int, int]]
) -> dict[LiveTensor, list[tuple[int, int]]]:
    """Return the bytes that each rank has of each tensor, from where to where."""
    if not tensors:
        return {}
    gathered = collectives.all_gather(torch.tensor(mine, dtype=torch.int64))
    ranks = gathered.view(world.world_size, len(tensors), 2).tolist()
    spans = {
        tensor: [(int(begin), int(end)) for begin, end in (rows[place] for rows in ranks)]
        for place, tensor in enumerate(tensors)
    }
    for tensor, name in tensors.items():
        runs = sorted(span for span in spans[tensor] if span[0] < span[1])
        # each begins where the one before it ends
        if [0, *(end for _, end in runs)] != [*(begin for begin, _ in runs), size_of(tensor)]:
            raise CheckpointError(f"the parts that the ranks have of {name} do not make it up; the backend is wrong.")
    return spans
