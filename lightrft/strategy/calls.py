"""What a call of a strategy's function looked like, in words that keep nothing alive."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import cast

import attrs

from lightrft.config.redaction import HIDDEN, hides

__all__ = ["Call", "call_of", "describe"]

_PLAIN = (bool, int, float, str, PurePath)


@attrs.frozen
class Call:
    """One call of a function of a strategy.

    Attributes:
        name: field of the strategy.
        arguments: every argument by the name of its parameter, defaults included, as `describe` puts it: plain values
            as they are, tensors as dtype and shape, other objects as the name of their type.
    """

    name: str
    arguments: Mapping[str, object]

    def __str__(self) -> str:
        """Return the call as it would be written."""
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.arguments.items())})"


def call_of(name: str, function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> Call:
    """Return the description of `function(*args, **kwargs)`.

    Args:
        name: what the function is called.
        function: tells the names and defaults of the parameters.
        args: positional arguments.
        kwargs: keyword arguments.

    Raises:
        TypeError: the function does not take these arguments.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return Call(name, {parameter: describe(value) for parameter, value in bound.arguments.items()})


def describe(value: object) -> object:
    """Return the value itself if it is plain, else words that hold no reference to it and show no secret.

    Example:
        >>> describe((1, "a", object()))
        (1, 'a', 'object')
    """
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        branches = cast("Mapping[object, object]", value)
        return {str(key): HIDDEN if hides(str(key), item) else describe(item) for key, item in branches.items()}
    if isinstance(value, (tuple, list, AbstractSet)):
        return tuple(describe(item) for item in cast("Sequence[object]", value))
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if (
        isinstance(shape, tuple) and dtype is not None
    ):  # a tensor, known by its looks because torch is not imported here
        return f"{str(dtype).removeprefix('torch.')}{list(cast('tuple[int, ...]', shape))}"
    return type(value).__name__
