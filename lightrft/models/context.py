"""How many tokens a model can take."""

from __future__ import annotations

from torch import nn

__all__ = ["context_size"]


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
