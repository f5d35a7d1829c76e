"""Linear layers by oneDNN: the same results and gradients as torch's own, and only where they pay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightrft.models.onednn import linear_by_onednn
from lightrft.onednn import linear_operator

# float32 sums of up to 2048 terms in another order: 2048 ** 0.5 * 2**-24 is 3e-6 of the sum of magnitudes
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}


def gradients(layer: nn.Linear, inputs: torch.Tensor) -> list[torch.Tensor]:
    wanted = [inputs, *layer.parameters()]
    output = layer(inputs)
    return [output.detach(), *torch.autograd.grad((output * output.detach().cos()).sum(), wanted)]


@pytest.mark.parametrize("shape", [(2048, 64), (16, 128, 64), (2, 3, 500, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_those_in_double(shape: tuple[int, ...], bias: bool) -> None:
    """Output and every gradient agree with torch in float64, for any leading dims, with and without a bias."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(64, 96, bias=bias), torch.randn(shape, requires_grad=True)
    with linear_by_onednn():
        ours = gradients(layer, inputs)
    exact = gradients(layer.double(), inputs.detach().double().requires_grad_())
    for left, right in zip(ours, exact, strict=True):
        assert left.dtype == torch.float32
        torch.testing.assert_close(left.double(), right, **TOLERANCE)


def test_what_needs_no_gradient_gets_none() -> None:
    """A frozen weight or frozen inputs have no gradient, and the other one's is right."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(64, 64), torch.randn(512, 64, requires_grad=True)
    with linear_by_onednn():
        functional.linear(inputs, weight).sum().backward()
    torch.testing.assert_close(inputs.grad, weight.sum(0).expand_as(inputs), **TOLERANCE)
    weight.requires_grad_()
    with linear_by_onednn():
        functional.linear(inputs.detach(), weight).sum().backward()
    torch.testing.assert_close(weight.grad, inputs.detach().sum(0).expand_as(weight), **TOLERANCE)


@pytest.mark.parametrize(
    "inputs", [torch.randn(2, 64), torch.randn(2048, 64, dtype=torch.float64), torch.randn(2048, 64, device="meta")]
)
def test_other_work_is_left_to_torch_bit_for_bit(inputs: torch.Tensor) -> None:
    """Small products, other dtypes and other devices are computed by torch itself."""
    weight = torch.randn(64, 64, dtype=inputs.dtype, device=inputs.device)
    expected = functional.linear(inputs, weight)
    with linear_by_onednn():
        ours = functional.linear(inputs, weight)
    assert ours.device == expected.device
    assert ours.device.type == "meta" or torch.equal(ours, expected)


def test_autocast_keeps_its_meaning() -> None:
    """Under autocast to bfloat16 the product is bfloat16, as without the block."""
    with linear_by_onednn(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.linear(torch.randn(64, 64), torch.randn(512, 64)).dtype == torch.bfloat16


def test_without_the_operator_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch was built without oneDNN the block does nothing."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    inputs, weight = torch.randn(2048, 64), torch.randn(64, 64)
    with linear_by_onednn():
        assert torch.equal(functional.linear(inputs, weight), inputs @ weight.T)
    assert linear_operator(inputs, weight) is None
