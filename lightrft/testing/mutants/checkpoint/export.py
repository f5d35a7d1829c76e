"""Strategies that export and import models wrongly."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import attrs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightrft.config import StrategyConfig
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.checkpointing import AdaptersKind, LoadModel, SavesTokenizer
from lightrft.strategy.record import Strategy
from lightrft.testing.mutants.mutant import BreakStrategy, Mutant, strategy_mutant

__all__ = ["MUTANTS"]

_PREFIX = "_orig_mod."
_HEAD = "head.weight"
_INDEX = "model.safetensors.index.json"


class _Write(Protocol):
    def __call__(self, tensors: Mapping[str, Tensor], /) -> Mapping[str, Tensor]: ...


def _rewrite(directory: Path, change: _Write) -> None:
    for file in directory.glob("*.safetensors"):
        tensors = dict(change(load_file(file)))
        save_file(tensors, file, metadata={"format": "pt"})


def _writing(change: _Write, load: Callable[[Strategy], LoadModel]) -> BreakStrategy:
    """Return what plants an export whose tensors are changed, and an import that takes them."""

    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        del config

        def save_model(
            model: nn.Module,
            output_dir: str | os.PathLike[str],
            *,
            tokenizer: SavesTokenizer | None = None,
            adapters: AdaptersKind | None = None,
        ) -> Path:
            path = strategy.save_model(model, output_dir, tokenizer=tokenizer, adapters=adapters)
            _rewrite(path, change)
            return path

        return attrs.evolve(strategy, save_model=save_model, load_model=load(strategy))

    return breaks


def _with_prefix(tensors: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
    return {_PREFIX + name: tensor for name, tensor in tensors.items()}


def _without_prefix(tensors: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _without_head(tensors: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != _HEAD}


def _load_prefixed(strategy: Strategy) -> LoadModel:
    def load_model(model: nn.Module, load_dir: str | os.PathLike[str]) -> None:
        _rewrite(Path(load_dir), _without_prefix)
        strategy.load_model(model, load_dir)
        _rewrite(Path(load_dir), _with_prefix)

    return load_model


def _load_what_fits(strategy: Strategy) -> LoadModel:
    def load_model(model: nn.Module, load_dir: str | os.PathLike[str]) -> None:
        try:
            strategy.load_model(model, load_dir)
        except CheckpointError:
            if not _copy_what_fits(strategy.unwrap_model(model), Path(load_dir)):
                raise

    return load_model


def _load_half(strategy: Strategy) -> LoadModel:
    def load_model(model: nn.Module, load_dir: str | os.PathLike[str]) -> None:
        try:
            strategy.load_model(model, load_dir)
        except CheckpointError:
            _copy_what_fits(strategy.unwrap_model(model), Path(load_dir))
            raise

    return load_model


def _load_first_file(strategy: Strategy) -> LoadModel:
    def load_model(model: nn.Module, load_dir: str | os.PathLike[str]) -> None:
        if (Path(load_dir) / _INDEX).exists():
            _copy_what_fits(strategy.unwrap_model(model), Path(load_dir))
        else:
            strategy.load_model(model, load_dir)

    return load_model


def _load_without_index(strategy: Strategy) -> LoadModel:
    def load_model(model: nn.Module, load_dir: str | os.PathLike[str]) -> None:
        files = sorted(Path(load_dir).glob("*.safetensors"))
        if not (Path(load_dir) / _INDEX).exists() or len(files) == 1:
            strategy.load_model(model, load_dir)
            return
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        with TemporaryDirectory() as other:
            save_file(tensors, Path(other) / "model.safetensors")
            strategy.load_model(model, other)

    return load_model


def _copy_what_fits(model: nn.Module, directory: Path) -> bool:
    """Copy the tensors that the model has in the same shape; return whether the files could be read."""
    live = model.state_dict()
    for file in directory.glob("*.safetensors"):
        try:
            saved = load_file(file)
        except Exception:  # noqa: BLE001 (whatever a damaged file raises)
            return False
        for name in {*saved} & {*live}:
            if saved[name].shape == live[name].shape:
                live[name].copy_(saved[name])
        return True
    return False


def _loading(load: Callable[[Strategy], LoadModel]) -> BreakStrategy:
    def breaks(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
        del config
        return attrs.evolve(strategy, load_model=load(strategy))

    return breaks


def _overwrite(strategy: Strategy, config: StrategyConfig, /) -> Strategy:
    del config

    def save_model(
        model: nn.Module,
        output_dir: str | os.PathLike[str],
        *,
        tokenizer: SavesTokenizer | None = None,
        adapters: AdaptersKind | None = None,
    ) -> Path:
        shutil.rmtree(output_dir, ignore_errors=True)
        return strategy.save_model(model, output_dir, tokenizer=tokenizer, adapters=adapters)

    return attrs.evolve(strategy, save_model=save_model)


MUTANTS: tuple[Mutant, ...] = (
    strategy_mutant(
        "export.round_trip.prefix",
        "Names of exported tensors carry the prefix of a wrapper, which only the exporter's own import takes off.",
        _writing(_with_prefix, _load_prefixed),
    ),
    strategy_mutant(
        "export.round_trip.head_dropped",
        "The head is left out of every export, as if it were always tied, and the import does not miss it.",
        _writing(_without_head, _load_what_fits),
    ),
    strategy_mutant(
        "export.round_trip.overwritten",
        "An export replaces whatever stands in its directory.",
        _overwrite,
    ),
    strategy_mutant(
        "export.round_trip.first_file",
        "Of several files the first alone is loaded.",
        _loading(_load_first_file),
    ),
    strategy_mutant(
        "export.refused.index_ignored",
        "All files of a directory are loaded, without a look at their index.",
        _loading(_load_without_index),
    ),
    strategy_mutant(
        "export.refused.half_loaded",
        "Tensors are copied before all of them are checked, and the model is left half loaded.",
        _loading(_load_half),
    ),
    strategy_mutant(
        "export.refused.differences_ignored",
        "Only the tensors that fit are loaded, without a word about the others.",
        _loading(_load_what_fits),
    ),
)
"""What is exported and imported wrongly."""
