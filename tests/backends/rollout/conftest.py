"""Tiny transformers models whose weights are random enough that no mistake cancels out."""

from __future__ import annotations

from typing import Protocol

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SIZES: dict[str, object] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


class BuildTinyModel(Protocol):
    def __call__(self, model_type: str, **overrides: object) -> PreTrainedModel: ...


@pytest.fixture(scope="session")
def tiny_model() -> BuildTinyModel:
    """Build a causal language model by its model type; every parameter is random, norms and biases too."""

    def build(model_type: str, **overrides: object) -> PreTrainedModel:
        generator = torch.Generator().manual_seed(7)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**_SIZES, **overrides}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                fan_in = parameter.shape[-1]
                is_scale = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(1 + 0.3 * noise if is_scale else noise * 1.5 / fan_in**0.5)
        return model.eval()

    return build
