"""Tells whether the fused decoder computes what a model computes, and if not, why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SUPPORTED_MODELS", "explain_unsupported"]

SUPPORTED_MODELS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""From transformers' model type to the class of its causal language model."""


def explain_unsupported(model: PreTrainedModel) -> str | None:
    """Return why the fused decoder cannot run the model, or None if it can.

    The decoder was held to transformers' logits in float32 with plain linear layers, full attention and default rotary
    embeddings; anything else is refused.

    Args:
        model: any causal language model of transformers.
    """
    return _explain_architecture(model) or _explain_config(model) or _explain_modules(model) or _explain_sharing(model)


def _explain_architecture(model: PreTrainedModel) -> str | None:
    model_type = model.config.model_type
    if SUPPORTED_MODELS.get(model_type) != type(model).__name__:
        return (
            f"{type(model).__name__} of model_type={model_type!r} is not one of {', '.join(SUPPORTED_MODELS.values())}"
        )
    return None


def _explain_config(model: PreTrainedModel) -> str | None:
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rope_parameters={rope!r} are not the default rotary embedding of whole heads"
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other_layers:
        return f"layer_types has {', '.join(sorted(other_layers))}, and only full_attention is supported"
    if getattr(config, "hidden_act", None) != "silu":
        return f"hidden_act={getattr(config, 'hidden_act', None)!r} is not 'silu'"
    if getattr(config, "quantization_config", None) is not None:
        return "the weights are quantised"
    return None


def _explain_modules(model: PreTrainedModel) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            return f"{name} has dtype {parameter.dtype}, and only torch.float32 was checked"
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}, not a plain parameter"
    for name, module in model.named_modules():
        if name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}, not a plain Linear"
        if name == "lm_head" and getattr(module, "bias", None) is not None:
            return "lm_head has a bias, which no model of these families has"
        if vars(module)["_forward_hooks"] or vars(module)["_forward_pre_hooks"]:
            return f"{name or type(module).__name__} has forward hooks, which the fused decoder would skip"
    return None


def _explain_sharing(model: PreTrainedModel) -> str | None:
    """Return which parameter below the layers has two names: joined with others, it would be in two places at once."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and "model.layers." in (name + other):
            return f"{name} is {other}, and no other module may share what a layer has"
    return None
