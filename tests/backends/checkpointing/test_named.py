"""How two tables of tensors differ, in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightrft.backends.checkpointing.named import difference, named_state


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


def test_wrappers_leave_no_trace_in_the_names() -> None:
    """Activation checkpointing and compilation around any module change no name; only whole words are taken out."""
    plain = nn.Sequential(nn.Linear(1, 1), nn.ModuleDict({"my_orig_mod": nn.Linear(1, 1)}))
    expected = list(named_state(plain, owner="model").tensors)
    assert expected == ["0.weight", "0.bias", "1.my_orig_mod.weight", "1.my_orig_mod.bias"]
    plain[0] = torch.compile(checkpoint_wrapper(plain[0]))
    assert list(named_state(plain, owner="model").tensors) == expected
    assert list(named_state(torch.compile(plain), owner="model").tensors) == expected
