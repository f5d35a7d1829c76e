"""The life of an engine: every call in every order, beside a model of what it must do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from lightrft.errors import EngineStateError, LawError, WeightSyncError
from lightrft.strategy.protocols import EngineHandle, SamplingParams
from lightrft.strategy.protocols.rollout import EngineStatus
from lightrft.testing.cases.policies import PolicyCase, build_policy, generate, running
from lightrft.testing.law import Harness, Law, for_all, on_each_rank
from lightrft.testing.laws.engine.weights import named_weights
from lightrft.testing.reference.completions import refusal, require_logprobs, require_refusal, require_requests
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_NUM_STEPS = 12
"""Enough for two updates and a sleep."""

_PROMPTS = ((1, 2, 3), (4,))

_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=2)

_Call = Literal[
    "generate",
    "begin_update",
    "put",
    "put_unknown",
    "commit",
    "update",
    "abort",
    "sleep",
    "wake",
    "flush_cache",
    "close",
]


@attrs.frozen(kw_only=True)
class _Step:
    call: _Call
    number: int = 1  # which weights it brings
    is_whole: bool = False  # whether it brings all that are missing, or one


@attrs.frozen(kw_only=True)
class _Life:
    steps: tuple[_Step, ...]


@attrs.define(kw_only=True, eq=False)
class _Model:
    """An engine, and what its status, version and weights must be."""

    handle: EngineHandle
    policy: nn.Module
    status: EngineStatus = "awake"
    version: int = 0
    received: dict[str, Tensor] = attrs.field(factory=dict[str, Tensor])


def _lives(world_size: int) -> SearchStrategy[_Life]:
    del world_size
    step = st.builds(_Step, call=st.sampled_from(get_args(_Call)), number=st.integers(1, 3), is_whole=st.booleans())
    return st.builds(_Life, steps=st.lists(step, max_size=_NUM_STEPS).map(tuple))


def _live(rank: Rank, case: _Life) -> str:
    policy = build_policy(PolicyCase())
    with running(rank, policy) as handle:
        model = _Model(handle=handle, policy=policy)
        _require_right(model)
        for number, step in enumerate(case.steps, start=1):
            try:
                _STEPS[step.call](model, step)
                _require_right(model)
            except Exception as error:
                error.add_note(f"call {number} of {len(case.steps)}: {step.call}")
                raise
    return model.status


def _living(harness: Harness, case: _Life) -> None:
    harness.run(_live, case)


def _generate(model: _Model, step: _Step) -> None:
    del step  # that it can is looked at after every step
    _allows(model, "generate")


def _begin_update(model: _Model, step: _Step) -> None:
    del step
    if _allows(model, "begin_update"):
        model.handle.engine.begin_update(model.handle)
        model.status, model.received = "updating", {}


def _put(model: _Model, step: _Step) -> None:
    if not _allows(model, "put"):
        return
    weights = {name: tensor.roll(step.number, 0).clone() for name, tensor in named_weights(model.policy).items()}
    left = [name for name in weights if name not in model.received]
    bucket = {name: weights[name] for name in (left if step.is_whole else left[:1])}
    model.handle.engine.put(model.handle, bucket.items())
    model.received |= bucket


def _put_unknown(model: _Model, step: _Step) -> None:
    del step
    if _allows(model, "put"):
        refused = refusal(model.handle.engine.put, model.handle, [("unknown", torch.zeros(1))])
        require_refusal(refused, WeightSyncError, of="put with an unknown name")
        model.status = "torn"


def _commit(model: _Model, step: _Step) -> None:
    del step
    if not _allows(model, "commit"):
        return
    if len(model.received) < len(named_weights(model.policy)):
        refused = refusal(model.handle.engine.commit, model.handle)
        require_refusal(refused, WeightSyncError, of="commit with tensors missing")
        model.status = "torn"
        return
    model.version += 1
    returned = model.handle.engine.commit(model.handle)
    if returned != model.version:
        raise LawError(f"commit returned {returned} and must return {model.version}.")
    model.status = "awake"
    model.policy.load_state_dict(model.received)


def _update(model: _Model, step: _Step) -> None:
    if model.status in {"awake", "torn"}:
        _begin_update(model, step)
        _put(model, attrs.evolve(step, is_whole=True))
        _commit(model, step)


def _abort(model: _Model, step: _Step) -> None:
    del step
    # the contract does not say what a second abort does
    if _allows(model, "abort") and model.status != "torn":
        model.handle.engine.abort(model.handle)
        model.status = "torn"


def _sleep(model: _Model, step: _Step) -> None:
    del step
    if _allows(model, "sleep"):
        model.handle.engine.sleep(model.handle)
        model.status = "asleep"


def _wake(model: _Model, step: _Step) -> None:
    del step
    if _allows(model, "wake"):
        model.handle.engine.wake(model.handle)
        model.status = "awake"


def _flush_cache(model: _Model, step: _Step) -> None:
    del step
    if _allows(model, "flush_cache"):
        model.handle.engine.flush_cache(model.handle)


def _close(model: _Model, step: _Step) -> None:
    del step
    model.handle.engine.close(model.handle)
    model.status = "closed"


_STEPS: Mapping[_Call, Callable[[_Model, _Step], None]] = {
    "generate": _generate,
    "begin_update": _begin_update,
    "put": _put,
    "put_unknown": _put_unknown,
    "commit": _commit,
    "update": _update,
    "abort": _abort,
    "sleep": _sleep,
    "wake": _wake,
    "flush_cache": _flush_cache,
    "close": _close,
}

_LEGAL: Mapping[str, tuple[EngineStatus, ...]] = {
    "generate": ("awake",),
    "begin_update": ("awake", "torn"),
    "put": ("updating",),
    "commit": ("updating",),
    "abort": ("updating", "awake", "torn"),
    "sleep": ("awake", "asleep"),
    "wake": ("asleep", "awake"),
    "flush_cache": ("awake", "asleep", "updating", "torn"),
}


def _allows(model: _Model, name: str) -> bool:
    """Return whether the status allows a call; where it does not, make it, and see that it is refused."""
    if model.status in _LEGAL[name]:
        return True
    handle = model.handle
    arguments: Mapping[str, tuple[object, ...]] = {
        "generate": ([], _SAMPLING),
        "put": ([],),
    }
    refused = refusal(getattr(handle.engine, name), handle, *arguments.get(name, ()))
    of = f"{name} on an engine that is {model.status!r}"
    require_refusal(refused, EngineStateError, of=of, naming=(name, model.status))
    return False


def _require_right(model: _Model) -> None:
    for name in _LEGAL:
        _allows(model, name)
    seen, wanted = (model.handle.status, model.handle.weight_version), (model.status, model.version)
    if seen != wanted:
        raise LawError(f"the engine's status and weight version are {seen} and must be {wanted}.")
    if model.status == "awake":
        made = generate(model.handle, _PROMPTS, _SAMPLING)
        require_requests(made, _PROMPTS, _SAMPLING, version=model.version)
        require_logprobs(made, model.policy, temperature=0.0)


LAWS: tuple[Law, ...] = (
    Law(
        id="engine.life",
        statement="In any order of calls, a legal one leads to the status and version that it must, and an illegal one "
        "is refused by name and changes nothing.",
        check=for_all(_lives, on_each_rank(_living)),
    ),
)
"""The life of every engine."""
