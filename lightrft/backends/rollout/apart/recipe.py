"""A model of transformers as plain data, from which another process builds it again without weights."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import attrs
import torch
from torch import nn

from lightrft.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Recipe", "build_from", "recipe_of", "tensors_for"]


@attrs.frozen(kw_only=True)
class Recipe:
    """What a model is built from.

    Attributes:
        model: class of the model, as `module:name`.
        config: class of its configuration.
        settings: JSON of the configuration.
        implementations: how attention and experts are computed, which a configuration in JSON leaves out.
        device: where the parameters are.
    """

    model: str
    config: str
    settings: str
    implementations: dict[str, str]
    device: str


class _FromConfig(Protocol):
    """The way in which transformers itself builds a model of a class."""

    def __call__(self, config: PreTrainedConfig, **implementations: str) -> nn.Module: ...


def recipe_of(model: nn.Module) -> Recipe:
    """Return what a model is built from, after it was built once to see that nothing is lost.

    Args:
        model: a plain model of transformers.

    Raises:
        UnsupportedError: it is another kind of model, or more than its configuration says.
    """
    config = cast("PreTrainedConfig | None", getattr(model, "config", None))
    if config is None or not hasattr(model, "_from_config"):
        raise _refusal(model, "is no model of transformers, which another process could build from its configuration")
    names = {"attn_implementation": "_attn_implementation", "experts_implementation": "_experts_implementation"}
    chosen = {name: cast("str | None", getattr(config, place, None)) for name, place in names.items()}
    recipe = Recipe(
        model=_name_of(type(model)),
        config=_name_of(type(config)),
        settings=json.dumps(json.loads(config.to_json_string(use_diff=False))),
        implementations={name: value for name, value in chosen.items() if value is not None},
        device=str(next((parameter.device for parameter in model.parameters()), "cpu")),
    )
    try:
        structure = _structure(recipe)
    except Exception as error:
        raise _refusal(model, f"cannot be built from its configuration ({error})") from error
    lost = _difference(model, structure)
    if lost:
        raise _refusal(model, f"is not what its configuration describes: {lost}")
    return recipe


def tensors_for(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all that `build_from` needs beside the recipe: parameters, and buffers that no checkpoint has, too.

    Args:
        model: the model of the recipe; the tensors are its own, a tied one under each of its names.
    """
    return {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}


def build_from(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return the model of a recipe, in evaluation mode; where there is no tensor, a parameter or buffer is zero.

    Args:
        recipe: what to build.
        tensors: by name; the model takes them over as they are.

    Raises:
        UnsupportedError: the classes are not found in this process.
    """
    structure = _structure(recipe)
    memo: dict[int, object] = {}
    for name, parameter in structure.named_parameters():
        memo[id(parameter)] = nn.Parameter(_own_or_zero(tensors, name, parameter), requires_grad=False)
    model = copy.deepcopy(structure, memo)
    for name, buffer in structure.named_buffers(remove_duplicate=False):
        place, _, own = name.rpartition(".")
        setattr(model.get_submodule(place), own, _own_or_zero(tensors, name, buffer))
    return model.to(recipe.device).eval()


def _own_or_zero(tensors: Mapping[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    return tensors[name] if name in tensors else torch.zeros_like(like, device="cpu")


def _structure(recipe: Recipe) -> nn.Module:
    """Return the model with tensors that have no memory."""
    model, config = cast("Any", _found(recipe.model)), cast("Any", _found(recipe.config))
    from_config: _FromConfig = model._from_config  # noqa: SLF001 (no public one takes a class)
    from_dict: Callable[[object], PreTrainedConfig] = config.from_dict
    with torch.device("meta"):
        return from_config(from_dict(json.loads(recipe.settings)), **recipe.implementations)


def _difference(model: nn.Module, structure: nn.Module) -> str:
    """Return how a model differs from what its configuration gives, or nothing."""
    for name, kinds in (("modules", _modules), ("tensors", _tensors), ("ties", _ties)):
        own, given = kinds(model), kinds(structure)
        changed = sorted(str(item) for item in own ^ given)
        if changed:
            return f"its {name} differ ({changed[0]})"
    config = cast("PreTrainedConfig", model.config)
    again = cast("PreTrainedConfig", structure.config)
    wanted, got = _plain(config), _plain(again)
    return "" if wanted == got else f"its configuration differs ({min(_changed(wanted, got))})"


def _modules(model: nn.Module) -> set[tuple[str, str]]:
    return {(name, type(module).__name__) for name, module in model.named_modules()}


def _tensors(model: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in tensors_for(model).items()}


def _ties(model: nn.Module) -> set[tuple[str, ...]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(sorted(same)) for same in names.values() if len(same) > 1}


def _plain(config: PreTrainedConfig) -> dict[str, object]:
    # the dtype is that of each tensor; the other two are notes of transformers
    notes = {"dtype", "architectures", "transformers_version", "_name_or_path"}
    return {name: value for name, value in config.to_dict().items() if name not in notes}


def _changed(wanted: Mapping[str, object], got: Mapping[str, object]) -> set[str]:
    return {name for name in {*wanted, *got} if wanted.get(name) != got.get(name)}


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _found(name: str) -> object:
    module, _, own = name.partition(":")
    return getattr(sys.modules.get(module) or import_module(module), own)


def _refusal(model: nn.Module, problem: str) -> UnsupportedError:
    return UnsupportedError(f"model={type(model).__name__} {problem}; use engine.process='trainer'.")
