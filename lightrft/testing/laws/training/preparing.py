"""Laws of how models get into a strategy and out of it: prepare and its relatives, names, contexts, and refusals."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

from lightrft.errors import ConfigError, LawError, StepError
from lightrft.strategy.protocols import StepResult, Trainable
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.batches import input_ids_of, samples_of
from lightrft.testing.cases.models import ModelCase, SmallModel, build_model, model_cases
from lightrft.testing.cases.runs import (
    RunCase,
    RunEvidence,
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
class _PreparedCase:
    """Models that are prepared in one call.

    Attributes:
        models: at least one.
        is_trained: which of them come with an optimizer.
        is_rlhf: as in `prepare`.
    """

    models: tuple[ModelCase, ...]
    is_trained: tuple[bool, ...]
    is_rlhf: bool


@attrs.frozen(kw_only=True, eq=False)
class _PreparedModel:
    """What one of them is afterwards."""

    kind: str
    is_plain: bool
    is_training: bool
    trained: list[str]
    tensors: dict[str, Tensor]


@attrs.frozen(kw_only=True, eq=False)
class _PreparedEvidence:
    """What `prepare` gave, and what preparing that again gave; `shape` is that of the result."""

    shape: str
    models: list[_PreparedModel]
    again: list[_PreparedModel]


@st.composite
def _prepared_cases(draw: DrawFn, world_size: int) -> _PreparedCase:
    del world_size
    number = draw(st.integers(1, 3))
    booleans = st.lists(st.booleans(), min_size=number, max_size=number)
    return _PreparedCase(
        models=tuple(draw(st.lists(model_cases(exact=False), min_size=number, max_size=number))),
        is_trained=tuple(draw(booleans)),
        is_rlhf=draw(st.booleans()),
    )


def _prepare(rank: Rank, case: _PreparedCase) -> _PreparedEvidence:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    # every rank may come with other values; those of the first one count
    models = [build_model(attrs.evolve(model, seed=model.seed + rank.rank)) for model in case.models]
    given = [
        (model, strategy.create_optimizer(model), None) if is_trained else model
        for model, is_trained in zip(models, case.is_trained, strict=True)
    ]
    if len(given) == 1:
        prepared = [strategy.prepare(given[0], is_rlhf=case.is_rlhf)]
        shape = "one"
    else:
        prepared = strategy.prepare(given[0], given[1], *given[2:], is_rlhf=case.is_rlhf)
        shape = type(prepared).__name__
    looked = [_looked_at(strategy, one, plain) for one, plain in zip(prepared, models, strict=True)]
    again = [strategy.prepare(one, is_rlhf=case.is_rlhf) for one in prepared]
    return _PreparedEvidence(
        shape=shape,
        models=looked,
        again=[_looked_at(strategy, one, plain) for one, plain in zip(again, models, strict=True)],
    )


def _looked_at(strategy: Strategy, prepared: nn.Module | Trainable, plain: SmallModel) -> _PreparedModel:
    model = prepared.model if isinstance(prepared, Trainable) else prepared
    inner = strategy.unwrap_model(model)
    return _PreparedModel(
        kind="Trainable" if isinstance(prepared, Trainable) else "model",
        is_plain=type(inner).__name__ == type(plain).__name__ and strategy.unwrap_model(inner) is inner,
        is_training=model.training,
        trained=[name for name, parameter in inner.named_parameters() if parameter.requires_grad],
        tensors=tensors_of(strategy, model),
    )


def _prepare_holds(harness: Harness, case: _PreparedCase) -> None:
    shape = "one" if len(case.models) == 1 else "list"
    for rank, evidence in enumerate(harness.run(_prepare, case)):
        if evidence.shape != shape or len(evidence.models) != len(case.models):
            raise LawError(
                f"rank {rank}: prepare of {len(case.models)} gave {evidence.shape} of {len(evidence.models)} and must "
                f"give {shape} of {len(case.models)}."
            )
        for times, found in (("once", evidence.models), ("twice", evidence.again)):
            for number, one in enumerate(found):
                _require_prepared(case, number, one, f"rank {rank}, argument {number + 1}, prepared {times}")


def _require_prepared(case: _PreparedCase, number: int, seen: _PreparedModel, where: str) -> None:
    plain, is_trained = build_model(case.models[number]), case.is_trained[number]
    is_frozen = case.is_rlhf and not is_trained
    must = [name for name, parameter in plain.named_parameters() if parameter.requires_grad and not is_frozen]
    if seen.kind != ("Trainable" if is_trained else "model"):
        raise LawError(f"{where}: it is a {seen.kind} and must be what was passed.")
    if not seen.is_plain:
        raise LawError(f"{where}: unwrap_model does not give the plain model.")
    if seen.trained != must or seen.is_training == is_frozen:
        raise LawError(
            f"{where}, is_rlhf={case.is_rlhf}: {seen.trained} ask for gradients and must be {must}; "
            f"training={seen.is_training} must be {not is_frozen}."
        )
    require_same(seen.tensors, plain.state_dict(), where)


_Rewards: TypeAlias = Literal["none", "one", "list"]


@attrs.frozen(kw_only=True)
class _AllCase:
    """What `prepare_models_and_optimizers` is given."""

    actor: ModelCase
    critic: ModelCase | None
    rewards: _Rewards
    num_rewards: int
    has_initial: bool
    actor_rate: float
    critic_rate: float
    has_args: bool


@attrs.frozen(kw_only=True, eq=False)
class _AllEvidence:
    """What came back, and the learning rates of a first step of actor and critic."""

    num_rewards: int
    has_initial: bool
    moving: list[str]
    scores: list[dict[str, Tensor]]
    rates: list[float]


@st.composite
def _all_cases(draw: DrawFn, world_size: int) -> _AllCase:
    del world_size
    rates = st.sampled_from([0.5, 0.25, 0.125])
    return _AllCase(
        actor=draw(model_cases()),
        critic=draw(st.none() | model_cases()),
        rewards=draw(st.sampled_from(["none", "one", "list"])),
        num_rewards=draw(st.integers(0, 2)),
        has_initial=draw(st.booleans()),
        actor_rate=draw(rates),
        critic_rate=draw(rates),
        has_args=draw(st.booleans()),
    )


def _reward_model(number: int) -> SmallModel:
    return build_model(ModelCase(vocabulary=2, hidden=1, seed=number))


def _num_rewards(case: _AllCase) -> int:
    return {"none": 0, "one": 1, "list": case.num_rewards}[case.rewards]


def _prepare_all(rank: Rank, case: _AllCase) -> _AllEvidence:
    rates = {"actor_learning_rate": case.actor_rate, "critic_learning_rate": case.critic_rate}
    chosen = {**rates, "lr_scheduler": "constant", "lr_warmup_ratio": 0.0}
    settings = attrs.evolve(
        rank.config,
        train_batch_size=rank.world_size,
        actor_learning_rate=2.0 if case.has_args else case.actor_rate,
        critic_learning_rate=2.0 if case.has_args else case.critic_rate,
        lr_scheduler="constant",
        lr_warmup_ratio=0.0,
    )
    strategy = rank.build(settings)
    strategy.setup_distributed()
    rewards = [_reward_model(number) for number in range(_num_rewards(case))]
    given = {"none": None, "one": next(iter(rewards), None), "list": rewards}[case.rewards]
    actor, critic, reward_models, initial = strategy.prepare_models_and_optimizers(
        build_model(case.actor),
        None if case.critic is None else build_model(case.critic),
        given,
        build_model(case.actor) if case.has_initial else None,
        chosen if case.has_args else None,
        max_steps=4,
    )
    scored = [*reward_models, *([] if initial is None else [initial]), strategy.prepare_reward_model(_reward_model(9))]
    return _AllEvidence(
        num_rewards=len(reward_models),
        has_initial=initial is not None,
        moving=[_moving(strategy, model) for model in scored],
        scores=[tensors_of(strategy, model) for model in scored],
        rates=[_first_rate(strategy, trainable) for trainable in (actor, critic) if trainable is not None],
    )


def _moving(strategy: Strategy, model: nn.Module) -> str:
    trained = [name for name, one in strategy.unwrap_model(model).named_parameters() if one.requires_grad]
    return f"training={model.training}, trained={trained}"


def _first_rate(strategy: Strategy, trainable: Trainable) -> float:
    model, optimizer, scheduler = trainable
    strategy.backward(model(torch.zeros(1, 1, dtype=torch.int64)).sum(), model, optimizer)
    return strategy.optimizer_step(optimizer, model, scheduler).learning_rate


def _prepare_all_holds(harness: Harness, case: _AllCase) -> None:
    rewards = [_reward_model(number) for number in range(_num_rewards(case))]
    models = [*rewards, *([build_model(case.actor)] if case.has_initial else []), _reward_model(9)]
    rates = [case.actor_rate, *([] if case.critic is None else [case.critic_rate])]
    for rank, evidence in enumerate(harness.run(_prepare_all, case)):
        found = (evidence.num_rewards, evidence.has_initial)
        if found != (len(rewards), case.has_initial):
            raise LawError(
                f"rank {rank}: (reward models, has initial model) is {found} and must be "
                f"{(len(rewards), case.has_initial)}."
            )
        for number, (moving, tensors, model) in enumerate(zip(evidence.moving, evidence.scores, models, strict=True)):
            if moving != "training=False, trained=[]":
                raise LawError(f"rank {rank}: {moving} of a model that only scores, which must be frozen, evaluating.")
            require_same(tensors, model.state_dict(), f"rank {rank}, model {number + 1} that only scores")
        if evidence.rates != rates:
            raise LawError(f"rank {rank}: rates of the first steps are {evidence.rates} and must be {rates}.")


@attrs.frozen(kw_only=True)
class _ContextCase:
    """A model, and token ids that it reads."""

    model: ModelCase
    input_ids: tuple[int, int]
    meta_init: bool


@attrs.frozen(kw_only=True, eq=False)
class _ContextEvidence:
    tensors: dict[str, Tensor]
    logits: Tensor


@st.composite
def _context_cases(draw: DrawFn, world_size: int) -> _ContextCase:
    del world_size
    model = draw(model_cases())
    tokens = st.integers(0, model.vocabulary - 1)
    return _ContextCase(model=model, input_ids=(draw(tokens), draw(tokens)), meta_init=draw(st.booleans()))


def _build_in_context(rank: Rank, case: _ContextCase) -> _ContextEvidence:
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    if case.meta_init:  # the weights come from a checkpoint
        strategy.save_ckpt(strategy.prepare(build_model(case.model)), rank.directory / "checkpoints", step=1)
        with strategy.init_model_context(meta_init=True):
            plain = SmallModel(case.model)
        model = strategy.prepare(plain)
        strategy.load_ckpt(model, rank.directory / "checkpoints")
    else:
        with strategy.init_model_context():
            plain = build_model(case.model)
        model = strategy.prepare(plain)
    with torch.no_grad():
        logits = model(torch.tensor([case.input_ids]))
    return _ContextEvidence(tensors=tensors_of(strategy, model), logits=logits.detach().cpu().clone())


def _context_holds(harness: Harness, case: _ContextCase) -> None:
    plain = build_model(case.model)
    with torch.no_grad():
        logits = plain(torch.tensor([case.input_ids]))
    for rank, evidence in enumerate(harness.run(_build_in_context, case)):
        where = f"rank {rank}, built with meta_init={case.meta_init}"
        require_same(evidence.tensors, plain.state_dict(), where)
        require_same({"logits": evidence.logits}, {"logits": logits}, where)


def _refused_runs(world_size: int) -> SearchStrategy[RunCase]:
    return run_cases(world_size=world_size, exact=False, max_windows=2, max_norms=(0.5, 0.0))


@attrs.frozen(kw_only=True, eq=False)
class _RefusedEvidence:
    refused: list[str]
    run: RunEvidence


def _train_refused(rank: Rank, case: RunCase) -> _RefusedEvidence:
    strategy = rank.build(settings_of(rank.config, case, rank.world_size))
    trainable = start(strategy, case)
    model = trainable.model
    evidence = _RefusedEvidence(
        refused=[_optimizer_refused(strategy, case.model)],
        run=RunEvidence(before=tensors_of(strategy, model), windows=[]),
    )
    for window in case.windows:
        steps: list[tuple[float, StepResult]] = []
        for step in train_window(strategy, trainable, window, rank.rank, case.loss):
            logits_BTV = model(input_ids_of(samples_of(window)))
            mean = logits_BTV.mean()
            evidence.refused.append(_backward_refused(strategy, trainable, logits_BTV.mean((1, 2))))
            evidence.refused.append(_backward_refused(strategy, trainable, mean.detach()))
            for weight in (math.nan, math.inf, -math.inf):
                evidence.refused.append(_backward_refused(strategy, trainable, mean, weight))
            steps.append(step)
        evidence.run.windows.append(window_seen(strategy, trainable, steps))
    return evidence


def _backward_refused(strategy: Strategy, trainable: Trainable, loss: Tensor, weight: float | None = None) -> str:
    model, optimizer, scheduler = trainable
    given = f"a loss of shape {tuple(loss.shape)} with requires_grad={loss.requires_grad} and weight={weight}"
    try:
        strategy.backward(loss, model, optimizer, weight=weight)
    except StepError:
        try:
            strategy.optimizer_step(optimizer, model, scheduler)
        except StepError:
            return "refused"
        return f"an optimizer_step after nothing but the refused backward of {given} was accepted"
    return f"{given} was accepted"


def _optimizer_refused(strategy: Strategy, case: ModelCase) -> str:
    try:
        strategy.create_optimizer(build_model(case).requires_grad_(requires_grad=False))
    except ConfigError:
        return "refused"
    return "an optimizer of a frozen model was made"


def _refusal_holds(harness: Harness, case: RunCase) -> None:
    seen, must = harness.run(_train_refused, case), harness.run(train, case)
    for rank, (one, other) in enumerate(zip(seen, must, strict=True)):
        accepted = [said for said in one.refused if said != "refused"]
        if accepted:
            raise LawError(f"rank {rank}: {accepted[0]} and must be refused.")
        require_same_run(one.run, other, f"rank {rank}, with refused calls beside without")


@attrs.frozen(kw_only=True)
class _MemoryCase:
    label: str


@attrs.frozen(kw_only=True)
class _MemoryEvidence:
    label: str
    resident: int
    allocated: int
    peak_allocated: int


def _labels(world_size: int) -> SearchStrategy[_MemoryCase]:
    del world_size
    return st.builds(_MemoryCase, label=st.text(st.characters(exclude_categories=["Cs"]), max_size=8))


def _report(rank: Rank, case: _MemoryCase) -> _MemoryEvidence:
    report = rank.build(rank.config).report_memory(case.label)
    return _MemoryEvidence(
        label=report.label,
        resident=report.resident,
        allocated=report.allocated,
        peak_allocated=report.peak_allocated,
    )


def _memory_holds(harness: Harness, case: _MemoryCase) -> None:
    least, most = 2**20, 2**50  # a process with torch in it, and more than any machine has
    for rank, seen in enumerate(harness.run(_report, case)):
        is_plausible = least < seen.resident < most and 0 <= seen.allocated <= seen.peak_allocated < most
        if seen.label != case.label or not is_plausible:
            raise LawError(f"rank {rank}: the report is {seen}, of label {case.label!r}, and must be plausible bytes.")


LAWS: tuple[Law, ...] = (
    Law(
        id="training.prepare",
        statement="prepare gives what was passed, one for one and a list for several, under the names and with the "
        "values of the plain model of the first rank; a second time changes nothing; is_rlhf freezes what has no "
        "optimizer.",
        check=for_all(_prepared_cases, _prepare_holds),
    ),
    Law(
        id="training.prepare_models_and_optimizers",
        statement="prepare_models_and_optimizers gives actor, critic, a list of reward models and the initial model, "
        "with the learning rates of the settings or of args; what only scores is frozen and evaluates.",
        check=for_all(_all_cases, _prepare_all_holds),
    ),
    Law(
        id="training.init_model_context",
        statement="A model that was built inside init_model_context computes what the plain one does; with meta_init "
        "after its weights were loaded.",
        check=for_all(_context_cases, _context_holds),
    ),
    Law(
        id="training.refusals",
        statement="A loss that is not 0-d or has no gradient, a weight that is not finite, a step that has no other "
        "gradient, and an optimizer of a frozen model are refused, and the training goes on as if they had not been "
        "asked for.",
        check=for_all(_refused_runs, _refusal_holds),
    ),
    Law(
        id="training.report_memory",
        statement="report_memory gives its label and plausible numbers of bytes.",
        check=for_all(_labels, _memory_holds),
    ),
)
"""The laws."""
