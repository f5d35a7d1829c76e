"""Tensors written to safetensors files, of any dtype, stride, shape and sharing; `stored` reads them.

The writer takes the bytes in pieces, so that it needs memory for one of them alone, and the digest is taken while the
bytes pass. Dtypes that the format does not know are stored as bytes, their names in the
metadata.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from lightrft.backends.checkpointing.lossless import dumps
from lightrft.errors import CheckpointError, UnsupportedError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = [
    "DTYPES",
    "RAW",
    "Described",
    "bytes_of",
    "require_plain",
    "safetensors_chunks",
    "writing_order",
]

RAW = "lightrft.raw"
"""Key of the header's metadata under which stand the dtypes and shapes of what is stored as bytes."""


class Described(Protocol):
    """What a header says of a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...  # noqa: D102 (torch's)
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102


# what every safetensors from 0.5 on reads
DTYPES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""The format's name of each dtype that it knows."""


def require_plain(tensor: torch.Tensor, name: str) -> None:
    """Check that a tensor's bytes are its values.

    Args:
        tensor: what is to be saved or restored.
        name: what it is called in the error.

    Raises:
        UnsupportedError: it is sparse, quantized, without memory, or a wrapper such as a shard of a distributed tensor.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnsupportedError(f"{name} is sparse or quantized (layout {tensor.layout}); save a dense tensor.")
    if tensor.is_meta:
        raise UnsupportedError(f"{name} is on the meta device and has no values; give it memory first (`to_empty`).")
    if getattr(type(tensor), "__torch_dispatch__") is not getattr(torch.Tensor, "__torch_dispatch__"):  # noqa: B009 (pyright binds it)
        raise UnsupportedError(f"{name} is a {type(tensor).__name__}, which wraps other tensors; unwrap it first.")


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values in row-major order as uint8 (size,), in its own memory if they lie there like that.

    Args:
        tensor: plain, of any dtype and stride.
    """
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.stride() != (1,):  # one element counts as contiguous whatever its stride, and has no other view
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def writing_order(tensors: Mapping[str, Described]) -> list[str]:
    """Return the names of tensors in the order in which a file of them has their bytes.

    The largest elements come first: then every tensor starts at a multiple of its element size, as mapping readers need
    it.

    Args:
        tensors: by name.
    """

    def place(name: str) -> tuple[int, str]:
        dtype = tensors[name].dtype
        return (-dtype.itemsize if dtype in DTYPES else 0, name)

    return sorted(tensors, key=place)


def safetensors_chunks(
    tensors: Mapping[str, Described],
    pieces: Iterable[torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a safetensors file; a chunk keeps its memory.

    Args:
        tensors: by name.
        pieces: their bytes in `writing_order`, as uint8 (size,) on the CPU, cut anywhere, though each piece is of one
            tensor; no more is taken than belongs to this file.
        metadata: strings of the header.

    Raises:
        CheckpointError: the pieces are not as long as what was said of the tensors.
    """
    names = writing_order(tensors)
    header = dumps(_header({name: tensors[name] for name in names}, metadata or {})).rstrip()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    coming = iter(pieces)
    for name in names:
        left = math.prod(tensors[name].shape) * tensors[name].dtype.itemsize
        while left > 0:
            piece = next(coming)
            left -= piece.numel()
            if left < 0:  # the header says what is written
                raise CheckpointError(f"{name} has {-left} bytes more than was said; the backend's access is wrong.")
            if piece.numel():
                yield _memory(piece)


def _header(tensors: Mapping[str, Described], metadata: Mapping[str, str]) -> dict[str, Json]:
    raw: dict[str, Json] = {
        name: {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
        if tensor.dtype not in DTYPES
    }
    notes = {**metadata, **({RAW: dumps(raw).decode().rstrip()} if raw else {})}
    header: dict[str, Json] = {"__metadata__": dict(notes)} if notes else {}
    start = 0
    for name, tensor in tensors.items():
        end = start + math.prod(tensor.shape) * tensor.dtype.itemsize
        shape: list[Json] = [end - start] if name in raw else list(tensor.shape)
        header[name] = {"dtype": DTYPES.get(tensor.dtype, "U8"), "shape": shape, "data_offsets": [start, end]}
        start = end
    return header


def _memory(piece: torch.Tensor) -> memoryview:
    # straight from memory: `Tensor.numpy` would need numpy, which is no dependency, and `bytes` a copy
    memory = (ctypes.c_ubyte * piece.numel()).from_address(piece.data_ptr())
    vars(memory)["piece"] = piece  # kept as long as any view of its memory is
    return memoryview(memory).cast("B")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
