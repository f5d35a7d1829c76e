"""A model with a LoRA adapter of peft: what of it belongs to which tensor, and the weights that the two are together.

The live model is only read. What is merged is a copy of one layer, so that the arithmetic is peft's own and nothing has
to be undone. Nothing here imports peft for a process that has not done so.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, cast

import attrs
import torch
from torch import nn

from lightrft.backends.plain_model import plain_name
from lightrft.errors import UnsupportedError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = [
    "BASE_LAYER",
    "Adapted",
    "adapter_tensors",
    "base_model",
    "base_name",
    "copy_with",
    "has_adapters",
    "is_changed",
    "merged_model",
    "merged_stream",
    "only_adapter",
    "owner_of",
    "owners_of",
    "parted_stream",
]

BASE_LAYER = "base_layer."
"""What peft puts before the names of the tensors of a layer that it adapts."""

_BASE = "base_model.model."  # what peft puts before the names of the model that it adapts


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


def has_adapters(model: nn.Module) -> bool:
    """Return whether peft has put adapters into a model.

    Args:
        model: the plain model.
    """
    if sys.modules.get("peft") is None:  # whoever made adapters has imported it
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, PeftModel | BaseTunerLayer) for module in model.modules())


def only_adapter(model: nn.Module) -> Adapted:
    """Return a model that has adapters as one that has one, of LoRA.

    Args:
        model: the plain model.

    Raises:
        UnsupportedError: there are several, or such as are not LoRA's, or peft does not stand around the model.
    """
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
            f"the adapter {names[0]!r} is of {type(config).__name__}, which is neither exported nor synced; use "
            "LoraConfig."
        )
    return Adapted(model=model, base=model.get_base_model(), adapter=names[0], config=config)


def owners_of(found: Adapted) -> dict[str, nn.Module]:
    """Return the modules that peft has put in the place of the base's own, by their names.

    Args:
        found: the model.

    Raises:
        UnsupportedError: a module is of a kind that is not merged.
    """
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    owners: dict[str, nn.Module] = {}
    for path, module in found.model.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if not isinstance(module, Linear | Embedding | ModulesToSaveWrapper):
                raise UnsupportedError(
                    f"{path} ({type(module).__name__}) is no plain linear layer or embedding and cannot be merged; "
                    "adapt others, or export with adapters='alone'."
                )
            owners[plain_name(path)] = module
    return owners


def owner_of(name: str, owners: Iterable[str]) -> str | None:
    """Return which of the modules a tensor is in, or None.

    Args:
        name: of the tensor.
        owners: names of modules.
    """
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    known = set(owners)
    return next((path for path in paths if path in known), None)


def base_name(name: str, owners: Iterable[str], adapter: str) -> str | None:
    """Return what the base calls a tensor, or None if the base lacks it.

    Args:
        name: of the tensor, in peft's model.
        owners: names of the modules that peft has put in.
        adapter: the adapter's name.
    """
    owner = owner_of(name, owners)
    if owner is None:
        return name.removeprefix(_BASE)
    rest = name.removeprefix(f"{owner}.")
    for kept in (BASE_LAYER, f"modules_to_save.{adapter}."):
        if rest.startswith(kept):
            return f"{owner}.{rest.removeprefix(kept)}".removeprefix(_BASE)
    return None


def adapter_tensors(found: Adapted) -> dict[str, torch.Tensor]:
    """Return the adapter's own tensors, by the names of the layers that they adapt.

    Args:
        found: a plain and whole model.
    """
    owners, tensors = owners_of(found), found.model.state_dict().items()
    named = ((_name_in_adapter(name, owners, found.adapter), tensor) for name, tensor in tensors)
    return {name: tensor for name, tensor in named if name is not None}


def _name_in_adapter(name: str, owners: Iterable[str], adapter: str) -> str | None:
    """Return what an adapter calls a tensor of its own, or None if it is the base's."""
    owner = owner_of(name, owners)
    kind, _, rest = name.removeprefix(f"{owner}.").partition(f".{adapter}.")
    is_own = owner is not None and kind.startswith("lora_") and rest != ""
    return f"{owner}.{kind}.{rest}".removeprefix(_BASE) if is_own else None


def is_changed(rest: str, layer: nn.Module, found: Adapted) -> bool:
    """Return whether merging changes a tensor.

    Args:
        rest: name of the tensor, in the layer.
        layer: one that peft has put in.
        found: the model.
    """
    is_adapted = rest == f"{BASE_LAYER}weight" or (rest == f"{BASE_LAYER}bias" and found.config.lora_bias)
    return is_adapted and found.adapter not in cast("BaseTunerLayer", layer).merged_adapters


def copy_with(module: nn.Module, name: str, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a module with these parameters, which shares nothing with it that merging changes.

    A deep copy would take hooks, engines and sharded tensors along, and `fully_shard` forbids it.

    Args:
        module: one of a live model.
        name: its name there.
        tensors: by their names there; they become the parameters themselves.
    """
    containers = (dict, list, set, OrderedDict)
    fields = {key: copy.copy(value) if type(value) in containers else value for key, value in vars(module).items()}
    fields["_parameters"] = {
        key: None if parameter is None else nn.Parameter(tensors[f"{name}.{key}"], requires_grad=False)
        for key, parameter in module._parameters.items()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    }
    fields["_modules"] = {
        key: None if child is None else copy_with(child, plain_name(f"{name}.{key}"), tensors)
        for key, child in module._modules.items()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    }
    copied = object.__new__(type(module))
    vars(copied).update(fields)
    return copied


def merged_model(model: nn.Module) -> nn.Module:
    """Return a copy of the base with the adapter in its weights, of the base's own class.

    Args:
        model: a plain and whole model that has adapters.

    Raises:
        UnsupportedError: see `only_adapter` and `merged_stream`.
    """
    found = only_adapter(model)
    _refuse_tied(found, owners_of(found))
    # peft's annotations leave out that `merge_and_unload` is a method
    unload = cast("Callable[[], nn.Module]", copy.deepcopy(found.model).merge_and_unload)
    return unload()


def base_model(found: Adapted) -> nn.Module:
    """Return a copy of the base without the adapter, of the base's own class.

    Args:
        found: a plain and whole model.

    Raises:
        UnsupportedError: the adapter is merged into the live weights.
    """
    _refuse_live_merge(found, owners_of(found))
    # peft's annotations leave out that `unload` is a method
    unload = cast("Callable[[], nn.Module]", copy.deepcopy(found.model).unload)
    return unload()


def parted_stream(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], *, with_base: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the adapter's own tensors as `adapter_tensors` names them, and those of the base under its own names.

    Args:
        model: a model that has adapters, whose parameters may be spread over ranks.
        tensors: (name, full tensor) of all its tensors.
        with_base: whether those of the base are wanted.

    Raises:
        UnsupportedError: see `only_adapter`; or the adapter is merged into the live weights.
    """
    found = only_adapter(model)
    owners = owners_of(found)
    _refuse_live_merge(found, owners)
    for name, tensor in tensors:
        own = _name_in_adapter(name, owners, found.adapter)
        base = base_name(name, owners, found.adapter) if with_base and own is None else None
        if own is not None or base is not None:
            yield own or base or "", tensor


def merged_stream(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the base under its own names, with the adapter in them; one layer at a time is in memory.

    Args:
        model: a model that has adapters, whose parameters may be spread over ranks.
        tensors: (name, full tensor) of all its tensors, those of a module one after the other; they are only read.

    Raises:
        UnsupportedError: there is not one adapter of LoRA, a layer is of a kind that is not merged, or one that the
            adapter changes is tied to another.
    """
    found = only_adapter(model)
    owners = owners_of(found)
    _refuse_tied(found, owners)

    def owner(pair: tuple[str, torch.Tensor]) -> str | None:
        return owner_of(pair[0], owners)

    for path, pairs in groupby(tensors, key=owner):
        for name, tensor in pairs if path is None else _merged(path, owners[path], found, dict(pairs)):
            new = base_name(name, owners, found.adapter)
            if new is not None:
                yield new, tensor


def _merged(
    path: str, layer: nn.Module, found: Adapted, tensors: Mapping[str, torch.Tensor]
) -> Iterable[tuple[str, torch.Tensor]]:
    """Return the tensors of a layer, those that the adapter changes after it did."""
    changed = [name for name in tensors if is_changed(name.removeprefix(f"{path}."), layer, found)]
    if not changed:
        return tensors.items()
    own = {name: tensor.clone() if name in changed else tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        merged = copy_with(layer, path, own)
        cast("BaseTunerLayer", merged).merge(adapter_names=[found.adapter])
    return [
        (name, merged.get_parameter(name.removeprefix(f"{path}.")).detach() if name in changed else tensor)
        for name, tensor in tensors.items()
    ]


def _refuse_live_merge(found: Adapted, owners: Mapping[str, nn.Module]) -> None:
    """Refuse a base that holds the adapter already: who is given both apart would add it again."""
    for path, layer in owners.items():
        if found.adapter in getattr(layer, "merged_adapters", ()):
            raise UnsupportedError(
                f"the adapter {found.adapter!r} is merged into {path} and cannot be sent apart from it; call "
                "unmerge_adapter() first."
            )


def _refuse_tied(found: Adapted, owners: Mapping[str, nn.Module]) -> None:
    """Refuse an adapter that changes one of the names of a tensor and leaves the other as it is."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in found.model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(plain_name(name))
    for tied in names.values():
        owned = [name for name in tied if owner_of(name, owners) is not None]
        if len(tied) > 1 and owned and any(base_name(name, owners, found.adapter) for name in tied):
            raise UnsupportedError(
                f"{' and '.join(tied)} are one tensor, and the adapter changes {owned[0]}; untie them, or adapt "
                "other layers."
            )
