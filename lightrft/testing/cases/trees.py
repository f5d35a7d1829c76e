"""Nested dicts of tensors and numbers as plain data, and what is seen of such a tree.

Every value is a small enough whole number, or multiple of 1/4, that sums over ranks have no rounding error in its
dtype, and a large enough one that a narrower dtype could not hold it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, TypeAlias, cast

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.strategy.protocols.collectives import TensorTree

__all__ = [
    "FLOAT_KINDS",
    "INT_KINDS",
    "KINDS",
    "NUMBER_KINDS",
    "LeafCase",
    "Number",
    "SeenLeaf",
    "TreeCase",
    "build_tree",
    "leaf_shape",
    "leaf_values",
    "see_tree",
    "seen_leaf",
    "tree_cases",
    "tree_difference",
]

Number: TypeAlias = "float | int | bool"
"""A number of Python."""

Layout: TypeAlias = Literal["contiguous", "strided", "transposed", "expanded"]
"""How a tensor lies in memory; an expanded one has one slice that stands for all of dim 0."""

FLOAT_KINDS = ("float16", "bfloat16", "float32", "float64", "Python float")
"""Kinds of leaves that have a mean."""
INT_KINDS = ("uint8", "int8", "int16", "int32", "int64", "Python int")
"""Kinds of leaves that have a sum, but no mean of their dtype."""
NUMBER_KINDS = ("Python float", "Python int", "Python bool")
"""Kinds of leaves that are no tensors."""
KINDS = (*FLOAT_KINDS, *INT_KINDS, "bool", "Python bool")
"""Every kind of leaf that collectives take; each is a dtype or a Python number."""

_EMPTY_DICT = "an empty dict"
_KEYS = ("loss", "a", "b", "a.b", "", "é", "0")  # "a.b" beside {"a": {"b": ...}} tells whoever joins keys by a dot

# the sum over four ranks, with 9 more on each, is exact (floats count quarters) and does not wrap around (integers)
_LARGEST: Mapping[str, int] = MappingProxyType(
    {
        "bool": 1,
        "Python bool": 1,
        "uint8": 40,
        "int8": 20,
        "int16": 2**12,
        "int32": 2**28,
        "int64": 2**60,
        "Python int": 2**60,
        "bfloat16": 2**5,
        "float16": 2**8,
        "float32": 2**20,
        "float64": 2**48,
        "Python float": 2**48,
    }
)


@attrs.frozen(kw_only=True)
class LeafCase:
    """A tensor or number at the end of a branch.

    Attributes:
        path: keys from the root.
        kind: one of `KINDS`, or the words for a dict without keys.
        shape: of the tensor; empty for a number.
        values: whole numbers that the elements take in turn; floats are a quarter of them.
        layout: how the tensor lies in memory.
    """

    path: tuple[str, ...]
    kind: str
    shape: tuple[int, ...] = ()
    values: tuple[int, ...] = (1,)
    layout: Layout = "contiguous"


@attrs.frozen(kw_only=True)
class TreeCase:
    """The trees of all ranks.

    Attributes:
        leaves: what stands at the ends; one with an empty path is the whole tree.
        step: how much a value grows from one rank to the next.
        growth: how much dim 0 grows from one rank to the next.
        is_reordered: whether odd ranks insert their keys the other way round.
    """

    leaves: tuple[LeafCase, ...]
    step: int = 1
    growth: int = 0
    is_reordered: bool = False


@attrs.frozen(kw_only=True, eq=False)
class SeenLeaf:
    """What was found at the end of a branch.

    Attributes:
        path: keys from the root.
        kind: as in `LeafCase`.
        device: of the tensor; empty for a number.
        tensor: a copy of the value.
    """

    path: tuple[str, ...]
    kind: str
    device: str
    tensor: torch.Tensor


@st.composite
def tree_cases(
    draw: DrawFn, *, kinds: Collection[str] = KINDS, is_growing: bool = False, max_leaves: int = 6
) -> TreeCase:
    """Return a strategy for trees with leaves of all shapes, layouts and kinds.

    Args:
        draw: hypothesis' own.
        kinds: those that are drawn; one that comes twice is drawn twice as often.
        is_growing: let dim 0 differ from rank to rank.
        max_leaves: about how many leaves a branch has at most.
    """
    leaves = _leaves(sorted(kinds))
    keys = st.sampled_from(_KEYS)
    branches = st.recursive(leaves, _inside, max_leaves=max_leaves)
    # many leaves a tree, because a bug is often in one dtype alone
    wide = st.dictionaries(keys, branches, min_size=min(3, max_leaves), max_size=max_leaves)
    nested = draw(st.one_of(leaves, st.dictionaries(keys, branches, max_size=2), wide, wide))
    return TreeCase(
        leaves=tuple(_flat(nested, ())),
        step=draw(st.integers(1, 3)),
        growth=draw(st.integers(0, 2)) if is_growing else 0,
        is_reordered=draw(st.booleans()),
    )


def _inside(inner: SearchStrategy[object]) -> SearchStrategy[object]:
    return st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3)


def _leaves(kinds: Sequence[str]) -> SearchStrategy[LeafCase]:
    return st.sampled_from(kinds).flatmap(_leaves_of_kind)


@st.composite
def _leaves_of_kind(draw: DrawFn, kind: str) -> LeafCase:
    largest = _LARGEST[kind]
    low = 0 if kind in {"bool", "Python bool", "uint8"} else 1 - largest
    # the extremes are odd, so that no narrower dtype holds them
    values = st.sampled_from([largest - 1, low]) | st.integers(low, largest) if largest > 1 else st.integers(0, 1)
    return LeafCase(
        path=(),
        kind=kind,
        shape=() if kind in NUMBER_KINDS else tuple(draw(st.lists(st.sampled_from([2, 1, 3, 2, 0]), max_size=3))),
        values=tuple(draw(st.lists(values, min_size=1, max_size=4))),
        layout=draw(st.sampled_from(("contiguous", "strided", "transposed", "expanded"))),
    )


def _flat(tree: object, path: tuple[str, ...]) -> list[LeafCase]:
    if isinstance(tree, LeafCase):
        return [attrs.evolve(tree, path=path)]
    branches = cast("Mapping[str, object]", tree)
    if not branches:
        return [LeafCase(path=path, kind=_EMPTY_DICT)]
    return [leaf for key, branch in branches.items() for leaf in _flat(branch, (*path, key))]


def leaf_shape(leaf: LeafCase, case: TreeCase, rank: int) -> tuple[int, ...]:
    """Return the shape of a leaf on a rank.

    Args:
        leaf: one of the case's.
        case: says how shapes grow.
        rank: number of the rank.
    """
    return (leaf.shape[0] + rank * case.growth, *leaf.shape[1:]) if leaf.shape else ()


def leaf_values(leaf: LeafCase, case: TreeCase, rank: int) -> list[Number]:
    """Return the elements of a leaf on a rank as Python numbers, in row-major order.

    Args:
        leaf: one of the case's.
        case: says how values grow.
        rank: number of the rank.

    Example:
        >>> leaf = LeafCase(path=(), kind="float32", shape=(3,), values=(1, 6))
        >>> leaf_values(leaf, TreeCase(leaves=(leaf,), step=2), rank=1)
        [0.75, 2.0, 0.75]
    """
    shape = leaf_shape(leaf, case, rank)
    period = math.prod(shape[1:]) if leaf.layout == "expanded" and shape else math.prod(shape)
    whole = [leaf.values[place % period % len(leaf.values)] + rank * case.step for place in range(math.prod(shape))]
    if leaf.kind in FLOAT_KINDS:
        return [value / 4 for value in whole]
    return [value % 2 == 1 for value in whole] if leaf.kind.endswith("bool") else list(whole)


def build_tree(case: TreeCase, rank: int) -> TensorTree:
    """Return the tree of a rank.

    Args:
        case: the trees of all ranks.
        rank: number of the rank.
    """
    if [leaf.path for leaf in case.leaves] == [()]:
        return _build_leaf(case.leaves[0], case, rank)
    tree: dict[str, TensorTree] = {}
    is_reversed = case.is_reordered and rank % 2 == 1
    for leaf in reversed(case.leaves) if is_reversed else case.leaves:
        inside = tree
        for key in leaf.path[:-1]:
            inside = cast("dict[str, TensorTree]", inside.setdefault(key, {}))
        inside[leaf.path[-1]] = _build_leaf(leaf, case, rank)
    return tree


def _build_leaf(leaf: LeafCase, case: TreeCase, rank: int) -> TensorTree:
    if leaf.kind == _EMPTY_DICT:
        return {}
    values = leaf_values(leaf, case, rank)
    if leaf.kind in NUMBER_KINDS:
        return values[0]
    return _laid_out(torch.tensor(values, dtype=_dtype(leaf.kind)).reshape(leaf_shape(leaf, case, rank)), leaf.layout)


def _laid_out(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    if layout == "strided":
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].clone().expand(tensor.shape)
    return tensor


def see_tree(tree: TensorTree) -> list[SeenLeaf]:
    """Return copies of everything at the ends of a tree's branches, by path.

    Args:
        tree: the tree.
    """
    return sorted(_seen(tree, ()), key=_path_of)


def _path_of(leaf: SeenLeaf) -> tuple[str, ...]:
    return leaf.path


def _seen(tree: object, path: tuple[str, ...]) -> list[SeenLeaf]:
    if isinstance(tree, Mapping):
        branches = cast("Mapping[str, object]", tree)
        if not branches:
            return [SeenLeaf(path=path, kind=_EMPTY_DICT, device="", tensor=torch.empty(0))]
        return list(itertools.chain.from_iterable(_seen(branch, (*path, key)) for key, branch in branches.items()))
    if isinstance(tree, torch.Tensor):
        kind = str(tree.dtype).removeprefix("torch.")
        return [SeenLeaf(path=path, kind=kind, device=str(tree.device), tensor=tree.detach().clone())]
    if isinstance(tree, (bool, int, float)):
        kind = f"Python {type(tree).__name__}"
        return [SeenLeaf(path=path, kind=kind, device="", tensor=torch.tensor(tree, dtype=_dtype(kind)))]
    return [SeenLeaf(path=path, kind=type(tree).__name__, device="", tensor=torch.empty(0))]


def seen_leaf(leaf: LeafCase, values: Sequence[Number], shape: Sequence[int]) -> SeenLeaf:
    """Return what must be found at the end of a branch.

    Args:
        leaf: its path and kind.
        values: its elements in row-major order.
        shape: its shape.
    """
    if leaf.kind == _EMPTY_DICT:
        return SeenLeaf(path=leaf.path, kind=leaf.kind, device="", tensor=torch.empty(0))
    device = "" if leaf.kind in NUMBER_KINDS else "cpu"
    tensor = torch.tensor(values, dtype=_dtype(leaf.kind)).reshape(tuple(shape))
    return SeenLeaf(path=leaf.path, kind=leaf.kind, device=device, tensor=tensor)


def _dtype(kind: str) -> torch.dtype:
    names = {"Python float": "float64", "Python int": "int64", "Python bool": "bool"}
    return cast("torch.dtype", getattr(torch, names.get(kind, kind)))


def tree_difference(seen: Sequence[SeenLeaf], wanted: Sequence[SeenLeaf], *, tolerance: float = 0.0) -> str | None:
    """Return in words the first leaf that is not what it must be, or None.

    Args:
        seen: what was found, by path.
        wanted: what must be found.
        tolerance: how many units in the last place of the largest value a float may be away.
    """
    found, asked = {leaf.path: leaf for leaf in seen}, {leaf.path: leaf for leaf in wanted}
    for path in sorted(found.keys() | asked.keys()):
        if path not in found:
            return f"{_place(path)} is missing"
        if path not in asked:
            return f"{_place(path)} is {_words(found[path])} and must not be there"
        if not _is_same(found[path], asked[path], tolerance):
            return f"{_place(path)} is {_words(found[path])} and must be {_words(asked[path])}"
    return None


def _is_same(seen: SeenLeaf, wanted: SeenLeaf, tolerance: float) -> bool:
    if (seen.kind, seen.device, seen.tensor.shape) != (wanted.kind, wanted.device, wanted.tensor.shape):
        return False
    if torch.equal(seen.tensor, wanted.tensor):
        return True
    if not tolerance or not wanted.tensor.dtype.is_floating_point:
        return False
    bound = tolerance * torch.finfo(wanted.tensor.dtype).eps * wanted.tensor.double().abs().max()
    return bool(((seen.tensor.double() - wanted.tensor.double()).abs() <= bound).all())


def _place(path: Sequence[str]) -> str:
    return f"data{''.join(f'[{key!r}]' for key in path)}"


def _words(leaf: SeenLeaf) -> str:
    if leaf.kind == _EMPTY_DICT:
        return leaf.kind
    where = f" on {leaf.device}" if leaf.device else ""
    shape = f" of shape {tuple(leaf.tensor.shape)}" if leaf.device else ""
    return f"{leaf.kind}{shape}{where} with the values {leaf.tensor.tolist()}"
