"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from lightrft.strategy.protocols.checkpointing import BackgroundSaves
from lightrft.strategy.protocols.collectives import Collectives

__all__ = ["background_saves"]


@contextmanager
def background_saves(collectives: Collectives, *, apart: Collectives | None = None) -> Generator[BackgroundSaves]:
    """Yield the handle that lets `save_ckpt` write in the background: `strategy.save_ckpt(..., background=handle)`.

    Of many ranks, all enter and leave together, before `teardown`. Leaving waits for the last save. One handle serves
    all strategies and models of a run.

    Args:
        collectives: what the ranks do together, such as the strategy.
        apart: what they do together in the background, at the same time; None takes a process group of their own.

    Raises:
        CheckpointError: on leaving, the last save failed; where an error is on its way already, it is a note of that.
        ConfigError: the ranks are not those of torch.distributed, and `apart` is None.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from lightrft.strategy import StrategyConfig, get_strategy
        >>> strategy = get_strategy(StrategyConfig(strategy="single"))
        >>> model = nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as directory, background_saves(strategy) as background:
        ...     path = strategy.save_ckpt(model, directory, background=background)
        ...     background.wait()
        ...     strategy.load_ckpt(model, directory).step
        1
    """
    # only now, because importing the interface must not load torch
    from lightrft.backends.checkpointing.background import saving_thread
    from lightrft.backends.collectives.apart import collectives_apart
    from lightrft.backends.world import world_of

    with ExitStack() as stack:
        if apart is None:
            apart = stack.enter_context(collectives_apart(world_of(collectives)))
        yield stack.enter_context(saving_thread(apart))
