"""Tests of joined and packed matrix products."""

from __future__ import annotations

import pytest
import torch

from lightrft.backends.rollout.projection import build_projection, can_pack


@pytest.mark.parametrize("num_inputs", [24, 640])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_joined_outputs_stand_side_by_side(num_inputs: int, rows: int, *, has_bias: bool) -> None:
    """The product of joined weights, small or packed, equals the separate products in float64."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, num_inputs, generator=generator) / num_inputs**0.5 for size in (40, 90)]
    biases = [torch.randn(size, generator=generator) for size in (40, 90)] if has_bias else []
    inputs_NI = torch.randn(rows, num_inputs, generator=generator)
    expected_NO = inputs_NI.double() @ torch.cat(weights).double().T
    if has_bias:
        expected_NO = expected_NO + torch.cat(biases).double()
    made_NO = build_projection(weights, biases)(inputs_NI)
    torch.testing.assert_close(made_NO.double(), expected_NO, atol=5e-6, rtol=1e-5)


def test_a_single_small_weight_is_not_copied() -> None:
    """A change in place of an unpacked single weight shows at once."""
    weight_OI = torch.zeros(3, 4)
    project = build_projection([weight_OI], [])
    weight_OI += 1
    assert project(torch.ones(1, 4)).tolist() == [[4.0, 4.0, 4.0]]


def test_large_float32_weights_are_packed_where_torch_can() -> None:
    """From 65536 weights on, in float32 on the CPU, a weight is packed if this build of torch has the operators."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    has_operators = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    assert can_pack(torch.empty(256, 256)) == has_operators
    for weight in (torch.empty(255, 256), torch.empty(256, 256).double(), torch.empty(256, 256, device="meta")):
        assert not can_pack(weight)
