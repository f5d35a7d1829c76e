"""The founding document's loop, with types that the checkers know without a cast."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import assert_type

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.strategy import BackgroundSaves, Strategy, Trainable, background_saves, get_strategy


def train(
    args: argparse.Namespace,
    actor_model: nn.Module,
    critic_model: nn.Module,
    scorers: list[nn.Module],
    policy: nn.Module,
    dataloader: Iterable[torch.Tensor],
    max_steps: int,
) -> None:
    """Train as the document does."""
    strategy = get_strategy(args)
    assert_type(strategy, Strategy)
    strategy.setup_distributed(timeout=None)

    actor, critic, reward_models, initial_model = strategy.prepare_models_and_optimizers(
        actor_model, critic_model, scorers, policy, args, max_steps
    )
    assert_type(actor, Trainable)
    assert_type(critic, Trainable | None)
    assert_type(reward_models, list[nn.Module])
    assert_type(initial_model, nn.Module | None)

    for batch in dataloader:
        loss = compute_loss(actor.model, batch)
        strategy.backward(loss, actor.model, actor.optimizer)
        result = strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler)
        assert_type(result.grad_norm, float | None)

    path = strategy.save_ckpt(actor, "checkpoints", client_state={"epoch": 1, "best": None})
    with background_saves(strategy) as background:
        assert_type(background, BackgroundSaves)
        assert_type(strategy.save_ckpt(actor, "checkpoints", background=background), Path)
        background.wait()
    loaded = strategy.load_ckpt(actor, "checkpoints")
    strategy.print(path.name, loaded.step)


def unpack(strategy: Strategy, model: nn.Module) -> tuple[nn.Module, Optimizer, LRScheduler | None]:
    """A prepared triple unpacks, as a tuple and by its names."""
    model, optimizer, scheduler = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None))
    trained = strategy.prepare((model, optimizer, scheduler))
    assert_type(trained, Trainable)
    (actor, actor_optimizer, actor_scheduler), *_ = strategy.prepare_models_and_optimizers(model, None, None, None)
    assert_type(actor_optimizer, Optimizer)
    return actor, trained.optimizer, actor_scheduler


def compute_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean of the model's outputs."""
    outputs: torch.Tensor = model(batch)
    return outputs.mean()
