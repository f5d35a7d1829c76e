"""What must never be printed: values under names that say they are secret."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from enum import Enum
from os import PathLike
from typing import cast

import attrs

__all__ = ["HIDDEN", "hides", "is_secret", "redact", "redacted", "shown"]

HIDDEN = "***"
"""What stands in the place of a secret."""

_WORD = re.compile(
    r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+"
)  # of snake_case, kebab-case, camelCase and UPPER_CASE names; no digits
_ALWAYS = frozenset(
    {"auth", "authorization", "bearer", "cookie", "cookies", "credential", "credentials", "pwd", "secrets"}
)
_ENDINGS = ("secret", "password", "passwords", "passwd", "passphrase", "apikey", "apikeys")
_BEFORE_KEY = frozenset(
    {
        "api",
        "access",
        "private",
        "secret",
        "signing",
        "encryption",
        "ssh",
        "account",
        "service",
        "license",
        "wandb",
        "openai",
    }
)
_BEFORE_TOKENS = frozenset({"access", "api", "refresh", "session", "hf", "hub"})
# Before "token" these words speak of a model's vocabulary or count its tokens.
# fmt: off
_OF_TEXT = frozenset({
    "pad", "eos", "bos", "unk", "mask", "sep", "cls", "stop", "special", "start", "end", "think", "image",
    "video", "audio", "vision", "text",
    "per", "next", "first", "last", "max", "min", "num", "new", "prompt", "completion", "each", "current",
})
# fmt: on
_AFTER_TOKEN = frozenset({"value", "string", "secret"})
_API_KEY_FLAGS = frozenset({"use_wandb"})  # a flag by its name, but programs of this family pass the key itself

_LONGEST = 120
"""Characters of a value in a message."""


def is_secret(name: str) -> bool:
    """Return whether a setting of this name holds a secret.

    Example:
        >>> is_secret("wandb_api_key"), is_secret("max_new_tokens")
        (True, False)
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if name.lower() in _API_KEY_FLAGS or any(word in _ALWAYS or word.endswith(_ENDINGS) for word in words):
        return True
    pairs = list(zip(["", *words], words, [*words[1:], ""], strict=False))
    return any(_is_secret_word(before, word, after) for before, word, after in pairs)


def _is_secret_word(before: str, word: str, after: str) -> bool:
    if word in {"key", "keys"}:
        return before in _BEFORE_KEY
    if word == "tokens":
        return before in _BEFORE_TOKENS and not after
    return word.endswith("token") and before not in _OF_TEXT and (not after or after in _AFTER_TOKEN)


def hides(name: str, value: object) -> bool:
    """Return whether a value is hidden for its name; None and bools say only whether there is a secret."""
    return value is not None and not isinstance(value, bool) and is_secret(name)


def redact(value: object, *, name: str = "") -> object:
    """Return the value with `HIDDEN` in the place of every secret, at any depth of mappings and sequences.

    An object with attributes of its own could print a secret among them, so the name of its type stands in its place.

    Args:
        value: what is to be printed.
        name: the name that the value stands under.
    """
    if hides(name, value):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: redact(item, name=str(key)) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, tuple):
        return _redact_tuple(cast("tuple[object, ...]", value))
    if isinstance(value, (list, set, frozenset)):
        items = [redact(item) for item in cast("Sequence[object]", value)]
        return items if isinstance(value, list) else type(cast("set[object]", value))(items)
    return f"<{_type_name(value)}>" if _may_print_attributes(value) else value


def _redact_tuple(value: tuple[object, ...]) -> tuple[object, ...]:
    names = cast("Sequence[str] | None", getattr(value, "_fields", None))
    if names is None:
        return tuple(redact(item) for item in value)
    # a named tuple prints the names of its items, and is built from its items one by one
    build = cast("Callable[..., tuple[object, ...]]", type(value))
    return build(*(redact(item, name=name) for name, item in zip(names, value, strict=True)))


def _may_print_attributes(value: object) -> bool:
    if isinstance(value, (str, int, float, bytes, Enum, PathLike, date, time, type)):
        return False
    return hasattr(value, "__dict__") or attrs.has(type(value)) or hasattr(type(value), "__slots__")


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def redacted(value: object) -> str:
    """Return the representation of a value without its secrets."""
    return repr(redact(value))


def shown(value: object, *, name: str = "") -> str:
    """Return a value for a message: on one line, without its secrets and cut to a readable length.

    Args:
        value: what the message is about.
        name: the name that the value stands under.
    """
    text = repr(redact(value, name=name))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
