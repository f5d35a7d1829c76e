"""Checks of single settings: attrs validators that speak in the house form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, cast

import attrs

from lightrft.config._names import dotted
from lightrft.config.redaction import shown
from lightrft.errors import ConfigError, nearest

__all__ = [
    "Check",
    "are_texts",
    "at_least",
    "between",
    "is_bool",
    "is_name",
    "is_text",
    "is_url_or_empty",
    "named",
    "one_of",
    "optional",
    "plain_table",
    "two_shares",
]

# attrs asks for `Attribute[T]` with the field's own T, which is invariant; only Any lets one check serve all fields.
Check: TypeAlias = Callable[[Any, "attrs.Attribute[Any]", Any], None]
"""What attrs calls with the record under construction, the field and its value."""


_LARGEST = 2**63 - 1
"""The largest integer that TOML and torch have."""


def _number(field: attrs.Attribute[Any], value: object, *, whole: bool) -> float:
    wanted = "an integer" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (whole and isinstance(value, float)):
        raise ConfigError(f"{field.name}={shown(value)} is not {wanted}; write {wanted}.")
    if not whole and not _is_finite(value):
        raise ConfigError(f"{field.name}={shown(value)} is not finite; write {wanted}.")
    if whole and value > _LARGEST:
        raise ConfigError(f"{field.name}={shown(value)} is too large; use {_LARGEST} or less.")
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def at_least(low: float, *, whole: bool = False) -> Check:
    """Return a check that a number is at least `low` (an int when `whole`)."""

    def check(record: object, field: attrs.Attribute[Any], value: object) -> None:
        del record
        if _number(field, value, whole=whole) < low:
            raise ConfigError(f"{field.name}={value!r} is too small; use {low} or more.")

    return check


def between(low: float, high: float, *, above_low: bool = False, whole: bool = False) -> Check:
    """Return a check that a number (an int when `whole`) lies in [low, high], or in (low, high] when `above_low`."""
    interval = f"{'(' if above_low else '['}{low}, {high}]"

    def check(record: object, field: attrs.Attribute[Any], value: object) -> None:
        del record
        number = _number(field, value, whole=whole)
        if number < low or number > high or (above_low and number == low):
            wanted = "an integer" if whole else "a number"
            raise ConfigError(f"{field.name}={value!r} is out of range; use {wanted} in {interval}.")

    return check


def is_bool(record: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that the value is True or False, and no number or string that only looks like one."""
    del record
    if not isinstance(value, bool):
        raise ConfigError(f"{field.name}={shown(value)} is not a bool; use true or false.")


def is_text(record: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that the value is a string."""
    del record
    if not isinstance(value, str):
        raise ConfigError(
            f"{field.name}={shown(value)} is not a string; put it in double quotes, and on a command line all of it in "
            "single ones."
        )


def is_name(record: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that the value is a string that is not empty, as a variable of the shell that is not set would leave it."""
    is_text(record, field, value)
    if not value:
        raise ConfigError(f"{field.name}='' is empty; write a name, or leave the setting out.")


def is_url_or_empty(record: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that the value is the address of a web server, or ""."""
    is_text(record, field, value)
    if value and not re.fullmatch(r"https?://[^/\s?#@]+/?", cast("str", value)):
        raise ConfigError(f'{field.name}={shown(value)} is no address of a server; write "http://host:port".')


def are_texts(record: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that the value is a tuple of strings, and no string alone."""
    del record
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in cast("tuple[object, ...]", value)):
        raise ConfigError(f'{field.name}={shown(value)} is not a list of strings; write it as ["...", "..."].')


def one_of(known: Collection[str]) -> Check:
    """Return a check that the value is one of the known names."""

    def check(record: object, field: attrs.Attribute[Any], value: object) -> None:
        del record
        if not isinstance(value, str) or value not in known:
            raise ConfigError(f"{field.name}={shown(value)} is not known; {nearest(str(value), known)}.")

    return check


def optional(check: Check) -> Check:
    """Return a check that lets None pass and holds everything else to `check`."""

    def check_unless_none(record: object, field: attrs.Attribute[Any], value: object) -> None:
        if value is not None:
            check(record, field, value)

    return check_unless_none


def named(record: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that the value is a mapping with string keys; its values may be anything."""
    del record
    if not isinstance(value, Mapping) or not all(
        isinstance(key, str) for key in cast("Mapping[object, object]", value)
    ):
        raise ConfigError(f"{field.name}={shown(value)} is not a table of named values; write it as a table.")


def plain_table(record: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that the value is a mapping with string keys that TOML and JSON can both hold."""
    named(record, field, value)
    _plain(value, field.name, name="")


def _plain(value: object, place: str, *, name: str) -> None:
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str):
                raise ConfigError(f"{place} has the key {key!r}, which is not a string; put it in quotes.")
            _plain(item, f"{place}.{dotted([key])}", name=key)
    elif isinstance(value, list):
        for position, item in enumerate(cast("list[object]", value)):
            _plain(item, f"{place}[{position}]", name=name)
    elif not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(
            f"{place}={shown(value, name=name)} is not a string, a finite number, a bool, a list or a table; "
            "write it as one of them, or leave it out."
        )


def two_shares(record: object, field: attrs.Attribute[Any], value: object) -> None:
    """Check that the value is a pair of numbers in [0, 1)."""
    del record
    if not isinstance(value, tuple) or len(cast("tuple[object, ...]", value)) != 2:
        raise ConfigError(f"{field.name}={shown(value)} is not a pair of numbers; write it as [0.9, 0.95].")
    if not all(0 <= _number(field, item, whole=False) < 1 for item in cast("tuple[object, object]", value)):
        raise ConfigError(f"{field.name}={value!r} is out of range; use two numbers in [0, 1).")
