"""A model that is built on the spot and trained for a step, to try a machine out with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightrft.config import ModelConfig, StrategyConfig
from lightrft.models.build import build_model_and_tokenizer
from lightrft.strategy import get_strategy

if TYPE_CHECKING:
    from lightrft.models.tokenizer import ModelTokenizer
    from lightrft.strategy.protocols.training import Trainable
    from lightrft.strategy.record import Strategy

__all__ = ["take_step", "tiny_actor", "tiny_loss", "tiny_strategy"]


def tiny_strategy() -> Strategy:
    """Return a strategy of one process whose every step shows."""
    return get_strategy(StrategyConfig(strategy="single", seed=0, actor_learning_rate=1e-2))


def tiny_actor(strategy: Strategy) -> tuple[Trainable, ModelTokenizer]:
    """Return a model of random weights with its optimizer and schedule, and its tokenizer.

    Args:
        strategy: prepares it.
    """
    # heads of 32 are the smallest that every engine takes, and weights this large have an opinion on the next token
    config = ModelConfig(
        hidden_size=64, num_layers=1, num_heads=2, max_length=32, initializer_range=0.25, alphabet="0123456789+"
    )
    model, tokenizer = build_model_and_tokenizer(config, seed=0)
    actor, _, _, _ = strategy.prepare_models_and_optimizers(model, None, None, None, None, 2)
    return actor, tokenizer


def tiny_loss(actor: Trainable) -> torch.Tensor:
    """Return the loss of the model on one short sequence.

    Args:
        actor: of `tiny_actor`.
    """
    device = next(actor.model.parameters()).device
    ids = torch.arange(2, 10, device=device)[None]
    output: torch.Tensor = actor.model(input_ids=ids, labels=ids).loss
    return output


def take_step(strategy: Strategy, actor: Trainable) -> None:
    """Take one optimizer step on that loss.

    Args:
        strategy: the one that prepared the actor.
        actor: of `tiny_actor`; changed in place.

    Raises:
        RuntimeError: the optimizer did not step.
    """
    strategy.backward(tiny_loss(actor), actor.model, actor.optimizer)
    result = strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler)
    if not result.stepped:
        raise RuntimeError(f"the optimizer did not step ({result.skipped_reason})")
