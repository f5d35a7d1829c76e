"""Proof that weights arrived: the engine's logprobs of a few tokens beside the trainer's.

T tokens, V vocabulary
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from lightrft.models.context import context_size, known_vocabulary_size
from lightrft.models.images import ModelPrompt, inputs_beside, read_prompts
from lightrft.strategy.protocols.images import Image
from lightrft.strategy.protocols.rollout import Prompt, SamplingParams

if TYPE_CHECKING:
    from torch import nn

    from lightrft.strategy.protocols.rollout import Completion, EngineHandle

__all__ = ["PROBE_BOUNDS", "Probe", "probe_difference", "probe_engine"]

PROBE_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
"""Largest difference of a logprob, in nats, for logits of at most 1, by the dtype of the computation.

What rounding does to a logprob grows with the logits. Between right engines it was at most 1.3e-6 of the largest logit
in float32 and 4.6e-3 in bfloat16, over Qwen3 of 2 to 24 layers, 64 to 256 wide, with logits of 1 to 37. One matrix that
did not arrive shows as 0.1 to 2 nats. float16 has 3 bits more than bfloat16."""

_PROMPT_TOKENS = 8
_NEW_TOKENS = 4


@attrs.frozen(kw_only=True)
class Probe:
    """What a probe found.

    Attributes:
        difference: the largest absolute difference, in nats, between engine and trainer.
        scale: the trainer's largest logit among those that make a logprob, and at least 1: what `PROBE_BOUNDS` are
            multiplied with.
    """

    difference: float
    scale: float


def probe_engine(handle: EngineHandle, model: nn.Module) -> Probe:
    """Return how far engine and trainer are from one another over short greedy completions.

    One prompt is spread over the vocabulary, so that rows of the embedding far apart are seen; another one has an image
    where the engine takes images and the model's context has room for one. The modes of the model's modules stay as
    they are.

    Args:
        handle: an engine that is awake.
        model: the prepared model; called as `model(input_ids)`, with what the processor gives beside them where there
            is an image, it returns logits or an object with `logits`.
    """
    room = context_size(model) or _PROMPT_TOKENS + _NEW_TOKENS
    length = min(_PROMPT_TOKENS, max(1, room - _NEW_TOKENS))
    new_tokens = min(_NEW_TOKENS, room - length)
    prompts = [Prompt(token_ids=_spread(handle, model, length))]
    read = read_prompts(prompts, handle.processor)
    if handle.processor is not None:
        sees = Prompt(token_ids=(*prompts[0].token_ids[:1], handle.processor.image_token_id), images=(_image(),))
        (seeing,) = read_prompts([sees], handle.processor)
        if context_size(model) is None or len(seeing.token_ids) + new_tokens <= room:
            prompts, read = [*prompts, sees], [*read, seeing]
    made = handle.engine.generate(handle, prompts, SamplingParams(temperature=0.0, max_new_tokens=new_tokens))
    found = [_compare(model, prompt, completion) for prompt, completion in zip(read, made, strict=True)]
    return Probe(difference=max(one.difference for one in found), scale=max(one.scale for one in found))


def probe_difference(handle: EngineHandle, model: nn.Module) -> float:
    """Return the largest absolute difference, in nats, that a probe finds between engine and trainer.

    Args:
        handle: an engine that is awake.
        model: the prepared model, as for `probe_engine`.
    """
    return probe_engine(handle, model).difference


def _spread(handle: EngineHandle, model: nn.Module, length: int) -> tuple[int, ...]:
    """Return tokens spread over the vocabulary, none of which stands for an image."""
    rows = _vocabulary_size(model)
    token_ids = [(1 + 2 * place) * rows // (2 * length) for place in range(length)]
    image = None if handle.processor is None else handle.processor.image_token_id
    return tuple((token + 1) % rows if token == image else token for token in token_ids)


def _image() -> Image:
    """Return an image in which no two rows, columns or colours are alike."""
    pixels = bytes((37 * x + 101 * y + 59 * colour) % 256 for y in range(32) for x in range(32) for colour in range(3))
    return Image(width=32, height=32, pixels=pixels)


def _compare(model: nn.Module, prompt: ModelPrompt, completion: Completion) -> Probe:
    if completion.prompt_ids != prompt.token_ids:
        return Probe(difference=float("inf"), scale=1.0)  # the engine read another prompt than the trainer would
    logits_TV = _trainer_logits(model, prompt, completion)
    targets_T = torch.tensor(completion.token_ids, device=logits_TV.device)
    logprobs_T = torch.log_softmax(logits_TV, dim=-1).gather(-1, targets_T[:, None])[:, 0]
    engine_T = torch.tensor(completion.logprobs, dtype=torch.float64)
    difference = (logprobs_T.double().cpu() - engine_T).abs().max().item()
    return Probe(
        difference=difference if difference == difference else float("inf"),  # noqa: PLR0124 (NaN is no agreement)
        scale=_scale(logits_TV, targets_T),
    )


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
    ids_T = torch.tensor(completion.prompt_ids + completion.token_ids, device=first.device)
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
