"""The comparison of a record's functions with their contracts."""

from __future__ import annotations

# ruff: noqa: ARG001, ARG002 (the parameters are what is compared)
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Protocol

import attrs
import pytest

from lightrft.testing.signatures import changeable_attribute, signature_differences, signature_differences_of_record


class Scale(Protocol):
    """A contract."""

    def __call__(self, data: list[float], factor: float = 2.0, *, in_place: bool = False) -> list[float]: ...


@attrs.frozen
class Record:
    """A record with one function and one plain field."""

    scale: Scale
    size: int


def same(data: object, factor: object = 2.0, *, in_place: object = False) -> object:
    return data


def renamed(values: object, factor: object = 2.0, *, in_place: object = False) -> object:
    return values


def other_default(data: object, factor: object = 3.0, *, in_place: object = False) -> object:
    return data


def other_kind(data: object, factor: object = 2.0, in_place: object = False) -> object:
    return data


def too_few(data: object, factor: object = 2.0) -> object:
    return data


def too_many(data: object, factor: object = 2.0, *, in_place: object = False, more: object = None) -> object:
    return data


def swallows_all(*args: object, **kwargs: object) -> object:
    return args


@functools.wraps(same)
def wrapped(*args: object, **kwargs: object) -> object:
    return same(*args, **kwargs)


@pytest.mark.parametrize("function", [same, wrapped])
def test_a_function_of_the_contract_has_no_differences(function: Callable[..., object]) -> None:
    """Equal names, kinds and defaults are no difference, whatever the annotations; a wrapper tells what it wraps."""
    assert signature_differences(function, Scale) == []


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (renamed, "parameter 1 is 'values' and must be 'data'"),
        (other_default, "parameter 2 is 'factor=3.0' and must be 'factor=2.0'"),
        (
            other_kind,
            "parameter 3 is 'in_place=False' (positional or keyword) and must be 'in_place=False' (keyword-only)",
        ),
        (too_few, "parameter 'in_place=False' is missing"),
        (too_many, "parameter 'more=None' is not in the contract"),
    ],
)
def test_each_difference_is_told(function: Callable[..., object], words: str) -> None:
    """Another name, default or kind, and a parameter too few or too many are each told in words."""
    assert signature_differences(function, Scale) == [words]


def test_catch_all_parameters_are_no_substitute() -> None:
    """A function of *args and **kwargs has lost the contract's names and is told so."""
    assert len(signature_differences(swallows_all, Scale)) == 3


def test_records_are_compared_field_by_field() -> None:
    """Differences carry the field's name; fields that are no functions are left out."""
    assert signature_differences_of_record(Record(same, 1)) == []
    assert signature_differences_of_record(Record(renamed, 1)) == ["scale: parameter 1 is 'values' and must be 'data'"]


class Counter:
    """A class whose method has the right signature, and a state."""

    def __init__(self) -> None:
        self.calls = 0

    def scale(self, data: object, factor: object = 2.0, *, in_place: object = False) -> object:
        self.calls += 1
        return data


@attrs.frozen
class Settings:
    """A class that nothing can change."""

    def scale(self, data: object, factor: object = 2.0, *, in_place: object = False) -> object:
        return data


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (functools.partial(same), "is a functools.partial, which hides the types of what it binds; use a nested def"),
        (Counter().scale, "belongs to a Counter, whose state it may change; use a nested def"),
        (None, "is a NoneType and must be a function"),
    ],
)
def test_what_is_no_function_of_its_own_is_told(function: object, words: str) -> None:
    """A partial, a method of an object that can change and None are told before any parameter."""
    (difference,) = signature_differences(function, Scale)
    assert difference.startswith(words)


def test_a_method_of_what_is_frozen_is_a_function() -> None:
    """A bound method of a frozen record has no state to hide."""
    assert signature_differences(Settings().scale, Scale) == []


def test_a_missing_field_is_named() -> None:
    """A record of another class is held against the contract's fields."""
    lacking = attrs.make_class("Lacking", ["size"], frozen=True)(1)
    assert signature_differences_of_record(lacking, Record) == ["scale: is missing"]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (Record(same, 1), None),
        (types.SimpleNamespace(scale=same, size=1), "scale"),
        (dataclasses.make_dataclass("Loose", ["scale", "size"])(same, 1), "scale"),
        (dataclasses.make_dataclass("Tight", ["scale", "size"], frozen=True)(same, 1), None),
        (attrs.make_class("Open", ["scale", "size"])(same, 1), "scale"),
    ],
)
def test_a_record_that_can_be_changed_is_told(record: object, name: str | None) -> None:
    """Frozen records of attrs and dataclasses refuse; plain classes and others that are not frozen do not."""
    assert changeable_attribute(record, Record) == name
