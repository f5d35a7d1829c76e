"""A training loop by hand: the strategy does what depends on the machine, and everything else is in front of you.

The model learns to add up its inputs. Stop it and start it again with the same directory: it goes on where its newest
checkpoint was written, and ends with the same bits as a run that was never stopped.

    python examples/custom_loop.py --max_steps 40 --save_dir runs/loop
    python examples/custom_loop.py --max_steps 40 --save_dir runs/loop --stop_after 20     # and once more without it
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import TypeAlias, cast

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightrft.data.sampler import ResumableSampler
from lightrft.strategy import Strategy, Trainable, get_strategy
from lightrft.strategy.protocols import Json

Batch: TypeAlias = "list[torch.Tensor]"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments: some are settings of a strategy, the others are this script's own.

    Args:
        argv: what was written; None takes the command line.
    """
    parser = argparse.ArgumentParser(description="Train a small model by hand.")
    parser.add_argument("--strategy", default="single")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--max_norm", type=float, default=1.0)
    parser.add_argument("--actor_learning_rate", type=float, default=0.02)
    parser.add_argument("--micro_train_batch_size", type=int, default=8)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--stop_after", type=int, default=0)
    parser.add_argument("--save_dir", default="runs/loop")
    return parser.parse_args(argv)


def build_model() -> nn.Module:
    """Return a small model with random weights."""
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))


def build_dataset() -> TensorDataset:
    """Return rows of four numbers with their sums."""
    inputs = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


def compute_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean squared error.

    Args:
        model: the prepared model.
        batch: inputs (B, 4) and their sums (B, 1).
    """
    inputs, sums = batch
    outputs: torch.Tensor = model(inputs)
    return (outputs - sums).square().mean()


def train(strategy: Strategy, args: argparse.Namespace) -> list[float]:
    """Return the loss of every optimizer step that this call took.

    Args:
        strategy: any.
        args: what `parse_args` returns.
    """
    strategy.setup_distributed(timeout=None)
    with strategy.init_model_context():
        model = build_model()
    actor, _, _, _ = strategy.prepare_models_and_optimizers(model, None, None, None, args, args.max_steps)
    loader = strategy.setup_dataloader(build_dataset(), args.micro_train_batch_size)
    sampler = cast("ResumableSampler", loader.sampler)  # so says the contract of setup_dataloader
    step = resume(strategy, actor, sampler, args.save_dir)
    last = min(args.max_steps, args.stop_after or args.max_steps)
    losses: list[float] = []
    while step < last:
        losses.append(train_window(strategy, actor, loader))
        step += 1
        strategy.print(f"step {step}: loss {losses[-1]:.4f}")
    if losses:
        strategy.save_ckpt(actor, args.save_dir, step=step, client_state={"sampler": sampler.state_dict()}, max_num=2)
    strategy.teardown()
    return losses


def train_window(strategy: Strategy, actor: Trainable, batches: Iterable[Batch]) -> float:
    """Take one optimizer step, over as many micro-batches as it needs, and return their mean loss.

    Args:
        strategy: any.
        actor: what is trained, in place.
        batches: micro-batches; an iteration goes on where the last one ended.
    """
    losses: list[float] = []
    while True:
        for batch in batches:
            loss = compute_loss(actor.model, batch)
            losses.append(loss.item())
            strategy.backward(loss, actor.model, actor.optimizer)
            if strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler).stepped:
                return sum(losses) / len(losses)


def resume(strategy: Strategy, actor: Trainable, sampler: ResumableSampler, save_dir: str) -> int:
    """Restore the newest checkpoint, if there is one, and return its step.

    Args:
        strategy: any.
        actor: restored in place.
        sampler: restored in place.
        save_dir: directory of the checkpoints.
    """
    if strategy.latest_ckpt(save_dir) is None:
        return 0
    loaded = strategy.load_ckpt(actor, save_dir)
    sampler.load_state_dict(cast("dict[str, Json]", loaded.client_state["sampler"]))
    strategy.print(f"go on from {loaded.path}")
    return loaded.step


if __name__ == "__main__":
    arguments = parse_args()
    train(get_strategy(arguments), arguments)
