"""The state of an optimizer that steps flat tensors, as if it had some of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.checkpointing.access import (
    LiveTensor,
    OptimizerState,
    ParameterGroup,
    ParameterState,
    Part,
    StoredTensor,
)
from lightrft.backends.checkpointing.sharded import live_tensor
from lightrft.backends.checkpointing.stored import read_stored
from lightrft.backends.zero.shards import Fragment, part_of, whole_shape
from lightrft.errors import CheckpointError

__all__ = ["flat_optimizer_state"]


@attrs.frozen(kw_only=True, eq=False)
class _FlatPlan:
    """What the state of one flat tensor will be.

    Attributes:
        shared: what belongs to all parameters of it.
        tensors: the states that are laid out as it, by key: those that are there, or new ones.
        made: keys of the new ones.
    """

    shared: Mapping[str, object]
    tensors: dict[str, torch.Tensor] = attrs.field(factory=dict[str, torch.Tensor])
    made: set[str] = attrs.field(factory=set[str])


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
    plans: dict[int, _FlatPlan] = {}
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
        if saved is not None:
            shared = {key: _value(value) for key, value in saved.items() if key not in whole}
            plan = plans.setdefault(id(flat), _FlatPlan(shared=shared))
            _require_same(plan.shared, shared, source)
            _make_room(plan, whole, flat, cast("Mapping[str, object]", optimizer.state.get(flat, {})))
            for key in plan.made & whole.keys():  # what is new is read here, since it changes nothing that is live
                _read_part(whole.pop(key), plan.tensors[key], fragment)

        def write() -> None:
            if id(flat) not in plans:
                optimizer.state.pop(flat, None)
                return
            agreed = plans[id(flat)]
            for key, stored in whole.items():
                _read_part(stored, agreed.tensors[key], fragment)
            if saved is None:
                for tensor in agreed.tensors.values():
                    part_of(tensor, fragment).zero_()
            _set(cast("dict[str, object]", optimizer.state[flat]), agreed, flat.device, options)

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


def _whole(saved: Mapping[str, object], fragment: Fragment) -> dict[str, StoredTensor]:
    """Return what has the shape of the parameter; a count of steps is 0-d, as a parameter may be, too."""
    return {
        key: value
        for key, value in saved.items()
        if isinstance(value, StoredTensor) and key != "step" and tuple(value.shape) == tuple(fragment.shape)
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


def _value(saved: object) -> object:
    return read_stored(saved) if isinstance(saved, StoredTensor) else saved


def _make_room(
    plan: _FlatPlan, saved: Mapping[str, StoredTensor], flat: torch.Tensor, present: Mapping[str, object]
) -> None:
    for key, stored in saved.items():
        live = present.get(key)
        if key in plan.tensors:
            continue
        if isinstance(live, torch.Tensor) and live.shape == flat.shape and live.dtype == stored.dtype:
            plan.tensors[key] = live
        else:
            plan.tensors[key] = torch.zeros_like(flat, dtype=stored.dtype, requires_grad=False)
            plan.made.add(key)


def _read_part(stored: StoredTensor, tensor: torch.Tensor, fragment: Fragment) -> None:
    stored.copy_into(part_of(tensor, fragment), start=fragment.start)


def _set(state: dict[str, object], plan: _FlatPlan, device: torch.device, options: Mapping[str, object]) -> None:
    for key in [key for key in state if key not in plan.tensors and key not in plan.shared]:
        del state[key]
    # torch keeps step counters on the host, unless its kernels read them
    counts_on_host = not options.get("fused") and not options.get("capturable")
    for key, value in plan.shared.items():
        place = "cpu" if key == "step" and counts_on_host else device
        state[key] = value.to(place, copy=True) if isinstance(value, torch.Tensor) else value
    state.update(plan.tensors)
