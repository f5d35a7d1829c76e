"""Runs whose strategy also keeps a moving average of the policy in every checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import attrs
from rank_runs import RunCase, RunSeen, config_of, run_with
from torch import nn

from lightrft.strategy.compose import with_ema
from lightrft.strategy.protocols.checkpointing import LoadedCheckpoint
from lightrft.strategy.protocols.training import StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.subject import Rank

BETA = 0.9


def with_average(strategy: Strategy, *, is_restored: bool = True) -> Strategy:
    """Return the strategy with an average of the newest actor that it prepared, which checkpoints hold as `average`."""
    averages: list[nn.Module] = []
    averaging = [strategy]

    def prepare_models_and_optimizers(
        actor: nn.Module,
        critic: None,
        reward_models: None,
        initial_model: None,
        args: object = None,
        max_steps: int = 1,
    ) -> tuple[Trainable, Trainable | None, list[nn.Module], nn.Module | None]:
        average = strategy.prepare_reward_model(copy.deepcopy(actor))
        prepared = strategy.prepare_models_and_optimizers(actor, critic, reward_models, initial_model, args, max_steps)
        averages[:] = [average]
        averaging[:] = [with_ema(strategy, prepared[0].model, average, BETA)]
        return prepared

    def optimizer_step(*args: object, **keywords: object) -> StepResult:
        return averaging[0].optimizer_step(*args, **keywords)  # type: ignore[arg-type]

    def save_ckpt(model: Mapping[str, object], save_dir: str | os.PathLike[str], **keywords: object) -> Path:
        return strategy.save_ckpt({**model, "average": averages[0]}, save_dir, **keywords)  # type: ignore[arg-type, dict-item]

    def load_ckpt(model: Mapping[str, object], load_dir: str | os.PathLike[str]) -> LoadedCheckpoint:
        loaded = strategy.load_ckpt({**model, "average": averages[0]}, load_dir)  # type: ignore[dict-item]
        if not is_restored:
            strategy.moving_average(model["actor"].model, averages[0], 0.0)  # type: ignore[attr-defined]
        return loaded

    return attrs.evolve(
        strategy,
        prepare_models_and_optimizers=prepare_models_and_optimizers,
        optimizer_step=optimizer_step,
        save_ckpt=save_ckpt,
        load_ckpt=load_ckpt,
    )


def run_averaged(rank: Rank, case: RunCase) -> RunSeen:
    """Run a case on one of several ranks, with an average."""
    return run_with(with_average(rank.build(config_of(case).strategy)), case, rank=rank.rank)
