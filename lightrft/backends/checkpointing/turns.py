"""What of the tensors of some files is gathered at once, for the rank that writes them.

Several small tensors go together, a run of a large one goes alone, and what is computed of others goes with all of
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import attrs
import torch

from lightrft.backends.checkpointing.access import LiveTensor, Part
from lightrft.backends.checkpointing.named import describe
from lightrft.backends.checkpointing.tensor_files import Described, writing_order
from lightrft.errors import CheckpointError

__all__ = [
    "BUCKET_SIZE",
    "PIECE_SIZE",
    "Computation",
    "Compute",
    "Computed",
    "Gatherable",
    "Range",
    "Turn",
    "checked_part",
    "size_of",
    "turns_of",
    "words_of",
]

BUCKET_SIZE = 64 << 20
"""Bytes that a rank may need beside its parts, twice: while one bucket is written, nothing else is gathered."""
# collectives hold up to six copies of what they move: packed, padded, received, unpacked and put together; and what is
# freed between them does not all go back to the system: twelve times a piece were seen
PIECE_SIZE = BUCKET_SIZE // 16
"""Bytes of tensors that are gathered at once; large enough for a link, and for a disk, to be kept busy."""


class Compute(Protocol):
    """Makes a tensor of others."""

    def __call__(self, tensors: Mapping[str, torch.Tensor], /) -> torch.Tensor:
        """Return the tensor; called on the rank that writes.

        Args:
            tensors: the sources, whole, on the CPU, in memory of their own.

        Raises:
            CheckpointError: it cannot be made.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class Computed:
    """A tensor that is made of live ones when it is written.

    Attributes:
        shape: of the tensor.
        dtype: of its elements.
        sources: what it is made of.
        compute: makes it.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    sources: Mapping[str, LiveTensor]
    compute: Compute


Gatherable: TypeAlias = LiveTensor | Computed
"""What can be written to a file."""


@attrs.frozen(kw_only=True, eq=False)
class Range:
    """A run of a tensor's bytes.

    Attributes:
        name: of the tensor, for errors.
        tensor: what this rank has of it.
        begin: first byte.
        end: the one after the last.
        spans: bytes that each rank has, from where to where; None where every rank has all of them.
    """

    name: str
    tensor: LiveTensor
    begin: int
    end: int
    spans: Sequence[tuple[int, int]] | None


@attrs.frozen(kw_only=True, eq=False)
class Computation:
    """A tensor that is computed of whole ones."""

    name: str
    tensor: Computed
    sources: Mapping[str, Sequence[Range]]


Turn: TypeAlias = "Sequence[Range] | Computation"
"""What is gathered at once."""


def size_of(tensor: Described) -> int:
    """Return the bytes of a tensor.

    Args:
        tensor: by shape and dtype.
    """
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def checked_part(name: str, tensor: LiveTensor) -> Part:
    """Return what this rank has of a tensor.

    Args:
        name: what it is called in the error.
        tensor: the tensor.

    Raises:
        CheckpointError: it is not what was said.
    """
    part, size = tensor.part(), math.prod(tensor.shape)
    is_fit = part.values.numel() == size if tensor.is_whole else part.start + part.values.numel() <= size
    if part.values.dtype != tensor.dtype or not is_fit:
        raise CheckpointError(
            f"{name} was said to be {words_of(tensor)} and is read as {words_of(part.values)}; the backend's access is "
            "wrong."
        )
    return part


def words_of(tensor: Described) -> str:
    """Return dtype and shape in words.

    Args:
        tensor: by shape and dtype.
    """
    return next(iter(describe({"": tensor}).values()))


def turns_of(
    tables: Mapping[str, Mapping[str, Gatherable]], spans: Mapping[LiveTensor, Sequence[tuple[int, int]]]
) -> Iterator[Turn]:
    """Yield what is gathered at once, in the order in which files take it.

    Args:
        tables: tensors by file and name.
        spans: bytes that each rank has, from where to where, of tensors that no rank has as a whole.
    """
    ranges: list[Range] = []
    filled = 0
    for table in tables.values():
        for name in writing_order(table):
            tensor = table[name]
            if isinstance(tensor, Computed):
                yield ranges
                ranges, filled = [], 0
                sources = {key: [*_ranges(key, source, spans)] for key, source in tensor.sources.items()}
                yield Computation(name=name, tensor=tensor, sources=sources)
                continue
            for each in _ranges(name, tensor, spans):
                if filled + each.end - each.begin > PIECE_SIZE:
                    yield ranges
                    ranges, filled = [], 0
                ranges.append(each)
                filled += each.end - each.begin
    yield ranges


def _ranges(name: str, tensor: LiveTensor, spans: Mapping[LiveTensor, Sequence[tuple[int, int]]]) -> Iterator[Range]:
    size = size_of(tensor)
    step = size if tensor.is_whole else PIECE_SIZE  # what is there already need not be cut
    for begin in range(0, size, step or 1):
        yield Range(name=name, tensor=tensor, begin=begin, end=min(begin + step, size), spans=spans.get(tensor))
