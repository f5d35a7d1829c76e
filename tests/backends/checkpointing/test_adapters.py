"""Adapters of peft in an export of one process: every kind that is exported, and all that is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lightrft.backends.checkpointing.canonical import CheckpointFunctions
from lightrft.errors import CheckpointError, ConfigError, LightRFTError, UnsupportedError

VARIANTS = ["plain", "alpha", "dora", "embedding", "bias", "head", "named task"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def programs() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    yield import_module("export_programs")
    sys.path.remove(folder)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_is_that_of_peft(
    tmp_path: Path, checkpointing: CheckpointFunctions, programs: ModuleType, variant: str, dtype: torch.dtype
) -> None:
    """Transformers loads the bits and the configuration that peft's own merging would have saved."""
    model = programs.adapted_llama(0, variant, tied=False).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpointing.save_model(model, tmp_path / "ours", adapters="merged")
    assert same(model.state_dict(), before)
    merged = model.merge_and_unload()
    checkpointing.save_model(merged, tmp_path / "theirs")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert same(loaded.state_dict(), merged.state_dict())


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 6 LoRA tensor")  # peft takes a bias of LoRA for a part of one
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_alone_are_those_of_peft(
    tmp_path: Path, checkpointing: CheckpointFunctions, programs: ModuleType, variant: str, dtype: torch.dtype
) -> None:
    """Names, values and settings are those that peft saves, and peft loads them onto the base."""
    model = programs.adapted_llama(0, variant, tied=False).to(dtype)
    checkpointing.save_model(model, tmp_path / "ours", adapters="alone")
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    settings = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    for one in settings:
        one["target_modules"].sort()
    assert settings[0] == settings[1]
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert same(*tensors)
    base = programs.llama(0, tied=False, attention_bias=variant == "bias").to(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours", autocast_adapter_dtype=False)
    assert same(loaded.state_dict(), model.state_dict())


def test_one_that_is_merged_already_is_merged_once(
    tmp_path: Path, checkpointing: CheckpointFunctions, programs: ModuleType
) -> None:
    """Where the live weights have the adapter in them already, it is not added again."""
    model = programs.adapted_llama(0)
    model.merge_adapter()
    checkpointing.save_model(model, tmp_path / "out", adapters="merged")
    live = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"], live
    )


def with_two(programs: ModuleType) -> nn.Module:
    model = programs.adapted_llama(0)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    return model


def with_ia3(programs: ModuleType) -> nn.Module:
    settings = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    return get_peft_model(programs.llama(0, tied=True), settings)


def inside(programs: ModuleType) -> nn.Module:
    return nn.Sequential(programs.adapted_llama(0))


def injected(programs: ModuleType) -> nn.Module:
    model = programs.llama(0, tied=True)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


def with_a_tied_head(programs: ModuleType) -> nn.Module:
    return programs.adapted_llama(0, "head", tied=True)


def with_a_tied_embedding(programs: ModuleType) -> nn.Module:
    return programs.adapted_llama(0, "embedding", tied=True)


def with_tokens(programs: ModuleType) -> nn.Module:
    settings = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])
    return get_peft_model(programs.llama(0, tied=False), settings)


def with_pissa(programs: ModuleType) -> nn.Module:
    return get_peft_model(
        programs.llama(0, tied=True), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    )


def that_learns_more(programs: ModuleType) -> nn.Module:
    model = programs.adapted_llama(0)
    model.base_model.model.model.norm.weight.requires_grad_(requires_grad=True)
    return model


def without(programs: ModuleType) -> nn.Module:
    return programs.llama(0, tied=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("make", "adapters", "kind", "reason"),
    [
        (lambda programs: programs.adapted_llama(0), None, ConfigError, "pass adapters='alone' or 'merged'"),
        (lambda programs: programs.adapted_llama(0), "both", ConfigError, "adapters='both' is unknown"),
        (without, "merged", ConfigError, "adapters='merged', and the model has no adapters of peft; leave it out"),
        (with_two, "alone", UnsupportedError, "the model has the adapters default, other; delete all but one"),
        (with_ia3, "merged", UnsupportedError, "'default' is of IA3Config, which is neither exported nor synced"),
        (inside, "merged", UnsupportedError, "the model is a Sequential with adapters inside"),
        (injected, "alone", UnsupportedError, "the model is a LlamaForCausalLM with adapters inside"),
        (with_a_tied_head, "merged", UnsupportedError, r"lm_head\.original_module\.weight and .* are one tensor"),
        (with_a_tied_embedding, "merged", UnsupportedError, r"the adapter changes .*embed_tokens.base_layer\.weight"),
        (with_tokens, "merged", UnsupportedError, r"embed_tokens \(TrainableTokensWrapper\) is no plain linear layer"),
        (with_pissa, "alone", UnsupportedError, "init_lora_weights='pissa' changed the base as well"),
        (that_learns_more, "alone", UnsupportedError, r"model\.norm\.weight learns and is no part of the adapter"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path,
    checkpointing: CheckpointFunctions,
    programs: ModuleType,
    make: Callable[[ModuleType], nn.Module],
    adapters: str,
    kind: type[LightRFTError],
    reason: str,
) -> None:
    """One line says what is wrong and what to do, and nothing is written."""
    with pytest.raises(kind, match=reason):
        checkpointing.save_model(make(programs), tmp_path / "out", adapters=adapters)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_adapters_alone_is_not_loaded_as_a_model(
    tmp_path: Path, checkpointing: CheckpointFunctions, programs: ModuleType
) -> None:
    """`load_model` says what the directory is, and who reads it."""
    model = programs.adapted_llama(0)
    checkpointing.save_model(model, tmp_path / "out", adapters="alone")
    with pytest.raises(CheckpointError, match=r"holds adapters alone; load them with PeftModel\.from_pretrained"):
        checkpointing.load_model(model, tmp_path / "out")


def test_peft_is_not_imported_for_models_without_it(tmp_path: Path) -> None:
    """A process that has not imported peft exports as if it were not installed."""
    program = f"""
import sys
sys.modules["peft"] = None
from torch import nn
from lightrft.strategy import StrategyConfig, get_strategy
strategy = get_strategy(StrategyConfig(strategy="single"))
strategy.setup_distributed()
strategy.save_model(nn.Linear(1, 1), {str(tmp_path / "out")!r})
"""
    subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], check=True, timeout=100
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()
