"""The access to models that DeepSpeed engines run, whose optimizers step flat shards of many parameters at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.checkpointing.access import (
    LiveTensor,
    ModelState,
    OptimizerState,
    Part,
    StateAccess,
    StoredTensor,
)
from lightrft.backends.checkpointing.flat_state import flat_optimizer_state
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.checkpointing.named import describe, difference, named_state
from lightrft.backends.checkpointing.sharded import live_tensor
from lightrft.backends.checkpointing.stored import read_stored
from lightrft.backends.zero.model import EngineModel, is_own_optimizer
from lightrft.backends.zero.package import Engine
from lightrft.backends.zero.shards import (
    Fragment,
    forget_second_copy,
    fragments,
    is_partitioned,
    is_whole_too,
    part_of,
    shard_of,
    shard_without_padding,
    whole_shape,
)
from lightrft.errors import CheckpointError
from lightrft.strategy.protocols.training import UnwrapModel

__all__ = ["build_access"]


def build_access(unwrap_model: UnwrapModel) -> StateAccess:
    """Return the access to models of any ZeRO stage, and to plain ones.

    Args:
        unwrap_model: undoes `prepare`.
    """
    live = build_live_access(unwrap_model)

    def model_state(model: nn.Module, *, owner: str) -> ModelState:
        if isinstance(model, EngineModel) and _stage(model):
            return _model_state(model, unwrap_model(model), owner)
        return live.model_state(model, owner=owner)

    def optimizer_state(model: nn.Module, optimizer: Optimizer, *, owner: str) -> OptimizerState:
        if isinstance(model, EngineModel) and _steps_shards(model, optimizer):
            plain = unwrap_model(model)
            return flat_optimizer_state(plain, optimizer, _fragments(model, plain), model.stepped)
        return live.optimizer_state(model, optimizer, owner=owner)

    return StateAccess(unwrap_model=unwrap_model, model_state=model_state, optimizer_state=optimizer_state)


def _engine(model: EngineModel) -> Engine:
    engine: Engine = model.engine  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # a module, too
    return engine


def _stage(model: EngineModel) -> int:
    return _engine(model).zero_optimization_stage()


def _steps_shards(model: EngineModel, optimizer: Optimizer) -> bool:
    return bool(model.stepped and _stage(model)) and is_own_optimizer(_engine(model), optimizer)


def _fragments(model: EngineModel, plain: nn.Module) -> dict[str, Fragment]:
    """Return the fragments of what is stepped, by the names of the parameters; none of a model that is not trained."""
    if not model.stepped:
        return {}
    names = {parameter: name for name, parameter in plain.named_parameters()}
    return {names[parameter]: fragment for parameter, fragment in fragments(_engine(model))}


def _model_state(model: EngineModel, plain: nn.Module, owner: str) -> ModelState:
    live = named_state(plain, owner=owner)
    stepped = _fragments(model, plain)

    def plan_tensor(name: str, saved: StoredTensor, *, source: str) -> Callable[[], None]:
        del source  # any values fit
        return _plan_tensor(live.tensors[name], stepped.get(name), saved)

    def read_gradients() -> Mapping[str, torch.Tensor]:
        if model.stepped and getattr(_engine(model).optimizer, "_offload_accumulated_param_ids", None):
            raise CheckpointError(
                f"{owner} has gradients in main memory (zero_offload_optimizer=True), which are not saved; save after "
                "the optimizer_step that completes the window."
            )
        return {name: gradient for name, gradient in _gradients(model).items() if gradient.any()}

    def plan_gradients(saved: Mapping[str, StoredTensor], *, source: str) -> Callable[[], None]:
        return _plan_gradients(model, saved, source)

    return ModelState(
        tensors={name: _described(tensor, f"{owner}.{name}") for name, tensor in live.tensors.items()},
        aliases=live.aliases,
        plan_tensor=plan_tensor,
        read_gradients=read_gradients,
        plan_gradients=plan_gradients,
    )


def _described(tensor: torch.Tensor, name: str) -> LiveTensor:
    if not is_partitioned(tensor):
        return live_tensor(tensor, name, is_buffer=not isinstance(tensor, nn.Parameter))

    def part() -> Part:
        # what a pass has gathered, or a small parameter that stays whole, is made of the shards
        values, start = shard_without_padding(tensor)
        return Part(values=values, start=start)

    return LiveTensor(shape=whole_shape(tensor), dtype=tensor.dtype, part=part, is_whole=False)


def _plan_tensor(live: torch.Tensor, fragment: Fragment | None, saved: StoredTensor) -> Callable[[], None]:
    """Return an action that reads the parameter, or this rank's shard of it, and what the optimizer steps of it."""

    def write() -> None:
        if is_partitioned(live):
            _read_shard(live, saved)
        if not is_partitioned(live) or is_whole_too(live):
            saved.copy_into(live.detach())
        if fragment is not None:
            saved.copy_into(part_of(fragment.flat, fragment), start=fragment.start)
        forget_second_copy(live)

    return write


def _read_shard(live: torch.Tensor, saved: StoredTensor) -> None:
    shard, (values, start) = shard_of(live), shard_without_padding(live)
    saved.copy_into(values, start=start)
    shard.narrow(0, values.numel(), shard.numel() - values.numel()).zero_()  # behind the end of the parameter


def _gradients(model: EngineModel) -> dict[str, torch.Tensor]:
    """Return the memory of this rank's gradients: its own sums in stage 1, averages of its shards in stages 2 and 3."""
    if not model.stepped:
        return {}
    zero, stage = _engine(model).optimizer, _stage(model)
    if stage == 3:
        return {"zero3": zero.grad_partitions_flat_buffer}
    if stage == 2:
        return {
            f"zero2.{number}.{place}": gradient
            for number, gradients in zero.all_grad_tensors.items()
            for place, gradient in enumerate(gradients or ())
        }
    parameters = (parameter for group in zero.bit16_groups for parameter in group)
    return {f"zero1.{place}": each.grad for place, each in enumerate(parameters) if each.grad is not None}


def _like_gradients(model: EngineModel) -> dict[str, torch.Tensor]:
    """Return a tensor of the shape of each gradient that this rank may have, by its name."""
    if not model.stepped:
        return {}
    zero, stage = _engine(model).optimizer, _stage(model)
    if stage == 3:
        return {"zero3": zero.grad_partitions_flat_buffer}
    if stage == 2:
        groups = zero.params_in_partition
        return {
            f"zero2.{number}.{place}": each for number, group in enumerate(groups) for place, each in enumerate(group)
        }
    parameters = (parameter for group in zero.bit16_groups for parameter in group)
    return {f"zero1.{place}": each for place, each in enumerate(parameters)}


def _plan_gradients(model: EngineModel, saved: Mapping[str, StoredTensor], source: str) -> Callable[[], None]:
    like = _like_gradients(model)
    words = difference(saved=describe(saved), live=describe({name: like[name] for name in like if name in saved}))
    if words is not None:
        raise CheckpointError(
            f"{source} (gradients) {words}; load it into as many ranks and the zero_stage that saved it, or save after "
            "the optimizer_step that completes the window."
        )

    present = _gradients(model)
    gradients: dict[str, torch.Tensor] = {}
    there: list[tuple[StoredTensor, torch.Tensor]] = []
    for name, each in like.items():
        if name in saved and name in present:
            gradients[name] = present[name]
            there.append((saved[name], present[name]))
        elif name in saved:
            gradients[name] = read_stored(saved[name]).to(each.device)

    def set_gradients() -> None:
        for stored, gradient in there:
            stored.copy_into(gradient)
        if model.stepped:
            _set_gradients(model, gradients)

    return set_gradients


def _set_gradients(model: EngineModel, gradients: Mapping[str, torch.Tensor]) -> None:
    zero, stage = _engine(model).optimizer, _stage(model)
    if stage == 3:
        if not gradients:  # what there is was read to its place
            zero.grad_partitions_flat_buffer.zero_()
    elif stage == 2:
        for number, group in enumerate(zero.params_in_partition):
            found = [gradients.get(f"zero2.{number}.{place}") for place in range(len(group))]
            zero.all_grad_tensors[number] = (
                [torch.zeros_like(like) if each is None else each for like, each in zip(group, found, strict=True)]
                if gradients
                else None
            )
    else:
        parameters = (parameter for group in zero.bit16_groups for parameter in group)
        for place, parameter in enumerate(parameters):
            parameter.grad = gradients.get(f"zero1.{place}")
