"""What an import loads, looked up in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["transformers", "deepspeed", "vllm", "sglang", "torch.distributed.fsdp", "torch.distributed.checkpoint"]


def loaded_by(program: str, names: list[str]) -> set[str]:
    """Return which of the modules are loaded after the program ran in a fresh process."""
    report = f"import sys\n{program}\nprint(*(name for name in {names!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], check=True, capture_output=True, text=True)  # noqa: S603
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["lightrft", "lightrft.strategy", "lightrft.strategy.compose"])
def test_imports_load_neither_torch_nor_a_backend(module: str) -> None:
    """Importing the package or what users import first loads neither torch nor anything heavier, and no backend."""
    names = ["torch", "numpy", "lightrft.backends", "lightrft.data", *HEAVY]
    assert loaded_by(f"import {module}", names) == set()


def test_building_single_loads_no_other_backend() -> None:
    """Building "single" loads torch and leaves transformers, other trainers and engines alone."""
    program = "from lightrft.strategy import get_strategy\nget_strategy({'strategy': 'single'})"
    assert loaded_by(program, ["torch", *HEAVY, "torch._dynamo"]) == {"torch"}
