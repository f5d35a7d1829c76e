"""What collectives do with values that carry gradients, and with those that are no numbers."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, cast

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.errors import LawError
from lightrft.strategy.protocols.collectives import ReduceOp
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

Function: TypeAlias = Literal["mean", "sum", "max", "min", "all_gather", "broadcast"]

_FUNCTIONS: tuple[Function, ...] = ("mean", "sum", "max", "min", "all_gather", "broadcast")
_OPS: tuple[ReduceOp, ...] = ("mean", "sum", "max", "min")
_KINDS = ("float32", "float64", "float16", "bfloat16")


@attrs.frozen(kw_only=True)
class GradientsCase:
    """Tensors that ask for gradients.

    Attributes:
        size: how many elements they have.
        kind: their dtype.
    """

    size: int
    kind: str


@attrs.frozen(kw_only=True)
class SeenGradients:
    """What collectives did with such tensors.

    Attributes:
        attached: calls whose result is part of a graph.
        gradient: of the tensor, from a backward pass after all calls.
    """

    attached: tuple[str, ...]
    gradient: tuple[float, ...]


def _gradients(rank: Rank, case: GradientsCase) -> SeenGradients:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    leaf = torch.ones(case.size, dtype=cast("torch.dtype", getattr(torch, case.kind)), requires_grad=True)
    data = {"leaf": leaf, "inner": 2 * leaf}
    attached: list[str] = []
    for function in _FUNCTIONS:
        if function == "all_gather":
            result = strategy.all_gather(data)
        elif function == "broadcast":
            result = strategy.broadcast(data)
        else:
            result = strategy.all_reduce(data, function)
        attached += [f"{function} of {name}" for name, tensor in result.items() if tensor.requires_grad]
    data["inner"].sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    gradient = cast("torch.Tensor", leaf.grad)
    return SeenGradients(attached=tuple(attached), gradient=tuple(gradient.float().tolist()))


def _gradients_cases(world_size: int) -> SearchStrategy[GradientsCase]:
    del world_size
    return st.builds(GradientsCase, size=st.integers(1, 3), kind=st.sampled_from(_KINDS))


def _gradients_hold(harness: Harness, case: GradientsCase) -> None:
    for rank, seen in enumerate(harness.run(_gradients, case)):
        if seen.attached:
            raise LawError(
                f"rank {rank}: the results of {seen.attached} require gradients; no result may keep a graph."
            )
        if seen.gradient != (2.0,) * case.size:
            raise LawError(f"rank {rank}: the gradient of the input is {seen.gradient}; each element must be 2.")


@attrs.frozen(kw_only=True)
class NotNumbersCase:
    """A reduction of tensors of which some elements are no finite numbers.

    Attributes:
        kind: the dtype.
        values: the elements of each rank, as `float` reads them.
    """

    kind: str
    values: tuple[tuple[str, ...], ...]


@st.composite
def _not_numbers_cases(draw: DrawFn, world_size: int) -> NotNumbersCase:
    size = draw(st.integers(1, 3))
    values = st.lists(st.sampled_from(["nan", "nan", "inf", "-inf", "1", "-2"]), min_size=size, max_size=size)
    rows = [tuple(draw(values)) for _ in range(world_size)]
    kind = draw(st.sampled_from(_KINDS))
    return NotNumbersCase(kind=kind, values=tuple(rows))


def _not_numbers(rank: Rank, case: NotNumbersCase) -> dict[str, tuple[float, ...]]:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    numbers = [float(value) for value in case.values[rank.rank]]
    tensor = torch.tensor(numbers, dtype=cast("torch.dtype", getattr(torch, case.kind)))
    seen: dict[str, tuple[float, ...]] = {}
    for op in _OPS:
        result = strategy.all_reduce({"tensor": tensor, "number": numbers[0]}, op)
        reduced = cast("torch.Tensor", result["tensor"])
        seen[op] = (*reduced.double().tolist(), float(cast("float", result["number"])))
    return seen


def _reduced(values: list[float], op: ReduceOp) -> float:
    if any(math.isnan(value) for value in values):
        return math.nan
    if op in {"max", "min"}:
        return max(values) if op == "max" else min(values)
    return sum(values) / (len(values) if op == "mean" else 1)


def _not_numbers_hold(harness: Harness, case: NotNumbersCase) -> None:
    columns = [[float(value) for value in column] for column in zip(*case.values, strict=True)]
    for rank, seen in enumerate(harness.run(_not_numbers, case)):
        for op in _OPS:
            must = [_reduced(column, op) for column in (*columns, columns[0])]
            if not all(_is_near(one, other) for one, other in zip(seen[op], must, strict=True)):
                raise LawError(
                    f"rank {rank}: the {op} of {case.values} ({case.kind}, and the first as a number) is {seen[op]}; "
                    f"it must be {must}."
                )


def _is_near(seen: float, must: float) -> bool:
    # a mean over three ranks is rounded, in bfloat16 to eight bits; what is looked for here is no rounding
    return (math.isnan(seen) and math.isnan(must)) or math.isclose(seen, must, rel_tol=2**-6)


LAWS: tuple[Law, ...] = (
    Law(
        id="collectives.gradients",
        statement="No result of a collective requires gradients or keeps a graph, and that of the input stays.",
        check=for_all(_gradients_cases, _gradients_hold),
    ),
    Law(
        id="collectives.not_numbers",
        statement="A reduction over ranks of which one has NaN is NaN, in max and min too, and infinities count.",
        check=for_all(_not_numbers_cases, _not_numbers_hold),
    ),
)
"""Laws of the section "collectives" about gradients, NaN and infinities."""
