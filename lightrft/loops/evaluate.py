"""How good the model is on problems that it never trained on."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from lightrft.config.sections import EngineConfig
from lightrft.data.prompts import Problem
from lightrft.loops.collect import BetweenBatches, Scored, collect, go_on, sampling_params
from lightrft.loops.ranks import RolloutOnRanks
from lightrft.rewards.resolve import Reward
from lightrft.strategy.protocols.rollout import EngineHandle, Tokenizer

__all__ = ["Evaluation", "evaluate"]

SOLVED = 1.0
"""A completion whose raw reward is at least this has solved its problem; verifiers give 1 for a right answer."""


@attrs.frozen(kw_only=True, eq=False)
class Evaluation:
    """What greedy completions of held-out problems earned.

    Attributes:
        accuracy: share of the problems that were solved, from 0 to 1.
        reward: mean raw reward.
        scored: the completions.
    """

    accuracy: float
    reward: float
    scored: Scored


def evaluate(
    rollout: RolloutOnRanks,
    engine: EngineHandle,
    problems: Sequence[Problem],
    *,
    tokenizer: Tokenizer,
    reward: Reward,
    config: EngineConfig,
    between_batches: BetweenBatches = go_on,
) -> Evaluation:
    """Return how one greedy completion of each problem scores.

    Args:
        rollout: how completions are made.
        engine: an engine that is awake.
        problems: held-out problems, at least one; the same on all ranks, each of which takes a share.
        tokenizer: between text and tokens.
        reward: scores the texts.
        config: bounds of a completion and of a batch; its temperature plays no part.
        between_batches: called on all ranks between two batches.
    """
    greedy = attrs.evolve(config, temperature=0.0, top_p=1.0, top_k=0)
    sampling = sampling_params(greedy, tokenizer, num_samples=1, seed=0)
    scored = collect(
        rollout,
        engine,
        problems,
        tokenizer=tokenizer,
        reward=reward,
        sampling=sampling,
        batch_size=config.batch_size,
        between_batches=between_batches,
    )
    return Evaluation(
        accuracy=(scored.rewards_B >= SOLVED).float().mean().item(),
        reward=scored.rewards_B.mean().item(),
        scored=scored,
    )
