"""What tests of engines share: programs that can be imported by name, and what closes the engines of a test."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "weight_sync"))
sys.path.insert(2, str(Path(__file__).parents[1] / "backends" / "rollout" / "apart"))

with warnings.catch_warnings(), suppress(ImportError):
    # the one in SGLang's environment is old, and says that its own library is not for this torch
    warnings.simplefilter("ignore")
    import_module("torchvision")


@pytest.fixture
def engines() -> Iterator[ExitStack]:
    """Yield what closes the engines of a test, whatever came of it."""
    with ExitStack() as stack:
        yield stack
