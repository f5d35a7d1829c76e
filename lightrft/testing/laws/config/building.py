"""Building a strategy: no side effect, and nothing that one of two equal ones knows and the other does not."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import ModuleType

import attrs
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lightrft.errors import LawError
from lightrft.strategy.record import Strategy
from lightrft.testing.cases.small_run import (
    SmallRunCase,
    SmallRunEvidence,
    run_difference,
    small_run,
    small_run_cases,
    small_run_config,
)
from lightrft.testing.law import Harness, Law, for_all
from lightrft.testing.subject import Rank

__all__ = ["LAWS"]

_HEAVY = ("deepspeed", "sglang", "transformers", "vllm")
"""Packages behind backends; building imports none that was not chosen."""


@attrs.frozen(kw_only=True)
class SwapCase:
    """A run whose calls go to one of two strategies.

    Attributes:
        run: the run.
        pattern: for each call whether it goes to the second one; it begins anew when it has ended.
    """

    run: SmallRunCase
    pattern: tuple[bool, ...]


@attrs.frozen(kw_only=True)
class BuildCase:
    """A building.

    Attributes:
        run: what settings are for.
        times: how often a strategy is built.
        allowed: packages that the subject may import.
    """

    run: SmallRunCase
    times: int
    allowed: tuple[str, ...] = ()


@attrs.frozen(kw_only=True, eq=False)
class TwoRuns:
    """Two runs of equal configs.

    Attributes:
        alone: every call went to one strategy.
        swapped: calls went now to one and now to the other of two more.
    """

    alone: SmallRunEvidence
    swapped: SmallRunEvidence


def _two_runs(rank: Rank, case: SwapCase) -> TwoRuns:
    config = small_run_config(rank.config, case.run, rank.world_size)
    alone = rank.build(config)

    def pick_alone() -> Strategy:
        return alone

    first = small_run(pick_alone, rank, case.run, rank.directory / "alone")
    alone.teardown()
    both, count = (rank.build(config), rank.build(config)), 0

    def pick_one_of_two() -> Strategy:
        nonlocal count
        count += 1
        return both[case.pattern[count % len(case.pattern)]]

    return TwoRuns(alone=first, swapped=small_run(pick_one_of_two, rank, case.run, rank.directory / "swapped"))


def _swap_cases(world_size: int) -> SearchStrategy[SwapCase]:
    del world_size
    patterns = st.lists(st.booleans(), min_size=3, max_size=7).map(tuple)
    return st.builds(SwapCase, run=small_run_cases(), pattern=patterns)


def _are_interchangeable(harness: Harness, case: SwapCase) -> None:
    for rank, runs in enumerate(harness.run(_two_runs, case)):
        difference = run_difference(runs.swapped, runs.alone)
        if difference is not None:
            raise LawError(
                f"a run that goes from one to the other of two strategies of equal config differs on rank {rank} from "
                f"a run of one strategy: {difference}."
            )


def _effects_of_building(rank: Rank, case: BuildCase) -> list[str]:
    before, environment, tried = _surroundings(), dict(os.environ), list[str]()
    with _watched([name for name in _HEAVY if name not in case.allowed], tried), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about settings is no effect
        try:
            for _ in range(case.times):
                rank.build(small_run_config(rank.config, case.run, rank.world_size))
        except ImportError:
            if not tried:  # it is not about what is watched
                raise
    after = _surroundings()
    # names alone: values may be secrets
    variables = sorted(name for name, _ in environment.items() ^ os.environ.items())
    return [
        *(f"changed {name}" for name in before if before[name] != after[name]),
        *(f"changed the environment variable {name}" for name in dict.fromkeys(variables)),
        *(f"imported {name}, which was not chosen" for name in sorted(set(tried))),
    ]


def _surroundings() -> dict[str, str]:
    """Return what building must leave as it is, in words."""
    numpy = sys.modules.get("numpy")
    return {
        "torch's random stream": str(torch.get_rng_state().tolist()),
        "Python's random stream": str(random.getstate()),
        "numpy's random stream": "" if numpy is None else str(numpy.random.get_state()),
        "torch.is_grad_enabled()": str(torch.is_grad_enabled()),
        "torch.get_default_dtype()": str(torch.get_default_dtype()),
        "torch.get_num_threads()": str(torch.get_num_threads()),
        "torch.are_deterministic_algorithms_enabled()": str(torch.are_deterministic_algorithms_enabled()),
        "the process group": str(_has_process_group()),
        "the CUDA context": str(torch.cuda.is_initialized()),  # type: ignore[no-untyped-call]
        "the working directory": os.getcwd(),  # noqa: PTH109 (as the process has it)
    }


def _has_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _watched(names: Sequence[str], tried: list[str]) -> Generator[None]:
    """Note and refuse every import of the packages, also of those that were imported before."""
    hidden: dict[str, ModuleType] = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    finder = _Finder(names, tried)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(hidden)


class _Finder:
    """What Python asks first for a module: it refuses some and knows nothing of the others."""

    def __init__(self, names: Sequence[str], tried: list[str]) -> None:
        self._names = names
        self._tried = tried

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        del path, target
        if name in self._names:
            self._tried.append(name)
            raise ModuleNotFoundError(f"{name} is not imported while it is watched", name=name)


def _build_cases(world_size: int) -> SearchStrategy[BuildCase]:
    del world_size
    return st.builds(BuildCase, run=small_run_cases(), times=st.integers(1, 2))


def _has_no_effect(harness: Harness, case: BuildCase) -> None:
    # the name says which backend was chosen
    allowed = tuple(name for name in _HEAVY if name in harness.subject.name)
    for rank, effects in enumerate(harness.run(_effects_of_building, attrs.evolve(case, allowed=allowed))):
        if effects:
            raise LawError(f"building on rank {rank} {'; '.join(effects)}.")


LAWS: tuple[Law, ...] = (
    Law(
        id="config.building",
        statement="Building has no side effect: streams, switches, environment and process groups stay as they are, "
        "and no backend is imported that was not chosen.",
        check=for_all(_build_cases, _has_no_effect),
    ),
    Law(
        id="config.interchangeable",
        statement="Two strategies of equal configs can be swapped between any two calls of a run; no bit changes.",
        check=for_all(_swap_cases, _are_interchangeable),
    ),
)
"""Laws of the section "config" about building."""
