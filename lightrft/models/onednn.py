"""Linear layers by oneDNN on a CPU: the same products, at more than twice the speed where torch's own choice is slow.

torch multiplies float32 matrices on a CPU by MKL, which uses half of the vector width on processors of other makers: on
one with AVX512, 100 GFLOP/s a core against 220 by oneDNN, for the shapes of a linear layer and of both its gradients.
torch ships oneDNN and reaches it by an operator that its compiler uses; where that is missing, nothing changes.

Shapes: ... any leading dims, N their product, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["linear_by_onednn"]

_SMALLEST = 2**20
"""Multiplications below which the way to the operator costs more than it saves (about 10 us against 20 us of work)."""


@contextmanager
def linear_by_onednn() -> Generator[None]:
    """Compute large float32 linear layers on a CPU by oneDNN inside the block, gradients included.

    The results differ from torch's by the order of summation alone. Other dtypes and devices are left alone.
    """
    operator = _operator()
    if operator is None:
        yield
    else:
        with _Redirect(operator):
            yield


def _operator() -> Callable[..., Tensor] | None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 (the operator has no public name)
    except AttributeError:
        return None


class _Redirect(TorchFunctionMode):
    """The inheritance that torch demands of whoever wants to see its functions called."""

    def __init__(self, operator: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operator = operator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func is functional.linear and not kwargs and _is_worth_it(args[0], args[1]):
            bias_O = args[2] if len(args) > 2 else None
            return _Linear.apply(args[0], args[1], bias_O, self.operator)  # type: ignore[no-untyped-call]  # torch's
        return func(*args, **(kwargs or {}))


def _is_worth_it(inputs: Tensor, weight_OI: Tensor) -> bool:
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == weight_OI.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and inputs.numel() * weight_OI.shape[0] >= _SMALLEST
    )


class _Linear(torch.autograd.Function):
    """The inheritance that torch demands of a gradient of one's own; `ctx` is made by torch, which hides its type."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None, operator: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight_OI)
        ctx.operator = operator
        return operator(inputs, weight_OI, bias_O, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        inputs, weight_OI = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_NO, inputs_NI = grad_output.flatten(0, -2), inputs.flatten(0, -2)
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_inputs = ctx.operator(grad_NO, weight_OI.T, None, "none", [], "").view_as(inputs)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.operator(grad_NO.T, inputs_NI.T, None, "none", [], "")
        if ctx.needs_input_grad[2]:
            grad_bias = grad_NO.sum(0)
        return grad_inputs, grad_weight, grad_bias, None
