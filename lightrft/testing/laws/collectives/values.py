"""What ranks do together: the values that collectives give, and the calls that they refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, cast

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.errors import ConfigError, LawError
from lightrft.strategy.protocols.collectives import ReduceOp, TensorTree
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.trees import (
    FLOAT_KINDS,
    INT_KINDS,
    KINDS,
    NUMBER_KINDS,
    Number,
    SeenLeaf,
    TreeCase,
    build_tree,
    leaf_shape,
    leaf_values,
    see_tree,
    seen_leaf,
    tree_cases,
    tree_difference,
)
from lightrft.testing.law import Cases, Harness, Law, for_all
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

Mistake: TypeAlias = Literal[
    "mean of whole numbers",
    "sum of bools",
    "order of complex numbers",
    "unknown op",
    "gathered number",
    "unknown src",
]

_WIDE = ("float64", "int64", "int64")  # drawn more often than others, because nobody's own computations use them
_BOOLS = ("bool", "Python bool")
_KINDS_OF_OP: dict[ReduceOp, tuple[str, ...]] = {
    "mean": (*FLOAT_KINDS, "float64"),
    "sum": (*FLOAT_KINDS, *INT_KINDS, *_WIDE),
    "max": (*KINDS, *_WIDE, *_BOOLS, *_BOOLS),  # more often than others, because here alone they have a meaning
    "min": (*KINDS, *_WIDE, *_BOOLS, *_BOOLS),
}

# a law each, because a backend often has one of them wrong, and that in few dtypes
_OPS: dict[ReduceOp, str] = {"mean": "mean", "sum": "sum", "max": "largest value", "min": "smallest value"}


@attrs.frozen(kw_only=True)
class ReduceCase:
    """A reduction.

    Attributes:
        tree: what the ranks pass.
        op: how values become one.
    """

    tree: TreeCase
    op: ReduceOp


@attrs.frozen(kw_only=True)
class BroadcastCase:
    """A broadcast.

    Attributes:
        tree: what the ranks pass.
        src: whose value is taken.
    """

    tree: TreeCase
    src: int


@attrs.frozen(kw_only=True)
class MistakeCase:
    """A call that has no meaning.

    Attributes:
        tree: what the ranks pass; its last leaf is what has no meaning.
        mistake: what is wrong with the call.
        op: the op, where it is wrong.
        src: the rank, where it is wrong.
    """

    tree: TreeCase
    mistake: Mistake
    op: str
    src: int


@attrs.frozen(kw_only=True)
class MistakesCase:
    """One call of every kind that has no meaning; each example tries all of them."""

    mistakes: tuple[MistakeCase, ...]


@attrs.frozen(kw_only=True, eq=False)
class SeenCall:
    """A collective as one rank saw it.

    Attributes:
        result: what was returned.
        inputs: what was passed, after the call.
        inputs_later: the same after the rank has written into its result.
        result_later: the result after every rank has written into its own.
    """

    result: list[SeenLeaf]
    inputs: list[SeenLeaf]
    inputs_later: list[SeenLeaf]
    result_later: list[SeenLeaf]


@attrs.frozen(kw_only=True, eq=False)
class SeenBroadcast:
    """A broadcast as one rank saw it.

    Attributes:
        call: the first one.
        again: the broadcast of its result.
    """

    call: SeenCall
    again: list[SeenLeaf]


@attrs.frozen(kw_only=True, eq=False)
class SeenMistake:
    """How a call without meaning ended.

    Attributes:
        message: of the error; empty if there was none.
        inputs: what was passed, afterwards.
        total: sum over ranks of 1, to see that they are still in step.
    """

    message: str
    inputs: list[SeenLeaf]
    total: int


def _started(rank: Rank) -> Strategy:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    return strategy


def _seen_call(strategy: Strategy, data: TensorTree, call: Callable[[TensorTree], TensorTree]) -> SeenCall:
    result = call(data)
    seen, inputs = see_tree(result), see_tree(data)
    _add(result, strategy.get_rank() + 1)
    inputs_later = see_tree(data)
    strategy.barrier()  # now every rank has written into its result
    return SeenCall(result=seen, inputs=inputs, inputs_later=inputs_later, result_later=see_tree(result))


def _add(tree: object, amount: int) -> None:
    """Change every element of a tree in place."""
    if isinstance(tree, torch.Tensor):
        if tree.dtype == torch.bool:
            tree.logical_not_()
        else:
            tree.add_(amount)
    elif isinstance(tree, dict):
        for branch in cast("dict[str, object]", tree).values():
            _add(branch, amount)


def _require_call(seen: SeenCall, case: TreeCase, wanted: list[SeenLeaf], rank: int, tolerance: float) -> None:
    _require(seen.result, wanted, f"on rank {rank} the result", tolerance)
    passed = _wanted(case, rank)
    _require(seen.inputs, passed, f"on rank {rank} the input after the call")
    _require(seen.inputs_later, passed, f"on rank {rank} the input, after writing into the result,")
    written = [leaf if not leaf.device else attrs.evolve(leaf, tensor=leaf.tensor.clone()) for leaf in seen.result]
    for leaf in written:
        if leaf.device:
            _add(leaf.tensor, rank + 1)
    _require(seen.result_later, written, f"on rank {rank} the result, after all ranks have written into theirs,")


def _require(seen: Sequence[SeenLeaf], wanted: Sequence[SeenLeaf], what: str, tolerance: float = 0.0) -> None:
    difference = tree_difference(seen, wanted, tolerance=tolerance)
    if difference is not None:
        raise LawError(f"{what} is wrong: {difference}.")


def _wanted(case: TreeCase, rank: int) -> list[SeenLeaf]:
    return [seen_leaf(leaf, leaf_values(leaf, case, rank), leaf_shape(leaf, case, rank)) for leaf in case.leaves]


def _seen_reduce(rank: Rank, case: ReduceCase) -> SeenCall:
    strategy = _started(rank)

    def reduce(data: TensorTree) -> TensorTree:
        return strategy.all_reduce(data, case.op)

    return _seen_call(strategy, build_tree(case.tree, rank.rank), reduce)


def _reduce_cases(op: ReduceOp) -> Cases[ReduceCase]:
    def cases(world_size: int) -> SearchStrategy[ReduceCase]:
        del world_size
        return st.builds(ReduceCase, tree=tree_cases(kinds=_KINDS_OF_OP[op]), op=st.just(op))

    return cases


def _reduced(values: Sequence[Number], op: ReduceOp) -> Number:
    if op in {"max", "min"}:
        return max(values) if op == "max" else min(values)
    return sum(values) / len(values) if op == "mean" else sum(values)


def _reduces(harness: Harness, case: ReduceCase) -> None:
    size = harness.world_size
    wanted = [
        seen_leaf(
            leaf,
            [
                _reduced(values, case.op)
                for values in zip(*(leaf_values(leaf, case.tree, rank) for rank in range(size)), strict=True)
            ],
            leaf.shape,
        )
        for leaf in case.tree.leaves
    ]
    # sums of these values are exact, and so is half of one; a third is rounded, by some backends before the sum
    tolerance = 0.0 if case.op != "mean" or size & (size - 1) == 0 else float(size)
    seen = harness.run(_seen_reduce, case)
    for rank, call in enumerate(seen):
        _require_call(call, case.tree, wanted, rank, tolerance)
        _require(call.result, seen[0].result, f"the result on rank {rank}, against that on rank 0,")


def _seen_gather(rank: Rank, case: TreeCase) -> SeenCall:
    strategy = _started(rank)
    return _seen_call(strategy, build_tree(case, rank.rank), strategy.all_gather)


def _gather_cases(world_size: int) -> SearchStrategy[TreeCase]:
    del world_size
    return tree_cases(kinds=[kind for kind in KINDS if kind not in NUMBER_KINDS], is_growing=True)


def _gathers(harness: Harness, case: TreeCase) -> None:
    ranks = range(harness.world_size)
    wanted = [
        seen_leaf(
            leaf,
            [value for rank in ranks for value in leaf_values(leaf, case, rank)],
            (sum((leaf_shape(leaf, case, rank) or (1,))[0] for rank in ranks), *leaf.shape[1:]),
        )
        for leaf in case.leaves
    ]
    for rank, call in enumerate(harness.run(_seen_gather, case)):
        _require_call(call, case, wanted, rank, tolerance=0.0)


def _seen_broadcast(rank: Rank, case: BroadcastCase) -> SeenBroadcast:
    strategy = _started(rank)

    def broadcast(data: TensorTree) -> TensorTree:
        return strategy.broadcast(data, case.src)

    call = _seen_call(strategy, build_tree(case.tree, rank.rank), broadcast)
    first = broadcast(build_tree(case.tree, rank.rank))
    return SeenBroadcast(call=call, again=see_tree(broadcast(first)))


def _broadcast_cases(world_size: int) -> SearchStrategy[BroadcastCase]:
    return st.builds(BroadcastCase, tree=tree_cases(), src=st.integers(0, world_size - 1))


def _broadcasts(harness: Harness, case: BroadcastCase) -> None:
    wanted = _wanted(case.tree, case.src)
    for rank, seen in enumerate(harness.run(_seen_broadcast, case)):
        _require_call(seen.call, case.tree, wanted, rank, tolerance=0.0)
        _require(seen.again, wanted, f"on rank {rank} the broadcast of the result")


def _seen_mistakes(rank: Rank, case: MistakesCase) -> list[SeenMistake]:
    strategy = _started(rank)
    return [_seen_mistake(strategy, mistake, rank.rank) for mistake in case.mistakes]


def _seen_mistake(strategy: Strategy, case: MistakeCase, rank: int) -> SeenMistake:
    data = build_tree(case.tree, rank)
    message = ""
    try:
        if case.mistake == "gathered number":
            strategy.all_gather(data)
        elif case.mistake == "unknown src":
            strategy.broadcast(data, case.src)
        else:
            strategy.all_reduce(data, cast("ReduceOp", case.op))
    except ConfigError as error:
        message = str(error)
    return SeenMistake(message=message, inputs=see_tree(data), total=strategy.all_reduce(1, "sum"))


_MISTAKES: Mapping[Mistake, tuple[Sequence[str], Sequence[str]]] = {
    "mean of whole numbers": ((*INT_KINDS, *_BOOLS), ["mean"]),
    "sum of bools": (_BOOLS, ["sum"]),
    "order of complex numbers": (("float32",), ["max", "min"]),
    "unknown op": (("float32",), ["maen", "summ", "mx", "avg", "MEAN", "minn"]),
    "gathered number": (NUMBER_KINDS, [""]),
    "unknown src": (("float32",), [""]),
}
"""Kinds of the bad leaf, and ops, of each mistake."""


@st.composite
def _mistakes(draw: DrawFn, world_size: int) -> MistakesCase:
    good = draw(tree_cases(kinds={"float32"}, max_leaves=2))  # the same one beside all, because drawing is slow
    return MistakesCase(mistakes=tuple(draw(_mistake(mistake, good, world_size)) for mistake in _MISTAKES))


@st.composite
def _mistake(draw: DrawFn, mistake: Mistake, good: TreeCase, world_size: int) -> MistakeCase:
    kinds, ops = _MISTAKES[mistake]
    bad = draw(tree_cases(kinds=kinds, max_leaves=1).filter(_has_leaf))
    # the good leaves stand beside the bad one, whatever keys they had
    leaves = (
        *(attrs.evolve(leaf, path=("good", *leaf.path)) for leaf in good.leaves),
        *(
            attrs.evolve(leaf, path=("bad", *leaf.path), kind="complex64" if mistake in _COMPLEX else leaf.kind)
            for leaf in bad.leaves
            if leaf.kind in kinds
        ),
    )
    src = draw(st.integers(-3, -1) | st.integers(world_size, world_size + 3))
    return MistakeCase(tree=TreeCase(leaves=leaves), mistake=mistake, op=draw(st.sampled_from(ops)), src=src)


def _has_leaf(case: TreeCase) -> bool:
    return any(leaf.kind in KINDS for leaf in case.leaves)


_COMPLEX: tuple[Mistake, ...] = ("order of complex numbers",)


def _refuses(harness: Harness, case: MistakesCase) -> None:
    for rank, mistakes in enumerate(harness.run(_seen_mistakes, case)):
        for mistake, seen in zip(case.mistakes, mistakes, strict=True):
            _require_mistake(seen, mistake, rank, harness.world_size)


def _require_mistake(seen: SeenMistake, case: MistakeCase, rank: int, world_size: int) -> None:
    # how an error writes it down is its own choice
    clues = {"unknown op": case.op, "unknown src": str(case.src)}
    clue = clues.get(case.mistake, "bad")
    where = f"{case.mistake} (op={case.op!r}, src={case.src}) on rank {rank}"
    if not seen.message:
        raise LawError(f"{where} must raise ConfigError, and a value was returned.")
    if clue not in seen.message:
        raise LawError(f"{where} raised {seen.message!r}, which must name {clue!r}.")
    _require(seen.inputs, _wanted(case.tree, rank), f"{where}: the input afterwards")
    if seen.total != world_size:
        raise LawError(f"{where}: a sum of ones over all ranks is then {seen.total}.")


LAWS: tuple[Law, ...] = (
    *(
        Law(
            id=f"collectives.all_reduce_{op}",
            statement=f"all_reduce gives every rank the same {words}, exact in every dtype, and leaves inputs alone.",
            check=for_all(_reduce_cases(op), _reduces),
        )
        for op, words in _OPS.items()
    ),
    Law(
        id="collectives.all_gather",
        statement="all_gather concatenates in rank order whatever the sizes of dim 0, and leaves its inputs alone.",
        check=for_all(_gather_cases, _gathers),
    ),
    Law(
        id="collectives.broadcast",
        statement="broadcast gives every rank the value of the rank that is named; twice is the same as once.",
        check=for_all(_broadcast_cases, _broadcasts),
    ),
    Law(
        id="collectives.refusals",
        statement="A call without meaning is a ConfigError on every rank that names the place, and changes nothing.",
        check=for_all(_mistakes, _refuses),
    ),
)
"""Laws of the section "collectives" about the values that ranks get."""
