"""What the tests of deepspeed run on every rank of a pool of processes, and the loop of raw torch beside it."""

from __future__ import annotations

import contextlib
import io
import math

import attrs
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightrft.backends.plain_model import build_plain_model
from lightrft.errors import StepError
from lightrft.strategy.protocols import Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.subject import Rank

VOCABULARY, HIDDEN, LENGTH = 11, 6, 5


class Model(nn.Module):
    """A tied language model with a frozen layer, and parameters of 0 dims, without elements and of odd shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.up: nn.Linear = nn.Linear(HIDDEN, 7)
        self.frozen: nn.Linear = nn.Linear(7, 7)
        self.down: nn.Linear = nn.Linear(7, HIDDEN)
        self.scale: nn.Parameter = nn.Parameter(torch.tensor(0.5))
        self.empty: nn.Parameter = nn.Parameter(torch.zeros(0, 3))
        self.experts: nn.ParameterList = nn.ParameterList([torch.randn(HIDDEN), torch.randn(HIDDEN)])
        self.head: nn.Linear = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.positions: Tensor = nn.Buffer(torch.linspace(-1, 1, LENGTH)[:, None], persistent=False)
        self.count: Tensor = nn.Buffer(torch.tensor(3))
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, ids: Tensor, experts: tuple[int, ...] = (0, 1), *, is_broken: bool = False) -> Tensor:
        hidden = self.embedding(ids) + self.positions
        for expert in experts:
            hidden = hidden + self.experts[expert]
        hidden = hidden + self.scale * self.down(torch.tanh(self.frozen(torch.tanh(self.up(hidden)))))
        logits: Tensor = self.head(hidden) + self.empty.sum()
        # the slope of a root at zero is infinite
        return logits + (self.scale * 0.0).abs().sqrt() if is_broken else logits


@attrs.frozen(kw_only=True)
class Case:
    """A training.

    Attributes:
        stage: ZeRO stage.
        num_steps: windows.
        micro_batches: of a window on each rank.
        max_norm: bound on the norm.
        threshold: setting `zero_persistence_threshold`.
        experts: which expert the samples of each rank reach; none for both.
        is_told: whether backward is told where windows end.
        hpz: setting `zero_hpz`.
    """

    stage: int
    num_steps: int = 4
    micro_batches: int = 2
    max_norm: float = 0.5
    threshold: int = 0
    experts: tuple[int, ...] = ()
    is_told: bool = True
    hpz: int = 1


@attrs.frozen(kw_only=True, eq=False)
class Seen:
    """What a training did: by step, and at its end."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    tensors: dict[str, Tensor]


@attrs.frozen(kw_only=True, eq=False)
class Found:
    """Answers to questions, by name, and tensors."""

    words: dict[str, str]
    tensors: dict[str, Tensor]


def new_model(seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model()


def batch(step: int, rank: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return torch.randint(VOCABULARY, (3, LENGTH), generator=generator)


def loss_of(model: nn.Module, ids: Tensor, experts: tuple[int, ...]) -> Tensor:
    logits = model(ids, experts)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def experts_of(case: Case, rank: int) -> tuple[int, ...]:
    return (case.experts[rank],) if case.experts else (0, 1)


def rate(step: int) -> float:
    return 1.0 / (step + 1)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # one group of matrices, one of the rest, and one that has nothing to step
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in model.parameters() if not parameter.numel()], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def strategy_of(rank: Rank, case: Case) -> Strategy:
    settings = attrs.evolve(
        rank.config,
        zero_stage=case.stage,
        zero_persistence_threshold=case.threshold,
        zero_hpz=case.hpz,
        max_norm=case.max_norm,
        train_batch_size=3 * case.micro_batches * rank.world_size,
        micro_train_batch_size=3,
    )
    return rank.build(settings)


def prepared(strategy: Strategy, seed: int = 0) -> Trainable:
    model = new_model(seed)
    optimizer = optimizer_of(model)
    return strategy.prepare((model, optimizer, LambdaLR(optimizer, rate)))


def train(rank: Rank, case: Case) -> Seen:
    """Train; every rank begins with weights of its own."""
    strategy = strategy_of(rank, case)
    strategy.setup_distributed()
    model, optimizer, scheduler = prepared(strategy, seed=rank.rank)
    seen = Seen(losses=[], norms=[], rates=[], tensors={})
    for step in range(case.num_steps):
        total = 0.0
        for micro in range(case.micro_batches):
            is_last = micro == case.micro_batches - 1
            loss = loss_of(model, batch(step, rank.rank, micro), experts_of(case, rank.rank))
            strategy.backward(loss, model, optimizer, is_boundary=is_last if case.is_told else None)
            result = strategy.optimizer_step(optimizer, model, scheduler)
            total += loss.item()
        assert result.stepped
        assert result.grad_norm is not None
        seen.losses.append(strategy.all_reduce(total, "mean") / case.micro_batches)
        seen.norms.append(result.grad_norm)
        seen.rates.append(result.learning_rate)
    seen.tensors.update({name: tensor.clone() for name, tensor in strategy.named_tensors(model)})
    return seen


def expected(case: Case, world_size: int) -> Seen:
    """Train in raw torch, on one batch of all samples a step."""
    model = new_model()
    optimizer = optimizer_of(model)
    scheduler = LambdaLR(optimizer, rate)
    seen = Seen(losses=[], norms=[], rates=[], tensors={})
    for step in range(case.num_steps):
        losses = [
            loss_of(model, batch(step, rank, micro), experts_of(case, rank))
            for rank in range(world_size)
            for micro in range(case.micro_batches)
        ]
        mean = torch.stack(losses).mean()
        mean.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), case.max_norm or math.inf)
        seen.losses.append(mean.item())
        seen.norms.append(norm.item())
        seen.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    seen.tensors.update(model.state_dict())
    return seen


def refuse(rank: Rank, case: Case) -> Found:
    """Ask for what cannot be done."""
    strategy = strategy_of(rank, case)
    strategy.setup_distributed()
    words: dict[str, str] = {}

    def ask(name: str, *given: nn.Module | torch.optim.Optimizer) -> None:
        model, optimizer = given
        try:
            strategy.prepare((model, optimizer, None))
        except Exception as error:  # noqa: BLE001 (the test looks at what it is)
            words[name] = f"{type(error).__name__}: {error}"

    model = new_model()
    ask("of another model", model, torch.optim.SGD(new_model().parameters(), lr=0.1))
    ask("whole tensors", nn.Linear(2, 2, bias=False), torch.optim.Muon(nn.Linear(2, 2, bias=False).parameters()))
    linear = nn.Linear(2, 2, bias=False)
    ask("whole tensors", linear, torch.optim.Muon(linear.parameters()))
    double = nn.Linear(2, 2).double()
    ask("double", double, torch.optim.SGD(double.parameters(), lr=0.1))
    stepped = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(stepped.parameters())
    stepped(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    ask("state", stepped, optimizer)
    one, other = prepared(strategy), prepared(strategy)
    ask("prepared already", one.model, other.optimizer)
    shared = nn.Sequential(strategy.unwrap_model(one.model), nn.Linear(2, 2))
    ask("shared", shared, torch.optim.SGD(shared.parameters(), lr=0.1))
    reference = strategy.prepare(new_model(), is_rlhf=True)
    for name, model, optimizer in (
        ("no optimizer", reference, one.optimizer),
        ("other optimizer", one.model, other.optimizer),
    ):
        try:
            strategy.backward(loss_of(one.model, batch(0, 0, 0), (0, 1)), model, optimizer)
            strategy.optimizer_step(optimizer, model, None, is_boundary=True)
        except Exception as error:  # noqa: BLE001 (as above)
            words[name] = f"{type(error).__name__}: {error}"
    return Found(words=words, tensors={})


def skip(rank: Rank, case: Case) -> Found:
    """Train on a gradient that is not finite, in one parameter on the last rank; what is printed is kept."""
    strategy = strategy_of(rank, case)
    strategy.setup_distributed()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        model, optimizer, _ = prepared(strategy)
        logits = model(batch(0, rank.rank, 0), is_broken=rank.rank == rank.world_size - 1)
        loss = logits.mean()
        strategy.backward(loss, model, optimizer)
        result = strategy.optimizer_step(optimizer, model, None, is_boundary=True)
    words = {"reason": str(result.skipped_reason), "stepped": str(result.stepped), "printed": printed.getvalue()}
    return Found(words=words, tensors={})


def average_and_copy(rank: Rank, case: Case) -> Found:
    """Average a prepared model into a prepared one and a plain one, and make a plain copy of the first."""
    strategy = strategy_of(rank, case)
    strategy.setup_distributed()
    model, *_ = prepared(strategy)
    average, plain_average = strategy.prepare(new_model(1)), new_model(1)
    strategy.moving_average(model, average, 0.75)
    strategy.moving_average(model, plain_average, 0.75)
    plain = build_plain_model(unwrap_model=strategy.unwrap_model, named_tensors=strategy.named_tensors)(model)
    with torch.no_grad():
        forward = average(batch(0, 0, 0))
    return Found(
        words={"type": type(plain).__name__, "tied": str(plain.head.weight is plain.embedding.weight)},
        tensors={
            **{f"average.{name}": tensor.clone() for name, tensor in strategy.named_tensors(average)},
            **{f"plain.{name}": tensor.detach() for name, tensor in plain_average.state_dict().items()},
            **{f"copy.{name}": tensor.detach() for name, tensor in plain.state_dict().items()},
            "forward": forward,
        },
    )


def mix(rank: Rank, case: Case) -> Found:
    """Reach an expert of one's own on each rank, of equal shapes, and then all of them."""
    strategy = strategy_of(rank, case)
    strategy.setup_distributed()
    model, optimizer, _ = prepared(strategy)
    words: dict[str, str] = {}
    for name, experts in (("own", (rank.rank,)), ("all", (0, 1))):
        strategy.backward(loss_of(model, batch(0, rank.rank, 0), experts), model, optimizer)
        try:
            words[name] = str(strategy.optimizer_step(optimizer, model, None, is_boundary=True).stepped)
        except StepError as error:
            words[name] = str(error)
    return Found(words=words, tensors={})


def reach_nothing(rank: Rank, case: Case) -> Found:
    """Step with a loss that the model was called for, and that depends on none of its parameters."""
    strategy = strategy_of(rank, case)
    strategy.setup_distributed()
    model, optimizer, _ = prepared(strategy)
    before = {name: tensor.clone() for name, tensor in strategy.named_tensors(model)}
    loss = loss_of(model, batch(0, rank.rank, 0), (0, 1)).detach() * torch.ones((), requires_grad=True)
    strategy.backward(loss, model, optimizer)
    words = {"moved": "nothing"}
    try:
        strategy.optimizer_step(optimizer, model, None, is_boundary=True)
    except StepError as error:
        words["error"] = str(error)
    for name, tensor in strategy.named_tensors(model):
        if not torch.equal(tensor, before[name]):
            words["moved"] = name
    return Found(words=words, tensors={})


def copy_shards(rank: Rank, case: Case) -> Found:
    """Let an average and a loaded model, whose shards are written by no optimizer, compute what they hold."""
    strategy = strategy_of(rank, case)
    strategy.setup_distributed()
    trainable, average = prepared(strategy), strategy.prepare(new_model(1))
    ids = batch(0, 0, 0)
    strategy.save_ckpt(trainable, rank.directory / "saved", step=1)
    with torch.no_grad():
        saved, _ = trainable.model(ids), average(ids)
    steps(strategy, trainable, case, rank.rank, range(2))
    strategy.moving_average(trainable.model, average, 0.0)
    with torch.no_grad():
        stepped, averaged = trainable.model(ids), average(ids)
    strategy.load_ckpt(trainable, rank.directory / "saved")
    with torch.no_grad():
        loaded = trainable.model(ids)
    return Found(words={}, tensors={"saved": saved, "loaded": loaded, "stepped": stepped, "averaged": averaged})


def steps(strategy: Strategy, trainable: Trainable, case: Case, rank: int, numbers: range) -> dict[str, Tensor]:
    """Train, and return the tensors at the end."""
    model, optimizer, scheduler = trainable
    for step in numbers:
        for micro in range(case.micro_batches):
            strategy.backward(loss_of(model, batch(step, rank, micro), (0, 1)), model, optimizer)
            strategy.optimizer_step(optimizer, model, scheduler)
    return {name: tensor.clone() for name, tensor in strategy.named_tensors(model)}


def resume(rank: Rank, case: Case) -> Found:
    """Save two steps of one stage, load them into every stage, and train on."""
    strategy = strategy_of(rank, case)
    strategy.setup_distributed()
    trainable = prepared(strategy)
    steps(strategy, trainable, case, rank.rank, range(2))
    strategy.save_ckpt(trainable, rank.directory / "saved", step=1)
    tensors = {f"saved.{name}": each for name, each in steps(strategy, trainable, case, rank.rank, range(2, 4)).items()}
    for stage in range(4):
        other = strategy_of(rank, attrs.evolve(case, stage=stage))
        resumed = prepared(other, seed=1)
        other.load_ckpt(resumed, rank.directory / "saved")
        found = steps(other, resumed, case, rank.rank, range(2, 4))
        tensors |= {f"{stage}.{name}": each for name, each in found.items()}
    return Found(words={}, tensors=tensors)
