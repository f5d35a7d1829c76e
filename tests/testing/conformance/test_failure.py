"""What is told of the exception with which a law ends."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from lightrft.errors import LawError
from lightrft.testing.conformance.failure import describe_error, describe_failure
from lightrft.testing.conformance.hold import draw_settings


def test_of_a_state_machine_the_calls_are_told() -> None:
    """The calls come one a line, without what hypothesis writes around them to make a program of it."""

    @hypothesis.seed(0)
    class Machine(RuleBasedStateMachine):
        """Breaks at the second call."""

        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        @rule()
        def sleep(self) -> None:
            self.count += 1
            if self.count > 1:
                raise LawError("the engine is awake and must be asleep.")

    with pytest.raises(LawError) as caught:
        run_state_machine_as_test(Machine, settings=draw_settings(5))
    assert describe_failure(caught.value).message.splitlines() == [
        "the engine is awake and must be asleep.",
        "calls:",
        "  sleep()",
        "  sleep()",
    ]


def test_control_characters_are_escaped() -> None:
    """Neither the message nor the line of an exception holds any, but for the ends of lines."""
    error = ValueError("a\x1b[2J\nb\x07.")
    assert describe_failure(error).message == "ValueError: a\\x1b[2J\nb\\x07."
    assert describe_error(error) == "ValueError: a\\x1b[2J b\\x07"
    assert describe_error(ValueError()) == "ValueError"
