"""From a mapping to a record: cattrs walks the records, and each setting's own check decides about its value.

This is the one module that imports cattrs; whoever needs it imports it inside a function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar, cast

import attrs
from cattrs import Converter
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

from lightrft.config._checks import Check
from lightrft.config._names import dotted, sections, setting_fields, unknown_setting
from lightrft.config.redaction import HIDDEN, is_secret, shown
from lightrft.errors import ConfigError

__all__ = ["structure"]

_Record = TypeVar("_Record", bound=attrs.AttrsInstance)
_Path = tuple[str, ...]
_Problem = tuple[_Path, str]  # the path of what is wrong, and the sentence about it, which starts with that path


def structure(
    kind: type[_Record], mapping: object, *, source: str, overridden: Collection[tuple[str, ...]] = ()
) -> _Record:
    """Return the record of a class that a mapping describes.

    Args:
        kind: class of the record; its fields may be records in their turn.
        mapping: settings by name, at any depth.
        source: where the mapping is from.
        overridden: paths of the settings that are from the command line.

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: config={shown(mapping)} is not a mapping; pass a mapping of names to values.")
    given = cast("Mapping[str, object]", mapping)
    problems = list(_hidden_secrets(given, ()))
    if not problems:
        try:
            return cast("_Record", _reader(kind)(given, kind))
        except ClassValidationError as error:
            problems = list(_problems(error, kind, given, ()))
    lines = [f"{_label(path, source, overridden)}: {text}" for path, text in problems]
    raise ConfigError("\n".join(dict.fromkeys(lines)))


def _label(path: _Path, source: str, overridden: Collection[_Path]) -> str:
    if path in overridden:
        return "command line"
    touched = any(other[: len(path)] == path for other in overridden)
    return f"{source} and command line" if touched else source


@functools.cache  # a pure function of the class, and most of the time that reading takes
def _reader(kind: type[attrs.AttrsInstance]) -> Callable[[Mapping[str, Any], Any], object]:
    # Any, because the signature puts cattrs' own switches and the overrides into one namespace
    hooks: dict[str, Any] = {
        name: override(omit=True) for name in attrs.fields_dict(kind).keys() - setting_fields(kind).keys()
    }
    nested = sections(kind)
    for name, field in setting_fields(kind).items():
        hook = _section(name, _reader(nested[name])) if name in nested else _setting(field)
        hooks[name] = override(struct_hook=hook)
    # without linecache, which would keep the source of every function made here for good
    return make_dict_structure_fn(
        kind,
        Converter(),
        _cattrs_forbid_extra_keys=True,
        _cattrs_detailed_validation=True,
        _cattrs_use_linecache=False,
        **hooks,
    )


def _setting(field: attrs.Attribute[Any]) -> Callable[[object, object], object]:
    def read_setting(value: object, kind: object) -> object:
        del kind
        convert = cast("Callable[[object], object] | None", field.converter)
        converted = value if convert is None else convert(value)
        cast("Check", field.validator)(None, field, converted)  # every setting has one
        return converted

    return read_setting


def _section(name: str, read: Callable[[Mapping[str, Any], Any], object]) -> Callable[[object, object], object]:
    def read_section(value: object, kind: object) -> object:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}={shown(value)} is not a table; write its settings under [{name}].")
        return read(cast("Mapping[str, Any]", value), kind)

    return read_section


def _problems(
    error: Exception, kind: type[attrs.AttrsInstance], mapping: Mapping[str, object], path: _Path
) -> Iterator[_Problem]:
    if isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields, key=str):
            yield (*path, str(key)), unknown_setting(kind, (*path, key), mapping[key], section=dotted(path))
    elif isinstance(error, ClassValidationError):
        for inner in error.exceptions:
            yield from _problems_of_part(inner, kind, mapping, path)
    elif isinstance(error, ConfigError):
        prefix = "".join(f"{dotted([part])}." for part in path)
        yield path, f"{prefix}{error}"  # the message starts with the name of a setting of this record
    else:
        raise error


def _problems_of_part(
    error: Exception, kind: type[attrs.AttrsInstance], mapping: Mapping[str, object], path: _Path
) -> Iterator[_Problem]:
    name = next((note.name for note in getattr(error, "__notes__", ()) if hasattr(note, "name")), None)
    if name is None:  # about the record as a whole
        yield from _problems(error, kind, mapping, path)
    elif isinstance(error, ClassValidationError):
        inside = cast("Mapping[str, object]", mapping[name])
        yield from _problems(error, sections(kind)[name], inside, (*path, name))
    else:
        for _, text in _problems(error, kind, mapping, path):
            yield (*path, name), text


def _hidden_secrets(value: object, path: _Path) -> Iterator[_Problem]:
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            yield from _hidden_secrets(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for item in cast("list[object]", value):
            yield from _hidden_secrets(item, path)
    elif value == HIDDEN and path and is_secret(path[-1]):
        yield (
            path,
            f"{dotted(path)}={HIDDEN!r} stands for a secret that was not printed; set the secret, or remove the line.",
        )
