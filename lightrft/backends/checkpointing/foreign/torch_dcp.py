"""Directories of `torch.distributed.checkpoint`: `.metadata` says where the parts of each tensor lie in other files.

A part is a file of `torch.save` of its own, in the midst of a larger file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TypeAlias, cast

import attrs
import torch

from lightrft.backends.checkpointing.foreign.opcodes import to_protocol_2
from lightrft.backends.checkpointing.foreign.record import ForeignTensor
from lightrft.backends.checkpointing.foreign.restricted import as_torch_file, is_stand_in, read_restricted, state_of
from lightrft.backends.checkpointing.tensor_files import require_plain
from lightrft.errors import CheckpointError

__all__ = ["METADATA", "KeyPath", "Leaves", "read_leaves"]

METADATA = ".metadata"
"""File that makes a directory one of `torch.distributed.checkpoint`."""

KeyPath: TypeAlias = tuple[str | int, ...]
"""Keys of the nested dictionaries and lists that were saved, from the outermost in."""

_CLASSES = "torch.distributed.checkpoint.metadata."
_TENSOR, _VALUE, _CHUNK = (f"{_CLASSES}{kind}StorageMetadata" for kind in ("Tensor", "Bytes", "Chunk"))
_ALL, _PROPERTIES, _INDEX = (f"{_CLASSES}{name}" for name in ("Metadata", "TensorProperties", "MetadataIndex"))
_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"
# a path says where it was saved, and is not followed
_PATHS = [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")]
_STAND_INS = (
    *(_ALL, _INDEX, _TENSOR, _VALUE, _CHUNK, _PROPERTIES, _PLACE, *_PATHS),
    *(f"{_CLASSES}_MEM_FORMAT_ENCODING", f"{_CLASSES}StorageMeta"),
)


@attrs.frozen(kw_only=True, eq=False)
class Leaves:
    """What was saved, by where it stood.

    Attributes:
        tensors: put together from their parts when they are read.
        values: functions that read what is no tensor.
    """

    tensors: Mapping[KeyPath, ForeignTensor]
    values: Mapping[KeyPath, Callable[[], object]]


@attrs.frozen(kw_only=True)
class _Place:
    """Where a part lies."""

    path: Path
    offset: int
    length: int


@attrs.frozen(kw_only=True, eq=False)
class _Chunk:
    """A part of a tensor."""

    offsets: torch.Size
    sizes: torch.Size
    place: _Place


_Places: TypeAlias = Mapping[tuple[str, torch.Size | None], _Place]


def read_leaves(directory: Path) -> Leaves:
    """Return what a directory holds; of its tensors nothing is read yet.

    Args:
        directory: it has `.metadata`.

    Raises:
        CheckpointError: `.metadata` is damaged or names what it should not, or a file is missing or too short.
    """
    path = directory / METADATA
    metadata = _read_metadata(path)
    described = cast("dict[str, object]", metadata["state_dict_metadata"])
    paths = cast("dict[str, KeyPath]", metadata.get("planner_data") or {})
    places = _places(directory, cast("dict[object, object]", metadata["storage_data"]))
    tensors: dict[KeyPath, ForeignTensor] = {}
    values: dict[KeyPath, Callable[[], object]] = {}
    for name, kind in described.items():
        where = tuple(paths.get(name, (name,)))
        if is_stand_in(kind, _VALUE):
            values[where] = _reads_value(places[name, None], source=f"{directory}: {name}")
        else:
            tensors[where] = _tensor(name, cast("dict[str, object]", state_of(kind, _TENSOR)), places, directory)
    return Leaves(tensors=tensors, values=values)


def _read_metadata(path: Path) -> dict[str, object]:
    try:
        stream = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; copy the directory again.") from error
    bare = as_torch_file(to_protocol_2(stream, source=str(path)))
    return cast("dict[str, object]", state_of(read_restricted(bare, source=str(path), stand_ins=_STAND_INS), _ALL))


def _places(directory: Path, stored: Mapping[object, object]) -> _Places:
    places: dict[tuple[str, torch.Size | None], _Place] = {}
    sizes: dict[str, int] = {}
    for index, place in stored.items():
        of_index = cast("dict[str, object]", state_of(index, _INDEX))
        of_place = cast("dict[str, object]", state_of(place, _PLACE))
        file, offset, length = str(of_place["relative_path"]), of_place["offset"], of_place["length"]
        if not isinstance(offset, int) or not isinstance(length, int) or min(offset, length) < 0:
            raise TypeError(f"a part of {file} lies at {offset!r} and has {length!r} bytes")
        if of_place.get("transform_descriptors"):
            raise CheckpointError(f"{directory / file} was written through an extension; save it without extensions.")
        if file not in sizes:
            sizes[file] = _size(directory, file)
        if offset + length > sizes[file]:
            raise CheckpointError(f"{directory / file} is cut off; copy the directory again.")
        start = cast("torch.Size | None", of_index.get("offset"))
        places[str(of_index["fqn"]), start] = _Place(path=directory / file, offset=offset, length=length)
    return places


def _size(directory: Path, file: str) -> int:
    if Path(file).name != file:
        raise CheckpointError(
            f"{directory / METADATA} names the file {file!r} outside of its directory; do not trust its source."
        )
    if not (directory / file).is_file():
        raise CheckpointError(f"{directory / METADATA} names {file}, which is not there; copy the directory again.")
    return (directory / file).stat().st_size


def _tensor(name: str, described: Mapping[str, object], places: _Places, directory: Path) -> ForeignTensor:
    shape = torch.Size(cast("torch.Size", described["size"]))
    dtype = cast("tuple[torch.dtype, ...]", state_of(described["properties"], _PROPERTIES))[0]
    if not isinstance(cast("object", dtype), torch.dtype):
        raise TypeError(f"{name} has the dtype {dtype!r}")
    chunks: list[_Chunk] = []
    for chunk in cast("list[object]", described["chunks"]):
        state = cast("dict[str, torch.Size]", state_of(chunk, _CHUNK))
        offsets, sizes = torch.Size(state["offsets"]), torch.Size(state["sizes"])
        place = places[name, offsets] if (name, offsets) in places else places[name, None]
        chunks.append(_Chunk(offsets=offsets, sizes=sizes, place=place))
    source = f"{directory}: {name}"
    _require_sizes(shape, dtype, chunks, source)

    def read() -> torch.Tensor:
        return _read_tensor(shape, dtype, chunks, source)

    return ForeignTensor(shape=shape, dtype=dtype, read=read)


def _require_sizes(shape: torch.Size, dtype: torch.dtype, chunks: list[_Chunk], source: str) -> None:
    """Check that the parts can make up the whole, before any memory is taken for it."""
    sizes = [chunk.sizes.numel() for chunk in chunks]
    is_too_short = any(size * dtype.itemsize > chunk.place.length for size, chunk in zip(sizes, chunks, strict=True))
    if is_too_short or sum(sizes) != shape.numel():
        raise CheckpointError(f"{source} has not the elements of its shape {list(shape)}; copy the directory again.")


def _read_tensor(shape: torch.Size, dtype: torch.dtype, chunks: list[_Chunk], source: str) -> torch.Tensor:
    whole = torch.empty(shape, dtype=dtype)
    is_there = torch.zeros(shape, dtype=torch.bool)
    for chunk in chunks:
        part = _read(chunk.place, source)
        if not isinstance(part, torch.Tensor) or part.dtype != dtype or part.shape != chunk.sizes:
            raise CheckpointError(f"{source} has a part that is not what {METADATA} says; copy the directory again.")
        require_plain(part, source)
        where = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        if whole[where].shape != part.shape:
            raise CheckpointError(f"{source} has a part outside of its shape {list(shape)}; copy the directory again.")
        whole[where], is_there[where] = part, True
    if not is_there.all():
        raise CheckpointError(f"{source} lacks some of its elements; copy the directory again.")
    return whole


def _reads_value(place: _Place, *, source: str) -> Callable[[], object]:
    def read_value() -> object:
        return _read(place, source)

    return read_value


def _read(place: _Place, source: str) -> object:
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
    except OSError as error:
        raise CheckpointError(f"{place.path} cannot be read: {error.strerror}; copy the directory again.") from error
    return read_restricted(BytesIO(content), source=source)
