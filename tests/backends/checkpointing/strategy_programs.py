"""What the tests of checkpoints of real strategies run on every rank; one pool of a size serves all strategies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightrft.config import StrategyConfig
from lightrft.errors import CheckpointError
from lightrft.strategy.build import get_strategy
from lightrft.strategy.protocols import Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.subject import Rank

BATCH = 6  # samples of a window over all ranks; one, two and three ranks divide it
TOKENS, HIDDEN = 7, 5
STEPS = 3  # before the checkpoint
FURTHER = 10  # after it


@attrs.frozen(kw_only=True)
class Job:
    """A strategy, and the directories that it saves to or loads from, one after another."""

    strategy: str
    zero_stage: int
    directories: list[str]
    seed: int = 0
    num_flips: int = 0


@attrs.frozen(kw_only=True)
class Seen:
    """Everything of a trained model by plain names: at the checkpoint, and after further steps."""

    at: dict[str, Tensor]
    after: dict[str, Tensor]


@attrs.frozen(kw_only=True)
class Refused:
    """What came of loading damaged checkpoints: what was done, to which file, and the error."""

    attempts: list[tuple[str, str, str]]
    untouched: bool
    loaded: int


class Block(nn.Module):
    """What fsdp2 gathers at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 3)
        self.down = nn.Linear(3, HIDDEN)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        return hidden_BTH + torch.tanh(self.down(torch.tanh(self.up(hidden_BTH))))


class Tiny(nn.Module):
    """Tied, frozen, a buffer, a parameter of no dims, and shapes that neither two nor three ranks divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, HIDDEN)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = nn.Parameter(torch.randn(HIDDEN, 3), requires_grad=False)
        self.narrow = nn.Linear(3, 1)
        self.head = nn.Linear(HIDDEN, TOKENS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(2**40 + 1))

    def forward(self, ids_BT: Tensor) -> Tensor:
        hidden_BTH = self.embed(ids_BT)
        for block in self.blocks:
            hidden_BTH = block(hidden_BTH)
        # a factor, because what is added to all logits has no gradient but noise
        return self.head(hidden_BTH) * (1 + self.narrow(hidden_BTH @ self.frozen))


def settings_of(job: Job, world_size: int) -> StrategyConfig:
    return StrategyConfig(
        strategy=job.strategy,
        zero_stage=job.zero_stage,
        zero_persistence_threshold=0,
        fsdp_wrap=("Block",),
        train_batch_size=BATCH,
        micro_train_batch_size=BATCH // world_size,
    )


def built(rank: Rank, job: Job) -> tuple[Strategy, Trainable]:
    strategy = get_strategy(settings_of(job, rank.world_size))
    strategy.setup_distributed()
    torch.manual_seed(job.seed)
    model = Tiny()
    model.count.add_(job.seed)
    optimizer = strategy.create_optimizer(model, lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return strategy, strategy.prepare((model, optimizer, scheduler))


def train(strategy: Strategy, trainable: Trainable, rank: Rank, numbers: range) -> None:
    """One window a step, of which every rank takes its part."""
    model, optimizer, scheduler = trainable
    for step in numbers:
        ids_BT = torch.randint(TOKENS, (BATCH, 4), generator=torch.Generator().manual_seed(step))
        own_BT = ids_BT[rank.rank :: rank.world_size]
        logits = model(own_BT)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), own_BT[:, 1:].flatten())
        strategy.backward(loss, model, optimizer)
        assert strategy.optimizer_step(optimizer, model, scheduler).stepped


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def look(strategy: Strategy, trainable: Trainable, job: Job) -> dict[str, Tensor]:
    """Parameters, buffers and both moments by the means of torch or of DeepSpeed, not by the library's own."""
    plain = strategy.unwrap_model(trainable.model)
    if job.strategy == "deepspeed" and job.zero_stage:
        return look_by_deepspeed(trainable.model.engine.optimizer, plain, job.zero_stage)
    for module in plain.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    seen = {name: whole(tensor) for name, tensor in plain.state_dict().items()}
    for name, parameter in plain.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            if parameter.requires_grad:
                seen[f"{key} of {name}"] = whole(trainable.optimizer.state[parameter][key])
    return seen


def look_by_deepspeed(optimizer: Any, plain: nn.Module, stage: int) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if stage < 3:  # its names of the states were made with the engine, before there was any
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    seen: dict[str, Tensor] = {}
    with deepspeed.zero.GatheredParameters(list(plain.parameters())):
        seen |= {name: tensor.detach().clone() for name, tensor in plain.state_dict().items()}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            # what is stepped is a copy of what the model computes with
            assert torch.equal(safe_get_full_fp32_param(parameter), seen[name]), name
            for key in ("exp_avg", "exp_avg_sq"):
                seen[f"{key} of {name}"] = safe_get_full_optimizer_state(parameter, key).detach().clone()
    return seen


def write(rank: Rank, job: Job) -> Seen:
    """Train, save, and train on."""
    strategy, trainable = built(rank, job)
    train(strategy, trainable, rank, range(STEPS))
    strategy.save_ckpt({"actor": trainable}, job.directories[0])
    at = look(strategy, trainable, job)
    train(strategy, trainable, rank, range(STEPS, STEPS + FURTHER))
    return Seen(at=at, after=look(strategy, trainable, job))


def read(rank: Rank, job: Job) -> list[Seen]:
    """Load one checkpoint after another into one live model, and train on from each."""
    strategy, trainable = built(rank, job)
    seen: list[Seen] = []
    for directory in job.directories:
        strategy.load_ckpt({"actor": trainable}, directory)
        at = look(strategy, trainable, job)
        train(strategy, trainable, rank, range(STEPS, STEPS + FURTHER))
        seen.append(Seen(at=at, after=look(strategy, trainable, job)))
    return seen


def bits_of_rank(trainable: Trainable) -> list[object]:
    """All that loading could change of this rank, as it lies in memory: its shards are not gathered."""
    model, optimizer, scheduler = trainable
    tensors = [*model.state_dict().values(), *(value for state in optimizer.state.values() for value in state.values())]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    content = [bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) for tensor in local]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    streams = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002 (numpy's global stream)
    return [content, repr(options), repr(scheduler.state_dict()), streams]


def damages(files: dict[str, bytes], others: dict[str, bytes], num_flips: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield what is done, the name of the file, and what it holds then, unless it is removed."""
    for name, content in files.items():
        for length in sorted({0, 1, len(content) // 3, len(content) // 2, len(content) - 1}):
            yield f"cut to {length}", name, content[:length]
        yield "removed", name, b""
        yield "swapped", name, others[name]
    places = random.Random(0)  # noqa: S311 (no secret)
    names, sizes = list(files), [len(content) for content in files.values()]
    for number in range(num_flips):
        # each file once, then wherever a bit may lie
        name = names[number] if number < len(names) else places.choices(names, sizes)[0]
        content = bytearray(files[name])
        place = places.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        yield f"bit {place} flipped", name, bytes(content)


def damage(rank: Rank, job: Job) -> Refused:
    """Save twice, damage every file of the second in many ways, and load; at the end with a file that is none of it."""
    strategy, trainable = built(rank, job)
    files: list[dict[str, bytes]] = []
    for step in (1, 2):
        train(strategy, trainable, rank, range(step, step + 1))
        torch.rand(())  # so that the streams of the two differ, too
        path = strategy.save_ckpt({"actor": trainable}, job.directories[0], step=step, client_state={"step": step})
        files.append({file.name: file.read_bytes() for file in sorted(path.iterdir())})
    train(strategy, trainable, rank, range(1))
    before = bits_of_rank(trainable)
    attempts: list[tuple[str, str, str]] = []
    is_untouched = True
    for what, name, content in damages(files[1], files[0], job.num_flips):
        strategy.barrier()
        if rank.rank == 0:
            (path / name).unlink() if what == "removed" else (path / name).write_bytes(content)
        strategy.barrier()
        error = "nothing was refused"
        try:
            strategy.load_ckpt({"actor": trainable}, job.directories[0], step=2)
        except CheckpointError as refused:
            error = str(refused)
        attempts.append((what, name, error))
        is_untouched = is_untouched and bits_of_rank(trainable) == before
        strategy.barrier()
        if rank.rank == 0:
            (path / name).write_bytes(files[1][name])
    strategy.barrier()
    if rank.rank == 0:
        (path / "notes.txt").write_text("mine")
    strategy.barrier()
    loaded = strategy.load_ckpt({"actor": trainable}, job.directories[0]).step
    return Refused(attempts=attempts, untouched=is_untouched, loaded=loaded)
