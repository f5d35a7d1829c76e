"""How a running SGLang is asked: its scheduler takes requests and makes one step after the other until none is left."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from lightrft.backends.rollout.guest_engine import Made
from lightrft.backends.rollout.sglang.handle import Inside
from lightrft.backends.rollout.sglang.images import image_inputs
from lightrft.backends.rollout.sglang.inside import forget
from lightrft.backends.rollout.sglang.package import Request, Scheduler
from lightrft.errors import EngineStateError
from lightrft.models.images import ModelPrompt, read_prompts

if TYPE_CHECKING:
    from lightrft.strategy.protocols.rollout import FinishReason, Prompt, SamplingParams

__all__ = ["run_requests"]

_IDLE_STEPS = 8
"""Steps without a batch after which requests wait for ever: nobody else is there to end what they wait for."""


def run_requests(inside: Inside, prompts: Sequence[Prompt], params: SamplingParams, keys_B: torch.Tensor) -> list[Made]:
    """Return what came of each request; whatever ends it before, no request stays behind.

    Args:
        inside: a running SGLang.
        prompts: one for each request.
        params: how tokens are drawn.
        keys_B: the random streams of the requests.
    """
    scheduler = inside.scheduler
    inside.requests.clear()
    read = read_prompts(prompts, inside.processor)
    sampler = scheduler.tp_worker.model_runner.sampler
    sampler.params, sampler.keys_B = params, keys_B
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            scheduler.process_input_requests(
                [_request(inside, place, *pair, params) for place, pair in enumerate(zip(prompts, read, strict=True))]
            )
            _work(scheduler)
        return [_made(*pair, params) for pair in zip(inside.requests, read, strict=True)]
    except BaseException:
        scheduler.init_running_status()
        scheduler.init_chunked_prefill()
        forget(inside)
        raise
    finally:
        inside.requests.clear()
        sampler.rows = ()


def _request(inside: Inside, place: int, prompt: Prompt, read: ModelPrompt, params: SamplingParams) -> object:
    package = inside.package
    sampling = package.sampling_params.SamplingParams(
        max_new_tokens=params.max_new_tokens, stop_token_ids=set(params.stop_token_ids)
    )
    sampling.normalize(None)
    return package.io_struct.TokenizedGenerateReqInput(
        rid=str(place),
        input_text=None,
        input_ids=array("q", read.token_ids),
        input_embeds=None,
        mm_inputs=_images(inside, prompt, read),
        token_type_ids=None,
        sampling_params=sampling,
        return_logprob=True,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )


def _images(inside: Inside, prompt: Prompt, read: ModelPrompt) -> object:
    if inside.processor is None or inside.architecture is None:
        return None
    return image_inputs(inside.package, prompt, read, processor=inside.processor, model=inside.architecture)


def _work(scheduler: Scheduler) -> None:
    num_idle = 0
    while not scheduler.is_fully_idle():
        num_idle = 0 if _step(scheduler) else num_idle + 1
        if num_idle > _IDLE_STEPS:
            raise EngineStateError("generate: SGLang finds no room for a request; raise cache_gb.")


def _step(scheduler: Scheduler) -> bool:
    """Compute the next batch, and return whether there was one."""
    plan = scheduler.get_next_batch_to_run(running_batch=scheduler.running_batch, last_batch=scheduler.last_batch)
    scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
    if batch:
        scheduler.process_batch_result(batch, scheduler.run_batch(batch))
    scheduler.last_batch = batch
    return bool(batch)


def _made(request: Request, prompt: ModelPrompt, params: SamplingParams) -> Made:
    reason, token_ids = str(request.finished_reason.to_json()["type"]), tuple(request.output_ids)
    if reason not in {"stop", "length"} or (reason == "length" and len(token_ids) != params.max_new_tokens):
        raise EngineStateError(
            f"generate: SGLang ended a request of {params.max_new_tokens} tokens after {len(token_ids)} "
            f"({request.finished_reason.to_json()}); ask for less."
        )
    return Made(
        prompt_ids=prompt.token_ids,
        token_ids=token_ids,
        logprobs=tuple(request.logprob.output_token_logprobs_val),
        finish_reason=cast("FinishReason", reason),
    )
