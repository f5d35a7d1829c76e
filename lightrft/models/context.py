"""How many tokens a model can take, and which."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["context_size", "known_vocabulary_size"]


def context_size(model: nn.Module) -> int | None:
    """Return how many tokens a model can take, prompt and completion together; None for one that states no limit.

    Models without learnt or rotary positions, such as Bloom, state none.

    Args:
        model: a model of transformers, or any other module, which states none.

    Example:
        >>> from lightrft.config import ModelConfig
        >>> from lightrft.models.build import build_model_and_tokenizer
        >>> context_size(build_model_and_tokenizer(ModelConfig(hidden_size=16, max_length=32), seed=0)[0])
        32
    """
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    size: int | None = getattr(of_text() if of_text else config, "max_position_embeddings", None)
    return size


def known_vocabulary_size(model: nn.Module) -> int | None:
    """Return how many token ids a model knows, or None for one that does not say which embedding takes them.

    Args:
        model: a model of transformers, or any other module with `get_input_embeddings`.

    Example:
        >>> known_vocabulary_size(nn.Linear(2, 2)) is None
        True
    """
    get = cast("Callable[[], nn.Module] | None", getattr(model, "get_input_embeddings", None))
    if get is None:
        return None
    taking = get()
    # one of torch, maybe below an adapter, says the number itself: its rows may lie on other ranks
    own = (module.num_embeddings for module in taking.modules() if isinstance(module, nn.Embedding))
    return next(own, None) or taking.get_parameter("weight").shape[0]
