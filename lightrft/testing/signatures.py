"""Does a record of functions have the signatures that its callback protocols promise?

Type checkers answer this for code that they see. A user's own backend, a wrapped function or an entry point is known
only when it runs, and a loop that calls with keywords would find out in the middle of a run.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable

import attrs

__all__ = ["signature_differences", "signature_differences_of_record"]


def signature_differences(function: Callable[..., object], protocol: type) -> list[str]:
    """Return in words how the parameters of a function differ from those of a callback protocol; empty if they do not.

    Parameters are compared in order, each by name, kind and default.

    Args:
        function: what stands in for the protocol; a wrapped one answers for the function it wraps.
        protocol: a class whose `__call__` is the contract.

    Example:
        >>> from lightrft.strategy.protocols.collectives import Broadcast
        >>> def broadcast(data, src=1):
        ...     return data
        >>> signature_differences(broadcast, Broadcast)
        ["parameter 2 is 'src=1' and must be 'src=0'"]
    """
    wanted = _parameters(vars(protocol)["__call__"])[1:]  # without self
    found = _parameters(function)
    differences = [
        f"parameter {position} is {_compared(is_, must)} and must be {_compared(must, is_)}"
        for position, (is_, must) in enumerate(zip(found, wanted, strict=False), start=1)
        if (is_.name, is_.kind, is_.default) != (must.name, must.kind, must.default)
    ]
    missing = [f"parameter {_shown(parameter)!r} is missing" for parameter in wanted[len(found) :]]
    surplus = [f"parameter {_shown(parameter)!r} is not in the contract" for parameter in found[len(wanted) :]]
    return differences + missing + surplus


def signature_differences_of_record(record: attrs.AttrsInstance) -> list[str]:
    """Return the differences of all fields of a record, each with the field's name before it.

    Fields that no callback protocol types are not functions and are left out.

    Args:
        record: an attrs record of functions, such as a `Strategy` or an `Engine`.
    """
    kinds = typing.get_type_hints(type(record))
    return [
        f"{field.name}: {difference}"
        for field in attrs.fields(type(record))
        if "__call__" in vars(kinds[field.name])
        for difference in signature_differences(getattr(record, field.name), kinds[field.name])
    ]


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _compared(parameter: inspect.Parameter, other: inspect.Parameter) -> str:
    kind = f" ({parameter.kind.description})" if parameter.kind != other.kind else ""
    return f"{_shown(parameter)!r}{kind}"


def _shown(parameter: inspect.Parameter) -> str:
    return str(parameter.replace(annotation=inspect.Parameter.empty))
