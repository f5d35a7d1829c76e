"""A model with an adapter of peft reaches an engine as the base that computes what both compute."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from lightrft.backends.adapters import merged_model, merged_stream
from lightrft.backends.training.parameters import named_tensors
from lightrft.errors import UnsupportedError
from lightrft.strategy import get_strategy

VARIANTS = ["plain", "alpha", "dora", "embedding", "bias", "head", "named task"]


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[1] / "backends" / "checkpointing")
    sys.path.insert(0, folder)
    yield import_module("export_programs")
    sys.path.remove(folder)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stream_is_what_peft_merges(programs: ModuleType, variant: str) -> None:
    """Names, order and bits are those of peft's own merging, for every kind, and the trainer is only read."""
    model: PeftModel = programs.adapted_llama(0, variant, tied=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    streamed = dict(merged_stream(model, named_tensors(model)))
    started = merged_model(model)
    assert same(dict(model.state_dict()), before)
    assert type(started) is type(model.get_base_model())
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert same(streamed, merged)
    assert same(dict(started.state_dict()), merged)


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
def test_one_that_is_merged_already_is_merged_once(programs: ModuleType) -> None:
    """Where the live weights have the adapter in them already, it is not added again."""
    model: PeftModel = programs.adapted_llama(0)
    wanted = copy.deepcopy(model).merge_and_unload().state_dict()
    model.merge_adapter()
    assert same(dict(merged_stream(model, named_tensors(model))), wanted)
    assert same(dict(merged_model(model).state_dict()), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_engine_follows_the_adapter(programs: ModuleType, variant: str) -> None:
    """Started from one adapted model and synced from another, an engine has the other's logprobs."""
    strategy = get_strategy({"strategy": "single"})
    with strategy.setup_inference_engine(actor=programs.adapted_llama(0, variant, tied=False)) as engine:
        other: PeftModel = programs.adapted_llama(1, variant, tied=False)
        report = strategy.update_engine_weights(engine, other)
        assert report.max_logprob_difference < 1e-5
        assert report.num_tensors == len(other.get_base_model().state_dict()) - _num_extra(other)


def _num_extra(model: nn.Module) -> int:
    """Return how many tensors peft has added to the base."""
    added = ("lora_", "original_module")
    return sum(any(word in name for word in added) for name in model.state_dict())


def with_two(programs: ModuleType) -> nn.Module:
    model: PeftModel = programs.adapted_llama(0)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    return model


def with_ia3(programs: ModuleType) -> nn.Module:
    settings = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    return get_peft_model(programs.llama(0, tied=True), settings)


def injected(programs: ModuleType) -> nn.Module:
    model = programs.llama(0, tied=True)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


def with_a_tied_embedding(programs: ModuleType) -> nn.Module:
    return programs.adapted_llama(0, "embedding", tied=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_two, "the model has the adapters default, other; delete all but one"),
        (with_ia3, "'default' is of IA3Config, which is neither exported nor synced"),
        (injected, "the model is a LlamaForCausalLM with adapters inside"),
        (with_a_tied_embedding, r"are one tensor, and the adapter changes .*embed_tokens.base_layer\.weight; untie"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    programs: ModuleType, make: Callable[[ModuleType], nn.Module], reason: str
) -> None:
    """An engine is not started with less than the model computes, and a sync does not send it."""
    strategy, model = get_strategy({"strategy": "single"}), make(programs)
    with pytest.raises(UnsupportedError, match=reason):
        strategy.setup_inference_engine(actor=model)
    with strategy.setup_inference_engine(actor=programs.llama(0, tied=True)) as engine:
        with pytest.raises(UnsupportedError, match=reason):
            strategy.update_engine_weights(engine, model)
        assert engine.status == "torn"
