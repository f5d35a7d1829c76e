"""The attributes of an object that holds arguments, whatever its kind."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from types import MemberDescriptorType
from typing import Final, cast

from lightrft.config.redaction import redacted
from lightrft.errors import ConfigError

__all__ = ["attributes"]

_MISSING: Final = object()


def attributes(args: object, *, wanted: Collection[str]) -> Mapping[str, object]:
    """Return the public attributes of an object by name: its own, those in slots, and plain values of its class.

    Args:
        args: a namespace, a record of any library, an object of the user's own, or a mapping (returned as it is).
        wanted: names that are asked for by `getattr` too, so that properties and computed attributes count for them.

    Raises:
        ConfigError: `args` is of a kind that holds no arguments, such as None, a string, a function or a class.
    """
    if isinstance(args, Mapping):
        return cast("Mapping[str, object]", args)
    if isinstance(args, type) or inspect.isroutine(args):
        raise ConfigError(f"args={args!r} is a class or function; call it, and pass what it returns.")
    own = {**_of_class(args), **getattr(args, "__dict__", {})}
    if not own and not hasattr(args, "__dict__"):
        raise ConfigError(f"args={redacted(args)} has no attributes; pass a Namespace, a mapping or a StrategyConfig.")
    found = {name: getattr(args, name, _MISSING) for name in (*own, *wanted) if not name.startswith("_")}
    return {name: value for name, value in found.items() if value is not _MISSING}


def _of_class(args: object) -> dict[str, object]:
    members = {name: value for kind in reversed(type(args).__mro__) for name, value in vars(kind).items()}
    return {
        name: value
        for name, value in members.items()
        if not name.startswith("_") and (isinstance(value, MemberDescriptorType) or _is_plain(value))
    }


def _is_plain(value: object) -> bool:
    """Return whether a class attribute is data, and no method, property or nested class."""
    return not hasattr(type(value), "__get__") and not isinstance(value, type)
