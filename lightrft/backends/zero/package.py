"""The package DeepSpeed: what is used of it, written down, and how it is imported without side effects.

Nothing of it is imported before a model is prepared.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Protocol, TextIO, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightrft.backends.launch import device_of_process, local_rank_of_launch
from lightrft.errors import MissingPackageError

__all__ = ["DeepSpeed", "Engine", "Partitioner", "ZeroOptimizer", "import_deepspeed", "require_deepspeed"]

_LEAST = (0, 19, 8)
"""The first version that lets its caller say where an accumulation window ends, in every stage."""

_INSTALL = "run: pip install 'lightrft[deepspeed]'"


class ZeroOptimizer(Protocol):
    """What steps shards: `DeepSpeedZeroOptimizer` in stages 1 and 2, `DeepSpeedZeroOptimizer_Stage3` in stage 3."""

    optimizer: Optimizer  # shares groups and state with the one that it was given
    overflow: bool
    _global_grad_norm: float | torch.Tensor
    micro_step_id: int
    averaged_gradients: dict[int, list[torch.Tensor] | None]
    all_grad_tensors: dict[int, list[torch.Tensor] | None]  # stages 1 and 2
    bit16_groups: list[list[nn.Parameter]]  # stages 1 and 2
    params_in_partition: list[list[nn.Parameter]]  # stages 1 and 2
    single_partition_of_fp32_groups: list[torch.Tensor]  # stages 1 and 2
    fp16_groups: list[list[nn.Parameter]]  # stage 3
    fp32_partitioned_groups_flat: list[torch.Tensor]  # stage 3
    grad_position: dict[int, Sequence[int]]  # stage 3
    grad_partitions_flat_buffer: torch.Tensor  # stage 3

    def step(self) -> None:
        """Step this rank's shards with the averaged gradients, and gather what others stepped."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients on parameters."""
        ...

    def reduce_gradients(self) -> None:
        """Average the gradients on parameters over ranks, in the order of the parameters (stage 1)."""
        ...

    def finalize_gradient_accumulation_boundary(self) -> None:
        """Make what was averaged since the last step the gradients of the next one (stages 2 and 3)."""
        ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool, /) -> None:
        """Say whether the window is complete."""
        ...

    def clear_backward_seen_flag(self) -> None:
        """End the backward pass before this one."""
        ...

    def get_param_id(self, param: nn.Parameter, /) -> int:
        """Return the number by which a parameter is known."""
        ...

    def get_local_fp32_grad_for_param(self, param: nn.Parameter, /) -> torch.Tensor:
        """Return this rank's shard of a gradient (stage 3)."""
        ...


class Engine(Protocol):
    """What runs a model: `DeepSpeedEngine`, which is a module."""

    module: nn.Module
    optimizer: ZeroOptimizer

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> object:
        """Add the gradient of a loss."""
        ...

    def buffered_allreduce_fallback(self) -> None:
        """Average the gradients on parameters over ranks (stage 0)."""
        ...

    def zero_optimization_stage(self) -> int:
        """Return the stage."""
        ...

    def offload_states(self, *, pin_memory: bool) -> None:
        """Move shards, gradients and optimizer state to main memory."""
        ...

    def reload_states(self) -> None:
        """Move them back."""
        ...


class Partitioner(Protocol):
    """What spreads a parameter over ranks: `deepspeed.zero.Init`."""

    def _zero_init_param(self, param: nn.Parameter, /) -> None: ...


class DeepSpeed(Protocol):
    """The functions of the package that are used."""

    def initialize(
        self,
        *,
        model: nn.Module,
        config: Mapping[str, object],
        optimizer: Optimizer | None = None,
        dist_init_required: bool = False,
    ) -> Sequence[object]:
        """Return (engine, ...)."""
        ...


def require_deepspeed() -> None:
    """Refuse to go on without DeepSpeed, which is not imported.

    Raises:
        MissingPackageError: it is not installed, or too old.
    """
    wanted = ".".join(str(number) for number in _LEAST)
    try:
        found = version("deepspeed")
    except PackageNotFoundError as error:
        raise MissingPackageError(f"package='deepspeed' is not installed (>= {wanted}); {_INSTALL}.") from error
    numbers = tuple(int(number) for number in found.split("+")[0].split(".")[:3] if number.isdigit())
    if numbers < _LEAST:
        raise MissingPackageError(f"package='deepspeed' is {found} and must be {wanted} or newer; {_INSTALL}.")


def import_deepspeed() -> DeepSpeed:
    """Return the package, which has taken over the present process group; it may be called often.

    The process group must exist.
    """
    # its kinds of device are guessed by what is installed, which finds no CPU; the launcher's variable it must have
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device_of_process() != "cpu" else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(local_rank_of_launch()))
    package = import_module("deepspeed")
    _quieten()
    # compiled when it is first used, for a minute, for an inference engine that is not used here; and where the
    # compiler is killed, its lock makes every later run wait for ever
    cast("dict[str, bool]", import_module("deepspeed.ops").__compatible_ops__)["deepspeed_shm_comm"] = False
    _forget_groups(import_module("deepspeed.utils.groups"))
    package.comm.init_distributed(dist_init_required=False, verbose=False)
    return cast("DeepSpeed", package)


def _quieten() -> None:
    # what a program prints is its own, and it cannot help that torch 2.13 has new names for two collectives
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    for handler in logging.getLogger("DeepSpeed").handlers:
        if type(handler) is logging.StreamHandler:  # what derives from it is somebody else's
            cast("logging.StreamHandler[TextIO]", handler).setStream(sys.stderr)


def _forget_groups(groups: ModuleType) -> None:
    """Let go of process groups that were destroyed, which the package remembers for the whole process."""
    with suppress(KeyError):
        if groups._WORLD_GROUP is None or dist.get_process_group_ranks(groups._WORLD_GROUP):  # noqa: SLF001
            return
    groups._release_process_group_references()  # noqa: SLF001 (the public way destroys the present group, too)
