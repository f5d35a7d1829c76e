"""How an engine chooses tokens: the largest logit, or draws from the trainer's own distribution, by the seed.

V vocabulary
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from lightrft.errors import LawError
from lightrft.strategy.protocols import Completion, SamplingParams
from lightrft.testing.cases.policies import (
    CONTEXT,
    VOCABULARY,
    PolicyCase,
    build_policy,
    generate,
    policy_cases,
    policy_for,
    running,
)
from lightrft.testing.cases.prompts import prompt_cases, sampling_cases
from lightrft.testing.law import Harness, Law, for_all, on_each_rank
from lightrft.testing.reference.completions import (
    require_greedy,
    require_logprobs,
    require_requests,
    require_same,
    require_same_draws,
    require_same_greedy,
    trainer_logits,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_NEVER = 30.0
"""In nats: what has a probability of exp(-30) = 1e-13 is not seen in a lifetime of test runs."""

_NUM_DRAWS = 1000
"""Enough to see a share that is wrong by 0.1; a token that must not be drawn shows in fewer."""

_NUM_DRAWS_CHOSEN = 300

_TEMPERATURES = st.floats(0.5, 4)


@attrs.frozen(kw_only=True)
class _Greedy:
    policy: PolicyCase
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    other_seed: int


@st.composite
def _greedy_calls(draw: DrawFn, world_size: int) -> _Greedy:
    del world_size
    sampling = draw(sampling_cases(VOCABULARY, temperatures=st.just(0.0)))
    return _Greedy(
        policy=draw(policy_cases()),
        prompts=draw(prompt_cases(VOCABULARY, min_prompts=1)),
        sampling=attrs.evolve(sampling, min_new_tokens=draw(st.integers(0, sampling.max_new_tokens))),
        other_seed=draw(st.integers(0, 100)),
    )


def _generate_greedily(rank: Rank, case: _Greedy) -> tuple[list[Completion], list[Completion]]:
    with running(rank, build_policy(case.policy)) as handle:
        made = generate(handle, case.prompts, case.sampling)
        return made, generate(handle, case.prompts, attrs.evolve(case.sampling, seed=case.other_seed))


def _greedy(harness: Harness, case: _Greedy) -> None:
    ((made, again),) = harness.run(_generate_greedily, case)
    model = build_policy(case.policy)
    for completions in (made, again):
        require_requests(completions, case.prompts, case.sampling, version=0)
        require_greedy(completions, model, case.sampling)
    require_same_greedy(again, made, model)


@attrs.frozen(kw_only=True)
class _Seeds:
    policy: PolicyCase
    prompt: tuple[int, ...]
    sampling: SamplingParams
    other_seed: int
    batch_size: int


@attrs.frozen(kw_only=True)
class _Draws:
    first: list[Completion]
    again: list[Completion]
    other: list[Completion]
    fresh: list[Completion]


@st.composite
def _seeds(draw: DrawFn, world_size: int) -> _Seeds:
    del world_size
    seed, other_seed = draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=2, unique=True))
    (prompt,) = draw(prompt_cases(VOCABULARY, min_prompts=1, max_prompts=1))
    return _Seeds(
        policy=draw(policy_cases()),
        prompt=prompt,
        # hot and long, so that equal completions are no chance
        sampling=SamplingParams(
            temperature=draw(st.floats(1.5, 4)),
            max_new_tokens=CONTEXT - len(prompt),
            n=draw(st.integers(2, 4)),
            seed=seed,
        ),
        other_seed=other_seed,
        batch_size=draw(st.sampled_from((3, 1024))),
    )


def _draw_by_seed(rank: Rank, case: _Seeds) -> _Draws:
    prompts = (case.prompt, case.prompt)
    model = build_policy(case.policy)
    with running(rank, model, batch_size=case.batch_size) as handle:
        first = generate(handle, prompts, case.sampling)
        other = generate(handle, prompts, attrs.evolve(case.sampling, seed=case.other_seed))
        again = generate(handle, prompts, case.sampling)
    with running(rank, model, batch_size=case.batch_size) as handle:
        fresh = generate(handle, prompts, case.sampling)
    return _Draws(first=first, again=again, other=other, fresh=fresh)


def _seed(harness: Harness, case: _Seeds) -> None:
    (draws,) = harness.run(_draw_by_seed, case)
    for made in (draws.first, draws.again, draws.other, draws.fresh):
        require_requests(made, (case.prompt, case.prompt), case.sampling, version=0)

    def again(seed: int) -> tuple[list[Completion], list[Completion]]:
        (drawn,) = harness.run(_draw_by_seed, attrs.evolve(case, sampling=attrs.evolve(case.sampling, seed=seed)))
        return drawn.again + drawn.fresh, drawn.first * 2

    require_same_draws(
        draws.again + draws.fresh,
        draws.first * 2,
        why="equal seeds give equal completions, on a fresh engine too",
        again=again,
        seed=case.sampling.seed,
    )
    _require_independent(list(zip(draws.other, draws.first, strict=True)), what="two seeds")
    _require_independent(list(combinations(draws.first, 2)), what="two samples, or two equal prompts, of one call")


def _require_independent(pairs: list[tuple[Completion, Completion]], *, what: str) -> None:
    """Raise if draws that share nothing are equal; the chance of that is the probability of the tokens themselves."""
    for one, other in pairs:
        surprise = -sum(one.logprobs)
        if surprise > _NEVER and one.token_ids == other.token_ids:
            raise LawError(
                f"{what} gave equal tokens, {one.token_ids}, which has a probability of exp(-{surprise:.0f}) if each "
                "has a random stream of its own."
            )


@attrs.frozen(kw_only=True)
class _Frequencies:
    policy: PolicyCase
    prompt: tuple[int, ...]
    samplings: tuple[SamplingParams, ...]  # one for each setting that chooses among tokens


@st.composite
def _two_token_calls(draw: DrawFn, world_size: int) -> _Frequencies:
    del world_size
    (prompt,) = draw(prompt_cases(VOCABULARY, min_prompts=1, max_prompts=1))
    plain = SamplingParams(
        temperature=draw(_TEMPERATURES), max_new_tokens=2, n=_NUM_DRAWS, seed=draw(st.integers(0, 2**31 - 1))
    )
    chosen = attrs.evolve(plain, n=_NUM_DRAWS_CHOSEN)
    stops = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=VOCABULARY // 2, unique=True))
    return _Frequencies(
        policy=draw(policy_cases()),
        prompt=prompt,
        samplings=(
            plain,
            attrs.evolve(chosen, top_k=draw(st.integers(1, VOCABULARY + 1))),
            attrs.evolve(chosen, top_p=draw(st.floats(0.1, 0.95))),
            attrs.evolve(chosen, top_k=draw(st.integers(2, 6)), top_p=draw(st.floats(0.3, 0.95))),
            attrs.evolve(chosen, min_new_tokens=draw(st.integers(1, 2)), stop_token_ids=tuple(stops)),
        ),
    )


def _draw_often(rank: Rank, case: _Frequencies) -> list[list[Completion]]:
    with running(rank, build_policy(case.policy)) as handle:
        return [generate(handle, [case.prompt], sampling) for sampling in case.samplings]


def _distribution(harness: Harness, case: _Frequencies) -> None:
    (drawn,) = harness.run(_draw_often, case)
    model = build_policy(case.policy)
    for made, sampling in zip(drawn, case.samplings, strict=True):
        require_requests(made, [case.prompt], sampling, version=0)
        by_tokens = {completion.token_ids: completion for completion in made}
        require_logprobs(list(by_tokens.values()), model, temperature=sampling.temperature)
        by_first = {token_ids[0]: by_tokens[token_ids] for token_ids in sorted(by_tokens)}  # the longest of each
        logits = dict(zip(by_first, trainer_logits(model, list(by_first.values())), strict=True))
        _require_frequencies(
            [completion.token_ids[0] for completion in made], logits[made[0].token_ids[0]][0], sampling
        )
        later = attrs.evolve(sampling, min_new_tokens=max(sampling.min_new_tokens - 1, 0))
        for first, logits_TV in logits.items():
            # given the first token, the second ones are draws that share nothing with it
            seconds = [token_ids[1] for token_ids in _token_ids(made) if token_ids[0] == first and len(token_ids) > 1]
            if seconds:
                _require_frequencies(seconds, logits_TV[1], later, after=f" after {first}")


def _token_ids(made: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in made]


def _require_frequencies(tokens: list[int], logits_V: Tensor, sampling: SamplingParams, *, after: str = "") -> None:
    counts, num_draws = Counter(tokens), len(tokens)
    shares_V = _wanted_shares(logits_V, sampling)
    for token, share in enumerate(shares_V.tolist() if shares_V is not None else ()):
        if share == 0 and counts[token]:
            raise LawError(f"token {token}{after} was drawn {counts[token]} times and {sampling} leaves it out.")
        mean, deviation = num_draws * share, _deviation(num_draws, share)
        if abs(counts[token] - mean) > deviation:
            raise LawError(
                f"token {token}{after} has a probability of {share:.4f} and was drawn {counts[token]} times of "
                f"{num_draws}; it must be {mean:.0f} times, give or take {deviation:.0f}; {sampling}."
            )


def _wanted_shares(logits_V: Tensor, sampling: SamplingParams) -> Tensor | None:
    """Return the probabilities (V) of the draw, or None where rounding decides which tokens are left out."""
    allowed_V = logits_V.clone()
    if sampling.min_new_tokens:
        allowed_V[list(sampling.stop_token_ids)] = float("-inf")
    sorted_V, ids_V = torch.softmax(allowed_V / sampling.temperature, dim=-1).sort(descending=True)
    num_kept = min(sampling.top_k, VOCABULARY) or VOCABULARY
    if num_kept < VOCABULARY and sorted_V[num_kept - 1] - sorted_V[num_kept] < _BORDER * sorted_V[num_kept]:
        return None
    if sampling.top_p < 1:
        shares_V = sorted_V[:num_kept] / sorted_V[:num_kept].sum()  # of what top-k leaves
        before_V = shares_V.cumsum(-1) - shares_V
        num_kept = int((before_V < sampling.top_p).sum())
        if ((before_V - sampling.top_p).abs() < _BORDER).any():
            return None
    if num_kept < VOCABULARY and sorted_V[num_kept - 1] - sorted_V[num_kept] < _BORDER * sorted_V[num_kept]:
        return None
    kept_V = sorted_V[:num_kept]
    return torch.zeros_like(sorted_V).scatter(0, ids_V[:num_kept], kept_V / kept_V.sum())


_BORDER = 1e-4
"""Rounding moves a probability by 1e-6 of itself."""


def _deviation(num_draws: int, share: float) -> float:
    """Return how far a count of independent draws can be from its mean but for a chance of 2 * exp(-30).

    Reference:
        Bernstein's inequality: P(|count - mean| >= t) <= 2 exp(-t^2 / (2 (n p (1 - p) + t / 3))), solved for t.
    """
    variance = num_draws * share * (1 - share)
    return _NEVER / 3 + math.sqrt((_NEVER / 3) ** 2 + 2 * _NEVER * variance)


@attrs.frozen(kw_only=True)
class _Parts:
    policy: PolicyCase
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    cut: int  # prompts of the first part


@attrs.frozen(kw_only=True)
class _InParts:
    whole: list[Completion]
    parts: list[Completion]


@st.composite
def _requests_in_parts(draw: DrawFn, world_size: int) -> _Parts:
    del world_size
    prompts = draw(prompt_cases(VOCABULARY, min_prompts=2))
    # hot, so that draws of another stream show
    sampling = draw(sampling_cases(VOCABULARY, temperatures=st.just(0.0) | st.floats(1.5, 4)))
    return _Parts(
        policy=draw(policy_cases(max_layers=1)),
        prompts=prompts,
        sampling=attrs.evolve(sampling, first_prompt=draw(st.integers(0, 3))),
        cut=draw(st.integers(0, len(prompts))),
    )


def _generate_in_parts(rank: Rank, case: _Parts) -> _InParts:
    rest = attrs.evolve(case.sampling, first_prompt=case.sampling.first_prompt + case.cut)
    with running(rank, build_policy(policy_for(rank.engine, case.policy))) as handle:
        return _InParts(
            whole=generate(handle, case.prompts, case.sampling),
            parts=[
                *generate(handle, case.prompts[: case.cut], case.sampling),
                *generate(handle, case.prompts[case.cut :], rest),
            ],
        )


def _part(harness: Harness, case: _Parts) -> None:
    (made,) = harness.run(_generate_in_parts, case)
    model = build_policy(policy_for(harness.subject.engine, case.policy))
    require_requests(made.parts, case.prompts, case.sampling, version=0)
    require_logprobs(made.parts, model, temperature=case.sampling.temperature)

    def again(seed: int) -> tuple[list[Completion], list[Completion]]:
        (drawn,) = harness.run(_generate_in_parts, attrs.evolve(case, sampling=attrs.evolve(case.sampling, seed=seed)))
        return drawn.parts, drawn.whole

    why = "a part of a request is given what the whole would give it"
    require_same(made.parts, made.whole, model, sampling=case.sampling, why=why, again=again)


LAWS: tuple[Law, ...] = (
    Law(
        id="engine.greedy",
        statement="At temperature 0 every token is the one of the trainer's largest logit, whatever the seed.",
        requires=frozenset({"sampling"}),
        check=for_all(_greedy_calls, on_each_rank(_greedy)),
    ),
    Law(
        id="engine.seed",
        statement="Equal seeds give equal completions, on a fresh engine too; other seeds, prompts and samples have "
        "random streams of their own.",
        requires=frozenset({"sampling", "seeds"}),
        check=for_all(_seeds, on_each_rank(_seed)),
    ),
    Law(
        id="engine.sampling_distribution",
        statement="Tokens are drawn with the trainer's own probabilities, each given those before it, and none that "
        "top_k, top_p or min_new_tokens leave out.",
        requires=frozenset({"sampling"}),
        check=for_all(_two_token_calls, on_each_rank(_distribution)),
    ),
    Law(
        id="engine.part",
        statement="A part of a request, with the number of its first prompt, is given what the whole would give it.",
        requires=frozenset({"seeds"}),
        check=for_all(_requests_in_parts, on_each_rank(_part)),
    ),
)
"""How tokens are chosen."""
