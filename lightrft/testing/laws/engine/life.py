"""The life of an engine: every call in every order, beside a model of what it must do."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import Tensor

from lightrft.errors import ConfigError, EngineStateError, LawError, WeightSyncError
from lightrft.strategy.protocols import SamplingParams
from lightrft.strategy.protocols.rollout import EngineStatus
from lightrft.testing.cases.policies import PolicyCase, build_policy, generate
from lightrft.testing.law import Harness, Law
from lightrft.testing.laws.engine.weights import named_weights
from lightrft.testing.reference.completions import refusal, require_logprobs, require_refusal, require_requests

__all__ = ["LAWS", "engine_machine"]

_NUM_STEPS = 12
"""Enough for two updates and a sleep."""

_PROMPTS = ((1, 2, 3), (4,))

_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=2)


def _check(harness: Harness) -> None:
    if harness.example is not None:
        raise ConfigError(
            f"example={harness.example!r} cannot be given to engine.life, which draws calls one by one; draw with "
            f"seed={harness.seed!r} again."
        )
    machine = hypothesis.seed(harness.seed)(engine_machine(harness))
    run_state_machine_as_test(machine, settings=hypothesis.settings(harness.settings, stateful_step_count=_NUM_STEPS))


def engine_machine(harness: Harness) -> type[RuleBasedStateMachine]:  # noqa: C901 (one method a call)
    """Return the state machine of hypothesis that calls an engine's functions in any order.

    Args:
        harness: what brings the engine.
    """

    class EngineMachine(RuleBasedStateMachine):
        """An engine, and what its status, version and weights must be."""

        def __init__(self) -> None:
            super().__init__()
            self.strategy = harness.subject.build(harness.subject.config)
            self.model = build_policy(PolicyCase())
            self.handle = self.strategy.setup_inference_engine(harness.subject.engine, actor=self.model)
            self.status: EngineStatus = "awake"
            self.version = 0
            self.received: dict[str, Tensor] = {}

        @rule()
        def generate(self) -> None:
            self.allows("generate", ("awake",), generate, self.handle, _PROMPTS, _SAMPLING)

        @rule()
        def begin_update(self) -> None:
            if self.allows("begin_update", ("awake", "torn"), self.handle.engine.begin_update, self.handle):
                self.handle.engine.begin_update(self.handle)
                self.status, self.received = "updating", {}

        @rule(number=st.integers(1, 3), is_whole=st.booleans())
        def put(self, number: int, *, is_whole: bool) -> None:
            weights = {name: tensor.roll(number, 0).clone() for name, tensor in named_weights(self.model).items()}
            left = [name for name in weights if name not in self.received]
            bucket = {name: weights[name] for name in (left if is_whole else left[:1])}
            if self.allows("put", ("updating",), self.handle.engine.put, self.handle, bucket.items()):
                self.handle.engine.put(self.handle, bucket.items())
                self.received |= bucket

        @rule()
        def put_unknown(self) -> None:
            stranger = [("unknown", torch.zeros(1))]
            if self.allows("put", ("updating",), self.handle.engine.put, self.handle, stranger):
                refused = refusal(self.handle.engine.put, self.handle, stranger)
                require_refusal(refused, WeightSyncError, of="put with an unknown name")
                self.status = "torn"

        @rule()
        def commit(self) -> None:
            if not self.allows("commit", ("updating",), self.handle.engine.commit, self.handle):
                return
            if len(self.received) < len(named_weights(self.model)):
                refused = refusal(self.handle.engine.commit, self.handle)
                require_refusal(refused, WeightSyncError, of="commit with tensors missing")
                self.status = "torn"
                return
            self.version += 1
            returned = self.handle.engine.commit(self.handle)
            if returned != self.version:
                raise LawError(f"commit returned {returned} and must return {self.version}.")
            self.status = "awake"
            self.model.load_state_dict(self.received)

        @rule(number=st.integers(1, 3))
        def update(self, number: int) -> None:
            if self.status in {"awake", "torn"}:
                self.begin_update()
                self.put(number, is_whole=True)
                self.commit()

        @rule()
        def abort(self) -> None:
            # the contract does not say what a second abort does
            legal = ("updating", "awake", "torn")
            if self.allows("abort", legal, self.handle.engine.abort, self.handle) and self.status != "torn":
                self.handle.engine.abort(self.handle)
                self.status = "torn"

        @rule()
        def sleep(self) -> None:
            if self.allows("sleep", ("awake", "asleep"), self.handle.engine.sleep, self.handle):
                self.handle.engine.sleep(self.handle)
                self.status = "asleep"

        @rule()
        def wake(self) -> None:
            if self.allows("wake", ("asleep", "awake"), self.handle.engine.wake, self.handle):
                self.handle.engine.wake(self.handle)
                self.status = "awake"

        @rule()
        def flush_cache(self) -> None:
            legal = ("awake", "asleep", "updating", "torn")
            if self.allows("flush_cache", legal, self.handle.engine.flush_cache, self.handle):
                self.handle.engine.flush_cache(self.handle)

        @rule()
        def close(self) -> None:
            self.handle.engine.close(self.handle)
            self.status = "closed"

        @invariant()
        def is_as_it_must_be(self) -> None:
            self.refuses_the_rest()
            seen, wanted = (self.handle.status, self.handle.weight_version), (self.status, self.version)
            if seen != wanted:
                raise LawError(f"the engine's status and weight version are {seen} and must be {wanted}.")
            if self.status == "awake":
                made = generate(self.handle, _PROMPTS, _SAMPLING)
                require_requests(made, _PROMPTS, _SAMPLING, version=self.version)
                require_logprobs(made, self.model, temperature=0.0)

        def refuses_the_rest(self) -> None:
            engine = self.handle.engine
            self.allows("generate", ("awake",), generate, self.handle, _PROMPTS, _SAMPLING)
            self.allows("begin_update", ("awake", "torn"), engine.begin_update, self.handle)
            self.allows("put", ("updating",), engine.put, self.handle, [])
            self.allows("commit", ("updating",), engine.commit, self.handle)
            self.allows("sleep", ("awake", "asleep"), engine.sleep, self.handle)
            self.allows("wake", ("asleep", "awake"), engine.wake, self.handle)
            self.allows("flush_cache", ("awake", "asleep", "updating", "torn"), engine.flush_cache, self.handle)

        def allows(self, name: str, legal: tuple[str, ...], call: Callable[..., object], *args: object) -> bool:
            """Return whether the status allows a call; where it does not, make it, and see that it is refused."""
            if self.status not in legal:
                refused = refusal(call, *args)
                of = f"{name} on an engine that is {self.status!r}"
                require_refusal(refused, EngineStateError, of=of, naming=(name, self.status))
            return self.status in legal

        def teardown(self) -> None:
            self.handle.engine.close(self.handle)
            self.strategy.teardown()

    return EngineMachine


LAWS: tuple[Law, ...] = (
    Law(
        id="engine.life",
        statement="In any order of calls, a legal one leads to the status and version that it must, and an illegal one "
        "is refused by name and changes nothing.",
        check=_check,
        worlds="one",
    ),
)
"""The life of every engine."""
