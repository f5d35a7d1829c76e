"""The live tensors of a model by the names of the plain one, tied ones once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import attrs
import torch
from torch import nn

from lightrft.backends.checkpointing.sharded import local_part
from lightrft.backends.checkpointing.tensor_files import require_plain
from lightrft.backends.plain_model import plain_name
from lightrft.errors import UnsupportedError

__all__ = ["NamedState", "describe", "difference", "named_state"]

_SHOWN = 5  # names that an error lists in full


class _Described(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...


@attrs.frozen(kw_only=True, eq=False)
class NamedState:
    """Parameters and persistent buffers of a model.

    Attributes:
        tensors: the live tensors by name, whole or sharded, in the order of modules; a tied one under its first name.
        aliases: every further name of a tied tensor, and its first name.
    """

    tensors: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]


def named_state(model: nn.Module, *, owner: str) -> NamedState:
    """Return the live tensors of a model, under the names that they have without wrappers.

    Args:
        model: the model, its tensors whole or sharded.
        owner: what the model is called in errors.

    Raises:
        UnsupportedError: a module keeps extra state that is no tensor, or a tensor's bytes are not its values.
    """
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[int, str] = {}
    for name, tensor in _all_names(model, owner=owner):
        first = first_names.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
        else:
            require_plain(local_part(tensor), f"{owner}.{name}")
            tensors[name] = tensor
    return NamedState(tensors=tensors, aliases=aliases)


def describe(tensors: Mapping[str, _Described]) -> dict[str, str]:
    """Return dtype and shape of each tensor, in words.

    Args:
        tensors: by name.
    """
    return {name: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for name, tensor in tensors.items()}


def difference(*, saved: Mapping[str, object], live: Mapping[str, object]) -> str | None:
    """Return in words how two tables differ, in both directions, or None where they are equal.

    Args:
        saved: what the file has, by name.
        live: what the model has, by name.
    """
    missing = [name for name in live if name not in saved]
    unknown = [name for name in saved if name not in live]
    other = [
        f"{name} ({saved[name]} there, {live[name]} here)"
        for name in live
        if name in saved and saved[name] != live[name]
    ]
    parts = [("lacks", missing), ("has what the live state lacks:", unknown), ("differs in", other)]
    said = [f"{verb} {_listed(names)}" for verb, names in parts if names]
    return " and ".join(said) or None


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _all_names(model: nn.Module, *, owner: str) -> Iterator[tuple[str, torch.Tensor]]:
    # not `state_dict`: its hooks may rename, copy or leave out, and what is restored must be what is live
    for prefix, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UnsupportedError(
                f"{owner}.{prefix} ({type(module).__name__}) keeps extra state outside its tensors; make it a buffer."
            )
        # torch has no public way to ask for what is persistent, nor for tied tensors in the order of their modules
        transient = module._non_persistent_buffers_set  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        own = (*module._parameters.items(), *module._buffers.items())  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        for name, tensor in own:
            if tensor is not None and name not in transient:
                yield plain_name(f"{prefix}.{name}" if prefix else name), tensor
