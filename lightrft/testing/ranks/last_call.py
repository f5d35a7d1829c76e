"""The last call of a worker, in a file that outlives it."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from lightrft.strategy.compose import with_wrapped_functions
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.protocols import BuildStrategy
from lightrft.strategy.record import Strategy

__all__ = ["read_last_call", "with_last_call"]

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

_SIZE = 80
"""Bytes of a record, more than the longest name of a function, its state and a time take."""


def with_last_call(build: BuildStrategy, path: str) -> BuildStrategy:
    """Return a builder whose strategies write down every call when it begins and when it ends.

    Args:
        build: any builder.
        path: an empty file; it holds the newest call alone.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT)

    def write(state: str, name: str) -> None:
        os.pwrite(file, f"{state} {name} {time.monotonic()}".ljust(_SIZE).encode("ascii"), 0)

    def wrap(name: str, function: Callable[_Params, _Result], /) -> Callable[_Params, _Result]:
        if name == "teardown":  # comes after every program, and would hide what matters
            return function

        @functools.wraps(function)
        def noted(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
            write("in", name)
            try:
                return function(*args, **kwargs)
            finally:
                write("after", name)

        return noted

    def build_noted(config: StrategyConfig) -> Strategy:
        return with_wrapped_functions(build(config), wrap)

    return build_noted


def read_last_call(path: Path) -> str:
    """Return in words what a worker was doing, such as "is in all_reduce since 2.5 seconds".

    Args:
        path: what `with_last_call` wrote to.
    """
    written = path.read_text("ascii").split() if path.exists() else []
    if not written:
        return "has called no function of a strategy"
    state, name, start = written
    # the clock is the machine's, so that two processes can compare
    seconds = f"{time.monotonic() - float(start):.1f} seconds"
    return f"is in {name} since {seconds}" if state == "in" else f"was last in {name}, which ended {seconds} ago"
