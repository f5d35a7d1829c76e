"""The engine "vllm": completions of vLLM, in this process and on its CPU."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import attrs
import torch

from lightrft.backends.rollout.lifecycle import guarded
from lightrft.backends.rollout.random_streams import stream_keys
from lightrft.backends.rollout.request_checks import (
    RequestLimits,
    check_processor,
    check_within,
    limits_of,
    placeholders,
)
from lightrft.backends.rollout.vllm_inside import (
    Inside,
    forget_images,
    free_cache,
    restore_cache,
    run_requests,
    start_inside,
    stop_inside,
)
from lightrft.backends.rollout.vllm_load import begin_load, end_load, load
from lightrft.backends.rollout.vllm_package import RequestOutput, Vllm, import_vllm
from lightrft.backends.rollout.weights import checked, require_all
from lightrft.errors import EngineStateError, UnsupportedError, WeightSyncError
from lightrft.models.images import ModelPrompt, pil_image, read_prompts
from lightrft.strategy.protocols.rollout import (
    Completion,
    Engine,
    EngineHandle,
    EngineSource,
    FinishReason,
    Prompt,
    SamplingParams,
)
from lightrft.weight_sync import PROBE_BOUNDS, probe_engine

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from lightrft.config.sections import EngineConfig

__all__ = ["build_vllm"]

_LARGEST_SEED = 2**63 - 1
"""Random streams have keys of 64 bits with a sign, and vLLM takes seeds without one."""


@attrs.define(kw_only=True, eq=False)
class _State:
    inside: Inside
    limits: RequestLimits
    shapes: dict[str, torch.Size]
    written: set[str]


def build_vllm(config: EngineConfig) -> Engine:
    """Return the engine "vllm".

    It takes the causal language models of transformers that vLLM has an architecture for, and with a processor those
    that read images. Asleep, it holds weights and no key-value cache: on a CPU there is no other memory to which
    weights could go.

    Args:
        config: `batch_size` bounds the sequences that are decoded at once, `cache_gb` is the size of the key-value
            cache.

    Raises:
        MissingPackageError: vLLM is not installed, or in a version that is not known.
        UnsupportedError: it is no build for CPUs.
    """
    package = import_vllm()

    def start(source: EngineSource) -> EngineHandle:
        check_processor(source)
        state = _start(package, source, config)
        handle = EngineHandle(engine=engine, status="awake", weight_version=0, state=state, processor=source.processor)
        try:
            _require_same(handle, source.model)
        except BaseException:
            close(handle)
            raise
        return handle

    def generate(handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        state = _state(handle)
        read = read_prompts(prompts, handle.processor)
        check_within(state.limits, [prompt.token_ids for prompt in read], sampling)
        outputs = _run(package, handle, prompts, sampling)
        return [
            _completion(handle, read[place // sampling.n], output, place % sampling.n)
            for place, output in enumerate(outputs)
        ]

    def begin_update(handle: EngineHandle) -> None:
        _state(handle).written.clear()
        begin_load(_state(handle).inside)

    def put(handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        state = _state(handle)
        load(state.inside, checked(tensors, shapes=state.shapes, written=state.written))

    def commit(handle: EngineHandle) -> int:
        state = _state(handle)
        require_all(state.shapes, state.written)
        _require_reached(end_load(state.inside))
        return handle.weight_version + 1

    def abort(handle: EngineHandle) -> None:
        if _state(handle).inside.loaded is not None:
            end_load(_state(handle).inside)

    def sleep(handle: EngineHandle) -> None:
        flush_cache(handle)
        free_cache(_state(handle).inside)

    def wake(handle: EngineHandle) -> None:
        restore_cache(_state(handle).inside)

    def flush_cache(handle: EngineHandle) -> None:
        if not _state(handle).inside.llm.reset_prefix_cache():
            raise EngineStateError(
                "flush_cache: vLLM keeps its prefix cache, as with requests under way; start a new engine."
            )
        forget_images(_state(handle).inside)

    def close(handle: EngineHandle) -> None:
        try:
            stop_inside(_state(handle).inside)
        finally:
            handle.state = None
            gc.collect()  # vLLM's objects refer to one another: without it, the weights would stay for a while

    engine = Engine(
        capabilities=frozenset({"images", "sampling"}),
        start=start,
        generate=generate,
        begin_update=begin_update,
        put=put,
        commit=commit,
        abort=abort,
        sleep=sleep,
        wake=wake,
        flush_cache=flush_cache,
        close=close,
    )
    return guarded(engine)


def _start(package: Vllm, source: EngineSource, config: EngineConfig) -> _State:
    model = source.model
    if not hasattr(model, "get_decoder"):
        raise UnsupportedError(
            f"model={type(model).__name__} is no causal language model of transformers, which the engine 'vllm' needs; "
            "use the engine 'scripted' or one of your own."
        )
    limits, weights = limits_of(model), model.state_dict()
    inside = start_inside(
        package,
        cast("PreTrainedModel", model),
        processor=source.processor,
        context=limits.context_size,
        batch_size=config.batch_size,
        cache_bytes=int(config.cache_gb * 1e9),
    )
    try:
        begin_load(inside)
        load(inside, weights.items())
        _require_reached(end_load(inside))
    except BaseException:
        stop_inside(inside)
        raise
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    return _State(inside=inside, limits=limits, shapes=shapes, written=set())


def _require_same(handle: EngineHandle, model: nn.Module) -> None:
    """Refuse a model that vLLM computes or loads otherwise, before anything is made of it."""
    found = probe_engine(handle, model)
    if found.difference > PROBE_BOUNDS[next(model.parameters()).dtype] * found.scale:
        raise UnsupportedError(
            f"model={type(model).__name__} is another one in vLLM: a logprob is {found.difference:.3g} nats from that "
            "of its own forward; use the engine 'hf'."
        )


def _run(
    package: Vllm, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams
) -> Sequence[RequestOutput]:
    """Return what came of each sample, prompt by prompt; each is a request with a random stream of its own."""
    numbers = [sampling.first_prompt + index for index in range(len(prompts)) for _ in range(sampling.n)]
    keys = stream_keys(sampling.seed, numbers, list(range(sampling.n)) * len(prompts))
    params = [
        package.SamplingParams(
            # where the temperature is not 0, logits are divided by it before vLLM sees them
            temperature=1.0 if sampling.temperature else 0.0,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=key,
            max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # stop tokens are those of the request
            detokenize=False,
            logprobs=0,  # that of the sampled token alone
            logit_bias=dict.fromkeys(placeholders(handle.processor), -math.inf) or None,
        )
        for key in (keys & _LARGEST_SEED).tolist()
    ]
    requests = [request for prompt in map(_request, prompts) for request in [prompt] * sampling.n]
    return run_requests(_state(handle).inside, requests, params, temperature=sampling.temperature or 1.0)


def _request(prompt: Prompt) -> dict[str, object]:
    """Return a prompt in vLLM's form; vLLM's processor is given the placeholders, and replaces them itself."""
    token_ids = {"prompt_token_ids": list(prompt.token_ids)}
    if not prompt.images:
        return {**token_ids}
    return {**token_ids, "multi_modal_data": {"image": [pil_image(image) for image in prompt.images]}}


def _completion(handle: EngineHandle, prompt: ModelPrompt, output: RequestOutput, sample_index: int) -> Completion:
    (made,) = output.outputs
    if tuple(output.prompt_token_ids) != prompt.token_ids:
        raise EngineStateError(
            f"generate: vLLM read {list(output.prompt_token_ids)} and the processor reads {list(prompt.token_ids)}; "
            "use the engine 'hf' for this model."
        )
    token_ids = tuple(made.token_ids)
    logprobs = tuple(found[token].logprob for token, found in zip(token_ids, made.logprobs, strict=True))
    if not all(map(math.isfinite, logprobs)):
        raise EngineStateError(f"generate: a logprob is {logprobs}; the weights are not finite, sync them again.")
    return Completion(
        prompt_ids=prompt.token_ids,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=cast("FinishReason", made.finish_reason),
        weight_version=handle.weight_version,
        sample_index=sample_index,
    )


def _require_reached(missed: Sequence[str]) -> None:
    if missed:
        shown = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
        raise WeightSyncError(f"{len(missed)} parameters of vLLM's model were not written ({shown}); its names differ.")


def _state(handle: EngineHandle) -> _State:
    assert isinstance(handle.state, _State)  # noqa: S101 (the handle was made by `start` above)
    return handle.state
