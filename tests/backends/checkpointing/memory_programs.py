"""What the tests of memory run on every rank: saving and loading, and how far they raise the memory of the process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightrft.config import StrategyConfig
from lightrft.strategy.build import get_strategy
from lightrft.strategy.protocols import Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.subject import Rank

WIDTH, DEPTH = 1024, 16  # 4 MiB a tensor, 64 MiB of parameters, 192 MiB with both moments


@attrs.frozen(kw_only=True)
class Job:
    """Where to save, and under which strategy."""

    directory: str
    strategy: str


@attrs.frozen(kw_only=True)
class Seen:
    """Bytes: of what this rank keeps, of the largest whole tensor, and by which each action raised the peak."""

    shard: int
    moments: int
    largest: int
    raised: dict[str, int]


class Deep(nn.Module):
    """Many equal layers, so that one tensor, this rank's part and the whole differ clearly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)])

    def forward(self, hidden_BH: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_BH = torch.tanh(block(hidden_BH))
        return hidden_BH


def status(field: str) -> int:
    """Bytes that the kernel counts for this process; the page cache is not among them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def raised_by(action: Callable[[], object]) -> int:
    """By how many bytes the peak during the action is above what the process held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def built(strategy: Strategy) -> Trainable:
    model = Deep()
    return strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3, weight_decay=0.0), None))


def measure(rank: Rank, job: Job) -> Seen:
    """Save, load over what is live, and load into an optimizer without state; once before, so that all is imported."""
    config = StrategyConfig(
        strategy=job.strategy, fsdp_wrap=("Linear",), train_batch_size=2, micro_train_batch_size=2 // rank.world_size
    )
    strategy = get_strategy(config)
    strategy.setup_distributed()
    torch.manual_seed(0)
    trainable = built(strategy)
    model, optimizer, _ = trainable
    strategy.backward(model(torch.randn(config.micro_train_batch_size, WIDTH)).square().mean(), model, optimizer)
    assert strategy.optimizer_step(optimizer, model, None).stepped
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    seen = num_bytes(moments)

    def save() -> None:
        strategy.save_ckpt({"actor": trainable}, job.directory, max_num=1)

    def load() -> None:
        strategy.load_ckpt({"actor": trainable}, job.directory)

    save()
    load()
    raised = {"save": raised_by(save), "load": raised_by(load)}
    del moments
    optimizer.state.clear()
    raised["load into no state"] = raised_by(load)
    return Seen(
        shard=num_bytes(list(model.parameters())) + seen,
        moments=seen,
        largest=WIDTH * WIDTH * 4,
        raised=raised,
    )
