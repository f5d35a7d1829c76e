"""The state of an optimizer that steps flat tensors, as if it had some of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.checkpointing.access import LiveTensor, OptimizerState, ParameterGroup, ParameterState, Part
from lightrft.backends.checkpointing.sharded import live_tensor
from lightrft.backends.zero.shards import Fragment, cut_fragment, part_of, whole_shape
from lightrft.errors import CheckpointError

__all__ = ["flat_optimizer_state"]


def flat_optimizer_state(
    model: nn.Module,
    optimizer: Optimizer,
    fragments: Mapping[str, Fragment],
    groups: Sequence[Sequence[str]],
) -> OptimizerState:
    """Return what the optimizer keeps, by the names of the parameters.

    What has the shape of the flat tensor is cut along the parameters; what is 0-d, such as the count of steps, or no
    tensor belongs to each of them. A parameter without elements has as much as the others of its group.

    Args:
        model: the plain model.
        optimizer: as the user has it; its groups hold flat tensors.
        fragments: where this rank's part of each parameter stands.
        groups: names of the parameters of each group.
    """
    shapes = {name: whole_shape(parameter) for name, parameter in model.named_parameters()}
    planned: dict[int, Mapping[str, object]] = {}  # what belongs to all parameters of a flat tensor
    flats = {name: fragment.flat for name, fragment in fragments.items()}
    parameters: dict[str, ParameterState] = {}
    for names in groups:
        flat = next((flats[name] for name in names if name in flats), None)
        if flat is None or flat not in optimizer.state:  # asked first, since reading would make an entry
            continue
        state = cast("dict[str, object]", optimizer.state[flat])
        parameters |= {name: _parameter_state(state, flat, fragments.get(name), shapes[name], name) for name in names}

    def plan_parameter(
        name: str, saved: Mapping[str, object] | None, *, options: Mapping[str, object], source: str
    ) -> Callable[[], None]:
        fragment = fragments.get(name)
        if fragment is None:
            return _nothing
        flat, whole = fragment.flat, _whole(saved or {}, fragment)
        shared = {key: value for key, value in (saved or {}).items() if key not in whole}
        if saved is not None:
            _require_same(planned.setdefault(id(flat), shared), shared, source)
        parts = {key: cut_fragment(value, fragment).clone() for key, value in whole.items()}

        def write() -> None:
            if id(flat) not in planned:
                optimizer.state.pop(flat, None)
            elif saved is None:
                _zero(cast("dict[str, object]", optimizer.state[flat]), fragment)
            else:
                _write(cast("dict[str, object]", optimizer.state[flat]), fragment, parts, shared, options)

        return write

    return OptimizerState(
        defaults=cast("dict[str, object]", optimizer.defaults),
        groups=[
            ParameterGroup(options=options, parameters=names)
            for options, names in zip(cast("list[dict[str, object]]", optimizer.param_groups), groups, strict=True)
        ],
        parameters=parameters,
        plan_parameter=plan_parameter,
    )


def _nothing() -> None:
    pass


def _parameter_state(
    state: Mapping[str, object], flat: torch.Tensor, fragment: Fragment | None, shape: Sequence[int], name: str
) -> ParameterState:
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return ParameterState(
        tensors={
            key: _described(value, fragment, shape) if value.shape == flat.shape else live_tensor(value, name)
            for key, value in tensors.items()
        },
        values={key: value for key, value in state.items() if key not in tensors},
    )


def _described(value: torch.Tensor, fragment: Fragment | None, shape: Sequence[int]) -> LiveTensor:
    def part() -> Part:
        if fragment is None:
            return Part(values=torch.zeros(torch.Size(shape), dtype=value.dtype), start=0)
        return Part(values=part_of(value, fragment), start=fragment.start)

    return LiveTensor(shape=shape, dtype=value.dtype, part=part, is_whole=fragment is None)


def _whole(saved: Mapping[str, object], fragment: Fragment) -> dict[str, torch.Tensor]:
    """Return what has the shape of the parameter; a count of steps is 0-d, as a parameter may be, too."""
    return {
        key: value
        for key, value in saved.items()
        if isinstance(value, torch.Tensor) and key != "step" and value.shape == torch.Size(fragment.shape)
    }


def _require_same(first: Mapping[str, object], other: Mapping[str, object], source: str) -> None:
    if first.keys() != other.keys() or not all(_equal(value, other[key]) for key, value in first.items()):
        raise CheckpointError(
            f"{source} has {_words(other)}, and parameters that are stepped in one go with it have {_words(first)}; "
            "load it with zero_stage=0."
        )


def _equal(value: object, other: object) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(value, other)
    return value == other


def _words(shared: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in shared.items()) or "nothing"


def _zero(state: Mapping[str, object], fragment: Fragment) -> None:
    for value in state.values():
        if isinstance(value, torch.Tensor) and value.shape == fragment.flat.shape:
            part_of(value, fragment).zero_()


def _write(
    state: dict[str, object],
    fragment: Fragment,
    parts: Mapping[str, torch.Tensor],
    shared: Mapping[str, object],
    options: Mapping[str, object],
) -> None:
    for key in [key for key in state if key not in parts and key not in shared]:
        del state[key]
    # torch keeps step counters on the host, unless its kernels read them
    counts_on_host = not options.get("fused") and not options.get("capturable")
    for key, value in shared.items():
        device = "cpu" if key == "step" and counts_on_host else fragment.flat.device
        state[key] = value.to(device, copy=True) if isinstance(value, torch.Tensor) else value
    for key, part in parts.items():
        live = state.get(key)
        if not isinstance(live, torch.Tensor) or live.shape != fragment.flat.shape or live.dtype != part.dtype:
            live = state[key] = torch.zeros_like(fragment.flat, dtype=part.dtype, requires_grad=False)
        part_of(live, fragment).copy_(part)
