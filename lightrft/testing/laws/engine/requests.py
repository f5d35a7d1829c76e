"""What an engine gives out: completions that match the requests, with the trainer's own logprobs."""

from __future__ import annotations

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from lightrft.errors import ConfigError, DataError, LawError, UnsupportedError
from lightrft.strategy.protocols import Completion, Prompt, SamplingParams
from lightrft.testing.cases.policies import (
    CONTEXT,
    VOCABULARY,
    PolicyCase,
    build_policy,
    generate,
    policy_cases,
    running,
)
from lightrft.testing.cases.prompts import prompt_cases, sampling_cases
from lightrft.testing.cases.vision import ImageCase, VideoCase, build_image, build_video
from lightrft.testing.law import Harness, Law, for_all, on_each_rank
from lightrft.testing.reference.completions import (
    Refusal,
    refusal,
    require_logprobs,
    require_refusal,
    require_requests,
    require_same,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]


@attrs.frozen(kw_only=True)
class _Call:
    policy: PolicyCase
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    batch_size: int


def _calls(world_size: int) -> SearchStrategy[_Call]:
    del world_size
    return st.builds(
        _Call,
        policy=policy_cases(),
        prompts=prompt_cases(VOCABULARY),
        sampling=sampling_cases(VOCABULARY),
        batch_size=st.sampled_from((1, 2, 3, 1024)),
    )


def _generate(rank: Rank, case: _Call) -> list[Completion]:
    with running(rank, build_policy(case.policy), batch_size=case.batch_size) as handle:
        return generate(handle, case.prompts, case.sampling)


def _order(harness: Harness, case: _Call) -> None:
    (made,) = harness.run(_generate, case)
    require_requests(made, case.prompts, case.sampling, version=0)


def _logprobs(harness: Harness, case: _Call) -> None:
    (made,) = harness.run(_generate, case)
    require_requests(made, case.prompts, case.sampling, version=0)
    require_logprobs(made, build_policy(case.policy), temperature=case.sampling.temperature)


@attrs.frozen(kw_only=True)
class _TwoCalls:
    policy: PolicyCase
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    chosen: tuple[int, ...]  # places of the prompts of the second call
    num_chosen: int  # samples of each in the second call
    batch_size: int


@st.composite
def _pairs_of_calls(draw: DrawFn, world_size: int) -> _TwoCalls:
    del world_size
    prompts = draw(prompt_cases(VOCABULARY, min_prompts=1))
    sampling = draw(sampling_cases(VOCABULARY, max_samples=4))
    places = range(len(prompts))
    # a random stream belongs to the number of a prompt in its call, so where tokens are drawn the numbers stay
    others = (
        st.lists(st.sampled_from(places), max_size=5)
        if sampling.temperature == 0
        else st.sampled_from([list(places[:end]) for end in range(1, len(prompts) + 1)])
    )
    return _TwoCalls(
        policy=draw(policy_cases()),
        prompts=prompts,
        sampling=sampling,
        chosen=tuple(draw(others)),
        num_chosen=draw(st.integers(1, sampling.n)),
        batch_size=draw(st.integers(1, 3)),
    )


def _generate_twice(rank: Rank, case: _TwoCalls) -> tuple[list[Completion], list[Completion]]:
    with running(rank, build_policy(case.policy), batch_size=case.batch_size) as handle:
        whole = generate(handle, case.prompts, case.sampling)
        part = generate(
            handle, [case.prompts[place] for place in case.chosen], attrs.evolve(case.sampling, n=case.num_chosen)
        )
        return whole, part


def _batch_composition(harness: Harness, case: _TwoCalls) -> None:
    ((whole, part),) = harness.run(_generate_twice, case)
    require_requests(whole, case.prompts, case.sampling, version=0)
    asked = attrs.evolve(case.sampling, n=case.num_chosen)
    require_requests(part, [case.prompts[place] for place in case.chosen], asked, version=0)

    def again(seed: int) -> tuple[list[Completion], list[Completion]]:
        ((whole, part),) = harness.run(
            _generate_twice, attrs.evolve(case, sampling=attrs.evolve(case.sampling, seed=seed))
        )
        return part, _chosen(whole, case)

    require_same(
        part,
        _chosen(whole, case),
        build_policy(case.policy),
        sampling=case.sampling,
        why="a completion depends on its prompt and the numbers of prompt and sample",
        again=again,
    )


def _chosen(whole: list[Completion], case: _TwoCalls) -> list[Completion]:
    return [whole[place * case.sampling.n + sample] for place in case.chosen for sample in range(case.num_chosen)]


@attrs.frozen(kw_only=True)
class _BadCalls:
    prompts: tuple[tuple[int, ...], ...]
    place: int
    surplus: int


@attrs.frozen(kw_only=True)
class _Answer:
    fault: str
    refused: Refusal | None
    status: str
    afterwards: list[Completion]


@attrs.frozen(kw_only=True)
class _Answers:
    capabilities: tuple[str, ...]
    answers: list[_Answer]


@st.composite
def _bad_calls(draw: DrawFn, world_size: int) -> _BadCalls:
    del world_size
    prompts = draw(prompt_cases(VOCABULARY, min_prompts=1))
    return _BadCalls(prompts=prompts, place=draw(st.integers(0, len(prompts) - 1)), surplus=draw(st.integers(0, 3)))


_SHORT = SamplingParams(temperature=0.0, max_new_tokens=2)

_LIMITS = {
    "stop_token_ids": SamplingParams(max_new_tokens=2, stop_token_ids=(1, VOCABULARY)),
    "negative stop_token_ids": SamplingParams(max_new_tokens=2, stop_token_ids=(-1,)),
    "min_new_tokens above max_new_tokens": SamplingParams(min_new_tokens=3, max_new_tokens=2, stop_token_ids=(1,)),
}

_CHOOSING = {
    "top_k": SamplingParams(top_k=2, max_new_tokens=2),
    "top_p": SamplingParams(top_p=0.5, max_new_tokens=2),
    "min_new_tokens": SamplingParams(min_new_tokens=1, max_new_tokens=2, stop_token_ids=(1,)),
}


def _generate_badly(rank: Rank, case: _BadCalls) -> _Answers:
    faulty = {
        "empty": Prompt(token_ids=()),
        "long": Prompt(token_ids=(1,) * (CONTEXT + case.surplus)),
        "token beyond the vocabulary": Prompt(token_ids=(*case.prompts[case.place], VOCABULARY)),
        "negative token": Prompt(token_ids=(-1, *case.prompts[case.place])),
        "images": Prompt(token_ids=case.prompts[case.place], images=(build_image(ImageCase()),)),
        "videos": Prompt(token_ids=case.prompts[case.place], videos=(build_video(VideoCase()),)),
    }
    room = CONTEXT - max(len(prompt) for prompt in case.prompts)
    lengths = {"max_new_tokens": room + 1, "fitting": room}
    samplings = {
        **_LIMITS,
        **_CHOOSING,
        **{fault: SamplingParams(temperature=0.0, max_new_tokens=length) for fault, length in lengths.items()},
    }
    with running(rank, build_policy(PolicyCase())) as handle:
        answers: list[_Answer] = []
        for fault in (*faulty, *samplings):
            prompts = [Prompt(token_ids=prompt) for prompt in case.prompts]
            prompts[case.place] = faulty.get(fault, prompts[case.place])
            refused = refusal(handle.engine.generate, handle, prompts, samplings.get(fault, _SHORT))
            answers.append(
                _Answer(
                    fault=fault,
                    refused=refused,
                    status=handle.status,
                    afterwards=generate(handle, case.prompts, _SHORT),
                )
            )
        return _Answers(capabilities=tuple(sorted(handle.engine.capabilities)), answers=answers)


def _refusals(harness: Harness, case: _BadCalls) -> None:
    (seen,) = harness.run(_generate_badly, case)
    for answer in seen.answers:
        of = f"generate with {answer.fault!r} at prompts[{case.place}]"
        if answer.fault in {"empty", "long", "token beyond the vocabulary", "negative token"}:
            require_refusal(answer.refused, DataError, of=of, naming=(f"[{case.place}]",))
        elif answer.fault in {*_LIMITS, "max_new_tokens"}:
            _require_unmet(answer, seen.capabilities, of)
        elif answer.fault == "fitting":
            if answer.refused:
                raise LawError(f"{of} raised {answer.refused}; prompt and max_new_tokens fit into the context.")
        elif answer.fault in {"images", "videos"} or "sampling" not in seen.capabilities:
            # an engine that takes them has no processor here
            require_refusal(answer.refused, UnsupportedError, of=of)
        elif answer.fault in _CHOOSING and answer.refused:
            raise LawError(f"{of} raised {answer.refused} and the engine claims 'sampling'.")
        if answer.status != "awake":
            raise LawError(f"after {of} the engine is {answer.status!r} and must be 'awake'.")
        require_requests(answer.afterwards, case.prompts, _SHORT, version=0)


def _require_unmet(answer: _Answer, capabilities: tuple[str, ...], of: str) -> None:
    """Raise unless parameters that cannot be met were refused by their name."""
    # an engine that draws no tokens may refuse min_new_tokens of any value
    is_unknown = "sampling" not in capabilities and "min_new_tokens" in answer.fault
    if not (is_unknown and answer.refused and UnsupportedError.__name__ in answer.refused.kinds):
        require_refusal(answer.refused, ConfigError, of=of, naming=(answer.fault.removeprefix("negative ").split()[0],))


LAWS: tuple[Law, ...] = (
    Law(
        id="engine.order",
        statement="Completions match the requests: n of each prompt, prompt by prompt, none longer than asked for, and "
        "each ends at its first stop token or at max_new_tokens and says which.",
        check=for_all(_calls, on_each_rank(_order)),
    ),
    Law(
        id="engine.logprobs",
        statement="Every logprob is the trainer's own for this token at the sampling temperature.",
        check=for_all(_calls, on_each_rank(_logprobs)),
    ),
    Law(
        id="engine.batch_composition",
        statement="A completion does not depend on the other prompts of its call, nor on how many samples are made.",
        requires=frozenset({"seeds"}),
        check=for_all(_pairs_of_calls, on_each_rank(_batch_composition)),
    ),
    Law(
        id="engine.refusals",
        statement="A prompt that is empty, too long or outside of the vocabulary is refused by its index, parameters "
        "that cannot be met by their name, what the engine does not claim is refused too, and after a refusal the "
        "engine works as before.",
        check=for_all(_bad_calls, on_each_rank(_refusals)),
    ),
)
"""The laws of every engine but that of its life."""
