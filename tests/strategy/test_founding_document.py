"""The snippets of the design philosophy that the project was founded on, line by line, as they are in users' code.

What the snippets elide (models, data, loss) is filled in by fixtures and by functions before them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightrft.strategy import get_fake_strategy, get_strategy
from lightrft.strategy.config import StrategyConfig


@pytest.fixture
def args() -> argparse.Namespace:
    """Return arguments as a training script parses them, with some that are no setting of a strategy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--actor_learning_rate", type=float, default=0.01)
    parser.add_argument("--micro_train_batch_size", type=int, default=2)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--my_parameter", type=int, default=3)
    return parser.parse_args([])


@pytest.fixture(autouse=True)
def _torn_down() -> Iterator[None]:
    yield
    get_fake_strategy().teardown()
    get_strategy(StrategyConfig(fsdp=True)).teardown()  # leaves the process group of this one process


def test_strategy_factory(args: argparse.Namespace) -> None:
    """`get_strategy(args)` selects by args.fsdp and gives a strategy that works."""
    strategy = get_strategy(args)
    assert strategy.setup_distributed().world_size == 1
    args.fsdp = True
    strategy = get_strategy(args)
    assert strategy.setup_distributed().world_size == 1


def test_configuration_management(args: argparse.Namespace) -> None:
    """`StrategyConfig.from_args(args)` gives typed settings and keeps the rest."""
    config = StrategyConfig.from_args(args)
    learning_rate = config.actor_learning_rate
    use_bf16 = config.bf16
    assert learning_rate == 0.01
    assert use_bf16 is False
    assert config.get_extra_arg("my_parameter", default=0) == 3
    assert config.get_extra_arg("another_parameter", default=0) == 0
    assert config.args is args


def test_improved_type_safety(args: argparse.Namespace) -> None:
    """The typed settings have the values that getattr with a default gave."""
    seed = getattr(args, "seed", 42)
    max_norm = getattr(args, "max_norm", 1.0)
    config = StrategyConfig.from_args(args)
    assert (config.seed, config.max_norm) == (seed, max_norm)


@pytest.mark.parametrize("fsdp", [False, True])
def test_basic_usage(args: argparse.Namespace, fsdp: bool) -> None:
    """The basic training loop runs: four epochs lower the loss, and it steps once every two micro-batches."""
    args.fsdp = fsdp
    torch.manual_seed(0)
    actor, critic, reward_models, initial_model = nn.Linear(3, 1), nn.Linear(3, 1), [nn.Linear(3, 1)], nn.Linear(3, 1)
    inputs = torch.randn(8, 3)
    dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    max_steps = 8
    losses = []

    def compute_loss(batch: list[torch.Tensor]) -> torch.Tensor:
        loss = (actor(batch[0]) - batch[1]).square().mean()
        losses.append(loss.item())
        return loss

    # Initialize strategy
    strategy = get_strategy(args)

    # Prepare models and optimizers
    actor, critic, reward_models, initial_model = strategy.prepare_models_and_optimizers(
        actor, critic, reward_models, initial_model, args, max_steps
    )
    (actor, actor_optimizer, actor_scheduler), (critic, critic_optimizer, _) = actor, critic
    dataloader = strategy.setup_dataloader(dataset, args.micro_train_batch_size)
    before = critic.weight.clone()
    results = []

    # Training loop
    for _ in range(4):
        for batch in dataloader:
            loss = compute_loss(batch)
            strategy.backward(loss, actor, actor_optimizer)
            results.append(strategy.optimizer_step(actor_optimizer, actor, actor_scheduler))

    assert [result.stepped for result in results] == [False, True] * 8
    assert sum(losses[-4:]) < sum(losses[:4])
    assert torch.equal(critic.weight, before)
    assert not critic_optimizer.state


def test_configuration_driven_usage() -> None:
    """The document's own configuration builds a strategy that accumulates eight micro-batches in bfloat16."""
    # Create configuration
    config = StrategyConfig(
        seed=42, max_norm=1.0, micro_train_batch_size=4, train_batch_size=32, bf16=True, zero_stage=2
    )

    # Use configuration to create strategy
    strategy = get_strategy(config)

    model = nn.Linear(2, 1)
    model, optimizer, scheduler = strategy.prepare((model, strategy.create_optimizer(model), None))
    results = []
    for _ in range(8):
        strategy.backward(model(torch.ones(4, 2)).float().mean(), model, optimizer)
        results.append(strategy.optimizer_step(optimizer, model, scheduler).stepped)
    assert results == [False] * 7 + [True]
    assert model(torch.ones(4, 2)).dtype == torch.bfloat16


def test_testing_with_fake_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake strategy works without a distributed environment, and its checkpoint can be loaded."""
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(torch.ones(1, 2)).mean()

    # Use fake strategy for testing
    strategy = get_fake_strategy()

    # All operations work without distributed environment
    strategy.setup_distributed()
    strategy.backward(loss, model, optimizer)
    strategy.save_ckpt(model, "checkpoints")

    saved = model.weight.clone()
    with torch.no_grad():
        model.weight.zero_()
    strategy.load_ckpt(model, "checkpoints")
    assert torch.equal(model.weight, saved)


def test_common_interface(tmp_path: Path) -> None:
    """Every method of the document's common interface works, called as it is listed there."""
    strategy = get_strategy(StrategyConfig(strategy="single"))
    model = nn.Linear(2, 1)
    strategy.setup_distributed(timeout=None)
    optimizer = strategy.create_optimizer(model, lr=0.1, betas=(0.9, 0.95), weight_decay=0.01)
    model = strategy.prepare(model, is_rlhf=False)
    (loss,) = [model(batch[0]).mean() for batch in DataLoader(TensorDataset(torch.ones(1, 2)))]
    strategy.backward(loss, model, optimizer)
    assert strategy.optimizer_step(optimizer, model, None).stepped
    strategy.save_ckpt(model, tmp_path / "checkpoints")
    assert strategy.load_ckpt(model, tmp_path / "checkpoints").step == strategy.latest_ckpt(tmp_path / "checkpoints")
    strategy.print("done")
