"""Linear layers by oneDNN on a CPU: the same products, at more than twice the speed where torch's own choice is slow.

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

from lightrft.onednn import LinearOperator, linear_operator

__all__ = ["linear_by_onednn"]


@contextmanager
def linear_by_onednn() -> Generator[None]:
    """Compute large float32 linear layers on a CPU by oneDNN inside the block, gradients included.

    The results differ from torch's by the order of summation alone. All other work is left to torch.
    """
    with _Redirect():
        yield


class _Redirect(TorchFunctionMode):
    """The inheritance that torch demands of whoever wants to see its functions called."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        operator = linear_operator(args[0], args[1]) if func is functional.linear and not kwargs else None
        if operator is None:
            return func(*args, **(kwargs or {}))
        bias_O = args[2] if len(args) > 2 else None
        return _Linear.apply(args[0], args[1], bias_O, operator)  # type: ignore[no-untyped-call]  # torch's


class _Linear(torch.autograd.Function):
    """The inheritance that torch demands of a gradient of one's own; `ctx` is made by torch, which hides its type."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None, operator: LinearOperator) -> Tensor:
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
