"""Matrix products with weights that change seldom, and all at once.

On a CPU in float32 torch multiplies through MKL, which on other processors than Intel's can run at less than half of
what oneDNN reaches (64 rows, 512 -> 4096, one Zen 5 core: 3.7 ms against 1.8 ms, and 1.4 ms with a packed weight). A
packed weight is a copy whose making takes as long as four to eight copies of its bytes. So a weight is used where it
lies at first, and packed once it was used so often that this pays: new weights cost nothing but their bytes, and long
rollouts are as fast as if every weight were packed at once. Packed weights are copies, which is why decoders are
refreshed.

Shapes: N rows (sequences or tokens), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import attrs
import torch
from torch.nn import functional

__all__ = ["PACKED_AFTER", "Multiply", "Project", "build_multiplication", "build_projection", "can_pack"]

PACKED_AFTER = 32
"""Products after which a weight is packed. Packing takes as long as 8 to 20 products with 4 to 64 rows save by it, and
whoever waits that long before an expense never spends twice what was needed."""

# Below this many weights the call into oneDNN (11 microseconds) costs more than it saves.
_PACKED_FROM = 2**16
# Rows that the packed layout is chosen for. Layouts for 16 rows are within 5 % of the best for 1 to 512 rows.
_PACKED_ROWS = 16


class Multiply(Protocol):
    """A product with one weight."""

    def __call__(self, inputs_NI: torch.Tensor, bias_O: torch.Tensor | None, /) -> torch.Tensor:
        """Return inputs_NI @ weight.T + bias, (N, O)."""
        ...


class Project(Protocol):
    """A linear map."""

    def __call__(self, inputs_NI: torch.Tensor, /) -> torch.Tensor:
        """Return inputs_NI @ weight.T + bias, (N, O)."""
        ...


@attrs.define(kw_only=True, eq=False)
class _Use:
    """A handle: how often a weight was used as it is, and its packed form afterwards."""

    num_products: int = 0
    packed: torch.Tensor | None = None


def can_pack(weight_OI: torch.Tensor) -> bool:
    """Tell whether this build of torch packs such a weight, and whether it pays.

    Args:
        weight_OI: the weight.
    """
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype == torch.float32
        and weight_OI.numel() >= _PACKED_FROM
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        # The operators are the ones that torch's own compiler uses; they are not in its public interface.
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def build_multiplication(weight_OI: torch.Tensor) -> Multiply:
    """Return the product with a weight, which is read where it lies, and after `PACKED_AFTER` products packed.

    Args:
        weight_OI: contiguous; whoever changes it builds the product anew.
    """
    return _packing(weight_OI.detach()) if can_pack(weight_OI) else _plain(weight_OI.detach())


def build_projection(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Project:
    """Return a linear map.

    Args:
        weight_OI: as for `build_multiplication`.
        bias_O: its bias, or None.
    """
    multiply = build_multiplication(weight_OI)

    def project(inputs_NI: torch.Tensor, /) -> torch.Tensor:
        return multiply(inputs_NI, bias_O)

    return project


def _plain(weight_OI: torch.Tensor) -> Multiply:
    def multiply(inputs_NI: torch.Tensor, bias_O: torch.Tensor | None, /) -> torch.Tensor:
        return functional.linear(inputs_NI, weight_OI, bias_O)

    return multiply


def _packing(weight_OI: torch.Tensor) -> Multiply:
    use = _Use()
    through_onednn = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001  # see can_pack

    def multiply(inputs_NI: torch.Tensor, bias_O: torch.Tensor | None, /) -> torch.Tensor:
        use.num_products += 1
        if use.num_products == PACKED_AFTER + 1:
            use.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACKED_ROWS)  # noqa: SLF001  # see can_pack
        weight = weight_OI if use.packed is None else use.packed
        outputs_NO: torch.Tensor = through_onednn(inputs_NI, weight, bias_O, "none", [], "")
        return outputs_NO

    return multiply
