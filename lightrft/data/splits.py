"""Problems to learn from and held-out problems, with no question in both."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from lightrft.config.sections import DataConfig
from lightrft.data.prompts import Problem, ProblemSet, load_json_lines
from lightrft.data.tasks import load_task
from lightrft.errors import ConfigError, DataError

__all__ = ["split_problems"]


def split_problems(config: DataConfig) -> tuple[ProblemSet, ProblemSet]:
    """Return (train, heldout): problems to learn from and problems to evaluate on.

    Laws: no question is in both; the result is a function of the config (and the files) alone.

    A task makes as many different questions as both need; the first `train_size` are for training. Of a file, held-out
    problems are drawn by the seed from the questions that come once (a repeated question stays in training, with all
    its lines), and the order of the file stays; `train_size` keeps its first lines. A `heldout_path` gives its first
    `heldout_size` problems.

    Args:
        config: the section "data".

    Raises:
        ConfigError: neither task nor path is set, an unknown task, options that it refuses, a task without train_size.
        DataError: a file that cannot be used, or too few problems; the message says how many there are.
        MissingPackageError: the task's package is not installed.
    """
    if config.task is not None:
        return _split_task(config, config.task)
    if config.path is None:
        raise ConfigError("task=None and path=None leave no problems; set data.task or data.path.")
    loaded = load_json_lines(config.path, template=config.template)
    if config.heldout_path is None:
        train, heldout = _split_file(config, loaded.problems)
        name = loaded.name
    else:
        other = load_json_lines(config.heldout_path, template=config.template)
        _check_disjoint(config, loaded.problems, other.problems)
        train, heldout, name = loaded.problems, _first(config, other.problems), other.name
    return _set(loaded.name, _trained(config, train)), _set(name, heldout)


def _split_task(config: DataConfig, task: str) -> tuple[ProblemSet, ProblemSet]:
    if config.train_size == 0:
        raise ConfigError(f"train_size=0 says not how many problems of task={task!r} to make; set data.train_size.")
    if config.heldout_path is not None:
        raise ConfigError(
            f"heldout_path={config.heldout_path!r} goes with data.path, not with task={task!r}; remove it."
        )
    size = config.train_size + config.heldout_size
    made = load_task(task, options=config.task_options, size=size, seed=config.seed, template=config.template)
    train, heldout = made.problems[: config.train_size], made.problems[config.train_size :]
    return (
        ProblemSet(name=made.name, problems=train, score=made.score),
        ProblemSet(name=made.name, problems=heldout, score=made.score),
    )


def _split_file(config: DataConfig, problems: Sequence[Problem]) -> tuple[Sequence[Problem], Sequence[Problem]]:
    count = Counter(problem.question for problem in problems)
    once = [index for index, problem in enumerate(problems) if count[problem.question] == 1]
    if config.heldout_size > len(once) or config.heldout_size == len(problems):
        raise DataError(
            f"heldout_size={config.heldout_size} is too large for path={config.path!r}, which has {len(problems)} "
            f"problems, {len(once)} of them with a question that comes once; lower data.heldout_size or set "
            "data.heldout_path."
        )
    # Seeded by an integer, Random gives the same sample in every process and whatever PYTHONHASHSEED says.
    heldout = set(random.Random(config.seed).sample(once, config.heldout_size))  # noqa: S311 (nothing secret)
    return (
        [problem for index, problem in enumerate(problems) if index not in heldout],
        [problem for index, problem in enumerate(problems) if index in heldout],
    )


def _check_disjoint(config: DataConfig, train: Sequence[Problem], heldout: Sequence[Problem]) -> None:
    learnt = {problem.question for problem in train}
    shared = [problem.question for problem in heldout if problem.question in learnt]
    if shared:
        raise DataError(
            f"heldout_path={config.heldout_path!r} shares {len(shared)} problems with path={config.path!r}, "
            f"such as {shared[0][:60]!r}; remove them from one of the files."
        )


def _first(config: DataConfig, problems: Sequence[Problem]) -> Sequence[Problem]:
    if config.heldout_size > len(problems):
        raise DataError(
            f"heldout_size={config.heldout_size} is more than the {len(problems)} problems of "
            f"heldout_path={config.heldout_path!r}; set data.heldout_size={len(problems)}."
        )
    return problems[: config.heldout_size]


def _trained(config: DataConfig, problems: Sequence[Problem]) -> Sequence[Problem]:
    if config.train_size > len(problems):
        raise DataError(
            f"train_size={config.train_size} is more than the {len(problems)} problems that path={config.path!r} has "
            "for training; lower data.train_size, or set it to 0 for all."
        )
    return problems[: config.train_size] if config.train_size else problems


def _set(name: str, problems: Sequence[Problem]) -> ProblemSet:
    return ProblemSet(name=name, problems=tuple(problems), score=None)
