"""What ranks say of their calls, and how differences are put into words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.backends.collectives.agreement import (
    CallDescription,
    decode_call,
    describe_call,
    encode_call,
    find_disagreement,
    fingerprint,
    named_leaves,
)

SAME_CALLS = "let every rank make the same calls in the same order."
SAME_ARGUMENTS = "let every rank pass the same structure, shapes, dtypes and options."


def calls_of(*data: object, name: str = "all_reduce", **changes: object) -> list[CallDescription]:
    return [describe_call(name, 3, tree, **changes) for tree in data]


LEAVES = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.builds(torch.zeros, st.lists(st.integers(0, 3), max_size=3), dtype=st.sampled_from([torch.int8, torch.half])),
)
TREES = st.recursive(LEAVES, lambda inner: st.dictionaries(st.text(), inner, max_size=3), max_leaves=6)


@given(TREES)
def test_a_description_does_not_depend_on_the_order_of_keys(tree: object) -> None:
    """Dicts of the same keys in another order are described alike, and values play no part."""
    call, other = calls_of(tree, reversed_keys(tree), options={"op": "mean"})
    assert call == other
    assert fingerprint(call) == fingerprint(other)
    assert find_disagreement([call, other]) is None


def reversed_keys(tree: object) -> object:
    if isinstance(tree, dict):
        return {key: reversed_keys(branch) for key, branch in reversed(tree.items())}
    return tree


@given(TREES, TREES)
def test_descriptions_travel_as_bytes_and_differ_where_trees_do(first: object, second: object) -> None:
    """Encoding keeps a description, on one line; two of them differ exactly if their encodings and fingerprints do."""
    one, two = calls_of(first, second, options={"op": "mean"})
    assert decode_call(encode_call(one)) == one
    assert b"\n" not in encode_call(one)
    assert (one == two) == (encode_call(one) == encode_call(two)) == (fingerprint(one) == fingerprint(two))
    assert 0 <= fingerprint(one) < 2**63
    assert (find_disagreement([one, two]) is None) == (one == two)


def test_leaves_are_named_by_their_path() -> None:
    """Every leaf comes under the path that reaches it, and an empty dict is one."""
    tree = {"a": {"b": 1, "c": {}}, "d": 2.0}
    assert list(named_leaves(tree)) == [("data['a']['b']", 1), ("data['a']['c']", {}), ("data['d']", 2.0)]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (torch.zeros(2), torch.zeros(3), "data is float32 of shape (2,) on rank 0 and float32 of shape (3,) on rank 1"),
        (torch.zeros(1), torch.zeros(1).half(), "data is float32 of shape (1,) on rank 0 and float16 of shape (1,) on"),
        (torch.zeros(()), 0.0, "data is float32 of shape () on rank 0 and a float on rank 1"),
        (1, 1.0, "data is an int on rank 0 and a float on rank 1"),
        (True, 1, "data is a bool on rank 0 and an int on rank 1"),
        ([1], 1, "data is a list on rank 0 and an int on rank 1"),
        ({"a": 1}, {"a": 1, "b": 2}, "data['b'] is missing on rank 0 and an int on rank 1"),
        ({"a": 1, "b": 2}, {"a": 1}, "data['b'] is an int on rank 0 and missing on rank 1"),
        ({"a": {}}, {"a": 1}, "data['a'] is an empty dict on rank 0 and an int on rank 1"),
        ({"a": {"b": 1}}, {"a": {"b": 1.0}}, "data['a']['b'] is an int on rank 0 and a float on rank 1"),
    ],
    ids=str,
)
def test_each_difference_of_data_has_its_words(first: object, second: object, words: str) -> None:
    """Keys, shapes, dtypes and kinds of leaves: the first difference is named with what each rank has."""
    message = find_disagreement(calls_of(first, second))
    assert message is not None
    assert message.startswith(f"all_reduce (call 3): {words}")
    assert message.endswith(f"; {SAME_ARGUMENTS}")


def test_options_differ_before_data_does() -> None:
    """An option that differs is named with its values."""
    calls = [describe_call("all_reduce", 3, 1.0, options={"op": op}) for op in ("mean", "sum")]
    assert find_disagreement(calls) == (
        f"all_reduce (call 3): op is 'mean' on rank 0 and 'sum' on rank 1; {SAME_ARGUMENTS}"
    )


def test_the_rank_that_is_not_with_the_majority_is_named() -> None:
    """One of three differs, wherever it stands; among two, rank 0 is right."""
    barrier, gather = describe_call("barrier", 3, {}), describe_call("all_gather", 3, torch.zeros(1))
    for rank in range(3):
        calls = [barrier, barrier, barrier]
        calls[rank] = gather
        assert find_disagreement(calls) == f"barrier (call 3): rank {rank} is in all_gather (call 3); {SAME_CALLS}"
    assert find_disagreement([gather, barrier]) == f"all_gather (call 3): rank 1 is in barrier (call 3); {SAME_CALLS}"
    shapes = calls_of(torch.zeros(3), torch.zeros(2), torch.zeros(2))
    assert find_disagreement(shapes) == (
        "all_reduce (call 3): data is float32 of shape (3,) on rank 0 and float32 of shape (2,) on rank 1; "
        + SAME_ARGUMENTS
    )


def test_dim_0_can_be_left_free() -> None:
    """Gathered tensors may differ in dim 0, and in nothing else; a 0-d tensor is not a 1-d one."""
    trees = torch.zeros(2, 3), torch.zeros(5, 3)
    assert find_disagreement(calls_of(*trees)) is not None
    assert find_disagreement(calls_of(*trees, is_dim_0_free=True)) is None
    assert find_disagreement(calls_of(torch.zeros(2), torch.zeros(0), is_dim_0_free=True)) is None
    message = find_disagreement(calls_of(torch.zeros(2, 3), torch.zeros(2, 4), is_dim_0_free=True))
    assert message is not None
    assert "float32 of shape (*, 3) on rank 0 and float32 of shape (*, 4) on rank 1" in message
    message = find_disagreement(calls_of(torch.zeros(()), torch.zeros(2), is_dim_0_free=True))
    assert message is not None
    assert "float32 of shape () on rank 0 and float32 of shape (*,) on rank 1" in message
