"""Adapters of peft in an export: alone, in peft's own layout, or merged into the weights that they adapt.

The live model is only read. What is merged is a copy of one layer, made when its weight is written, so that the
arithmetic is peft's own and an export that breaks off leaves nothing to undo.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lightrft.backends.adapters import (
    Adapted,
    base_name,
    copy_with,
    has_adapters,
    is_changed,
    only_adapter,
    owner_of,
    owners_of,
)
from lightrft.backends.checkpointing.access import LiveTensor, ModelState
from lightrft.backends.checkpointing.turns import Computed, Gatherable
from lightrft.backends.plain_model import plain_name
from lightrft.errors import CheckpointError, ConfigError, UnsupportedError
from lightrft.strategy.protocols.checkpointing import AdaptersKind

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["ADAPTERS", "Adapted", "adapted", "adapter_tensors", "merged_tensors", "write_adapter_config"]

ADAPTERS = "adapter_model.safetensors"
"""File of adapters alone."""


def adapted(model: nn.Module, adapters: AdaptersKind | None) -> Adapted | None:
    """Return the model as one with an adapter, or None if it has none.

    Args:
        model: the plain model.
        adapters: what the user says should become of them.

    Raises:
        ConfigError: nothing is said of adapters that are there, or something of those that are not.
        UnsupportedError: there are several, or such as are not LoRA's.
    """
    if adapters not in (None, "alone", "merged"):
        raise ConfigError(f"adapters={adapters!r} is unknown; pass 'alone' or 'merged'.")
    if not has_adapters(model):
        if adapters is not None:
            raise ConfigError(f"adapters={adapters!r}, and the model has no adapters of peft; leave it out.")
        return None
    if adapters is None:
        raise ConfigError("adapters=None, and the model has adapters of peft; pass adapters='alone' or 'merged'.")
    return only_adapter(model)


def adapter_tensors(found: Adapted, state: ModelState) -> dict[str, LiveTensor]:
    """Return the adapter's tensors under the names that peft looks for.

    Args:
        found: the model.
        state: all its tensors.

    Raises:
        UnsupportedError: something learns that is not the adapter's, or the base was changed when it was made.
    """
    from peft import get_peft_model_state_dict

    if found.config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise UnsupportedError(
            f"init_lora_weights={found.config.init_lora_weights!r} changed the base as well; pass adapters='merged'."
        )
    stand_ins = {name: torch.empty(0, device="meta") for name in (*state.tensors, *state.aliases)}
    names = {id(stand_in): name for name, stand_in in stand_ins.items()}
    chosen = get_peft_model_state_dict(
        found.model, state_dict=stand_ins, adapter_name=found.adapter, save_embedding_layers=False
    )
    live = {name: _first(names[id(stand_in)], state) for name, stand_in in chosen.items()}
    learning = [plain_name(name) for name, parameter in found.model.named_parameters() if parameter.requires_grad]
    others = [name for name in learning if _first(name, state) not in live.values()]
    if others:
        raise UnsupportedError(
            f"{others[0]} learns and is no part of the adapter; freeze it, name it in modules_to_save, or pass "
            "adapters='merged'."
        )
    return {name: state.tensors[first] for name, first in live.items()}


def write_adapter_config(found: Adapted, directory: Path, *, kind: type[nn.Module]) -> None:
    """Write the settings with which peft makes the adapter again.

    Args:
        found: the model.
        directory: where to.
        kind: class of the base.
    """
    config = copy.deepcopy(found.config)
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or vars(found.base).get("name_or_path") or None
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(str(directory), auto_mapping_dict=mapping if config.task_type is None else None)


def merged_tensors(found: Adapted, state: ModelState) -> tuple[dict[str, Gatherable], dict[str, str]]:
    """Return the tensors of the base under its own names, with the adapter in them once they are written.

    Args:
        found: the model.
        state: all its tensors.

    Returns:
        The tensors, and every further name of a tied one with its first name.

    Raises:
        UnsupportedError: a layer is of a kind that is not merged, or is tied to another.
    """
    owners = owners_of(found)
    names = {name: base_name(name, owners, found.adapter) for name in (*state.tensors, *state.aliases)}
    for alias, first in state.aliases.items():
        owned = [name for name in (alias, first) if owner_of(name, owners) is not None]
        if owned and (names[alias] is not None or names[first] is not None):
            raise UnsupportedError(
                f"{alias} and {first} are one tensor, and the adapter changes {owned[0]}; pass adapters='alone'."
            )
    tensors: dict[str, Gatherable] = {}
    for name, tensor in state.tensors.items():
        new = names[name]
        if new is not None:
            owner = owner_of(name, owners)
            changes = owner is not None and is_changed(name.removeprefix(f"{owner}."), owners[owner], found)
            tensors[new] = _merged(name, str(owner), owners[str(owner)], found, state) if changes else tensor
    aliases = {str(names[alias]): str(names[first]) for alias, first in state.aliases.items() if names[alias]}
    return tensors, aliases


def _first(name: str, state: ModelState) -> str:
    return state.aliases.get(name, name)


def _merged(name: str, owner: str, layer: nn.Module, found: Adapted, state: ModelState) -> Computed:
    paths = [plain_name(f"{owner}.{path}") for path, _ in layer.named_parameters(remove_duplicate=False)]

    def merge(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        try:
            with torch.no_grad():
                # where the layer computes, so that its arithmetic is the live one's
                merged = copy_with(layer, owner, {path: tensors[path].to(devices[path]) for path in paths})
                cast("BaseTunerLayer", merged).merge(adapter_names=[found.adapter])
        except Exception as error:
            raise CheckpointError(f"{name} cannot be merged ({error!r}); pass adapters='alone'.") from error
        return merged.get_parameter(name.removeprefix(f"{owner}.")).detach()

    live = state.tensors[name]
    sources = {path: state.tensors[_first(path, state)] for path in paths}
    devices = {path: source.part().values.device for path, source in sources.items()}
    return Computed(shape=live.shape, dtype=live.dtype, sources=sources, compute=merge)
