"""What is wrong with the completions that an engine returned for a request."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightrft.strategy.protocols import Completion, Prompt, SamplingParams

__all__ = ["completions_problem"]

_ROUNDING = 1e-6
"""How far above 0 a logprob may come out: log_softmax in float32 rounds a certain token to a few 1e-7."""


def completions_problem(
    completions: Sequence[Completion], prompts: Sequence[Prompt], sampling: SamplingParams, *, weight_version: int
) -> str | None:
    """Return in a sentence what the first wrong completion has wrong, or None if all are right.

    Right are n completions of each prompt, prompt by prompt, that end where the request says and carry a finite logprob
    for each token.

    Args:
        completions: what was returned.
        prompts: what was asked for.
        sampling: how.
        weight_version: the engine's.
    """
    wanted = [(prompt, sample) for prompt in prompts for sample in range(sampling.n)]
    if len(completions) != len(wanted):
        return (
            f"{len(completions)} completions came for {len(prompts)} prompts x n={sampling.n}, which is {len(wanted)}"
        )
    for index, (completion, (prompt, sample)) in enumerate(zip(completions, wanted, strict=True)):
        problem = _problem(completion, prompt, sample, sampling, weight_version)
        if problem is not None:
            return f"completions[{index}] {problem}"
    return None


def _problem(
    completion: Completion, prompt: Prompt, sample: int, sampling: SamplingParams, weight_version: int
) -> str | None:
    if completion.prompt_ids != prompt.token_ids:
        return f"is of the prompt {completion.prompt_ids} and must be of {prompt.token_ids}"
    if completion.sample_index != sample:
        return f"has sample_index={completion.sample_index} and must have {sample}"
    if completion.weight_version != weight_version:
        return f"has weight_version={completion.weight_version} and the engine's is {weight_version}"
    return _problem_of_tokens(completion, sampling)


def _problem_of_tokens(completion: Completion, sampling: SamplingParams) -> str | None:
    token_ids, logprobs = completion.token_ids, completion.logprobs
    if not sampling.min_new_tokens <= len(token_ids) <= sampling.max_new_tokens or not token_ids:
        return (
            f"has {len(token_ids)} tokens and must have {max(1, sampling.min_new_tokens)} to {sampling.max_new_tokens}"
        )
    if len(logprobs) != len(token_ids):
        return f"has {len(logprobs)} logprobs and {len(token_ids)} tokens"
    if not all(math.isfinite(logprob) and logprob <= _ROUNDING for logprob in logprobs):
        return f"has logprobs that are no logarithms of probabilities: {logprobs}"
    return _problem_of_end(completion, sampling)


def _problem_of_end(completion: Completion, sampling: SamplingParams) -> str | None:
    token_ids = completion.token_ids
    stops = [place for place, token in enumerate(token_ids) if token in sampling.stop_token_ids]
    if stops and stops[0] != len(token_ids) - 1:
        return f"goes on after the stop token at {stops[0]}"
    wanted = "stop" if stops else "length"
    if completion.finish_reason != wanted:
        return f"has finish_reason={completion.finish_reason!r} and must have {wanted!r}"
    if not stops and len(token_ids) != sampling.max_new_tokens:
        return f"ends without a stop token after {len(token_ids)} of {sampling.max_new_tokens} tokens"
    return None
