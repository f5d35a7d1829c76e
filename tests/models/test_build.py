from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightrft.config.sections import ModelConfig
from lightrft.errors import ConfigError
from lightrft.models.build import build_model, build_model_and_tokenizer, load_model_and_tokenizer
from lightrft.models.tokenizer import build_character_tokenizer

SMALL = ModelConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    max_length=32,
    alphabet="abc",
)


def _same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_what_the_config_says(tied: bool) -> None:
    """Sizes, ids of special tokens, dtype, device and mode follow the config and the tokenizer."""
    config = ModelConfig(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_length=32,
        tie_embeddings=tied,
    )
    tokenizer = build_character_tokenizer("abc")
    model = build_model(config, tokenizer, seed=0)
    built = model.config
    assert (built.hidden_size, built.num_hidden_layers, built.num_attention_heads, built.head_dim) == (16, 1, 2, 8)
    assert (built.num_key_value_heads, built.intermediate_size, built.max_position_embeddings) == (1, 24, 32)
    assert (built.vocab_size, built.pad_token_id, built.eos_token_id, built.bos_token_id) == (5, 0, 1, None)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert not model.training


def test_weights_are_a_function_of_the_seed_and_the_global_random_state_stays() -> None:
    """The same seed gives the same bits, another one others, and torch's own stream goes on as if nothing had been."""
    tokenizer = build_character_tokenizer("abc")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = build_model(SMALL, tokenizer, seed=1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    assert _same(first, build_model(SMALL, tokenizer, seed=1))
    assert not _same(first, build_model(SMALL, tokenizer, seed=2))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_other_architectures_take_the_sizes_they_have(architecture: str) -> None:
    """An architecture without key-value heads or a head size is built where the config leaves these to us."""
    config = ModelConfig(architecture=architecture, hidden_size=16, num_layers=1, num_heads=2, max_length=32)
    model = build_model(config, build_character_tokenizer("abc"), seed=0)
    assert model.get_output_embeddings().weight.shape == (5, 16)
    assert model.config.num_hidden_layers == 1


def test_a_setting_that_the_architecture_has_not_is_refused() -> None:
    """Otherwise transformers would store num_key_value_heads in a gpt2 config and never use it."""
    config = ModelConfig(architecture="gpt2", hidden_size=16, num_heads=2, num_key_value_heads=1)
    with pytest.raises(ConfigError, match="architecture='gpt2' has no setting num_key_value_heads; "):
        build_model(config, build_character_tokenizer("abc"), seed=0)


@pytest.mark.parametrize(("name", "near"), [("qwenn3", "near ones: qwen3"), ("zzz", "near ones: qwen3, llama")])
def test_an_unknown_architecture_names_near_ones(name: str, near: str) -> None:
    """The error lists what the name may have meant."""
    with pytest.raises(ConfigError, match=f"architecture='{name}' is not known; {near}"):
        build_model(ModelConfig(architecture=name), build_character_tokenizer("abc"), seed=0)


def test_sizes_that_an_architecture_cannot_take_are_a_config_error() -> None:
    """BART's 16 decoder heads do not divide a width of 6: what transformers says about it arrives on one line."""
    config = ModelConfig(architecture="bart", hidden_size=6, num_heads=1)
    with pytest.raises(
        ConfigError, match=r"architecture='bart' cannot be built .* divisible .*; change them"
    ) as caught:
        build_model(config, build_character_tokenizer("abc"), seed=0)
    assert "\n" not in str(caught.value)


def _saved(directory: Path) -> Path:
    model, tokenizer = build_model_and_tokenizer(SMALL, seed=3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(str(directory))
    return directory


def test_a_saved_model_loads_with_the_same_bits_and_tokenizer(tmp_path: Path) -> None:
    """Weights and ids of a directory written by save_pretrained come back; `path` in the config chooses it."""
    built, tokenizer = build_model_and_tokenizer(SMALL, seed=3)
    directory = str(_saved(tmp_path))
    for model, loaded in (
        load_model_and_tokenizer(directory),
        build_model_and_tokenizer(ModelConfig(path=directory), seed=9),
    ):
        assert _same(built, model)
        assert not model.training
        assert loaded.encode("cab") == tokenizer.encode("cab")


def test_a_path_that_is_no_directory_is_not_looked_up_on_a_hub() -> None:
    """A repository-like name that does not exist here is an error at once."""
    with pytest.raises(ConfigError, match="path='gpt2/none' is not a directory; give a local one"):
        load_model_and_tokenizer("gpt2/none")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "holds no config.json"),
        ("tokenizer.json", "holds no tokenizer; save it"),
        ("model.safetensors", "holds no model that can be loaded"),
    ],
)
def test_a_directory_that_lacks_a_file_says_which(tmp_path: Path, missing: str, said: str) -> None:
    """Alone, transformers would make up an empty tokenizer where there is none."""
    (_saved(tmp_path) / missing).unlink()
    with pytest.raises(ConfigError, match=said):
        load_model_and_tokenizer(str(tmp_path))


def test_missing_weights_are_named_and_not_drawn_at_random(tmp_path: Path) -> None:
    """A model of two layers does not come out of the weights of one."""
    path = _saved(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(ConfigError, match=r"lacks the weights model\.layers\.1\."):
        load_model_and_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    """A tokenizer file that is no tokenizer is refused with the path."""
    (_saved(tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="holds no tokenizer that can be loaded"):
        load_model_and_tokenizer(str(tmp_path))
