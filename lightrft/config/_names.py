"""Names of settings: dotted paths, and what a misspelt one was meant to be."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, get_type_hints

import attrs

from lightrft.config.redaction import shown
from lightrft.errors import nearest

__all__ = ["NOT_A_SETTING", "dotted", "hint", "one_edit", "quoted", "sections", "setting_fields", "unknown_setting"]

NOT_A_SETTING: Final[Mapping[str, bool]] = MappingProxyType({"setting": False})
"""Metadata of a field that is neither read nor written, such as the object that a record was made from."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def quoted(text: str) -> str:
    """Return a string as TOML writes it, in double quotes and on one line."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL


def dotted(path: Iterable[object]) -> str:
    """Return a path as TOML writes it, such as `data.task_options.max_digits`."""
    return ".".join(name if _BARE.fullmatch(name) else quoted(name) for name in map(str, path))


def setting_fields(kind: type[attrs.AttrsInstance]) -> dict[str, attrs.Attribute[Any]]:
    """Return the fields of a record that are settings, by name."""
    return {field.name: field for field in attrs.fields(kind) if field.metadata.get("setting", True)}


def sections(kind: type[attrs.AttrsInstance]) -> dict[str, type[attrs.AttrsInstance]]:
    """Return the records among the settings of a record, by name."""
    types = get_type_hints(kind)
    return {name: types[name] for name in setting_fields(kind) if attrs.has(types[name])}


def one_edit(first: str, second: str) -> bool:
    """Return whether one character added, left out, changed or swapped with its neighbour turns one into the other.

    Example:
        >>> one_edit("max_norn", "max_norm"), one_edit("max_norm", "max_norm")
        (True, False)
    """
    start = next((i for i, (left, right) in enumerate(zip(first, second, strict=False)) if left != right), None)
    start = min(len(first), len(second)) if start is None else start
    left, right = first[start:], second[start:]
    swapped = len(left) > 1 and left[:2] == right[1::-1] and left[2:] == right[2:]
    return first != second and (swapped or left[1:] == right[1:] or left[1:] == right or left == right[1:])


def hint(name: str, known: Collection[str]) -> str:
    """Return the known names, with all that are one edit from `name` first, or else the one that looks most alike.

    Args:
        name: what was written.
        known: what could have been written.
    """
    close = [repr(candidate) for candidate in sorted(known) if one_edit(name, candidate)]
    if not close:
        return nearest(name, known)
    return f"did you mean {' or '.join(close)}? Known: {', '.join(sorted(known))}"


def unknown_setting(
    root: type[attrs.AttrsInstance], path: tuple[object, ...], value: object, *, section: str = ""
) -> str:
    """Return the sentence about a key that is no setting.

    Args:
        root: the record that the key was looked up in.
        path: keys from the root of the configuration to the unknown one.
        value: what stands under the key; it is not printed for a table, nor under the name of a secret.
        section: path of the record `root` itself, where it is a part of another.
    """
    name = str(path[-1])
    nested = sections(root)
    written = dotted(path) if isinstance(value, Mapping) else f"{dotted(path)}={shown(value, name=name)}"
    owners = [f"{section}.{name}" for section, kind in nested.items() if name in setting_fields(kind)]
    if owners:
        return f"{written} is not a section; did you mean {' or '.join(map(repr, owners))}?"
    noun = "a section" if nested else f"a setting of {section or root.__name__}"
    return f"{written} is not {noun}; {hint(name, setting_fields(root))}."
