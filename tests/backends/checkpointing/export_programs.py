"""What the tests of exports run on every rank of a pool of processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast
from unittest.mock import patch

import attrs
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.backends.checkpointing import parts, turns
from lightrft.backends.checkpointing.access import StateAccess
from lightrft.backends.checkpointing.access_deepspeed import build_access
from lightrft.backends.checkpointing.huggingface import build_save_model
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.errors import CheckpointError, LightRFTError
from lightrft.strategy.protocols.checkpointing import AdaptersKind
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
        piece_size: bytes that are gathered at once.
    """

    directory: str
    tied: bool
    max_file_size: int
    piece_size: int


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


def llama(seed: int, *, tied: bool, attention_bias: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=36,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
    )
    return cast("nn.Module", LlamaForCausalLM(config))


def access_of(rank: Rank, strategy: Strategy) -> StateAccess:
    """Return the access that the strategy itself exports with."""
    build = build_access if rank.config.strategy == "deepspeed" else build_live_access
    return build(strategy.unwrap_model)


def adapted_llama(seed: int, variant: str = "plain", *, tied: bool = True) -> PeftModel:
    """Return a llama with an adapter of random values."""
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "alpha": {"lora_alpha": 3, "use_rslora": True, "rank_pattern": {"down_proj": 3}},
        "dora": {"use_dora": True},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "bias": {"bias": "lora_only", "lora_bias": True, "target_modules": ["q_proj"]},
        "head": {"modules_to_save": ["lm_head"]},
        "named task": {"task_type": "CAUSAL_LM"},
    }
    base = llama(seed, tied=tied, attention_bias=variant == "bias")
    options = {"target_modules": ["q_proj", "down_proj"], **settings[variant]}
    model = cast("PeftModel", get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **options)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    return model


@attrs.frozen(kw_only=True)
class AdapterCase:
    """An export of a model with an adapter.

    Attributes:
        directory: where to.
        variant: of the adapter.
        adapters: what becomes of it.
        broken: number of the rank whose layers cannot be merged; -1 for none.
    """

    directory: str
    variant: str
    adapters: str
    broken: int = -1


@attrs.frozen(kw_only=True)
class AdapterSeen:
    """What one rank saw: bits before and after the export, its error, and the layers that hold a merged adapter."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    error: str
    num_merged: int


def export_adapters(rank: Rank, case: AdapterCase) -> AdapterSeen:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model = strategy.prepare(adapted_llama(0, case.variant, tied=case.variant == "plain"))
    before = {name: tensor.clone() for name, tensor in strategy.named_tensors(model)}
    layers = [module for module in strategy.unwrap_model(model).modules() if isinstance(module, LoraLayer)]
    if case.broken == rank.rank:
        layers[len(layers) // 2].scaling.clear()
    error = ""
    try:
        strategy.save_model(model, case.directory, adapters=cast("AdaptersKind", case.adapters))
    except LightRFTError as refused:
        error = str(refused)
    return AdapterSeen(
        before=before,
        after={name: tensor.clone() for name, tensor in strategy.named_tensors(model)},
        error=error,
        num_merged=sum(layer.merged for layer in layers),
    )


def export(rank: Rank, case: Case) -> Seen:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model, other = (strategy.prepare(llama(seed, tied=case.tied)) for seed in (0, 1))
    save_model = build_save_model(strategy, access_of(rank, strategy), max_file_size=case.max_file_size)
    with ExitStack() as stack:
        for module in (parts, turns):  # as large as the largest tensor, where a real one is much smaller than that
            stack.enter_context(patch.object(module, "PIECE_SIZE", case.piece_size))
        saving = stack.enter_context(Allocations())
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


def export_with_a_failing_tokenizer(rank: Rank, directory: str) -> str:
    """Return the error of an export whose tokenizer cannot write itself."""

    class Failing:
        def save_pretrained(self, save_directory: str, /) -> None:
            del save_directory
            raise KeyError("vocabulary")

    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model = strategy.prepare(llama(0, tied=True))
    try:
        strategy.save_model(model, directory, tokenizer=Failing())
    except (KeyError, CheckpointError) as error:
        return repr(error)
    return ""
