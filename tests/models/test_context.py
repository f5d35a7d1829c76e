"""How many tokens a model can take."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lightrft.config.sections import ModelConfig
from lightrft.models.build import build_model
from lightrft.models.context import context_size, known_vocabulary_size
from lightrft.models.tokenizer import build_character_tokenizer


def test_a_model_of_transformers_states_its_limit() -> None:
    """The limit is that of the model's configuration, whatever the architecture calls it."""
    for architecture in ("qwen3", "gpt2"):
        config = ModelConfig(architecture=architecture, hidden_size=16, num_layers=1, num_heads=2, max_length=24)
        assert context_size(build_model(config, build_character_tokenizer("ab"), seed=0)) == 24


def test_a_plain_module_states_none() -> None:
    """A module without a configuration has no limit that could be known."""
    assert context_size(nn.Linear(1, 1)) is None


@pytest.mark.parametrize("is_adapted", [False, True])
def test_an_embedding_whose_rows_lie_on_other_ranks_knows_its_number_of_tokens(*, is_adapted: bool) -> None:
    """Where the weight is empty, as between the forward passes of stage 3, with an adapter on it as well."""
    config = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, tie_embeddings=False)
    model = build_model(config, build_character_tokenizer("ab"), seed=0)
    assert isinstance(model, PreTrainedModel)
    size = len(model.get_input_embeddings().weight)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"])) if is_adapted else model
    for parameter in adapted.parameters():
        parameter.data = torch.empty(0)
    assert known_vocabulary_size(adapted) == size > 2


def test_an_embedding_of_another_kind_has_as_many_tokens_as_rows() -> None:
    """A module that is no embedding of torch, and takes tokens all the same, is asked for its weight."""
    model = nn.Module()
    model.get_input_embeddings = lambda: nn.Linear(3, 5)
    assert known_vocabulary_size(model) == 5
