"""Python values as strict JSON and back, without losing a bit.

Numbers and types that JSON does not have become objects with one key that starts with "$". What a user passes is held
to JSON's own types; what torch keeps in optimizers and schedules may also be tuples, counters, dictionaries with other
keys, and tensors of one element.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeGuard, cast

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.protocols.checkpointing import Json

if TYPE_CHECKING:
    import torch

__all__ = ["as_dict", "decode", "dumps", "encode_client_state", "encode_internal", "loads"]

_Encode: TypeAlias = Callable[[object, str], Json]


class _Decode(Protocol):
    def __call__(self, body: Json, /) -> object: ...


def dumps(value: Json, *, indent: int | None = None) -> bytes:
    """Return the value as strict JSON in ASCII, ending with a newline; equal values give equal bytes.

    Args:
        value: what `encode_client_state` or `encode_internal` returned, or plain JSON.
        indent: spaces of one level; None writes one line.
    """
    return (json.dumps(value, allow_nan=False, indent=indent) + "\n").encode("ascii")


def loads(content: bytes, *, source: str) -> Json:
    """Return the JSON value that the bytes hold.

    Args:
        content: the bytes of a file.
        source: what the file is called in the error.

    Raises:
        CheckpointError: the bytes are not strict JSON, or a name stands twice in one object.
    """

    def refuse(constant: str) -> Json:
        raise ValueError(f"{constant} is not JSON")

    def refuse_twice(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        table = dict(pairs)
        if len(table) < len(pairs):  # JSON leaves open which of them counts
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
        return table

    try:
        return cast("Json", json.loads(content, parse_constant=refuse, object_pairs_hook=refuse_twice))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON ({error}); load another checkpoint.") from error


def as_dict(value: Json, *, source: str) -> dict[str, Json]:
    """Return the value if it is an object.

    Args:
        value: anything that JSON holds.
        source: what it is called in the error.

    Raises:
        CheckpointError: it is no object.
    """
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{source} holds a {type(value).__name__} where an object belongs; load another checkpoint."
        )
    return value


def encode_client_state(state: Mapping[str, object]) -> dict[str, Json]:
    """Return the user's state as strict JSON.

    Args:
        state: anything that JSON can hold; NaN, infinities and integers of any size are kept as they are.

    Raises:
        ConfigError: it holds something else; the message names its path.
    """
    if not isinstance(cast("object", state), Mapping):
        raise ConfigError(f"client_state={state!r} is not a mapping; pass a dict of names to values.")
    try:
        encoded = _encode_json(dict(state), "client_state")
    except RecursionError:
        raise ConfigError("client_state nests too deeply or holds itself; flatten it.") from None
    return cast("dict[str, Json]", encoded)


def encode_internal(value: object, path: str) -> Json:
    """Return what torch keeps in an optimizer or a schedule as strict JSON.

    Args:
        value: JSON's types, tuples, counters, dicts with any such keys, and tensors of at most one element.
        path: what the value is called in the error.

    Raises:
        ConfigError: it holds something else.
    """
    if isinstance(value, tuple):
        items = cast("tuple[object, ...]", value)
        return {"$tuple": [encode_internal(item, f"{path}[{index}]") for index, item in enumerate(items)]}
    if isinstance(value, Counter):
        return {"$counter": _encode_pairs(cast("Counter[object]", value), path, encode_internal)}
    if isinstance(value, dict):
        return _encode_dict(cast("dict[object, object]", value), path, encode_internal)
    if _is_scalar_tensor(value):
        return {"$tensor": _encode_tensor(value)}
    return _encode_plain(value, path, encode_internal)


def decode(value: Json) -> object:
    """Return the value that was encoded.

    Args:
        value: what `encode_client_state` or `encode_internal` returned.

    Raises:
        CheckpointError: it holds a form that this version does not know.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item) for key, item in value.items()}
    known = _DECODERS.get(tag)
    if known is None or len(value) != 1:
        raise CheckpointError(f"{tag!r} is no form of a value that this version reads; upgrade lightrft.")
    return known(value[tag])


def _encode_json(value: object, path: str) -> Json:
    if isinstance(value, dict):
        for key in cast("dict[object, object]", value):
            if not isinstance(key, str):
                raise ConfigError(f"{path} has the key {key!r}, a {type(key).__name__}; use str keys, which JSON has.")
        return _encode_dict(cast("dict[object, object]", value), path, _encode_json)
    return _encode_plain(value, path, _encode_json)


def _encode_plain(value: object, path: str, encode: _Encode) -> Json:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        # readers of JSON agree on 64 bits at most, and Python itself refuses decimal numbers of thousands of digits
        return int(value) if value.bit_length() < 64 else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [encode(item, f"{path}[{index}]") for index, item in enumerate(cast("list[object]", value))]
    raise ConfigError(
        f"{path} is a {type(value).__name__}, which JSON cannot hold; "
        "pass numbers, strings, booleans, None, lists and dicts."
    )


def _encode_dict(value: dict[object, object], path: str, encode: _Encode) -> Json:
    if any(not isinstance(key, str) or key.startswith("$") for key in value):
        return {"$items": _encode_pairs(value, path, encode)}
    return {str(key): encode(item, f"{path}.{key}") for key, item in value.items()}


def _encode_pairs(value: Mapping[object, object], path: str, encode: _Encode) -> Json:
    return [[encode(key, f"a key of {path}"), encode(item, f"{path}[{key!r}]")] for key, item in value.items()]


def _is_scalar_tensor(value: object) -> TypeGuard[torch.Tensor]:
    import torch

    return isinstance(value, torch.Tensor) and value.numel() <= 1


def _encode_tensor(value: torch.Tensor) -> Json:
    import torch

    content = bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist())
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "bytes": content.hex()}


def _decode_tensor(body: Json) -> object:
    import torch

    fields = as_dict(body, source="$tensor")
    name, shape = str(fields["dtype"]), cast("list[int]", fields["shape"])
    # not `getattr`: torch imports some of its modules when they are asked for by name
    dtype = cast("torch.dtype", vars(torch).get(name))
    try:
        return torch.tensor(list(bytes.fromhex(str(fields["bytes"]))), dtype=torch.uint8).view(dtype).reshape(shape)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"dtype={name!r} and shape={shape!r} are not those of the bytes of a tensor ({_first_line(error)}); "
            "load another checkpoint."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _decode_pairs(body: Json) -> dict[object, object]:
    return {decode(key): decode(item) for key, item in cast("list[list[Json]]", body)}


def _decode_counter(body: Json) -> object:
    counts: Counter[object] = Counter()
    counts.update(cast("dict[object, int]", _decode_pairs(body)))
    return counts


def _decode_tuple(body: Json) -> object:
    return tuple(decode(item) for item in cast("list[Json]", body))


def _decode_int(body: Json) -> object:
    return int(str(body), 16)


def _decode_float(body: Json) -> object:
    return float(str(body))


_DECODERS: Mapping[str, _Decode] = {
    "$counter": _decode_counter,
    "$float": _decode_float,
    "$int": _decode_int,
    "$items": _decode_pairs,
    "$tensor": _decode_tensor,
    "$tuple": _decode_tuple,
}
