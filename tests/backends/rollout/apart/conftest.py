"""Programs beside the tests, which their processes import by name, and an engine in a process."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def programs() -> ModuleType:
    """The programs; other processes find them on this one's module search path."""
    return importlib.import_module("apart_programs")


@pytest.fixture(scope="session")
def faults(programs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory in which an empty file asks an engine for a fault."""
    directory = tmp_path_factory.mktemp("faults")
    os.environ[programs.FAULTS] = str(directory)
    yield directory
    del os.environ[programs.FAULTS]
