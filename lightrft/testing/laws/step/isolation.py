"""Laws of what a step may depend on: its own handles and the settings, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from lightrft.errors import LawError
from lightrft.strategy.protocols import StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.batches import Window, input_ids_of, micro_batch_loss, samples_of
from lightrft.testing.cases.runs import (
    RunCase,
    RunEvidence,
    WindowEvidence,
    forward_backward,
    run_cases,
    settings_of,
    start,
    tensors_of,
    train,
    train_window,
    window_seen,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.comparison import require_same, require_same_run
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@attrs.frozen(kw_only=True)
class _InterleavedCase:
    """Trainings whose calls alternate.

    Attributes:
        runs: two, under the same settings.
        turns: which of them makes the next call, over and over; when it has ended, the other one goes on.
        hands: which of two equal strategies makes it, over and over.
    """

    runs: tuple[RunCase, ...]
    turns: tuple[int, ...] = (0,)
    hands: tuple[int, ...] = (0,)


def _choices() -> SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)


@st.composite
def _two_runs(draw: DrawFn, world_size: int) -> _InterleavedCase:
    first = draw(run_cases(world_size=world_size, exact=False, max_windows=2, max_norms=(0.5, 0.0)))
    second = draw(
        run_cases(
            world_size=world_size,
            exact=False,
            max_windows=2,
            micro_batches=(first.micro_batches,),
            sizes=(first.size,),
            max_norms=(first.max_norm,),
        )
    )
    return _InterleavedCase(runs=(first, second), turns=draw(_choices()), hands=(0,))


@st.composite
def _two_strategies(draw: DrawFn, world_size: int) -> _InterleavedCase:
    case = draw(_two_runs(world_size))
    return attrs.evolve(case, hands=case.turns)


def _interleave(rank: Rank, case: _InterleavedCase) -> list[RunEvidence]:
    settings = settings_of(rank.config, case.runs[0], rank.world_size)
    strategies = [rank.build(settings) for _ in range(2)]
    calls = 0

    def next_strategy() -> Strategy:
        nonlocal calls
        calls += 1
        return strategies[case.hands[(calls - 1) % len(case.hands)]]

    trainables = [start(strategies[0], run) for run in case.runs]
    seen = [RunEvidence(before=tensors_of(strategies[0], trainable.model), windows=[]) for trainable in trainables]
    pending = [
        _calls(next_strategy, trainable, run, rank.rank, evidence.windows)
        for trainable, run, evidence in zip(trainables, case.runs, seen, strict=True)
    ]
    turn = 0
    while pending:
        going = pending[case.turns[turn % len(case.turns)] % len(pending)]
        if next(going, "ended") == "ended":
            pending.remove(going)
        turn += 1
    return seen


def _calls(
    next_strategy: Callable[[], Strategy],
    trainable: Trainable,
    case: RunCase,
    rank: int,
    seen: list[WindowEvidence],
) -> Iterator[str]:
    """Do a training, and yield after every call; what was seen of a window is put into a list."""
    model, optimizer, scheduler = trainable
    for window in case.windows:
        losses: list[float] = []
        results: list[StepResult] = []
        for batch in window.ranks[rank]:
            losses.append(forward_backward(next_strategy(), trainable, batch, case.loss))
            yield "backward"
            results.append(next_strategy().optimizer_step(optimizer, model, scheduler))
            yield "optimizer_step"
        tensors = tensors_of(next_strategy(), model)
        seen.append(WindowEvidence(losses=losses, results=results, tensors=tensors))


def _interleaved_holds(harness: Harness, case: _InterleavedCase) -> None:
    seen = harness.run(_interleave, case)
    for number, run in enumerate(case.runs):
        for rank, alone in enumerate(harness.run(train, run)):
            require_same_run(seen[rank][number], alone, f"rank {rank}, training {number + 1} beside itself alone")


@attrs.frozen(kw_only=True)
class _NoisyCase:
    """A training whose losses are multiplied by random numbers.

    Attributes:
        run: the training.
        seed: of the settings.
        scramble: seed of what the process draws from before the strategy is set up.
    """

    run: RunCase
    seed: int
    scramble: int = 0


@attrs.frozen(kw_only=True, eq=False)
class _NoisyEvidence:
    noise: Tensor
    run: RunEvidence


@st.composite
def _noisy_cases(draw: DrawFn, world_size: int) -> _NoisyCase:
    run = draw(run_cases(world_size=world_size, exact=False, max_windows=2, max_norms=(0.5, 0.0)))
    return _NoisyCase(run=run, seed=draw(st.integers(0, 1000)))


def _train_noisily(rank: Rank, case: _NoisyCase) -> _NoisyEvidence:
    torch.manual_seed(case.scramble)
    strategy = rank.build(attrs.evolve(settings_of(rank.config, case.run, rank.world_size), seed=case.seed))
    model, optimizer, scheduler = start(strategy, case.run)
    noise = torch.rand(4)
    run = RunEvidence(before=tensors_of(strategy, model), windows=[])
    for window in case.run.windows:
        losses: list[float] = []
        results: list[StepResult] = []
        for batch in window.ranks[rank.rank]:
            loss = micro_batch_loss(model(input_ids_of(batch.samples)), batch, case.run.loss) * torch.rand(())
            strategy.backward(loss, model, optimizer)
            losses.append(loss.item())
            results.append(strategy.optimizer_step(optimizer, model, scheduler))
        run.windows.append(WindowEvidence(losses=losses, results=results, tensors=tensors_of(strategy, model)))
    return _NoisyEvidence(noise=noise, run=run)


def _reproducible_holds(harness: Harness, case: _NoisyCase) -> None:
    first = harness.run(_train_noisily, case)
    again = harness.run(_train_noisily, attrs.evolve(case, scramble=1))
    other = harness.run(_train_noisily, attrs.evolve(case, seed=case.seed + 1))
    for rank, (one, two, three) in enumerate(zip(first, again, other, strict=True)):
        where = f"rank {rank}, seed {case.seed} a second time"
        require_same({"noise": two.noise}, {"noise": one.noise}, where)
        require_same_run(two.run, one.run, where)
        if torch.equal(one.noise, three.noise):
            raise LawError(f"rank {rank}: seeds {case.seed} and {case.seed + 1} draw the same {one.noise.tolist()}.")


def _runs(world_size: int) -> SearchStrategy[RunCase]:
    return run_cases(world_size=world_size, exact=False, max_windows=2, max_norms=(0.5, 0.0))


def _train_and_evaluate(rank: Rank, case: RunCase) -> RunEvidence:
    strategy = rank.build(settings_of(rank.config, case, rank.world_size))
    trainable = start(strategy, case)
    seen = RunEvidence(before=tensors_of(strategy, trainable.model), windows=[])
    for window in case.windows:
        steps: list[tuple[float, StepResult]] = []
        for step in train_window(strategy, trainable, window, rank.rank, case.loss):
            _evaluate(trainable, window)
            steps.append(step)
        seen.windows.append(window_seen(strategy, trainable, steps))
    return seen


@torch.no_grad()
def _evaluate(trainable: Trainable, window: Window) -> None:
    trainable.model.eval()
    trainable.model(input_ids_of(samples_of(window)))
    trainable.model.train()


def _evaluation_holds(harness: Harness, case: RunCase) -> None:
    seen, must = harness.run(_train_and_evaluate, case), harness.run(train, case)
    for rank, (one, other) in enumerate(zip(seen, must, strict=True)):
        require_same_run(one, other, f"rank {rank}, with evaluations beside without")


def _zero_rate_holds(harness: Harness, case: RunCase) -> None:
    for rank, seen in enumerate(harness.run(train, attrs.evolve(case, lr=0.0, weight_decay=0.0))):
        for number, window in enumerate(seen.windows, start=1):
            where = f"rank {rank}, window {number}, with a learning rate of 0"
            _require_stepped_once(window.results, where)
            require_same(window.tensors, seen.before, where)


def _require_stepped_once(results: Sequence[StepResult], where: str) -> None:
    if [result.stepped for result in results].count(True) != 1 or results[-1].learning_rate != 0.0:
        raise LawError(f"{where}: results are {list(results)} and the last one alone must have stepped.")


LAWS: tuple[Law, ...] = (
    Law(
        id="step.independence",
        statement="Two models with their optimizers and schedules in one strategy, with their calls in any order, do "
        "what each does alone, bit for bit.",
        check=for_all(_two_runs, _interleaved_holds),
    ),
    Law(
        id="step.separation",
        statement="Two strategies of equal settings, each with a training of its own, do not influence one another.",
        check=for_all(_two_strategies, _interleaved_holds),
    ),
    Law(
        id="step.reproducible",
        statement="The same seed gives the same bits, whatever was drawn before the set-up; another one draws others.",
        check=for_all(_noisy_cases, _reproducible_holds),
    ),
    Law(
        id="step.evaluation",
        statement="A forward pass in evaluation mode, anywhere in a training, changes nothing of it.",
        check=for_all(_runs, _evaluation_holds),
    ),
    Law(
        id="step.zero_rate",
        statement="A step with a learning rate of 0 and no decay changes no parameter.",
        check=for_all(_runs, _zero_rate_holds),
    ),
)
"""The laws."""
