"""The engine "vllm": completions of vLLM, in this process and on its CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from lightrft.backends.adapters import Adapted
from lightrft.backends.rollout.guest_engine import Guest, Made, build_guest_engine
from lightrft.backends.rollout.request_checks import placeholders
from lightrft.backends.rollout.tensor_parallel.engine import build_tensor_parallel
from lightrft.backends.rollout.vllm.adapter import build_sent
from lightrft.backends.rollout.vllm.handle import Inside
from lightrft.backends.rollout.vllm.inside import (
    forget,
    free_cache,
    restore_cache,
    run_requests,
    start_inside,
    stop_inside,
)
from lightrft.backends.rollout.vllm.load import begin_load, end_load, load
from lightrft.backends.rollout.vllm.package import RequestOutput, Vllm, import_vllm
from lightrft.backends.rollout.vllm.sharding import sharding_of
from lightrft.models.images import frames_of, metadata_of, pil_image
from lightrft.strategy.protocols.capabilities import Capabilities
from lightrft.strategy.protocols.images import Processor
from lightrft.strategy.protocols.rollout import Engine, FinishReason, Prompt, SamplingParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lightrft.config.sections import EngineConfig

__all__ = ["build_vllm"]

_CAPABILITIES: Capabilities = frozenset({"images", "sampling", "seeds", "tensor_parallel"})
_WITH_VIDEOS: Capabilities = frozenset({"images", "sampling", "seeds", "tensor_parallel", "videos"})
"""vLLM is told of videos by processors that want torchvision."""

_LARGEST_SEED = 2**63 - 1
"""Random streams have keys of 64 bits with a sign, and vLLM takes seeds without one."""


def build_vllm(config: EngineConfig) -> Engine:
    """Return the engine "vllm".

    It takes the causal language models of transformers that vLLM has an architecture for, and with a processor those
    that read images, and videos where torchvision is installed. Asleep, it holds weights and no key-value cache: on a
    CPU there is no other memory to which weights could go.

    Args:
        config: `batch_size` bounds the sequences that are decoded at once, `cache_gb` is the size of the key-value
            cache on each rank, `tensor_parallel_size` ranks run one vLLM together.

    Raises:
        MissingPackageError: vLLM is not installed, or in a version that is not known.
        UnsupportedError: it is no build for CPUs.
    """
    package = import_vllm()

    def start(
        model: PreTrainedModel, processor: Processor | None, context: int | None, adapted: Adapted | None
    ) -> Inside:
        return start_inside(
            package,
            model,
            processor=processor,
            context=context,
            sent=None if adapted is None else build_sent(adapted),
            batch_size=config.batch_size,
            cache_bytes=int(config.cache_gb * 1e9),
            sharding=sharding_of(model, config),
        )

    def generate(
        inside: Inside, prompts: Sequence[Prompt], sampling: SamplingParams, keys_B: torch.Tensor
    ) -> list[Made]:
        never = placeholders(inside.processor)
        params = [_params(package, sampling, key, never) for key in (keys_B & _LARGEST_SEED).tolist()]
        requests = [_request(prompt) for prompt in prompts]
        return [_made(output) for output in run_requests(inside, requests, params, sampling.temperature or 1.0)]

    guest = Guest(
        name="vllm",
        title="vLLM",
        capabilities=_WITH_VIDEOS if find_spec("torchvision") else _CAPABILITIES,
        start=start,
        generate=generate,
        begin_load=begin_load,
        load=load,
        end_load=end_load,
        forget=forget,
        free_cache=free_cache,
        restore_cache=restore_cache,
        stop=stop_inside,
    )
    engine = build_guest_engine(guest)
    return engine if config.tensor_parallel_size == 1 else build_tensor_parallel(engine, config)


def _params(package: Vllm, sampling: SamplingParams, seed: int, never: Sequence[int]) -> object:
    return package.SamplingParams(
        # where the temperature is not 0, logits are divided by it before vLLM sees them
        temperature=1.0 if sampling.temperature else 0.0,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,  # stop tokens are those of the request
        detokenize=False,
        logprobs=0,  # that of the sampled token alone
        logit_bias=dict.fromkeys(never, -math.inf) or None,
    )


def _request(prompt: Prompt) -> dict[str, object]:
    """Return a prompt in vLLM's form; vLLM's processor is given the placeholders, and replaces them itself."""
    seen = {
        "image": [pil_image(image) for image in prompt.images],
        "video": [(frames_of(video).numpy(), metadata_of(video)) for video in prompt.videos],
    }
    given = {kind: each for kind, each in seen.items() if each}
    return {"prompt_token_ids": list(prompt.token_ids), **({"multi_modal_data": given} if given else {})}


def _made(output: RequestOutput) -> Made:
    (made,) = output.outputs
    return Made(
        prompt_ids=tuple(output.prompt_token_ids),
        token_ids=tuple(made.token_ids),
        logprobs=tuple(found[token].logprob for token, found in zip(made.token_ids, made.logprobs, strict=True)),
        finish_reason=cast("FinishReason", made.finish_reason),
    )
