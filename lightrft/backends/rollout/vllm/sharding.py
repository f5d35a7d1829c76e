"""How vLLM is started as one of several ranks that hold a shard of the weights each."""

from __future__ import annotations

import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, cast

import attrs
import torch.distributed as dist

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightrft.config.sections import EngineConfig

__all__ = ["Sharding", "beside_others", "sharding_of"]


@attrs.frozen(kw_only=True)
class Sharding:
    """How an engine is spread over neighbouring ranks.

    Attributes:
        size: number of ranks that hold one engine.
        timeout: seconds that they wait for one another in a collective.
    """

    size: int
    timeout: float


def sharding_of(model: PreTrainedModel, config: EngineConfig) -> Sharding | None:
    """Return how an engine is spread; None where one rank has all of it.

    Args:
        model: a causal language model of transformers.
        config: `tensor_parallel_size` and `timeout_seconds` are used.

    Raises:
        ConfigError: the attention heads cannot be spread so.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return None
    parts = {id(part): part for part in (model.config.get_text_config(), getattr(model.config, "vision_config", None))}
    for part in parts.values():
        num_heads = cast("int", getattr(part, "num_attention_heads", None) or getattr(part, "num_heads", size))
        num_key_value_heads = cast("int", getattr(part, "num_key_value_heads", None) or num_heads)
        if num_heads % size:
            raise ConfigError(
                f"tensor_parallel_size={size!r} does not divide the {num_heads} attention heads of "
                f"{type(part).__name__}; use a divisor, or another model."
            )
        if num_key_value_heads % size and size % num_key_value_heads:
            raise ConfigError(
                f"tensor_parallel_size={size!r} neither divides the {num_key_value_heads} key-value heads of "
                f"{type(part).__name__} nor is a multiple of them; use another number of ranks."
            )
    return Sharding(size=size, timeout=config.timeout_seconds)


@contextmanager
def beside_others(sharding: Sharding | None) -> Generator[dict[str, int | str]]:
    """Yield the settings with which vLLM starts alone, or as one of the ranks of the default process group.

    What ranks reduce goes over gloo, which notices a rank that has ended. vLLM's own way on a CPU is shared memory, in
    which a rank would wait for ever, and which stays when a process is killed. So are its queues, which nobody uses
    here, and that is how it counts machines, for which a CPU has no use. The caller puts the environment back.

    Args:
        sharding: how the engine is spread; None where one rank has all of it.
    """
    state = import_module("vllm.distributed.parallel_state")
    with _replaced(state, "_node_count", _one):
        if sharding is None:
            yield {"distributed_executor_backend": "uni"}
            return
        rank, seconds = str(dist.get_rank()), math.ceil(sharding.timeout)
        os.environ.update(RANK=rank, LOCAL_RANK=rank)  # vLLM reads there which of the ranks it is
        communicators = import_module("vllm.distributed.device_communicators.cpu_communicator")
        queues = import_module("vllm.distributed.device_communicators.shm_broadcast")
        with (
            _replaced(communicators.CpuCommunicator, "_all_group_ranks_share_shm_group_name", _no_memory),
            _replaced(queues.MessageQueue, "create_from_process_group", staticmethod(_no_queue)),
        ):
            yield {
                "distributed_executor_backend": "external_launcher",
                "tensor_parallel_size": sharding.size,
                "distributed_timeout_seconds": seconds,
                "cpu_distributed_timeout_seconds": seconds,
            }


@contextmanager
def _replaced(owner: object, name: str, other: object) -> Generator[None]:
    before = vars(owner)[name]
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _one(group: object) -> int:
    del group
    return 1


def _no_memory(communicator: object) -> bool:
    del communicator
    return False


def _no_queue(*args: object, **settings: object) -> None:
    del args, settings
