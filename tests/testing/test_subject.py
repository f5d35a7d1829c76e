"""What can be held to the laws, and how it is named."""

from __future__ import annotations

import attrs
import pytest
from torch import nn

from lightrft.backends.rollout.scripted import build_scripted
from lightrft.config import EngineConfig, StrategyConfig
from lightrft.errors import ConfigError
from lightrft.strategy.registry import STRATEGIES
from lightrft.testing.cases.models import ModelCase, build_model
from lightrft.testing.subject import find_builder, subject_of

HERE = "lightrft.backends.rollout.scripted:build_scripted"


def test_a_strategy_is_found_by_key_by_name_and_as_a_builder() -> None:
    """The three ways to name a builder lead to the same one."""
    assert find_builder("single", "strategy") is STRATEGIES["single"]
    assert find_builder("lightrft.strategy.registry:_build_single", "strategy") is STRATEGIES["single"]
    assert subject_of(STRATEGIES["single"], "strategy").build is STRATEGIES["single"]


@pytest.mark.parametrize("target", ["scripted", HERE, build_scripted])
def test_an_engine_is_reached_through_a_strategy(target: object) -> None:
    """An engine under test is what `setup_inference_engine` starts, with the settings that were given."""
    subject = subject_of(target, "engine", engine=EngineConfig(batch_size=3))
    assert subject.engine.batch_size == 3
    strategy = subject.build(attrs.evolve(subject.config, strategy=None))
    model: nn.Module = build_model(ModelCase())
    with strategy.setup_inference_engine(subject.engine, actor=model) as engine:
        assert engine.status == "awake"
        assert engine.engine.capabilities == frozenset({"seeds"})


def test_a_builder_has_a_name() -> None:
    """What was passed as a function is called what would import it."""
    assert subject_of(build_scripted, "engine").name == HERE
    assert subject_of("single", "strategy", config=StrategyConfig(seed=1)).config.seed == 1


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("sngle", "did you mean 'single'"),
        ("no_such_module:build", "cannot be imported"),
        ("lightrft.errors:build", "cannot be imported"),
        ("lightrft.strategy.registry:ENGINES", "name a function that builds a strategy"),
    ],
)
def test_what_cannot_be_found_is_one_line(target: str, words: str) -> None:
    """A wrong target says what to write."""
    with pytest.raises(ConfigError, match=words):
        subject_of(target, "strategy")
