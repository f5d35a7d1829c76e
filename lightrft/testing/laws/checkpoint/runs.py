"""Small training runs that are saved, resumed and compared: what the laws about checkpoints share."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeAlias, cast

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightrft.data.sampler import ResumableSampler
from lightrft.errors import LawError
from lightrft.strategy.protocols import BackgroundSaves, Checkpointable, Json, LoadedCheckpoint, StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.models import ModelCase, build_model, model_cases
from lightrft.testing.subject import Rank

__all__ = [
    "Live",
    "RunCase",
    "Trace",
    "begin",
    "continue_data",
    "data_state",
    "load",
    "named_bits",
    "require_equal_traces",
    "run_cases",
    "save",
    "seed_streams",
    "trace",
]

Form: TypeAlias = Literal["trainable", "plain", "several"]
"""How what is saved is passed: a `Trainable`, a model with `optimizer=` and `scheduler=`, or several models by name."""

_BATCH = 2
_LR = 0.0625


@attrs.frozen(kw_only=True)
class RunCase:
    """A training run.

    Attributes:
        model: the model; further ones have its shapes and other weights.
        form: how it is passed to `save_ckpt` and `load_ckpt`.
        schedule: of the learning rate.
        accumulation_steps: micro-batches of a window.
        max_norm: bound on the gradient norm.
        num_batches: batches of an epoch of a rank.
        seed: of weights and streams.
    """

    model: ModelCase
    form: Form
    schedule: Literal["none", "step", "cosine"]
    accumulation_steps: int
    max_norm: float
    num_batches: int
    seed: int


@attrs.frozen(kw_only=True, eq=False)
class Live:
    """A run in memory.

    Attributes:
        strategy: what it is trained by.
        form: how it is passed to `save_ckpt` and `load_ckpt`.
        trained: the trained models by name.
        reference: a model that is not trained, where several are saved.
        vocabulary: number of token ids.
        loader: of the data.
        batches: what it gives, without end.
    """

    strategy: Strategy
    form: Form
    trained: Mapping[str, Trainable]
    reference: nn.Module | None
    vocabulary: int
    loader: DataLoader[Tensor]
    batches: Iterator[Tensor]


@attrs.frozen(kw_only=True)
class Trace:
    """All that is seen of a stretch of a run.

    Attributes:
        losses: of each micro-batch of each model.
        results: what each call of `optimizer_step` returned.
        parameters: parameters and buffers at the end, by model and name.
        draws: next numbers of the random streams.
        data: the next batch.
    """

    losses: tuple[float, ...]
    results: tuple[StepResult, ...]
    parameters: dict[str, Tensor]
    draws: tuple[float, ...]
    data: tuple[int, ...]


@st.composite
def run_cases(draw: DrawFn) -> RunCase:
    """Return a strategy for training runs."""
    return RunCase(
        model=draw(model_cases(exact=False)),
        form=draw(st.sampled_from(["trainable", "plain", "several", "several"])),
        schedule=draw(st.sampled_from(["none", "step", "cosine", "cosine"])),
        accumulation_steps=draw(st.integers(1, 3)),
        max_norm=draw(st.sampled_from([0.0, 0.5])),
        num_batches=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 100)),
    )


def begin(rank: Rank, case: RunCase, *, seed: int | None = None) -> Live:
    """Return a run that has not begun; the random streams of the process are seeded for it.

    Args:
        rank: where it runs.
        case: what it is.
        seed: of its weights and streams, and of a learning rate of its own; None takes the case's.
    """
    config = attrs.evolve(
        rank.config,
        max_norm=case.max_norm,
        micro_train_batch_size=_BATCH,
        train_batch_size=_BATCH * case.accumulation_steps * rank.world_size,
    )
    strategy = rank.build(config)
    strategy.setup_distributed()
    number = case.seed if seed is None else seed
    # another learning rate where another seed is asked for, so that what is loaded must bring its own
    lr = _LR if number == case.seed else 2 * _LR
    names = ("actor", "critic") if case.form == "several" else ("model",)
    trained = {
        name: _trainable(strategy, attrs.evolve(case.model, seed=number + index), case, lr)
        for index, name in enumerate(names)
    }
    reference = build_model(attrs.evolve(case.model, seed=number + len(names)))
    samples = TensorDataset(torch.arange(_BATCH * case.num_batches * rank.world_size))
    loader = cast("DataLoader[Tensor]", strategy.setup_dataloader(samples, _BATCH))
    seed_streams(number, rank.rank)
    return Live(
        strategy=strategy,
        form=case.form,
        trained=trained,
        reference=strategy.prepare(reference, is_rlhf=True) if case.form == "several" else None,
        vocabulary=case.model.vocabulary,
        loader=loader,
        batches=_without_end(loader),
    )


def seed_streams(seed: int, rank: int) -> None:
    """Seed the random streams of this process, each rank's with a number of its own.

    Args:
        seed: any number.
        rank: of this process.
    """
    number = 1000 * seed + rank
    random.seed(number)
    torch.manual_seed(number)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number)


def trace(live: Live, micro_batches: int, *, at: Mapping[int, Callable[[], object]] | None = None) -> Trace:
    """Train, and return what was seen.

    Args:
        live: the run.
        micro_batches: how many.
        at: what to do before a micro-batch, by its number.
    """
    losses: list[float] = []
    results: list[StepResult] = []
    for number in range(micro_batches):
        if at is not None and number in at:
            at[number]()
        batch_B = next(live.batches)
        for model, optimizer, scheduler in live.trained.values():
            loss = _loss(model, batch_B, live.vocabulary)
            losses.append(loss.item())
            live.strategy.backward(loss, model, optimizer)
            results.append(live.strategy.optimizer_step(optimizer, model, scheduler))
    models = {name: trainable.model for name, trainable in live.trained.items()}
    if live.reference is not None:
        models["reference"] = live.reference
    parameters = {
        f"{owner}.{name}": tensor
        for owner, model in models.items()
        for name, tensor in named_bits(live.strategy, model)
    }
    return Trace(
        losses=tuple(losses),
        results=tuple(results),
        parameters=parameters,
        draws=_draws(),
        data=tuple(next(live.batches).tolist()),
    )


def save(
    live: Live,
    directory: Path,
    *,
    step: int | None = None,
    client_state: Mapping[str, Json] | None = None,
    background: BackgroundSaves | None = None,
) -> Path:
    """Save a run.

    Args:
        live: the run.
        directory: of all its checkpoints.
        step: number of the checkpoint.
        client_state: to save beside it.
        background: writes while training goes on.
    """
    model, optimizer, scheduler = _passed(live)
    return live.strategy.save_ckpt(
        model,
        directory,
        optimizer=optimizer,
        scheduler=scheduler,
        step=step,
        client_state=client_state,
        background=background,
    )


def load(live: Live, directory: Path, *, step: int | None = None) -> LoadedCheckpoint:
    """Load into a run; its data stay where they are.

    Args:
        live: the run.
        directory: of all its checkpoints.
        step: number of the checkpoint.
    """
    model, optimizer, scheduler = _passed(live)
    return live.strategy.load_ckpt(model, directory, optimizer=optimizer, scheduler=scheduler, step=step)


def data_state(live: Live) -> dict[str, Json]:
    """Return where a run's data stand.

    Args:
        live: the run.
    """
    return cast("ResumableSampler", live.loader.sampler).state_dict()


def continue_data(live: Live, state: Json) -> Live:
    """Return the run with its data where another one's stood.

    Args:
        live: the run.
        state: where they stood.
    """
    cast("ResumableSampler", live.loader.sampler).load_state_dict(cast("dict[str, Json]", state))
    return attrs.evolve(live, batches=_without_end(live.loader))


def named_bits(strategy: Strategy, model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return copies of a model's parameters and buffers by name.

    Args:
        strategy: what the model was prepared by.
        model: the prepared model.
    """
    return [(name, tensor.detach().cpu().clone()) for name, tensor in strategy.named_tensors(model)]


def require_equal_traces(seen: Trace, must: Trace, what: str) -> None:
    """Check that two stretches of a run are equal bit for bit.

    Args:
        seen: the one.
        must: what it must be.
        what: what is compared, in words.

    Raises:
        LawError: they differ; the first difference is named.
    """
    for name in ("losses", "results", "draws", "data"):
        if repr(getattr(seen, name)) != repr(getattr(must, name)):  # as text, in which a NaN is equal to a NaN
            raise LawError(f"{what}: {name} are {getattr(seen, name)} and must be {getattr(must, name)}.")
    if list(seen.parameters) != list(must.parameters):
        raise LawError(f"{what}: names are {list(seen.parameters)} and must be {list(must.parameters)}.")
    for name, tensor in must.parameters.items():
        other = seen.parameters[name]
        if other.dtype != tensor.dtype or other.shape != tensor.shape or not _equal_bits(other, tensor):
            raise LawError(f"{what}: {name} is {other.tolist()} and must be {tensor.tolist()}.")


def _equal_bits(first: Tensor, second: Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(flat[0], flat[1])


def _trainable(strategy: Strategy, model_case: ModelCase, case: RunCase, lr: float) -> Trainable:
    model = build_model(model_case)
    optimizer = strategy.create_optimizer(model, lr=lr, weight_decay=0.25)
    return strategy.prepare((model, optimizer, _schedule(case, optimizer)))


def _schedule(case: RunCase, optimizer: Optimizer) -> LRScheduler | None:
    if case.schedule == "none":
        return None
    return StepLR(optimizer, 2, gamma=0.75) if case.schedule == "step" else CosineAnnealingLR(optimizer, 7)


def _without_end(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    while True:
        for (batch_B,) in loader:
            yield batch_B


def _loss(model: nn.Module, batch_B: Tensor, vocabulary: int) -> Tensor:
    shift = random.randrange(7) + int(torch.randint(7, ()))  # noqa: S311 (the stream is what is looked at)
    logits_BTV: Tensor = model(((batch_B + shift) % vocabulary)[:, None])
    return (logits_BTV - 1).square().mean()


def _draws() -> tuple[float, ...]:
    numpy = sys.modules.get("numpy")
    others = [] if numpy is None else [float(numpy.random.random()), float(numpy.random.normal())]
    # normal ones are made in pairs, so the second of each pair is a part of the state
    return (random.random(), random.gauss(), float(torch.rand(())), *others)  # noqa: S311 (as above)


def _passed(live: Live) -> tuple[Checkpointable, Optimizer | None, LRScheduler | None]:
    if live.reference is not None:
        return {**live.trained, "reference": live.reference}, None, None
    only = live.trained["model"]
    return (only.model, only.optimizer, only.scheduler) if live.form == "plain" else (only, None, None)
