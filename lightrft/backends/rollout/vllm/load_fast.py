"""Weights come into a running vLLM straight into the matrices with which it multiplies; of versions that are known.

On a CPU vLLM multiplies with a rearranged copy of each matrix, and makes that copy anew whenever weights come, which
takes many times as long as to copy them. Here linear layers multiply with their matrices where they lie, and matrices
are rearranged later, once they were used so often that it pays. What cannot wait, such as the experts of a mixture, is
loaded layer by layer, as vLLM itself does it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from itertools import chain
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import nn

from lightrft.backends.rollout.projection import Multiply, build_multiplication
from lightrft.backends.rollout.vllm.handle import Inside, Loader

__all__ = ["build_fast_loader"]


class _Linear(Protocol):
    weight: torch.Tensor
    cpu_linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class _ExpertsMethod(Protocol):
    moe_kernel: object


def build_fast_loader() -> Loader:
    """Return the way that leans on the inside of vLLM."""
    return Loader(settings={}, starting=_plain_matrices, begin=_begin, load=_load, end=_end)


@contextmanager
def _plain_matrices() -> Generator[None]:
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


def _begin(inside: Inside) -> None:
    if inside.held is None:
        inside.held = _rearranged(inside.model)
    for layer in inside.held:
        _forget_kernel(layer)
        _reload().initialize_layerwise_reload(layer)


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


def _load(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    storages: set[int] = set()

    def noted() -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            storages.add(tensor.untyped_storage().data_ptr())
            yield name, tensor

    with _in_config(inside), _parts_of_a_model(inside):
        reached: set[str] = cast("Any", inside.model).load_weights(noted())
    _keep_nothing(inside, storages)
    return reached


@contextmanager
def _parts_of_a_model(inside: Inside) -> Generator[None]:
    """Let vLLM take each of many calls for what it is, and not for a whole checkpoint.

    A head that is tied to the embedding may come without it: another bucket has that, and `load.end_load` looks. Which
    parameters are tied is looked for in all layers at every call, and stays what it is.
    """
    utils = cast("Any", import_module("vllm.model_executor.models.utils"))
    loader, find_tied = utils.AutoWeightsLoader, utils._get_tied_embedding_params  # noqa: SLF001
    check = loader._check_skipped_aliases  # noqa: SLF001

    def remembered(module: nn.Module) -> dict[str, str]:
        if module not in inside.tied:
            inside.tied[module] = find_tied(module)
        return inside.tied[module]

    loader._check_skipped_aliases = _take_any  # noqa: SLF001
    utils._get_tied_embedding_params = remembered  # noqa: SLF001
    try:
        yield
    finally:
        loader._check_skipped_aliases = check  # noqa: SLF001
        utils._get_tied_embedding_params = find_tied  # noqa: SLF001


def _take_any(loader: object, loaded: set[str]) -> None:
    del loader, loaded


def _keep_nothing(inside: Inside, storages: set[int]) -> None:
    """Copy what vLLM keeps of the tensors until the other parts of a layer come: they are the caller's, to write to."""
    infos = _reload().layerwise.LAYERWISE_INFO
    for layer in chain.from_iterable(held.modules() for held in inside.held or ()):
        for _, call in infos[layer].loaded_weights:
            tensor = call.arguments["loaded_weight"]
            if tensor.untyped_storage().data_ptr() in storages:
                call.arguments["loaded_weight"] = tensor.clone()


def _end(inside: Inside) -> None:
    with _in_config(inside):
        for layer in inside.held or ():
            _reload().finalize_layerwise_reload(layer, inside.runner.model_config)
        held = set(inside.held or ())
        for layer in inside.model.modules():
            if "cpu_linear" in vars(layer) and layer not in held:
                _multiply_in_place(layer)


def _in_config(inside: Inside) -> AbstractContextManager[object]:
    enter: Callable[[object], AbstractContextManager[object]] = import_module("vllm.config").set_current_vllm_config
    return enter(inside.runner.vllm_config)


def _reload() -> ModuleType:
    return import_module("vllm.model_executor.model_loader.reload")
