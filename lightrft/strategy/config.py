"""What a strategy is built from; the record is defined beside the other sections of a configuration."""

from __future__ import annotations

from lightrft.config.strategy import SCHEDULERS, StrategyConfig

__all__ = ["SCHEDULERS", "StrategyConfig"]
