from __future__ import annotations

import json
import math
import struct
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.backends.checkpointing.lossless import decode, dumps, encode_client_state, encode_internal, loads
from lightrft.errors import CheckpointError, ConfigError

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
internal = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=12,
)


def same(left: object, right: object) -> bool:
    """Equal, with equal types and, for floats, equal bits, at every depth."""
    if isinstance(left, float) and isinstance(right, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    if isinstance(left, dict) and isinstance(right, dict):
        return type(left) is type(right) and list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@given(st.dictionaries(st.text() | st.just("$tuple"), trees))
@settings(deadline=None, max_examples=30)
def test_client_state_survives_strict_json(state: dict[str, object]) -> None:
    """Every JSON value comes back with its types, order and bits, and the bytes are strict JSON."""
    content = dumps(encode_client_state(state))
    json.loads(content, parse_constant=pytest.fail)
    assert same(decode(loads(content, source="test")), state)


@given(internal)
@settings(deadline=None, max_examples=30)
def test_internal_state_survives_strict_json(value: object) -> None:
    """Tuples and dictionaries with other keys come back as what they were."""
    assert same(decode(loads(dumps(encode_internal(value, "test")), source="test")), value)


def test_counters_nan_and_small_tensors_come_back() -> None:
    """What schedules and groups hold besides JSON's types keeps its type, dtype and shape."""
    value = {
        "a": Counter({2: 2, 5: 1}),
        "b": (torch.tensor(0.1, dtype=torch.bfloat16), torch.zeros(1, 0)),
        "c": math.nan,
    }
    back = decode(loads(dumps(encode_internal(value, "test")), source="test"))
    assert isinstance(back, dict)
    assert type(back["a"]) is Counter
    assert back["a"] == value["a"]
    scalar, empty = back["b"]
    assert (scalar.dtype, scalar.shape, scalar.item()) == (torch.bfloat16, (), torch.tensor(0.1).bfloat16().item())
    assert empty.shape == (1, 0)
    assert math.isnan(back["c"])


@pytest.mark.parametrize(
    "body",
    [
        {"dtype": "float65"},
        {"dtype": "load"},
        {"dtype": "set_vital"},  # torch warns of this name when it is asked for it
        {"dtype": "float64"},
        {"shape": [2]},
        {"shape": [-1, -1]},
        {"shape": "x"},
        {"bytes": "0x"},
    ],
    ids=str,
)
def test_a_forged_tensor_is_refused(body: dict[str, object]) -> None:
    """Names of what is no dtype, and bytes of another size, are one line; torch is asked for nothing but dtypes."""
    whole = {"dtype": "float32", "shape": [], "bytes": "0000803f"}
    assert decode({"$tensor": whole}) == torch.tensor(1.0)
    with pytest.raises(CheckpointError, match="are not those of the bytes of a tensor") as refused:
        decode({"$tensor": {**whole, **body}})  # type: ignore[dict-item]
    assert "\n" not in str(refused.value)


def test_internal_state_refuses_what_it_cannot_hold() -> None:
    """A large tensor, a set and a function are refused with their path."""
    for value in (torch.zeros(2), {1, 2}, print):
        with pytest.raises(ConfigError, match=r"scheduler\[1\].x is a"):
            encode_internal([0, {"x": value}], "scheduler")


def test_what_json_can_hold_stays_plain() -> None:
    """Finite numbers of 64 bits, strings, lists and dicts are written as JSON's own; only others get a form."""
    state = {"a": [0.5, -3, True, None, "x", 2**62], "b": {"c": 1e300}}
    assert json.loads(dumps(encode_client_state(state))) == state
    assert encode_client_state({"a": math.inf, "b": 2**64}) == {"a": {"$float": "inf"}, "b": {"$int": hex(2**64)}}
