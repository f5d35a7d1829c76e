"""What test_import_ranks.py runs on every rank: imported checkpoints are loaded and trained on from."""

from __future__ import annotations

import torch
from foreign_programs import Tiny
from strategy_programs import Job, Seen, look

from lightrft.config import StrategyConfig
from lightrft.strategy.build import get_strategy
from lightrft.strategy.protocols import Trainable
from lightrft.testing.subject import Rank

STEPS = 3


def read(rank: Rank, job: Job) -> list[Seen]:
    """Load one checkpoint after another into a model under a strategy, and train on from each."""
    strategy = get_strategy(
        StrategyConfig(
            strategy=job.strategy,
            zero_stage=job.zero_stage,
            zero_persistence_threshold=0,
            fsdp_wrap=("Linear",),
            train_batch_size=2,
            micro_train_batch_size=2 // rank.world_size,
        )
    )
    strategy.setup_distributed()
    model = Tiny(seed=9)
    optimizer = strategy.create_optimizer(model, lr=7.0, weight_decay=7.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    prepared, optimizer, _ = strategy.prepare((model, optimizer, scheduler))
    trainable = Trainable(prepared, optimizer, None)
    seen: list[Seen] = []
    for directory in job.directories:
        strategy.load_ckpt({"actor": trainable}, directory)
        at = look(strategy, trainable, job)
        for step in range(STEPS):
            tokens = torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(step))
            for own in tokens[rank.rank :: rank.world_size].split(2 // rank.world_size):
                strategy.backward(prepared(own), prepared, optimizer)
                strategy.optimizer_step(optimizer, prepared, None)
        seen.append(Seen(at=at, after=look(strategy, trainable, job)))
    return seen
