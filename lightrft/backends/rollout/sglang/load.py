"""How weights come into a running SGLang: by its own loaders, each of which is watched."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from lightrft.backends.rollout.sglang.handle import Inside
from lightrft.backends.rollout.sglang.package import Answer
from lightrft.errors import WeightSyncError

__all__ = ["begin_load", "end_load", "load", "one_by_one"]

_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What transformers holds as one tensor for all experts of a layer, and the names of its rows for one expert."""


def begin_load(inside: Inside) -> None:
    """Make the model ready to be loaded anew.

    Args:
        inside: a running SGLang.

    Raises:
        WeightSyncError: SGLang refuses.
    """
    updater, messages = inside.scheduler.weight_updater, inside.package.io_struct
    _require(updater.begin_weight_update(messages.BeginWeightUpdateReqInput()))
    inside.reached = {}


def load(inside: Inside, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load tensors, of which nothing is kept.

    Args:
        inside: a running SGLang whose load has begun.
        tensors: (name, tensor) with transformers' names.
    """
    with torch.no_grad(), _watched(inside.model, inside.reached, inside.package.weight_utils.default_weight_loader):
        # not its update_weights_from_tensor, which reads pickles and replaces functions of torch
        cast("Any", inside.model).load_weights(one_by_one(_renamed(inside.model, tensors)))


def _renamed(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors under SGLang's names, where the model reads images: it passes over names that it lacks."""
    for name, tensor in tensors:
        yield (_without_parts(name) if hasattr(model, "visual") else name), tensor


def _without_parts(name: str) -> str:
    for theirs, own in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return name


def one_by_one(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors with the experts of a mixture each under its own name, which SGLang's loaders know.

    Args:
        tensors: (name, tensor) with transformers' names.
    """
    for name, tensor in tensors:
        prefix, experts, part = name.partition(".experts.")
        if not experts or part not in _EXPERT_PARTS or tensor.dim() != 3:
            yield name, tensor
            continue
        for number, expert in enumerate(tensor):
            for own, piece in zip(_EXPERT_PARTS[part], expert.chunk(len(_EXPERT_PARTS[part])), strict=True):
                yield f"{prefix}.experts.{number}.{own}.weight", piece


def end_load(inside: Inside) -> list[str]:
    """Return the parameters that the load did not reach in all their parts, after it has ended.

    The first load that reaches every parameter says which elements a load must bring, as some parameters of SGLang have
    more than come: rows that fill the vocabulary up.

    Args:
        inside: a running SGLang whose load has begun.

    Raises:
        WeightSyncError: SGLang refuses.
    """
    updater, messages = inside.scheduler.weight_updater, inside.package.io_struct
    with torch.no_grad():
        _require(updater.end_weight_update(messages.EndWeightUpdateReqInput()))
    missed = [
        name
        for name, _ in inside.model.named_parameters()
        if inside.reached.get(name, 0) < max(inside.wanted.get(name, 0), 1)
    ]
    if not missed and not inside.wanted:
        inside.wanted = inside.reached
    return missed


def _require(answer: Answer) -> None:
    if not answer.success:
        raise WeightSyncError(f"SGLang refuses an update of its weights ({answer.message}); start a new engine.")


@contextmanager
def _watched(model: nn.Module, reached: dict[str, int], default: Callable[..., object]) -> Generator[None]:
    """Count what the parameters' own loaders are given; SGLang says nothing of names that it does not know."""

    def watch(name: str, loader: Callable[..., object]) -> Callable[..., object]:
        def noted(parameter: nn.Parameter, tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
            answer = loader(parameter, tensor, *args, **kwargs)
            reached[name] = reached.get(name, 0) + tensor.numel()
            return answer

        return noted

    before = [(parameter, getattr(parameter, "weight_loader", None)) for parameter in model.parameters()]
    for name, parameter in model.named_parameters():
        cast("Any", parameter).weight_loader = watch(name, getattr(parameter, "weight_loader", default))
    try:
        yield
    finally:
        for parameter, loader in before:
            if loader is None:
                del cast("Any", parameter).weight_loader
            else:
                cast("Any", parameter).weight_loader = loader
