"""Sizes of models: counted without memory, the same as with it."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from lightrft.config import ModelConfig
from lightrft.errors import ConfigError
from lightrft.models.build import build_model_and_tokenizer
from lightrft.planning.sizes import build_without_memory, sizes_of

MODEL = ModelConfig(hidden_size=16, num_layers=3, num_heads=4, num_key_value_heads=2, max_length=32)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_without_memory_has_the_sizes_of_a_real_one(architecture: str, is_tied: bool) -> None:
    """Layers, shapes and ties are those of the model that is trained; a tied matrix counts once."""
    config = attrs.evolve(MODEL, architecture=architecture, tie_embeddings=is_tied)
    real, _ = build_model_and_tokenizer(config, seed=0)
    empty, _ = build_without_memory(config)
    sizes = sizes_of(empty)
    assert sizes == sizes_of(real)
    assert sum(size.num_elements for group in sizes.groups for size in group) == sum(
        parameter.numel() for parameter in real.parameters()
    )
    assert len(sizes.groups) == 3 + 1
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_the_decoder_is_described_by_its_own_parameters() -> None:
    """Widths follow from the config, and agree with the shapes of the matrices."""
    model, tokenizer = build_without_memory(MODEL)
    decoder = sizes_of(model).decoder
    assert decoder is not None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (decoder.attention, decoder.hidden)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (decoder.key_value, decoder.hidden)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (decoder.intermediate, decoder.hidden)
    assert (decoder.num_layers, decoder.vocabulary, decoder.has_head_norms) == (3, len(tokenizer), True)
    other, _ = build_without_memory(attrs.evolve(MODEL, architecture="llama"))
    described = sizes_of(other).decoder
    assert described == attrs.evolve(decoder, has_head_norms=False)


def test_a_directory_is_counted_without_its_weights(tmp_path: Path) -> None:
    """Only config and tokenizer are read; a directory that describes no model is refused."""
    model, tokenizer = build_model_and_tokenizer(MODEL, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    found, _ = build_without_memory(ModelConfig(path=str(tmp_path)))
    assert sizes_of(found) == sizes_of(model)
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(ConfigError, match="describes no model that can be built"):
        build_without_memory(ModelConfig(path=str(tmp_path)))


def test_frozen_and_uncuttable_parameters_are_told_apart() -> None:
    """A frozen parameter is not trained, and a number alone has no rows."""
    model = nn.Module()
    model.alone = nn.Parameter(torch.tensor(1.0))
    model.frozen = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    ((alone, frozen),) = sizes_of(model).groups
    assert (alone.num_rows, alone.num_elements, alone.is_trained) == (0, 1, True)
    assert (frozen.num_rows, frozen.num_elements, frozen.is_trained) == (3, 6, False)
    assert sizes_of(model).decoder is None
