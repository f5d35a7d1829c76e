"""One form for every value, so that configurations that mean the same are equal: attrs converters.

What has the wrong type is handed on as it is: the checks, which run afterwards, say what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

__all__ = ["copied", "pair", "plain", "real", "real_or_none", "texts"]


def real(value: float) -> float:
    """Return an int as the float that it equals, and minus zero as zero."""
    given = cast("object", value)
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        return value
    try:
        return float(given) + 0.0
    except OverflowError:
        return value


def real_or_none(value: float | None) -> float | None:
    """Return None as it is and everything else as `real` does."""
    return None if value is None else real(value)


def pair(value: tuple[float, float]) -> tuple[float, float]:
    """Return a list or tuple of numbers as a tuple of floats."""
    given = cast("object", value)
    if not isinstance(given, (list, tuple)):
        return value
    return cast("tuple[float, float]", tuple(real(item) for item in cast("list[float]", given)))


def texts(value: tuple[str, ...]) -> tuple[str, ...]:
    """Return a list as a tuple."""
    given: object = value
    return tuple(cast("list[str]", given)) if isinstance(given, list) else value


def copied(value: Mapping[str, object]) -> Mapping[str, object]:
    """Return a copy that no later change of the original's dicts and lists reaches.

    Objects of any other type, subclasses of dict among them, are the user's own and stay the same objects.
    """
    given = cast("object", value)
    if not isinstance(given, Mapping):
        return value
    return {key: _copied(item) for key, item in value.items()}


def _copied(value: object) -> object:
    if type(value) is dict:
        return {key: _copied(item) for key, item in cast("dict[object, object]", value).items()}
    if type(value) is list:
        return [_copied(item) for item in cast("list[object]", value)]
    if type(value) is tuple:
        return tuple(_copied(item) for item in cast("tuple[object, ...]", value))
    return value


def plain(value: Mapping[str, object]) -> Mapping[str, object]:
    """Return a copy of dicts and lists alone, as TOML and JSON have them, made from mappings, lists and tuples."""
    return cast("Mapping[str, object]", _plain(value))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("list[object]", value)]
    return value
