"""`save_model` and `load_model`: weights in the layout that transformers and the inference engines read."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from torch import nn

from lightrft.backends.checkpointing.agreement import together
from lightrft.backends.checkpointing.durable import (
    commit,
    disk_errors,
    make_directory,
    remove_leftovers,
    staging,
    sync_tree,
    write_file,
)
from lightrft.backends.checkpointing.lossless import as_dict, loads
from lightrft.backends.checkpointing.named import NamedState, describe, difference, named_state
from lightrft.backends.checkpointing.randomness import set_up_quietly
from lightrft.backends.checkpointing.restore import copy_plan
from lightrft.backends.checkpointing.tensor_files import read_tensors, safetensors_chunks
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json, LoadModel, SaveModel, SavesTokenizer
from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.training import UnwrapModel

__all__ = ["build_load_model", "build_save_model"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@runtime_checkable
class _SavesItself(Protocol):
    def save_pretrained(self, save_directory: str, /) -> object: ...


def build_save_model(collectives: Collectives, unwrap_model: UnwrapModel) -> SaveModel:
    """Return `save_model`; rank 0 writes.

    Args:
        collectives: what the ranks do together.
        unwrap_model: undoes `prepare`.
    """

    def save_model(
        model: nn.Module, output_dir: str | os.PathLike[str], *, tokenizer: SavesTokenizer | None = None
    ) -> Path:
        plain = unwrap_model(model)
        is_first = set_up_quietly(collectives).rank == 0

        def save() -> dict[str, Json]:
            if is_first:
                advice = "free space or choose another directory; nothing was left behind"
                with disk_errors("output_dir", Path(output_dir), advice=advice):
                    _export(plain, Path(output_dir).resolve(), tokenizer)
            return {}

        together(collectives, save)
        return Path(output_dir)

    return save_model


def build_load_model(collectives: Collectives, unwrap_model: UnwrapModel) -> LoadModel:
    """Return `load_model`; every rank reads.

    Args:
        collectives: what the ranks do together.
        unwrap_model: undoes `prepare`.
    """

    def load_model(model: nn.Module, load_dir: str | os.PathLike[str]) -> None:
        plain = unwrap_model(model)
        set_up_quietly(collectives)
        directory = Path(load_dir)
        saved: dict[str, torch.Tensor] = {}

        def read() -> dict[str, Json]:
            saved.update(_matched(_weights(directory), named_state(plain, owner="model"), directory))
            return {}

        together(collectives, read)
        live = named_state(plain, owner="model").tensors
        copies = [copy_plan(tensor, saved[name], f"{directory}: {name}") for name, tensor in live.items()]
        with torch.no_grad():
            for copy_into in copies:
                copy_into()

    return load_model


def _export(model: nn.Module, target: Path, tokenizer: SavesTokenizer | None) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"output_dir={str(target)!r} is not an empty directory; nothing is overwritten, choose another."
        )
    make_directory(target.parent)
    remove_leftovers(target.parent, re.escape(target.name))
    with staging(target) as content:
        _write_configs(model, content)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(content))
        # transformers asks which framework wrote a file
        write_file(content / _WEIGHTS, safetensors_chunks(_exported(model), metadata={"format": "pt"}))
        sync_tree(content)
        commit(content, target)


def _write_configs(model: nn.Module, content: Path) -> None:
    config = copy.deepcopy(getattr(model, "config", None))  # saving must not change the live model's
    if isinstance(config, _SavesItself):
        described = cast("dict[str, object]", vars(config))
        described["architectures"] = [type(model).__name__]
        described["dtype"] = getattr(model, "dtype", None)
        config.save_pretrained(str(content))
    generation = getattr(model, "generation_config", None)
    if isinstance(generation, _SavesItself):
        generation.save_pretrained(str(content))


def _exported(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors under the names that transformers looks for: of tied ones, not those that it fills itself."""
    state = named_state(model, owner="model")
    filled = cast("Mapping[str, str]", getattr(model, "all_tied_weights_keys", None) or {})
    names = {first: first for first in state.tensors}
    for alias, first in state.aliases.items():
        if names[first] in filled and alias not in filled:
            names[first] = alias
    return {names[first]: tensor for first, tensor in state.tensors.items()}


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    index = directory / _INDEX
    if not index.exists():
        return read_tensors(directory / _WEIGHTS)
    content = as_dict(loads(index.read_bytes(), source=str(index)), source=str(index))
    weight_map = as_dict(content.get("weight_map"), source=str(index))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted({str(name) for name in weight_map.values()}):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names the file {file!r} outside of its directory; do not trust its source.")
        tensors.update(read_tensors(directory / file))
    words = difference(saved=dict.fromkeys(tensors, "tensor"), live=dict.fromkeys(weight_map, "tensor"))
    if words is not None:
        raise CheckpointError(f"{directory}: the files of {_INDEX} {words} in the index; download it again.")
    return tensors


def _matched(saved: Mapping[str, torch.Tensor], live: NamedState, directory: Path) -> dict[str, torch.Tensor]:
    """Return the saved tensors under the live first names, each tied tensor from any of its names."""
    matched: dict[str, torch.Tensor] = {}
    for name, tensor in saved.items():
        first = live.aliases.get(name, name)
        if first in matched and not torch.equal(matched[first], tensor):
            raise CheckpointError(
                f"{directory}: {name} and {first} differ, and the model ties them; load an untied model."
            )
        matched.setdefault(first, tensor)
    words = difference(saved=describe(matched), live=describe(live.tensors))
    if words is not None:
        raise CheckpointError(f"load_dir={str(directory)!r} {words}; load the weights of this model, in its dtype.")
    return matched
