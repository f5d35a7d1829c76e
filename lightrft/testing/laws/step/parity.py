"""Laws of whole trainings: every step is the one of a loop in raw torch, at the rate that the settings ask for."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from lightrft.errors import LawError
from lightrft.strategy.config import StrategyConfig
from lightrft.testing.cases.batches import equal_windows
from lightrft.testing.cases.models import ModelCase, build_model
from lightrft.testing.cases.runs import (
    RunCase,
    RunEvidence,
    create_optimizer_of,
    run_cases,
    settings_of,
    train_on,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.comparison import require_close_run, require_near
from lightrft.testing.reference.training import rate_factors
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_Kind: TypeAlias = Literal["constant", "cosine", "linear"]


@attrs.frozen(kw_only=True)
class _ScheduledCase:
    """A training whose optimizer and schedule come from the settings.

    Attributes:
        run: the training.
        betas: setting `adam_betas`.
        kind: setting `lr_scheduler`.
        warmup_ratio: setting `lr_warmup_ratio`.
        min_ratio: setting `min_lr_ratio`.
        max_steps: length of the schedule, at least the number of windows.
    """

    run: RunCase
    betas: tuple[float, float] = (0.9, 0.95)
    kind: _Kind
    warmup_ratio: float
    min_ratio: float
    max_steps: int


def _scheduled_settings(config: StrategyConfig, case: _ScheduledCase, world_size: int) -> StrategyConfig:
    return attrs.evolve(
        settings_of(config, case.run, world_size),
        actor_learning_rate=case.run.lr,
        adam_betas=case.betas,
        l2=case.run.weight_decay,
        lr_scheduler=case.kind,
        lr_warmup_ratio=case.warmup_ratio,
        min_lr_ratio=case.min_ratio,
    )


def _rates(case: _ScheduledCase) -> list[float]:
    factors = rate_factors(
        case.kind, num_steps=case.max_steps, warmup_ratio=case.warmup_ratio, min_ratio=case.min_ratio
    )
    return [case.run.lr * factor for factor in factors[: len(case.run.windows)]]


@st.composite
def _parity_cases(draw: DrawFn, world_size: int) -> _ScheduledCase:
    run = draw(run_cases(world_size=world_size, exact=False, micro_batches=(1, 2), max_norms=(0.5, 0.125, 0.0)))
    return _ScheduledCase(
        run=attrs.evolve(run, is_halved=False),
        betas=draw(st.sampled_from([(0.9, 0.95), (0.5, 0.75)])),
        kind=draw(st.sampled_from(["constant", "cosine", "linear"])),
        warmup_ratio=draw(st.sampled_from([0.0, 0.3, 0.5])),
        min_ratio=draw(st.sampled_from([0.1, 0.0])),
        max_steps=len(run.windows) + draw(st.integers(0, 3)),
    )


def _train_scheduled(rank: Rank, case: _ScheduledCase) -> RunEvidence:
    strategy = rank.build(_scheduled_settings(rank.config, case, rank.world_size))
    strategy.setup_distributed()
    with strategy.init_model_context():
        model = build_model(case.run.model)
    trainable, *_ = strategy.prepare_models_and_optimizers(model, None, None, None, max_steps=case.max_steps)
    return train_on(strategy, trainable, case.run, rank.rank)


def _parity_holds(harness: Harness, case: _ScheduledCase) -> None:
    seen = harness.run(_train_scheduled, case)
    require_close_run(seen, case.run, create_optimizer_of(harness, case.run), betas=case.betas, rates=_rates(case))


@st.composite
def _schedule_cases(draw: DrawFn, world_size: int) -> _ScheduledCase:
    max_steps = draw(st.integers(1, 12))
    # a gradient that does not grow with the weights, so that no rate makes a right training diverge
    model = ModelCase(vocabulary=2, hidden=1, frozen=("bias", "embedding", "middle", "scale"))
    micro_batches = draw(st.sampled_from([1, 2]))
    window = equal_windows(vocabulary=2, world_size=world_size, micro_batches=micro_batches, size=1)
    run = RunCase(
        model=model,
        lr=draw(st.floats(1e-6, 1.0)),
        micro_batches=micro_batches,
        windows=(draw(window),) * max_steps,
    )
    return _ScheduledCase(
        run=run,
        kind=draw(st.sampled_from(["constant", "cosine", "linear"])),
        warmup_ratio=draw(st.sampled_from([0.0, 0.03, 0.5, 1.0]) | st.floats(0.0, 1.0)),
        min_ratio=draw(st.sampled_from([0.1, 0.0, 1.0])),
        max_steps=max_steps,
    )


def _schedule_holds(harness: Harness, case: _ScheduledCase) -> None:
    for rank, evidence in enumerate(harness.run(_train_scheduled, case)):
        for number, (window, rate) in enumerate(zip(evidence.windows, _rates(case), strict=True)):
            where = f"rank {rank}, step {number + 1} of {case.max_steps}"
            if not window.results[-1].stepped:
                raise LawError(f"{where}: the result is {window.results[-1]} and must have stepped.")
            for result in window.results:
                # two ways to write a cosine differ by some of the last bits of the peak
                require_near("learning_rate", result.learning_rate, rate, 1e-9 * case.run.lr, where)


LAWS: tuple[Law, ...] = (
    Law(
        id="step.parity",
        statement="Every step of a training with a real loss, clipping, decay and schedule is that of the loop in raw "
        "torch: loss, norm and every parameter.",
        check=for_all(_parity_cases, _parity_holds),
    ),
    Law(
        id="step.schedule",
        statement="The rate of each step rises over lr_warmup_ratio of the steps, and then follows lr_scheduler down "
        "to min_lr_ratio at the last one.",
        check=for_all(_schedule_cases, _schedule_holds),
    ),
)
"""The laws."""
