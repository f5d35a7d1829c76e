"""What the tests of fsdp2 run on every rank of a pool of processes, and the loop of raw torch beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightrft.backends.plain_model import build_plain_model
from lightrft.errors import LightRFTError
from lightrft.strategy.protocols import Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.subject import Rank

VOCABULARY, HIDDEN, LENGTH = 11, 8, 5
OPTIMIZERS = ("AdamW", "SGD", "Adam", "RMSprop", "Adagrad", "NAdam")


class Block(nn.Module):
    """A residual layer with a parameter that cannot be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.up: nn.Linear = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.down: nn.Linear = nn.Linear(3 * HIDDEN, HIDDEN, bias=False)
        self.scale: nn.Parameter = nn.Parameter(torch.tensor(0.5))

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.scale * self.down(torch.tanh(self.up(hidden)))
        return out


class Model(nn.Module):
    """A tied language model of two layers, one of them twice as an expert that samples may miss."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers: nn.ModuleList = nn.ModuleList([Block(), Block()])
        self.experts: nn.ParameterList = nn.ParameterList([torch.randn(HIDDEN), torch.randn(HIDDEN), torch.randn(3)])
        self.empty: nn.Parameter = nn.Parameter(torch.zeros(0, 3))
        self.head: nn.Linear = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.positions: Tensor = nn.Buffer(torch.linspace(-1, 1, LENGTH)[:, None], persistent=False)
        self.count: Tensor = nn.Buffer(torch.tensor(3))

    def forward(self, ids: Tensor, expert: int = 0) -> Tensor:
        hidden = self.embedding(ids) + self.positions.to(self.embedding.weight.dtype) + self.experts[expert]
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


@attrs.frozen(kw_only=True)
class Case:
    """A training.

    Attributes:
        optimizer: name of a class of torch.optim; made of the plain model.
        num_steps: windows.
        micro_batches: of a window on each rank.
        is_told: whether backward is told where windows end.
        experts: which expert each rank's samples reach, by rank.
        is_trained_before: whether the optimizer has made a step of the plain model before it is prepared.
    """

    optimizer: str = "AdamW"
    num_steps: int = 3
    micro_batches: int = 2
    is_told: bool = False
    experts: tuple[int, ...] = (0,)
    is_trained_before: bool = False
    wrap: tuple[str, ...] = ()
    replicate: int = 1
    bf16: bool = False
    reshard: bool = True
    recompute: bool = False
    compiled: bool = False
    lora: bool = False


@attrs.frozen(kw_only=True)
class Seen:
    """What one rank saw: losses by micro-batch, norms by step, tensors at the end, and what is sharded."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, Tensor]
    sharded: list[str]
    state: list[str]


def build(case: Case, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model()
    if case.lora:
        model.requires_grad_(requires_grad=False)
        for layer in model.layers:
            block = cast("Block", layer)
            block.up = cast("nn.Linear", Adapted(block.up))
    return model


class Adapted(nn.Module):
    """A frozen linear layer with a trained correction of rank 2, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base: nn.Linear = base
        self.lora_a: nn.Parameter = nn.Parameter(torch.randn(2, base.in_features))
        self.lora_b: nn.Parameter = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.base(hidden) + hidden @ self.lora_a.T @ self.lora_b.T
        return out


def ids_of(step: int, micro_batch: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_batch + rank)
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)


def loss_of(model: nn.Module, ids: Tensor, expert: int) -> Tensor:
    logits = model(ids, expert)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.roll(1, 1).flatten())


def optimizer_of(case: Case, model: nn.Module) -> Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = cast("type[torch.optim.SGD]", getattr(torch.optim, case.optimizer))
    settings = {"momentum": 0.9} if case.optimizer == "SGD" else {}
    return kind([{"params": trained[:3]}, {"params": trained[3:], "lr": 0.02}], lr=0.05, weight_decay=0.1, **settings)


def raw(case: Case, world_size: int) -> Seen:
    """Train in one process, with the samples of all ranks."""
    model = build(case)
    optimizer = optimizer_of(case, model)
    if case.is_trained_before:
        step_before(model, optimizer)
    losses, norms = [], []
    for step in range(case.num_steps):
        optimizer.zero_grad()
        for micro_batch in range(case.micro_batches):
            for rank in range(world_size):
                loss = loss_of(model, ids_of(step, micro_batch, rank), case.experts[rank % len(case.experts)])
                (loss / (world_size * case.micro_batches)).backward()
                losses.append(loss.item())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Seen(losses=losses, norms=norms, tensors=tensors, sharded=[], state=[])


def step_before(model: nn.Module, optimizer: Optimizer) -> None:
    loss_of(model, ids_of(99, 0, 0), 0).backward()
    optimizer.step()
    optimizer.zero_grad()


def prepared(rank: Rank, case: Case) -> tuple[Strategy, Trainable]:
    config = attrs.evolve(
        rank.config,
        max_norm=0.5,
        micro_train_batch_size=2,
        train_batch_size=2 * case.micro_batches * rank.world_size,
        bf16=case.bf16,
        fsdp_wrap=case.wrap,
        fsdp_replicate=case.replicate,
        fsdp_reshard_after_forward=case.reshard,
        gradient_checkpointing=case.recompute,
        compile_layers=case.compiled,
    )
    strategy = rank.build(config)
    strategy.setup_distributed()
    model = build(case, seed=0 if case.is_trained_before else rank.rank)  # the values of rank 0 count
    optimizer = optimizer_of(case, model)
    if case.is_trained_before:
        step_before(model, optimizer)
    trainable = strategy.prepare((model, optimizer, None))
    if trainable.optimizer is not optimizer:
        raise AssertionError("the optimizer is another object")
    return strategy, trainable


def train(rank: Rank, case: Case) -> Seen:
    """Train on this rank's samples."""
    with torch.compiler.set_stance("force_eager") if case.compiled else nullcontext():
        strategy, trainable = prepared(rank, case)
        losses, norms = [], []
        for step in range(case.num_steps):
            found = window(strategy, trainable, case, rank.rank, step)
            losses += found[0]
            norms.append(found[1])
    tensors = {name: tensor.clone() for name, tensor in strategy.named_tensors(trainable.model)}
    inner = strategy.unwrap_model(trainable.model)
    return Seen(
        losses=losses,
        norms=norms,
        tensors=tensors,
        sharded=[name for name, parameter in inner.named_parameters() if isinstance(parameter, DTensor)],
        state=[
            f"{key} {type(value).__name__} {tuple(value.shape)}"
            for state in trainable.optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim()
        ],
    )


def window(strategy: Strategy, trainable: Trainable, case: Case, rank: int, step: int) -> tuple[list[float], float]:
    model, optimizer, scheduler = trainable
    losses: list[float] = []
    for micro_batch in range(case.micro_batches):
        loss = loss_of(model, ids_of(step, micro_batch, rank), case.experts[rank % len(case.experts)])
        is_last = micro_batch == case.micro_batches - 1
        strategy.backward(loss, model, optimizer, is_boundary=is_last if case.is_told else None)
        losses.append(loss.item())
        result = strategy.optimizer_step(optimizer, model, scheduler, is_boundary=is_last if case.is_told else None)
    if not result.stepped or result.grad_norm is None:
        raise AssertionError(f"{result}")
    return losses, result.grad_norm


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if "c10d" in func.namespace:
            self.calls[func._schema.name.rpartition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def count(rank: Rank, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """Return the collectives of a window, here and in a raw loop over the same model."""
    strategy, trainable = prepared(rank, case)
    window(strategy, trainable, case, rank.rank, 0)
    with Collectives() as ours:
        window(strategy, trainable, case, rank.rank, 1)
    one_window = raw_sharded(rank, case)
    next(one_window)
    with Collectives() as raws:
        next(one_window)
    return dict(ours.calls), dict(raws.calls)


def raw_sharded(rank: Rank, case: Case) -> Iterator[None]:
    model = build(case)
    mesh = init_device_mesh("cpu", (rank.world_size,))
    whole = {parameter for parameter in model.parameters() if not parameter.dim() or not parameter.numel()}
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    optimizer = torch.optim.AdamW(sharded)
    for step in range(2):
        for micro_batch in range(case.micro_batches):
            if case.is_told:
                cast("FSDPModule", model).set_requires_gradient_sync(micro_batch == case.micro_batches - 1)
            loss_of(model, ids_of(step, micro_batch, rank.rank), 0).backward()
        norm = nn.utils.clip_grad_norm_(sharded, 0.5)
        float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
        optimizer.zero_grad()
        yield
    dist.barrier()


@attrs.frozen(kw_only=True)
class Looked:
    """What one rank saw of a model that was built without memory, and of its relatives."""

    is_meta: list[str]
    first_loss: float
    is_tied: bool
    plain: dict[str, Tensor]
    plain_logits: Tensor
    logits: Tensor
    averages: list[dict[str, Tensor]]
    dtype: str
    refused: list[str]


def look(rank: Rank, case: Case) -> Looked:
    """Build on the meta device, load a checkpoint, and look at what came of it."""
    del case
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    with strategy.init_model_context(meta_init=True):
        model = Model()
    is_meta = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    sharded = strategy.prepare(model)
    ids = ids_of(0, 0, 0)
    first_loss = loss_of(sharded, ids, 0).item()
    other = strategy.prepare(build(Case()))
    strategy.save_ckpt(other, rank.directory / "checkpoints", step=1)
    strategy.load_ckpt(sharded, rank.directory / "checkpoints")
    plain_model = build_plain_model(unwrap_model=strategy.unwrap_model, named_tensors=strategy.named_tensors)
    plain = cast("Model", plain_model(sharded))
    averages = [plain_model(sharded), strategy.prepare(build(Case(), seed=0))]
    strategy.moving_average(strategy.prepare(build(Case(), seed=5)), averages[0], 0.75)
    strategy.moving_average(build(Case(), seed=5), averages[1], 0.75)
    with torch.no_grad():
        logits, plain_logits = sharded(ids), plain(ids)
    narrow = rank.build(attrs.evolve(rank.config, bf16=True))
    return Looked(
        is_meta=is_meta,
        first_loss=first_loss,
        is_tied=plain.head.weight is plain.embedding.weight,
        plain={name: tensor.detach().clone() for name, tensor in plain.state_dict().items()},
        plain_logits=plain_logits,
        logits=logits,
        averages=[dict(strategy.named_tensors(average)) for average in averages],
        dtype=str(narrow.prepare(build(Case()))(ids).dtype),
        refused=[_refused(rank, name) for name in ("wrap", "replicate", "optimizer", "meta", "layers")],
    )


def _refused(rank: Rank, what: str) -> str:
    config = {
        "wrap": attrs.evolve(rank.config, fsdp_wrap=("Blok",)),
        "replicate": attrs.evolve(rank.config, fsdp_replicate=rank.world_size + 1),
        "layers": attrs.evolve(rank.config, gradient_checkpointing=True),
    }.get(what, rank.config)
    strategy = rank.build(config)
    model: nn.Module = nn.Linear(2, 2) if what == "layers" else build(Case())
    if what == "meta":
        with torch.device("meta"):
            model = Model()
    of = nn.Linear(1, 1) if what == "optimizer" else nn.Linear(2, 2) if what == "meta" else model
    try:
        strategy.prepare((model, strategy.create_optimizer(of), None))
    except LightRFTError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def fault(rank: Rank, case: Case) -> list[str]:
    """Step with a gradient that is not finite on the last rank alone, and return what is said of it."""
    strategy, (model, optimizer, _) = prepared(rank, case)
    loss = loss_of(model, ids_of(0, 0, rank.rank), 0)
    is_last = rank.rank == rank.world_size - 1
    strategy.backward(loss * float("inf") if is_last else loss, model, optimizer)
    before = {name: tensor.clone() for name, tensor in strategy.named_tensors(model)}
    result = strategy.optimizer_step(optimizer, model, None, is_boundary=True)
    same = all(torch.equal(tensor, before[name]) for name, tensor in strategy.named_tensors(model))
    return [str(result.skipped_reason), str(same), str(len(optimizer.state))]
