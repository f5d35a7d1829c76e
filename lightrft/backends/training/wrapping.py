"""Which modules of a model are layers, each of which is sharded, recomputed or compiled as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightrft.errors import ConfigError, UnsupportedError
from lightrft.strategy.config import StrategyConfig

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["compile_layers", "layers_of", "recompute_layers", "refuse_layer_settings"]


def layers_of(model: nn.Module, names: Sequence[str] = ()) -> list[nn.Module]:
    """Return the layers of a model, inner ones before those around them.

    A module that shares a parameter with another part of the model is no layer, so that what is tied stays in one
    place.

    Args:
        model: the plain model.
        names: of the classes of layers; empty takes what the model itself names, as those of transformers do.

    Raises:
        ConfigError: there are names, and the model has no module of these classes.

    Example:
        >>> layers_of(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), ["Linear"])
        [Linear(in_features=1, out_features=1, bias=True)]
    """
    classes = set(names or _named_by(model))
    found = [module for module in model.modules() if type(module).__name__ in classes and module is not model]
    if names and not found:
        known = sorted({type(module).__name__ for module in model.modules()})
        raise ConfigError(
            f"fsdp_wrap={tuple(names)!r} names no module of {type(model).__name__}; its classes are {', '.join(known)}."
        )
    uses = _uses(model)
    return [module for module in reversed(found) if all(uses[key] == n for key, n in _uses(module).items())]


def _named_by(model: nn.Module) -> set[str]:
    # a critic may be a plain module around a model of transformers
    named = (getattr(module, "_no_split_modules", None) for module in model.modules())
    return {name for names in named if names for name in cast("Iterable[str]", names)}


def _uses(model: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


def recompute_layers(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Let layers keep their inputs alone for the backward pass, and compute the rest again there.

    Models of transformers do it themselves while they are in training mode; in evaluation mode, in which policies
    learn because dropout would make logprobs noisy, it is done for them. Names of parameters stay.

    Args:
        model: the plain model.
        layers: its layers.

    Raises:
        ConfigError: there are no layers.
    """
    able = [module for module in model.modules() if getattr(module, "supports_gradient_checkpointing", False)]
    for module in able:
        enable = cast("Callable[..., None]", module.gradient_checkpointing_enable)
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _require_layers("gradient_checkpointing", model, layers)
    for layer in layers:
        _recompute(layer, recomputes_itself=hasattr(layer, "gradient_checkpointing"))


def _recompute(layer: nn.Module, *, recomputes_itself: bool) -> None:
    compute = cast("Callable[..., object]", layer.forward)

    def forward(*args: object, **kwargs: object) -> object:
        is_done = recomputes_itself and layer.training
        # a cache would take in the same keys twice
        if is_done or not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
            return compute(*args, **kwargs)
        call = cast("Callable[..., object]", checkpoint)
        return call(compute, *args, use_reentrant=False, **kwargs)

    setattr(layer, "forward", forward)  # noqa: B010 (an assignment to a method is refused by type checkers)


def compile_layers(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Let torch compile each layer when it is first called; names of parameters stay.

    Args:
        model: the plain model, for messages.
        layers: what to compile, one by one: they are alike, so that one compilation serves all.

    Raises:
        ConfigError: there are no layers.
    """
    _require_layers("compile_layers", model, layers)
    for layer in layers:
        layer.compile()


def refuse_layer_settings(config: StrategyConfig, strategy: str) -> None:
    """Refuse settings that a strategy would pass over.

    Args:
        config: `gradient_checkpointing` and `compile_layers` are looked at.
        strategy: registry key of a strategy that has no layers.

    Raises:
        UnsupportedError: one of them is switched on.
    """
    for setting in ("gradient_checkpointing", "compile_layers"):
        if getattr(config, setting):
            raise UnsupportedError(
                f"{setting}=True is not supported by strategy={strategy!r}; use 'fsdp2', also with one process."
            )


def _require_layers(setting: str, model: nn.Module, layers: Sequence[nn.Module]) -> None:
    if not layers:
        raise ConfigError(f"{setting}=True finds no layers in {type(model).__name__}; name their classes in fsdp_wrap.")
