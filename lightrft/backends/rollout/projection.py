"""Matrix products with weights that do not change between two weight updates.

On a CPU in float32 torch multiplies through MKL, which on other processors than Intel's can run at less than half of
what oneDNN reaches (16 rows, 512 -> 4096, one Zen 5 core: 1.25 ms against 0.65 ms, and 0.48 ms with a packed weight).
So weights that are large enough are packed for oneDNN once. The packed form is a copy, which is why decoders are
refreshed.

Shapes: N rows (sequences or tokens), I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional

__all__ = ["Project", "build_projection", "can_pack"]

# Below this many weights the call into oneDNN (11 microseconds) costs more than it saves.
_PACKED_FROM = 2**16
# Rows that the packed layout is chosen for. Layouts for 16 rows are within 5 % of the best for 1 to 512 rows.
_PACKED_ROWS = 16


class Project(Protocol):
    """A linear map."""

    def __call__(self, inputs_NI: torch.Tensor, /) -> torch.Tensor:
        """Return inputs_NI @ weight.T + bias, (N, O)."""
        ...


def can_pack(weight_OI: torch.Tensor) -> bool:
    """Tell whether this build of torch packs such a weight, and whether it pays."""
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype == torch.float32
        and weight_OI.numel() >= _PACKED_FROM
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        # The operators are the ones that torch's own compiler uses; they are not in its public interface.
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def build_projection(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> Project:
    """Return one linear map whose outputs are those of several, side by side.

    A single weight that is not packed is used in place; everything else is a copy.

    Args:
        weights: weights (O_1, I), (O_2, I), ...
        biases: their biases, one for each or none at all.
    """
    weight_OI = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
    bias_O = torch.cat([bias.detach() for bias in biases]) if biases else None
    return _packed(weight_OI, bias_O) if can_pack(weight_OI) else _plain(weight_OI, bias_O)


def _plain(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Project:
    def project(inputs_NI: torch.Tensor, /) -> torch.Tensor:
        return functional.linear(inputs_NI, weight_OI, bias_O)

    return project


def _packed(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Project:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _PACKED_ROWS)  # noqa: SLF001  # see can_pack
    multiply = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001  # see can_pack

    def project(inputs_NI: torch.Tensor, /) -> torch.Tensor:
        outputs_NO: torch.Tensor = multiply(inputs_NI, packed, bias_O, "none", [], "")
        return outputs_NO

    return project
