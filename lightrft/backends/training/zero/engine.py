"""Models that a DeepSpeed engine runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.training.autocast import unwrap_autocast
from lightrft.backends.zero.model import REACHED_BELOW, EngineModel, engine_inside
from lightrft.backends.zero.package import Engine, import_deepspeed
from lightrft.backends.zero.shards import whole_shape
from lightrft.errors import StepError, UnsupportedError

__all__ = ["build_engine", "engine_of", "has_elements", "unwrap_engine"]

_NOT_ELEMENTWISE = ("Adafactor", "Adagrad", "LBFGS", "Muon", "SparseAdam")
"""Optimizers that look at whole tensors, or have state before their first step."""


def unwrap_engine(model: nn.Module) -> nn.Module:
    """Return the plain module inside; any other model is returned as it is.

    Args:
        model: prepared or plain.
    """
    engine = engine_inside(model)
    return unwrap_autocast(model) if engine is None else engine.module


def engine_of(model: nn.Module) -> Engine:
    """Return the engine of a model that is trained.

    Args:
        model: the prepared model.

    Raises:
        StepError: it was not prepared with an optimizer.
    """
    engine = engine_inside(model)
    if engine is None or not hasattr(engine.optimizer, "step"):
        raise StepError(
            f"model={type(model).__name__} was not prepared with an optimizer; pass what prepare((model, optimizer, "
            "scheduler)) returned."
        )
    return engine


def build_engine(
    model: nn.Module, settings: Mapping[str, object], *, optimizer: Optimizer | None = None, stage: int, bf16: bool
) -> EngineModel:
    """Return the model, run by an engine.

    The optimizer's groups keep their options, which stay the same dicts; their parameters are then shards.

    Args:
        model: on its device, with the values of rank 0, and spread over ranks in stage 3.
        settings: DeepSpeed's JSON.
        optimizer: of the model's parameters; None for a model that is not trained.
        stage: ZeRO stage.
        bf16: whether the forward pass is under autocast.

    Raises:
        UnsupportedError: the optimizer cannot step shards.
    """
    package = import_deepspeed()
    stepped = _names_of_groups(model, optimizer)
    given = None if optimizer is None else _steppable(optimizer) if stage else optimizer
    marked = _mark_replicated(model)
    try:
        engine, *_ = package.initialize(model=model, optimizer=given, config=settings, dist_init_required=False)
    finally:
        for parameter in marked:
            del vars(parameter)["ds_status"]
    if (
        optimizer is not None
        and stage == 3
        and "offload_optimizer" not in cast("Mapping[str, object]", settings["zero_optimization"])
    ):
        # its norm is known before a step, and would be one collective more
        vars(cast("Engine", engine).optimizer)["_get_norm_groups"] = _no_norm
    if (
        bf16
    ):  # on CUDA an engine that was not told switches the autocast around it off; told earlier, it would send bf16
        configured = vars(engine)["_config"]
        configured.torch_autocast_enabled, configured.torch_autocast_dtype = True, torch.bfloat16
    prepared = EngineModel(cast("nn.Module", engine), bf16=bf16, stepped=stepped)
    if optimizer is not None and stage > 1:
        _watch(prepared, model)
    return prepared


def _no_norm() -> list[torch.Tensor]:
    return [torch.ones(())]


def _watch(prepared: EngineModel, model: nn.Module) -> None:
    """Note what each backward pass reaches: gradients are exchanged as they come, without their names."""

    def note_of(place: int) -> Callable[[torch.Tensor], None]:
        def note(parameter: torch.Tensor) -> None:
            del parameter
            prepared.reached = (31 * prepared.reached + place) % REACHED_BELOW

        return note

    for place, parameter in enumerate(model.parameters(), start=1):
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note_of(place))  # type: ignore[no-untyped-call]  # so in torch


def has_elements(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether there is anything to step.

    Args:
        parameters: whole, or spread over ranks.
    """
    return any(each.requires_grad and torch.Size(whole_shape(each)).numel() for each in parameters)


def _names_of_groups(model: nn.Module, optimizer: Optimizer | None) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [] if optimizer is None else cast("list[dict[str, list[nn.Parameter]]]", optimizer.param_groups)
    return [[names[parameter] for parameter in group["params"]] for group in groups]


def _mark_replicated(model: nn.Module) -> list[nn.Parameter]:
    """Let an engine believe that parameters are shards while it is built; return those.

    It would send each of them alone from rank 0, as bytes, which a 0-d one cannot be seen as. All have them already.
    """
    status = import_module("deepspeed.runtime.zero.partition_parameters").ZeroParamStatus.NOT_AVAILABLE
    plain = [parameter for parameter in model.parameters() if not hasattr(parameter, "ds_status")]
    for parameter in plain:
        vars(parameter)["ds_status"] = status
    return plain


def _steppable(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer of the same groups and state, less the groups that have nothing to step.

    An engine changes the list of groups of the one that it is given.
    """
    name = type(optimizer).__name__
    if name in _NOT_ELEMENTWISE:
        raise UnsupportedError(
            f"optimizer={name} steps whole tensors and zero_stage > 0 has shards; use AdamW, or zero_stage=0."
        )
    if optimizer.state:
        raise UnsupportedError(f"optimizer={name} has state already; prepare it first, and load a checkpoint after it.")
    shared = copy.copy(optimizer)
    shared.param_groups = [group for group in optimizer.param_groups if has_elements(group["params"])]
    return shared
