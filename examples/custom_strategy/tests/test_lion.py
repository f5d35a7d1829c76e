"""What is Lion's own; that it is a strategy, its laws show, which are tests by a line in `pyproject.toml`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lion_strategy import build_lion
from torch import nn

from lightrft.errors import ConfigError
from lightrft.strategy import STRATEGIES, Strategy, StrategyConfig, Trainable, get_strategy

CONFIG = StrategyConfig(
    strategy="lion",
    micro_train_batch_size=2,
    train_batch_size=4,
    actor_learning_rate=0.01,
    l2=0.1,
    max_norm=0.0,
    lr_scheduler="constant",
)


@pytest.fixture
def strategy() -> Iterator[Strategy]:
    """Return the strategy, chosen by its name."""
    chosen = get_strategy(CONFIG, registry={**STRATEGIES, "lion": build_lion})
    chosen.setup_distributed()
    yield chosen
    chosen.teardown()


def trainable(strategy: Strategy) -> Trainable:
    torch.manual_seed(0)
    return strategy.prepare_models_and_optimizers(nn.Linear(3, 2), None, None, None)[0]


def fit(strategy: Strategy, actor: Trainable, num_steps: int) -> list[float]:
    """Return the loss of each micro-batch."""
    inputs, losses = torch.eye(3), []
    for _ in range(2 * num_steps):
        loss = (actor.model(inputs) - 1.0).square().mean()
        losses.append(loss.item())
        strategy.backward(loss, actor.model, actor.optimizer)
        strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler)
    return losses


def test_it_trains(strategy: Strategy) -> None:
    """A hundred steps bring the loss below a tenth of what it was."""
    losses = fit(strategy, trainable(strategy), num_steps=100)
    assert losses[-1] < losses[0] / 10


def test_the_first_step_is_the_formula(strategy: Strategy) -> None:
    """The first step moves parameters by the rate against their gradients' signs; the matrix alone decays."""
    actor = trainable(strategy)
    weight, bias = (parameter.detach().clone() for parameter in actor.model.parameters())
    loss = (actor.model(torch.eye(3)) - 1.0).square().mean()
    signs = [gradient.sign() for gradient in torch.autograd.grad(loss, list(actor.model.parameters()))]
    fit(strategy, actor, num_steps=1)
    after = list(actor.model.parameters())
    torch.testing.assert_close(after[0].detach(), weight * (1 - 0.01 * 0.1) - 0.01 * signs[0])
    torch.testing.assert_close(after[1].detach(), bias - 0.01 * signs[1])


def test_what_it_cannot_do_is_refused(strategy: Strategy) -> None:
    """An eps, which Lion has no use for, and a model without anything to train are errors."""
    with pytest.raises(ConfigError, match=r"eps=0\.1 has no meaning"):
        strategy.create_optimizer(nn.Linear(1, 1), eps=0.1)
    with pytest.raises(ConfigError, match="no parameter"):
        strategy.create_optimizer(nn.Identity())
