"""A strategy whose module takes its time on one rank, as a slow disk lets it."""

from __future__ import annotations

import os
import time

from lightrft.config import StrategyConfig
from lightrft.strategy.record import Strategy
from lightrft.testing.replicated import build_gloo
from lightrft.testing.subject import Rank

if os.environ.get("RANK") == "1":
    time.sleep(2)


def build_late(config: StrategyConfig) -> Strategy:
    return build_gloo(config)


def number(rank: Rank, case: int) -> int:
    return rank.rank + case
