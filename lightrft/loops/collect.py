"""Problems in, completions with rewards out.

Shapes: B completions of the rollout, those of a problem adjacent.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from lightrft.algorithms.reward_shaping import (
    RunningStatistics,
    clip_rewards,
    normalise,
    overlong_penalty,
    update_statistics,
)
from lightrft.config.sections import AlgorithmConfig, EngineConfig
from lightrft.data.prompts import Problem
from lightrft.models.tokenizer import encode_text
from lightrft.rewards.resolve import Reward, score
from lightrft.strategy.protocols.rollout import (
    Completion,
    EngineHandle,
    Prompt,
    Rollout,
    SamplingParams,
    Tokenizer,
)

__all__ = ["Scored", "collect", "sampling_params", "shape_rewards"]


@attrs.frozen(kw_only=True, eq=False)
class Scored:
    """Completions with what they earned.

    Attributes:
        problems: the problem of each completion.
        completions: B completions.
        texts: each as text, without the token that ended it.
        rewards_B: raw rewards, float32.
    """

    problems: tuple[Problem, ...]
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]
    rewards_B: torch.Tensor


def sampling_params(config: EngineConfig, tokenizer: Tokenizer, *, num_samples: int, seed: int) -> SamplingParams:
    """Return how a rollout is drawn.

    Args:
        config: temperature and bounds.
        tokenizer: its end token stops a completion.
        num_samples: completions of each prompt.
        seed: seed of the draws.
    """
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        stop_token_ids=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        n=num_samples,
        seed=seed,
    )


def collect(
    rollout: Rollout,
    engine: EngineHandle,
    problems: Sequence[Problem],
    *,
    tokenizer: Tokenizer,
    reward: Reward,
    sampling: SamplingParams,
) -> Scored:
    """Return `sampling.n` scored completions of each problem, problem by problem.

    Args:
        rollout: how completions are made.
        engine: an engine that is awake.
        problems: this rank's problems.
        tokenizer: between text and tokens.
        reward: scores the texts.
        sampling: how tokens are drawn.

    Raises:
        DataError: a question does not fit into the model's context or vocabulary.
        RewardError: the reward raised or returned no finite number.
    """
    prompts = [Prompt(token_ids=tuple(encode_text(tokenizer, p.question, where=p.question))) for p in problems]
    completions = rollout.gather_and_generate(engine, prompts, sampling)
    asked = [problem for problem in problems for _ in range(sampling.n)]
    texts = [_text(tokenizer, completion, sampling) for completion in completions]
    rewards = score(reward, [p.question for p in asked], texts, [p.answer for p in asked])
    return Scored(
        problems=tuple(asked),
        completions=tuple(completions),
        texts=tuple(texts),
        rewards_B=torch.tensor(rewards, dtype=torch.float32),
    )


def shape_rewards(
    scored: Scored, statistics: RunningStatistics, *, algorithm: AlgorithmConfig, max_new_tokens: int
) -> tuple[torch.Tensor, RunningStatistics]:
    """Return the rewards (B,) that advantages are made of, and the running statistics with these rewards in them.

    In this order: penalty for length, clipping, running normalisation; each only where it is switched on.

    Args:
        scored: completions with raw rewards.
        statistics: of all rewards before.
        algorithm: what is switched on.
        max_new_tokens: the longest completion, in tokens.
    """
    rewards_B = scored.rewards_B
    if algorithm.overlong_buffer:
        lengths_B = torch.tensor([len(completion.token_ids) for completion in scored.completions])
        rewards_B = rewards_B + overlong_penalty(
            lengths_B,
            max_tokens=max_new_tokens,
            buffer=algorithm.overlong_buffer,
            factor=algorithm.overlong_penalty,
        )
    rewards_B = clip_rewards(rewards_B, bound=algorithm.reward_clip)
    if algorithm.reward_running_norm:
        statistics = update_statistics(statistics, rewards_B)
        rewards_B = normalise(rewards_B, statistics, subtract_mean=algorithm.reward_running_norm_minus_mean)
    return rewards_B, statistics


def _text(tokenizer: Tokenizer, completion: Completion, sampling: SamplingParams) -> str:
    stopped = completion.finish_reason == "stop" and completion.token_ids[-1] in sampling.stop_token_ids
    token_ids = completion.token_ids[:-1] if stopped else completion.token_ids
    return tokenizer.decode(list(token_ids), skip_special_tokens=False)
