"""What a rank says of the collective that it entered, and how two ranks differ, in words.

A description holds all that ranks must have in common (the call and its number, options, and the kind of every leaf)
and none of the values. Two ranks agree if their descriptions are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import attrs
import torch

__all__ = [
    "SAME_CALLS",
    "CallDescription",
    "decode_call",
    "describe_call",
    "encode_call",
    "find_disagreement",
    "fingerprint",
    "named_leaves",
]

SAME_CALLS = "let every rank make the same calls in the same order"
"""What to do about ranks that are in different calls."""

_SAME_ARGUMENTS = "let every rank pass the same structure, shapes, dtypes and options"
_MISSING = "missing"


@attrs.frozen(kw_only=True)
class CallDescription:
    """A collective that a rank entered.

    Attributes:
        name: of the function, such as "all_reduce".
        number: which of the rank's collectives it is, from 1.
        options: (name, value as it is written) of arguments that must be equal, such as ("op", "'mean'").
        leaves: (path, kind) of everything in the data, such as ("data['loss']", "float32 of shape (2,)"), by path.
    """

    name: str
    number: int
    options: tuple[tuple[str, str], ...]
    leaves: tuple[tuple[str, str], ...]


def describe_call(
    name: str,
    number: int,
    data: object,
    *,
    options: Mapping[str, object] | None = None,
    is_dim_0_free: bool = False,
) -> CallDescription:
    """Return what a rank says of its call; data that no collective takes is described too, and refused by others.

    Args:
        name: of the function.
        number: which of the rank's collectives it is, from 1.
        data: the tree that it passes; the order of keys plays no part.
        options: the arguments that must be equal on all ranks.
        is_dim_0_free: whether ranks may differ in the size of dim 0.

    Example:
        >>> describe_call("all_reduce", 3, {"loss": torch.zeros(2)}).leaves
        (("data['loss']", 'float32 of shape (2,)'),)
    """
    return CallDescription(
        name=name,
        number=number,
        options=tuple((option, repr(value)) for option, value in (options or {}).items()),
        leaves=tuple(sorted((path, _kind(leaf, is_dim_0_free)) for path, leaf in named_leaves(data))),
    )


def named_leaves(data: object, path: str = "data") -> Iterator[tuple[str, object]]:
    """Yield (path, leaf) for everything in a tree that is no dict, and for dicts that are empty.

    Args:
        data: the tree.
        path: what the root is called.
    """
    if isinstance(data, Mapping) and data:
        for key, branch in cast("Mapping[object, object]", data).items():
            yield from named_leaves(branch, f"{path}[{key!r}]")
    else:
        yield path, data


def find_disagreement(calls: Sequence[CallDescription]) -> str | None:
    """Return in words how the first rank that is not with the majority differs from it; None if all ranks agree.

    The majority is what most ranks say, and what the lowest of them says where two are as many.

    Args:
        calls: one description a rank, in rank order.

    Example:
        >>> calls = [describe_call("barrier", 1, {}), describe_call("all_gather", 1, torch.zeros(2))]
        >>> find_disagreement(calls)
        'barrier (call 1): rank 1 is in all_gather (call 1); let every rank make the same calls in the same order.'
    """
    majority = Counter(calls).most_common(1)[0][0]  # of equal counts, the first that was met
    reference = calls.index(majority)
    for rank, call in enumerate(calls):
        if call != majority:
            # the lower rank comes first, so that the sentence reads in rank order
            first, second = sorted((reference, rank))
            return f"{_place(majority)}: {_difference(calls, rank, reference, (first, second))}."
    return None


def encode_call(call: CallDescription) -> bytes:
    """Return the description as ASCII JSON on one line, for ranks that exchange bytes.

    Args:
        call: the description.
    """
    return json.dumps([call.name, call.number, call.options, call.leaves]).encode("ascii")


def decode_call(written: bytes) -> CallDescription:
    """Return the description that `encode_call` wrote.

    Args:
        written: one line.
    """
    name, number, options, leaves = cast("tuple[str, int, list[list[str]], list[list[str]]]", json.loads(written))
    return CallDescription(name=name, number=number, options=_pairs(options), leaves=_pairs(leaves))


def fingerprint(call: CallDescription) -> int:
    """Return 63 bits that equal descriptions share and others do not, for a first comparison that is cheap.

    Args:
        call: the description.
    """
    return int.from_bytes(hashlib.sha256(encode_call(call)).digest()[:8], "big") >> 1


def _pairs(lists: list[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((first, second) for first, second in lists)


def _place(call: CallDescription) -> str:
    return f"{call.name} (call {call.number})"


def _difference(calls: Sequence[CallDescription], rank: int, reference: int, ordered: tuple[int, int]) -> str:
    theirs, ours = calls[rank], calls[reference]
    if (theirs.name, theirs.number) != (ours.name, ours.number):
        return f"rank {rank} is in {_place(theirs)}; {SAME_CALLS}"
    first, second = ordered
    before, after = _facts(calls[first]), _facts(calls[second])
    name = next(name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name))
    return (
        f"{name} is {before.get(name, _MISSING)} on rank {first} and {after.get(name, _MISSING)} on rank {second}; "
        f"{_SAME_ARGUMENTS}"
    )


def _facts(call: CallDescription) -> dict[str, str]:
    return dict((*call.options, *call.leaves))


def _kind(leaf: object, is_dim_0_free: bool) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} of shape {_shape(leaf, is_dim_0_free)}"
    if isinstance(leaf, Mapping):
        return "an empty dict"
    name = type(leaf).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _shape(tensor: torch.Tensor, is_dim_0_free: bool) -> str:
    if not is_dim_0_free or not tensor.dim():
        return str(tuple(tensor.shape))
    return f"({', '.join(['*', *(str(size) for size in tensor.shape[1:])])}{',' if tensor.dim() == 1 else ''})"
