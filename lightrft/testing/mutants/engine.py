"""Engines that give out wrong completions on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

import attrs
import torch
from torch import Tensor

from lightrft.config import EngineConfig
from lightrft.models.images import placeholders_of
from lightrft.strategy.protocols import Completion, EngineHandle, Prompt, SamplingParams
from lightrft.strategy.protocols.rollout import Engine, Generate
from lightrft.testing.cases.policies import CONTEXT, VOCABULARY
from lightrft.testing.mutants.engine_inside import serve, weights_inside
from lightrft.testing.mutants.mutant import BreakEngine, Mutant, engine_mutant
from lightrft.testing.reference.completions import trainer_logits

__all__ = ["MUTANTS"]


class _WrongGenerate(Protocol):
    """Makes completions wrongly, with the help of an engine that makes them right."""

    def __call__(
        self, right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams, /
    ) -> list[Completion]: ...


def _generating(wrong: _WrongGenerate) -> BreakEngine:
    def breaks(engine: Engine, config: EngineConfig) -> Engine:
        del config

        def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
            return wrong(engine.generate, handle, prompts, sampling)

        return serve(attrs.evolve(engine, generate=generate))

    return breaks


class _WrongCompletion(Protocol):
    """Spoils one completion."""

    def __call__(self, completion: Completion, sampling: SamplingParams, /) -> Completion: ...


def _each(wrong: _WrongCompletion) -> BreakEngine:
    def generate(
        right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        return [wrong(completion, sampling) for completion in right(handle, prompts, sampling)]

    return _generating(generate)


_Request: TypeAlias = tuple[list[Prompt], SamplingParams]


class _WrongRequest(Protocol):
    """Changes what is asked of the right engine."""

    def __call__(self, prompts: Sequence[Prompt], sampling: SamplingParams, /) -> _Request: ...


def _asking(wrong: _WrongRequest) -> BreakEngine:
    def generate(
        right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> list[Completion]:
        return right(handle, *wrong(prompts, sampling))

    return _generating(generate)


def _reversed(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    return right(handle, prompts, sampling)[::-1]


def _rotated(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    made = right(handle, prompts, sampling)
    others = made[sampling.n :] + made[: sampling.n]
    return [
        attrs.evolve(other, prompt_ids=completion.prompt_ids) for completion, other in zip(made, others, strict=True)
    ]


def _first_sample_alone(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    return [completion for completion in right(handle, prompts, sampling) if completion.sample_index == 0]


def _copied_samples(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    made = right(handle, prompts, attrs.evolve(sampling, n=1))
    return [attrs.evolve(each, sample_index=index) for each in made for index in range(sampling.n)]


def _same_stream_for_all_prompts(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    return [completion for prompt in prompts for completion in right(handle, [prompt], sampling)]


def _added_keys(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    made: list[Completion] = []
    for place, prompt in enumerate(prompts):
        for sample in range(sampling.n):
            seed = sampling.seed + place + sample
            (each,) = right(handle, [prompt], attrs.evolve(sampling, n=1, seed=seed))
            made.append(attrs.evolve(each, sample_index=sample))
    return made


def _padded(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    paddings = [(0,) * (longest - len(prompt.token_ids)) for prompt in prompts]
    padded = [Prompt(token_ids=padding + prompt.token_ids) for padding, prompt in zip(paddings, prompts, strict=True)]
    made = right(handle, padded, sampling)
    return [
        attrs.evolve(completion, prompt_ids=prompts[place // sampling.n].token_ids)
        for place, completion in enumerate(made)
    ]


def _continued_after_stop(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    if sampling.min_new_tokens:
        return right(handle, prompts, sampling)
    made = right(handle, prompts, attrs.evolve(sampling, stop_token_ids=()))
    stops = set(sampling.stop_token_ids)
    return [
        attrs.evolve(completion, finish_reason="stop") if stops & set(completion.token_ids) else completion
        for completion in made
    ]


def _without_stop_token(completion: Completion, sampling: SamplingParams) -> Completion:
    del sampling
    if completion.finish_reason == "length":
        return completion
    return attrs.evolve(completion, token_ids=completion.token_ids[:-1], logprobs=completion.logprobs[:-1])


def _always_length(completion: Completion, sampling: SamplingParams) -> Completion:
    del sampling
    return attrs.evolve(completion, finish_reason="length")


def _stop_at_the_end_is_length(completion: Completion, sampling: SamplingParams) -> Completion:
    is_full = len(completion.token_ids) == sampling.max_new_tokens
    return attrs.evolve(completion, finish_reason="length") if is_full else completion


def _first_version(completion: Completion, sampling: SamplingParams) -> Completion:
    del sampling
    return attrs.evolve(completion, weight_version=0)


def _shifted_logprobs(completion: Completion, sampling: SamplingParams) -> Completion:
    del sampling
    return attrs.evolve(completion, logprobs=completion.logprobs[1:] + completion.logprobs[:1])


def _rescored(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    """Report logprobs as if the temperature were 1."""
    made = right(handle, prompts, sampling)
    return [_with_logprobs_of(each, logits_TV) for each, logits_TV in _scored(handle, made)]


def _rescored_after_top_k(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    """Report logprobs of the distribution that top-k leaves."""
    made = right(handle, prompts, sampling)
    if not sampling.top_k:
        return made
    return [
        _with_logprobs_of(each, _only_top(logits_TV / (sampling.temperature or 1.0), sampling.top_k))
        for each, logits_TV in _scored(handle, made)
    ]


def _scored(handle: EngineHandle, made: list[Completion]) -> list[tuple[Completion, Tensor]]:
    return list(zip(made, trainer_logits(weights_inside(handle).model, made), strict=True))


def _only_top(logits_TV: Tensor, top_k: int) -> Tensor:
    least_T1 = logits_TV.topk(min(top_k, logits_TV.shape[-1]), dim=-1).values[:, -1:]
    return logits_TV.masked_fill(logits_TV < least_T1, float("-inf"))


def _with_logprobs_of(completion: Completion, logits_TV: Tensor) -> Completion:
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
    chosen_T = logprobs_TV.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    return attrs.evolve(completion, logprobs=tuple(chosen_T.tolist()))


def _one_more_token(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, max_new_tokens=sampling.max_new_tokens + 1)


def _without_images(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return [attrs.evolve(prompt, images=(), videos=()) for prompt in prompts], sampling


def _images_reversed(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return [attrs.evolve(prompt, images=prompt.images[::-1]) for prompt in prompts], sampling


def _frames_reversed(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return [
        attrs.evolve(prompt, videos=tuple(attrs.evolve(one, frames=one.frames[::-1]) for one in prompt.videos))
        for prompt in prompts
    ], sampling


def _first_image_alone(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return [attrs.evolve(prompt, images=prompt.images[:1] * len(prompt.images)) for prompt in prompts], sampling


def _counted_images(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    """Leave out images and videos without a placeholder."""
    if handle.processor is None:
        return right(handle, prompts, sampling)
    tokens = {kind: token for token, kind in placeholders_of(handle.processor).items()}
    counted = [
        attrs.evolve(
            each,
            images=each.images[: each.token_ids.count(tokens["image"])],
            videos=each.videos[: each.token_ids.count(tokens.get("video", -1))],
        )
        for each in prompts
    ]
    return right(handle, counted, sampling)


def _blind_to_updates(engine: Engine, config: EngineConfig) -> Engine:
    """Keep what sees as it was when the engine was started."""
    del config
    kept: dict[str, Tensor] = {}

    def begin_update(handle: EngineHandle) -> None:
        model = weights_inside(handle).model
        if not kept:
            kept.update({name: tensor.clone() for name, tensor in model.state_dict().items() if "vision" in name})
        engine.begin_update(handle)

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, Tensor]]) -> None:
        engine.put(handle, [(name, kept.get(name, tensor)) for name, tensor in tensors])

    return serve(attrs.evolve(engine, begin_update=begin_update, put=put))


def _without_empty(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return [prompt for prompt in prompts if prompt.token_ids], sampling


def _cut_to_context(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return [attrs.evolve(prompt, token_ids=prompt.token_ids[-8:]) for prompt in prompts], sampling


def _greedy_draws(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, temperature=sampling.temperature or 1.0)


def _other_seed(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, seed=int(torch.randint(2**31, ()).item()))


def _one_seed(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, seed=0)


def _seed_by_batch(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, seed=sampling.seed + len(prompts) * sampling.n)


def _numbered_from_0(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, first_prompt=0)


def _no_top_k(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, top_k=0)


def _no_top_p(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, top_p=1.0)


def _top_p_alone(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, top_k=0) if sampling.top_p < 1 else sampling


def _known_tokens(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    known = [tuple(min(max(token, 0), VOCABULARY - 1) for token in prompt.token_ids) for prompt in prompts]
    return [
        attrs.evolve(prompt, token_ids=token_ids) for prompt, token_ids in zip(prompts, known, strict=True)
    ], sampling


def _known_stops(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    stops = tuple(token for token in sampling.stop_token_ids if 0 <= token < VOCABULARY)
    return list(prompts), attrs.evolve(sampling, stop_token_ids=stops)


def _lowered_minimum(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    lowered = min(sampling.min_new_tokens, sampling.max_new_tokens)
    return list(prompts), attrs.evolve(sampling, min_new_tokens=lowered)


def _cut_to_room(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    room = CONTEXT - max((len(prompt.token_ids) for prompt in prompts), default=0)
    fitting = min(sampling.max_new_tokens, room) if room > 0 else sampling.max_new_tokens
    return list(prompts), attrs.evolve(sampling, max_new_tokens=fitting)


def _one_uniform(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    """Draw the second of two tokens with a number that gives the first one."""
    if sampling.max_new_tokens != 2 or not sampling.temperature or sampling.stop_token_ids:
        return right(handle, prompts, sampling)
    made = right(handle, prompts, attrs.evolve(sampling, max_new_tokens=1))
    longer: list[Completion] = []
    places = torch.rand(len(made), generator=torch.Generator().manual_seed(sampling.seed))
    for each, logits_TV, place in zip(made, _logits_of_two(handle, made), places, strict=True):
        first_V, second_V = torch.log_softmax(logits_TV / sampling.temperature, dim=-1)
        (first,) = each.token_ids
        uniform = first_V.exp()[: first + 1].sum() - first_V[first].exp() * place  # one that led to the first token
        second = min(int((second_V.exp().cumsum(-1) < uniform).sum()), VOCABULARY - 1)
        logprobs = (*each.logprobs, second_V[second].item())
        longer.append(attrs.evolve(each, token_ids=(first, second), logprobs=logprobs))
    return longer


def _logits_of_two(handle: EngineHandle, made: list[Completion]) -> list[Tensor]:
    # what follows a token is seen before it is known: any second token asks for the same logits
    return trainer_logits(
        weights_inside(handle).model, [attrs.evolve(each, token_ids=each.token_ids * 2) for each in made]
    )


def _no_minimum(prompts: Sequence[Prompt], sampling: SamplingParams) -> _Request:
    return list(prompts), attrs.evolve(sampling, min_new_tokens=0)


def _colder_draws(
    right: Generate, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> list[Completion]:
    made = right(handle, prompts, attrs.evolve(sampling, temperature=sampling.temperature**2))
    return [
        _with_logprobs_of(each, logits_TV / (sampling.temperature or 1.0)) for each, logits_TV in _scored(handle, made)
    ]


MUTANTS: tuple[Mutant, ...] = (
    engine_mutant(
        "engine.order.reversed", "Completions come in the reverse order of the prompts.", _generating(_reversed)
    ),
    engine_mutant(
        "engine.greedy.rotated", "Each prompt is given the completion of the next one.", _generating(_rotated)
    ),
    engine_mutant(
        "engine.order.first_sample_alone", "Of n samples only the first comes back.", _generating(_first_sample_alone)
    ),
    engine_mutant(
        "engine.seed.copied_samples",
        "The n samples of a prompt are copies of one another.",
        _generating(_copied_samples),
    ),
    engine_mutant(
        "engine.seed.one_stream",
        "All prompts of a call draw from the same random stream.",
        _generating(_same_stream_for_all_prompts),
    ),
    engine_mutant(
        "engine.seed.added_keys",
        "A random stream is named by the sum of seed, prompt and sample.",
        _generating(_added_keys),
    ),
    engine_mutant(
        "engine.sampling_distribution.one_uniform",
        "Every token is drawn with the same number.",
        _generating(_one_uniform),
    ),
    engine_mutant(
        "engine.greedy.padded", "Prompts are padded on the left and the padding is seen.", _generating(_padded)
    ),
    engine_mutant(
        "engine.order.after_stop", "What was generated after a stop token is kept.", _generating(_continued_after_stop)
    ),
    engine_mutant("engine.order.cut_stop", "The stop token is cut off.", _each(_without_stop_token)),
    engine_mutant("engine.order.always_length", "The finish reason is always 'length'.", _each(_always_length)),
    engine_mutant(
        "engine.order.last_stop",
        "A stop token as the last token that fits counts as 'length'.",
        _each(_stop_at_the_end_is_length),
    ),
    engine_mutant("engine.update.first_version", "Completions carry version 0 after an update.", _each(_first_version)),
    engine_mutant(
        "engine.logprobs.shifted_logprobs", "Logprobs are those of the next token.", _each(_shifted_logprobs)
    ),
    engine_mutant(
        "engine.logprobs.logprobs_at_1", "Logprobs are taken before the temperature.", _generating(_rescored)
    ),
    engine_mutant(
        "engine.sampling_distribution.logprobs_after_top_k",
        "Logprobs are taken after top-k.",
        _generating(_rescored_after_top_k),
    ),
    engine_mutant(
        "engine.order.one_more_token", "Completions have one token more than asked for.", _asking(_one_more_token)
    ),
    engine_mutant(
        "engine.refusals.dropped_images", "Images and videos are dropped without a word.", _asking(_without_images)
    ),
    engine_mutant("engine.images.reversed", "The images of a prompt come in reverse order.", _asking(_images_reversed)),
    engine_mutant(
        "engine.images.first_alone", "Every image of a prompt is its first one.", _asking(_first_image_alone)
    ),
    engine_mutant(
        "engine.image_refusals.left_out", "Images without a placeholder are left out.", _generating(_counted_images)
    ),
    engine_mutant("engine.videos.reversed", "The frames of a video come in reverse order.", _asking(_frames_reversed)),
    engine_mutant(
        "engine.video_refusals.left_out", "Videos without a placeholder are left out.", _generating(_counted_images)
    ),
    engine_mutant(
        "engine.image_update.old_eyes", "An image is seen with the first weights for ever.", _blind_to_updates
    ),
    engine_mutant(
        "engine.refusals.dropped_empty", "Empty prompts are dropped without a word.", _asking(_without_empty)
    ),
    engine_mutant("engine.refusals.cut_prompts", "Long prompts are cut without a word.", _asking(_cut_to_context)),
    engine_mutant(
        "engine.greedy.greedy_draws", "At temperature 0 tokens are drawn at temperature 1.", _asking(_greedy_draws)
    ),
    engine_mutant("engine.seed.global_seed", "The seed comes from torch's global stream.", _asking(_other_seed)),
    engine_mutant("engine.seed.one_seed", "All seeds give the same draws.", _asking(_one_seed)),
    engine_mutant(
        "engine.batch_composition.batch_seed",
        "Random streams depend on how much is in the call.",
        _asking(_seed_by_batch),
    ),
    engine_mutant(
        "engine.part.numbered_from_0", "A part of a request draws as its first part.", _asking(_numbered_from_0)
    ),
    engine_mutant("engine.sampling_distribution.no_top_k", "top_k does nothing.", _asking(_no_top_k)),
    engine_mutant("engine.sampling_distribution.no_top_p", "top_p does nothing.", _asking(_no_top_p)),
    engine_mutant(
        "engine.sampling_distribution.top_p_alone", "top_k does nothing beside top_p.", _asking(_top_p_alone)
    ),
    engine_mutant(
        "engine.refusals.known_tokens", "Unknown tokens of a prompt become known ones.", _asking(_known_tokens)
    ),
    engine_mutant(
        "engine.refusals.known_stops", "Unknown stop tokens are dropped without a word.", _asking(_known_stops)
    ),
    engine_mutant(
        "engine.refusals.lowered_minimum", "A min_new_tokens that is too large is lowered.", _asking(_lowered_minimum)
    ),
    engine_mutant("engine.refusals.cut_to_room", "max_new_tokens is lowered to what fits.", _asking(_cut_to_room)),
    engine_mutant("engine.greedy.no_minimum", "min_new_tokens does nothing.", _asking(_no_minimum)),
    engine_mutant(
        "engine.sampling_distribution.colder",
        "The temperature divides twice, in the draws alone.",
        _generating(_colder_draws),
    ),
)
"""What an engine can give out wrongly."""
