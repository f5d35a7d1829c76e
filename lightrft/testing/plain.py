"""Plain data as JSON and back, by its type: how cases and evidence travel between processes and to the reader."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from cattrs import Converter, transform_error
from cattrs.preconf.json import make_converter

from lightrft.errors import ConfigError

__all__ = ["from_json", "to_json"]

_Value = TypeVar("_Value")


def to_json(value: _Value, kind: type[_Value]) -> str:
    """Return a value as one line of JSON; every bit of a number or tensor is kept.

    Args:
        value: an attrs record, tuple, list, dict with string keys, number, text, tensor, or None.
        kind: its type.
    """
    return json.dumps(_converter().unstructure(value, unstructure_as=kind))


def from_json(text: str, kind: type[_Value]) -> _Value:
    """Return the value of a type that `to_json` wrote.

    Args:
        text: the JSON.
        kind: the type of the value.

    Raises:
        ConfigError: the text is no JSON, or not of this type.

    Example:
        >>> from_json(to_json((1, 0.1), tuple[int, float]), tuple[int, float])
        (1, 0.1)
    """
    try:
        return _converter().structure(json.loads(text), kind)
    except Exception as error:
        name = getattr(kind, "__name__", str(kind))
        raise ConfigError(
            f"example={text[:80]!r} is no {name} ({_problem(error)}); pass what a failed law printed."
        ) from error


def _problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    try:
        return "; ".join(transform_error(error, path="it"))
    except Exception:  # noqa: BLE001 (only errors of cattrs can be told by cattrs)
        return f"{type(error).__name__}: {error}"


@functools.cache  # a converter compiles one function a type
def _converter() -> Converter:
    converter = make_converter(forbid_extra_keys=True)
    converter.register_unstructure_hook(torch.Tensor, _plain_of_tensor)
    converter.register_structure_hook(torch.Tensor, _tensor_of_plain)
    return converter


def _plain_of_tensor(tensor: torch.Tensor) -> dict[str, object]:
    # a copy, because a tensor of one element may keep a stride that no view of its bytes can have
    whole = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    # bytes by way of uint8, because numpy knows no bfloat16
    data = whole.view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }


def _tensor_of_plain(plain: object, kind: object) -> torch.Tensor:
    del kind
    fields = cast("Mapping[str, object]", plain)
    dtype = getattr(torch, str(fields["dtype"]))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={fields['dtype']!r} is none of torch's.")
    data = bytearray(base64.b64decode(str(fields["data"]), validate=True))
    shape = cast("list[int]", fields["shape"])
    if not data:  # frombuffer refuses an empty buffer
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)
