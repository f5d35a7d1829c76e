"""Problems from reasoning-gym's tasks, scored by the tasks' own verifiers."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import typing
from collections.abc import Mapping
from typing import Protocol, cast

import attrs

from lightrft.data.prompts import Problem, ProblemSet, ScoreAnswer, render
from lightrft.errors import ConfigError, DataError, MissingPackageError, nearest
from lightrft.strategy.protocols.checkpointing import Json

__all__ = ["load_task"]

_DRAWS_PER_PROBLEM = 16
"""Draws for each problem that is wanted. Where d equally likely questions exist, all of them take about d * ln(d)
draws, so that this finds every question of a task that has up to exp(16), about nine million."""

_SPARE_DRAWS = 1000
"""Draws besides those, for small numbers of problems of a task that repeats itself often."""

_SEED_STRIDE = 1_000_003
"""reasoning-gym draws problem i of seed s from the stream s + i, so that neighbouring seeds share nearly all problems.
A prime larger than any data set here keeps them apart."""

_SCALARS: Mapping[object, type] = {kind: kind for kind in (bool, int, float, str)}
"""Annotations that a value is held to; what is annotated otherwise is left to the task."""

_OURS: Mapping[str, str] = {"seed": "data.seed", "size": "data.train_size and data.heldout_size"}
"""Settings of every task that are ours to set, and from what."""


class _Dataset(Protocol):
    """What is used of a reasoning-gym dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, object]: ...
    def score_answer(self, answer: str, entry: dict[str, object]) -> float: ...


class _MakeConfig(Protocol):
    """A task's config class."""

    def __call__(self, **options: object) -> object: ...


class _MakeDataset(Protocol):
    """A task's dataset class."""

    def __call__(self, config: object) -> _Dataset: ...


@attrs.frozen(kw_only=True, eq=False)
class _Task:
    """A task by its two constructors."""

    dataset: _MakeDataset
    config: _MakeConfig


def load_task(
    name: str, *, options: Mapping[str, object], size: int, seed: int, template: str = "{question}"
) -> ProblemSet:
    """Return `size` problems of a reasoning-gym task, no two with the same question, and the task's verifier.

    The problems are a function of the arguments. Questions that differ in case alone count as the same one, so that no
    held-out question is a training question in capitals.

    Args:
        name: of the task, such as "chain_sum".
        options: the task's own settings, by reasoning-gym's names.
        size: number of problems, at least 1.
        seed: seed of the problems.
        template: how a question becomes a prompt.

    Raises:
        ConfigError: an unknown task, or options that it refuses.
        DataError: the task does not make that many different questions.
        MissingPackageError: reasoning-gym is not installed.

    Example:
        >>> sums = load_task("chain_sum", options={"max_terms": 2}, size=3, seed=0)
        >>> [sums.score(problem.question, problem.answer, problem.answer) for problem in sums.problems]
        [1.0, 1.0, 1.0]
    """
    if size < 1:
        raise ConfigError(f"size={size!r} is too small for task={name!r}; use 1 or more.")
    task = _find(name)
    dataset = _build(task, name, options, size=size * _DRAWS_PER_PROBLEM + _SPARE_DRAWS, seed=seed * _SEED_STRIDE)
    entries = _draw_distinct(dataset, name, size)
    by_prompt = {render(template, cast("str", entry["question"])): entry for entry in entries}
    problems = tuple(_problem(prompt, entry) for prompt, entry in by_prompt.items())
    return ProblemSet(name=name, problems=problems, score=_verifier(name, dataset, by_prompt))


def _verifier(name: str, dataset: _Dataset, by_prompt: Mapping[str, dict[str, object]]) -> ScoreAnswer:
    """Return the task's verifier; it finds what it needs to know about a problem by the prompt."""

    def verifier(prompt: str, completion: str, answer: str) -> float:
        del answer  # the entry has it
        if prompt not in by_prompt:
            raise DataError(f"prompt={prompt!r} is not one of the problems of task={name!r}; score those alone.")
        return dataset.score_answer(answer=completion, entry=by_prompt[prompt])

    return verifier


def _find(name: str) -> _Task:
    try:
        importlib.import_module("reasoning_gym")
        factory = importlib.import_module("reasoning_gym.factory")
    except ImportError as error:
        raise MissingPackageError(
            f"task={name!r} needs reasoning-gym, which cannot be imported ({error}); "
            "run: pip install 'lightrft[tasks]'."
        ) from error
    known = cast("Mapping[str, tuple[_MakeDataset, _MakeConfig]]", factory.DATASETS)
    if name not in known:
        # More than a hundred exist: a few near ones help more than all of them.
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or sorted(known)
        raise ConfigError(f"task={name!r} is not known; near ones: {', '.join(close)}.")
    dataset, config = known[name]
    return _Task(dataset=dataset, config=config)


def _build(task: _Task, name: str, options: Mapping[str, object], *, size: int, seed: int) -> _Dataset:
    _check_options(task, name, options)
    try:
        config = task.config(**options, seed=seed, size=size)
        validate = cast("typing.Callable[[], None] | None", getattr(config, "validate", None))
        if validate is not None:
            validate()
        return task.dataset(config=config)
    except Exception as error:  # each task refuses options in its own way, mostly by assertions
        said = str(error) or type(error).__name__
        raise ConfigError(f"task_options={dict(options)!r} do not suit task={name!r} ({said}); change them.") from error


def _check_options(task: _Task, name: str, options: Mapping[str, object]) -> None:
    known = [option for option in inspect.signature(task.config).parameters if option not in _OURS]
    hints = typing.get_type_hints(task.config)
    for option, value in options.items():
        if option in _OURS:
            raise ConfigError(f"task_options.{option}={value!r} is set elsewhere; use {_OURS[option]}.")
        if option not in known:
            raise ConfigError(f"task_options.{option} is not known to task={name!r}; {nearest(option, known)}.")
        wanted = _SCALARS.get(hints.get(option))
        if wanted is not None and not (type(value) is wanted or (wanted is float and type(value) is int)):
            raise ConfigError(
                f"task_options.{option}={value!r} of task={name!r} is not of type {wanted.__name__}; change it."
            )


def _draw_distinct(dataset: _Dataset, name: str, size: int) -> list[dict[str, object]]:
    entries: dict[str, dict[str, object]] = {}
    for index in range(len(dataset)):
        entry = _draw(dataset, name, index)
        entries.setdefault(cast("str", entry["question"]).casefold(), entry)
        if len(entries) == size:
            return list(entries.values())
    raise DataError(
        f"task={name!r} made only {len(entries)} different questions in {len(dataset)} draws, and {size} are wanted; "
        f"lower data.train_size or data.heldout_size to {len(entries)} together, or widen task_options."
    )


def _draw(dataset: _Dataset, name: str, index: int) -> dict[str, object]:
    try:
        return dataset[index]
    except Exception as error:  # some options that a task accepts make problems impossible
        said = str(error) or type(error).__name__
        raise ConfigError(f"task={name!r} cannot make problem {index} ({said}); change task_options.") from error


def _problem(prompt: str, entry: Mapping[str, object]) -> Problem:
    answer = entry["answer"]
    metadata = cast("dict[str, Json]", _as_json(entry.get("metadata") or {}))
    # Some puzzles have many solutions and name none; their verifiers look at the metadata alone.
    return Problem(question=prompt, answer="" if answer is None else str(answer), metadata=metadata)


def _as_json(value: object) -> Json:
    """Return what JSON can hold of the value; what it cannot becomes its representation."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in cast("list[object]", value)]
    return repr(value)
