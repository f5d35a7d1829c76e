"""How weights come into a running vLLM: straight into the matrices with which it multiplies.

On a CPU vLLM multiplies with a rearranged copy of each matrix, and makes that copy anew whenever weights come, which
takes many times as long as to copy them. Here linear layers multiply with their matrices where they lie, and matrices
are rearranged later, once they were used so often that it pays. What cannot wait, such as the experts of a mixture, is
loaded layer by layer, as vLLM itself does it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from lightrft.backends.rollout.projection import Multiply, build_multiplication

if TYPE_CHECKING:
    from lightrft.backends.rollout.vllm_inside import Inside

__all__ = ["begin_load", "end_load", "load", "plain_matrices"]


class _Linear(Protocol):
    weight: torch.Tensor
    cpu_linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class _ExpertsMethod(Protocol):
    moe_kernel: object


@contextmanager
def plain_matrices() -> Generator[None]:
    """Let the linear layers that vLLM makes ready inside multiply with their matrices where they lie."""
    layers = cast("Any", import_module("vllm.model_executor.layers.utils"))
    rearrange = layers.dispatch_cpu_unquantized_gemm

    def leave(layer: nn.Module, remove_weight: bool) -> None:
        if _is_matrix(layer):
            _multiply_in_place(layer)
        else:
            rearrange(layer, remove_weight)

    layers.dispatch_cpu_unquantized_gemm = leave
    try:
        yield
    finally:
        layers.dispatch_cpu_unquantized_gemm = rearrange


def _multiply_in_place(layer: nn.Module) -> None:
    linear = cast("_Linear", layer)
    multiply: Multiply = build_multiplication(linear.weight.data)

    def cpu_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        del weight  # the layer's own
        return multiply(inputs, bias)

    linear.cpu_linear = cpu_linear


def _is_matrix(layer: nn.Module) -> bool:
    weight = cast("_Linear", layer).weight
    return weight.dim() == 2


def begin_load(inside: Inside) -> None:
    """Make the model ready to be loaded anew; a load that was not ended is ended.

    Args:
        inside: a running vLLM.
    """
    if inside.loaded is not None:
        end_load(inside)
    for layer in _rearranged(inside.model):
        _forget_kernel(layer)
        _reload().initialize_layerwise_reload(layer)
    inside.loaded = set()


def _rearranged(model: nn.Module) -> list[nn.Module]:
    """Return the layers that hold their weights in another form than they come in, or others that are made of them."""
    linear = import_module("vllm.model_executor.layers.linear").UnquantizedLinearMethod
    embedding = import_module("vllm.model_executor.layers.vocab_parallel_embedding").UnquantizedEmbeddingMethod
    is_attention = import_module("vllm.model_executor.layers.attention").is_deferred_attention_layer

    def is_rearranged(layer: nn.Module) -> bool:
        method = getattr(layer, "quant_method", None)
        return method is not None and not (type(method) in {linear, embedding} and _is_matrix(layer))

    return [layer for layer in model.modules() if is_attention(layer) or is_rearranged(layer)]


def _forget_kernel(layer: nn.Module) -> None:
    """Let vLLM make the kernel of a mixture of experts anew.

    It rearranges the experts when their kernel is made, at the first load alone: where there is one already, a later
    load leaves the experts as they came, and the kernel takes them for rearranged ones.
    """
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

    with torch.no_grad(), _in_config(inside), _parts_of_a_model():
        inside.loaded |= cast("Any", inside.model).load_weights(noted())
    _keep_nothing(inside, storages)


@contextmanager
def _parts_of_a_model() -> Generator[None]:
    """Let a head that is tied to the embedding come without it: another bucket has that, and `end_load` looks."""
    loader = cast("Any", import_module("vllm.model_executor.models.utils")).AutoWeightsLoader
    check = loader._check_skipped_aliases  # noqa: SLF001  # it takes each call for a whole checkpoint
    loader._check_skipped_aliases = _take_any  # noqa: SLF001
    try:
        yield
    finally:
        loader._check_skipped_aliases = check  # noqa: SLF001


def _take_any(loader: object, loaded: set[str]) -> None:
    del loader, loaded


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
        rearranged = _rearranged(inside.model)
        for layer in rearranged:
            _reload().finalize_layerwise_reload(layer, inside.runner.model_config)
        for layer in inside.model.modules():
            if hasattr(layer, "cpu_linear") and layer not in rearranged:
                _multiply_in_place(layer)
    names: dict[int, list[str]] = {}
    for name, parameter in inside.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied[0] for tied in names.values() if not loaded.intersection(tied)]


def _in_config(inside: Inside) -> AbstractContextManager[object]:
    enter: Callable[[object], AbstractContextManager[object]] = import_module("vllm.config").set_current_vllm_config
    return enter(inside.runner.vllm_config)


def _reload() -> ModuleType:
    return import_module("vllm.model_executor.model_loader.reload")
