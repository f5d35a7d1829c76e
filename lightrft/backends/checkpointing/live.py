"""The access to models and optimizers of torch's own kind, whose tensors are whole or sharded by `fully_shard`.

It serves a process alone, ranks that each hold the whole model, and ranks that hold its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.checkpointing.access import (
    LiveTensor,
    ModelState,
    OptimizerState,
    ParameterGroup,
    ParameterState,
    StateAccess,
    StoredTensor,
)
from lightrft.backends.checkpointing.named import NamedState, describe, difference, named_state
from lightrft.backends.checkpointing.sharded import (
    drop_deferred_gradients,
    has_deferred_gradients,
    is_sharded,
    live_tensor,
    local_part,
    reshard,
    stored_part,
    wrap_part,
)
from lightrft.backends.checkpointing.stored import read_stored
from lightrft.backends.checkpointing.tensor_files import require_plain
from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.protocols.training import UnwrapModel

__all__ = ["build_live_access", "copy_plan"]


def build_live_access(unwrap_model: UnwrapModel) -> StateAccess:
    """Return the access to models and optimizers of torch's own kind, whole or sharded.

    Args:
        unwrap_model: undoes `prepare`; what it returns has the parameters that the optimizer steps.

    Example:
        >>> def unwrap_model(model: nn.Module) -> nn.Module:
        ...     return model
        >>> state = build_live_access(unwrap_model).model_state(nn.Linear(3, 2), owner="actor")
        >>> {name: list(tensor.shape) for name, tensor in state.tensors.items()}
        {'weight': [2, 3], 'bias': [2]}
    """

    def model_state(model: nn.Module, *, owner: str) -> ModelState:
        return _model_state(unwrap_model(model), owner)

    def optimizer_state(model: nn.Module, optimizer: Optimizer, *, owner: str) -> OptimizerState:
        plain = unwrap_model(model)
        reshard(plain)
        return _optimizer_state(optimizer, named_state(plain, owner=owner), owner)

    return StateAccess(unwrap_model=unwrap_model, model_state=model_state, optimizer_state=optimizer_state)


def copy_plan(live: torch.Tensor, saved: StoredTensor, *, source: str) -> Callable[[], None]:
    """Return a function that reads a stored tensor into a live one of its shape and dtype, which keeps its identity.

    Args:
        live: where to; of a sharded tensor, this rank's part alone is read and written.
        saved: where from, whole.
        source: what is copied, for the error.

    Raises:
        CheckpointError: the live tensor's elements share memory, and the saved ones differ.
    """
    target, part = local_part(live).detach(), stored_part(saved, live)
    spread = [dim for dim, stride in enumerate(target.stride()) if stride == 0 and target.shape[dim] > 1]
    if spread:
        return _expanded_plan(target, part, spread, source)

    def copy_into() -> None:
        part.copy_into(target)

    return copy_into


def _expanded_plan(target: torch.Tensor, part: StoredTensor, spread: Sequence[int], source: str) -> Callable[[], None]:
    # an expanded tensor can't be written as a whole
    whole = read_stored(part)
    once = whole
    for dim in spread:
        target, once = target.narrow(dim, 0, 1), once.narrow(dim, 0, 1)
    if not torch.equal(_bits(once.expand_as(whole)), _bits(whole)):
        raise CheckpointError(f"{source} is an expanded tensor here and was none there; clone it before loading.")
    kept = once.clone()  # not a view, which would keep the rest

    def copy_into() -> None:
        target.copy_(kept)

    return copy_into


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _model_state(model: nn.Module, owner: str) -> ModelState:
    reshard(model)
    live = named_state(model, owner=owner)

    def plan_tensor(name: str, saved: StoredTensor, *, source: str) -> Callable[[], None]:
        return copy_plan(live.tensors[name], saved, source=source)

    def read_gradients() -> Mapping[str, torch.Tensor]:
        return _gradients(model, live, owner)

    def plan_gradients(saved: Mapping[str, StoredTensor], *, source: str) -> Callable[[], None]:
        return _plan_gradients(model, live, saved, source)

    return ModelState(
        tensors={
            name: live_tensor(tensor, f"{owner}.{name}", is_buffer=not isinstance(tensor, nn.Parameter))
            for name, tensor in live.tensors.items()
        },
        aliases=live.aliases,
        plan_tensor=plan_tensor,
        read_gradients=read_gradients,
        plan_gradients=plan_gradients,
    )


def _gradient_names(live: NamedState) -> dict[str, str]:
    """Return the names of the tensors that may have a gradient, by that of the gradient in the file of this rank."""
    return {_gradient_name(name, tensor): name for name, tensor in live.tensors.items() if tensor.is_leaf}


def _gradient_name(name: str, tensor: torch.Tensor) -> str:
    # a shard holds the sum over ranks already, and must not be taken for a rank's own summand, whatever its shape
    return f"shard.{name}" if is_sharded(tensor) and tensor.device_mesh.size() > 1 else name


def _gradients(model: nn.Module, live: NamedState, owner: str) -> dict[str, torch.Tensor]:
    if has_deferred_gradients(model):
        raise CheckpointError(
            f"{owner} has gradients that its ranks have not reduced, because backward was told is_boundary=False; "
            "save after the optimizer_step that completes the window."
        )
    gradients: dict[str, torch.Tensor] = {}
    for key, name in _gradient_names(live).items():
        gradient = live.tensors[name].grad
        if gradient is not None:
            gradients[key] = local_part(gradient)
            require_plain(gradients[key], f"{owner}.{name}.grad")
    return gradients


def _plan_gradients(
    model: nn.Module, live: NamedState, saved: Mapping[str, StoredTensor], source: str
) -> Callable[[], None]:
    names = _gradient_names(live)
    parts = {key: local_part(live.tensors[name]) for key, name in names.items() if key in saved}
    words = difference(saved=describe(saved), live=describe(parts))
    if words is not None:
        raise CheckpointError(f"{source} (gradients) {words}; load into the model that was saved.")
    taken = _pointers(live)
    places = {
        name: _place(live.tensors[name].grad, saved[key], live.tensors[name], taken)
        for key, name in names.items()
        if key in saved
    }

    def set_gradients() -> None:
        drop_deferred_gradients(model)
        for name in names.values():
            live.tensors[name].grad, fill = places.get(name, (None, _nothing))
            fill()

    return set_gradients


def _optimizer_state(optimizer: Optimizer, live: NamedState, owner: str) -> OptimizerState:
    groups = _groups(optimizer, live, owner)
    names = [name for group in groups for name in group.parameters]
    taken = _pointers(live)

    def plan_parameter(
        name: str, saved: Mapping[str, object] | None, *, options: Mapping[str, object], source: str
    ) -> Callable[[], None]:
        del source  # any state fits
        parameter = live.tensors[name]
        # asked this way, since reading would make an entry
        present = cast("Mapping[str, object]", optimizer.state.get(parameter, {}))
        state, fills = _places(saved or {}, present, parameter, options, taken)

        def set_state() -> None:
            for fill in fills:
                fill()
            if saved is None:
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = state

        return set_state

    return OptimizerState(
        defaults=cast("dict[str, object]", optimizer.defaults),
        groups=groups,
        parameters={
            name: _parameter_state(optimizer, live.tensors[name], f"{owner}.optimizer.state[{name!r}]")
            for name in names
            if live.tensors[name] in optimizer.state  # asked first, since reading would make an entry
        },
        plan_parameter=plan_parameter,
    )


def _groups(optimizer: Optimizer, live: NamedState, owner: str) -> Sequence[ParameterGroup]:
    names = {id(tensor): name for name, tensor in live.tensors.items()}
    groups: list[ParameterGroup] = []
    for index, options in enumerate(cast("list[dict[str, object]]", optimizer.param_groups)):
        parameters = cast("list[torch.Tensor]", options["params"])
        if any(id(parameter) not in names for parameter in parameters):
            raise ConfigError(
                f"{owner}.optimizer.param_groups[{index}] holds a tensor that is no parameter of the model; "
                "pass each optimizer with its own model."
            )
        groups.append(ParameterGroup(options=options, parameters=[names[id(parameter)] for parameter in parameters]))
    stepped = {id(live.tensors[name]) for group in groups for name in group.parameters}
    if any(id(key) not in stepped for key in optimizer.state):
        raise ConfigError(f"{owner}.optimizer.state has an entry that belongs to no parameter; remove it.")
    return groups


def _parameter_state(optimizer: Optimizer, parameter: torch.Tensor, path: str) -> ParameterState:
    tensors: dict[str, LiveTensor] = {}
    values: dict[str, object] = {}
    for key, value in cast("dict[str, object]", optimizer.state[parameter]).items():
        if isinstance(value, torch.Tensor):
            require_plain(local_part(value), f"{path}[{key!r}]")
            tensors[key] = live_tensor(value, f"{path}[{key!r}]")
        else:
            values[key] = value
    return ParameterState(tensors=tensors, values=values)


def _places(
    saved: Mapping[str, object],
    present: Mapping[str, object],
    parameter: torch.Tensor,
    options: Mapping[str, object],
    taken: set[int],
) -> tuple[dict[str, object], list[Callable[[], None]]]:
    """Return a parameter's state, and what reads that of it which is there already; what is new is read here."""
    # torch keeps step counters on the host, unless its kernels read them (as its own `load_state_dict` has it)
    counts_on_host = not options.get("fused") and not options.get("capturable")
    state: dict[str, object] = {}
    fills: list[Callable[[], None]] = []
    for key, value in saved.items():
        if not isinstance(value, StoredTensor):
            state[key] = value
        elif key == "step" and counts_on_host:
            state[key] = read_stored(value)
        elif tuple(value.shape) != tuple(parameter.shape):
            state[key] = read_stored(value).to(local_part(parameter).device)
        else:
            state[key], fill = _place(present.get(key), stored_part(value, parameter), parameter, taken)
            fills.append(fill)
    return state, fills


def _place(
    present: object, part: StoredTensor, parameter: torch.Tensor, taken: set[int]
) -> tuple[torch.Tensor, Callable[[], None]]:
    """Return what this rank's part is read to, and what reads it; a new tensor is laid out as the parameter."""
    like = local_part(parameter)
    if isinstance(present, torch.Tensor) and is_sharded(present) == is_sharded(parameter):
        there = local_part(present).detach()
        if _layout(there) == (part.dtype, tuple(part.shape), like.stride(), like.device) and _take(there, taken):

            def fill() -> None:
                part.copy_into(there)

            return present, fill
    fresh = torch.empty_like(like, dtype=part.dtype, requires_grad=False)
    part.copy_into(fresh)
    return wrap_part(fresh, parameter), _nothing


def _layout(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], torch.device]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def _take(tensor: torch.Tensor, taken: set[int]) -> bool:
    """Return whether no other tensor is read to this memory; if so, it is taken."""
    pointer = tensor.data_ptr()
    is_free = pointer not in taken
    taken.add(pointer)
    return is_free


def _pointers(live: NamedState) -> set[int]:
    return {local_part(tensor).data_ptr() for tensor in live.tensors.values()}


def _nothing() -> None:
    return
