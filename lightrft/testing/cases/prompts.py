"""Hypothesis strategies for requests to an engine, as plain data."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.strategy.protocols import SamplingParams

__all__ = ["prompt_cases", "sampling_cases"]


def prompt_cases(
    vocabulary: int, *, min_prompts: int = 0, max_prompts: int = 4, max_tokens: int = 6
) -> SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Return a strategy for prompts of different lengths, some of them equal.

    Args:
        vocabulary: number of token ids.
        min_prompts: bound on their number.
        max_prompts: bound on their number.
        max_tokens: bound on the length of each; the least is 1.
    """
    tokens = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=max_tokens).map(tuple)
    return st.lists(tokens, min_size=min_prompts, max_size=max_prompts).map(tuple)


@st.composite
def sampling_cases(
    draw: DrawFn,
    vocabulary: int,
    *,
    temperatures: SearchStrategy[float] | None = None,
    max_new_tokens: int = 5,
    max_samples: int = 3,
) -> SamplingParams:
    """Return a strategy for parameters that every engine takes: nothing chooses among tokens but the temperature.

    Args:
        draw: hypothesis' own.
        vocabulary: number of token ids, from which stop tokens are taken.
        temperatures: strategy for the temperature; None draws 0 (greedy) and moderate ones, at which a rounding error
            of the logits stays one of the logprobs.
        max_new_tokens: bound on the setting of this name.
        max_samples: bound on `n`.
    """
    stops = st.lists(st.integers(0, vocabulary - 1), max_size=3, unique=True)
    return SamplingParams(
        temperature=draw(st.just(0.0) | st.floats(0.25, 4) if temperatures is None else temperatures),
        max_new_tokens=draw(st.integers(1, max_new_tokens)),
        stop_token_ids=tuple(draw(stops)),
        n=draw(st.integers(1, max_samples)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )
