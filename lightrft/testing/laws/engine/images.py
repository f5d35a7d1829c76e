"""Prompts with images and videos: what an engine that claims to take them makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import nn

from lightrft.errors import DataError, LawError, UnsupportedError
from lightrft.models.images import placeholders_of
from lightrft.strategy.protocols import Capability, Completion, EngineHandle, Prompt, SamplingParams
from lightrft.testing.cases.policies import running
from lightrft.testing.cases.prompts import sampling_cases
from lightrft.testing.cases.vision import (
    VISION_VOCABULARY,
    ImageCase,
    Seen,
    VideoCase,
    VisionCase,
    VisionPrompt,
    build_processor,
    build_vision_policy,
    prompt_of,
    read_by_transformers,
    vision_cases,
    vision_prompt_cases,
)
from lightrft.testing.law import Cases, Harness, Law, for_all, on_each_rank
from lightrft.testing.laws.engine.weights import named_weights
from lightrft.testing.reference.completions import (
    Refusal,
    refusal,
    require_greedy,
    require_logprobs,
    require_refusal,
    require_requests,
    require_same,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_EYES = ("vision", "connector", "visual")
"""Parts of the names of weights through which no text passes."""

_SHORT = SamplingParams(temperature=0.0, max_new_tokens=2)


def _ask(handle: EngineHandle, cases: Sequence[VisionPrompt], sampling: SamplingParams, sees: Seen) -> list[Completion]:
    processor = build_processor(sees)
    with torch.no_grad():
        return handle.engine.generate(handle, [prompt_of(case, processor) for case in cases], sampling)


@attrs.frozen(kw_only=True)
class _Call:
    policy: VisionCase
    prompts: tuple[VisionPrompt, ...]
    sampling: SamplingParams
    batch_size: int


@attrs.frozen(kw_only=True)
class _Made:
    together: list[Completion]
    alone: list[Completion]


def _calls(sees: Seen) -> Cases[_Call]:
    def calls(world_size: int) -> SearchStrategy[_Call]:
        del world_size
        return st.builds(
            _Call,
            policy=vision_cases(sees),
            prompts=vision_prompt_cases(sees=sees),
            sampling=sampling_cases(VISION_VOCABULARY),
            batch_size=st.sampled_from((1, 2, 3, 1024)),
        )

    return calls


def _generate(rank: Rank, case: _Call) -> _Made:
    policy, sees = build_vision_policy(case.policy), case.policy.sees
    with running(rank, policy, batch_size=case.batch_size, processor=build_processor(sees)) as handle:
        together = _ask(handle, case.prompts, case.sampling, sees)
        first = case.sampling.first_prompt
        parts = [
            _ask(handle, [prompt], attrs.evolve(case.sampling, first_prompt=first + place), sees)
            for place, prompt in enumerate(case.prompts)
        ]
        return _Made(together=together, alone=[completion for part in parts for completion in part])


def _generated(harness: Harness, case: _Call) -> None:
    (made,) = harness.run(_generate, case)
    model, sampling = build_vision_policy(case.policy), case.sampling
    read = read_by_transformers(case.prompts, n=sampling.n, sees=case.policy.sees)
    require_requests(made.together, read.token_ids, sampling, version=0)
    require_requests(made.alone, read.token_ids, sampling, version=0)
    never = tuple(placeholders_of(build_processor(case.policy.sees)))
    if any(set(never) & set(completion.token_ids) for completion in made.together):
        raise LawError(f"a completion has one of the placeholders {never}, which must never be drawn: {made}")
    require_logprobs(made.together, model, temperature=sampling.temperature, beside=read.beside)
    if sampling.temperature == 0:
        require_greedy(made.together, model, sampling, beside=read.beside, never=never)

    def again(seed: int) -> tuple[list[Completion], list[Completion]]:
        (redrawn,) = harness.run(_generate, attrs.evolve(case, sampling=attrs.evolve(sampling, seed=seed)))
        return redrawn.alone, redrawn.together

    why = "a completion depends on its prompt, what it sees and the numbers of prompt and sample"
    require_same(made.alone, made.together, model, sampling=sampling, why=why, again=again, beside=read.beside)


@attrs.frozen(kw_only=True)
class _BadCall:
    sees: Seen
    prompts: tuple[VisionPrompt, ...]
    place: int


@attrs.frozen(kw_only=True)
class _Refused:
    counts: list[tuple[int, int]]  # placeholders and images or videos of each faulty prompt
    answers: list[Refusal | None]
    without_processor: Refusal | None
    afterwards: list[Completion]


def _bad_calls(sees: Seen) -> Cases[_BadCall]:
    @st.composite
    def bad_calls(draw: DrawFn) -> _BadCall:
        prompts = draw(vision_prompt_cases(min_prompts=1, sees=sees))
        return _BadCall(sees=sees, prompts=prompts, place=draw(st.integers(0, len(prompts) - 1)))

    def of_world(world_size: int) -> SearchStrategy[_BadCall]:
        del world_size
        return bad_calls()

    return of_world


def _seeing(sees: Seen) -> Prompt:
    """Return a prompt of one image or video alone."""
    images, videos = (ImageCase(),), (VideoCase(),)
    one = (
        VisionPrompt(texts=((), ()), images=images) if sees == "images" else VisionPrompt(texts=((), ()), videos=videos)
    )
    return prompt_of(one, build_processor(sees))


def _faulty(prompt: Prompt, sees: Seen) -> list[Prompt]:
    """Return the prompt with a placeholder too many, an image or video too many, and one too few."""
    extra = _seeing(sees)
    more = attrs.evolve(prompt, images=(*prompt.images, *extra.images), videos=(*prompt.videos, *extra.videos))
    fewer = attrs.evolve(prompt, images=prompt.images[:-1], videos=prompt.videos[:-1])
    placeholder = attrs.evolve(prompt, token_ids=(*prompt.token_ids, *extra.token_ids))
    return [placeholder, more, *([fewer] if prompt != fewer else [])]


def _generate_badly(rank: Rank, case: _BadCall) -> _Refused:
    processor, policy = build_processor(case.sees), build_vision_policy(VisionCase(sees=case.sees))
    prompts = [prompt_of(prompt, processor) for prompt in case.prompts]
    faulty, sees = _faulty(prompts[case.place], case.sees), _seeing(case.sees)
    answers: list[Refusal | None] = []
    with running(rank, policy, processor=processor) as handle:
        for wrong in faulty:
            asked = [wrong if place == case.place else prompt for place, prompt in enumerate(prompts)]
            answers.append(refusal(handle.engine.generate, handle, asked, _SHORT))
        afterwards = _ask(handle, case.prompts, _SHORT, case.sees)
    with running(rank, policy) as handle:
        without = refusal(handle.engine.generate, handle, [sees], _SHORT)
    return _Refused(
        counts=[(wrong.token_ids.count(sees.token_ids[0]), len(wrong.images) + len(wrong.videos)) for wrong in faulty],
        answers=answers,
        without_processor=without,
        afterwards=afterwards,
    )


def _refusals(harness: Harness, case: _BadCall) -> None:
    (seen,) = harness.run(_generate_badly, case)
    for (num_places, num_seen), answer in zip(seen.counts, seen.answers, strict=True):
        of = f"generate with {num_places} placeholders and {num_seen} {case.sees} at prompts[{case.place}]"
        require_refusal(answer, DataError, of=of, naming=(f"[{case.place}]", f"{num_places} ", f"{num_seen} "))
    of = f"generate with {case.sees} and without a processor"
    require_refusal(seen.without_processor, UnsupportedError, of=of, naming=("[0]",))
    read = read_by_transformers(case.prompts, n=1, sees=case.sees)
    require_requests(seen.afterwards, read.token_ids, _SHORT, version=0)


@attrs.frozen(kw_only=True)
class _Update:
    policy: VisionCase
    seed: int  # of the new weights
    prompts: tuple[VisionPrompt, ...]


def _updates(world_size: int) -> SearchStrategy[_Update]:
    del world_size
    return st.builds(
        _Update,
        policy=vision_cases(),
        seed=st.integers(0, 2**31 - 1),
        prompts=vision_prompt_cases(min_prompts=1, max_prompts=2, max_seen=2),
    )


def _with_other_eyes(case: _Update) -> nn.Module:
    """Return the policy with the weights of another one wherever no text passes."""
    model = build_vision_policy(case.policy)
    other = named_weights(build_vision_policy(attrs.evolve(case.policy, seed=case.seed)))
    eyes = {name: tensor for name, tensor in other.items() if any(part in name for part in _EYES)}
    model.load_state_dict(eyes, strict=False)
    return model


def _update(rank: Rank, case: _Update) -> list[Completion]:
    with running(rank, build_vision_policy(case.policy), processor=build_processor()) as handle:
        for _ in range(2):  # whatever is kept of an image is kept now
            _ask(handle, case.prompts, _SHORT, "images")
        handle.engine.begin_update(handle)
        handle.engine.put(handle, named_weights(_with_other_eyes(case)).items())
        handle.engine.commit(handle)
        return _ask(handle, case.prompts, _SHORT, "images")


def _updated(harness: Harness, case: _Update) -> None:
    (made,) = harness.run(_update, case)
    read = read_by_transformers(case.prompts, n=1)
    require_requests(made, read.token_ids, _SHORT, version=1)
    require_logprobs(made, _with_other_eyes(case), temperature=0.0, beside=read.beside)


def _laws(sees: Seen) -> tuple[Law, ...]:
    one, claims = sees.removesuffix("s"), frozenset[Capability]({sees})
    return (
        Law(
            id=f"engine.{sees}",
            statement=f"A prompt with {sees} is read as transformers' processor reads it, in any mixture with others: "
            f"its completions are the model's own, do not depend on the other prompts, and have no {one}.",
            requires=claims,
            check=for_all(_calls(sees), on_each_rank(_generated)),
        ),
        Law(
            id=f"engine.{one}_refusals",
            statement=f"{sees.title()} that are more or fewer than their placeholders are refused by the prompt's "
            f"index and both numbers, and all {sees} where the engine has no processor; after a refusal it works as "
            "before.",
            requires=claims,
            check=for_all(_bad_calls(sees), on_each_rank(_refusals)),
        ),
    )


LAWS: tuple[Law, ...] = (
    *_laws("images"),
    Law(
        id="engine.image_update",
        statement="After an update of the weights that see, the same image is seen with the new ones.",
        requires=frozenset({"images"}),
        check=for_all(_updates, on_each_rank(_updated)),
    ),
    *_laws("videos"),
)
"""The laws of engines that take images, and of those that take videos."""
