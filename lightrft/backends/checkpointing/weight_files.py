"""How the weights of a model stand in a directory that transformers reads: one file, or several with an index.

model.safetensors                       a model that one file holds

model-00001-of-00003.safetensors        a larger one
model-00002-of-00003.safetensors
model-00003-of-00003.safetensors
model.safetensors.index.json            the file of each tensor
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from lightrft.backends.checkpointing.access import StoredTensor
from lightrft.backends.checkpointing.lossless import as_dict, dumps, loads
from lightrft.backends.checkpointing.named import difference
from lightrft.backends.checkpointing.stored import open_tensors
from lightrft.backends.checkpointing.tensor_files import Described
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["INDEX", "MAX_FILE_SIZE", "index_of", "open_weights", "split_weights"]

INDEX = "model.safetensors.index.json"
"""File that names the file of each tensor."""
# what huggingface_hub takes: a download that breaks off is repeated by the file, and some disks end files at 4 to 16 GB
MAX_FILE_SIZE = 5 * 10**9
"""Bytes of tensors that one file holds at most, unless it holds one tensor alone."""
_WEIGHTS = "model.safetensors"

_Tensor = TypeVar("_Tensor", bound=Described)


def split_weights(
    tensors: Mapping[str, _Tensor], *, max_file_size: int = MAX_FILE_SIZE
) -> dict[str, dict[str, _Tensor]]:
    """Return the tensors by file, filled in their order; a tensor that is larger than a file has one of its own.

    Args:
        tensors: by name.
        max_file_size: bytes of tensors.
    """
    parts: list[dict[str, _Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if parts[-1] and filled + _size(tensor) > max_file_size:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += _size(tensor)
    if len(parts) == 1:
        return {_WEIGHTS: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def index_of(files: Mapping[str, Mapping[str, Described]]) -> bytes | None:
    """Return the content of the index, or None where one file holds all.

    Args:
        files: tensors by file.
    """
    if len(files) == 1:
        return None
    weight_map: dict[str, Json] = {name: file for file, tensors in files.items() for name in tensors}
    total_size = sum(_size(tensor) for tensors in files.values() for tensor in tensors.values())
    return dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2)


@contextmanager
def open_weights(directory: Path) -> Generator[Mapping[str, StoredTensor], None, None]:
    """Yield the tensors of a directory by name; each is read when it is asked for, and the files stay open till then.

    Args:
        directory: with one file, or with an index and all files that it names.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is twice there or is not where the index has it.
    """
    with ExitStack() as stack:
        if not (directory / INDEX).exists():
            yield stack.enter_context(open_tensors(directory / _WEIGHTS))
            return
        weight_map = _weight_map(directory)
        opened = {
            file: stack.enter_context(open_tensors(directory / file)) for file in sorted(set(weight_map.values()))
        }
        _require_indexed(directory, weight_map, opened)
        yield {name: opened[file][name] for name, file in weight_map.items()}


def _size(tensor: Described) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _weight_map(directory: Path) -> dict[str, str]:
    index = directory / INDEX
    try:
        bytes_of_index = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}; pass another directory.") from error
    content = as_dict(loads(bytes_of_index, source=str(index)), source=str(index))
    weight_map = as_dict(content.get("weight_map"), source=str(index))
    named = {name: str(file) for name, file in weight_map.items()}
    for file in sorted(set(named.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names the file {file!r} outside of its directory; do not trust its source.")
        if not (directory / file).exists():
            raise CheckpointError(f"{index} names {file}, which is not there; download the directory again.")
    if _WEIGHTS not in named.values() and (directory / _WEIGHTS).exists():  # transformers would take that one
        raise CheckpointError(f"{directory} holds {_WEIGHTS} beside an index that does not name it; remove either.")
    return named


def _require_indexed(
    directory: Path, weight_map: Mapping[str, str], opened: Mapping[str, Mapping[str, StoredTensor]]
) -> None:
    advice = "download the directory again"
    places: dict[str, str] = {}
    for file, tensors in opened.items():
        for name in tensors:
            other = places.setdefault(name, file)
            if other != file:
                raise CheckpointError(f"{directory}: {name} stands in {other} and in {file}; {advice}.")
    for name, file in weight_map.items():
        if places.get(name, file) != file:
            raise CheckpointError(
                f"{directory}: {INDEX} has {name} in {file}, and it stands in {places[name]}; {advice}."
            )
    words = difference(saved=dict.fromkeys(places, "tensor"), live=dict.fromkeys(weight_map, "tensor"))
    if words is not None:
        raise CheckpointError(f"{directory}: the files of {INDEX} {words} in the index; {advice}.")
