"""What ranks do together: contracts and laws."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar, Union

import attrs

if TYPE_CHECKING:
    import torch

__all__ = [
    "AllGather",
    "AllReduce",
    "Barrier",
    "Broadcast",
    "Collectives",
    "GetRank",
    "IsRank0",
    "Print",
    "ReduceOp",
    "SetupDistributed",
    "Teardown",
    "TensorTree",
    "World",
]

ReduceOp: TypeAlias = Literal["mean", "sum", "max", "min"]
"""How values of ranks become one."""

TensorTree: TypeAlias = Union["torch.Tensor", float, int, bool, Mapping[str, "TensorTree"]]
"""A tensor, a number, or a dict of these, nested to any depth."""

_Tree = TypeVar("_Tree", bound=TensorTree)


@attrs.frozen(kw_only=True)
class World:
    """Where this process stands among all processes of the run.

    Attributes:
        rank: number of this process, from 0 to world_size - 1.
        local_rank: its number among the processes of this machine.
        world_size: number of processes.
        device: what the process computes on, as `torch.device` writes it ("cpu", "cuda:0").
    """

    rank: int
    local_rank: int
    world_size: int
    device: str


class SetupDistributed(Protocol):
    """Starts what the ranks need to talk to one another."""

    def __call__(self, timeout: timedelta | float | None = None) -> World:
        """Return this process's place in the world; a second call does nothing more.

        Seeds every random stream of the process as a function of (config.seed, rank), on the first call alone.

        Args:
            timeout: how long a collective waits for a missing rank, in seconds; None takes the config's.
        """
        ...


class Teardown(Protocol):
    """Ends what `SetupDistributed` began."""

    def __call__(self) -> None:
        """Free process groups; without a set-up, and a second time, it does nothing.

        What was prepared before is at home in these groups; after another set-up, prepare it anew.
        """
        ...


class AllReduce(Protocol):
    """Reduces values over all ranks."""

    def __call__(self, data: _Tree, op: ReduceOp = "mean") -> _Tree:
        """Return the reduction over ranks, with the structure, dtypes and devices of `data`.

        Laws: inputs are left untouched and never aliased; the result equals the same reduction done in numpy, for
        integers above 2**24, bools, 0-d and empty tensors too; all ranks get the same bits.

        Args:
            data: tensors of any shape, numbers, or nested dicts of them; the same structure on every rank.
            op: "mean" takes floating-point values alone; bools take "max" (any) and "min" (all).

        Raises:
            ConfigError: the op has no meaning for a dtype in `data`.
        """
        ...


class AllGather(Protocol):
    """Collects values of all ranks."""

    def __call__(self, data: _Tree) -> _Tree:
        """Return every rank's tensors, concatenated in rank order along dim 0; 0-d tensors become 1-d.

        Laws: inputs are left untouched and never aliased; dtypes and devices stay; the slice of a rank equals its
        input.

        Args:
            data: tensors (..., of one dtype on all ranks; dim 0 may differ) or nested dicts of them.

        Raises:
            ConfigError: `data` holds a number; make it a 0-d tensor.
        """
        ...


class Broadcast(Protocol):
    """Hands one rank's values to all."""

    def __call__(self, data: _Tree, src: int = 0) -> _Tree:
        """Return the value of rank `src` on every rank.

        Laws: inputs are left untouched and never aliased; idempotent; dtypes and devices stay.

        Args:
            data: as for `AllReduce`.
            src: rank whose value is taken.

        Raises:
            ConfigError: there is no rank `src`.
        """
        ...


class Barrier(Protocol):
    """Waits for all ranks."""

    def __call__(self) -> None:
        """Return when every rank has called it; what a rank wrote to disk before is visible to all after."""
        ...


class GetRank(Protocol):
    """Tells the rank."""

    def __call__(self) -> int:
        """Return the number of this process, from 0 to world_size - 1."""
        ...


class IsRank0(Protocol):
    """Tells whether this process speaks for all."""

    def __call__(self) -> bool:
        """Return True on rank 0 and False elsewhere."""
        ...


class Print(Protocol):
    """Prints once, not once a rank."""

    def __call__(self, *values: object) -> None:
        """Print the values on rank 0, separated by spaces.

        Args:
            values: what to print.
        """
        ...


class Collectives(Protocol):
    """What ranks do together.

    Laws: collectives leave their inputs untouched and keep dtype and device exactly; ranks that disagree (keys, shapes,
    dtypes, order of calls) get an error that names the rank and the difference, within the timeout.
    """

    @property
    def setup_distributed(self) -> SetupDistributed: ...  # noqa: D102 (the callback protocol is the documentation)
    @property
    def teardown(self) -> Teardown: ...  # noqa: D102
    @property
    def all_reduce(self) -> AllReduce: ...  # noqa: D102
    @property
    def all_gather(self) -> AllGather: ...  # noqa: D102
    @property
    def broadcast(self) -> Broadcast: ...  # noqa: D102
    @property
    def barrier(self) -> Barrier: ...  # noqa: D102
    @property
    def get_rank(self) -> GetRank: ...  # noqa: D102
    @property
    def is_rank_0(self) -> IsRank0: ...  # noqa: D102
    @property
    def print(self) -> Print: ...  # noqa: D102
