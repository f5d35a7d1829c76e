"""oneDNN's matrix product, where torch's own choice on a CPU is slow.

torch multiplies float32 matrices on a CPU by MKL, which uses half of the vector width on processors of other makers: on
one with AVX512, 100 GFLOP/s a core against 220 by oneDNN, for the shapes of a linear layer and of both its gradients.
torch ships oneDNN and reaches it by an operator that its compiler uses.

Shapes: ... any leading dims, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

__all__ = ["LinearOperator", "linear_operator"]

_SMALLEST = 2**20
"""Multiplications below which the way to the operator costs more than it saves (about 10 us against 20 us of work)."""


class LinearOperator(Protocol):
    """The operator, as torch defines it."""

    def __call__(
        self,
        inputs: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        attribute: str,
        scalars: Sequence[float],
        algorithm: str,
        /,
    ) -> Tensor:
        """Return inputs @ weight.T + bias.

        Args:
            inputs: (..., I) float32 on a CPU.
            weight_OI: (O, I) float32.
            bias_O: (O,) or None.
            attribute: what is applied to the result; "none".
            scalars: its numbers; [].
            algorithm: its variant; "".
        """
        ...


def linear_operator(inputs: Tensor, weight_OI: Tensor) -> LinearOperator | None:
    """Return the operator where it computes `inputs @ weight.T` faster than torch would, else None.

    That is for float32 on a CPU, outside of autocast, for large products, in builds of torch that have the operator.

    Args:
        inputs: (..., I).
        weight_OI: (O, I).
    """
    if (
        inputs.device.type != "cpu"
        or not inputs.dtype == weight_OI.dtype == torch.float32
        or inputs.numel() * weight_OI.shape[0] < _SMALLEST
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    ):
        return None
    # it has no public name
    return cast("LinearOperator | None", getattr(torch.ops.mkldnn, "_linear_pointwise", None))
