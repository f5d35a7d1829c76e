"""Proof that weights arrived: the engine's logprobs of a few tokens beside the trainer's.

T tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import compress
from typing import TYPE_CHECKING

import attrs
import torch

from lightrft.errors import EngineStateError
from lightrft.models.context import context_size, known_vocabulary_size
from lightrft.models.images import ModelPrompt, inputs_beside, placeholders_of, read_prompts
from lightrft.strategy.protocols.capabilities import Capabilities
from lightrft.strategy.protocols.images import Image, Processor, Video
from lightrft.strategy.protocols.rollout import Prompt, SamplingParams

if TYPE_CHECKING:
    from torch import nn

    from lightrft.strategy.protocols.rollout import Completion, EngineHandle

__all__ = [
    "PROBE_BOUNDS",
    "Answered",
    "Probe",
    "judge_logits",
    "judge_probe",
    "make_probe",
    "probe_difference",
    "probe_engine",
    "probe_logits",
    "seeing_prompts",
]

PROBE_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
"""Largest difference of a logprob, in nats, for logits of at most 1, by the dtype of the computation.

What rounding does to a logprob grows with the logits. Between right engines it was at most 1.3e-6 of the largest logit
in float32, over Qwen3 of 2 to 24 layers, 64 to 256 wide, with logits of 1 to 37. In bfloat16 it was at most 0.026 over
3,000 random Qwen3 of 2 to 8 layers, 64 to 256 wide, and at most 0.015 in 99 of 100 of them. One matrix that did not
arrive shows as 0.1 to 2 nats. float16 has 3 bits more than bfloat16."""

_EXPERTS_FACTOR = 2
"""By how much the bound on a typical token of a mixture of experts is wider than that on every token of other models.

In up to 14 of 100 right mixtures the rounding of bfloat16 sent one token of four to another expert, which changes its
logprob by up to 0.6 of the largest logit. The median over 12 tokens was at most 0.043 of it over 1,400 mixtures; that
with values of a layer that did not arrive was above 0.063 in 9 of 10."""

_HALF = (torch.bfloat16, torch.float16)
_PROMPT_TOKENS = 8
_NEW_TOKENS = 4
_NEW_TOKENS_OF_EXPERTS = 12


@attrs.frozen(kw_only=True)
class Probe:
    """What a probe found.

    Attributes:
        difference: the largest absolute difference, in nats, between engine and trainer.
        scale: the trainer's largest logit among those that make a logprob, and at least 1.
        bound: nats that rounding explains: the bound for the dtype of the computation, times `scale`.
        agrees: whether no token differs by more. For a mixture of experts in bfloat16 or float16, whether half of the
            tokens of every prompt do not: rounding alone sends single tokens to other experts.
    """

    difference: float
    scale: float
    bound: float
    agrees: bool


@attrs.frozen(kw_only=True, eq=False)
class Answered:
    """A prompt of a probe, and what the engine made of it.

    Attributes:
        prompt: as the trainer reads it.
        completion: the engine's.
    """

    prompt: ModelPrompt
    completion: Completion


def probe_engine(handle: EngineHandle, model: nn.Module, *, bf16: bool = False, temperature: float = 0.0) -> Probe:
    """Return how far engine and trainer are from one another over short completions.

    Args:
        handle: an engine that is awake.
        model: the prepared model, as for `judge_probe`.
        bf16: likewise.
        temperature: of the completions, which are greedy at 0.
    """
    made = make_probe(handle, model, temperature=temperature)
    return judge_probe(made, model, bf16=bf16, temperature=temperature)


def make_probe(handle: EngineHandle, model: nn.Module, *, temperature: float = 0.0) -> list[Answered]:
    """Return what the engine makes of the prompts of a probe; the model is only looked at, never called.

    One prompt is spread over the vocabulary, so that rows of the embedding far apart are seen; others have an image
    or a video where the engine takes them and the model's context has room.

    Args:
        handle: an engine that is awake.
        model: the prepared model.
        temperature: of the completions, which are greedy at 0.

    Raises:
        EngineStateError: the engine made what no model could read, in whose forward pass other ranks would wait.
    """
    wanted = _NEW_TOKENS_OF_EXPERTS if _has_experts(model) else _NEW_TOKENS
    room = context_size(model) or _PROMPT_TOKENS + wanted
    length = min(_PROMPT_TOKENS, max(1, room - wanted))
    new_tokens = min(wanted, room - length)
    text = Prompt(token_ids=_spread(handle, model, length))
    prompts = [text, *seeing_prompts(handle.processor, takes=handle.engine.capabilities, text=text.token_ids[:1])]
    read = read_prompts(prompts, handle.processor)
    fitting = [context_size(model) is None or len(one.token_ids) + new_tokens <= room for one in read]
    prompts, read = list(compress(prompts, fitting)), list(compress(read, fitting))
    sampling = SamplingParams(temperature=temperature, max_new_tokens=new_tokens)
    made = handle.engine.generate(handle, prompts, sampling)
    _require_readable(made, new_tokens, known_vocabulary_size(model))
    return [Answered(prompt=prompt, completion=completion) for prompt, completion in zip(read, made, strict=True)]


def judge_probe(
    answered: Sequence[Answered], model: nn.Module, *, bf16: bool = False, temperature: float = 0.0
) -> Probe:
    """Return how far an engine is from the trainer in what it made of a probe.

    All forward passes come before anything is compared: where the model is sharded, other ranks are in the next one.

    Args:
        answered: prompts and completions.
        model: the prepared model, as for `probe_logits`.
        bf16: whether it computes in bfloat16 whatever its parameters are.
        temperature: of the completions.
    """
    return judge_logits(answered, probe_logits(answered, model, temperature=temperature), model, bf16=bf16)


def probe_logits(answered: Sequence[Answered], model: nn.Module, *, temperature: float = 0.0) -> list[torch.Tensor]:
    """Return the trainer's logits (T, V) of each completion of a probe, float32; all ranks call it of a sharded model.

    The model computes each prompt once, whatever the engine made of it, and the modes of its modules stay as they are.

    Args:
        answered: prompts and completions.
        model: the prepared model; called as `model(input_ids)`, with what the processor gives beside them where
            there is one, it returns logits or an object with `logits`.
        temperature: of the completions.
    """
    return [_trainer_logits(model, one.prompt, one.completion) / (temperature or 1.0) for one in answered]


def judge_logits(
    answered: Sequence[Answered], logits: Sequence[torch.Tensor], model: nn.Module, *, bf16: bool = False
) -> Probe:
    """Return how far an engine is from the trainer, whose logits are known; the model is only looked at, never called.

    Args:
        answered: prompts and completions.
        logits: the trainer's, of each completion.
        model: the prepared model.
        bf16: whether it computes in bfloat16 whatever its parameters are.
    """
    found = [_compare(logits_TV, one) for logits_TV, one in zip(logits, answered, strict=True)]
    scale = max(scale for _, scale in found)
    dtype = torch.bfloat16 if bf16 else _coarsest(model)
    is_routed = dtype in _HALF and _has_experts(model)
    bound = PROBE_BOUNDS[dtype] * scale * (_EXPERTS_FACTOR if is_routed else 1)
    largest = max(differences_T.max().item() for differences_T, _ in found)
    # of each prompt by itself: the text says nothing of what was seen in an image
    judged = max(differences_T.median().item() for differences_T, _ in found) if is_routed else largest
    return Probe(difference=largest, scale=scale, bound=bound, agrees=judged <= bound and largest < torch.inf)


def probe_difference(handle: EngineHandle, model: nn.Module) -> float:
    """Return the largest absolute difference, in nats, that a probe finds between engine and trainer.

    Args:
        handle: an engine that is awake.
        model: the prepared model, as for `probe_engine`.
    """
    return probe_engine(handle, model).difference


def _spread(handle: EngineHandle, model: nn.Module, length: int) -> tuple[int, ...]:
    """Return tokens spread over the vocabulary, none of which is a placeholder."""
    rows = _vocabulary_size(model)
    token_ids = [(1 + 2 * place) * rows // (2 * length) for place in range(length)]
    placeholders = placeholders_of(handle.processor)
    return tuple(_no_placeholder(token, rows, placeholders) for token in token_ids)


def _no_placeholder(token: int, rows: int, placeholders: Container[int]) -> int:
    while token in placeholders:
        token = (token + 1) % rows
    return token


def seeing_prompts(processor: Processor | None, *, takes: Capabilities, text: tuple[int, ...] = ()) -> list[Prompt]:
    """Return a prompt of each kind that an engine takes beside text: with an image, and with a video.

    Args:
        processor: of the model; without one there are none.
        takes: what the engine claims.
        text: tokens before what is seen, and after a video.
    """
    prompts: list[Prompt] = []
    for placeholder, kind in placeholders_of(processor).items():
        if kind == "image" and "images" in takes:
            prompts.append(Prompt(token_ids=(*text, placeholder), images=(_image(),)))
        elif kind == "video" and "videos" in takes:
            # so slow that, where time has positions, it goes further than rows and columns; after it comes text
            frames = (_image(), attrs.evolve(_image(), pixels=_image().pixels[::-1])) * 2
            prompts.append(Prompt(token_ids=(*text, placeholder, *text), videos=(Video(frames=frames, fps=0.25),)))
    return prompts


def _require_readable(made: Sequence[Completion], new_tokens: int, vocabulary_size: int | None) -> None:
    """Refuse completions at which a forward pass of the model would break off."""
    for completion in made:
        ids = completion.token_ids
        is_known = vocabulary_size is None or all(0 <= token < vocabulary_size for token in ids)
        if not (is_known and 1 <= len(ids) <= new_tokens):
            below = "" if vocabulary_size is None else f" below {vocabulary_size}"
            raise EngineStateError(
                f"generate: the engine made {list(ids)}, and was asked for 1 to {new_tokens} token ids{below}; start a "
                "new engine."
            )


def _image() -> Image:
    """Return an image in which no two rows, columns or colours are alike."""
    pixels = bytes((37 * x + 101 * y + 59 * colour) % 256 for y in range(32) for x in range(32) for colour in range(3))
    return Image(width=32, height=32, pixels=pixels)


def _coarsest(model: nn.Module) -> torch.dtype:
    """Return the dtype among a model's parameters whose rounding shows most."""
    dtypes = {parameter.dtype for parameter in model.parameters()} & PROBE_BOUNDS.keys()
    return max(dtypes, key=PROBE_BOUNDS.__getitem__, default=torch.float32)


def _has_experts(model: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())


def _compare(logits_TV: torch.Tensor, one: Answered) -> tuple[torch.Tensor, float]:
    """Return the absolute differences (T,), infinite where there is no agreement, and the scale."""
    completion = one.completion
    if completion.prompt_ids != one.prompt.token_ids:
        # the engine read another prompt than the trainer would
        return torch.full((len(completion.token_ids),), torch.inf, dtype=torch.float64), 1.0
    targets_T = torch.tensor(completion.token_ids, device=logits_TV.device)
    logprobs_T = torch.log_softmax(logits_TV, dim=-1).gather(-1, targets_T[:, None])[:, 0]
    engine_T = torch.tensor(completion.logprobs, dtype=torch.float64)
    differences_T = (logprobs_T.double().cpu() - engine_T).abs()
    return differences_T.nan_to_num(nan=torch.inf, posinf=torch.inf), _scale(logits_TV, targets_T)


def _scale(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> float:
    """Return the largest of the greatest logits and those of the targets; one that is masked has no share in it."""
    entering = torch.stack([logits_TV.amax(dim=-1), logits_TV.gather(-1, targets_T[:, None])[:, 0]])
    return float(entering.abs().masked_fill(~entering.isfinite(), 1.0).amax().clamp(min=1.0).item())


def _vocabulary_size(model: nn.Module) -> int:
    """Return a number of token ids that the model knows: all of them where it says which embedding takes them."""
    size = known_vocabulary_size(model)
    if size is not None:
        return size
    # another embedding may hold positions, which can be more than the tokens: the smallest is safe
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return min(sizes, default=2)


def _trainer_logits(model: nn.Module, prompt: ModelPrompt, completion: Completion) -> torch.Tensor:
    first = next(model.parameters())
    ids_T = torch.tensor(prompt.token_ids + completion.token_ids, device=first.device)
    beside = inputs_beside([prompt], length=len(ids_T) - 1, side="right", like=first)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            output = model(ids_T[None, :-1], **beside)
    finally:
        for module in training:  # one by one: parts of a model that trains may be in evaluation mode for good
            module.training = True
    logits_TV: torch.Tensor = getattr(output, "logits", output)[0, -len(completion.token_ids) :].float()
    return logits_TV
