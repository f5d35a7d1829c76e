"""Micro-batches by a budget of tokens, on one rank or dealt out to several.

All of it is arithmetic on lengths: the same lengths give the same micro-batches on every rank, so ranks that know all
lengths need not ask one another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lightrft.errors import ConfigError, DataError

__all__ = ["balance_by_tokens", "pack_by_tokens"]


def pack_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return few micro-batches, as numbers of samples, none of which has more tokens than the budget.

    First-fit decreasing: the longest sample first, each into the first micro-batch with room. It never takes more than
    11/9 of the least possible number, plus 6/9.

    Args:
        lengths: tokens of each sample.
        max_tokens: budget of a micro-batch; padding is not counted.

    Returns:
        Micro-batches in the order of their first samples, each with its samples in ascending order.

    Raises:
        ConfigError: the budget is not positive.
        DataError: a sample is longer than the budget, or its length is negative.

    Reference:
        Dósa 2007, "The tight bound of first fit decreasing bin-packing algorithm is FFD(I) <= 11/9 OPT(I) + 6/9".

    Example:
        >>> pack_by_tokens([5, 4, 3, 2], max_tokens=7)
        [[0, 3], [1, 2]]
    """
    _check(lengths, max_tokens)
    packs: list[list[int]] = []
    room: list[int] = []
    for sample in _longest_first(lengths):
        length = lengths[sample]
        place = next((place for place, left in enumerate(room) if left >= length), len(room))
        if place == len(room):
            packs.append([])
            room.append(max_tokens)
        packs[place].append(sample)
        room[place] -= length
    return sorted(sorted(pack) for pack in packs)


def balance_by_tokens(lengths: Sequence[int], max_tokens: int, *, world_size: int) -> list[list[list[int]]]:
    """Return the micro-batches of each rank, with nearly equal numbers of tokens in each, and on each rank.

    Longest processing time: the longest sample first, each into the micro-batch with the fewest tokens, in as few
    micro-batches as the budget allows. In rounds, each rank then gets one, the rank with the fewest tokens the largest.
    So the totals of ranks that have equally many differ by no more than the largest and the smallest micro-batch do.

    Args:
        lengths: tokens of each sample, those of all ranks.
        max_tokens: budget of a micro-batch; padding is not counted.
        world_size: number of ranks.

    Returns:
        One list for each rank, of micro-batches, of numbers of samples in ascending order. No micro-batch is empty.
        All ranks have equally many, unless every sample has one for itself; then some ranks may have one fewer.

    Raises:
        ConfigError: the budget or the number of ranks is not positive.
        DataError: a sample is longer than the budget, its length is negative, or there are fewer samples than ranks.

    Reference:
        Graham 1969, "Bounds on multiprocessing timing anomalies": the largest of k micro-batches has at most
        4/3 - 1/(3k) times the tokens that it must have.

    Example:
        >>> balance_by_tokens([8, 1, 4, 3, 2, 2], max_tokens=10, world_size=2)
        [[[0, 5]], [[1, 2, 3, 4]]]
    """
    _check(lengths, max_tokens)
    if world_size < 1:
        raise ConfigError(f"world_size={world_size!r} is not positive; use the number of ranks.")
    if len(lengths) < world_size:
        raise DataError(
            f"lengths={list(lengths)!r} are fewer samples than world_size={world_size}, and each rank needs one; "
            "pass more samples."
        )
    least = len(pack_by_tokens(lengths, max_tokens))
    number = -(-least // world_size) * world_size
    packs = _balanced(lengths, min(number, len(lengths)))
    while max(_total(lengths, pack) for pack in packs) > max_tokens:
        number += world_size
        packs = _balanced(lengths, min(number, len(lengths)))
    return _dealt(lengths, packs, world_size)


def _check(lengths: Sequence[int], max_tokens: int) -> None:
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens!r} is not positive; use the tokens that fit into one micro-batch.")
    for sample, length in enumerate(lengths):
        if length < 0:
            raise DataError(f"lengths[{sample}]={length!r} is negative; pass the number of tokens of the sample.")
        if length > max_tokens:
            raise DataError(
                f"lengths[{sample}]={length!r} is more than max_tokens={max_tokens}; "
                "shorten the sample, leave it out, or raise max_tokens."
            )


def _longest_first(lengths: Sequence[int]) -> list[int]:
    def key(sample: int) -> int:
        return -lengths[sample]

    return sorted(range(len(lengths)), key=key)


def _total(lengths: Sequence[int], samples: Sequence[int]) -> int:
    return sum(lengths[sample] for sample in samples)


def _balanced(lengths: Sequence[int], number: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(number)]
    # with the number of samples between the two, samples without tokens leave no micro-batch empty
    by_load = [(0, 0, place) for place in range(number)]
    for sample in _longest_first(lengths):
        load, count, place = by_load[0]
        packs[place].append(sample)
        heapq.heapreplace(by_load, (load + lengths[sample], count + 1, place))
    return [sorted(pack) for pack in packs]


def _dealt(lengths: Sequence[int], packs: list[list[int]], world_size: int) -> list[list[list[int]]]:
    def size(pack: list[int]) -> tuple[int, list[int]]:
        return -_total(lengths, pack), pack

    ordered = sorted(packs, key=size)
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for start in range(0, len(ordered), world_size):
        fewest_first = sorted(range(world_size), key=loads.__getitem__)
        for rank, pack in zip(fewest_first, ordered[start : start + world_size], strict=False):
            ranks[rank].append(pack)
            loads[rank] += _total(lengths, pack)
    return ranks
