"""Parameters spread over ranks, one at a time: stage 3."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from torch import nn
from torch.optim import Optimizer

from lightrft.backends.training.meta_init import fill_meta_parameters
from lightrft.backends.zero.package import Partitioner, import_deepspeed
from lightrft.backends.zero.shards import is_partitioned
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["broadcast_buffers", "partition_model", "set_gathered"]


def partition_model(
    model: nn.Module,
    settings: Mapping[str, object],
    *,
    device: str,
    optimizer: Optimizer | None = None,
) -> None:
    """Spread the parameters of a model over ranks, with the values of rank 0, and move its buffers.

    Parameters on the meta device are given memory one module at a time, so no rank ever holds the whole model.

    Args:
        model: plain.
        settings: DeepSpeed's JSON.
        device: where to.
        optimizer: of the model's parameters; it follows those that are replaced.
    """
    import_deepspeed()
    partitioner = cast(
        "Partitioner",
        import_module("deepspeed").zero.Init(
            config_dict_or_path=dict(settings),
            mem_efficient_linear=False,
            # that of hpZ, which the first model makes, and a second one must not make again
            zero_param_parallel_group=import_module("deepspeed.utils.groups")._get_zero_param_intra_parallel_group(),  # noqa: SLF001
        ),
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        _fill(module, replaced, device)
        for parameter in module.parameters(recurse=False):
            if not is_partitioned(parameter):
                _partition(partitioner, parameter, device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if optimizer is not None:
        _follow(optimizer, names, model)


def broadcast_buffers(collectives: Collectives, model: nn.Module) -> None:
    """Make buffers those of rank 0 on all ranks.

    Args:
        collectives: what the ranks do together.
        model: whose parameters are spread over ranks.
    """
    buffers = dict(model.named_buffers())
    for name, value in (collectives.broadcast(buffers) if buffers else {}).items():
        buffers[name].copy_(value)


def _fill(module: nn.Module, replaced: dict[nn.Parameter, nn.Parameter], device: str) -> None:
    """Give a module's own parameters memory; what is tied to one that was replaced follows it."""
    before = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    for name, parameter in before.items():
        if parameter in replaced:
            setattr(module, name, replaced[parameter])
    fill_meta_parameters([module], device)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if parameter is not before[name]:
            replaced[before[name]] = parameter


def _partition(partitioner: Partitioner, parameter: nn.Parameter, device: str) -> None:
    shape = parameter.shape
    # sent as bytes, which a 0-d tensor cannot be seen as
    parameter.data = parameter.data.to(device).view(shape or (1,))
    partitioner._zero_init_param(parameter)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    vars(parameter)["ds_shape"] = shape
    if not shape.numel():  # gathering it beside others fails, so it stays where it is: whole on every rank
        parameter.data = parameter.data.view(shape)
        vars(parameter)["partition"] = _stay
        set_gathered(parameter, is_gathered=True)


def _stay(*args: object, **kwargs: object) -> None:
    del args, kwargs


def set_gathered(parameter: nn.Parameter, *, is_gathered: bool) -> None:
    """Let DeepSpeed believe that a parameter is whole on this rank, or that it is not.

    Args:
        parameter: one that is spread over ranks, and has no elements.
        is_gathered: what it believes.
    """
    status = import_module("deepspeed.runtime.zero.partition_parameters").ZeroParamStatus
    vars(parameter)["ds_status"] = status.AVAILABLE if is_gathered else status.NOT_AVAILABLE


def _follow(optimizer: Optimizer, names: dict[nn.Parameter, str], model: nn.Module) -> None:
    live = dict(model.named_parameters())
    for group in cast("list[dict[str, list[nn.Parameter]]]", optimizer.param_groups):
        group["params"] = [live[names[parameter]] if parameter in names else parameter for parameter in group["params"]]
