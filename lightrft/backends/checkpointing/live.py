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
)
from lightrft.backends.checkpointing.named import NamedState, describe, difference, named_state
from lightrft.backends.checkpointing.sharded import (
    drop_deferred_gradients,
    has_deferred_gradients,
    is_sharded,
    live_tensor,
    local_part,
    part_for,
    reshard,
    wrap_part,
)
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


def copy_plan(live: torch.Tensor, saved: torch.Tensor, *, source: str) -> Callable[[], None]:
    """Return a function that copies a saved tensor into a live one of its shape and dtype, which keeps its identity.

    Args:
        live: where to; of a sharded tensor, this rank's part alone is written.
        saved: where from, whole.
        source: what is copied, for the error.

    Raises:
        CheckpointError: the live tensor's elements share memory, and the saved ones differ.
    """
    target, part = local_part(live).detach(), part_for(saved, live)
    whole_part = part
    for dim, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dim] > 1:  # an expanded tensor can't be written as a whole
            part = part.narrow(dim, 0, 1)
            target = target.narrow(dim, 0, 1)
    if part.shape != whole_part.shape and not torch.equal(_bits(part.expand_as(whole_part)), _bits(whole_part)):
        raise CheckpointError(f"{source} is an expanded tensor here and was none there; clone it before loading.")

    def copy_into() -> None:
        target.copy_(part)

    return copy_into


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _model_state(model: nn.Module, owner: str) -> ModelState:
    reshard(model)
    live = named_state(model, owner=owner)

    def plan_tensor(name: str, saved: torch.Tensor, *, source: str) -> Callable[[], None]:
        return copy_plan(live.tensors[name], saved, source=source)

    def read_gradients() -> Mapping[str, torch.Tensor]:
        return _gradients(model, live, owner)

    def plan_gradients(saved: Mapping[str, torch.Tensor], *, source: str) -> Callable[[], None]:
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
    model: nn.Module, live: NamedState, saved: Mapping[str, torch.Tensor], source: str
) -> Callable[[], None]:
    names = _gradient_names(live)
    parts = {key: local_part(live.tensors[name]) for key, name in names.items() if key in saved}
    words = difference(saved=describe(saved), live=describe(parts))
    if words is not None:
        raise CheckpointError(f"{source} (gradients) {words}; load into the model that was saved.")
    gradients = {
        name: wrap_part(_copy_like(saved[key], parts[key]), live.tensors[name]) if key in saved else None
        for key, name in names.items()
    }

    def set_gradients() -> None:
        drop_deferred_gradients(model)
        for name, gradient in gradients.items():
            live.tensors[name].grad = gradient

    return set_gradients


def _optimizer_state(optimizer: Optimizer, live: NamedState, owner: str) -> OptimizerState:
    groups = _groups(optimizer, live, owner)
    names = [name for group in groups for name in group.parameters]

    def plan_parameter(
        name: str, saved: Mapping[str, object] | None, *, options: Mapping[str, object], source: str
    ) -> Callable[[], None]:
        del source  # any state fits
        parameter = live.tensors[name]
        state = None if saved is None else _restored(saved, parameter, options)

        def set_state() -> None:
            if state is None:
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


def _restored(saved: Mapping[str, object], parameter: torch.Tensor, options: Mapping[str, object]) -> dict[str, object]:
    # torch keeps step counters on the host, unless its kernels read them (as its own `load_state_dict` has it)
    counts_on_host = not options.get("fused") and not options.get("capturable")
    state: dict[str, object] = {}
    for key, value in saved.items():
        if not isinstance(value, torch.Tensor):
            state[key] = value
        elif key == "step" and counts_on_host:
            state[key] = value.clone()
        else:
            state[key] = _state_like(value, parameter)
    return state


def _state_like(saved: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy on the parameter's device, laid out as the parameter where the shapes agree."""
    if saved.shape != parameter.shape:
        return saved.to(local_part(parameter).device, copy=True)
    return wrap_part(_copy_like(part_for(saved, parameter), local_part(parameter)), parameter)


def _copy_like(saved: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(part, dtype=saved.dtype, requires_grad=False).copy_(saved)
