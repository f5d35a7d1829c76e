"""What `lightrft doctor` tries out: each check returns what it found, or raises."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import attrs
import torch

from lightrft.cli.engine_life import STEPS, live
from lightrft.cli.trial import take_step, tiny_actor, tiny_loss, tiny_strategy
from lightrft.config import EngineConfig
from lightrft.errors import MissingPackageError
from lightrft.strategy.registry import registered_engines, registered_strategies

__all__ = ["CHECKS", "Check", "Look"]

_REQUIRED = ("attrs", "cattrs", "typing-extensions", "safetensors", "rich")
_OPTIONAL = ("transformers", "tokenizers", "reasoning-gym")


class Look(Protocol):
    """Tries something out."""

    def __call__(self) -> str:
        """Return what was found.

        Raises:
            MissingPackageError: something optional is not installed.
            Exception: it does not work.
        """
        ...


@attrs.frozen(kw_only=True, eq=False)
class Check:
    """One line of the table.

    Attributes:
        name: what is checked.
        look: tries it out.
    """

    name: str
    look: Look


def _package(name: str, *, is_required: bool) -> Check:
    def look() -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            if is_required:
                raise
            raise MissingPackageError(f"{name} is not installed; run: pip install 'lightrft[hf,tasks]'.") from error

    return Check(name=name, look=look)


def _python() -> str:
    return f"{platform.python_version()} ({sys.executable})"


def _torch() -> str:
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _devices() -> str:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(["cpu", *names])


def _registries() -> str:
    return f"{', '.join(registered_strategies())}; engines: {', '.join(registered_engines())}"


def _collective() -> str:
    strategy = tiny_strategy()
    world = strategy.setup_distributed()
    try:
        total = strategy.all_reduce(torch.ones(3, device=world.device), "sum").sum().item()
    finally:
        strategy.teardown()
    if total != 3 * world.world_size:
        raise RuntimeError(f"the sum of {world.world_size} * 3 ones is {total}")
    return f"all_reduce among {world.world_size} on {world.device}"


def _training() -> str:
    strategy = tiny_strategy()
    strategy.setup_distributed()
    try:
        actor, _ = tiny_actor(strategy)
        before = tiny_loss(actor).item()
        take_step(strategy, actor)
        after = tiny_loss(actor).item()
    finally:
        strategy.teardown()
    if not after < before:
        raise RuntimeError(f"the loss went from {before:.4f} to {after:.4f} in one step")
    return f"one step: loss {before:.4f} to {after:.4f}"


def _checkpoint() -> str:
    strategy = tiny_strategy()
    strategy.setup_distributed()
    try:
        actor, _ = tiny_actor(strategy)
        take_step(strategy, actor)
        before = tiny_loss(actor).item()
        with tempfile.TemporaryDirectory() as directory:
            path = strategy.save_ckpt({"actor": actor}, directory)
            num_bytes = sum(file.stat().st_size for file in Path(path).iterdir())
            take_step(strategy, actor)
            strategy.load_ckpt({"actor": actor}, directory)
        after = tiny_loss(actor).item()
    finally:
        strategy.teardown()
    if after != before:
        raise RuntimeError(f"the loss is {after!r} after loading and was {before!r}")
    return f"saved and restored {num_bytes:,} bytes in {tempfile.gettempdir()}, bit for bit"


def _engine() -> str:
    return f"hf: {dict(zip(STEPS, live(EngineConfig(type='hf')), strict=True))['verify']}"


CHECKS: tuple[Check, ...] = (
    Check(name="python", look=_python),
    Check(name="torch", look=_torch),
    *(_package(name, is_required=True) for name in _REQUIRED),
    *(_package(name, is_required=False) for name in _OPTIONAL),
    Check(name="devices", look=_devices),
    Check(name="strategies", look=_registries),
    Check(name="collective", look=_collective),
    Check(name="training", look=_training),
    Check(name="checkpoint", look=_checkpoint),
    Check(name="engine", look=_engine),
)
"""In the order in which they are tried: what fails early explains what fails later."""
