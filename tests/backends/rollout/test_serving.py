"""The rollout part of a strategy: which engine is started with what, and which sync is believed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lightrft.backends.collectives.single import build_collectives
from lightrft.backends.rollout.scripted import build_scripted
from lightrft.backends.rollout.serving import RolloutFunctions, build_rollout
from lightrft.config.sections import EngineConfig
from lightrft.errors import WeightSyncError
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols.rollout import BuildEngine, Prompt, SamplingParams


def tiny_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32))


def serve(config: StrategyConfig, *, scale: float = 1.0, asked: list[str] | None = None) -> RolloutFunctions:
    """Rollout functions whose stream of weights scales the head, and that write down the engines asked for."""

    def find_engine(key: str, /) -> BuildEngine:
        if asked is not None:
            asked.append(key)
        return build_scripted

    def unwrap_model(model: nn.Module) -> nn.Module:
        return getattr(model, "inner", model)

    def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model.state_dict().items():
            yield name, tensor * (scale if name == "1.weight" else 1.0)

    return build_rollout(
        config,
        build_collectives(config),
        find_engine=find_engine,
        named_tensors=named_tensors,
        unwrap_model=unwrap_model,
    )


def test_the_engine_is_the_configs_unless_one_is_passed() -> None:
    """Without an engine config the strategy's engine_type decides; with one, its type does."""
    asked: list[str] = []
    rollout = serve(StrategyConfig(engine_type="hf"), asked=asked)
    rollout.setup_inference_engine(actor=tiny_model())
    rollout.setup_inference_engine(EngineConfig(type="scripted"), actor=tiny_model())
    assert asked == ["hf", "scripted"]


def test_the_engine_gets_the_plain_model_and_the_tokenizer() -> None:
    """What `prepare` wrapped is unwrapped, and a script is read by the tokenizer that was passed."""
    wrapped = nn.Module()
    wrapped.inner = tiny_model()
    rollout = serve(StrategyConfig())
    engine = rollout.setup_inference_engine(
        EngineConfig(type="scripted", script=("ba",)), actor=wrapped, tokenizer=build_character_tokenizer("ab")
    )
    (completion,) = rollout.gather_and_generate(engine, [Prompt(token_ids=(3,))], SamplingParams())
    assert completion.token_ids == tuple(build_character_tokenizer("ab").encode("ba", add_special_tokens=False))


def test_a_sync_reports_what_it_moved() -> None:
    """The report has the version, the number of tensors and their bytes."""
    rollout, model = serve(StrategyConfig()), tiny_model()
    engine = rollout.setup_inference_engine(EngineConfig(type="scripted"), actor=model)
    report = rollout.update_engine_weights(engine, model)
    assert (report.weight_version, report.num_tensors) == (1, 3)
    assert report.num_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_the_bound_is_that_of_the_dtype_of_the_computation() -> None:
    """A difference that bfloat16 may show is believed where the strategy computes in it, and refused in float32."""
    exact, rounded = serve(StrategyConfig(), scale=1.01), serve(StrategyConfig(bf16=True), scale=1.01)
    model = tiny_model()
    engine = exact.setup_inference_engine(EngineConfig(type="scripted"), actor=model)
    assert 2e-3 < rounded.update_engine_weights(engine, model).max_logprob_difference < 0.1
    with pytest.raises(WeightSyncError, match=r"weight_version=2 does not hold .* \(bound 1\.[0-9]+e-05\); sync again"):
        exact.update_engine_weights(engine, model)
    assert engine.status == "torn"


def test_a_probe_that_fails_leaves_the_engine_torn() -> None:
    """Weights that nobody could verify don't generate."""
    rollout, model = serve(StrategyConfig()), tiny_model()
    engine = rollout.setup_inference_engine(EngineConfig(type="scripted"), actor=model)

    def broken(module: nn.Module, args: object) -> None:
        del module, args
        raise OSError("gone")

    model.register_forward_pre_hook(broken)
    with pytest.raises(OSError, match="gone"):
        rollout.update_engine_weights(engine, model)
    assert engine.status == "torn"
