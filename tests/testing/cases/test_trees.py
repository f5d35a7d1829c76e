"""Trees of tensors as plain data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from lightrft.testing.cases.trees import (
    LeafCase,
    SeenLeaf,
    TreeCase,
    build_tree,
    leaf_shape,
    leaf_values,
    see_tree,
    seen_leaf,
    tree_cases,
    tree_difference,
)
from lightrft.testing.plain import from_json, to_json


@given(tree_cases(is_growing=True))
def test_a_tree_holds_what_its_case_says(case: TreeCase) -> None:
    """Every layout holds the values of the case, on every rank; cases travel as JSON."""
    assert from_json(to_json(case, TreeCase), TreeCase) == case
    for rank in range(3):
        wanted = [seen_leaf(leaf, leaf_values(leaf, case, rank), leaf_shape(leaf, case, rank)) for leaf in case.leaves]
        assert tree_difference(see_tree(build_tree(case, rank)), wanted) is None


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_layouts_are_what_they_are_called(layout: str) -> None:
    """A layout other than the contiguous one is not contiguous."""
    leaf = LeafCase(path=(), kind="float32", shape=(2, 3), values=(1, 2, 3), layout=layout)  # type: ignore[arg-type]
    tensor = build_tree(TreeCase(leaves=(leaf,)), 0)
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.is_contiguous()


def leaf(tensor: torch.Tensor, *path: str) -> SeenLeaf:
    return SeenLeaf(path=path, kind=str(tensor.dtype).removeprefix("torch."), device="cpu", tensor=tensor)


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ([], "data['a'] is missing"),
        ([leaf(torch.ones(1), "a"), leaf(torch.ones(1), "b")], "data['b'] is float32"),
        ([leaf(torch.ones(1).half(), "a")], "data['a'] is float16 of shape (1,) on cpu with the values [1.0]"),
        ([leaf(torch.ones(()), "a")], "data['a'] is float32 of shape () on cpu"),
        ([leaf(torch.zeros(1), "a")], "data['a'] is float32 of shape (1,) on cpu with the values [0.0]"),
    ],
)
def test_differences_are_told(seen: list[SeenLeaf], words: str) -> None:
    """A leaf that is missing, too many, or of another dtype, shape or value is told with its place."""
    assert str(tree_difference(seen, [leaf(torch.ones(1), "a")])).startswith(words)


def test_a_tolerance_is_of_the_last_place() -> None:
    """One unit in the last place passes where it is allowed, and not where it is not."""
    wanted = [leaf(torch.ones(1))]
    near = [leaf(torch.ones(1) + torch.finfo(torch.float32).eps)]
    assert tree_difference(near, wanted) is not None
    assert tree_difference(near, wanted, tolerance=1.0) is None
