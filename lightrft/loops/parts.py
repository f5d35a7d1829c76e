"""What a run is made of: a model, problems, and who scores the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from lightrft.config.root import Config
from lightrft.data.prompts import Problem
from lightrft.data.splits import split_problems
from lightrft.models.build import build_model_and_tokenizer
from lightrft.rewards.resolve import Reward, resolve_reward

if TYPE_CHECKING:
    from torch import nn

    from lightrft.models.tokenizer import ModelTokenizer

__all__ = ["Parts", "build_parts"]


@attrs.frozen(kw_only=True, eq=False)
class Parts:
    """What a run is made of.

    Attributes:
        model: the policy before the run, plain.
        tokenizer: between text and tokens.
        train: problems to learn from, as prompts.
        heldout: problems to evaluate on; none of them is in `train`.
        reward: scores a completion.
    """

    model: nn.Module
    tokenizer: ModelTokenizer
    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...]
    reward: Reward


def build_parts(config: Config) -> Parts:
    """Return the parts that a configuration names, built or loaded.

    Args:
        config: sections model, data and strategy (its seed) count.

    Raises:
        ConfigError: an unknown task, reward or architecture.
        DataError: a prompt file that cannot be used.
    """
    train, heldout = split_problems(config.data)
    reward = resolve_reward(config.data.reward, train)
    model, tokenizer = build_model_and_tokenizer(config.model, seed=config.strategy.seed)
    return Parts(model=model, tokenizer=tokenizer, train=train.problems, heldout=heldout.problems, reward=reward)
