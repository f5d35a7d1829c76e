"""Strategies and engines of a user's own, the fake with its calls, and extra arguments typed by their defaults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import assert_type

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import Config, EngineConfig
from lightrft.rewards.resolve import Reward
from lightrft.strategy import (
    ENGINES,
    STRATEGIES,
    Call,
    Completion,
    EngineHandle,
    Prompt,
    SamplingParams,
    Strategy,
    StrategyConfig,
    get_fake_strategy,
    get_strategy,
)
from lightrft.strategy.compose import Timing, Transform, compose, with_finite_check, with_timing
from lightrft.strategy.protocols import BuildEngine, Engine


def build_louder(config: StrategyConfig) -> Strategy:
    """The strategy "single" with a backward of one's own."""
    single = STRATEGIES["single"](config)

    def backward(
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        single.print("loss", loss.item())
        single.backward(loss, model, optimizer, weight=weight, is_boundary=is_boundary)

    return attrs.evolve(single, backward=backward)


def build_patient(config: EngineConfig) -> Engine:
    """The engine "hf" with a generate of one's own."""
    engine = ENGINES["hf"](config)

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        return engine.generate(handle, prompts, attrs.evolve(sampling, min_new_tokens=1))

    return attrs.evolve(engine, generate=generate)


def choose() -> Strategy:
    """Registries are plain dicts."""
    config = StrategyConfig(strategy="louder", engine_type="patient")
    engines: dict[str, BuildEngine] = {**ENGINES, "patient": build_patient}
    return get_strategy(config, registry={**STRATEGIES, "louder": build_louder}, engines=engines)


def composed(strategy: Strategy, timings: dict[str, Timing]) -> Strategy:
    """Transforms take a strategy and return one."""

    def timed(strategy: Strategy) -> Strategy:
        return with_timing(strategy, timings)

    transforms: list[Transform] = [with_finite_check, timed]
    return compose(*transforms)(strategy)


def recorded() -> Iterable[str]:
    """The fake writes down its calls."""
    calls: list[Call] = []
    strategy = get_fake_strategy(Config(), calls=calls)
    strategy.barrier()
    return [call.name for call in calls]


def extra(config: StrategyConfig) -> None:
    """An extra argument has the type of its default."""
    assert_type(config.get_extra_arg("my_parameter", default=0), int)
    assert_type(config.get_extra_arg("my_name", default="none"), str)


def shorter_is_better(prompt: str, completion: str, answer: str) -> float:
    """A reward is a function of three strings."""
    return 1.0 / (1 + len(completion)) if answer in completion else 0.0


REWARD: Reward = shorter_is_better
