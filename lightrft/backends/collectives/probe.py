"""Whether sums and means over ranks are what they should be: tried once, when a group is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveError

__all__ = ["probe_reductions"]

_TOLERANCE = 1e-5
"""Relative; a mean may be formed by multiplying with 1 / n. A sum in the place of a mean is off by a factor of n."""


def probe_reductions(device: torch.device) -> None:
    """Reduce small tensors of known sum and mean, four collectives in all.

    Backends have returned sums where means were asked for, which training would show as a learning rate that is off.

    Args:
        device: where tensors of the default process group travel.

    Raises:
        CollectiveError: a result is wrong, or the backend cannot form it.
    """
    world_size = dist.get_world_size()
    total = world_size * (world_size + 1) / 2
    for op, expected in ((dist.ReduceOp.SUM, total), (dist.ReduceOp.AVG, total / world_size)):
        whole = torch.full((world_size,), dist.get_rank() + 1.0, device=device)
        part = torch.empty(1, device=device)
        try:
            _reduce_scatter()(part, whole, op=op)
            dist.all_reduce(whole, op=op)
        except (RuntimeError, ValueError) as error:
            raise _wrong(op, f"failed ({error})") from error
        for name, found in (("reduce_scatter", part), ("all_reduce", whole)):
            if not torch.allclose(found, torch.full_like(found, expected), rtol=_TOLERANCE, atol=0.0):
                raise _wrong(op, f"by {name} is {found[0].item():g} and must be {expected:g}")


def _reduce_scatter() -> Callable[..., object]:
    # its name since torch 2.13, where the old one warns
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    return cast("Callable[..., object]", getattr(dist, name))


def _wrong(op: dist.ReduceOp.RedOpType, what: str) -> CollectiveError:
    return CollectiveError(
        f"setup_distributed: the {op.name} of the numbers 1 to {dist.get_world_size()} over ranks {what}, with "
        f"backend {dist.get_backend_config()!r} of torch {torch.__version__}; use another version of torch."
    )
