"""A running vLLM as a handle, and what belongs to it: an adapter on its way, and a way to bring weights in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import attrs
import torch
from torch import nn

from lightrft.backends.rollout.vllm.package import Llm
from lightrft.strategy.protocols.images import Processor

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Begin", "End", "Inside", "Load", "Loader", "ModelRunner", "SentAdapter", "Starting"]


class Starting(Protocol):
    """Prepares vLLM's start."""

    def __call__(self) -> AbstractContextManager[None]:
        """Return what holds while vLLM starts."""
        ...


class Begin(Protocol):
    """Begins a load."""

    def __call__(self, inside: Inside) -> None:
        """Make the model ready to be loaded anew.

        Args:
            inside: a running vLLM without a load under way.

        Raises:
            UnsupportedError: the model cannot be loaded in this way.
        """
        ...


class Load(Protocol):
    """Loads tensors."""

    def __call__(self, inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Return the names of vLLM's parameters that tensors have reached; of the tensors nothing is kept.

        Whatever it raises, `End` can follow.

        Args:
            inside: a running vLLM whose load has begun.
            tensors: (name, tensor) with transformers' names; one of a tied pair may come without the other.
        """
        ...


class End(Protocol):
    """Ends a load."""

    def __call__(self, inside: Inside) -> None:
        """Make the model ready to generate, whether all of it was loaded or not.

        Args:
            inside: a running vLLM whose load has begun.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class Loader:
    """A way to bring weights in.

    Attributes:
        settings: what vLLM is to be started with.
        starting: holds while it starts.
        begin: begins a load.
        load: loads tensors.
        end: ends a load.
    """

    settings: Mapping[str, object]
    starting: Starting
    begin: Begin
    load: Load
    end: End


@attrs.define(kw_only=True, eq=False)
class SentAdapter:
    """An adapter on its way into vLLM; a handle.

    Attributes:
        config: the adapter's settings when the engine started.
        settings: what vLLM is to be started with.
        names: of the adapter's tensors.
        tensors: those of the update under way.
        request: what vLLM is asked with, once it has the adapter.
    """

    config: LoraConfig
    settings: Mapping[str, object]
    names: frozenset[str]
    tensors: dict[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor])
    request: object | None = None


class ModelRunner(Protocol):
    """What runs the model and owns the key-value cache."""

    kv_caches: list[torch.Tensor]
    model_config: object
    vllm_config: object

    def get_model(self) -> nn.Module:
        """Return vLLM's own model."""
        ...


@attrs.define(kw_only=True, eq=False)
class Inside:
    """A running vLLM; a handle.

    Attributes:
        llm: its outside.
        runner: what is below it.
        model: vLLM's own model.
        processor: of the trainer's model, if it reads images.
        loader: brings weights in.
        sent: an adapter that comes apart from the weights.
        temperature: divides the logits from now on.
        loaded: parameters that the load under way has reached.
        is_open: whether weights of the load under way have come.
        owns_group: whether the default process group was made for this engine.
        is_sharded: whether other ranks hold other parts of the weights.
        has_inner_tower: whether its tower of images is one name further down than transformers' is.
        held: the layers that vLLM does not load tensor by tensor, once they were looked for.
        tied: in parts of the model, names of parameters and the names that they share them with, likewise.
        cache_bytes: size of each tensor of the key-value cache.
    """

    llm: Llm
    runner: ModelRunner
    model: nn.Module
    processor: Processor | None
    loader: Loader
    sent: SentAdapter | None = None
    temperature: float = 1.0
    loaded: set[str] = attrs.field(factory=set[str])
    is_open: bool = False
    owns_group: bool
    is_sharded: bool
    has_inner_tower: bool
    held: Sequence[nn.Module] | None = None
    tied: dict[nn.Module, dict[str, str]] = attrs.field(factory=dict[nn.Module, dict[str, str]])
    cache_bytes: tuple[int, ...] = ()
