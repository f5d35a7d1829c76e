"""Makes completions of token prompts with a transformers causal language model: the decode loop and what surrounds it.

Sampling is by the seed: each (prompt, sample) draws from a random stream of its own, so the tokens of a sequence do
not depend on what else is in its batch. One limit: matrix products of different batch shapes can differ in the last
bits, so a draw or an argmax that lies within rounding of the border between two tokens can fall on either side.

Shapes: B sequences, T new tokens, V vocabulary, C stop tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import attrs
import torch

from lightrft.backends.rollout.hf.decoder import Decoder, RefreshWeights, ReleaseWeights
from lightrft.backends.rollout.hf.llama_decoder import build_llama_decoder
from lightrft.backends.rollout.hf.llama_support import explain_unsupported
from lightrft.backends.rollout.hf.transformers_decoder import build_transformers_decoder
from lightrft.backends.rollout.random_streams import stream_keys, uniforms
from lightrft.backends.rollout.request_checks import check_request
from lightrft.backends.rollout.sampling import sample_tokens
from lightrft.errors import ConfigError, EngineStateError, UnsupportedError
from lightrft.models.images import ModelPrompt, frames_shapes
from lightrft.strategy.protocols.rollout import FinishReason, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GenerateTokens", "GeneratedSequence", "TokenGenerator", "build_token_generator"]

CacheT = TypeVar("CacheT")

# A batch shrinks to its live sequences when at most this share is left: each copy of the cache is then paid for by the
# sequences that it drops, and there are at most log(B) / log(4/3) of them.
_COMPACT_AT = 0.75


@attrs.frozen(kw_only=True)
class GeneratedSequence:
    """One completion of one prompt.

    Attributes:
        prompt_index: number of its prompt in the whole request.
        sample_index: its number among the samples of its prompt.
        token_ids: sampled ids, with the stop token if one ended it.
        logprobs: `log_softmax(logits / temperature)` at each sampled id, before top-k and top-p; at temperature 0
            `log_softmax(logits)`.
        finish_reason: "stop" after a stop token, "length" at `max_new_tokens`.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


class GenerateTokens(Protocol):
    """Makes completions."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int] | ModelPrompt],
        params: SamplingParams,
        prompt_indices: Sequence[int] | None = None,
    ) -> tuple[GeneratedSequence, ...]:
        """Return `params.n` completions of each prompt, prompt by prompt, in the order of the prompts.

        Laws: order and number match the request; equal calls give equal results; the tokens of a sequence depend on its
        prompt, its (prompt, sample) numbers and the parameters, not on what else is generated (up to rounding).

        Args:
            prompts: any number of prompts of any lengths, each of at least one token; as the model reads them where
                they have images.
            params: how tokens are drawn.
            prompt_indices: number of each prompt, which names its random stream: whoever splits a request passes the
                numbers that the prompts have in the whole. None numbers them from `params.first_prompt`.

        Raises:
            DataError: a prompt is empty, has a token that the model doesn't know, or leaves no room for a token in the
                model's context; or there are not as many numbers as prompts.
            ConfigError: the prompts and `max_new_tokens` don't fit into the model's context, `min_new_tokens` exceeds
                `max_new_tokens`, or a stop token is not in the vocabulary.
            EngineStateError: the weights were released, or the model's logits are not finite.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class TokenGenerator:
    """A model that can make completions.

    Attributes:
        generate: makes completions.
        refresh: follows a change of the model's weights; call it after each one.
        release: drops copies of weights until the next `refresh`.
        path: "fused" for our own decoder of Llama-like models, "transformers" for the model's own forward.
        fallback_reason: why the fused decoder was not used, empty where it was.
    """

    generate: GenerateTokens
    refresh: RefreshWeights
    release: ReleaseWeights
    path: Literal["fused", "transformers"]
    fallback_reason: str


@attrs.frozen(kw_only=True)
class _Request:
    prompt: ModelPrompt
    prompt_index: int
    sample_index: int


def build_token_generator(
    model: PreTrainedModel,
    *,
    max_batch_size: int = 256,
    path: Literal["auto", "fused", "transformers"] = "auto",
    never: Sequence[int] = (),
) -> TokenGenerator:
    """Return a generator for a model, whose weights it reads now and at each `refresh`.

    Weights that the fused decoder multiplies with at once become views of one tensor, so the model should be nobody
    else's.

    Args:
        model: a causal language model of transformers, on the device where it shall run.
        max_batch_size: how many sequences are decoded at a time; the cache's memory grows with it.
        path: "auto" takes the fused decoder where it computes what the model computes; the others insist.
        never: ids that are not drawn, whatever their logits; they count in the logprobs of the others.

    Raises:
        UnsupportedError: "fused" was asked for and can't run the model, or the model is no decoder-only language model.
        ConfigError: `max_batch_size` is not positive.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = LlamaConfig(vocab_size=16, **sizes)
        >>> generator = build_token_generator(LlamaForCausalLM(config))
        >>> generator.path
        'fused'
        >>> [len(made.token_ids) for made in generator.generate([[1, 2], [3]], SamplingParams(max_new_tokens=4, n=2))]
        [4, 4, 4, 4]
    """
    if max_batch_size < 1:
        raise ConfigError(f"max_batch_size={max_batch_size!r} is not positive; use at least 1.")
    reason = "path='transformers' was asked for" if path == "transformers" else explain_unsupported(model)
    if reason is None:
        return _bind(model, build_llama_decoder(model), max_batch_size, "fused", "", never)
    if path == "fused":
        raise UnsupportedError(f"path='fused' cannot run this model: {reason}; use path='auto'.")
    return _bind(model, build_transformers_decoder(model), max_batch_size, "transformers", reason, never)


def _bind(
    model: PreTrainedModel,
    decoder: Decoder[CacheT],
    max_batch_size: int,
    path: Literal["fused", "transformers"],
    reason: str,
    never: Sequence[int],
) -> TokenGenerator:
    decoder.refresh()
    never_C = torch.tensor(never, dtype=torch.int64, device=model.device)

    def generate(
        prompts: Sequence[Sequence[int] | ModelPrompt],
        params: SamplingParams,
        prompt_indices: Sequence[int] | None = None,
    ) -> tuple[GeneratedSequence, ...]:
        first = params.first_prompt
        indices = range(first, first + len(prompts)) if prompt_indices is None else prompt_indices
        read = [
            prompt if isinstance(prompt, ModelPrompt) else ModelPrompt(token_ids=tuple(prompt)) for prompt in prompts
        ]
        check_request(model, [prompt.token_ids for prompt in read], params, indices)
        requests = [
            _Request(prompt=prompt, prompt_index=index, sample_index=sample)
            for prompt, index in zip(read, indices, strict=True)
            for sample in range(params.n)
        ]
        made: dict[int, GeneratedSequence] = {}
        with torch.inference_mode(), _evaluating(model):
            for places in _batches(requests, max_batch_size):
                sequences = _generate_batch(decoder, [requests[place] for place in places], params, never_C)
                made.update(zip(places, sequences, strict=True))
        return tuple(made[place] for place in range(len(requests)))

    return TokenGenerator(
        generate=generate, refresh=decoder.refresh, release=decoder.release, path=path, fallback_reason=reason
    )


def _batches(requests: Sequence[_Request], size: int) -> Generator[list[int]]:
    """Yield the places of requests that are decoded together; only videos whose sizes differ have to part."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(frames_shapes(request.prompt), []).append(place)
    without_videos = groups.pop((), [])
    first, *others = groups.values() if groups else [[]]
    for group in (sorted(first + without_videos), *others):
        for start in range(0, len(group), size):
            yield group[start : start + size]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Generator[None]:
    """Turn dropout off, and leave each module in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _generate_batch(
    decoder: Decoder[CacheT], requests: Sequence[_Request], params: SamplingParams, never_C: torch.Tensor
) -> list[GeneratedSequence]:
    # prompts of the same tokens are computed once; with images, those that were read once
    keys = [request.prompt if request.prompt.seen else request.prompt.token_ids for request in requests]
    prompts = {key: request.prompt for key, request in zip(keys, requests, strict=True)}
    numbers = {key: number for number, key in enumerate(prompts)}
    rows_B = torch.tensor([numbers[key] for key in keys], device=never_C.device)
    keys_B = stream_keys(
        params.seed, [request.prompt_index for request in requests], [request.sample_index for request in requests]
    )
    read = tuple(prompts.values())
    logits_BV, cache = decoder.prefill(
        [prompt.token_ids for prompt in read],
        rows_B,
        params.max_new_tokens,
        read if any(prompt.seen for prompt in read) else (),
    )
    uniforms_TB = uniforms(keys_B, params.max_new_tokens).to(never_C.device)
    tokens_TB, logprobs_TB = _decode(decoder, cache, logits_BV, uniforms_TB, params, never_C)
    return _collect(requests, tokens_TB.cpu(), logprobs_TB.cpu(), params)


def _decode(
    decoder: Decoder[CacheT],
    cache: CacheT,
    logits_BV: torch.Tensor,
    uniforms_TB: torch.Tensor,
    params: SamplingParams,
    never_C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and logprobs (T, B). What stands after a stop token has no meaning."""
    device = uniforms_TB.device
    tokens_TB = torch.zeros(uniforms_TB.shape, dtype=torch.int64, device=device)
    logprobs_TB = torch.zeros(uniforms_TB.shape, dtype=torch.float32, device=device)
    stops_C = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device)
    rows_B = torch.arange(uniforms_TB.shape[1], device=device)  # where the live sequences stand in the results
    is_done_B = torch.zeros(rows_B.shape, dtype=torch.bool, device=device)
    for position in range(params.max_new_tokens):
        banned_C = torch.cat([never_C, stops_C]) if position < params.min_new_tokens else never_C
        uniforms_B = uniforms_TB[position].index_select(0, rows_B)
        tokens_B, logprobs_B = sample_tokens(
            logits_BV, uniforms_B=uniforms_B, params=params, banned_C=banned_C if len(banned_C) else None
        )
        tokens_TB[position].index_copy_(0, rows_B, tokens_B)
        logprobs_TB[position].index_copy_(0, rows_B, logprobs_B)
        if len(stops_C):
            is_done_B |= torch.isin(tokens_B, stops_C)
            live_B = _live_rows(is_done_B)
            if live_B is not None and len(live_B):
                decoder.keep_rows(cache, live_B)
                rows_B, tokens_B, is_done_B = rows_B[live_B], tokens_B[live_B], is_done_B[live_B]
            elif live_B is not None:
                break
        if position + 1 < params.max_new_tokens:
            logits_BV = decoder.step(cache, tokens_B)
    return tokens_TB, logprobs_TB


def _live_rows(is_done_B: torch.Tensor) -> torch.Tensor | None:
    """Return the indices of the live sequences when it pays to drop the others, else None."""
    num_live = len(is_done_B) - int(is_done_B.sum())
    return (~is_done_B).nonzero().squeeze(1) if num_live <= _COMPACT_AT * len(is_done_B) else None


def _collect(
    requests: Sequence[_Request], tokens_TB: torch.Tensor, logprobs_TB: torch.Tensor, params: SamplingParams
) -> list[GeneratedSequence]:
    is_stop_TB = torch.isin(tokens_TB, torch.tensor(params.stop_token_ids, dtype=torch.int64))
    has_stop_B = is_stop_TB.any(0)
    lengths_B = torch.where(has_stop_B, is_stop_TB.int().argmax(0) + 1, params.max_new_tokens)
    _check_finite(requests, logprobs_TB, lengths_B)
    columns = zip(
        requests, tokens_TB.T.tolist(), logprobs_TB.T.tolist(), lengths_B.tolist(), has_stop_B.tolist(), strict=True
    )
    return [
        GeneratedSequence(
            prompt_index=request.prompt_index,
            sample_index=request.sample_index,
            token_ids=tuple(tokens[:length]),
            logprobs=tuple(logprobs[:length]),
            finish_reason="stop" if has_stop else "length",
        )
        for request, tokens, logprobs, length, has_stop in columns
    ]


def _check_finite(requests: Sequence[_Request], logprobs_TB: torch.Tensor, lengths_B: torch.Tensor) -> None:
    is_used_TB = torch.arange(len(logprobs_TB)).unsqueeze(1) < lengths_B
    bad_B = (~logprobs_TB.isfinite() & is_used_TB).any(0).nonzero()
    if len(bad_B):
        request = requests[int(bad_B[0])]
        raise EngineStateError(
            f"logits after prompt {request.prompt_index} (sample {request.sample_index}) are not finite; "
            "load finite weights into the model and refresh."
        )
