"""How weights come into a running vLLM: layer by layer, rearranged for the CPU as soon as a layer is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import nn

from lightrft.backends.rollout.vllm_inside import Inside

__all__ = ["begin_load", "end_load", "load"]


class _QuantMethod(Protocol):
    def process_weights_after_loading(self, layer: object) -> None: ...


class _ExpertsMethod(Protocol):
    moe_kernel: object


class _Layer(Protocol):
    """A layer whose matrix was rearranged for the CPU."""

    weight: torch.Tensor
    quant_method: _QuantMethod


def begin_load(inside: Inside) -> None:
    """Make the model ready to be loaded anew; a load that was not ended is ended.

    Args:
        inside: a running vLLM.
    """
    if inside.loaded is not None:
        end_load(inside)
    _forget_kernels(inside.model)
    _reload().initialize_layerwise_reload(inside.model)
    inside.loaded = set()


def _forget_kernels(model: nn.Module) -> None:
    """Let vLLM make the kernels of mixtures of experts anew.

    On a CPU it rearranges the experts when their kernel is made, at the first load alone: where there is one already,
    a later load leaves the experts as they came, and the kernel takes them for rearranged ones.
    """
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            cast("_ExpertsMethod", method).moe_kernel = None


def load(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load tensors, of which nothing is kept.

    Args:
        inside: a running vLLM whose load has begun.
        tensors: (name, tensor) with transformers' names.
    """
    assert inside.loaded is not None  # noqa: S101 (the life cycle of engines allows no other order)
    storages: set[int] = set()

    def noted() -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            storages.add(tensor.untyped_storage().data_ptr())
            yield name, tensor

    with torch.no_grad(), _in_config(inside):
        inside.loaded |= cast("Any", inside.model).load_weights(noted())
    _keep_nothing(inside, storages)


def _keep_nothing(inside: Inside, storages: set[int]) -> None:
    """Copy what vLLM keeps of the tensors until the other parts of a layer come: they are the caller's, to write to."""
    infos = _reload().layerwise.LAYERWISE_INFO
    for layer in inside.model.modules():
        for _, call in infos[layer].loaded_weights if layer in infos else ():
            tensor = call.arguments["loaded_weight"]
            if tensor.untyped_storage().data_ptr() in storages:
                call.arguments["loaded_weight"] = tensor.clone()


def end_load(inside: Inside) -> list[str]:
    """Return the parameters that the load did not reach, after it has ended.

    Args:
        inside: a running vLLM whose load has begun.
    """
    loaded, inside.loaded = inside.loaded or set(), None
    with torch.no_grad(), _in_config(inside):
        _reload().finalize_layerwise_reload(inside.model, inside.runner.model_config)
        names: dict[int, list[str]] = {}
        for name, parameter in inside.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        reached = [tied for tied in names.values() if loaded.intersection(tied)]
        _rearrange(inside.model, [name for tied in reached for name in tied if name not in loaded])
    return [tied[0] for tied in names.values() if tied not in reached]


def _rearrange(model: nn.Module, names: Sequence[str]) -> None:
    """Rearrange matrices anew that were loaded under the name of another layer.

    On a CPU a layer multiplies with a rearranged copy, which vLLM makes anew for the layer that is loaded. A head that
    is tied to the embedding has a copy of its own, and keeps the old one where the embedding is loaded alone.
    """
    for name in names:
        layer = cast("_Layer", model.get_submodule(name.rpartition(".")[0]))
        if hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


def _in_config(inside: Inside) -> AbstractContextManager[object]:
    enter: Callable[[object], AbstractContextManager[object]] = import_module("vllm.config").set_current_vllm_config
    return enter(inside.runner.vllm_config)


def _reload() -> ModuleType:
    return import_module("vllm.model_executor.model_loader.reload")
