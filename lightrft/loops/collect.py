"""Problems in, completions with rewards out.

Shapes: B completions of the rollout, those of a problem adjacent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
from lightrft.loops.ranks import RolloutOnRanks, cut, gather_texts, num_ranks, shares
from lightrft.models.tokenizer import encode_text
from lightrft.rewards.resolve import Reward, score
from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.rollout import Completion, EngineHandle, Prompt, SamplingParams, Tokenizer

__all__ = [
    "BetweenBatches",
    "Request",
    "Scored",
    "collect",
    "go_on",
    "request_of",
    "sampling_params",
    "score_made",
    "shape_rewards",
]


class BetweenBatches(Protocol):
    """Takes its turn between two batches of a rollout."""

    def __call__(self) -> None:
        """Return to go on, and raise to end the rollout."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Request:
    """A rollout that is to be made.

    Attributes:
        problems: the same on all ranks.
        prompts: their questions in tokens.
        sampling: how tokens are drawn.
        order: numbers of the problems of each batch, rank by rank.
    """

    problems: tuple[Problem, ...]
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    order: tuple[tuple[range, ...], ...]


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


def go_on() -> None:
    """Do nothing: a rollout that nobody interrupts."""


def collect(
    rollout: RolloutOnRanks,
    engine: EngineHandle,
    problems: Sequence[Problem],
    *,
    tokenizer: Tokenizer,
    reward: Reward,
    sampling: SamplingParams,
    batch_size: int | None = None,
    between_batches: BetweenBatches = go_on,
) -> Scored:
    """Return `sampling.n` scored completions of each problem, problem by problem.

    Each rank makes and scores those of its share of the problems; all ranks get all of them.

    Args:
        rollout: how completions are made.
        engine: an engine that is awake.
        problems: the same on all ranks.
        tokenizer: between text and tokens.
        reward: scores the texts.
        sampling: how tokens are drawn.
        batch_size: completions that a rank is asked for at once; None asks for all. Draws do not depend on it.
        between_batches: called on all ranks between two batches, before anything is scored.

    Raises:
        DataError: a question does not fit into the model's context or vocabulary.
        RewardError: the reward raised or returned no finite number.
    """
    request = request_of(rollout, problems, tokenizer=tokenizer, sampling=sampling, batch_size=batch_size)
    completions: list[Completion] = []
    for batch in request.order:
        if batch is not request.order[0]:
            between_batches()
        mine = [request.prompts[index] for index in batch[rollout.get_rank()]]
        numbered = attrs.evolve(sampling, first_prompt=sampling.first_prompt + batch[0].start)
        completions += rollout.gather_and_generate(engine, mine, numbered)
    return score_made(rollout, request, completions, tokenizer=tokenizer, reward=reward)


def request_of(
    collectives: Collectives,
    problems: Sequence[Problem],
    *,
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    batch_size: int | None,
) -> Request:
    """Return the request for `sampling.n` completions of each problem.

    Args:
        collectives: what the ranks do together.
        problems: the same on all ranks.
        tokenizer: between text and tokens.
        sampling: how tokens are drawn.
        batch_size: completions that a rank is asked for at once; None asks for all.

    Raises:
        DataError: a question holds a character that the tokenizer does not know.
    """
    prompts = [Prompt(token_ids=tuple(encode_text(tokenizer, p.question, where=p.question))) for p in problems]
    order = _order(len(problems), num_ranks(collectives), batch_size and max(1, batch_size // sampling.n))
    return Request(problems=tuple(problems), prompts=tuple(prompts), sampling=sampling, order=order)


def score_made(
    collectives: Collectives,
    request: Request,
    completions: Sequence[Completion],
    *,
    tokenizer: Tokenizer,
    reward: Reward,
) -> Scored:
    """Return the scored completions of all ranks, problem by problem.

    Args:
        collectives: what the ranks do together; all of them call this.
        request: what was asked for.
        completions: this rank's, batch by batch.
        tokenizer: between text and tokens.
        reward: scores the texts.

    Raises:
        RewardError: the reward raised or returned no finite number.
    """
    problems, sampling, rank = request.problems, request.sampling, collectives.get_rank()
    asked = [problems[index] for batch in request.order for index in batch[rank] for _ in range(sampling.n)]
    texts = [_text(tokenizer, completion, sampling) for completion in completions]
    rewards = score(reward, [p.question for p in asked], texts, [p.answer for p in asked])
    scored = Scored(
        problems=tuple(asked),
        completions=tuple(completions),
        texts=tuple(texts),
        rewards_B=torch.tensor(rewards, dtype=torch.float32),
    )
    if len(request.order[0]) == 1:
        return scored
    gathered = [index for parts in zip(*request.order, strict=True) for part in parts for index in part]
    every = _gathered(collectives, scored, problems, request.prompts, gathered, sampling.n)
    return _in_order(every, gathered, sampling.n)


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


def _order(num_problems: int, num_ranks: int, num_each: int | None) -> tuple[tuple[range, ...], ...]:
    """Return the problems of each batch, rank by rank; a rank has at most so many of a batch, and None is no limit."""
    step = max(1, num_problems if num_each is None else num_each * num_ranks)
    starts = range(0, max(1, num_problems), step)  # no problems are one batch of none
    return tuple(
        tuple(
            range(start + part.start, start + part.stop) for part in shares(min(step, num_problems - start), num_ranks)
        )
        for start in starts
    )


def _in_order(scored: Scored, gathered: Sequence[int], num_samples: int) -> Scored:
    """Return completions of problems in another order in that of the problems' numbers."""
    place = {problem: index for index, problem in enumerate(gathered)}
    rows = [place[problem] * num_samples + sample for problem in sorted(place) for sample in range(num_samples)]
    return Scored(
        problems=tuple(scored.problems[row] for row in rows),
        completions=tuple(scored.completions[row] for row in rows),
        texts=tuple(scored.texts[row] for row in rows),
        rewards_B=scored.rewards_B[rows],
    )


def _gathered(
    collectives: Collectives,
    scored: Scored,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    order: Sequence[int],
    num_samples: int,
) -> Scored:
    """Return the completions of all ranks, whose problems have these numbers."""
    mine = scored.completions
    every = collectives.all_gather(
        {
            "lengths": torch.tensor([len(one.token_ids) for one in mine], dtype=torch.int64),
            "token_ids": torch.tensor([token for one in mine for token in one.token_ids], dtype=torch.int64),
            "logprobs": torch.tensor([value for one in mine for value in one.logprobs], dtype=torch.float64),
            "is_stopped": torch.tensor([one.finish_reason == "stop" for one in mine], dtype=torch.bool),
            "weight_versions": torch.tensor([one.weight_version for one in mine], dtype=torch.int64),
            "rewards": scored.rewards_B,
        }
    )
    lengths = every["lengths"].tolist()
    columns = zip(
        cut(every["token_ids"].tolist(), lengths),
        cut(every["logprobs"].tolist(), lengths),
        every["is_stopped"].tolist(),
        every["weight_versions"].tolist(),
        strict=True,
    )
    completions = [
        Completion(
            prompt_ids=prompts[order[index // num_samples]].token_ids,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason="stop" if is_stopped else "length",
            weight_version=weight_version,
            sample_index=index % num_samples,
        )
        for index, (token_ids, logprobs, is_stopped, weight_version) in enumerate(columns)
    ]
    return Scored(
        problems=tuple(problems[index] for index in order for _ in range(num_samples)),
        completions=tuple(completions),
        texts=tuple(gather_texts(collectives, scored.texts)),
        rewards_B=every["rewards"],
    )


def _text(tokenizer: Tokenizer, completion: Completion, sampling: SamplingParams) -> str:
    stopped = completion.finish_reason == "stop" and completion.token_ids[-1] in sampling.stop_token_ids
    token_ids = completion.token_ids[:-1] if stopped else completion.token_ids
    return tokenizer.decode(list(token_ids), skip_special_tokens=False)
