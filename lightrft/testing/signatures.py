"""Is a record of functions what its callback protocols promise: complete, frozen, and of the same signatures?

Type checkers answer this for code that they see. A user's own backend, a wrapped function or an entry point is known
only when it runs, and a loop that calls with keywords would find out in the middle of a run.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from types import ModuleType

import attrs

__all__ = ["changeable_attribute", "signature_differences", "signature_differences_of_record"]

_MISSING = object()


def signature_differences(function: object, protocol: type) -> list[str]:
    """Return in words how the parameters of a function differ from those of a callback protocol; empty if they do not.

    Parameters are compared in order, each by name, kind and default. What is no function of its own is told instead: a
    `functools.partial` hides the types of what it binds, and a method may change the object that it belongs to.

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
    problem = _problem(function)
    if problem is not None or not callable(function):
        return [str(problem)]
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


def signature_differences_of_record(record: object, contract: type | None = None) -> list[str]:
    """Return the differences of all fields of a record, each with the field's name before it.

    Fields that no callback protocol types are not functions and are left out.

    Args:
        record: a record of functions, such as a `Strategy` or an `Engine`.
        contract: the attrs class whose fields the record must have; None takes its own.
    """
    kind = type(record) if contract is None else contract
    kinds = typing.get_type_hints(kind)
    differences: list[str] = []
    for name in attrs.fields_dict(kind):
        value = getattr(record, name, _MISSING)
        if value is _MISSING:
            differences.append(f"{name}: is missing")  # only where the contract is another class than the record's
        elif "__call__" in vars(kinds[name]):
            differences += [f"{name}: {difference}" for difference in signature_differences(value, kinds[name])]
    return differences


def changeable_attribute(record: object, contract: type) -> str | None:
    """Return the name of an attribute of a record that can be set, or None if the record is frozen.

    Fields are set to what they are, so that a record that lets itself be changed is not changed by the question.

    Args:
        record: a record of functions.
        contract: the attrs class whose fields it has.
    """
    for name in attrs.fields_dict(contract):
        if _can_be_set(record, name, getattr(record, name, _MISSING)):
            return name
    return None


def _can_be_set(record: object, name: str, value: object) -> bool:
    if value is _MISSING:
        return False
    try:
        setattr(record, name, value)
    except (AttributeError, TypeError):  # the ways in which frozen classes of attrs, dataclasses and tuples refuse
        return False
    return True


def _problem(function: object) -> str | None:
    for layer in _layers(function):
        if isinstance(layer, functools.partial):
            return "is a functools.partial, which hides the types of what it binds; use a nested def"
        if not callable(layer):
            return f"is a {type(layer).__name__} and must be a function"
        owner = _owner(layer)
        if owner is not None and _is_changeable(owner):
            return f"belongs to a {type(owner).__name__}, whose state it may change; use a nested def"
    return None


def _layers(function: object) -> Iterator[object]:
    """Yield a function and what it wraps, one after the other."""
    layer: object = function
    while layer is not _MISSING:
        yield layer
        layer = getattr(layer, "__wrapped__", _MISSING)


def _owner(function: object) -> object:
    """Return the object that a method belongs to, None for a function, and any other callable itself."""
    return getattr(function, "__self__", None) if inspect.isroutine(function) else function


def _is_changeable(owner: object) -> bool:
    if isinstance(owner, (type, ModuleType, tuple, str)):
        return False
    # attrs and dataclasses both replace this method in what they freeze
    return type(owner).__setattr__ is object.__setattr__


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _compared(parameter: inspect.Parameter, other: inspect.Parameter) -> str:
    kind = f" ({parameter.kind.description})" if parameter.kind != other.kind else ""
    return f"{_shown(parameter)!r}{kind}"


def _shown(parameter: inspect.Parameter) -> str:
    return str(parameter.replace(annotation=inspect.Parameter.empty))
