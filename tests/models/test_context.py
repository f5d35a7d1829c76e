"""How many tokens a model can take."""

from __future__ import annotations

from torch import nn

from lightrft.config.sections import ModelConfig
from lightrft.models.build import build_model
from lightrft.models.context import context_size
from lightrft.models.tokenizer import build_character_tokenizer


def test_a_model_of_transformers_states_its_limit() -> None:
    """The limit is that of the model's configuration, whatever the architecture calls it."""
    for architecture in ("qwen3", "gpt2"):
        config = ModelConfig(architecture=architecture, hidden_size=16, num_layers=1, num_heads=2, max_length=24)
        assert context_size(build_model(config, build_character_tokenizer("ab"), seed=0)) == 24


def test_a_plain_module_states_none() -> None:
    """A module without a configuration has no limit that could be known."""
    assert context_size(nn.Linear(1, 1)) is None
