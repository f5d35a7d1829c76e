"""What the tests of engines that are guests of this process share: the one that is installed, and models for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import pytest
import torch
from torch import nn

from lightrft.backends.rollout.sglang.package import require_sglang
from lightrft.backends.rollout.vllm.package import require_vllm
from lightrft.config import EngineConfig, ModelConfig
from lightrft.errors import MissingPackageError
from lightrft.models.build import build_model
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy import Completion, EngineHandle, Prompt, SamplingParams, StrategyConfig, get_strategy

__all__ = [
    "GREEDY",
    "HOT",
    "PROMPTS",
    "caches_of",
    "generate",
    "inside_of",
    "installed",
    "loading",
    "logprob_difference",
    "policy",
    "settings",
    "start",
    "without",
]

PROMPTS = ((1, 2, 3), (4,), tuple(range(13)))
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=4)
HOT = SamplingParams(temperature=1.7, max_new_tokens=6, n=3, seed=5)

_REQUIRE: dict[str, Callable[[], None]] = {"vllm": require_vllm, "sglang": require_sglang}


def installed(*names: str) -> str:
    """Return which of these engines is installed in this environment, and skip the module where none is."""
    for name in names:
        try:
            _REQUIRE[name]()
        except MissingPackageError:
            continue
        return name
    pytest.skip(f"none of {', '.join(names)} is installed", allow_module_level=True)


def settings(name: str, *, cache_gb: float = 0.01) -> EngineConfig:
    return EngineConfig(type=name, cache_gb=cache_gb, batch_size=64)


def policy(*, tied: bool = False, seed: int = 0, length: int = 32, hidden_size: int = 64) -> nn.Module:
    """Return a small Qwen3 whose logits have an opinion."""
    config = ModelConfig(
        architecture="qwen3",
        hidden_size=hidden_size,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_key_value_heads=1,
        max_length=length,
        tie_embeddings=tied,
        initializer_range=0.25,
    )
    return build_model(config, build_character_tokenizer("0123456789+"), seed=seed)


def start(engines: ExitStack, model: nn.Module, config: EngineConfig) -> EngineHandle:
    strategy = get_strategy(StrategyConfig(strategy="single"))
    return engines.enter_context(strategy.setup_inference_engine(config, actor=model))


def generate(
    handle: EngineHandle, sampling: SamplingParams, prompts: Sequence[tuple[int, ...]] = PROMPTS
) -> list[Completion]:
    return handle.engine.generate(handle, [Prompt(token_ids=prompt) for prompt in prompts], sampling)


def logprob_difference(made: Sequence[Completion], model: nn.Module, *, temperature: float) -> float:
    """Return the largest distance of a logprob from that of the model's own forward, one sequence at a time."""
    differences = [0.0]
    for completion in made:
        ids = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(completion.prompt_ids) - 1 : -1] / temperature
        own = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        differences.append((own - torch.tensor(completion.logprobs)).abs().max().item())
    return max(differences)


def inside_of(handle: EngineHandle) -> Any:
    """Return the engine's inside."""
    return cast("Any", handle.state).inside


def caches_of(handle: EngineHandle) -> list[torch.Tensor]:
    """Return the tensors of the key-value cache."""
    inside = inside_of(handle)
    if hasattr(inside, "runner"):
        return [*inside.runner.kv_caches]
    pool = inside.scheduler.tp_worker.model_runner.token_to_kv_pool
    return [*pool.k_buffer, *pool.v_buffer]


Tensors = Iterable[tuple[str, torch.Tensor]]
Change = Callable[[str, torch.Tensor], torch.Tensor | None]


def without(part: str) -> Change:
    """Return a change that leaves out tensors with a part of a name."""

    def leave_out(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return None if part in name else tensor

    return leave_out


@contextmanager
def loading(handle: EngineHandle, change: Change) -> Iterator[None]:
    """Let the engine's model be given other tensors than were sent, or None instead of one."""
    model = inside_of(handle).model
    load = model.load_weights

    def load_changed(tensors: Tensors) -> object:
        changed = ((name, change(name, tensor)) for name, tensor in tensors)
        return load((name, tensor) for name, tensor in changed if tensor is not None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load_weights", load_changed)
        yield
