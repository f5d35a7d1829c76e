"""A small run that calls most functions of a strategy once or twice: what must not change a bit is seen by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols import Completion, Prompt, SamplingParams, StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.models import ModelCase, build_model, model_cases
from lightrft.testing.cases.runs import tensors_of
from lightrft.testing.subject import Rank

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = [
    "PickStrategy",
    "SmallRunCase",
    "SmallRunEvidence",
    "prepared",
    "run_difference",
    "small_run",
    "small_run_cases",
    "small_run_config",
]

_NUM_SAMPLES = 16  # enough for four ranks


class PickStrategy(Protocol):
    """Says which strategy the next call goes to."""

    def __call__(self) -> Strategy:
        """Return the strategy."""
        ...


@attrs.frozen(kw_only=True)
class SmallRunCase:
    """A run.

    Attributes:
        model: what is trained.
        micro_batches: of one rank in a window.
        max_norm: bound on the gradient's norm; 0 means none.
        seed: the config's.
    """

    model: ModelCase
    micro_batches: int
    max_norm: float
    seed: int


@attrs.frozen(kw_only=True, eq=False)
class SmallRunEvidence:
    """What one rank saw of a run.

    Attributes:
        losses: of all micro-batches.
        results: of all calls of `optimizer_step`.
        reduced: mean over ranks of each loss.
        draws: of torch's random stream, after each window.
        tensors: of the model, by name, at the end.
        average: tensors of its moving average, by name.
        completions: what the engine "scripted" made with the weights at the end; none of another engine.
        step: of the checkpoint that was loaded.
        capabilities: of the strategy, in order.
    """

    losses: list[float]
    results: list[StepResult]
    reduced: list[float]
    draws: list[float]
    tensors: dict[str, Tensor]
    average: dict[str, Tensor]
    completions: list[Completion]
    step: int
    capabilities: list[str]


def small_run_cases() -> SearchStrategy[SmallRunCase]:
    """Return a strategy for runs."""
    return st.builds(
        SmallRunCase,
        model=model_cases(),
        micro_batches=st.sampled_from([2, 1]),
        max_norm=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 3),
    )


def small_run_config(config: StrategyConfig, case: SmallRunCase, world_size: int) -> StrategyConfig:
    """Return the settings of a run.

    Args:
        config: settings to start from.
        case: the run.
        world_size: number of ranks.
    """
    return attrs.evolve(
        config,
        seed=case.seed,
        max_norm=case.max_norm,
        micro_train_batch_size=1,
        train_batch_size=case.micro_batches * world_size,
    )


def small_run(pick: PickStrategy, rank: Rank, case: SmallRunCase, directory: Path) -> SmallRunEvidence:
    """Train two windows, save, train one more, load, train it again, and return what this rank saw.

    Args:
        pick: says which strategy each call goes to.
        rank: where it runs.
        case: the run.
        directory: where checkpoints go; the same on every rank, and of this run alone.
    """
    pick().setup_distributed()
    trainable, average = _with_average(pick, case)
    losses, results, draws = list[float](), list[StepResult](), list[float]()
    dataset = cast("Dataset[int]", list(range(_NUM_SAMPLES)))  # torch takes whatever has a length and items
    tokens = [int(batch) for batch in pick().setup_dataloader(dataset, 1)]

    def train_window(number: int) -> None:
        for token in tokens[number : number + case.micro_batches]:
            logits_BTV = trainable.model(torch.tensor([[token % case.model.vocabulary]]))
            loss = (logits_BTV - 1.0).square().mean()
            pick().backward(loss, trainable.model, trainable.optimizer)
            results.append(pick().optimizer_step(trainable.optimizer, trainable.model, trainable.scheduler))
            losses.append(loss.item())
        pick().moving_average(trainable.model, average, 0.75)
        draws.append(torch.rand(()).item())

    train_window(0)
    train_window(1)
    pick().save_ckpt(trainable, directory, step=3, client_state={"number": 2})
    train_window(2)
    loaded = pick().load_ckpt(trainable, directory)
    train_window(2)
    pick().barrier()
    return SmallRunEvidence(
        losses=losses,
        results=results,
        reduced=[pick().all_reduce(loss) for loss in losses],
        draws=draws,
        tensors=tensors_of(pick(), trainable.model),
        average=tensors_of(pick(), average),
        completions=_completions(pick, rank, trainable),
        step=loaded.step,
        capabilities=sorted(pick().capabilities),
    )


def prepared(strategy: Strategy, case: SmallRunCase) -> Trainable:
    """Return the model of a run, prepared, with its optimizer and schedule.

    Args:
        strategy: after its set-up.
        case: the run.
    """

    def pick() -> Strategy:
        return strategy

    return _with_average(pick, case)[0]


def _with_average(pick: PickStrategy, case: SmallRunCase) -> tuple[Trainable, torch.nn.Module]:
    with pick().init_model_context():
        model, average = build_model(case.model), build_model(case.model)
    optimizer = pick().create_optimizer(model, lr=0.125, betas=(0.5, 0.75), weight_decay=0.25)
    trainable = pick().prepare((model, optimizer, ExponentialLR(optimizer, 0.5)))
    return trainable, pick().prepare(average)


def _completions(pick: PickStrategy, rank: Rank, trainable: Trainable) -> list[Completion]:
    if rank.engine.type != "scripted":  # other engines do not take this model
        return []
    with pick().setup_inference_engine(rank.engine, actor=trainable.model) as engine, torch.no_grad():
        pick().update_engine_weights(engine, trainable.model)
        pick().maybe_sleep_inference_engine(engine)
        pick().wakeup_inference_engine(engine)
        prompts = [Prompt(token_ids=(rank.rank % 2, 1))]
        return pick().gather_and_generate(engine, prompts, SamplingParams(max_new_tokens=3, temperature=1.0))


def run_difference(seen: SmallRunEvidence, wanted: SmallRunEvidence) -> str | None:
    """Return in words where two runs differ, or None if no bit does.

    Args:
        seen: one run.
        wanted: the run that it must equal.
    """
    for field in attrs.fields(SmallRunEvidence):
        found, asked = getattr(seen, field.name), getattr(wanted, field.name)
        if isinstance(found, dict):
            difference = _tensor_difference(cast("dict[str, Tensor]", found), cast("dict[str, Tensor]", asked))
        else:
            difference = None if found == asked else f"{found} instead of {asked}"
        if difference is not None:
            return f"{field.name}: {difference}"
    return None


def _tensor_difference(seen: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    if seen.keys() != wanted.keys():
        return f"the names {sorted(seen)} instead of {sorted(wanted)}"
    different = [name for name, tensor in seen.items() if not torch.equal(tensor, wanted[name])]
    return f"{different[0]!r} is {seen[different[0]]} instead of {wanted[different[0]]}" if different else None
