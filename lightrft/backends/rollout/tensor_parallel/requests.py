"""Requests of several ranks as calls that all of them make alike."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from lightrft.strategy.protocols.rollout import Prompt

__all__ = ["Asked", "Part", "joined"]


@attrs.frozen(kw_only=True)
class Asked:
    """What a rank asks for, or a call asks for them all.

    Attributes:
        first_prompt: number of the first prompt.
        prompts: the prompts, whose numbers follow one another.
    """

    first_prompt: int
    prompts: tuple[Prompt, ...]


@attrs.frozen(kw_only=True)
class Part:
    """Where what one rank asked for is: in which call, and from which prompt of it on."""

    call: int
    start: int


def joined(asked: Sequence[Asked]) -> tuple[list[Asked], list[Part]]:
    """Return as few calls as give every rank what it asked for, and for each rank which part of them is its own.

    Ranks whose numbers follow one another share a call, and so do ranks that ask for the same.

    Args:
        asked: one for each rank.
    """
    calls: list[Asked] = []
    parts: dict[Asked, Part] = {}
    for each in asked:
        if each in parts or not each.prompts:
            continue
        if calls and each.first_prompt == calls[-1].first_prompt + len(calls[-1].prompts):
            start = len(calls[-1].prompts)
            calls[-1] = attrs.evolve(calls[-1], prompts=calls[-1].prompts + each.prompts)
        else:
            start = 0
            calls.append(each)
        parts[each] = Part(call=len(calls) - 1, start=start)
    return calls, [parts.get(each, Part(call=0, start=0)) for each in asked]
