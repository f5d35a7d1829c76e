"""A run that is stopped anywhere, also inside an accumulation window, and resumed from its checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightrft.strategy import Strategy, StrategyConfig, Trainable, get_strategy

MICRO_BATCHES = 12


@pytest.fixture
def strategy() -> Strategy:
    return get_strategy(
        StrategyConfig(
            strategy="single", seed=9, train_batch_size=6, micro_train_batch_size=2, actor_learning_rate=0.05, l2=0.1
        )
    )


def begin(strategy: Strategy) -> tuple[Trainable, object]:
    """Set up and build everything, as the script of a run does each time it is started."""
    strategy.setup_distributed()
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    actor, *_ = strategy.prepare_models_and_optimizers(model, None, None, None, max_steps=4)
    return actor, strategy.setup_dataloader(TensorDataset(torch.linspace(-1, 1, 21).reshape(7, 3)), 2)


def run(strategy: Strategy, actor: Trainable, loader: object, start: int, stop: int) -> list[tuple[object, ...]]:
    """Train from one micro-batch to another; return all that a metrics file would show."""
    seen = []
    batches = iter(loader)
    for _ in range(start, stop):
        try:
            (batch,) = next(batches)
        except StopIteration:
            batches = iter(loader)
            (batch,) = next(batches)
        loss = (actor.model(batch) - 1).square().mean()
        strategy.backward(loss, actor.model, actor.optimizer)
        result = strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler)
        seen.append((batch.tolist(), loss.item(), result, random.random(), np.random.random()))  # noqa: NPY002, S311
    return seen


@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_a_resumed_run_equals_the_uninterrupted_one(strategy: Strategy, tmp_path: Path, stop: int) -> None:
    """Losses, steps, rates, samples and random draws after a resume are those of a run that was never stopped."""
    actor, loader = begin(strategy)
    expected = run(strategy, actor, loader, 0, MICRO_BATCHES)
    bits = [parameter.detach().clone() for parameter in actor.model.parameters()]
    strategy.teardown()

    actor, loader = begin(strategy)
    assert run(strategy, actor, loader, 0, stop) == expected[:stop]
    strategy.save_ckpt(actor, tmp_path, client_state={"sampler": loader.sampler.state_dict()})
    strategy.teardown()

    random.seed(0)
    actor, loader = begin(strategy)
    loaded = strategy.load_ckpt(actor, tmp_path)
    loader.sampler.load_state_dict(loaded.client_state["sampler"])
    strategy.setup_distributed()  # a second set-up, which must leave the restored streams alone
    assert run(strategy, actor, loader, stop, MICRO_BATCHES) == expected[stop:]
    assert all(torch.equal(a, b) for a, b in zip(actor.model.parameters(), bits, strict=True))
    strategy.teardown()
