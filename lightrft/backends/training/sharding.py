"""A model's parameters spread over ranks in place, layer by layer, and what is remembered about it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import attrs
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightrft.backends.plain_model import keep_structure
from lightrft.backends.training.meta_init import fill_meta_parameters
from lightrft.backends.training.wrapping import compile_layers, layers_of, recompute_layers
from lightrft.errors import ConfigError, StepError, UnsupportedError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.collectives import Collectives, World

__all__ = ["Sharding", "build_mesh", "gather_less", "put_off_sums", "require_sharding", "shard_model", "sharding_of"]

_SHARDING = "_lightrft_sharding"
"""Name of the attribute by which a sharded module carries its `Sharding`."""

_WATCHED = "_lightrft_watched"
"""Name of the attribute of whole parameters whose gradients are noted."""


@attrs.define(kw_only=True, eq=False)
class Sharding:
    """What a sharded model carries.

    Attributes:
        mesh: ranks as (dp_replicate, dp_shard), or (dp_shard,) where nothing is replicated.
        layers: what is gathered as one, the model itself last.
        names: of the parameters as an optimizer holds them, also while a pass has whole ones in their places.
        reached: names of sharded parameters that got a gradient on this rank since the window began.
        is_put_off: whether gradients of the window wait, whole, for the next backward pass that sums them over ranks.
    """

    mesh: DeviceMesh
    layers: Sequence[nn.Module]
    names: dict[nn.Parameter, str] = attrs.field(factory=dict[nn.Parameter, str])
    reached: set[str] = attrs.field(factory=set[str])
    is_put_off: bool = False


def sharding_of(model: nn.Module) -> Sharding | None:
    """Return what a sharded model carries, or None for any other one.

    Args:
        model: any model.
    """
    return cast("Sharding | None", vars(model).get(_SHARDING))


def require_sharding(model: nn.Module) -> Sharding:
    """Return what a sharded model carries.

    Args:
        model: a prepared model.

    Raises:
        StepError: it is not prepared.
    """
    sharding = sharding_of(model)
    if sharding is None:
        raise StepError(f"model={type(model).__name__} is not prepared; pass what prepare returned.")
    return sharding


def build_mesh(config: StrategyConfig, world: World) -> DeviceMesh:
    """Return the mesh of all ranks.

    Args:
        config: `fsdp_replicate` is used.
        world: where this process is.

    Raises:
        ConfigError: the copies do not divide the ranks.
    """
    device_type, copies = torch.device(world.device).type, config.fsdp_replicate
    if world.world_size % copies:
        raise ConfigError(
            f"fsdp_replicate={copies} does not divide world_size({world.world_size}); use one of its divisors."
        )
    if copies == 1:
        return init_device_mesh(device_type, (world.world_size,), mesh_dim_names=("dp_shard",))
    shape = (copies, world.world_size // copies)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def gather_less(model: nn.Module) -> None:
    """Let go of whole parameters that a forward pass has left behind, so that the model holds its shards alone.

    They would hide the shards, and be read again by the next forward pass although the shards have been stepped.

    Args:
        model: sharded, or any other one.
    """
    sharding = sharding_of(model)
    for layer in () if sharding is None else sharding.layers:
        cast("FSDPModule", layer).reshard()


def put_off_sums(model: nn.Module, *, is_put_off: bool) -> None:
    """Say whether backward passes sum gradients over ranks, or keep them whole for a later one that does.

    Args:
        model: sharded.
        is_put_off: True where more micro-batches of the window certainly follow.
    """
    sharding = require_sharding(model)
    if sharding.is_put_off != is_put_off:
        cast("FSDPModule", model).set_requires_gradient_sync(not is_put_off)
        sharding.is_put_off = is_put_off


def shard_model(model: nn.Module, config: StrategyConfig, collectives: Collectives, world: World) -> None:
    """Shard a model in place; one that is sharded stays as it is.

    Values are those of rank 0. Layers are sharded one after the other, so that no device ever holds more than one whole
    layer beside its shards.

    Args:
        model: plain; the same on all ranks but for its values.
        config: `bf16` and what begins with `fsdp` is used, `gradient_checkpointing`, and `compile_layers`.
        collectives: what the ranks do together.
        world: where this process is.

    Raises:
        ConfigError: a setting does not fit the model or the world.
        UnsupportedError: the model cannot be sharded.
    """
    if sharding_of(model) is not None:
        return
    _check_parameters(model)
    mesh, layers = build_mesh(config, world), layers_of(model, config.fsdp_wrap)
    _check_buffers(model)
    keep_structure(model)
    if config.gradient_checkpointing:
        recompute_layers(model, layers)
    if config.compile_layers:
        compile_layers(model, layers)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sharding = Sharding(mesh=mesh, layers=(*layers, model))
    for layer in sharding.layers:
        own = list(dict.fromkeys(_own_modules(layer)))
        places = [(part, name, names[id(parameter)]) for part in own for name, parameter in _own_parameters(part)]
        fill_meta_parameters(own, world.device)
        _start_as_rank_0(own, collectives)
        _shard(layer, own, is_root=layer is model, config=config, mesh=mesh)
        _watch(layer, places, sharding)
    sharding.names |= {parameter: name for name, parameter in model.named_parameters()}
    setattr(model, _SHARDING, sharding)


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise UnsupportedError(
                f"parameter {name!r} of {type(model).__name__} is sharded already, as that of another model; give each "
                "prepared model its own parameters, or prepare one module that holds both."
            )
        if parameter.requires_grad and parameter.is_complex():
            raise UnsupportedError(
                f"parameter {name!r} of {type(model).__name__} is complex, and the real part of its gradient alone "
                "would be summed; keep it as two real ones (torch.view_as_real)."
            )


def _check_buffers(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise UnsupportedError(
                f"buffer {name!r} of {type(model).__name__} is on the meta device, and perhaps in no file; build the "
                "model inside of init_model_context(meta_init=True), which keeps buffers real."
            )


def _own_modules(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield a layer's modules but for those of layers inside of it, which are sharded already."""
    yield layer
    for child in layer.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False, remove_duplicate=False)


@torch.no_grad()
def _start_as_rank_0(modules: Sequence[nn.Module], collectives: Collectives) -> None:
    values: dict[str, torch.Tensor] = {}
    seen: set[torch.Tensor] = set()  # tensors are hashed by identity: what is tied is sent once
    for place, module in enumerate(modules):
        for name, value in itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            if value not in seen:
                values[f"{place}.{name}"] = value
                seen.add(value)
    for name, value in collectives.broadcast(values).items():
        values[name].copy_(value)


def _shard(
    layer: nn.Module, own: Sequence[nn.Module], *, is_root: bool, config: StrategyConfig, mesh: DeviceMesh
) -> None:
    parameters = [parameter for module in own for _, parameter in _own_parameters(module)]
    whole = {parameter for parameter in parameters if not _is_shardable(parameter)}
    dtypes = sorted({str(each.dtype) for each in parameters if each.requires_grad and each not in whole})
    if len(dtypes) > 1:
        raise UnsupportedError(
            f"parameters of {type(layer).__name__} that are trained are {' and '.join(dtypes)}, and are gathered as "
            "one; make them of one dtype, and set bf16=True to compute in bfloat16."
        )
    for parameter in whole:
        parameter.data = parameter.data.to(mesh.device_type)
    # the root's parameters are the last ones of a forward pass and the first ones of its backward pass; a model that
    # is not trained has no backward pass
    is_gathered_again = not is_root or not any(parameter.requires_grad for parameter in layer.parameters())
    fully_shard(
        layer,
        mesh=mesh,
        reshard_after_forward=is_gathered_again and (is_root or config.fsdp_reshard_after_forward),
        mp_policy=_precision(config),
        offload_policy=_offload_policy(config, mesh),
        ignored_params=whole,
    )
    for module in own:
        for buffer in module.buffers(recurse=False):
            buffer.data = buffer.data.to(mesh.device_type)
    sharded = cast("FSDPModule", layer)
    # gradients are summed, because a weight is a share of the window of all ranks; gloo cannot scale while it sums
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(enable=True)
    if hasattr(sharded, "set_reduce_scatter_unused_params"):  # torch >= 2.13
        sharded.set_reduce_scatter_unused_params(True, recurse=False)


def _is_shardable(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 0 and parameter.numel() > 0 and parameter.is_floating_point()


def _precision(config: StrategyConfig) -> MixedPrecisionPolicy:
    if config.bf16:
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def _offload_policy(config: StrategyConfig, mesh: DeviceMesh) -> OffloadPolicy:
    # on a CPU the parameters are in main memory anyway
    return CPUOffloadPolicy() if config.fsdp_cpu_offload and mesh.device_type != "cpu" else OffloadPolicy()


def _watch(layer: nn.Module, places: Sequence[tuple[nn.Module, str, str]], sharding: Sharding) -> None:
    """Note which parameters get a gradient: a sharded one looks the same as zero to whoever steps."""

    def watch(layer: nn.Module, args: object) -> None:
        del layer, args
        for module, attribute, name in places:
            parameter = cast("nn.Parameter", getattr(module, attribute))
            if parameter.requires_grad and not isinstance(parameter, DTensor) and not hasattr(parameter, _WATCHED):
                parameter.register_hook(_marking(sharding.reached, name))  # type: ignore[no-untyped-call]  # so in torch
                setattr(parameter, _WATCHED, True)

    # after the hook that gathers the whole parameters, which stay the same objects from then on
    layer.register_forward_pre_hook(torch.compiler.disable(watch))  # type: ignore[no-untyped-call]  # so in torch


def _marking(reached: set[str], name: str) -> Callable[[torch.Tensor], None]:
    def mark(gradient: torch.Tensor) -> None:
        del gradient
        reached.add(name)

    return mark
