"""Small policies as plain data, and the engine that is held to its laws, running one of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Literal

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from lightrft.config import EngineConfig, ModelConfig
from lightrft.models.build import build_model as build_transformers_model
from lightrft.models.tokenizer import build_character_tokenizer
from lightrft.strategy.protocols import Completion, EngineHandle, Processor, Prompt, SamplingParams
from lightrft.testing.cases.models import ModelCase, build_model
from lightrft.testing.subject import Rank

__all__ = ["CONTEXT", "VOCABULARY", "PolicyCase", "build_policy", "generate", "policy_cases", "policy_for", "running"]

VOCABULARY = 13
"""Token ids of every policy here: few, so that statistics are cheap, and prime, so that no shape fits by luck."""

CONTEXT = 24
"""Tokens that a policy of transformers can take."""

_ALPHABET = "0123456789+"  # with the two special tokens of the tokenizer it makes the vocabulary


@attrs.frozen(kw_only=True)
class PolicyCase:
    """A small causal language model.

    Attributes:
        architecture: "qwen3" of transformers, which every engine for language models takes, or "small", the model
            without attention of `lightrft.testing.cases.models`, which needs no package.
        num_layers: layers of a model of transformers.
        tied: whether the head's weight is the embedding's.
        seed: of the weights.
    """

    architecture: Literal["qwen3", "small"] = "qwen3"
    num_layers: int = 1
    tied: bool = False
    seed: int = 0


def policy_cases(*, max_layers: int = 2) -> SearchStrategy[PolicyCase]:
    """Return a strategy for policies of transformers, tied and untied.

    Args:
        max_layers: bound on the layers.
    """
    return st.builds(
        PolicyCase,
        architecture=st.just("qwen3"),
        num_layers=st.integers(1, max_layers),
        tied=st.booleans(),
        seed=st.integers(0, 2**31 - 1),
    )


def policy_for(engine: EngineConfig, case: PolicyCase) -> PolicyCase:
    """Return the policy in the architecture for an engine.

    Args:
        engine: "scripted" runs any model, so that a strategy can be tested where transformers is not installed.
        case: the policy.
    """
    return attrs.evolve(case, architecture="small") if engine.type == "scripted" else case


def build_policy(case: PolicyCase) -> nn.Module:
    """Return the model of a case, in evaluation mode; equal cases give equal bits.

    Args:
        case: what to build.

    Raises:
        MissingPackageError: transformers is not installed, and the architecture is its.
    """
    if case.architecture == "small":
        return build_model(ModelCase(vocabulary=VOCABULARY, tied=case.tied, seed=case.seed)).eval()
    config = ModelConfig(
        architecture=case.architecture,
        hidden_size=64,  # heads of 32, the smallest that vLLM's attention takes on a CPU
        intermediate_size=16,
        num_layers=case.num_layers,
        num_heads=2,
        num_key_value_heads=1,
        max_length=CONTEXT,
        tie_embeddings=case.tied,
        # the logits' standard deviation is about 2 then: neither flat nor certain, and every position matters
        initializer_range=0.25,
    )
    return build_transformers_model(config, build_character_tokenizer(_ALPHABET), seed=case.seed)


@contextmanager
def running(
    rank: Rank, actor: nn.Module, *, batch_size: int | None = None, processor: Processor | None = None
) -> Generator[EngineHandle]:
    """Yield the engine that is held to its laws, started from a model, and close it.

    Args:
        rank: where it runs.
        actor: the plain model.
        batch_size: sequences that the engine decodes at once; None leaves it as configured.
        processor: the model's, if it takes images.
    """
    strategy = rank.build(rank.config)
    strategy.setup_distributed()
    config = rank.engine if batch_size is None else attrs.evolve(rank.engine, batch_size=batch_size)
    with strategy.setup_inference_engine(config, actor=actor, processor=processor) as handle:
        yield handle


def generate(handle: EngineHandle, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Completion]:
    """Return what an engine makes of prompts without images.

    Args:
        handle: an engine that is awake.
        prompts: token ids of each prompt.
        sampling: how tokens are drawn.
    """
    with torch.no_grad():
        return handle.engine.generate(handle, [Prompt(token_ids=tuple(prompt)) for prompt in prompts], sampling)
