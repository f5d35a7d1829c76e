"""Tensors in safetensors files, of any dtype, stride, shape and sharing.

The writer streams one tensor at a time, so that a model on a device needs main memory for its largest tensor alone, and
the digest is taken while the bytes pass. Dtypes that the format does not know are stored as bytes, their names in the
metadata.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open

from lightrft.backends.checkpointing.lossless import as_dict, dumps, loads
from lightrft.errors import CheckpointError, UnsupportedError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["read_tensors", "require_plain", "safetensors_chunks"]

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


def safetensors_chunks(
    tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None
) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a safetensors file; a chunk holds until the next one is asked for.

    Args:
        tensors: by name; those that share memory are written each for itself.
        metadata: strings of the header.
    """
    # the largest elements first: then every tensor starts at a multiple of its element size, as mapping readers need it
    names = sorted(tensors, key=_alignment(tensors))
    header = dumps(_header({name: tensors[name] for name in names}, metadata or {})).rstrip()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        yield from _bytes_of(tensors[name])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file, on the CPU.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is missing or not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = cast("dict[str, str] | None", file.metadata()) or {}
            tensors = {name: cast("torch.Tensor", file.get_tensor(name)) for name in cast("list[str]", file.keys())}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); load another checkpoint.") from error
    raw = as_dict(loads(metadata.get(_RAW, "{}").encode(), source=str(path)), source=str(path))
    return {name: _from_raw(tensor, raw[name]) if name in raw else tensor for name, tensor in tensors.items()}


def _alignment(tensors: Mapping[str, torch.Tensor]) -> Callable[[str], tuple[int, str]]:
    def key(name: str) -> tuple[int, str]:
        tensor = tensors[name]
        return (-tensor.element_size() if tensor.dtype in _DTYPES else 0, name)

    return key


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, Json]:
    raw: dict[str, Json] = {
        name: {"dtype": _dtype_name(tensor), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
        if tensor.dtype not in _DTYPES
    }
    notes = {**metadata, **({_RAW: dumps(raw).decode().rstrip()} if raw else {})}
    header: dict[str, Json] = {"__metadata__": dict(notes)} if notes else {}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        shape: list[Json] = [end - start] if name in raw else list(tensor.shape)
        header[name] = {"dtype": _DTYPES.get(tensor.dtype, "U8"), "shape": shape, "data_offsets": [start, end]}
        start = end
    return header


def _bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    size = dense.numel() * dense.element_size()
    if size:
        # straight from memory: `Tensor.numpy` would need numpy, which is no dependency, and `bytes` a copy
        yield memoryview((ctypes.c_ubyte * size).from_address(dense.data_ptr())).cast("B")


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _from_raw(tensor: torch.Tensor, description: Json) -> torch.Tensor:
    fields = as_dict(description, source=_RAW)
    dtype = getattr(torch, str(fields.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"dtype={fields.get('dtype')!r} is unknown to torch {torch.__version__}; install a newer torch."
        )
    return tensor.clone().view(dtype).reshape(cast("list[int]", fields.get("shape")))
