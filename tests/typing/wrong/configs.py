"""Mistakes with configurations and records of data."""

from __future__ import annotations

from lightrft.config import Config, RunConfig
from lightrft.strategy import SamplingParams, StrategyConfig, World

StrategyConfig(sede=42)  # mypy: call-arg, pyright: reportCallIssue
StrategyConfig(seed="42")  # mypy: arg-type, pyright: reportArgumentType
StrategyConfig(adam_betas=(0.9,))  # mypy: arg-type, pyright: reportArgumentType
StrategyConfig("single")  # mypy: call-arg, pyright: reportCallIssue
Config(strategy={"seed": 42})  # mypy: arg-type, pyright: reportArgumentType
RunConfig(num_steps=1.5)  # mypy: arg-type, pyright: reportArgumentType
SamplingParams(n=2).n = 3  # mypy: misc, pyright: reportAttributeAccessIssue
StrategyConfig().seed = 1  # mypy: misc, pyright: reportAttributeAccessIssue
StrategyConfig().learning_rate  # mypy: attr-defined, pyright: reportAttributeAccessIssue
World(rank=0, local_rank=0, world_size=1)  # mypy: call-arg, pyright: reportCallIssue
number: str = StrategyConfig().get_extra_arg("number", default=0)  # mypy: assignment, pyright: reportAssignmentType
