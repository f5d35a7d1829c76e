"""A LoRA adapter that vLLM computes with as it is, beside the weights of the base.

vLLM reads adapters from directories. One is written for each update, without pickles and for as long as it is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast, get_args

import torch

from lightrft.backends.adapters import Adapted, adapter_tensors, owners_of
from lightrft.backends.rollout.vllm.differences import takes_patterns
from lightrft.backends.rollout.vllm.handle import Inside, SentAdapter
from lightrft.errors import UnsupportedError

__all__ = ["build_sent", "install", "without_adapter"]

_NAME, _NUMBER = "lightrft", 1  # by which vLLM tells adapters apart
_PREFIX = "base_model.model."  # what peft puts before names in its files


def build_sent(adapted: Adapted) -> SentAdapter:
    """Return an adapter that vLLM takes, before it is started.

    Args:
        adapted: a plain and whole model with its adapter.

    Raises:
        UnsupportedError: vLLM does not compute with such an adapter.
    """
    targets = _targets(adapted)
    if not takes_patterns() and (adapted.config.rank_pattern or adapted.config.alpha_pattern):
        raise _refusal("it does not look at rank_pattern and alpha_pattern before 0.32")
    ranks = [adapted.config.r, *(adapted.config.rank_pattern or {}).values()]
    known = get_args(import_module("vllm.config.lora").MaxLoRARanks)
    settings = {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min((rank for rank in known if rank >= max(ranks)), default=max(known)),
        "lora_target_modules": targets,
    }
    helper = import_module("vllm.lora.peft_helper").PEFTHelper
    config = import_module("vllm.config.lora").LoRAConfig(max_lora_rank=settings["max_lora_rank"])
    try:
        helper.from_dict(cast("Any", adapted.config).to_dict()).validate_legal(config)
    except ValueError as error:
        raise _refusal(str(error)) from error
    return SentAdapter(config=adapted.config, settings=settings, names=frozenset(adapter_tensors(adapted)))


def _targets(adapted: Adapted) -> list[str]:
    """Return how the layers that are adapted are called, each kind once."""
    from peft.tuners.lora import Linear

    found = owners_of(adapted)
    head = cast("Any", adapted.base).get_output_embeddings()
    for path, layer in found.items():
        if not isinstance(layer, Linear) or layer is head:
            raise _refusal(f"{path} is no linear layer below the head")
    return sorted({path.rsplit(".", 1)[-1] for path in found})


def _refusal(said: str) -> UnsupportedError:
    return UnsupportedError(
        f"engine.adapters='sent': vLLM does not take this adapter ({said.rstrip('.')}); use engine.adapters='merged'."
    )


def without_adapter(
    sent: SentAdapter | None, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the base, and keep copies of the others.

    Args:
        sent: the adapter of an engine that has one.
        tensors: (name, tensor) of an update.
    """
    for name, tensor in tensors:
        if sent is not None and name in sent.names:
            sent.tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        else:
            yield name, tensor


def install(inside: Inside, sent: SentAdapter) -> list[str]:
    """Let vLLM compute with the adapter that came, and return the names of what did not.

    Args:
        inside: a running vLLM.
        sent: its adapter; what was kept of it is let go of.
    """
    from safetensors.torch import save_file

    tensors, sent.tensors = sent.tensors, {}
    missed = sorted(sent.names.difference(tensors))
    if missed:
        return missed
    request = import_module("vllm.lora.request").LoRARequest
    with tempfile.TemporaryDirectory() as directory:
        sent.config.save_pretrained(directory)
        save_file({f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()}, _file(directory))
        engine = cast("Any", inside.llm.llm_engine)
        try:
            engine.add_lora(request(_NAME, _NUMBER, directory, load_inplace=True))
        except ValueError as error:
            raise _refusal(" ".join(str(error).split())[:300]) from error
        sent.request = request(_NAME, _NUMBER, directory)  # never read again: vLLM has this number
    return []


def _file(directory: str) -> Path:
    return Path(directory) / "adapter_model.safetensors"
