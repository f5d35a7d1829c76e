"""Laws of single weights under training: tied, frozen, decayed, averaged, moved to the host, and in bfloat16."""

from __future__ import annotations

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

from lightrft.errors import ConfigError, LawError
from lightrft.strategy.protocols import StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.batches import MicroBatch, Window, input_ids_of, samples_of
from lightrft.testing.cases.models import ModelCase, SmallModel, build_model, model_cases
from lightrft.testing.cases.runs import (
    RunCase,
    RunEvidence,
    run_cases,
    settings_of,
    start,
    tensors_of,
    train,
    train_on,
    train_window,
    window_seen,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.reference.comparison import require_close, require_same, require_same_run
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


def _decayed_runs(world_size: int) -> SearchStrategy[RunCase]:
    cases = run_cases(world_size=world_size, exact=False, max_windows=2, micro_batches=(1, 2))
    return cases.map(_with_decay)


def _with_decay(case: RunCase) -> RunCase:
    return attrs.evolve(case, weight_decay=0.25)


def _frozen_holds(harness: Harness, case: RunCase) -> None:
    model = build_model(case.model)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    tensors = model.state_dict(keep_vars=True)
    still = [name for name, tensor in tensors.items() if id(tensor) not in trained]
    for rank, evidence in enumerate(harness.run(train, case)):
        for number, window in enumerate(evidence.windows, start=1):
            where = f"rank {rank}, window {number}, what asks for no gradient"
            require_same(_chosen(window.tensors, still), _chosen(dict(model.state_dict()), still), where)


def _chosen(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names if name in tensors}


def _tied_runs(world_size: int) -> SearchStrategy[RunCase]:
    return _decayed_runs(world_size).map(_with_tied)


def _with_tied(case: RunCase) -> RunCase:
    return attrs.evolve(case, model=attrs.evolve(case.model, tied=True))


@attrs.frozen(kw_only=True, eq=False)
class _TiedEvidence:
    run: RunEvidence
    is_shared: bool


def _train_tied(rank: Rank, case: RunCase) -> _TiedEvidence:
    strategy = rank.build(settings_of(rank.config, case, rank.world_size))
    trainable = start(strategy, case)
    run = train_on(strategy, trainable, case, rank.rank)
    plain = strategy.unwrap_model(trainable.model)
    is_shared = isinstance(plain, SmallModel) and plain.head.weight is plain.embedding.weight
    return _TiedEvidence(run=run, is_shared=is_shared)


def _tied_holds(harness: Harness, case: RunCase) -> None:
    for rank, evidence in enumerate(harness.run(_train_tied, case)):
        if not evidence.is_shared:
            raise LawError(f"rank {rank}: head and embedding of the unwrapped model are two weights and must be one.")
        for number, tensors in enumerate([evidence.run.before, *(window.tensors for window in evidence.run.windows)]):
            head, embedding = tensors.get("head.weight"), tensors.get("embedding.weight")
            if head is None or embedding is None:
                raise LawError(f"rank {rank}: named_tensors gives {list(tensors)} and must give both tied names.")
            require_same({"head.weight": head}, {"head.weight": embedding}, f"rank {rank}, after window {number}, tied")


@st.composite
def _idle_runs(draw: DrawFn, world_size: int) -> RunCase:
    case = _with_decay(draw(run_cases(world_size=world_size, exact=True, max_windows=1, micro_batches=(1,))))
    window = case.windows[0]
    ranks = tuple(tuple(_without_gradient(batch) for batch in batches) for batches in window.ranks)
    return attrs.evolve(case, windows=(attrs.evolve(window, ranks=ranks),))


def _without_gradient(batch: MicroBatch) -> MicroBatch:
    return attrs.evolve(batch, samples=tuple(attrs.evolve(sample, coefficient=0) for sample in batch.samples))


def _decay_holds(harness: Harness, case: RunCase) -> None:
    model = build_model(case.model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plain = model.state_dict()
    decayed = {name for name, parameter in parameters.items() if parameter.requires_grad and parameter.dim() >= 2}
    shrunk = {name: plain[name] * (1 - case.lr * case.weight_decay) for name in decayed}
    # a product of numbers near 1, which optimizers may round once or twice
    tolerances = {name: tensor.double().abs() * 1e-6 for name, tensor in shrunk.items()}
    for rank, evidence in enumerate(harness.run(train, case)):
        where = f"rank {rank}, a step without gradient"
        tensors = evidence.windows[0].tensors
        rest = [name for name in plain if name not in decayed]
        require_same(_chosen(tensors, rest), _chosen(dict(plain), rest), f"{where}, what is no matrix")
        require_close({name: tensors[name] for name in shrunk}, shrunk, tolerances, f"{where}, matrices")


@attrs.frozen(kw_only=True)
class _AverageCase:
    """A model, the seed of its average, and how much of that stays."""

    model: ModelCase
    average_seed: int
    beta: float


@attrs.frozen(kw_only=True, eq=False)
class _AverageEvidence:
    """The model and its average after one move, what refused calls raised, and the average after those."""

    model: dict[str, Tensor]
    average: dict[str, Tensor]
    refused: list[str]
    after_refusals: dict[str, Tensor]


@st.composite
def _average_cases(draw: DrawFn, world_size: int) -> _AverageCase:
    del world_size
    beta = draw(st.sampled_from([0.992, 0.75, 0.0, 1.0]) | st.floats(0.0, 1.0))
    return _AverageCase(model=draw(model_cases(exact=False)), average_seed=draw(st.integers(0, 100)), beta=beta)


def _average(rank: Rank, case: _AverageCase) -> _AverageEvidence:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    model = strategy.prepare(build_model(case.model))
    average = strategy.prepare(build_model(attrs.evolve(case.model, seed=case.average_seed)))
    wider = strategy.prepare(build_model(attrs.evolve(case.model, hidden=case.model.hidden + 1)))
    strategy.moving_average(model, average, case.beta)
    after = tensors_of(strategy, average)
    refused = [
        _refused(strategy, model, average, -0.25),
        _refused(strategy, model, average, 1.25),
        _refused(strategy, wider, average, 0.5),
    ]
    return _AverageEvidence(
        model=tensors_of(strategy, model),
        average=after,
        refused=refused,
        after_refusals=tensors_of(strategy, average),
    )


def _refused(strategy: Strategy, model: nn.Module, average: nn.Module, beta: float) -> str:
    try:
        strategy.moving_average(model, average, beta)
    except ConfigError:
        return "ConfigError"
    return "accepted"


def _average_holds(harness: Harness, case: _AverageCase) -> None:
    plain = build_model(case.model)
    model, before = plain.state_dict(), build_model(attrs.evolve(case.model, seed=case.average_seed)).state_dict()
    averaged = dict(plain.named_parameters(remove_duplicate=False))
    must = {
        name: (case.beta * tensor.double() + (1 - case.beta) * model[name].double()).float()
        if name in averaged
        else tensor
        for name, tensor in before.items()
    }
    # weights are at most 1, and float32 rounds the two products, their sum and 1 - beta
    tolerances = {name: torch.full_like(tensor, 1e-6, dtype=torch.float64) for name, tensor in must.items()}
    for rank, evidence in enumerate(harness.run(_average, case)):
        require_same(evidence.model, model, f"rank {rank}, the model that was averaged")
        require_close(evidence.average, must, tolerances, f"rank {rank}, the average with beta={case.beta!r}")
        if evidence.refused != ["ConfigError"] * 3:
            raise LawError(
                f"rank {rank}: beta=-0.25, beta=1.25 and a wider model are {evidence.refused} and must be ConfigError."
            )
        require_same(evidence.after_refusals, evidence.average, f"rank {rank}, after refused calls")


def _moved_runs(world_size: int) -> SearchStrategy[RunCase]:
    return run_cases(world_size=world_size, exact=False, max_windows=3, micro_batches=(1, 2), max_norms=(0.5, 0.0))


def _train_offloaded(rank: Rank, case: RunCase) -> RunEvidence:
    strategy = rank.build(settings_of(rank.config, case, rank.world_size))
    trainable = start(strategy, case)
    seen = RunEvidence(before=tensors_of(strategy, trainable.model), windows=[])
    for window in case.windows:
        steps: list[tuple[float, StepResult]] = []
        _move(strategy, trainable)
        for step in train_window(strategy, trainable, window, rank.rank, case.loss):
            _move(strategy, trainable)
            steps.append(step)
        seen.windows.append(window_seen(strategy, trainable, steps))
    return seen


def _move(strategy: Strategy, trainable: Trainable) -> None:
    for _ in range(2):  # a second time does nothing
        strategy.offload(trainable.model, trainable.optimizer)
    for _ in range(2):
        strategy.reload(trainable.model, trainable.optimizer)


def _offload_holds(harness: Harness, case: RunCase) -> None:
    seen, must = harness.run(_train_offloaded, case), harness.run(train, case)
    for rank, (one, other) in enumerate(zip(seen, must, strict=True)):
        require_same_run(one, other, f"rank {rank}, with offload and reload beside without")


@st.composite
def _bf16_cases(draw: DrawFn, world_size: int) -> RunCase:
    case = draw(run_cases(world_size=world_size, exact=True, max_windows=1, micro_batches=(1,)))
    # a step that float32 holds beside a weight of 1, and bfloat16, whose next number is 1/128 away, does not
    return attrs.evolve(case, loss="cross_entropy", lr=2.0**-12, weight_decay=0.0, is_halved=False)


def _train_bf16(rank: Rank, case: RunCase) -> RunEvidence:
    strategy = rank.build(attrs.evolve(settings_of(rank.config, case, rank.world_size), bf16=True))
    return train_on(strategy, start(strategy, case), case, rank.rank)


def _bf16_holds(harness: Harness, case: RunCase) -> None:
    wide, narrow = harness.run(train, case), harness.run(_train_bf16, case)
    window = case.windows[0]
    for rank, (one, other) in enumerate(zip(wide, narrow, strict=True)):
        where = f"rank {rank}, in bfloat16"
        kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in one.before.items()}
        seen, must = other.windows[0], one.windows[0]
        if {name: (tensor.dtype, tensor.shape) for name, tensor in seen.tensors.items()} != kinds:
            raise LawError(f"{where}: the tensors are {_dtypes(seen.tensors)} and must be {_dtypes(one.before)}.")
        # five roundings of 2**-9 to a token, in two tokens whose loss moves twice with the logits; their size is that
        # of a model without signs, in which nothing cancels
        bound = 2 * 2 * 5 * 2.0**-9 * _largest_logit(case.model, window)
        if not abs(seen.losses[0] - must.losses[0]) <= bound:
            raise LawError(f"{where}: the loss is {seen.losses[0]} and must be {must.losses[0]}, within {bound:.3g}.")
        is_moved = any(not torch.equal(seen.tensors[name], other.before[name]) for name in kinds)
        must_move = any(not torch.equal(must.tensors[name], one.before[name]) for name in kinds)
        if (must.results[-1].grad_norm or 0.0) > 0.25 and is_moved != must_move:
            raise LawError(f"{where}: a step of 2**-12 is lost, and parameters must stay float32.")


def _dtypes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: str(tensor.dtype) for name, tensor in tensors.items()}


@torch.no_grad()
def _largest_logit(case: ModelCase, window: Window) -> float:
    model = build_model(case)
    for parameter in model.parameters():
        parameter.abs_()  # the offset has no signs
    return max(1.0, float(model(input_ids_of(samples_of(window))).max()))


LAWS: tuple[Law, ...] = (
    Law(
        id="training.frozen",
        statement="Parameters that ask for no gradient, and buffers, stay as they are, bit for bit, under weight decay "
        "too.",
        check=for_all(_decayed_runs, _frozen_holds),
    ),
    Law(
        id="training.tied",
        statement="Tied weights stay one weight through prepare and every step, and come under each of their names.",
        check=for_all(_tied_runs, _tied_holds),
    ),
    Law(
        id="training.decay",
        statement="Weight decay shrinks matrices by 1 - lr * weight_decay, and leaves parameters of fewer than two "
        "dims alone.",
        check=for_all(_idle_runs, _decay_holds),
    ),
    Law(
        id="training.moving_average",
        statement="moving_average gives beta * model_ema + (1 - beta) * model for every parameter; a beta outside of "
        "[0, 1] and another architecture are refused, and change nothing.",
        check=for_all(_average_cases, _average_holds),
    ),
    Law(
        id="training.offload",
        statement="offload and reload, once or twice, between windows and inside of one, change no bit of the model "
        "nor of the training that goes on.",
        check=for_all(_moved_runs, _offload_holds),
    ),
    Law(
        id="training.bf16",
        statement="bf16=True computes within bfloat16's rounding of float32, and parameters stay float32.",
        requires=frozenset({"bf16"}),
        check=for_all(_bf16_cases, _bf16_holds),
    ),
)
"""The laws."""
