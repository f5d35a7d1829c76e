"""What the launcher says about this process: torchrun's variables of the environment, and where they lack, SLURM's."""

from __future__ import annotations

import os
import re

from lightrft.errors import ConfigError, UnsupportedError

__all__ = [
    "address_of_launch",
    "device_of_process",
    "local_rank_of_launch",
    "rank_of_launch",
    "require_one_process",
    "world_size_of_launch",
]

_RANK = ("RANK", "SLURM_PROCID")
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID")
# not SLURM_NTASKS, which a batch script has too, and a shell in an allocation: neither is one of those tasks
_WORLD_SIZE = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST", "SLURM_LAUNCH_NODE_IPADDR")

_LOWEST_PORT, _NUM_PORTS = 15000, 10000
"""Jobs of one machine rarely share the last four digits, and these ports lie below those that a system hands out."""


def world_size_of_launch() -> int:
    """Return how many processes the launcher started: `WORLD_SIZE`, else `SLURM_STEP_NUM_TASKS`, else 1.

    Raises:
        ConfigError: it is no positive integer.
    """
    name, written = _found(_WORLD_SIZE)
    return 1 if written is None else _integer(name, written, low=1)


def rank_of_launch() -> int:
    """Return the number of this process: `RANK`, else `SLURM_PROCID`; 0 where there is one process.

    Raises:
        ConfigError: it is missing, or no integer below the number of processes.
    """
    world_size = world_size_of_launch()
    name, written = _found(_RANK)
    if written is None and world_size > 1:
        raise _missing(name)
    # a batch script has a number where it is alone
    if written is None or (name == "SLURM_PROCID" and world_size == 1):
        return 0
    return _integer(name, written, low=0, below=world_size)


def local_rank_of_launch() -> int:
    """Return the number of this process among those of its machine: `LOCAL_RANK`, else `SLURM_LOCALID`, else 0.

    Raises:
        ConfigError: it is no integer from 0 up.
    """
    name, written = _found(_LOCAL_RANK)
    return 0 if written is None else _integer(name, written, low=0)


def address_of_launch() -> tuple[str, int]:
    """Return host and port where the processes meet: `MASTER_ADDR` and `MASTER_PORT`, or what SLURM's variables give.

    SLURM's are the first node of the step, where rank 0 is, and a port that follows from the number of the job.

    Raises:
        ConfigError: there is none.
    """
    host = os.environ.get("MASTER_ADDR") or _first_node(_found(_NODES)[1] or "")
    if not host:
        raise _missing("MASTER_ADDR")
    port, job = os.environ.get("MASTER_PORT"), os.environ.get("SLURM_JOB_ID")
    if port:
        return host, _integer("MASTER_PORT", port, low=0, below=2**16)
    if not job:
        raise _missing("MASTER_PORT")
    return host, _LOWEST_PORT + _integer("SLURM_JOB_ID", job, low=0) % _NUM_PORTS


def device_of_process() -> str:
    """Return what this process computes on: its own CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: there are fewer devices than processes of this machine.
    """
    import torch  # whoever only asks for the world size need not wait for it

    if not torch.cuda.is_available():
        return "cpu"
    local_rank, num_devices = local_rank_of_launch(), torch.cuda.device_count()
    if num_devices == 1:  # a launcher may show each process a device of its own
        return "cuda:0"
    if local_rank >= num_devices:
        raise ConfigError(
            f"{_found(_LOCAL_RANK)[0]}={local_rank} has no CUDA device among the {num_devices} of this machine; "
            f"start {num_devices} processes or fewer on it."
        )
    return f"cuda:{local_rank}"


def require_one_process(strategy: str) -> None:
    """Refuse a launch of several processes, each of which would train a model of its own.

    Args:
        strategy: registry key of the strategy that works in one process.

    Raises:
        UnsupportedError: the launcher started several processes.
    """
    world_size = world_size_of_launch()
    if world_size > 1:
        raise UnsupportedError(
            f"{_found(_WORLD_SIZE)[0]}={world_size} is more than strategy={strategy!r} supports, which is one process "
            f"(each of {world_size} would train alone); start it alone, or with --nproc-per-node=1, or set "
            "strategy.strategy=fsdp2 or deepspeed."
        )


def _found(names: tuple[str, ...]) -> tuple[str, str | None]:
    """Return the first variable that is set, and its value, or else the first one without a value."""
    return next(((name, os.environ[name]) for name in names if name in os.environ), (names[0], None))


def _first_node(nodes: str) -> str:
    """Return the first name of a list as SLURM writes it: of `n[003-005,7]g,m1` that is `n003g`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _integer(name: str, written: str, *, low: int, below: int | None = None) -> int:
    is_number = written.isascii() and written.isdigit()
    if not is_number or int(written) < low or (below is not None and int(written) >= below):
        wanted = f"from {low} up" if below is None else f"from {low} to {below - 1}"
        raise ConfigError(f"{name}={written!r} is not an integer {wanted}; unset it, or start with torchrun.")
    return int(written)


def _missing(name: str) -> ConfigError:
    world, num_processes = _found(_WORLD_SIZE)
    return ConfigError(f"{name} is not set and {world}={num_processes}; start with torchrun or srun, or set it.")
