"""What one rank saw becomes what all ranks raise."""

from __future__ import annotations

import torch

from lightrft.errors import LawError
from lightrft.strategy.protocols import Collectives

__all__ = ["raise_on_all", "require", "same_on_all"]


def require(holds: bool, function: str, sentence: str) -> None:
    """Raise unless something holds on this rank.

    Args:
        holds: whether it does.
        function: of the strategy.
        sentence: what was seen and what must be.

    Raises:
        LawError: it does not.
    """
    if not holds:
        raise LawError(f"{function}: {sentence}.")


def raise_on_all(collectives: Collectives, problem: str | None, *, function: str, device: torch.device) -> None:
    """Raise on every rank if one rank has a problem; all ranks call it.

    Args:
        collectives: how ranks tell one another.
        problem: what this rank saw; None for nothing.
        function: of the strategy.
        device: where ranks exchange tensors.

    Raises:
        LawError: some rank has a problem; it is named.
    """
    flags = collectives.all_gather(torch.tensor([problem is not None], device=device)).tolist()
    if any(flags):
        found = problem or f"rank {flags.index(True)} found a law broken and says which"
        raise LawError(f"{function}: {found}.")


def same_on_all(collectives: Collectives, fingerprint: str, device: torch.device) -> int | None:
    """Return the first rank whose fingerprint differs from that of rank 0, or None; all ranks call it.

    Args:
        collectives: how ranks tell one another.
        fingerprint: hexadecimal digits, at least 15.
        device: where ranks exchange tensors.
    """
    number = torch.tensor([int(fingerprint[:15], 16)], device=device)  # 60 bits fit into an int64
    numbers = collectives.all_gather(number).tolist()
    return next((rank for rank, other in enumerate(numbers) if other != numbers[0]), None)
