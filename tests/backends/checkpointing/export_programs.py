"""What the tests of exports run on every rank of a pool of processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.backends.checkpointing.access import StateAccess
from lightrft.backends.checkpointing.access_deepspeed import build_access
from lightrft.backends.checkpointing.huggingface import build_save_model
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.strategy.record import Strategy
from lightrft.testing.subject import Rank


class Allocations(TorchDispatchMode):
    """Counts the bytes that operations allocate while it is on, and how many of them lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, int] = {}
        self.peak: int = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on parts come by
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known | self.living.keys():
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self.living[key] = storage.nbytes()
        weakref.finalize(storage, self.living.pop, key, None)
        self.peak = max(self.peak, sum(self.living.values()))


@attrs.frozen(kw_only=True)
class Case:
    """An export.

    Attributes:
        directory: where to.
        tied: whether the embeddings are.
        max_file_size: bytes.
    """

    directory: str
    tied: bool
    max_file_size: int


@attrs.frozen(kw_only=True)
class Seen:
    """What one rank saw.

    Attributes:
        live: bits of the exported model.
        loaded: bits of another one that read the export.
        peaks: bytes that saving and loading allocated at once.
        largest: bytes of the largest tensor.
        total: bytes of all tensors.
    """

    live: dict[str, Tensor]
    loaded: dict[str, Tensor]
    peaks: tuple[int, int]
    largest: int
    total: int


def llama(seed: int, *, tied: bool) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=36,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return cast("nn.Module", LlamaForCausalLM(config))


def access_of(rank: Rank, strategy: Strategy) -> StateAccess:
    """Return the access that the strategy itself exports with."""
    build = build_access if rank.config.strategy == "deepspeed" else build_live_access
    return build(strategy.unwrap_model)


def export(rank: Rank, case: Case) -> Seen:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model, other = (strategy.prepare(llama(seed, tied=case.tied)) for seed in (0, 1))
    save_model = build_save_model(strategy, access_of(rank, strategy), max_file_size=case.max_file_size)
    with Allocations() as saving:
        save_model(model, case.directory)
    with Allocations() as loading:
        strategy.load_model(other, case.directory)
    live = {name: tensor.clone() for name, tensor in strategy.named_tensors(model)}
    sizes = [tensor.nbytes for tensor in live.values()]
    return Seen(
        live=live,
        loaded={name: tensor.clone() for name, tensor in strategy.named_tensors(other)},
        peaks=(saving.peak, loading.peak),
        largest=max(sizes),
        total=sum(sizes),
    )
