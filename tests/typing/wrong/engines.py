"""Mistakes with engines, rewards and transforms of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from lightrft.config import EngineConfig
from lightrft.rewards.resolve import Reward
from lightrft.strategy import ENGINES, Completion, EngineHandle, Prompt, SamplingParams, Strategy, get_strategy
from lightrft.strategy.compose import compose
from lightrft.strategy.protocols import BuildEngine, Engine
from lightrft.strategy.protocols.rollout import Generate


def of_texts(handle: EngineHandle, prompts: Sequence[str], sampling: SamplingParams) -> list[Completion]:
    """Engines are given tokens."""
    return []


def one_only(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> Completion:
    """Engines return a list."""
    raise NotImplementedError


def build_of_path(path: str) -> Engine:
    """Engines are built from their settings."""
    raise NotImplementedError


def of_two(prompt: str, completion: str) -> float:
    """A reward is also given the answer."""
    return 0.0


def in_words(prompt: str, completion: str, answer: str) -> str:
    """A reward is a number."""
    return "good"


def to_nothing(strategy: Strategy) -> None:
    """A transform returns a strategy."""


generate: Generate = of_texts  # mypy: assignment, pyright: reportAssignmentType
attrs.evolve(ENGINES["hf"](EngineConfig()), generate=one_only)  # mypy: arg-type
build: BuildEngine = build_of_path  # mypy: assignment, pyright: reportAssignmentType
get_strategy({}, engines={"mine": build_of_path})  # mypy: dict-item, pyright: reportArgumentType
short: Reward = of_two  # mypy: assignment, pyright: reportAssignmentType
wordy: Reward = in_words  # mypy: assignment, pyright: reportAssignmentType
compose(to_nothing)  # mypy: arg-type, pyright: reportArgumentType
ENGINES["mine"] = ENGINES["hf"]  # mypy: index, pyright: reportIndexIssue
EngineConfig(temperature="hot")  # mypy: arg-type, pyright: reportArgumentType
