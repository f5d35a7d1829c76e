"""How the work of a step is shared out to ranks, and what they made is known to all of them.

Every rank knows the whole of a rollout: problems are drawn in one order, and completions, texts and rewards are
gathered. So what is computed from them (advantages, running statistics, normalisers, rows of metrics) is what one
process computes, and only forward and backward passes are shared out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Protocol, TypeVar

import torch

from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.rollout import Rollout
from lightrft.strategy.protocols.training import Training

__all__ = ["RolloutOnRanks", "TrainingOnRanks", "cut", "gather_texts", "num_ranks", "shares"]

_Item = TypeVar("_Item")


class RolloutOnRanks(Collectives, Rollout, Protocol):
    """What makes completions on all ranks."""


class TrainingOnRanks(Collectives, Training, Protocol):
    """What trains on all ranks."""


def num_ranks(collectives: Collectives) -> int:
    """Return the number of ranks.

    Args:
        collectives: what the ranks do together; all of them call this.
    """
    return collectives.all_reduce(1, "sum")


def shares(count: int, num_ranks: int) -> list[range]:
    """Return the numbers 0 to count - 1 in consecutive parts, one for each rank; their sizes differ by at most one.

    Args:
        count: how many.
        num_ranks: how many parts.

    Example:
        >>> shares(5, 2)
        [range(0, 2), range(2, 5)]
    """
    bounds = [rank * count // num_ranks for rank in range(num_ranks + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]


def cut(values: Sequence[_Item], lengths: Sequence[int]) -> list[tuple[_Item, ...]]:
    """Return consecutive parts of these lengths.

    Args:
        values: all of them.
        lengths: how many are in each part.

    Example:
        >>> cut("abc", [1, 0, 2])
        [('a',), (), ('b', 'c')]
    """
    rest: Iterator[_Item] = iter(values)
    return [tuple(islice(rest, length)) for length in lengths]


def gather_texts(collectives: Collectives, texts: Sequence[str]) -> list[str]:
    """Return the texts of all ranks, in rank order.

    Args:
        collectives: what the ranks do together.
        texts: this rank's, any number.
    """
    lines = [text.encode("utf-8", "surrogatepass") for text in texts]
    every = collectives.all_gather(
        {
            "lengths": torch.tensor([len(line) for line in lines], dtype=torch.int64),
            "bytes": torch.tensor(list(b"".join(lines)), dtype=torch.uint8),
        }
    )
    parts = cut(bytes(every["bytes"].tolist()), every["lengths"].tolist())
    return [bytes(part).decode("utf-8", "surrogatepass") for part in parts]
