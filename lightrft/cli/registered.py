"""`lightrft strategies` and `lightrft engines`: what can be chosen, and whether it is installed."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import attrs

from lightrft.cli.command import Command
from lightrft.cli.failures import EXIT_OK
from lightrft.cli.terminal import say, table
from lightrft.strategy.entry_points import ENGINE_GROUP, STRATEGY_GROUP, read_entry_points
from lightrft.strategy.registry import ENGINES, STRATEGIES

__all__ = ["ENGINES_COMMAND", "STRATEGIES_COMMAND", "rows_of"]


@attrs.frozen(kw_only=True)
class _About:
    """What is known of a backend of ours.

    Attributes:
        text: what it is, in a line.
        package: what it needs besides the core; None for nothing.
        extra: the extra of lightrft that installs it.
    """

    text: str
    package: str | None = None
    extra: str | None = None


_STRATEGIES = MappingProxyType(
    {
        "single": _About(text="one process on one device"),
        "fake": _About(text="for tests of a loop: trains as single does; get_fake_strategy records the calls"),
        "fsdp2": _About(text="any number of processes; parameters, gradients and optimizer state sharded by torch"),
        "deepspeed": _About(
            text="any number of processes; DeepSpeed ZeRO, stages 0 to 3", package="deepspeed", extra="deepspeed"
        ),
    }
)
_ENGINES = MappingProxyType(
    {
        "hf": _About(text="batched decoding of transformers models", package="transformers", extra="hf"),
        "vllm": _About(text="vLLM in this process, on a CPU", package="vllm", extra="vllm"),
        "sglang": _About(text="SGLang in this process, on a CPU", package="sglang"),
        "scripted": _About(text="prepared completions, for tests of a loop"),
    }
)


def rows_of(group: str, own: Mapping[str, object], about: Mapping[str, _About]) -> list[tuple[str, str, str]]:
    """Return (key, whether it is installed, what it is) of everything registered; nothing is imported.

    Args:
        group: entry-point group of other packages' builders.
        own: our own registry.
        about: what is known of our own.

    Raises:
        ConfigError: two packages registered one name.
    """
    ours = [(key, _installed(about.get(key)), about[key].text if key in about else "") for key in own]
    points = read_entry_points(group, own)
    others = [
        (name, "yes", f"{point.value}, of the package {point.dist.name if point.dist else 'unknown'}")
        for name, point in sorted(points.items())
    ]
    return ours + others


def _installed(about: _About | None) -> str:
    if about is None or about.package is None or importlib.util.find_spec(about.package) is not None:
        return "yes"
    return f"no: pip install 'lightrft[{about.extra}]'"


def _show(group: str, own: Mapping[str, object], about: Mapping[str, _About]) -> int:
    say(*table(("key", "installed", "what it is"), rows_of(group, own, about)))
    return EXIT_OK


def _add_no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def _run_strategies(args: argparse.Namespace, words: Sequence[str]) -> int:
    del args, words
    return _show(STRATEGY_GROUP, STRATEGIES, _STRATEGIES)


def _run_engines(args: argparse.Namespace, words: Sequence[str]) -> int:
    del args, words
    return _show(ENGINE_GROUP, ENGINES, _ENGINES)


STRATEGIES_COMMAND = Command(
    name="strategies",
    words="",
    summary="list the strategies that are registered",
    add_arguments=_add_no_arguments,
    run=_run_strategies,
)
"""`lightrft strategies`."""

ENGINES_COMMAND = Command(
    name="engines",
    words="",
    summary="list the rollout engines that are registered",
    add_arguments=_add_no_arguments,
    run=_run_engines,
)
"""`lightrft engines`."""
