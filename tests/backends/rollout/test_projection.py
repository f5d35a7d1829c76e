"""Tests of joined and packed matrix products."""

from __future__ import annotations

import pytest
import torch

from lightrft.backends.rollout.projection import PACKED_AFTER, build_projection, can_pack


@pytest.mark.parametrize("num_inputs", [24, 640])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_products_are_right_before_and_after_packing(num_inputs: int, rows: int, *, has_bias: bool) -> None:
    """The product with a weight, small or large, equals the one in float64, the first time and after many."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(130, num_inputs, generator=generator) / num_inputs**0.5
    bias_O = torch.randn(130, generator=generator) if has_bias else None
    inputs_NI = torch.randn(rows, num_inputs, generator=generator)
    expected_NO = inputs_NI.double() @ weight_OI.double().T
    if bias_O is not None:
        expected_NO = expected_NO + bias_O.double()
    project = build_projection(weight_OI, bias_O)
    for _ in range(PACKED_AFTER + 2):
        torch.testing.assert_close(project(inputs_NI).double(), expected_NO, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [4, 512])
def test_a_weight_is_read_where_it_lies(size: int) -> None:
    """A change in place shows in the next product: no copy was made, as long as the weight is not used often."""
    weight_OI = torch.zeros(size, size)
    project = build_projection(weight_OI, None)
    for number in range(PACKED_AFTER):
        assert project(torch.ones(1, size)).unique().tolist() == [float(size * number)]
        weight_OI += 1


def test_a_weight_that_is_used_often_is_packed() -> None:
    """After the products that are promised to read the weight itself, a large one is read from its packed copy."""
    weight_OI = torch.zeros(512, 512)
    project = build_projection(weight_OI, None)
    for _ in range(PACKED_AFTER + 1):
        project(torch.ones(1, 512))
    weight_OI += 1
    assert project(torch.ones(1, 512)).unique().tolist() == ([0.0] if can_pack(weight_OI) else [512.0])


def test_large_float32_weights_are_packed_where_torch_can() -> None:
    """From 65536 weights on, in float32 on the CPU, a weight is packed if this build of torch has the operators."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    has_operators = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    assert can_pack(torch.empty(256, 256)) == has_operators
    for weight in (torch.empty(255, 256), torch.empty(256, 256).double(), torch.empty(256, 256, device="meta")):
        assert not can_pack(weight)
