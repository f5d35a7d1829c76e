"""Exceptions as plain data, and on all ranks."""

from __future__ import annotations

from typing import NoReturn

import pytest

from lightrft.backends.collectives.simulated import build_collectives, run_simulated
from lightrft.errors import DataError, LawError, LightRFTError
from lightrft.failures import failure_of, raised_by, together
from lightrft.strategy.config import StrategyConfig

COLLECTIVES = build_collectives(StrategyConfig())


class OwnError(Exception):
    """An error that nobody else knows."""


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (DataError("prompts[1] is empty; leave it out."), DataError, "prompts[1] is empty; leave it out."),
        (ZeroDivisionError("division by zero"), ZeroDivisionError, "division by zero"),
        (OwnError("of its own kind"), LightRFTError, "OwnError: of its own kind"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), LightRFTError, "UnicodeDecodeError: 'utf-8' codec"),
    ],
)
def test_errors_are_raised_again_with_their_notes(raised: Exception, kind: type[Exception], message: str) -> None:
    """Ours and Python's keep their type; the data say where they came from."""
    raised.add_note("a note")
    with pytest.raises(type(raised)) as caught:
        raise raised
    failure = failure_of(caught.value)
    error = raised_by(failure)
    assert type(error) is kind
    assert str(error).startswith(message)
    assert error.__notes__ == ["a note"]
    assert "test_failures.py" in failure.traceback


def test_an_error_of_an_unknown_type_is_of_the_type_that_is_asked_for() -> None:
    """Its message still names its own."""
    assert repr(raised_by(failure_of(OwnError("no")), otherwise=LawError)) == "LawError('OwnError: no')"


@pytest.mark.parametrize("failing", [(1,), (0, 2), (2, 1)], ids=str)
def test_what_one_rank_raises_all_raise_with_the_number_of_the_first(failing: tuple[int, ...]) -> None:
    """A rank's own error is the cause of what it raises; the others are told where the first one was raised."""

    def program(rank: int) -> tuple[str, bool]:
        own = ZeroDivisionError(f"no {rank} today")

        def call() -> int:
            if rank in failing:
                raise own
            return rank

        with pytest.raises(ZeroDivisionError) as raised:
            together(COLLECTIVES, call)
        is_told = raised.value.__cause__ is own if rank in failing else "in call" in str(raised.value.__cause__)
        return str(raised.value), is_told

    first = min(failing)
    assert run_simulated(3, program) == [(f"rank {first}: no {first} today", True)] * 3


def test_a_rank_that_is_named_already_is_not_named_again() -> None:
    """Ranks that share an engine hear from it which of them it was."""

    def program(rank: int) -> str:
        def call() -> int:
            raise DataError("prompts[0] is empty." if rank == 1 else "rank 1: prompts[0] is empty.")

        with pytest.raises(DataError) as raised:
            together(COLLECTIVES, call)
        return str(raised.value)

    assert run_simulated(2, program) == ["rank 1: prompts[0] is empty."] * 2


def test_what_all_ranks_return_they_return() -> None:
    """Nothing is changed or exchanged but that all of them could go on."""

    def program(rank: int) -> object:
        return together(COLLECTIVES, lambda: {"rank": rank})

    assert run_simulated(2, program) == [{"rank": 0}, {"rank": 1}]


def test_one_rank_alone_raises_its_own_error() -> None:
    """No number is said where there is one."""
    own = OwnError("no")

    def call() -> NoReturn:
        raise own

    def program(rank: int) -> bool:
        del rank
        with pytest.raises(OwnError) as raised:
            together(COLLECTIVES, call)
        return raised.value is own

    assert run_simulated(1, program) == [True]
