"""`save_model` and `load_model`: weights in the layout that transformers and the inference engines read."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import nn

from lightrft.backends.checkpointing.access import ModelState, StateAccess, StoredTensor
from lightrft.backends.checkpointing.adapters import (
    ADAPTERS,
    Adapted,
    adapted,
    adapter_tensors,
    merged_tensors,
    write_adapter_config,
)
from lightrft.backends.checkpointing.agreement import together
from lightrft.backends.checkpointing.durable import (
    commit,
    disk_errors,
    make_directory,
    remove_leftovers,
    staging,
    sync_tree,
    write_undigested,
)
from lightrft.backends.checkpointing.gathering import agreed_tables, taking_turns
from lightrft.backends.checkpointing.named import describe, difference
from lightrft.backends.checkpointing.stored import read_stored, saying_incomplete
from lightrft.backends.checkpointing.tensor_files import Described, safetensors_chunks
from lightrft.backends.checkpointing.turns import Gatherable
from lightrft.backends.checkpointing.weight_files import (
    INDEX,
    MAX_FILE_SIZE,
    index_of,
    open_weights,
    split_weights,
)
from lightrft.backends.copying import await_copy
from lightrft.backends.world import world_of
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import AdaptersKind, Json, LoadModel, SaveModel, SavesTokenizer
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["build_load_model", "build_save_model"]


@runtime_checkable
class _SavesItself(Protocol):
    def save_pretrained(self, save_directory: str, /) -> object: ...


_Tables: TypeAlias = Mapping[str, Mapping[str, Described]]


class _WriteConfigs(Protocol):
    def __call__(self, content: Path, tables: _Tables, /) -> None: ...


def build_save_model(collectives: Collectives, access: StateAccess, *, max_file_size: int = MAX_FILE_SIZE) -> SaveModel:
    """Return `save_model`; rank 0 writes, one gathered tensor after the other.

    Args:
        collectives: what the ranks do together.
        access: what a backend knows of live tensors.
        max_file_size: bytes of tensors above which a model is written in several files.
    """

    def save_model(
        model: nn.Module,
        output_dir: str | os.PathLike[str],
        *,
        tokenizer: SavesTokenizer | None = None,
        adapters: AdaptersKind | None = None,
    ) -> Path:
        plain = access.unwrap_model(model)
        world = world_of(collectives)
        writers: list[_WriteConfigs] = []

        def describe_live() -> Mapping[str, Mapping[str, Gatherable]]:
            found, state = adapted(plain, adapters), access.model_state(model, owner="model")
            if found is not None and adapters == "alone":
                writers.append(_adapter_writer(found))
                return {ADAPTERS: adapter_tensors(found, state)}
            base = plain if found is None else found.base
            tensors, aliases = (state.tensors, state.aliases) if found is None else merged_tensors(found, state)
            writers.append(_model_writer(base))
            return split_weights(_exported(base, tensors, aliases), max_file_size=max_file_size)

        agreed = agreed_tables(collectives, world, describe_live)

        def write_rest(content: Path) -> None:
            writers[0](content, agreed.tables)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(content))

        def save() -> dict[str, Json]:
            advice = "free space or choose another directory; nothing was left behind"
            with (
                disk_errors("output_dir", Path(output_dir), advice=advice),
                taking_turns(agreed.turns, collectives, world) as pieces,
            ):
                if world.rank == 0:
                    _export(agreed.tables, pieces, write_rest, Path(output_dir).resolve())
            return {}

        together(collectives, save)
        return Path(output_dir)

    return save_model


def build_load_model(collectives: Collectives, access: StateAccess) -> LoadModel:
    """Return `load_model`; every rank reads, one tensor after the other, and keeps its own part alone.

    Args:
        collectives: what the ranks do together.
        access: what a backend knows of live tensors.
    """

    def load_model(model: nn.Module, load_dir: str | os.PathLike[str]) -> None:
        await_copy(model, access.unwrap_model(model))
        world_of(collectives)
        directory = Path(load_dir)
        plans: list[Callable[[], None]] = []
        with ExitStack() as files:

            def check() -> dict[str, Json]:
                if (directory / ADAPTERS).exists():
                    raise CheckpointError(
                        f"load_dir={str(directory)!r} holds adapters alone; load them with PeftModel.from_pretrained."
                    )
                live = access.model_state(model, owner="model")
                with disk_errors("load_dir", directory, advice="pass another directory"):
                    saved = _matched(files.enter_context(open_weights(directory)), live, directory)
                    for name in live.tensors:
                        plans.append(live.plan_tensor(name, saved[name], source=f"{directory}: {name}"))
                        read_stored(saved[name])  # nothing vouches for the files, so all is read before the first write
                return {}

            def write() -> dict[str, Json]:
                with saying_incomplete(directory):
                    for plan in plans:
                        plan()
                return {}

            with torch.no_grad():
                together(collectives, check)
                together(collectives, write)

    return load_model


def _export(
    tables: _Tables,
    pieces: Iterator[torch.Tensor],
    write_rest: Callable[[Path], None],
    target: Path,
) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"output_dir={str(target)!r} is not an empty directory; nothing is overwritten, choose another."
        )
    make_directory(target.parent)
    remove_leftovers(target.parent, re.escape(target.name))
    with staging(target) as content:
        write_rest(content)
        for file, tensors in tables.items():
            # transformers asks which framework wrote a file
            write_undigested(content / file, safetensors_chunks(tensors, pieces, metadata={"format": "pt"}))
        sync_tree(content)
        commit(content, target)


def _adapter_writer(found: Adapted) -> _WriteConfigs:
    def write(content: Path, tables: _Tables, /) -> None:
        del tables
        write_adapter_config(found, content, kind=_plain_class(found.base))

    return write


def _model_writer(model: nn.Module) -> _WriteConfigs:
    def write(content: Path, tables: _Tables, /) -> None:
        config = copy.deepcopy(getattr(model, "config", None))  # saving must not change the live model's
        if isinstance(config, _SavesItself):
            described = cast("dict[str, object]", vars(config))
            described["architectures"] = [_plain_class(model).__name__]
            described["dtype"] = _dtype(tables)
            config.save_pretrained(str(content))
        generation = getattr(model, "generation_config", None)
        if isinstance(generation, _SavesItself):
            generation.save_pretrained(str(content))
        index = index_of(tables)
        if index is not None:
            write_undigested(content / INDEX, [index])

    return write


def _plain_class(model: nn.Module) -> type[nn.Module]:
    # `fully_shard` puts a class of its own before the model's
    return next(kind for kind in type(model).__mro__ if "FSDPModule" not in {base.__name__ for base in kind.__mro__})


def _dtype(tables: _Tables) -> torch.dtype | None:
    dtypes = (tensor.dtype for tensors in tables.values() for tensor in tensors.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def _exported(model: nn.Module, tensors: Mapping[str, Gatherable], aliases: Mapping[str, str]) -> dict[str, Gatherable]:
    """Return the tensors under the names that transformers looks for: of tied ones, not those that it fills itself."""
    filled = cast("Mapping[str, str]", getattr(model, "all_tied_weights_keys", None) or {})
    names = {first: first for first in tensors}
    for alias, first in aliases.items():
        if names[first] in filled and alias not in filled:
            names[first] = alias
    return {names[first]: tensor for first, tensor in tensors.items()}


def _matched(saved: Mapping[str, StoredTensor], live: ModelState, directory: Path) -> dict[str, StoredTensor]:
    """Return the saved tensors under the live first names, each tied tensor from any of its names."""
    matched: dict[str, StoredTensor] = {}
    for name, tensor in saved.items():
        first = live.aliases.get(name, name)
        if first in matched and not torch.equal(read_stored(matched[first]), read_stored(tensor)):
            raise CheckpointError(
                f"{directory}: {name} and {first} differ, and the model ties them; load an untied model."
            )
        matched.setdefault(first, tensor)
    words = difference(saved=describe(matched), live=describe(live.tensors))
    if words is not None:
        raise CheckpointError(f"load_dir={str(directory)!r} {words}; load the weights of this model, in its dtype.")
    return matched
