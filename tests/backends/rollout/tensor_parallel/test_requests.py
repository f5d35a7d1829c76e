"""Requests of several ranks as calls of all of them."""

from __future__ import annotations

from lightrft.backends.rollout.tensor_parallel.requests import Asked, Part, joined
from lightrft.strategy.protocols.rollout import Prompt


def asked(first_prompt: int, *tokens: int) -> Asked:
    return Asked(first_prompt=first_prompt, prompts=tuple(Prompt(token_ids=(token,)) for token in tokens))


def test_numbers_that_follow_one_another_are_one_call() -> None:
    """Also over a rank that asks for nothing."""
    calls, parts = joined([asked(0, 1, 2), asked(2), asked(2, 3)])
    assert calls == [asked(0, 1, 2, 3)]
    assert (parts[0], parts[2]) == (Part(call=0, start=0), Part(call=0, start=2))


def test_what_two_ranks_ask_for_is_made_once() -> None:
    """The same prompts with the same numbers; with other numbers they are other draws."""
    calls, parts = joined([asked(0, 1), asked(0, 1), asked(5, 1), asked(0, 2)])
    assert calls == [asked(0, 1), asked(5, 1), asked(0, 2)]
    assert parts == [Part(call=0, start=0), Part(call=0, start=0), Part(call=1, start=0), Part(call=2, start=0)]


def test_nothing_is_no_call() -> None:
    """Where no rank asks for anything, nothing is called."""
    assert joined([asked(0), asked(0)])[0] == []
