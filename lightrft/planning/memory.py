"""An estimate of the memory of one rank, as sums of plain numbers; docs/how-to/plan.md explains the formulas.

Everything is counted for the rank that holds most, which is rank 0. Parameters, gradients and optimizer state of
"single" and "fsdp2" are exact; the rest is what the largest tensors come to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import attrs

from lightrft.planning.activations import Computing, DecoderSizes, activation_lines
from lightrft.planning.line import Line, Place

__all__ = ["ModelSizes", "ParameterSize", "Sharing", "Work", "memory_of_rank"]

_FLOAT32, _BFLOAT16 = 4, 2
"""Bytes of a number."""


@attrs.frozen(kw_only=True)
class ParameterSize:
    """The size of a parameter.

    Attributes:
        num_rows: size of its first dimension; 0 for one that cannot be cut.
        num_elements: of all dimensions.
        is_trained: whether it asks for a gradient.
    """

    num_rows: int
    num_elements: int
    is_trained: bool = True


@attrs.frozen(kw_only=True)
class ModelSizes:
    """The sizes of a model.

    Attributes:
        groups: parameters by the layer that they are gathered with; last those that are in no layer.
        decoder: what its activations follow from; None if that is not known.
    """

    groups: tuple[tuple[ParameterSize, ...], ...]
    decoder: DecoderSizes | None = None


@attrs.frozen(kw_only=True)
class Sharing:
    """How ranks share a model; a number of ranks is over how many something is spread, and 1 means each has it whole.

    Attributes:
        parameter_ranks: of parameters.
        gradient_ranks: of gradients.
        optimizer_ranks: of the optimizer's state.
        by_rows: whether whole rows are spread, and not single elements.
        whole_up_to: elements up to which a rank has a parameter whole beside its shard.
        second_ranks: over how many ranks a second copy of the shards is spread; 1 means there is none.
        has_copy: whether the optimizer steps a copy of its part of the parameters.
        gathered: which whole parameters lie beside shards at a time: none, those of no layer and of the two largest
            layers, or all.
        max_gathered: bound on their elements; 0 means none.
        keeps_gradients_whole: whether gradients wait whole until the last micro-batch of a window.
        bucket_elements: of a buffer through which gradients are exchanged; none is larger than the model.
        num_buckets: how many of these buffers there are.
        offloaded: what lies in main memory: "parameters", "gradients", "optimizer state".
    """

    parameter_ranks: int = 1
    gradient_ranks: int = 1
    optimizer_ranks: int = 1
    by_rows: bool = False
    whole_up_to: int = 0
    second_ranks: int = 1
    has_copy: bool = False
    gathered: Literal["none", "two layers", "all"] = "none"
    max_gathered: int = 0
    keeps_gradients_whole: bool = False
    bucket_elements: int = 0
    num_buckets: int = 1
    offloaded: frozenset[str] = frozenset()


@attrs.frozen(kw_only=True)
class Work:
    """What a rank computes at a time.

    Attributes:
        num_positions: of a micro-batch: its sequences times the positions of the longest one.
        chunk_rows: positions whose logits exist at a time.
        computing: how layers compute.
        is_recomputed: whether layers keep their inputs alone (gradient checkpointing).
        has_reference: whether there is a reference model.
        has_engine: whether the engine holds weights of its own.
        engine_sleeps: whether they lie in main memory while the model is trained.
        save_copy: where the copy lies that is saved in the background; None where there is none.
    """

    num_positions: int
    chunk_rows: int
    computing: Computing = "float32"
    is_recomputed: bool = False
    has_reference: bool = False
    has_engine: bool = False
    engine_sleeps: bool = False
    save_copy: Place | None = None


def memory_of_rank(sizes: ModelSizes, sharing: Sharing, work: Work) -> list[Line]:
    """Return the parts of the memory of rank 0 in the backward pass of a window's last micro-batch.

    What is left out: buffers of the model, workspaces of kernels, the key-value cache of a rollout, and what an
    allocator loses between blocks.

    Args:
        sizes: of the model that is trained.
        sharing: how ranks share it.
        work: what a rank computes at a time.

    Example:
        >>> square = ParameterSize(num_rows=4, num_elements=16)
        >>> sizes = ModelSizes(groups=((square,),))
        >>> for line in memory_of_rank(sizes, Sharing(), Work(num_positions=0, chunk_rows=0)):
        ...     print(f"{line.name:<16}{line.num_bytes:>4}  {line.formula}")
        parameters        64  4 B x 16
        gradients         64  4 B x 16
        optimizer state  132  8 B x 16 + 4 B x 1 step counts
    """
    held = [*_held(sizes, sharing), *_passing(sizes, sharing, work), *_other_models(sizes, sharing, work)]
    return [*held, *_save_copy(held, work), *_activations(sizes, work)]


def _held(sizes: ModelSizes, sharing: Sharing) -> list[Line]:
    every = [parameter for group in sizes.groups for parameter in group]
    trained = [parameter for parameter in every if parameter.is_trained]
    num_tensors, over = len(trained), sharing.optimizer_ranks
    state, counted = _share(trained, over, sharing)
    whole = _whole_too(sizes, sharing)
    lines = [
        _line("parameters", _FLOAT32, _share(every, sharing.parameter_ranks, sharing), sharing),
        _line("gradients", _FLOAT32, _share(trained, sharing.gradient_ranks, sharing), sharing),
        Line(
            name="optimizer state",
            num_bytes=2 * _FLOAT32 * state + _FLOAT32 * num_tensors,
            formula=f"{2 * _FLOAT32} B x {counted} + {_FLOAT32} B x {num_tensors} step counts",
            place=_place("optimizer state", sharing),
        ),
    ]
    if sharing.has_copy:
        copy = _line("stepped copy", _FLOAT32, (state, counted), sharing)
        lines.append(attrs.evolve(copy, place=_place("optimizer state", sharing)))
    if whole:
        lines.append(_line("small parameters", _FLOAT32, (whole, f"{whole:,} that are whole too"), sharing))
    if sharing.second_ranks > 1:
        lines.append(_line("second shards", _FLOAT32, _share(every, sharing.second_ranks, sharing), sharing))
    return lines


def _passing(sizes: ModelSizes, sharing: Sharing, work: Work) -> list[Line]:
    """Return what is whole, or in a buffer, for a part of the step."""
    lines: list[Line] = []
    width = _BFLOAT16 if work.computing == "bfloat16" else _FLOAT32
    numbers = [_elements(group) for group in sizes.groups]
    if sharing.gathered == "two layers":
        *layers, rest = numbers
        largest = sorted(layers)[-2:]
        words = " + ".join(f"{number:,}" for number in (rest, *reversed(largest)))
        lines.append(_line("gathered layers", width, (rest + sum(largest), f"({words})"), sharing))
    elif sharing.gathered == "all":
        spread = sum(numbers) - _whole_too(sizes, sharing)
        most = min(spread, sharing.max_gathered or spread)
        lines.append(_line("gathered layers", width, (most, f"{most:,}"), sharing))
    trained = [_elements(parameter for parameter in group if parameter.is_trained) for group in sizes.groups]
    if sharing.keeps_gradients_whole:
        lines.append(_line("whole gradients", _FLOAT32, (sum(trained), f"{sum(trained):,}"), sharing))
    elif sharing.gathered == "two layers":
        words = " + ".join(f"{number:,}" for number in sorted(trained, reverse=True)[:2])
        lines.append(_line("whole gradients", _FLOAT32, (sum(sorted(trained)[-2:]), f"({words})"), sharing))
    if sharing.bucket_elements:
        number = min(sharing.bucket_elements, sum(numbers))
        of_all = (number * sharing.num_buckets, f"{number:,} x {sharing.num_buckets}")
        lines.append(_line("buckets", _FLOAT32, of_all, sharing))
    if work.computing == "autocast":
        matrices = [size for group in sizes.groups[:-1] for size in group if size.num_elements > size.num_rows > 0]
        number = _elements(matrices)
        lines.append(_line("bfloat16 copies", _BFLOAT16, (number, f"{number:,} in matrices of layers"), sharing))
    return lines


def _other_models(sizes: ModelSizes, sharing: Sharing, work: Work) -> list[Line]:
    every = [parameter for group in sizes.groups for parameter in group]
    lines: list[Line] = []
    if work.has_reference:
        reference = _line("reference model", _FLOAT32, _share(every, sharing.parameter_ranks, sharing), sharing)
        lines.append(attrs.evolve(reference, place=_place("parameters", sharing)))
    if work.has_engine:
        engine = _line("engine's weights", _FLOAT32, _share(every, 1, sharing), sharing)
        lines.append(attrs.evolve(engine, place="host" if work.engine_sleeps else "device"))
    return lines


def _save_copy(held: Iterable[Line], work: Work) -> list[Line]:
    """Return the copy of what a checkpoint holds of this rank."""
    if work.save_copy is None:
        return []
    saved = [line for line in held if line.name in {"parameters", "optimizer state", "reference model"}]
    num_bytes, names = sum(line.num_bytes for line in saved), " + ".join(line.name for line in saved)
    return [Line(name="copy to be saved", num_bytes=num_bytes, formula=names, place=work.save_copy)]


def _activations(sizes: ModelSizes, work: Work) -> list[Line]:
    if sizes.decoder is None:
        return []
    return activation_lines(
        sizes.decoder,
        num_positions=work.num_positions,
        chunk_rows=work.chunk_rows,
        computing=work.computing,
        is_recomputed=work.is_recomputed,
    )


def _line(name: str, width: int, counted: tuple[int, str], sharing: Sharing) -> Line:
    number, words = counted
    return Line(name=name, num_bytes=width * number, formula=f"{width} B x {words}", place=_place(name, sharing))


def _place(name: str, sharing: Sharing) -> Place:
    return "host" if name in sharing.offloaded else "device"


def _share(parameters: Sequence[ParameterSize], num_ranks: int, sharing: Sharing) -> tuple[int, str]:
    """Return the elements that rank 0 has, and in words how they follow from all."""
    total = _elements(parameters)
    if num_ranks == 1:
        return total, f"{total:,}"
    own = sum(_own(parameter, num_ranks, by_rows=sharing.by_rows) for parameter in parameters)
    return own, f"{own:,} (of {total:,} over {num_ranks} ranks)"


def _own(parameter: ParameterSize, num_ranks: int, *, by_rows: bool) -> int:
    if not by_rows:
        return math.ceil(parameter.num_elements / num_ranks)
    if not parameter.num_rows:
        return parameter.num_elements
    return math.ceil(parameter.num_rows / num_ranks) * (parameter.num_elements // parameter.num_rows)


def _whole_too(sizes: ModelSizes, sharing: Sharing) -> int:
    every = (parameter for group in sizes.groups for parameter in group)
    return _elements(parameter for parameter in every if parameter.num_elements <= sharing.whole_up_to)


def _elements(parameters: Iterable[ParameterSize]) -> int:
    return sum(parameter.num_elements for parameter in parameters)
