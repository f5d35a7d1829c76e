"""Tensors in safetensors files, of any dtype, stride, shape and sharing.

The writer takes the bytes in pieces, so that it needs memory for one of them alone, and the digest is taken while the
bytes pass. Dtypes that the format does not know are stored as bytes, their names in the
metadata.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from lightrft.backends.checkpointing.access import WholeTensor
from lightrft.backends.checkpointing.lossless import as_dict, dumps, loads
from lightrft.errors import CheckpointError, UnsupportedError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = [
    "Described",
    "bytes_of",
    "open_tensors",
    "read_tensors",
    "require_plain",
    "safetensors_chunks",
    "stored_tensors",
    "writing_order",
]


class Described(Protocol):
    """What a header says of a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...  # noqa: D102 (torch's)
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102


class _Header(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _OpenFile(Protocol):
    def metadata(self) -> dict[str, str] | None: ...
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str, /) -> _Header: ...
    def get_tensor(self, name: str, /) -> torch.Tensor: ...


_RAW = "lightrft.raw"

# what every safetensors from 0.5 on reads
_DTYPES: Mapping[torch.dtype, str] = {
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
_DTYPE_NAMES = {name: dtype for dtype, name in _DTYPES.items()}


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
        return (-dtype.itemsize if dtype in _DTYPES else 0, name)

    return sorted(tensors, key=place)


def safetensors_chunks(
    tensors: Mapping[str, Described],
    pieces: Iterable[torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a safetensors file; a chunk holds until the next one is asked for.

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


@contextmanager
def open_tensors(path: Path) -> Generator[Mapping[str, WholeTensor], None, None]:
    """Yield what a safetensors file holds; each tensor is read when it is asked for, on the CPU.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is missing or not a whole safetensors file.
    """
    try:
        opened = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); load another checkpoint.") from error
    with opened as described:
        file = cast("_OpenFile", described)
        metadata = file.metadata() or {}
        raw = as_dict(loads(metadata.get(_RAW, "{}").encode(), source=str(path)), source=str(path))
        yield {name: _stored(file, name, raw.get(name)) for name in file.keys()}  # noqa: SIM118 (no iterator)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file, on the CPU.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is missing or not a whole safetensors file.
    """
    with open_tensors(path) as tensors:
        return {name: tensor.read() for name, tensor in tensors.items()}


def stored_tensors(path: Path) -> dict[str, WholeTensor]:
    """Return the tensors of a safetensors file, in its order; each is read when it is asked for, and not kept.

    Args:
        path: the file; it is opened again for each tensor.

    Raises:
        CheckpointError: it is missing or not a whole safetensors file.
    """
    with open_tensors(path) as tensors:
        return {name: _read_again(path, name, tensor) for name, tensor in tensors.items()}


def _read_again(path: Path, name: str, tensor: WholeTensor) -> WholeTensor:
    def read() -> torch.Tensor:
        with open_tensors(path) as tensors:
            return tensors[name].read()

    return WholeTensor(shape=tensor.shape, dtype=tensor.dtype, read=read)


def _header(tensors: Mapping[str, Described], metadata: Mapping[str, str]) -> dict[str, Json]:
    raw: dict[str, Json] = {
        name: {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
        if tensor.dtype not in _DTYPES
    }
    notes = {**metadata, **({_RAW: dumps(raw).decode().rstrip()} if raw else {})}
    header: dict[str, Json] = {"__metadata__": dict(notes)} if notes else {}
    start = 0
    for name, tensor in tensors.items():
        end = start + math.prod(tensor.shape) * tensor.dtype.itemsize
        shape: list[Json] = [end - start] if name in raw else list(tensor.shape)
        header[name] = {"dtype": _DTYPES.get(tensor.dtype, "U8"), "shape": shape, "data_offsets": [start, end]}
        start = end
    return header


def _memory(piece: torch.Tensor) -> memoryview:
    # straight from memory: `Tensor.numpy` would need numpy, which is no dependency, and `bytes` a copy
    return memoryview((ctypes.c_ubyte * piece.numel()).from_address(piece.data_ptr())).cast("B")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored(file: _OpenFile, name: str, raw: Json) -> WholeTensor:
    """Return the description of a tensor of an open file, from the header alone."""
    if raw is not None:
        fields = as_dict(raw, source=_RAW)
        dtype, shape = _raw_dtype(fields), cast("list[int]", fields.get("shape"))

        def read_raw() -> torch.Tensor:
            return file.get_tensor(name).clone().view(dtype).reshape(shape)

        return WholeTensor(shape=shape, dtype=dtype, read=read_raw)

    def read() -> torch.Tensor:
        return file.get_tensor(name)

    header = file.get_slice(name)
    known = _DTYPE_NAMES.get(header.get_dtype())  # others write dtypes that are not written here
    return WholeTensor(shape=header.get_shape(), dtype=known or read().dtype, read=read)


def _raw_dtype(fields: Mapping[str, Json]) -> torch.dtype:
    dtype = getattr(torch, str(fields.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"dtype={fields.get('dtype')!r} is unknown to torch {torch.__version__}; install a newer torch."
        )
    return dtype
