"""`save_model` and `load_model`: weights in the layout that transformers and the inference engines read."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from torch import nn

from lightrft.backends.checkpointing.access import ModelState, StateAccess, WholeTensor
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
from lightrft.backends.checkpointing.gathering import agreed_tables, taking_turns
from lightrft.backends.checkpointing.lossless import as_dict, loads
from lightrft.backends.checkpointing.named import describe, difference
from lightrft.backends.checkpointing.tensor_files import read_tensors, safetensors_chunks
from lightrft.backends.world import world_of
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import Json, LoadModel, SaveModel, SavesTokenizer
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["build_load_model", "build_save_model"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@runtime_checkable
class _SavesItself(Protocol):
    def save_pretrained(self, save_directory: str, /) -> object: ...


def build_save_model(collectives: Collectives, access: StateAccess) -> SaveModel:
    """Return `save_model`; rank 0 writes.

    Args:
        collectives: what the ranks do together.
        access: what a backend knows of live tensors.
    """

    def save_model(
        model: nn.Module, output_dir: str | os.PathLike[str], *, tokenizer: SavesTokenizer | None = None
    ) -> Path:
        plain = access.unwrap_model(model)
        is_first = world_of(collectives).rank == 0

        def describe_live() -> dict[str, Mapping[str, WholeTensor]]:
            return {_WEIGHTS: _exported(plain, access.model_state(model, owner="model"))}

        tables = agreed_tables(collectives, describe_live)

        def save() -> dict[str, Json]:
            advice = "free space or choose another directory; nothing was left behind"
            with disk_errors("output_dir", Path(output_dir), advice=advice), taking_turns(tables) as in_turn:
                if is_first:
                    # transformers asks which framework wrote a file
                    weights = safetensors_chunks(tables[_WEIGHTS], metadata={"format": "pt"}, in_turn=in_turn)
                    _export(plain, weights, _dtype(tables[_WEIGHTS]), Path(output_dir).resolve(), tokenizer)
            return {}

        together(collectives, save)
        return Path(output_dir)

    return save_model


def build_load_model(collectives: Collectives, access: StateAccess) -> LoadModel:
    """Return `load_model`; every rank reads.

    Args:
        collectives: what the ranks do together.
        access: what a backend knows of live tensors.
    """

    def load_model(model: nn.Module, load_dir: str | os.PathLike[str]) -> None:
        world_of(collectives)
        directory = Path(load_dir)
        actions: list[Callable[[], None]] = []

        def read() -> dict[str, Json]:
            live = access.model_state(model, owner="model")
            saved = _matched(_weights(directory), live, directory)
            actions.extend(live.plan_tensor(name, saved[name], source=f"{directory}: {name}") for name in live.tensors)
            return {}

        together(collectives, read)
        with torch.no_grad():
            for action in actions:
                action()

    return load_model


def _export(
    model: nn.Module,
    weights: Iterator[memoryview | bytes],
    dtype: torch.dtype | None,
    target: Path,
    tokenizer: SavesTokenizer | None,
) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"output_dir={str(target)!r} is not an empty directory; nothing is overwritten, choose another."
        )
    make_directory(target.parent)
    remove_leftovers(target.parent, re.escape(target.name))
    with staging(target) as content:
        _write_configs(model, dtype, content)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(content))
        write_file(content / _WEIGHTS, weights)
        sync_tree(content)
        commit(content, target)


def _write_configs(model: nn.Module, dtype: torch.dtype | None, content: Path) -> None:
    config = copy.deepcopy(getattr(model, "config", None))  # saving must not change the live model's
    if isinstance(config, _SavesItself):
        described = cast("dict[str, object]", vars(config))
        described["architectures"] = [_architecture(model)]
        described["dtype"] = dtype
        config.save_pretrained(str(content))
    generation = getattr(model, "generation_config", None)
    if isinstance(generation, _SavesItself):
        generation.save_pretrained(str(content))


def _architecture(model: nn.Module) -> str:
    # `fully_shard` puts a class of its own before the model's
    names = [
        kind.__name__ for kind in type(model).__mro__ if "FSDPModule" not in {base.__name__ for base in kind.__mro__}
    ]
    return names[0]


def _dtype(tensors: Mapping[str, WholeTensor]) -> torch.dtype | None:
    return next((tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point), None)


def _exported(model: nn.Module, state: ModelState) -> dict[str, WholeTensor]:
    """Return the tensors under the names that transformers looks for: of tied ones, not those that it fills itself."""
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


def _matched(saved: Mapping[str, torch.Tensor], live: ModelState, directory: Path) -> dict[str, torch.Tensor]:
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
