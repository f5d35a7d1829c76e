"""The record itself: complete, frozen, of the promised signatures, and honest about what it can do."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias, cast, get_args

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lightrft.errors import LawError
from lightrft.strategy.protocols.capabilities import CAPABILITIES
from lightrft.strategy.protocols.rollout import Engine
from lightrft.strategy.record import FUNCTIONS, Strategy
from lightrft.testing.cases.models import ModelCase, build_model
from lightrft.testing.cases.policies import PolicyCase, build_policy, policy_for, running
from lightrft.testing.cases.runs import tensors_of
from lightrft.testing.cases.small_run import SmallRunCase, prepared, small_run_cases, small_run_config
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.signatures import changeable_attribute, signature_differences_of_record
from lightrft.testing.subject import Rank

__all__ = ["ENGINE_RECORD_LAWS", "LAWS"]

StrategyCapability: TypeAlias = Literal["bf16", "ranks"]
"""Capabilities of strategies; the others are an engine's."""

_FREEZE = "make its class @attrs.frozen, as lightrft's own record is"
_PROCESS_ENVIRONMENT: Mapping[str, str] = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
"""What torchrun tells the first of two processes."""


@attrs.frozen(kw_only=True)
class RecordCase:
    """A record, and which field is changed in a copy.

    Attributes:
        run: what the settings are for.
        field: a function of the strategy.
    """

    run: SmallRunCase
    field: str


@attrs.frozen(kw_only=True)
class ClaimCase:
    """A capability.

    Attributes:
        run: what the settings are for.
        capability: what is claimed or not.
    """

    run: SmallRunCase
    capability: StrategyCapability


@attrs.frozen(kw_only=True)
class SeenRecord:
    """What a record looks like.

    Attributes:
        differences: from the contracts of its fields, in words.
        changeable: name of a field that can be set; empty if it is frozen.
        changed: fields that a changed copy changed.
        unknown: capabilities that nobody knows.
    """

    differences: list[str]
    changeable: str
    changed: list[str]
    unknown: list[str]


@attrs.frozen(kw_only=True)
class SeenClaim:
    """What came of a capability.

    Attributes:
        is_claimed: whether the record has it.
        error: type and message of what was raised; empty if nothing was.
        problem: what the capability did wrong; empty if nothing.
    """

    is_claimed: bool
    error: str
    problem: str


def _seen_record(record: object, contract: type[attrs.AttrsInstance], changed: list[str]) -> SeenRecord:
    claims = cast("frozenset[str]", getattr(record, "capabilities", frozenset[str]()))
    return SeenRecord(
        differences=signature_differences_of_record(record, contract),
        changeable=changeable_attribute(record, contract) or "",
        changed=changed,
        unknown=sorted(map(str, claims - CAPABILITIES.keys())),
    )


def _seen_strategy(rank: Rank, case: RecordCase) -> SeenRecord:
    strategy = rank.build(small_run_config(rank.config, case.run, rank.world_size))
    return _seen_record(strategy, Strategy, _changed_fields(strategy, case.field))


def _changed_fields(strategy: Strategy, field: str) -> list[str]:
    if not attrs.has(type(strategy)):
        return [f"no copy of a {type(strategy).__name__} can be made with attrs.evolve"]
    names = [name for name in attrs.fields_dict(Strategy) if hasattr(strategy, name)]
    before = {name: cast("object", getattr(strategy, name)) for name in names}

    def stand_in() -> None:
        return

    copy = attrs.evolve(strategy, **{field: stand_in})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    in_copy = [name for name in names if getattr(copy, name) is not before[name]]
    in_place = [f"{name} of the record itself" for name in names if getattr(strategy, name) is not before[name]]
    return [name for name in in_copy if name != field] + in_place


def _record_cases(world_size: int) -> SearchStrategy[RecordCase]:
    del world_size
    return st.builds(RecordCase, run=small_run_cases(), field=st.sampled_from(FUNCTIONS))


def _has_signatures(harness: Harness, case: RecordCase) -> None:
    _require_signatures(harness.run(_seen_strategy, case))


def _require_signatures(every: list[SeenRecord]) -> None:
    for rank, seen in enumerate(every):
        if seen.differences:
            raise LawError(f"the record on rank {rank} is not what its contracts say: {'; '.join(seen.differences)}.")


def _is_frozen(harness: Harness, case: RecordCase) -> None:
    every = harness.run(_seen_strategy, case)
    _require_frozen(every)
    for rank, seen in enumerate(every):
        if seen.changed:
            raise LawError(
                f"a copy with another {case.field!r} changed more on rank {rank}: {', '.join(seen.changed)}; {_FREEZE}."
            )


def _require_frozen(every: list[SeenRecord]) -> None:
    for rank, seen in enumerate(every):
        if seen.changeable:
            raise LawError(f"the record on rank {rank} can be changed: {seen.changeable!r} was set; {_FREEZE}.")
        if seen.unknown:
            raise LawError(f"capabilities has {seen.unknown} on rank {rank}; known are {', '.join(CAPABILITIES)}.")


def _seen_claim(rank: Rank, case: ClaimCase) -> SeenClaim:
    config = small_run_config(rank.config, case.run, rank.world_size)
    is_claimed = case.capability in rank.build(config).capabilities
    problem = ""
    try:
        if case.capability == "bf16":
            strategy = rank.build(attrs.evolve(config, bf16=True))
            problem = _problem_of_bf16(strategy, case.run) if is_claimed else ""
        else:
            with _environment(_PROCESS_ENVIRONMENT):
                rank.build(config)
    except Exception as error:  # noqa: BLE001 (which one it is, is what is looked at)
        return SeenClaim(is_claimed=is_claimed, error=f"{type(error).__name__}: {error}", problem="")
    return SeenClaim(is_claimed=is_claimed, error="", problem=problem)


def _problem_of_bf16(strategy: Strategy, case: SmallRunCase) -> str:
    strategy.setup_distributed()
    model, trainable = build_model(case.model), prepared(strategy, case)
    with torch.no_grad():  # what bfloat16 does not hold, so that a product in it is another one
        for parameter in [*model.parameters(), *strategy.unwrap_model(trainable.model).parameters()]:
            parameter.fill_(1 + 2**-10)
    input_ids_BT = torch.zeros((1, 1), dtype=torch.int64)
    logits_BTV = trainable.model(input_ids_BT).float()
    strategy.backward(logits_BTV.square().mean(), trainable.model, trainable.optimizer)
    result = strategy.optimizer_step(trainable.optimizer, trainable.model, None, is_boundary=True)
    dtypes = {tensor.dtype for tensor in tensors_of(strategy, trainable.model).values() if tensor.is_floating_point()}
    if dtypes != {torch.float32}:
        return f"the parameters are {sorted(map(str, dtypes))} and must be torch.float32"
    if not result.stepped or not logits_BTV.isfinite().all():
        return f"the step came to {result} with the logits {logits_BTV.tolist()}"
    return "the logits are those of float32" if torch.equal(logits_BTV, model(input_ids_BT)) else ""


@contextmanager
def _environment(changes: Mapping[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _claim_cases(world_size: int) -> SearchStrategy[ClaimCase]:
    del world_size
    return st.builds(ClaimCase, run=small_run_cases(), capability=st.sampled_from(get_args(StrategyCapability)))


def _is_honest(harness: Harness, case: ClaimCase) -> None:
    for rank, seen in enumerate(harness.run(_seen_claim, case)):
        what = f"{case.capability!r} ({CAPABILITIES[case.capability]}) on rank {rank}"
        if seen.is_claimed and (seen.error or seen.problem):
            raise LawError(f"{what} is claimed, and there is {seen.error or seen.problem}.")
        if not seen.is_claimed and not seen.error.startswith("UnsupportedError: "):
            raise LawError(
                f"{what} is not claimed, so that it must be refused by an UnsupportedError while building; there was "
                f"{seen.error or 'no error'}."
            )


def _seen_engine(rank: Rank, case: ModelCase) -> SeenRecord:
    policy = policy_for(rank.engine, PolicyCase(seed=case.seed))
    with running(rank, build_policy(policy)) as handle:
        return _seen_record(handle.engine, Engine, [])


def _engine_cases(world_size: int) -> SearchStrategy[ModelCase]:
    del world_size
    return st.just(ModelCase())


def _engine_has_signatures(harness: Harness, case: ModelCase) -> None:
    every = harness.run(_seen_engine, case)
    _require_signatures(every)
    _require_frozen(every)


LAWS: tuple[Law, ...] = (
    Law(
        id="record.signatures",
        statement="Every field of the record is there, and its function has the names, kinds and defaults of its "
        "contract.",
        check=for_all(_record_cases, _has_signatures),
    ),
    Law(
        id="record.frozen",
        statement="The record cannot be changed; a copy with another function differs in that one alone.",
        check=for_all(_record_cases, _is_frozen),
    ),
    Law(
        id="record.claims",
        statement="What the record claims works; what it does not claim is refused while building, with "
        "UnsupportedError.",
        check=for_all(_claim_cases, _is_honest),
    ),
)
"""Laws about the record of a strategy."""

ENGINE_RECORD_LAWS: tuple[Law, ...] = (
    Law(
        id="engine.record",
        statement="The record of the engine is complete, frozen, and of the promised signatures.",
        check=for_all(_engine_cases, _engine_has_signatures),
    ),
)
"""The same about the record of an engine."""
