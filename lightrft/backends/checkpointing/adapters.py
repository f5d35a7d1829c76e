"""Adapters of peft in an export: alone, in peft's own layout, or merged into the weights that they adapt.

The live model is only read. What is merged is a copy of one layer, made when its weight is written, so that the
arithmetic is peft's own and an export that breaks off leaves nothing to undo. Nothing here imports peft for a process
that has not done so.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import attrs
import torch
from torch import nn

from lightrft.backends.checkpointing.access import LiveTensor, ModelState
from lightrft.backends.checkpointing.named import plain_name
from lightrft.backends.checkpointing.turns import Computed, Gatherable
from lightrft.errors import CheckpointError, ConfigError, UnsupportedError
from lightrft.strategy.protocols.checkpointing import AdaptersKind

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["ADAPTERS", "Adapted", "adapted", "adapter_tensors", "merged_tensors", "write_adapter_config"]

ADAPTERS = "adapter_model.safetensors"
"""File of adapters alone."""
_BASE = "base_model.model."  # what peft puts before the names of the model that it adapts
_LAYER = "base_layer."


@attrs.frozen(kw_only=True, eq=False)
class Adapted:
    """A model with one adapter.

    Attributes:
        model: peft's model around the base.
        base: the model inside, which brings configuration and class.
        adapter: the adapter's name.
        config: its settings.
    """

    model: PeftModel
    base: nn.Module
    adapter: str
    config: LoraConfig


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
    if not _has_adapters(model):
        if adapters is not None:
            raise ConfigError(f"adapters={adapters!r}, and the model has no adapters of peft; leave it out.")
        return None
    if adapters is None:
        raise ConfigError("adapters=None, and the model has adapters of peft; pass adapters='alone' or 'merged'.")
    return _only_adapter(model)


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
    owners = _owners(found)
    names = {name: _base_name(name, owners, found.adapter) for name in (*state.tensors, *state.aliases)}
    for alias, first in state.aliases.items():
        owned = [name for name in (alias, first) if _owner(name, owners) is not None]
        if owned and (names[alias] is not None or names[first] is not None):
            raise UnsupportedError(
                f"{alias} and {first} are one tensor, and the adapter changes {owned[0]}; pass adapters='alone'."
            )
    tensors: dict[str, Gatherable] = {}
    for name, tensor in state.tensors.items():
        new = names[name]
        if new is not None:
            owner = _owner(name, owners)
            is_changed = owner is not None and _is_changed(name.removeprefix(f"{owner}."), owners[owner], found)
            tensors[new] = _merged(name, str(owner), owners[str(owner)], found, state) if is_changed else tensor
    aliases = {str(names[alias]): str(names[first]) for alias, first in state.aliases.items() if names[alias]}
    return tensors, aliases


def _has_adapters(model: nn.Module) -> bool:
    if sys.modules.get("peft") is None:  # whoever made adapters has imported it
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, PeftModel | BaseTunerLayer) for module in model.modules())


def _only_adapter(model: nn.Module) -> Adapted:
    from peft import LoraConfig, PeftModel, PeftType

    if not isinstance(model, PeftModel):
        raise UnsupportedError(
            f"the model is a {type(model).__name__} with adapters inside; wrap it with peft.get_peft_model instead."
        )
    names = list(model.peft_config)
    if len(names) != 1:
        raise UnsupportedError(f"the model has the adapters {', '.join(names)}; delete all but one (delete_adapter).")
    config = model.peft_config[names[0]]
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise UnsupportedError(
            f"the adapter {names[0]!r} is of {type(config).__name__}, which is not exported; use LoraConfig."
        )
    return Adapted(model=model, base=model.get_base_model(), adapter=names[0], config=config)


def _owners(found: Adapted) -> dict[str, nn.Module]:
    """Return the modules that peft has put in the place of the base's own, by their names."""
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    owners: dict[str, nn.Module] = {}
    for path, module in found.model.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if not isinstance(module, Linear | Embedding | ModulesToSaveWrapper):
                raise UnsupportedError(
                    f"{path} ({type(module).__name__}) is no plain linear layer or embedding; pass adapters='alone'."
                )
            owners[plain_name(path)] = module
    return owners


def _owner(name: str, owners: Iterable[str]) -> str | None:
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    known = set(owners)
    return next((path for path in paths if path in known), None)


def _base_name(name: str, owners: Iterable[str], adapter: str) -> str | None:
    """Return what the base calls a tensor, or None if the base lacks it."""
    owner = _owner(name, owners)
    if owner is None:
        return name.removeprefix(_BASE)
    rest = name.removeprefix(f"{owner}.")
    for kept in (_LAYER, f"modules_to_save.{adapter}."):
        if rest.startswith(kept):
            return f"{owner}.{rest.removeprefix(kept)}".removeprefix(_BASE)
    return None


def _is_changed(rest: str, layer: nn.Module, found: Adapted) -> bool:
    is_adapted = rest == f"{_LAYER}weight" or (rest == f"{_LAYER}bias" and found.config.lora_bias)
    return is_adapted and found.adapter not in cast("BaseTunerLayer", layer).merged_adapters


def _first(name: str, state: ModelState) -> str:
    return state.aliases.get(name, name)


def _merged(name: str, owner: str, layer: nn.Module, found: Adapted, state: ModelState) -> Computed:
    paths = [plain_name(f"{owner}.{path}") for path, _ in layer.named_parameters(remove_duplicate=False)]

    def merge(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        try:
            with torch.no_grad():
                # where the layer computes, so that its arithmetic is the live one's
                merged = _copy_of(layer, owner, {path: tensors[path].to(devices[path]) for path in paths})
                cast("BaseTunerLayer", merged).merge(adapter_names=[found.adapter])
        except Exception as error:
            raise CheckpointError(f"{name} cannot be merged ({error!r}); pass adapters='alone'.") from error
        return merged.get_parameter(name.removeprefix(f"{owner}.")).detach()

    live = state.tensors[name]
    sources = {path: state.tensors[_first(path, state)] for path in paths}
    devices = {path: source.part().values.device for path, source in sources.items()}
    return Computed(shape=live.shape, dtype=live.dtype, sources=sources, compute=merge)


def _copy_of(module: nn.Module, name: str, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a module with these parameters, which shares nothing with it that merging changes.

    A deep copy would take hooks, engines and sharded tensors along, and `fully_shard` forbids it.
    """
    containers = (dict, list, set, OrderedDict)
    fields = {key: copy.copy(value) if type(value) in containers else value for key, value in vars(module).items()}
    fields["_parameters"] = {
        key: None if parameter is None else nn.Parameter(tensors[f"{name}.{key}"], requires_grad=False)
        for key, parameter in module._parameters.items()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    }
    fields["_modules"] = {
        key: None if child is None else _copy_of(child, plain_name(f"{name}.{key}"), tensors)
        for key, child in module._modules.items()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    }
    copied = object.__new__(type(module))
    vars(copied).update(fields)
    return copied
