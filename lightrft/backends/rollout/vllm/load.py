"""How weights come into a running vLLM: by the way that its version allows, and with what came of it counted.

There are two ways. `load_fast` leans on the inside of vLLM and is taken for the versions that it was held to;
`load_public` uses vLLM's interface for the transfer of weights alone, and is taken for every other one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import nn

from lightrft.backends.rollout.vllm.adapter import install, without_adapter
from lightrft.backends.rollout.vllm.differences import reached_names
from lightrft.backends.rollout.vllm.handle import Inside, Loader
from lightrft.backends.rollout.vllm.load_fast import build_fast_loader
from lightrft.backends.rollout.vllm.load_public import build_public_loader
from lightrft.backends.rollout.vllm.package import installed_version, is_known

__all__ = ["begin_load", "choose_loader", "end_load", "has_inner_tower", "load"]

_INNER_TOWER = "vision_tower.vision_model."
"""Where vLLM has towers of CLIP and SigLIP, which transformers has one name further up."""


def choose_loader() -> Loader:
    """Return the fastest way that the version of vLLM allows."""
    return build_fast_loader() if is_known(installed_version()) else build_public_loader()


def has_inner_tower(model: nn.Module) -> bool:
    """Return whether a model of vLLM has its tower of images one name further down than transformers does.

    Args:
        model: vLLM's own.
    """
    return any(_INNER_TOWER in name for name, _ in model.named_parameters())


def begin_load(inside: Inside) -> None:
    """Make the model ready to be loaded anew, once something of it comes.

    Args:
        inside: a running vLLM.
    """
    inside.loaded, inside.is_open = set(), False
    if inside.sent is not None:
        inside.sent.tensors.clear()


def load(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load tensors, of which nothing is kept.

    Args:
        inside: a running vLLM whose load has begun.
        tensors: (name, tensor) with transformers' names.
    """
    weights = without_adapter(inside.sent, tensors)
    first = next(weights, None)
    if first is None:
        return  # of an adapter alone
    with torch.no_grad():
        if not inside.is_open:
            inside.loader.begin(inside)
            inside.is_open = True
        inside.loaded |= inside.loader.load(inside, _renamed(inside, chain([first], weights)))


def _renamed(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        is_further_up = inside.has_inner_tower and _INNER_TOWER not in name
        yield name.replace("vision_tower.", _INNER_TOWER) if is_further_up else name, tensor


def end_load(inside: Inside) -> list[str]:
    """Return the parameters that the load did not reach, after it has ended.

    Args:
        inside: a running vLLM whose load has begun.
    """
    missed = _end_weights(inside) if inside.is_open else []
    return missed if missed or inside.sent is None else install(inside, inside.sent)


def _end_weights(inside: Inside) -> list[str]:
    reached, inside.is_open = reached_names(inside.loaded), False
    with torch.no_grad():
        inside.loader.end(inside)
    names: dict[int, list[str]] = {}
    for name, parameter in inside.model.named_parameters(remove_duplicate=False):
        # vLLM puts a layer with room for an adapter around one that has been there before
        names.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    return [tied[0] for tied in names.values() if not reached.intersection(tied)]
