"""Tests of what the fused decoder refuses."""

from __future__ import annotations

from typing import Protocol

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lightrft.backends.rollout.hf.llama_support import explain_unsupported


class BuildTinyModel(Protocol):
    def __call__(self, model_type: str, **overrides: object) -> PreTrainedModel: ...


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_plain_models_are_supported(tiny_model: BuildTinyModel, model_type: str) -> None:
    """The three families with default settings have nothing against them."""
    assert explain_unsupported(tiny_model(model_type)) is None


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("mistral", {}, "MistralForCausalLM"),
        ("gemma2", {"head_dim": 8}, "Gemma2ForCausalLM"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding_attention"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor': 0.5",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not 'silu'"),
    ],
)
def test_unusual_settings_are_named(
    tiny_model: BuildTinyModel, model_type: str, overrides: dict[str, object], reason: str
) -> None:
    """Other architectures, sliding windows, scaled rotary embeddings and other activations are refused by name."""
    assert reason in str(explain_unsupported(tiny_model(model_type, **overrides)))


def test_a_subclass_is_refused(tiny_model: BuildTinyModel) -> None:
    """A class of one's own with the model type of a supported one may compute anything, so it is refused."""
    model = tiny_model("llama")
    model.__class__ = type("Mine", (type(model),), {})
    assert "Mine" in str(explain_unsupported(model))


def test_other_dtypes_are_refused(tiny_model: BuildTinyModel) -> None:
    """A bfloat16 model is refused: only float32 was checked."""
    assert "torch.bfloat16" in str(explain_unsupported(tiny_model("llama").bfloat16()))


def test_quantised_weights_are_refused(tiny_model: BuildTinyModel) -> None:
    """A config that states a quantisation is refused."""
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert "quantised" in str(explain_unsupported(model))


def test_replaced_modules_are_refused(tiny_model: BuildTinyModel) -> None:
    """A linear layer that was replaced (as adapters do), and one of another parameter type, are named."""
    model = tiny_model("llama")
    model.set_submodule("model.layers.1.mlp.up_proj", nn.Sequential(nn.Linear(32, 48, bias=False)))
    assert "model.layers.1.mlp.up_proj is a Sequential" in str(explain_unsupported(model))

    headed = tiny_model("llama")
    headed.set_submodule("lm_head", type("Head", (nn.Linear,), {})(32, headed.config.vocab_size, bias=False))
    assert "lm_head is a Head, not a plain Linear" in str(explain_unsupported(headed))

    other = tiny_model("llama")
    special = type("Special", (nn.Parameter,), {})
    other.get_submodule("model.norm").weight = special(torch.ones(32))
    assert "model.norm.weight is a Special" in str(explain_unsupported(other))


def test_a_head_with_a_bias_is_refused(tiny_model: BuildTinyModel) -> None:
    """A plain linear head with a bias, which the decoder would leave out, is named."""
    model = tiny_model("llama")
    model.set_submodule("lm_head", nn.Linear(32, model.config.vocab_size))
    assert "lm_head has a bias" in str(explain_unsupported(model))


def test_hooks_are_refused(tiny_model: BuildTinyModel) -> None:
    """A module with a forward hook is named: the decoder would not run the hook."""
    model = tiny_model("qwen3")
    handle = model.get_submodule("model.layers.0").register_forward_hook(lambda *_: None)
    assert "model.layers.0 has forward hooks" in str(explain_unsupported(model))
    handle.remove()
    assert explain_unsupported(model) is None
    handle = model.register_forward_pre_hook(lambda *_: None)
    assert "Qwen3ForCausalLM has forward hooks" in str(explain_unsupported(model))
    handle.remove()


def test_shared_weights_are_refused(tiny_model: BuildTinyModel) -> None:
    """A parameter of two modules below the layers is named; a head that is the embedding is none of them."""
    assert explain_unsupported(tiny_model("qwen3", tie_word_embeddings=True)) is None
    model = tiny_model("qwen3")
    layers = [model.get_submodule(f"model.layers.{layer}.self_attn.v_proj") for layer in range(2)]
    layers[1].weight = layers[0].weight
    words = "model.layers.1.self_attn.v_proj.weight is model.layers.0.self_attn.v_proj.weight"
    assert words in str(explain_unsupported(model))
    model = tiny_model("qwen3")
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.gate_proj = mlp.up_proj
    assert "model.layers.1.mlp.up_proj.weight is model.layers.1.mlp.gate_proj.weight" in str(explain_unsupported(model))
