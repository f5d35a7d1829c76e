"""Plain data as JSON and back."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.testing.cases.models import ModelCase, model_cases
from lightrft.testing.plain import from_json, to_json

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@attrs.frozen(kw_only=True)
class Seen:
    """Evidence of many kinds."""

    model: ModelCase
    losses: tuple[float, ...]
    counts: dict[str, int]
    reason: str | None
    tensors: dict[str, torch.Tensor]


@given(
    model_cases(exact=False),
    st.lists(st.floats()),
    st.dictionaries(st.text(), st.integers()),
    st.none() | st.text(),
)
def test_a_record_comes_back_as_it_was(
    model: ModelCase, losses: list[float], counts: dict[str, int], reason: str | None
) -> None:
    """Every float with all its bits, every integer of any size and every text survive."""
    seen = Seen(model=model, losses=tuple(losses), counts=counts, reason=reason, tensors={})
    back = from_json(to_json(seen, Seen), Seen)
    assert attrs.evolve(back, losses=()) == attrs.evolve(seen, losses=())
    assert [loss.hex() for loss in back.losses] == [loss.hex() for loss in losses]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)])
def test_a_tensor_keeps_dtype_shape_and_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Tensors of every dtype, 0-d and empty ones among them, survive bit for bit."""
    tensor = (torch.arange(math.prod(shape)) * 0.7 - 1).reshape(shape).to(dtype)
    back = from_json(to_json({"x": tensor}, dict[str, torch.Tensor]), dict[str, torch.Tensor])["x"]
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_single_element_of_a_larger_tensor_survives() -> None:
    """A tensor of one element, or of none, comes back whatever its strides are."""
    table = torch.arange(6.0).reshape(3, 2)
    for tensor in (table[1:2, 1], table[::2, 0][:1], table.T[:, :0], table[1, 1]):
        assert torch.equal(from_json(to_json(tensor, torch.Tensor), torch.Tensor), tensor)


def test_values_that_are_no_numbers_survive() -> None:
    """NaN and both infinities come back, in tensors that are no contiguous memory too."""
    tensor = torch.tensor([[math.nan, math.inf], [-math.inf, -0.0]]).T
    back = from_json(to_json(tensor, torch.Tensor), torch.Tensor)
    assert torch.equal(back.view(torch.int32), tensor.contiguous().view(torch.int32))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"vocabulary": "many"}', '{"wocabulary": 3}'],
)
def test_what_is_no_case_is_refused(text: str) -> None:
    """Text that is no JSON, or JSON of something else, is one line that says what to pass."""
    with pytest.raises(ConfigError, match="pass what a failed law printed"):
        from_json(text, ModelCase)
