"""What the ranks of a DeepSpeed engine wrote, put together: parameters as the optimizer steps them, and its moments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import torch

from lightrft.backends.checkpointing.foreign.deepspeed_files import RankFiles, open_ranks
from lightrft.backends.checkpointing.foreign.flat_parts import FlatParts, flat_parts, own_size
from lightrft.backends.checkpointing.foreign.record import (
    ForeignModel,
    ForeignOptimizer,
    ForeignParameter,
    ForeignTensor,
    foreign_optimizer,
    foreign_parameter,
    in_memory,
    joined,
)
from lightrft.backends.checkpointing.tensor_files import require_plain

__all__ = ["read_deepspeed"]

_State: TypeAlias = Mapping[str, object]

_BY_NUMBER = (
    "missing: the optimizer; stage 0 keeps it by the numbers of the parameters, and which is which is not known where "
    "there are several groups, frozen parameters or 16 bits."
)
_BY_ORDER = "assumed: the optimizer was given the parameters in the order of the modules, since stage 0 names none."


def read_deepspeed(directory: Path) -> ForeignModel:
    """Return the model of a DeepSpeed checkpoint of any stage, with its optimizer where its state has names.

    Args:
        directory: that of one checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged or holds more than data.
        UnsupportedError: the model was parallel in other ways than by data.
    """
    files = open_ranks(directory)
    first = files.models[0]
    module = _module(files, directory)
    aliases = _aliases(first, module)
    tensors = {name: in_memory(tensor) for name, tensor in module.items() if name not in aliases}
    optimizer, notes = None, ["missing: the optimizer."]
    if files.optimizers:
        parts = flat_parts(files, directory)
        # the float32 values that the optimizer steps: those of the module are rounded where it computes in 16 bits
        stepped = {name: _value(parts, name, directory) for name in parts.shapes}
        rest = {name: tensor for name, tensor in (tensors | _frozen(files, directory)).items() if name not in stepped}
        tensors = stepped | (_widened(rest) if _is_rounded(first, stepped) else rest)
        optimizer, notes = _flat_optimizer(parts, directory), []
    elif first.get("optimizer") is not None:
        buffers = cast("Collection[str]", first["buffer_names"])
        names = [name for name in tensors if name not in buffers]
        kept = cast("_State", first["optimizer"])
        names_of = _names_of_groups(kept) or [names]
        optimizer = _numbered_optimizer(kept, names_of, module)
        notes = [_BY_NUMBER] if optimizer is None else [] if _names_of_groups(kept) else [_BY_ORDER]
    return ForeignModel(
        kind="deepspeed",
        tensors=tensors,
        aliases=aliases,
        optimizer=optimizer,
        step=int(cast("int", first["global_steps"])),
        notes=notes,
    )


def _module(files: RankFiles, directory: Path) -> dict[str, torch.Tensor]:
    """Return what the module's own state holds: all, or in stage 3, whose parameters are elsewhere, its buffers."""
    first = files.models[0]
    module = cast("Mapping[str, object]", first["module"])
    names = cast("Collection[str]", first["buffer_names"]) if files.is_partitioned else module.keys()
    tensors = {name: cast("torch.Tensor", module[name]) for name in names}
    for name, tensor in tensors.items():
        require_plain(tensor, f"{directory}: {name}")
    return tensors


def _aliases(first: _State, module: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return every further name of a tied tensor, and its first name."""
    seen: dict[object, str] = {}
    aliases = dict(cast("Mapping[str, str]", first.get("shared_params") or {}))
    for name, tensor in module.items():
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if seen.setdefault(key, name) != name:
                aliases[name] = seen[key]
    return aliases


def _is_rounded(first: _State, stepped: Mapping[str, ForeignTensor]) -> bool:
    """Return whether the engine had turned the whole module, whatever is stepped, to fewer bits."""
    module = cast("Mapping[str, torch.Tensor]", first["module"])
    return any(module[name].dtype != tensor.dtype for name, tensor in stepped.items())


def _widened(tensors: Mapping[str, ForeignTensor]) -> dict[str, ForeignTensor]:
    """Return the tensors with those of 16 bits in float32, as the rest of the model is; no value changes."""

    def widened(tensor: ForeignTensor) -> ForeignTensor:
        def read() -> torch.Tensor:
            return tensor.read().float()

        return ForeignTensor(shape=tensor.shape, dtype=torch.float32, read=read)

    narrow = (torch.bfloat16, torch.float16)
    return {name: widened(tensor) if tensor.dtype in narrow else tensor for name, tensor in tensors.items()}


def _value(parts: FlatParts, name: str, directory: Path) -> ForeignTensor:
    pieces = [parts.values[place.rank][place.group].narrow(0, place.start, place.size) for place in parts.places[name]]
    return joined(pieces, parts.shapes[name], source=f"{directory}: {name}")


def _frozen(files: RankFiles, directory: Path) -> dict[str, ForeignTensor]:
    """Return what is not stepped, of which stage 3 keeps a part on each rank."""
    shapes = cast("Mapping[str, torch.Size]", files.models[0].get("frozen_param_shapes") or {})
    kept = [cast("Mapping[str, torch.Tensor]", each.get("frozen_param_fragments")) for each in files.models]
    frozen: dict[str, ForeignTensor] = {}
    for name, shape in shapes.items():
        sizes = [own_size(shape.numel(), rank=rank, num_ranks=len(kept)) for rank in range(len(kept))]
        pieces = [each[name].reshape(-1).narrow(0, 0, size) for each, size in zip(kept, sizes, strict=True)]
        frozen[name] = joined(pieces, shape, source=f"{directory}: {name}")
    return frozen


def _flat_optimizer(parts: FlatParts, directory: Path) -> ForeignOptimizer:
    parameters: dict[str, ForeignParameter] = {}
    for options, names in parts.groups:
        for name in names:
            of_first = parts.states[0].get(parts.places[name][0].group)
            if of_first is not None:
                state = {key: _moment(parts, name, key, value, directory) for key, value in of_first.items()}
                parameters[name] = foreign_parameter(state, options)
    return foreign_optimizer(parts.groups, parameters)


def _moment(parts: FlatParts, name: str, key: str, value: object, directory: Path) -> object:
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    flats = [cast("torch.Tensor", parts.states[place.rank][place.group][key]) for place in parts.places[name]]
    pieces = [flat.narrow(0, place.start, place.size) for flat, place in zip(flats, parts.places[name], strict=True)]
    return joined(pieces, parts.shapes[name], source=f"{directory}: {key} of {name}")


def _names_of_groups(kept: _State) -> list[Sequence[str]]:
    """Return the names of the parameters of each group; none where the optimizer was not told all of them."""
    groups = cast("Sequence[Mapping[str, Sequence[str]]]", kept.get("param_groups") or ())
    return [group["param_names"] for group in groups] if all("param_names" in group for group in groups) else []


def _numbered_optimizer(
    kept: _State, names: Sequence[Sequence[str]], module: Mapping[str, torch.Tensor]
) -> ForeignOptimizer | None:
    """Return an optimizer that numbers its parameters, by these names; None where they cannot be those."""
    groups = cast("Sequence[_State]", kept.get("param_groups") or ())
    numbers = [cast("list[int]", group["params"]) for group in groups]
    if not groups or [len(of) for of in numbers] != [len(of) for of in names]:
        return None
    states = cast("Mapping[int, Mapping[str, object]]", kept["state"])
    parameters: dict[str, ForeignParameter] = {}
    for group, of, by in zip(groups, numbers, names, strict=True):
        for number, name in zip(of, by, strict=True):
            state = states.get(number, {})
            if not _fits(state, module[name]):
                return None
            if state:
                parameters[name] = foreign_parameter({key: _whole(value) for key, value in state.items()}, group)
    return foreign_optimizer([*zip(groups, names, strict=True)], parameters)


def _fits(state: Mapping[str, object], parameter: torch.Tensor) -> bool:
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
    return all(tensor.shape == parameter.shape for tensor in tensors)


def _whole(value: object) -> object:
    return in_memory(value) if isinstance(value, torch.Tensor) and value.dim() else value
