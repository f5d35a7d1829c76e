"""A plain whole copy of a model whose parameters a backend spreads over ranks."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Protocol

import attrs
import torch
from torch import nn

from lightrft.errors import UnsupportedError
from lightrft.strategy.protocols.training import NamedTensors, UnwrapModel

__all__ = ["PlainModel", "build_plain_model", "is_spread", "keep_structure", "plain_name"]

# what torch's activation checkpointing and `torch.compile` put between a module's name and those of its parts
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_checkpoint_wrapped_module|_orig_mod)(?:\.|$)")
_STRUCTURE = "_lightrft_structure"
"""Name of the attribute by which a module inside of a prepared one carries its `Structure`."""


@attrs.frozen(kw_only=True, eq=False)
class Structure:
    """A model as it was before a backend changed it, with parameters that have no memory.

    Attributes:
        model: its parameters are on the meta device, its buffers are real.
    """

    model: nn.Module


class PlainModel(Protocol):
    """Makes a plain model of a prepared one."""

    def __call__(self, model: nn.Module, /) -> nn.Module:
        """Return a whole model without a trace of the backend; all ranks call it.

        Where the backend keeps the plain model whole, it is that model itself, else a copy.

        Args:
            model: the prepared model.
        """
        ...


def plain_name(name: str) -> str:
    """Return the name that a tensor or module has without wrappers.

    Args:
        name: as torch has it.
    """
    return _WRAPPERS.sub("", name).removesuffix(".")


def keep_structure(model: nn.Module) -> None:
    """Let a plain model remember what it is, for a backend that is about to spread its parameters over ranks.

    Args:
        model: the plain model.

    Raises:
        UnsupportedError: the model holds something that cannot be copied.
    """
    memo: dict[int, object] = {id(parameter): _on_meta(parameter) for parameter in model.parameters()}
    try:
        structure = Structure(model=copy.deepcopy(model, memo))
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"model={type(model).__name__} cannot be copied ({error}); detach the tensors that it keeps, and keep "
            "locks and files elsewhere."
        ) from error
    setattr(model, _STRUCTURE, structure)  # a record, because a module would become a submodule


def is_spread(model: nn.Module) -> bool:
    """Return whether a backend has spread a model's parameters over ranks: its forward pass is a matter of all of them.

    Args:
        model: prepared or plain.
    """
    return any(_STRUCTURE in vars(module) for module in model.modules())


def build_plain_model(*, unwrap_model: UnwrapModel, named_tensors: NamedTensors) -> PlainModel:
    """Return the function that makes plain models.

    Args:
        unwrap_model: undoes the backend's `prepare`.
        named_tensors: the backend's stream of full tensors.
    """

    def plain_model(model: nn.Module) -> nn.Module:
        inner = unwrap_model(model)
        structure = vars(inner).get(_STRUCTURE)
        if not isinstance(structure, Structure):
            return inner
        # one at a time, and not the live tensors, which those of a world of one rank may be
        tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model)}
        plain = _filled(structure.model, tensors)
        for name, buffer in inner.named_buffers(remove_duplicate=False):  # those too that no checkpoint has
            place, _, own = name.rpartition(".")
            setattr(plain.get_submodule(place), own, buffer.detach().clone())
        for name, module in inner.named_modules():
            plain.get_submodule(name).training = module.training
        return plain

    return plain_model


def _filled(structure: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(tensors[name], requires_grad=parameter.requires_grad)
        for name, parameter in structure.named_parameters()
    }
    plain = copy.deepcopy(structure, memo)
    plain.to(next((tensor.device for tensor in tensors.values()), None))
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in plain.state_dict(keep_vars=True).items():
            if name not in parameters:
                tensor.copy_(tensors[name])
    return plain


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
