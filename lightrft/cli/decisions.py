"""What was decided about a run before its first step, in lines of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.backends.training.ranks import steps_of_rank
from lightrft.config import StrategyConfig
from lightrft.planning.run import sharing_of
from lightrft.strategy.build import chosen_key

if TYPE_CHECKING:
    from lightrft.strategy.protocols.collectives import World

__all__ = ["decisions"]

_OF_ZERO = ("nothing", "optimizer state", "optimizer state, gradients", "optimizer state, gradients, parameters")
"""What each stage of ZeRO shares among the ranks."""


def decisions(config: StrategyConfig, world: World) -> list[tuple[str, str]]:
    """Return (name, decision) of ranks, sharding, what is offloaded, precision and the window of an optimizer step.

    Args:
        config: the settings of the strategy.
        world: where this process stands.

    Raises:
        ConfigError: the window is no whole number of micro-batches for each rank.

    Example:
        >>> from lightrft.strategy.protocols.collectives import World
        >>> world = World(rank=0, local_rank=0, world_size=2, device="cpu")
        >>> for name, decision in decisions(StrategyConfig(fsdp=True, train_batch_size=8), world):
        ...     print(f"{name:<10}{decision}")
        ranks     2 on cpu
        sharding  optimizer state, gradients, parameters; mesh of dp_replicate(1) x dp_shard(2)
        precision float32
        window    8 samples = 2 ranks x 4 micro-batches x 1
    """
    steps = steps_of_rank(config, world.world_size)
    window = f"{world.world_size} ranks x {steps} micro-batches x {config.micro_train_batch_size}"
    return [
        ("ranks", f"{world.world_size} on {world.device.partition(':')[0]}"),
        *([("sharding", sharding)] if (sharding := _sharding(config, world.world_size)) else []),
        *([("offload", f"{offloaded} in main memory")] if (offloaded := _offloaded(config, world)) else []),
        ("precision", "bfloat16 over float32 parameters" if config.bf16 else "float32"),
        ("window", f"{config.train_batch_size} samples = {window}"),
    ]


def _sharding(config: StrategyConfig, world_size: int) -> str | None:
    key, copies = chosen_key(config), config.fsdp_replicate
    if key == "fsdp2":
        return f"{_OF_ZERO[3]}; mesh of dp_replicate({copies}) x dp_shard({world_size // copies})"
    return f"{_OF_ZERO[config.zero_stage]} (ZeRO stage {config.zero_stage})" if key == "deepspeed" else None


def _offloaded(config: StrategyConfig, world: World) -> str:
    on_cpu = world.device.startswith("cpu")
    return ", ".join(sorted(sharing_of(config, world_size=world.world_size, on_cpu=on_cpu).offloaded))
