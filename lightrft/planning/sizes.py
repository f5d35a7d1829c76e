"""How large a model is, counted without memory for its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightrft.backends.training.meta_init import parameters_on_meta
from lightrft.backends.training.wrapping import layers_of
from lightrft.config.sections import ModelConfig
from lightrft.models.build import build_model_and_tokenizer, build_untrained_model_and_tokenizer
from lightrft.planning.activations import DecoderSizes
from lightrft.planning.memory import ModelSizes, ParameterSize

if TYPE_CHECKING:
    from torch import nn

    from lightrft.models.tokenizer import ModelTokenizer

__all__ = ["build_without_memory", "sizes_of"]


def build_without_memory(config: ModelConfig) -> tuple[nn.Module, ModelTokenizer]:
    """Return the model of a configuration with parameters on the meta device, and its tokenizer; no weight is read.

    Args:
        config: the section "model".

    Raises:
        ConfigError: as when the model is built.
        MissingPackageError: transformers is not installed.

    Example:
        >>> model, _ = build_without_memory(ModelConfig(hidden_size=16, num_heads=2))
        >>> {parameter.device.type for parameter in model.parameters()}
        {'meta'}
    """
    with parameters_on_meta():
        if config.path is None:
            return build_model_and_tokenizer(config, seed=0)
        return build_untrained_model_and_tokenizer(config.path)


def sizes_of(model: nn.Module, layer_names: Sequence[str] = ()) -> ModelSizes:
    """Return the sizes of a model; a tied parameter counts once.

    Args:
        model: plain, on any device.
        layer_names: classes of its layers; empty takes those that the model names itself.

    Raises:
        ConfigError: there are names, and no layer is of these classes.

    Example:
        >>> from torch import nn
        >>> sizes = sizes_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), ["Linear"])
        >>> [[parameter.num_elements for parameter in group] for group in sizes.groups]
        [[3, 1], [6, 3], []]
    """
    seen: set[int] = set()
    groups: list[tuple[ParameterSize, ...]] = []
    for layer in (*layers_of(model, layer_names), model):  # inner ones first, and the model takes what is left
        own = [parameter for parameter in layer.parameters() if id(parameter) not in seen]
        seen.update(map(id, own))
        groups.append(tuple(map(_size_of, own)))
    return ModelSizes(groups=tuple(groups), decoder=_decoder_of(model))


def _size_of(parameter: nn.Parameter) -> ParameterSize:
    return ParameterSize(
        num_rows=parameter.shape[0] if parameter.dim() and parameter.is_floating_point() else 0,
        num_elements=parameter.numel(),
        is_trained=parameter.requires_grad,
    )


def _decoder_of(model: nn.Module) -> DecoderSizes | None:
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    described: object = config if of_text is None else of_text()
    layers, hidden = _number(described, "num_hidden_layers"), _number(described, "hidden_size")
    heads, vocabulary = _number(described, "num_attention_heads"), _number(described, "vocab_size")
    if not (layers and hidden and heads and vocabulary):
        return None
    width = _number(described, "head_dim") or hidden // heads
    return DecoderSizes(
        num_layers=layers,
        hidden=hidden,
        attention=width * heads,
        key_value=width * (_number(described, "num_key_value_heads") or heads),
        intermediate=_number(described, "intermediate_size") or 4 * hidden,
        vocabulary=vocabulary,
        has_head_norms=any("q_norm" in name for name, _ in model.named_parameters()),
    )


def _number(described: object, name: str) -> int:
    found = getattr(described, name, None)
    return found if isinstance(found, int) else 0  # some architectures have a list, a number a layer
