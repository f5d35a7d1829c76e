"""What the tests of checkpointing share: the functions under test, an awkward model, and its whole state."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightrft.backends.checkpointing.canonical import CheckpointFunctions, build_checkpointing
from lightrft.backends.checkpointing.live import build_live_access
from lightrft.backends.collectives.single import build_collectives
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.training import Trainable

Snapshot = dict[str, object]


class Awkward(nn.Module):
    """Tied, frozen, 0-d, empty, bfloat16, non-contiguous and integer tensors, and a buffer that is not kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.twin = self.inner
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.low = nn.Parameter(torch.randn(width, 3).bfloat16())
        self.turned = nn.Parameter(torch.randn(3, width).t())
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("count", torch.tensor(2**40 + 1))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("spread", torch.full((1,), 3.0).expand(4))
        self.register_buffer("complex", torch.randn(2, dtype=torch.complex128))
        self.register_buffer("transient", torch.randn(2), persistent=False)

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        hidden_TH = self.twin(self.inner(self.embed(tokens_T))) * self.scale
        hidden_TH = nn.functional.dropout(hidden_TH, 0.2)
        mixed = (hidden_TH @ self.low.float()).sum() + (hidden_TH @ self.turned).sum() + self.nothing.sum()
        return self.head(hidden_TH).square().mean() + 0.01 * mixed


@pytest.fixture
def checkpointing() -> CheckpointFunctions:
    def unwrap_model(model: nn.Module) -> nn.Module:
        return getattr(model, "wrapped", model)

    return build_checkpointing(
        collectives=build_collectives(StrategyConfig(strategy="single", seed=7)), access=build_live_access(unwrap_model)
    )


@pytest.fixture(scope="session")
def make_trainable() -> Callable[..., Trainable]:
    def make(seed: int, *, width: int = 4, fused: bool = True, schedule: str = "lambda") -> Trainable:
        torch.manual_seed(seed)
        model = Awkward(width)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2]},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=fused)
        schedules: dict[str, Callable[[], torch.optim.lr_scheduler.LRScheduler | None]] = {
            "none": lambda: None,
            "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
            "multistep": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5]),
            "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        }
        optimizer.param_groups[0].update({"micro_batches": 0, "pending_backward": False})
        return Trainable(model, optimizer, schedules[schedule]())

    return make


@pytest.fixture(scope="session")
def train() -> Callable[[Trainable, int], list[float]]:
    """Micro-batches of random data, a step after every second."""

    def run(trainable: Trainable, num_micro_batches: int) -> list[float]:
        model, optimizer, scheduler = trainable
        losses: list[float] = []
        for _ in range(num_micro_batches):
            tokens_T = torch.tensor([random.randrange(5), int(np.random.randint(5)), int(torch.randint(5, ()))])  # noqa: NPY002, S311 (numpy's global stream)
            loss = model(tokens_T)
            loss.backward()
            losses.append(loss.item())
            position = optimizer.param_groups[0]["micro_batches"] + 1
            optimizer.param_groups[0]["micro_batches"] = position % 2
            if position == 2:
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step(*([loss.item()] if "Plateau" in type(scheduler).__name__ else []))
        return losses

    return run


def bits(value: object) -> object:
    """A tensor as its dtype, shape and bytes; anything else as it is, with the type beside it."""
    if isinstance(value, torch.Tensor):
        content = value.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        return (str(value.dtype), tuple(value.shape), bytes(content.tolist()))
    if isinstance(value, dict):
        return (type(value).__name__, {key: bits(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return (type(value).__name__, [bits(item) for item in value])
    return (type(value).__name__, repr(value))


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Trainable], Snapshot]:
    """Everything that a checkpoint restores, read by torch's own means."""

    def take(trainable: Trainable) -> Snapshot:
        model, optimizer, scheduler = trainable
        names = {id(p): name for name, p in model.named_parameters()}
        state = scheduler.state_dict() if scheduler is not None else {}
        return {
            "model": bits(dict(model.state_dict())),
            "ties": [names[id(p)] for _, p in model.named_parameters(remove_duplicate=False)],
            "gradients": {name: bits(p.grad) for name, p in model.named_parameters()},
            "groups": [bits({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups],
            "state": {names[id(p)]: bits(dict(s)) for p, s in optimizer.state.items()},
            "schedule": bits(dict(state)),
            "random": bits([random.getstate(), torch.get_rng_state(), json.dumps(str(np.random.get_state()))]),  # noqa: NPY002 (numpy's global stream)
        }

    return take


@pytest.fixture
def saved(
    tmp_path: Path,
    checkpointing: CheckpointFunctions,
    make_trainable: Callable[..., Trainable],
    train: Callable[[Trainable, int], list[float]],
) -> Path:
    """A directory with steps 1 and 2 of one run, both inside an accumulation window."""
    trainable = make_trainable(0)
    train(trainable, 3)
    checkpointing.save_ckpt(trainable, tmp_path / "run", client_state={"seen": 3})
    train(trainable, 2)
    checkpointing.save_ckpt(trainable, tmp_path / "run", client_state={"seen": 5})
    return tmp_path / "run"
