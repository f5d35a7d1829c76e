"""The whole strategy: the four protocols joined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lightrft.strategy.protocols.checkpointing import Checkpointing
from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.rollout import Rollout
from lightrft.strategy.protocols.training import Training

if TYPE_CHECKING:
    from lightrft.strategy.config import StrategyConfig
    from lightrft.strategy.record import Strategy

__all__ = ["BuildStrategy", "StrategyProtocol"]


class StrategyProtocol(Collectives, Training, Checkpointing, Rollout, Protocol):
    """Everything that a training loop may ask for; most loops ask for less.

    Law: two strategies built from equal configs can be swapped between any two calls of a run without changing a bit.
    """


class BuildStrategy(Protocol):
    """Makes a strategy from its settings."""

    def __call__(self, config: StrategyConfig) -> Strategy:
        """Return the strategy.

        Laws: deterministic, and without side effects (no process group, no device, no import of a backend that was not
        chosen).

        Args:
            config: the settings.

        Raises:
            UnsupportedError: the backend cannot obey the laws under these settings.
            MissingPackageError: the package behind it is not installed.
        """
        ...
