"""What `lightrft doctor` tries out: each check returns what it found, or raises."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import attrs
import torch

from lightrft.config import EngineConfig, ModelConfig, StrategyConfig
from lightrft.errors import MissingPackageError
from lightrft.models.build import build_model_and_tokenizer
from lightrft.strategy import get_strategy
from lightrft.strategy.protocols.rollout import Prompt, SamplingParams
from lightrft.strategy.registry import registered_engines, registered_strategies

if TYPE_CHECKING:
    from lightrft.models.tokenizer import ModelTokenizer
    from lightrft.strategy.protocols.training import Trainable
    from lightrft.strategy.record import Strategy

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


def _strategy() -> Strategy:
    return get_strategy(StrategyConfig(strategy="single", seed=0, actor_learning_rate=1e-2))


def _model(strategy: Strategy) -> tuple[Trainable, ModelTokenizer]:
    config = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, max_length=32, alphabet="0123456789+")
    model, tokenizer = build_model_and_tokenizer(config, seed=0)
    actor, _, _, _ = strategy.prepare_models_and_optimizers(model, None, None, None, None, 2)
    return actor, tokenizer


def _loss(actor: Trainable) -> torch.Tensor:
    device = next(actor.model.parameters()).device
    ids = torch.arange(2, 10, device=device)[None]
    output: torch.Tensor = actor.model(input_ids=ids, labels=ids).loss
    return output


def _step(strategy: Strategy, actor: Trainable) -> None:
    strategy.backward(_loss(actor), actor.model, actor.optimizer)
    result = strategy.optimizer_step(actor.optimizer, actor.model, actor.scheduler)
    if not result.stepped:
        raise RuntimeError(f"the optimizer did not step ({result.skipped_reason})")


def _collective() -> str:
    strategy = _strategy()
    world = strategy.setup_distributed()
    try:
        total = strategy.all_reduce(torch.ones(3, device=world.device), "sum").sum().item()
    finally:
        strategy.teardown()
    if total != 3 * world.world_size:
        raise RuntimeError(f"the sum of {world.world_size} * 3 ones is {total}")
    return f"all_reduce among {world.world_size} on {world.device}"


def _training() -> str:
    strategy = _strategy()
    strategy.setup_distributed()
    try:
        actor, _ = _model(strategy)
        before = _loss(actor).item()
        _step(strategy, actor)
        after = _loss(actor).item()
    finally:
        strategy.teardown()
    if not after < before:
        raise RuntimeError(f"the loss went from {before:.4f} to {after:.4f} in one step")
    return f"one step: loss {before:.4f} to {after:.4f}"


def _checkpoint() -> str:
    strategy = _strategy()
    strategy.setup_distributed()
    try:
        actor, _ = _model(strategy)
        _step(strategy, actor)
        before = _loss(actor).item()
        with tempfile.TemporaryDirectory() as directory:
            path = strategy.save_ckpt({"actor": actor}, directory)
            num_bytes = sum(file.stat().st_size for file in Path(path).iterdir())
            _step(strategy, actor)
            strategy.load_ckpt({"actor": actor}, directory)
        after = _loss(actor).item()
    finally:
        strategy.teardown()
    if after != before:
        raise RuntimeError(f"the loss is {after!r} after loading and was {before!r}")
    return f"saved and restored {num_bytes:,} bytes in {tempfile.gettempdir()}, bit for bit"


def _engine() -> str:
    strategy = _strategy()
    strategy.setup_distributed()
    try:
        actor, tokenizer = _model(strategy)
        prompts = [Prompt(token_ids=tuple(tokenizer.encode("1+1", add_special_tokens=False)))]
        sampling = SamplingParams(temperature=0.0, max_new_tokens=4)
        with strategy.setup_inference_engine(EngineConfig(type="hf"), actor=actor.model, tokenizer=tokenizer) as engine:
            _step(strategy, actor)
            report = strategy.update_engine_weights(engine, actor.model)
            first = strategy.gather_and_generate(engine, prompts, sampling)
            engine.engine.sleep(engine)
            engine.engine.wake(engine)
            second = strategy.gather_and_generate(engine, prompts, sampling)
    finally:
        strategy.teardown()
    if first != second:
        raise RuntimeError(f"{first!r} before sleeping and {second!r} after waking")
    return (
        f"hf: {report.num_tensors} tensors synced, logprobs within {report.max_logprob_difference:.1g} of the trainer's"
    )


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
