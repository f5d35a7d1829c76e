"""How two tables of tensors differ, in words."""

from __future__ import annotations

import pytest

from lightrft.backends.checkpointing.named import difference


def test_equal_tables_have_no_difference() -> None:
    """The order of the names plays no part."""
    assert difference(saved={"a": 1, "b": 2}, live={"b": 2, "a": 1}) is None
    assert difference(saved={}, live={}) is None


def test_every_kind_of_difference_is_said() -> None:
    """What is missing, what is unknown and what differs stand beside one another, with both values."""
    words = difference(saved={"a": 1, "b": 2, "c": 3}, live={"b": 5, "c": 3, "d": 4})
    assert words == "lacks d and has what the live state lacks: a and differs in b (2 there, 5 here)"


@pytest.mark.parametrize(("count", "tail"), [(1, ""), (5, ""), (6, " and 1 more"), (9, " and 4 more")])
def test_five_names_are_shown(count: int, tail: str) -> None:
    """Up to five names are listed; of more the first five, and how many there are besides."""
    names = [f"n{i}" for i in range(count)]
    shown = ", ".join(names[:5]) + tail
    assert difference(saved={}, live=dict.fromkeys(names, 0)) == f"lacks {shown}"
    assert difference(saved=dict.fromkeys(names, 0), live={}) == f"has what the live state lacks: {shown}"
