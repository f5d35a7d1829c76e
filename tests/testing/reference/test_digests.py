"""Fingerprints of tensors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.testing.reference.digests import changed_names, digest, digests


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=9), st.data())
def test_one_changed_element_changes_the_digest(values: list[int], data: st.DataObject) -> None:
    """A fingerprint sees every element, and is the same for equal bits in another layout of memory."""
    tensor = torch.tensor(values, dtype=torch.int8)
    assert digest(tensor) == digest(torch.stack([tensor, tensor], dim=1)[:, 0])
    place = data.draw(st.integers(0, len(values) - 1))
    changed = tensor.clone()
    changed[place] ^= 1
    assert digest(changed) != digest(tensor)


def test_dtype_and_shape_count() -> None:
    """Equal bytes of another dtype or shape have another fingerprint; 0-d, empty and bfloat16 tensors have one."""
    tensors = [
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, dtype=torch.float32),
        torch.zeros(1, 2, dtype=torch.float32),
        torch.zeros(4, dtype=torch.bfloat16),
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(0, 3),
    ]
    assert len({digest(tensor) for tensor in tensors}) == len(tensors)


def test_changed_names_are_those_that_differ_or_are_alone() -> None:
    """A name is reported if its tensor changed, came or went."""
    before = digests({"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}.items())
    after = digests({"a": torch.zeros(1), "b": torch.ones(1), "d": torch.zeros(1)}.items())
    assert changed_names(before, after) == ["b", "c", "d"]
    assert changed_names(before, before) == []
