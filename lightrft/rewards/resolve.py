"""From the name of a reward to the function, and from completions to checked scores."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, SupportsFloat, cast

from lightrft.errors import ConfigError, RewardError, nearest
from lightrft.rewards.rules import exact_match

__all__ = ["Reward", "Verified", "resolve_reward", "score"]

_SHOWN = 80
"""Characters of a prompt or of a result that a message shows, so that it stays on about one line."""


class Reward(Protocol):
    """Scores a completion; any function of these three strings is one."""

    def __call__(self, prompt: str, completion: str, answer: str, /) -> float:
        """Return a finite number; verifiers give 1 for a right answer.

        Args:
            prompt: what the model read.
            completion: what it wrote.
            answer: the reference answer.
        """
        ...


class Verified(Protocol):
    """Problems that may bring a verifier of their own."""

    @property
    def name(self) -> str:
        """What the problems are called."""
        ...

    @property
    def score(self) -> Reward | None:
        """Their verifier, if there is one."""
        ...


def resolve_reward(name: str | None, problem_set: Verified) -> Reward:
    """Return the reward of a name.

    Args:
        name: "verifier" (that of the problems), "exact_match", or "module:function" with a module that can be imported
            from the current working directory or the environment. None takes the verifier, and exact_match for problems
            without one.
        problem_set: the problems that will be scored.

    Raises:
        ConfigError: nothing has that name, its module cannot be imported, or it cannot be called with three strings.

    Example:
        >>> from lightrft.data.prompts import ProblemSet
        >>> problems = ProblemSet(name="sums", problems=(), score=None)
        >>> resolve_reward("exact_match", problems)("1+1=", "2", "2")
        1.0
    """
    verifier = problem_set.score
    if name is None:
        return exact_match if verifier is None else verifier
    if name == "exact_match":
        return exact_match
    if name == "verifier":
        if verifier is None:
            raise ConfigError(
                f"reward='verifier' is not there for {problem_set.name!r}; use 'exact_match' or your own."
            )
        return verifier
    if ":" not in name:
        known = nearest(name, ["exact_match", "verifier"])
        raise ConfigError(f"reward={name!r} is not known; {known}, or your own as 'module:function'.")
    return _load(name)


def score(reward: Reward, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the reward of each completion, as finite floats; True counts as 1 and a 0-d tensor as its value.

    Args:
        reward: the function.
        prompts: what the model read.
        completions: what it wrote.
        answers: reference answers.

    Raises:
        RewardError: the function raised, or returned something that is not a finite number.
        ValueError: the three are not equally many.
    """
    rows = zip(prompts, completions, answers, strict=True)
    return [_score_one(reward, prompt, completion, answer) for prompt, completion, answer in rows]


def _score_one(reward: Reward, prompt: str, completion: str, answer: str) -> float:
    try:
        result = cast("object", reward(prompt, completion, answer))
    except (Exception, SystemExit) as error:  # a user's function can raise anything, and must not end the run as done
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise RewardError(f"{_about(reward, prompt)} raised {said}; mend the function.") from error
    value = _as_float(result)
    if value is None or not math.isfinite(value):
        raise RewardError(f"{_about(reward, prompt)} returned {_shown(result)}; return a finite number.")
    return value


def _as_float(result: object) -> float | None:
    """Return the number that was meant, or None: a string such as "1" is no number, and no tensor of many is one."""
    if isinstance(result, (str, bytes)) or not hasattr(result, "__float__"):
        return None
    try:
        return float(cast("SupportsFloat", result))
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: torch's for a tensor of many
        return None


def _about(reward: Reward, prompt: str) -> str:
    function = getattr(reward, "__name__", type(reward).__name__)
    return f"reward={function!r} for prompt={_shown(prompt)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _load(name: str) -> Reward:
    module_name, _, function_name = name.partition(":")
    # As for `python -m`: what lies where the user stands can be imported.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module can raise anything, and a script ends itself
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ConfigError(
            f"reward={name!r} cannot be loaded, since importing {module_name!r} raised {said}; "
            "give a module that can be imported from here."
        ) from error
    found = cast("object", getattr(module, function_name, None))
    if found is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"reward={name!r} names no function of {module_name!r}; {nearest(function_name, public)}.")
    if not callable(found):
        raise ConfigError(f"reward={name!r} is of type {type(found).__name__}, not a function; name a function.")
    _check_signature(name, cast("Reward", found))
    return cast("Reward", found)


def _check_signature(name: str, found: Reward) -> None:
    """Refuse, before the warm-up rather than after it, what cannot take the three strings or gives no number."""
    if inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
        raise ConfigError(f"reward={name!r} is a coroutine or generator; name a plain function that returns a number.")
    try:
        inspect.signature(found).bind("prompt", "completion", "answer")
    except TypeError as error:
        raise ConfigError(
            f"reward={name!r} does not take (prompt, completion, answer) ({error}); give it these three parameters."
        ) from error
    except ValueError:  # a function in C without a signature: a call will tell
        return
