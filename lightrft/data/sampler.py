"""The order in which samples are drawn, which can be saved and continued."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import attrs
import torch
from typing_extensions import TypeIs

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["ResumableSampler"]


@attrs.define(kw_only=True, eq=False)
class ResumableSampler:
    """Draws the numbers 0 to size - 1 epoch by epoch, each epoch in an order of its own, rank by rank in turn.

    Laws: an epoch is a permutation, a function of (seed, epoch) alone; the shares of the ranks are disjoint and cover
    it; drawing k, saving, loading into a new sampler and drawing on gives what an uninterrupted sampler gives. The
    position counts the draws of all ranks together, which draw equally often, so that a saved one continues at another
    world size too.

    As a `sampler` of torch's `DataLoader` it gives the rest of the present epoch and moves on to the next; the shares
    of an epoch differ by one where world_size does not divide size. `take` gives any number, across epochs. Both
    move the one position, so use one iterator at a time, and no loader workers, which draw ahead of what was used.

    Attributes:
        size: number of samples, at least world_size.
        seed: seed of the orders.
        shuffle: False draws in the order of the numbers.
        rank: of this process.
        world_size: number of processes.
        epoch: the present epoch, from 0.
        position: draws of all ranks in this epoch, from 0 to size.

    Raises:
        ConfigError: sizes or ranks out of range.

    Example:
        >>> sampler = ResumableSampler(size=4, shuffle=False)
        >>> sampler.take(6), sampler.state_dict()
        ([0, 1, 2, 3, 0, 1], {'epoch': 1, 'position': 2})
    """

    size: int
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1
    epoch: int = attrs.field(default=0, init=False)
    position: int = attrs.field(default=0, init=False)
    _order: list[int] = attrs.field(factory=list[int], init=False, repr=False)
    _order_epoch: int = attrs.field(default=-1, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Check the numbers together."""
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank={self.rank!r} is not in [0, {self.world_size}); use a rank of this world.")
        if self.size < self.world_size:
            raise ConfigError(
                f"size={self.size!r} is less than world_size({self.world_size}); give each rank at least one sample."
            )

    def __len__(self) -> int:
        """Return the number of this rank's samples in a whole epoch."""
        return (self.size - self.rank + self.world_size - 1) // self.world_size

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's share of the rest of the epoch; when it ends, the next epoch begins."""
        while self.position + self.rank < self.size:
            index = self._at(self.epoch, self.position + self.rank)
            self.position = min(self.position + self.world_size, self.size)
            yield index
        self.epoch, self.position = self.epoch + 1, 0

    def take(self, count: int) -> list[int]:
        """Return this rank's next `count` samples, across epochs if need be.

        Args:
            count: how many.

        Raises:
            ConfigError: it is negative.
        """
        if count < 0:
            raise ConfigError(f"count={count!r} is negative; take 0 or more.")
        taken: list[int] = []
        for _ in range(count):
            ahead, place = divmod(self.position + self.rank, self.size)
            taken.append(self._at(self.epoch + ahead, place))
            self.position += self.world_size
            if self.position > self.size:
                self.epoch, self.position = self.epoch + 1, self.position - self.size
        return taken

    def state_dict(self) -> dict[str, Json]:
        """Return {"epoch": ..., "position": ...}, for JSON; the same on all ranks that drew equally often."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Continue where another sampler of this size, seed and shuffle was.

        Args:
            state: what its `state_dict` returned.

        Raises:
            CheckpointError: it is no position of a sampler of this size; the sampler stays as it was.
        """
        epoch, position = state.get("epoch"), state.get("position")
        if set(state) != {"epoch", "position"} or not _is_count(epoch) or not _is_count(position):
            raise CheckpointError(f"state={dict(state)!r} is no position of a sampler; give what state_dict returned.")
        if position > self.size:
            raise CheckpointError(
                f"position={position!r} lies beyond this sampler's size={self.size}; resume with the same data."
            )
        self.epoch, self.position = epoch, position

    def _at(self, epoch: int, place: int) -> int:
        if not self.shuffle:
            return place
        if self._order_epoch != epoch:
            self._order, self._order_epoch = _permutation(self.size, self.seed, epoch), epoch
        return self._order[place]


def _is_count(value: Json) -> TypeIs[int]:
    return type(value) is int and value >= 0


def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    # Hashed together, neighbouring seeds and epochs share no stream; torch takes seeds below 2**63.
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(size, generator=generator, device="cpu").tolist()
