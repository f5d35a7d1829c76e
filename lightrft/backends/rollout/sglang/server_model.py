"""Which model a server of SGLang runs, and whether weights of the trainer's may go there."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, cast

import torch.distributed as dist

from lightrft.backends.rollout.sglang.server_calls import Server, ask, require_success
from lightrft.errors import UnsupportedError
from lightrft.strategy.protocols.rollout import EngineSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["require_fitting"]

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_experts",
    "moe_intermediate_size",
)
"""Settings of a model that give its tensors their shapes; the server ends where a tensor does not fit."""


def require_fitting(server: Server, source: EngineSource) -> None:
    """Refuse a server of another model before a tensor goes there: one that does not fit ends it.

    Args:
        server: the server.
        source: what an engine is started from.

    Raises:
        UnsupportedError: there are several ranks or a processor, or the server's model is another one.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UnsupportedError(
            f"url={server.url!r} is one server and {dist.get_world_size()} ranks would give it weights; train on one."
        )
    model = source.model
    if source.processor is not None:
        raise UnsupportedError(
            f"processor={type(source.processor).__name__} reads images and url={server.url!r} is given none; leave "
            "processor= out, or engine.url."
        )
    if not hasattr(model, "get_decoder"):
        raise UnsupportedError(
            f"model={type(model).__name__} is no causal language model of transformers, which SGLang needs; use the "
            "engine 'scripted' or one of your own."
        )
    own, there = cast("PreTrainedModel", model).config.get_text_config(), _config_of(server)
    for name in ("model_type", "vocab_size", "tie_word_embeddings", *_SIZES):
        if getattr(own, name, None) != getattr(there, name, None):
            raise UnsupportedError(
                f"url={server.url!r} runs a model whose {name} is {getattr(there, name, None)!r} and the trainer's is "
                f"{getattr(own, name, None)!r}; start it with this model."
            )


def _config_of(server: Server) -> PretrainedConfig:
    """Return the configuration of the model that a server was started with."""
    from transformers import AutoConfig

    told = ask(server, "/model_info")
    require_success(told, "start")
    content = cast("dict[str, object]", told.content if isinstance(told.content, dict) else {})
    # an update moves the path of the model to files that are gone, and leaves that of the tokenizer
    for path in (content.get("model_path"), content.get("tokenizer_path")):
        with suppress(OSError, ValueError):
            config: PretrainedConfig = AutoConfig.from_pretrained(str(path), local_files_only=True)
            return config.get_text_config()
    raise UnsupportedError(
        f"url={server.url!r} has its model at {content.get('model_path')!r}, where this process finds no "
        "configuration; start it on this machine, from a directory."
    )
