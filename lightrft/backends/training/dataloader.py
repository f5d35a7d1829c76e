"""Batches of this rank, from a sampler that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lightrft.backends.world import world_of
from lightrft.data.sampler import ResumableSampler
from lightrft.errors import ConfigError
from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.training import SetupDataloader

__all__ = ["build_setup_dataloader", "build_setup_dataloader_of_ranks"]

_Sample = TypeVar("_Sample")


def build_setup_dataloader(*, seed: int, rank: int, world_size: int) -> SetupDataloader:
    """Return `setup_dataloader`.

    Args:
        seed: of the order of samples.
        rank: number of this process.
        world_size: number of processes.
    """

    def setup_dataloader(
        dataset: Dataset[_Sample],
        batch_size: int,
        *,
        shuffle: bool = True,
        collate_fn: Callable[[list[_Sample]], object] | None = None,
        drop_last: bool = True,
    ) -> DataLoader[_Sample]:
        size = _checked_size(dataset, least=batch_size * world_size if drop_last else 1)
        sampler = ResumableSampler(size=size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        # a loader draws a number whenever it is iterated; from a stream of its own, so that resuming costs no draw
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            dataset, batch_size, sampler=sampler, collate_fn=collate_fn, drop_last=drop_last, generator=generator
        )

    return setup_dataloader


def build_setup_dataloader_of_ranks(collectives: Collectives, *, seed: int) -> SetupDataloader:
    """Return `setup_dataloader` of a world that is asked for when a loader is made.

    Args:
        collectives: what the ranks do together.
        seed: of the order of samples.
    """

    def setup_dataloader(
        dataset: Dataset[_Sample],
        batch_size: int,
        *,
        shuffle: bool = True,
        collate_fn: Callable[[list[_Sample]], object] | None = None,
        drop_last: bool = True,
    ) -> DataLoader[_Sample]:
        world = world_of(collectives)
        setup = build_setup_dataloader(seed=seed, rank=world.rank, world_size=world.world_size)
        return setup(dataset, batch_size, shuffle=shuffle, collate_fn=collate_fn, drop_last=drop_last)

    return setup_dataloader


def _checked_size(dataset: object, least: int) -> int:
    if not isinstance(dataset, Sized):
        raise ConfigError(f"dataset={type(dataset).__name__} has no length; pass a map-style dataset with __len__.")
    if len(dataset) < least:
        raise ConfigError(
            f"batch_size needs {least} samples and the dataset has {len(dataset)}; lower it or pass drop_last=False."
        )
    return len(dataset)
