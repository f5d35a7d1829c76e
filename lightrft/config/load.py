"""From a TOML file, a mapping and the command line to a `Config`."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from lightrft.config._names import dotted, sections, setting_fields, unknown_setting
from lightrft.config.redaction import shown
from lightrft.config.root import Config
from lightrft.errors import ConfigError

__all__ = ["apply_overrides", "from_mapping", "from_toml", "load_config"]

_POSITION = re.compile(
    r"^(?P<reason>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.DOTALL
)


def from_mapping(mapping: Mapping[str, object], *, source: str = "config") -> Config:
    """Return the configuration that a mapping describes.

    A value must have the very type of its setting; only an int is accepted for a float, a list for a tuple, and None
    where it is the default.

    Args:
        mapping: one mapping per section.
        source: where it is from, for messages.

    Raises:
        ConfigError: with one line for each unknown key and wrong value: the source, the dotted path, and what to do.

    Example:
        >>> from_mapping({"strategy": {"seed": 7}}).strategy.seed
        7
        >>> from_mapping({"strategy": {"sed": 7}})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightrft.errors.ConfigError: config: strategy.sed=7 is not a setting of strategy; did you mean 'seed'? ...
    """
    from lightrft.config._structuring import structure

    return structure(Config, mapping, source=source)


def from_toml(path: str | os.PathLike[str]) -> Config:
    """Return the configuration in a TOML file.

    Args:
        path: the file.

    Raises:
        ConfigError: the file cannot be read or is not TOML (with line and column), or `from_mapping` refuses it.
    """
    return from_mapping(_read_toml(path), source=os.fspath(path))


def load_config(path: str | os.PathLike[str] | None, overrides: Iterable[str] = ()) -> Config:
    """Return the configuration in a TOML file, changed by the command line.

    Args:
        path: the file; None takes the defaults.
        overrides: as for `apply_overrides`.

    Raises:
        ConfigError: as for `from_toml` and `apply_overrides`; each line says whether it is about the file or the
            command line.
    """
    from lightrft.config._structuring import structure

    listed = list(overrides)
    merged = apply_overrides({} if path is None else _read_toml(path), listed)
    source = "defaults" if path is None else os.fspath(path)
    return structure(Config, merged, source=source, overridden={_split(text)[0] for text in listed})


def apply_overrides(mapping: Mapping[str, object], overrides: Iterable[str]) -> dict[str, object]:
    """Return a copy of a mapping in which settings are replaced.

    Args:
        mapping: one mapping per section; it is left as it is.
        overrides: `section.key=value` each, the last one counts. The value is read as TOML; what is not a TOML value is
            a string as it stands. Only a table can be entered deeper: `data.task_options.max_digits=2`.

    Raises:
        ConfigError: with one line for each override that names no setting. Values are checked by `from_mapping`.

    Example:
        >>> apply_overrides({}, ["strategy.seed=7", "run.dir=runs/first"])
        {'strategy': {'seed': 7}, 'run': {'dir': 'runs/first'}}
    """
    merged = dict(mapping)
    problems: list[str] = []
    for text in overrides:
        try:
            path, value = _split(text)
            _require_setting(path, value)
            merged = _replaced(merged, path, value)
        except ConfigError as error:
            problems.append(f"command line: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return merged


def _split(text: str) -> tuple[tuple[str, ...], object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override={text!r} has no value; write section.key=value.")
    return tuple(part.strip() for part in name.split(".")), _parsed(value)


def _parsed(text: str) -> object:
    try:
        # inside a table in one line nothing can follow the value: no comment, no second key
        read = tomllib.loads(f"outer = {{inner = {text}}}")
    except (ValueError, RecursionError):
        return text
    return read["outer"]["inner"] if read.keys() == {"outer"} and read["outer"].keys() == {"inner"} else text


def _require_setting(path: tuple[str, ...], value: object) -> None:
    head, nested = path[0], sections(Config)
    if head not in nested:
        unknown = unknown_setting(Config, path[:1], value if len(path) == 1 else {})
        raise ConfigError(unknown)
    known = setting_fields(nested[head])
    if len(path) == 1:
        raise ConfigError(f"{head}={shown(value)} sets a section; write {head}.key=value. Known: {', '.join(known)}.")
    if path[1] not in known:
        raise ConfigError(unknown_setting(nested[head], path[:2], value if len(path) == 2 else {}, section=head))
    if len(path) > 2 and not isinstance(getattr(nested[head](), path[1]), Mapping):
        raise ConfigError(f"{dotted(path)}={shown(value)} is deeper than the setting; write {dotted(path[:2])}=value.")
    if "" in path:
        raise ConfigError(f"{dotted(path)}={shown(value)} has an empty name; write a name between the dots.")


def _replaced(mapping: Mapping[str, object], path: tuple[str, ...], value: object) -> dict[str, object]:
    name, rest = path[0], path[1:]
    if not rest:
        return {**mapping, name: value}
    inside = mapping.get(name, {})
    if not isinstance(inside, Mapping):
        raise ConfigError(f"{name}={shown(inside, name=name)} is not a table; nothing can be set in it.")
    return {**mapping, name: _replaced(cast("Mapping[str, object]", inside), rest, value)}


def _read_toml(path: str | os.PathLike[str]) -> dict[str, object]:
    shown_path = f"config={os.fspath(path)!r}"
    raw = _read_bytes(path, shown_path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        lines = raw[: error.start].split(b"\n")
        place = f"line {len(lines)}, column {len(lines[-1]) + 1}"
        raise ConfigError(f"{shown_path} is not UTF-8 at {place}; save it as UTF-8.") from error
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{shown_path} is nested too deeply; use fewer brackets within one another.") from error
    except ValueError as error:  # malformed, or a number with too many digits
        raise ConfigError(f"{shown_path} is not TOML{_reason(error, text)}; correct it there.") from error


def _read_bytes(path: str | os.PathLike[str], shown_path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{shown_path} does not exist; check the path.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{shown_path} is a directory; name the TOML file in it.") from error
    except OSError as error:
        raise ConfigError(
            f"{shown_path} cannot be read ({error.strerror}); check the file and its permissions."
        ) from error
    except ValueError as error:  # a null character
        raise ConfigError(f"{shown_path} is not a path ({error}); check it.") from error


def _reason(error: ValueError, text: str) -> str:
    found = _POSITION.match(str(error))
    if found is None:
        return f" ({error})"
    lines = text.split("\n")
    line, column = found["line"] or len(lines), found["column"] or len(lines[-1]) + 1
    return f" at line {line}, column {column} ({found['reason']})"
