"""Short trainings as plain data, the program that does one on every rank, and what it saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols import StepResult, Trainable
from lightrft.strategy.protocols.training import CreateOptimizer
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.batches import (
    BROKEN,
    LossKind,
    MicroBatch,
    Window,
    equal_windows,
    input_ids_of,
    micro_batch_loss,
)
from lightrft.testing.cases.models import ModelCase, build_model, model_cases
from lightrft.testing.law import Harness
from lightrft.testing.subject import Rank

__all__ = [
    "RunCase",
    "RunEvidence",
    "WindowEvidence",
    "constant_gradient_models",
    "create_optimizer_of",
    "forward_backward",
    "rates_of",
    "run_cases",
    "settings_of",
    "start",
    "tensors_of",
    "train",
    "train_on",
    "train_window",
    "window_seen",
]

DECAYED_RATE = 0.5
"""What the rate of the next step is multiplied with where a schedule is asked for; exact."""


@attrs.frozen(kw_only=True)
class RunCase:
    """A model, what trains it, and what it is trained on.

    Attributes:
        model: the model.
        loss: what is minimised.
        lr: learning rate of the first step.
        weight_decay: decoupled decay of matrices.
        is_halved: whether a schedule halves the learning rate after every step.
        max_norm: bound on the gradient's norm; 0 means none.
        size: samples of a counted micro-batch.
        micro_batches: of one rank in a counted window.
        windows: one for each step.
    """

    model: ModelCase
    loss: LossKind = "linear"
    lr: float = 0.125
    weight_decay: float = 0.0
    is_halved: bool = False
    max_norm: float = 0.0
    size: int = 1
    micro_batches: int = 1
    windows: tuple[Window, ...]


@attrs.frozen(kw_only=True, eq=False)
class WindowEvidence:
    """What one rank saw of one window.

    Attributes:
        losses: of its micro-batches, without their weights.
        results: of its calls of `optimizer_step`, one for each micro-batch.
        tensors: of the plain model, by name, after the window.
    """

    losses: list[float]
    results: list[StepResult]
    tensors: dict[str, Tensor]


@attrs.frozen(kw_only=True, eq=False)
class RunEvidence:
    """What one rank saw of a training.

    Attributes:
        before: tensors of the prepared model before the first window.
        windows: one for each window.
    """

    before: dict[str, Tensor]
    windows: list[WindowEvidence]


def rates_of(case: RunCase) -> list[float]:
    """Return the learning rate of each window.

    Args:
        case: the training.
    """
    return [case.lr * (DECAYED_RATE**number if case.is_halved else 1.0) for number in range(len(case.windows))]


def settings_of(config: StrategyConfig, case: RunCase, world_size: int) -> StrategyConfig:
    """Return the settings of the training.

    Args:
        config: settings to start from.
        case: the training.
        world_size: number of ranks.
    """
    return attrs.evolve(
        config,
        max_norm=case.max_norm,
        micro_train_batch_size=case.size,
        train_batch_size=case.size * case.micro_batches * world_size,
    )


def create_optimizer_of(harness: Harness, case: RunCase) -> CreateOptimizer:
    """Return what makes optimizers under the settings of the training, for plain models.

    Args:
        harness: what is held to a law.
        case: the training.
    """
    settings = settings_of(harness.subject.config, case, harness.world_size)
    return harness.subject.build(settings).create_optimizer


def start(strategy: Strategy, case: RunCase) -> Trainable:
    """Return the model prepared for training, with its optimizer and schedule.

    Args:
        strategy: any strategy.
        case: the training.
    """
    strategy.setup_distributed()
    with strategy.init_model_context():
        model = build_model(case.model)
    optimizer = strategy.create_optimizer(model, lr=case.lr, weight_decay=case.weight_decay)
    return strategy.prepare((model, optimizer, ExponentialLR(optimizer, DECAYED_RATE) if case.is_halved else None))


def tensors_of(strategy: Strategy, model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's tensors by name.

    Args:
        strategy: any strategy.
        model: a prepared model.
    """
    return {name: tensor.detach().cpu().clone() for name, tensor in strategy.named_tensors(model)}


def forward_backward(
    strategy: Strategy,
    trainable: Trainable,
    batch: MicroBatch,
    kind: LossKind,
    *,
    is_boundary: bool | None = None,
) -> float:
    """Add the gradient of a micro-batch, and return its loss.

    Args:
        strategy: any strategy.
        trainable: what is trained.
        batch: the micro-batch.
        kind: which loss.
        is_boundary: what backward is told of the window's end.
    """
    broken = None if batch.fault is None else BROKEN.get(batch.fault)
    logits_BTV = trainable.model(input_ids_of(batch.samples), broken)
    loss = micro_batch_loss(logits_BTV, batch, kind)
    strategy.backward(loss, trainable.model, trainable.optimizer, weight=batch.weight, is_boundary=is_boundary)
    return loss.item()


def train_window(
    strategy: Strategy, trainable: Trainable, window: Window, rank: int, kind: LossKind
) -> Iterator[tuple[float, StepResult]]:
    """Train on one rank's part of a window; yield (loss, result) after every micro-batch.

    Args:
        strategy: any strategy.
        trainable: what is trained.
        window: the window.
        rank: number of the rank.
        kind: which loss.
    """
    batches = window.ranks[rank]
    model, optimizer, scheduler = trainable
    for number, batch in enumerate(batches, start=1):
        loss = forward_backward(strategy, trainable, batch, kind)
        is_boundary = None if window.is_counted else number == len(batches)
        yield loss, strategy.optimizer_step(optimizer, model, scheduler, is_boundary=is_boundary)


def train(rank: Rank, case: RunCase) -> RunEvidence:
    """Do the training, and return what this rank saw.

    Args:
        rank: where it runs.
        case: the training.
    """
    strategy = rank.build(settings_of(rank.config, case, rank.world_size))
    return train_on(strategy, start(strategy, case), case, rank.rank)


def train_on(strategy: Strategy, trainable: Trainable, case: RunCase, rank: int) -> RunEvidence:
    """Do the training with what is prepared, and return what this rank saw.

    Args:
        strategy: any strategy.
        trainable: what is trained.
        case: the training.
        rank: number of the rank.
    """
    seen = RunEvidence(before=tensors_of(strategy, trainable.model), windows=[])
    for window in case.windows:
        steps = list(train_window(strategy, trainable, window, rank, case.loss))
        seen.windows.append(window_seen(strategy, trainable, steps))
    return seen


def window_seen(strategy: Strategy, trainable: Trainable, steps: Sequence[tuple[float, StepResult]]) -> WindowEvidence:
    """Return what was seen of a window that has just ended.

    Args:
        strategy: any strategy.
        trainable: what is trained.
        steps: (loss, result) of each micro-batch.
    """
    return WindowEvidence(
        losses=[loss for loss, _ in steps],
        results=[result for _, result in steps],
        tensors=tensors_of(strategy, trainable.model),
    )


@st.composite
def constant_gradient_models(draw: DrawFn) -> ModelCase:
    """Return a strategy for models whose linear loss has a gradient that does not depend on what is trained.

    So the gradient is without rounding error at every step of a run, whatever the optimizer makes of the weights.

    Args:
        draw: hypothesis' own.
    """
    case = draw(model_cases())
    return attrs.evolve(case, tied=False, frozen=("bias", "embedding", "middle", "scale"))


@st.composite
def run_cases(
    draw: DrawFn,
    *,
    world_size: int,
    exact: bool,
    min_windows: int = 1,
    max_windows: int = 3,
    micro_batches: Sequence[int] = (1, 2, 3),
    sizes: Sequence[int] = (1, 2),
    max_norms: Sequence[float] = (0.0,),
    weight_decays: Sequence[float] = (0.0, 0.25),
) -> RunCase:
    """Return a strategy for trainings of equal micro-batches that the strategy counts.

    Args:
        draw: hypothesis' own.
        world_size: number of ranks.
        exact: whether every gradient is without rounding error, apart from what `micro_batches` and `world_size` that
            are no powers of two make.
        min_windows: at least 1.
        max_windows: at least as many.
        micro_batches: what their number on one rank is drawn from.
        sizes: what the samples of a micro-batch are drawn from.
        max_norms: what the bound is drawn from.
        weight_decays: what the decay is drawn from; with one there is more than one group of parameters.
    """
    num_windows = draw(st.integers(min_windows, max_windows))
    models = constant_gradient_models() if exact and num_windows > 1 else model_cases(exact=exact)
    model = draw(models)
    number, size = draw(st.sampled_from(micro_batches)), draw(st.sampled_from(sizes))
    windows = equal_windows(vocabulary=model.vocabulary, world_size=world_size, micro_batches=number, size=size)
    return RunCase(
        model=model,
        loss="linear" if exact else "cross_entropy",
        lr=draw(st.sampled_from([0.125, 0.015625])),
        weight_decay=draw(st.sampled_from(weight_decays)),
        is_halved=draw(st.booleans()),
        max_norm=draw(st.sampled_from(max_norms)),
        size=size,
        micro_batches=number,
        windows=tuple(draw(windows) for _ in range(num_windows)),
    )
