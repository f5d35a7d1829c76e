"""What the laws about whole lives and about building do besides holding."""

from __future__ import annotations

import sys

import pytest

from lightrft.errors import ConfigError
from lightrft.testing.conformance.hold import draw_settings
from lightrft.testing.law import Harness
from lightrft.testing.laws.config.building import _watched
from lightrft.testing.laws.life import LAWS
from lightrft.testing.ranks.here import run_here
from lightrft.testing.subject import subject_of


def test_a_life_has_no_single_example() -> None:
    """Asking for one is a ConfigError that says what to do."""
    subject = subject_of("single", "strategy")
    harness = Harness(
        subject=subject, run=run_here(subject), world_size=1, settings=draw_settings(1), seed=0, example="{}"
    )
    with pytest.raises(ConfigError, match="give the seed"):
        LAWS[0].check(harness)


def test_an_import_is_seen_though_the_module_was_loaded_before() -> None:
    """A watched import is noted and refused, and what was loaded is there again afterwards."""
    before, tried = sys.modules["attrs"], list[str]()
    with _watched(["attrs"], tried), pytest.raises(ModuleNotFoundError):
        __import__("attrs")
    assert tried == ["attrs"]
    assert sys.modules["attrs"] is before
