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
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from lightrft.backends.adapters import (
    adapter_tensors,
    base_model,
    merged_model,
    merged_stream,
    only_adapter,
    parted_stream,
)
from lightrft.backends.training.parameters import named_tensors
from lightrft.config import EngineConfig
from lightrft.errors import ConfigError, UnsupportedError
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


def test_the_parts_are_those_of_peft(programs: ModuleType) -> None:
    """Apart from one another, adapter and base are what peft saves and what it unloads, each once."""
    model: PeftModel = programs.adapted_llama(0)
    saved = get_peft_model_state_dict(model)
    own = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    base = copy.deepcopy(model).unload().state_dict()
    streamed = dict(parted_stream(model, named_tensors(model), with_base=True))
    assert own
    assert same(dict(parted_stream(model, named_tensors(model), with_base=False)), own)
    assert same(adapter_tensors(only_adapter(model)), own)
    assert same({name: streamed.pop(name) for name in own}, own)
    assert same(streamed, base)
    assert same(dict(base_model(only_adapter(model)).state_dict()), base)
    model.merge_adapter()
    for refused in (lambda: base_model(only_adapter(model)), lambda: dict(parted_stream(model, (), with_base=False))):
        with pytest.raises(UnsupportedError, match=r"is merged into .*; call unmerge_adapter\(\) first"):
            refused()


def test_an_engine_that_takes_no_adapter_says_so(programs: ModuleType) -> None:
    """Where an adapter is to be sent apart and the engine does not look at it, nothing is merged quietly."""
    config = EngineConfig(type="hf", adapters="sent")
    with pytest.raises(UnsupportedError, match=r"engine\.adapters='sent' is not for the engine 'hf'"):
        get_strategy({"strategy": "single"}).setup_inference_engine(config, actor=programs.adapted_llama(0))


def with_a_trained_norm(programs: ModuleType) -> nn.Module:
    model: PeftModel = programs.adapted_llama(0)
    model.get_base_model().get_parameter("model.norm.weight").requires_grad_(requires_grad=True)
    return model


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda p: p.llama(0, tied=True), ConfigError, "has nothing to send, .*; use .*'merged', or wrap"),
        (with_a_trained_norm, UnsupportedError, r"model\.norm\.weight is trained outside of the adapter"),
        (lambda p: p.adapted_llama(0, "bias"), UnsupportedError, r"q_proj\.bias and 5 more are trained outside"),
        (lambda p: p.adapted_llama(0, "head", tied=False), UnsupportedError, r"lm_head\.weight is trained outside"),
    ],
    ids=["nothing", "norm", "biases", "head"],
)
def test_what_a_sent_adapter_would_leave_behind_is_refused(
    programs: ModuleType, make: Callable[[ModuleType], nn.Module], error: type[Exception], said: str
) -> None:
    """Nothing is synced whole that was to be sent, and nothing that is trained stays with the trainer unsaid."""
    config = EngineConfig(type="hf", adapters="sent")
    with pytest.raises(error, match=rf"^engine\.adapters='sent'.*{said}") as refused:
        get_strategy({"strategy": "single"}).setup_inference_engine(config, actor=make(programs))
    assert "\n" not in str(refused.value)


def test_a_process_that_takes_no_adapter_is_never_started(
    programs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be is refused before anybody waits for a process."""
    config = EngineConfig(type="hf", process="own", adapters="sent")
    monkeypatch.delattr("subprocess.Popen.__init__")
    with pytest.raises(UnsupportedError, match=r"adapters='sent' is not for the engine 'hf' with engine.process='own'"):
        get_strategy({"strategy": "single"}).setup_inference_engine(config, actor=programs.adapted_llama(0))


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
