"""Prompts with images: what an engine that claims to take them makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import nn

from lightrft.errors import DataError, LawError, UnsupportedError
from lightrft.strategy.protocols import Completion, EngineHandle, Prompt, SamplingParams
from lightrft.testing.cases.policies import running
from lightrft.testing.cases.prompts import sampling_cases
from lightrft.testing.cases.vision import (
    VISION_VOCABULARY,
    ImageCase,
    VisionCase,
    VisionPrompt,
    build_image,
    build_processor,
    build_vision_policy,
    prompt_of,
    read_by_transformers,
    vision_cases,
    vision_prompt_cases,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.laws.engine.weights import named_weights
from lightrft.testing.reference.completions import (
    Refusal,
    refusal,
    require_greedy,
    require_logprobs,
    require_refusal,
    require_requests,
    require_same_draws,
    require_same_greedy,
)
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_SHORT = SamplingParams(temperature=0.0, max_new_tokens=2)


def _ask(handle: EngineHandle, cases: Sequence[VisionPrompt], sampling: SamplingParams) -> list[Completion]:
    processor = build_processor()
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


def _calls(world_size: int) -> SearchStrategy[_Call]:
    del world_size
    return st.builds(
        _Call,
        policy=vision_cases(),
        prompts=vision_prompt_cases(),
        sampling=sampling_cases(VISION_VOCABULARY),
        batch_size=st.sampled_from((1, 2, 3, 1024)),
    )


def _generate(rank: Rank, case: _Call) -> _Made:
    policy = build_vision_policy(case.policy)
    with running(rank, policy, batch_size=case.batch_size, processor=build_processor()) as handle:
        together = _ask(handle, case.prompts, case.sampling)
        first = case.sampling.first_prompt
        parts = [
            _ask(handle, [prompt], attrs.evolve(case.sampling, first_prompt=first + place))
            for place, prompt in enumerate(case.prompts)
        ]
        return _Made(together=together, alone=[completion for part in parts for completion in part])


def _images(harness: Harness, case: _Call) -> None:
    (made,) = harness.run(_generate, case)
    model, sampling = build_vision_policy(case.policy), case.sampling
    read = read_by_transformers(case.prompts, n=sampling.n)
    require_requests(made.together, read.token_ids, sampling, version=0)
    require_requests(made.alone, read.token_ids, sampling, version=0)
    placeholder = build_processor().image_token_id
    if any(placeholder in completion.token_ids for completion in made.together):
        raise LawError(f"a completion has the placeholder {placeholder} of an image, which must never be drawn: {made}")
    require_logprobs(made.together, model, temperature=sampling.temperature, beside=read.beside)
    if sampling.temperature == 0:
        require_greedy(made.together, model, sampling, beside=read.beside, never=(placeholder,))
        require_same_greedy(made.alone, made.together, model, beside=read.beside)
        return

    def again(seed: int) -> tuple[list[Completion], list[Completion]]:
        (redrawn,) = harness.run(_generate, attrs.evolve(case, sampling=attrs.evolve(sampling, seed=seed)))
        return redrawn.alone, redrawn.together

    why = "a completion depends on its prompt, its images and the numbers of prompt and sample"
    require_same_draws(made.alone, made.together, why=why, again=again, seed=sampling.seed)


@attrs.frozen(kw_only=True)
class _BadCall:
    prompts: tuple[VisionPrompt, ...]
    place: int


@attrs.frozen(kw_only=True)
class _Refused:
    counts: list[tuple[int, int]]  # placeholders and images of each faulty prompt
    answers: list[Refusal | None]
    without_processor: Refusal | None
    afterwards: list[Completion]


@st.composite
def _bad_calls(draw: DrawFn, world_size: int) -> _BadCall:
    del world_size
    prompts = draw(vision_prompt_cases(min_prompts=1))
    return _BadCall(prompts=prompts, place=draw(st.integers(0, len(prompts) - 1)))


def _faulty(prompt: Prompt, placeholder: int) -> list[Prompt]:
    """Return the prompt with a placeholder too many, an image too many, and an image too few."""
    fewer = [attrs.evolve(prompt, images=prompt.images[:-1])] if prompt.images else []
    return [
        attrs.evolve(prompt, token_ids=(*prompt.token_ids, placeholder)),
        attrs.evolve(prompt, images=(*prompt.images, build_image(ImageCase()))),
        *fewer,
    ]


def _generate_badly(rank: Rank, case: _BadCall) -> _Refused:
    processor, policy = build_processor(), build_vision_policy(VisionCase())
    prompts = [prompt_of(prompt, processor) for prompt in case.prompts]
    faulty = _faulty(prompts[case.place], processor.image_token_id)
    answers: list[Refusal | None] = []
    with running(rank, policy, processor=processor) as handle:
        for wrong in faulty:
            asked = [wrong if place == case.place else prompt for place, prompt in enumerate(prompts)]
            answers.append(refusal(handle.engine.generate, handle, asked, _SHORT))
        afterwards = _ask(handle, case.prompts, _SHORT)
    with running(rank, policy) as handle:
        sees = prompt_of(VisionPrompt(texts=((), ()), images=(ImageCase(),)), processor)
        without = refusal(handle.engine.generate, handle, [sees], _SHORT)
    return _Refused(
        counts=[(wrong.token_ids.count(processor.image_token_id), len(wrong.images)) for wrong in faulty],
        answers=answers,
        without_processor=without,
        afterwards=afterwards,
    )


def _refusals(harness: Harness, case: _BadCall) -> None:
    (seen,) = harness.run(_generate_badly, case)
    for (num_places, num_images), answer in zip(seen.counts, seen.answers, strict=True):
        of = f"generate with {num_places} placeholders and {num_images} images at prompts[{case.place}]"
        require_refusal(answer, DataError, of=of, naming=(f"[{case.place}]", f"{num_places} ", f"{num_images} "))
    require_refusal(
        seen.without_processor, UnsupportedError, of="generate with an image and without a processor", naming=("[0]",)
    )
    read = read_by_transformers(case.prompts, n=1)
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
        prompts=vision_prompt_cases(min_prompts=1, max_prompts=2, max_images=2),
    )


def _with_other_eyes(case: _Update) -> nn.Module:
    """Return the policy with the weights of another one wherever no text passes."""
    model = build_vision_policy(case.policy)
    other = named_weights(build_vision_policy(attrs.evolve(case.policy, seed=case.seed)))
    eyes = {name: tensor for name, tensor in other.items() if "vision" in name or "connector" in name}
    model.load_state_dict(eyes, strict=False)
    return model


def _update(rank: Rank, case: _Update) -> list[Completion]:
    with running(rank, build_vision_policy(case.policy), processor=build_processor()) as handle:
        for _ in range(2):  # whatever is kept of an image is kept now
            _ask(handle, case.prompts, _SHORT)
        handle.engine.begin_update(handle)
        handle.engine.put(handle, named_weights(_with_other_eyes(case)).items())
        handle.engine.commit(handle)
        return _ask(handle, case.prompts, _SHORT)


def _updated(harness: Harness, case: _Update) -> None:
    (made,) = harness.run(_update, case)
    read = read_by_transformers(case.prompts, n=1)
    require_requests(made, read.token_ids, _SHORT, version=1)
    require_logprobs(made, _with_other_eyes(case), temperature=0.0, beside=read.beside)


LAWS: tuple[Law, ...] = (
    Law(
        id="engine.images",
        statement="A prompt with images is read as transformers' processor reads it, in any mixture with others: its "
        "completions are the model's own, do not depend on the other prompts, and have no image.",
        requires=frozenset({"images"}),
        check=for_all(_calls, _images),
        worlds="one",
    ),
    Law(
        id="engine.image_refusals",
        statement="Images that are more or fewer than their placeholders are refused by the prompt's index and both "
        "numbers, and all images where the engine has no processor; after a refusal it works as before.",
        requires=frozenset({"images"}),
        check=for_all(_bad_calls, _refusals),
        worlds="one",
    ),
    Law(
        id="engine.image_update",
        statement="After an update of the weights that see, the same image is seen with the new ones.",
        requires=frozenset({"images"}),
        check=for_all(_updates, _updated),
        worlds="one",
    ),
)
"""The laws of engines that take images."""
