"""A model from its configuration and tensors: the same one, or a refusal."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Protocol

import attrs
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lightrft.backends.rollout.apart.recipe import build_from, recipe_of, tensors_for
from lightrft.errors import UnsupportedError


class BuildTinyModel(Protocol):
    def __call__(self, model_type: str, **overrides: object) -> PreTrainedModel: ...


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "qwen3_moe"])
def test_a_model_is_built_again_bit_by_bit(tiny_model: BuildTinyModel, model_type: str, *, tied: bool) -> None:
    """Weights, buffers that no checkpoint has, ties, dtype, and the way attention is computed."""
    model = tiny_model(model_type, tie_word_embeddings=tied).bfloat16()
    recipe = recipe_of(model)
    travelled = attrs.evolve(recipe, settings=json.dumps(json.loads(recipe.settings)))
    tensors = {name: tensor.clone() for name, tensor in tensors_for(model).items()}
    again = build_from(travelled, tensors)
    assert type(again) is type(model)
    assert not again.training
    seen, wanted = tensors_for(again), tensors_for(model)
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted)
    is_one = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert is_one == tied
    assert again.config._attn_implementation == model.config._attn_implementation
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_tensors_that_are_missing_are_zero(programs: ModuleType) -> None:
    """They are written before anything is made of them."""
    model = programs.build_tiny()
    again = build_from(recipe_of(model), {"scale": torch.ones(1)})
    assert {name: tensor.any().item() for name, tensor in tensors_for(again).items()} == {
        name: name == "scale" for name in tensors_for(model)
    }


def test_what_is_no_model_of_transformers_is_refused() -> None:
    """Without pickle, nobody knows how to build it."""
    with pytest.raises(UnsupportedError, match=r"model=Linear is no model of transformers.*engine.process='trainer'"):
        recipe_of(nn.Linear(2, 3))


def test_a_model_that_is_more_than_its_configuration_is_refused(
    tiny_model: BuildTinyModel, programs: ModuleType
) -> None:
    """A module that was put in, another size, a tie that was cut, a class that nobody finds."""
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedError, match=r"is not what its configuration describes: its modules differ \(.*lm_h"):
        recipe_of(model)
    model = programs.build_tiny()
    model.head = nn.Linear(8, 14)
    with pytest.raises(UnsupportedError, match="its tensors differ"):
        recipe_of(model)
    model = tiny_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    with pytest.raises(UnsupportedError, match="its ties differ"):
        recipe_of(model)
    model = programs.build_tiny()
    model.config.note = "of mine"
    with pytest.raises(UnsupportedError, match=r"cannot be built from its configuration \(.*note"):
        recipe_of(model)
