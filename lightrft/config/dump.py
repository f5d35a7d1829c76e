"""From a record to what is written: TOML that reads back equal, JSON for manifests, and a digest.

Secrets are never written: `***` stands in their place, and reading that is refused with the path of what to set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import date, time
from enum import Enum
from typing import cast

import attrs

from lightrft.config._names import dotted, quoted, sections, setting_fields
from lightrft.config.redaction import HIDDEN, hides, redact, shown
from lightrft.errors import ConfigError

__all__ = ["as_mapping", "config_digest", "to_json", "to_toml"]


def to_toml(config: attrs.AttrsInstance) -> str:
    """Return a configuration as TOML that reads back equal, but for secrets, which are written as `***`.

    Settings that are None are left out, as is the object that a StrategyConfig was made from.

    Args:
        config: a Config, or one of its sections.

    Raises:
        ConfigError: `extra_args` holds what TOML cannot (None, or an object that is no plain data), or a string holds
            what Unicode cannot.

    Example:
        >>> from lightrft.config import CheckpointConfig
        >>> print(to_toml(CheckpointConfig(max_num=3)), end="")
        save_every = 50
        save_minutes = 0.0
        max_num = 3
        keep_every = 0
        keep_best = 0
        save_in_background = false
    """
    text = "\n".join(_lines(config, ())).strip("\n") + "\n"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"config={text[error.start]!r} is not Unicode; write that setting without it.") from error
    return text


def _lines(record: attrs.AttrsInstance, path: tuple[str, ...]) -> Iterator[str]:
    values = {name: getattr(record, name) for name in setting_fields(type(record))}
    nested = sections(type(record))
    tables = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    for name, value in values.items():
        if value is not None and name not in nested and name not in tables:
            yield f"{name} = {_value(value, (*path, name))}"
    for name, value in tables.items():
        if value:
            yield from ("", f"[{dotted((*path, name))}]")
            items = cast("Mapping[str, object]", value).items()
            yield from (f"{dotted([key])} = {_value(item, (*path, name, key))}" for key, item in items)
    for name in nested:
        yield from ("", f"[{dotted((*path, name))}]", *_lines(values[name], (*path, name)))


def _value(value: object, path: tuple[str, ...]) -> str:  # noqa: PLR0911  one line per type that TOML has
    if isinstance(value, bool):
        return "true" if value else "false"
    if hides(path[-1], value):
        return quoted(HIDDEN)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item, path) for item in cast('list[object]', value))}]"
    if isinstance(value, Mapping):
        return _inline_table(cast("Mapping[object, object]", value), path)
    raise ConfigError(f"{dotted(path)}={shown(value)} cannot be written as TOML; make it plain data, or take it out.")


def _inline_table(value: Mapping[object, object], path: tuple[str, ...]) -> str:
    strange = [key for key in value if not isinstance(key, str)]
    if strange:
        raise ConfigError(f"{dotted(path)} has the key {strange[0]!r}, which TOML cannot hold; use a string.")
    items = (f"{dotted([key])} = {_value(item, (*path, str(key)))}" for key, item in value.items())
    return f"{{{', '.join(items)}}}"


def as_mapping(config: attrs.AttrsInstance) -> dict[str, object]:
    """Return a configuration as plain data that JSON can hold, without secrets, for metrics and manifests.

    `from_mapping` reads it back equal where it holds no secrets and `extra_args` holds only plain data. Of other
    things there, a path is written as a string, an enum's member as its value, a date in ISO form, a number that is not
    finite as a string, and any other object as the name of its type.

    Args:
        config: a Config, or one of its sections.
    """
    nested = sections(type(config))
    values = {name: getattr(config, name) for name in setting_fields(type(config))}
    return {
        name: as_mapping(value) if name in nested else _plain(redact(value, name=name))
        for name, value in values.items()
    }


def _plain(value: object) -> object:  # noqa: PLR0911  one line per type
    if isinstance(value, Enum):
        return _plain(cast("object", value.value))
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, os.PathLike):
        return os.fsdecode(cast("os.PathLike[str]", value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("list[object]", value)]
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def to_json(config: attrs.AttrsInstance) -> str:
    """Return `as_mapping(config)` as JSON in canonical form: keys in order, no spaces, ASCII alone."""
    return json.dumps(as_mapping(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def config_digest(config: attrs.AttrsInstance) -> str:
    """Return the SHA-256 of `to_json(config)` in hexadecimal: the same in every process, and blind to secrets."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()
