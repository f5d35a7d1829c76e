"""An engine that gives out prepared completions, for tests and dry runs.

The tokens are written beforehand; everything else is real: it holds a copy of the model, takes weight updates, and
reports the log-probabilities that the model gives to the tokens.

T tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from lightrft.backends.rollout.lifecycle import guarded
from lightrft.backends.rollout.request_checks import check_request, check_taken
from lightrft.backends.rollout.weights import ModelCopy, begin_write, check_coverage, copy_model, write_tensors
from lightrft.errors import ConfigError, UnsupportedError
from lightrft.models.tokenizer import encode_text
from lightrft.strategy.protocols.rollout import Completion, Engine, EngineHandle, EngineSource, Prompt, SamplingParams

if TYPE_CHECKING:
    from lightrft.config.sections import EngineConfig

__all__ = ["build_scripted"]


@attrs.define(kw_only=True, eq=False)
class _State:
    weights: ModelCopy
    script: tuple[tuple[int, ...], ...]


def build_scripted(config: EngineConfig) -> Engine:
    """Return the engine "scripted": completion i of a request is entry i of `config.script`, over and over.

    Without a script it echoes: a completion repeats its prompt up to `max_new_tokens`.

    Args:
        config: `script` holds the texts; they are ended by the first stop token, if there is one.
    """

    def start(source: EngineSource) -> EngineHandle:
        if config.script and source.tokenizer is None:
            raise ConfigError(f"script={config.script!r} is text and there is no tokenizer; pass tokenizer=.")
        script = tuple(
            tuple(encode_text(source.tokenizer, text, where=text))
            for text in config.script
            if source.tokenizer is not None
        )
        state = _State(weights=copy_model(source.model), script=script)
        return EngineHandle(engine=engine, status="awake", weight_version=0, state=state)

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        state = _state(handle)
        _check_sampling(sampling)
        check_taken(prompts, engine="scripted", takes=engine.capabilities)
        check_request(state.weights.model, [prompt.token_ids for prompt in prompts], sampling, range(len(prompts)))
        completions: list[Completion] = []
        for prompt in prompts:
            for sample in range(sampling.n):
                place = sampling.first_prompt * sampling.n + len(completions)
                written = state.script[place % len(state.script)] if state.script else None
                completions.append(_complete(handle, prompt, written, sampling, sample))
        return completions

    def begin_update(handle: EngineHandle) -> None:
        begin_write(_state(handle).weights)

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        write_tensors(_state(handle).weights, tensors)

    def commit(handle: EngineHandle) -> int:
        check_coverage(_state(handle).weights)
        return handle.weight_version + 1

    def nothing(handle: EngineHandle) -> None:
        del handle  # the script needs no memory to free and keeps no cache

    def close(handle: EngineHandle) -> None:
        handle.state = None

    engine = Engine(
        capabilities=frozenset({"seeds"}),
        start=start,
        generate=generate,
        begin_update=begin_update,
        put=put,
        commit=commit,
        abort=nothing,
        sleep=nothing,
        wake=nothing,
        flush_cache=nothing,
        close=close,
    )
    return guarded(engine)


def _state(handle: EngineHandle) -> _State:
    assert isinstance(handle.state, _State)  # noqa: S101 (the handle was made by `start` above)
    return handle.state


def _check_sampling(sampling: SamplingParams) -> None:
    settings = {
        "top_p": (sampling.top_p, 1.0),
        "top_k": (sampling.top_k, 0),
        "min_new_tokens": (sampling.min_new_tokens, 0),
    }
    for name, (value, off) in settings.items():
        if value != off:
            raise UnsupportedError(
                f"{name}={value!r} chooses among tokens and the engine 'scripted' draws none; leave it at {off!r}."
            )


def _complete(
    handle: EngineHandle, prompt: Prompt, written: tuple[int, ...] | None, sampling: SamplingParams, sample_index: int
) -> Completion:
    limit = sampling.max_new_tokens
    echo = prompt.token_ids * (limit // len(prompt.token_ids) + 1)
    whole = echo if written is None else (*written, *sampling.stop_token_ids[:1])
    if not whole:
        raise ConfigError("script has an empty text, and there is no stop token to end it; pass stop_token_ids.")
    stops = [place for place, token in enumerate(whole, start=1) if token in sampling.stop_token_ids]
    token_ids = whole[: min(limit, *stops[:1])] if stops else whole[:limit]
    return Completion(
        prompt_ids=prompt.token_ids,
        token_ids=token_ids,
        logprobs=_logprobs(_state(handle).weights, prompt.token_ids, token_ids, sampling.temperature),
        finish_reason="stop" if token_ids[-1] in sampling.stop_token_ids else "length",
        weight_version=handle.weight_version,
        sample_index=sample_index,
    )


def _logprobs(
    weights: ModelCopy, prompt_ids: tuple[int, ...], token_ids: tuple[int, ...], temperature: float
) -> tuple[float, ...]:
    device = next(weights.model.parameters()).device
    ids_T = torch.tensor(prompt_ids + token_ids, device=device)
    with torch.no_grad():
        output = weights.model(ids_T[None, :-1])
    logits_TV = getattr(output, "logits", output)[0, -len(token_ids) :].float() / (temperature or 1.0)
    logprobs_T = torch.log_softmax(logits_TV, dim=-1).gather(-1, ids_T[-len(token_ids) :, None])[:, 0]
    return tuple(logprobs_T.tolist())
