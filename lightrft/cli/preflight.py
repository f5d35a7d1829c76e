"""What can be known to go wrong before the first step."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from lightrft.config import Config
from lightrft.errors import DataError
from lightrft.loops.parts import Parts
from lightrft.models.context import context_size
from lightrft.models.tokenizer import encode_text

__all__ = ["check_problems", "set_threads"]

_SHOWN = 60
"""Characters of a prompt that a message shows."""


def set_threads(threads: int) -> None:
    """Let CPU tensor work use so many threads of this process.

    Args:
        threads: the setting `run.threads`; 0 leaves torch's own choice.
    """
    if threads:
        torch.set_num_threads(threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def check_problems(parts: Parts, config: Config) -> None:
    """Refuse problems that do not fit into the model, before the warm-up rather than after it.

    Args:
        parts: model, tokenizer and problems.
        config: the run's configuration.

    Raises:
        DataError: a prompt, with the tokens that are to follow it, is longer than the model's context, or holds a
            character that the tokenizer does not know.
    """
    context = context_size(parts.model)
    longest_answer = config.engine.max_new_tokens
    for question in _questions(parts):
        num_tokens = len(encode_text(parts.tokenizer, question, where=question))
        if context is not None and num_tokens + longest_answer > context:
            shown = question if len(question) <= _SHOWN else f"{question[:_SHOWN]}..."
            raise DataError(
                f"prompt={shown!r} has {num_tokens} tokens, and with engine.max_new_tokens({longest_answer}) that is "
                f"more than the model's context of {context}; shorten it, lower engine.max_new_tokens, or build a "
                f"model with a larger model.max_length."
            )


def _questions(parts: Parts) -> Iterable[str]:
    for problem in (*parts.train, *parts.heldout):
        yield problem.question
