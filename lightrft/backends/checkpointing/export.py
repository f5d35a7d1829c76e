"""A model out of a checkpoint, in the layout that transformers reads; no strategy and no optimizer is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.checkpointing.access import (
    LiveTensor,
    ModelState,
    OptimizerState,
    Part,
    StateAccess,
    StoredTensor,
)
from lightrft.backends.checkpointing.huggingface import build_save_model
from lightrft.backends.checkpointing.layout import model_file, state_file
from lightrft.backends.checkpointing.lossless import as_dict, loads
from lightrft.backends.checkpointing.manifest import Manifest, verify_file
from lightrft.backends.checkpointing.named import difference
from lightrft.backends.checkpointing.stored import read_stored, stored_tensors
from lightrft.errors import CheckpointError, UnsupportedError
from lightrft.strategy.protocols.checkpointing import SavesTokenizer
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["StoredModel", "difference_to", "export_model", "open_model"]


@attrs.frozen(kw_only=True, eq=False)
class StoredModel:
    """A model as it lies in a checkpoint.

    Attributes:
        tensors: parameters and persistent buffers by name; a tied one under its first name. Each is read when it is
            asked for.
        aliases: every further name of a tied tensor, and its first name.
    """

    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str]


def open_model(directory: Path, manifest: Manifest, name: str) -> StoredModel:
    """Return a model of a checkpoint, its two files verified.

    Args:
        directory: the checkpoint.
        manifest: its manifest.
        name: one of `model_names`.

    Raises:
        CheckpointError: a file of the model is missing or damaged.
    """
    for file in (model_file(name), state_file(name)):
        if file not in manifest.files:
            raise CheckpointError(f"{directory} holds no {file}; name another model.")
        verify_file(directory / file, manifest.files[file])
    path = directory / state_file(name)
    record = as_dict(loads(path.read_bytes(), source=str(path)), source=str(path))
    aliases = as_dict(record.get("aliases"), source=str(path))
    return StoredModel(
        tensors=stored_tensors(directory / model_file(name)),
        aliases={alias: str(first) for alias, first in aliases.items()},
    )


def difference_to(model: nn.Module, stored: StoredModel) -> str | None:
    """Return in words how a stored model differs from a plain one in names or shapes, or None where it does not.

    Args:
        model: on any device, the meta device too.
        stored: from a checkpoint.
    """
    saved = {name: str(list(tensor.shape)) for name, tensor in stored.tensors.items()}
    saved |= {alias: saved[first] for alias, first in stored.aliases.items() if first in saved}
    return difference(saved=saved, live={name: str(list(tensor.shape)) for name, tensor in model.state_dict().items()})


def export_model(
    stored: StoredModel,
    output_dir: str | os.PathLike[str],
    *,
    collectives: Collectives,
    model: nn.Module | None = None,
    tokenizer: SavesTokenizer | None = None,
) -> Path:
    """Write a stored model as `save_model` writes a live one, one tensor in memory at a time, and return where.

    Args:
        stored: from a checkpoint.
        output_dir: a directory that is empty or is not there.
        collectives: those of one process.
        model: what the weights belong to, for its configuration and class; its own tensors are not looked at and may be
            on the meta device. None writes the weights alone.
        tokenizer: written beside the weights.

    Raises:
        CheckpointError: something stands there, or it cannot be written; nothing is left behind.
    """
    plain = nn.Module() if model is None else model
    return build_save_model(collectives, _access(stored))(plain, output_dir, tokenizer=tokenizer)


def _access(stored: StoredModel) -> StateAccess:
    def unwrap_model(model: nn.Module) -> nn.Module:
        return model

    def model_state(model: nn.Module, *, owner: str) -> ModelState:
        del model, owner
        return ModelState(
            tensors={name: _as_if_live(tensor) for name, tensor in stored.tensors.items()},
            aliases=stored.aliases,
            plan_tensor=_plan_tensor,
            read_gradients=_no_gradients,
            plan_gradients=_plan_gradients,
        )

    return StateAccess(unwrap_model=unwrap_model, model_state=model_state, optimizer_state=_optimizer_state)


def _as_if_live(tensor: StoredTensor) -> LiveTensor:
    def part() -> Part:
        return Part(values=read_stored(tensor), start=0)

    return LiveTensor(shape=tensor.shape, dtype=tensor.dtype, part=part, is_whole=True)


def _no_gradients() -> Mapping[str, torch.Tensor]:
    return {}


def _plan_tensor(name: str, saved: StoredTensor, *, source: str) -> Callable[[], None]:
    del saved, source
    raise UnsupportedError(f"{name} is in a checkpoint, which is only read; load into a live model.")


def _plan_gradients(saved: Mapping[str, StoredTensor], *, source: str) -> Callable[[], None]:
    del saved
    raise UnsupportedError(f"{source} is for gradients of a live model, not of a checkpoint; load into a live model.")


def _optimizer_state(model: nn.Module, optimizer: Optimizer, *, owner: str) -> OptimizerState:
    del model, optimizer
    raise UnsupportedError(f"{owner} is in a checkpoint, which holds no live optimizer; load into a live model.")
