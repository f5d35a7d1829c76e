from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.data.prompts import Problem, ProblemSet
from lightrft.errors import ConfigError, RewardError
from lightrft.rewards.resolve import Reward, resolve_reward, score
from lightrft.rewards.rules import exact_match


def _verifier(_prompt: str, _completion: str, _answer: str) -> float:
    return 0.25


def _problems(verifier: Reward | None) -> ProblemSet:
    return ProblemSet(name="sums", problems=(Problem(question="1+1=", answer="2"),), score=verifier)


def test_names_of_ours() -> None:
    """The verifier is the default where there is one, exact_match where there is none; both can be named."""
    assert resolve_reward(None, _problems(_verifier)) is _verifier
    assert resolve_reward("verifier", _problems(_verifier)) is _verifier
    assert resolve_reward(None, _problems(None)) is exact_match
    assert resolve_reward("exact_match", _problems(_verifier)) is exact_match


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the directory where the user stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lightrft_test_rewards.py").write_text(
        "number = 3\ndef by_length(prompt, completion, answer):\n    return len(completion)\n"
        "def of_two(prompt, completion):\n    return 1.0\n"
        "async def later(prompt, completion, answer):\n    return 1.0\n"
        "def one_by_one(prompt, completion, answer):\n    yield 1.0\n"
    )
    (tmp_path / "lightrft_test_broken.py").write_text("raise OSError('no weights')\n")
    (tmp_path / "lightrft_test_script.py").write_text("import sys\nsys.exit()\n")
    return "lightrft_test_rewards"


def test_a_function_of_a_module_beside_the_user(module: str) -> None:
    """A module of the working directory can be named, as for `python -m`."""
    reward = resolve_reward(f"{module}:by_length", _problems(None))
    assert score(reward, ["p"], ["abc"], ["x"]) == [3.0]
    assert resolve_reward(f"{module}:by_length", _problems(None)) is reward
    sys.modules.pop(module)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("verifier", "reward='verifier' is not there for 'sums'"),
        ("exact_mach", "reward='exact_mach' is not known; did you mean 'exact_match'.*module:function"),
        ("lightrft_test_none:f", "'lightrft_test_none' raised ModuleNotFoundError"),
        ("lightrft_test_broken:f", "'lightrft_test_broken' raised OSError: no weights"),
        (":f", "importing '' raised ValueError"),
        ("lightrft_test_rewards:by_lenght", "names no function .*; did you mean 'by_length'"),
        ("lightrft_test_rewards:", "names no function"),
        ("lightrft_test_rewards:number", "is of type int, not a function"),
        ("lightrft_test_rewards:of_two", r"does not take \(prompt, completion, answer\) \(too many positional"),
        ("lightrft_test_rewards:later", "is a coroutine or generator"),
        ("lightrft_test_rewards:one_by_one", "is a coroutine or generator"),
        ("lightrft_test_script:f", "importing 'lightrft_test_script' raised SystemExit; "),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_name_that_is_no_reward_says_why(name: str, said: str) -> None:
    """Unknown names, modules that fail, missing attributes and what cannot be called are config errors."""
    with pytest.raises(ConfigError, match=said):
        resolve_reward(name, _problems(None))
    sys.modules.pop("lightrft_test_rewards", None)


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5) | st.booleans()))
def test_scores_are_floats_in_order(values: list[float]) -> None:
    """Each completion gets what the function says of it, as a float; True is 1."""

    def reward(prompt: str, completion: str, answer: str) -> float:
        assert (prompt, answer) == (f"p{completion}", f"a{completion}")
        return values[int(completion)]

    texts = [str(index) for index in range(len(values))]
    scores = score(reward, [f"p{text}" for text in texts], texts, [f"a{text}" for text in texts])
    assert scores == [float(value) for value in values]
    assert {type(value) for value in scores} <= {float}


@pytest.mark.parametrize("value", [torch.tensor(0.5), np.float32(0.5), np.float64(0.5)])
def test_numbers_of_torch_and_numpy_count(value: float) -> None:
    """A 0-d tensor and a numpy number are what they say."""
    assert score(lambda *_: value, ["p"], ["c"], ["a"]) == [0.5]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (torch.tensor(float("nan")), r"tensor\(nan\)"),
        (None, "None"),
        ("1.0", "'1.0'"),
        ([1.0], r"\[1.0\]"),
        (1j, "1j"),
        (torch.tensor([0.1, 0.2]), r"tensor\(\["),
        (10**400, "1000"),
    ],
)
def test_what_is_no_finite_number_is_refused(value: float, shown: str) -> None:
    """The error names the function, the prompt and what came back."""

    def my_reward(_prompt: str, _completion: str, _answer: str) -> float:
        return value

    with pytest.raises(
        RewardError, match=f"reward='my_reward' for prompt='1[+]1=' returned {shown}.*; return a finite"
    ):
        score(my_reward, ["1+1="], ["c"], ["a"])


def test_a_reward_that_raises_is_named_with_its_cause() -> None:
    """The error is one line with the shortened prompt, and the user's exception is its cause."""

    def my_reward(_prompt: str, completion: str, _answer: str) -> float:
        return 1 / len(completion)

    with pytest.raises(
        RewardError, match=r"reward='my_reward' .* raised ZeroDivisionError: division by zero"
    ) as caught:
        score(my_reward, ["long " * 500], [""], ["a"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert len(str(caught.value)) < 300


def test_a_callable_without_a_name_goes_by_its_type() -> None:
    """An object with __call__ is a reward too; an exception without text goes by its type."""

    class Mine:
        def __call__(self, _prompt: str, _completion: str, _answer: str) -> float:
            raise ValueError

    with pytest.raises(RewardError, match="reward='Mine' for prompt='p' raised ValueError; mend"):
        score(Mine(), ["p"], ["c"], ["a"])


def test_a_reward_that_exits_is_an_error_and_no_end() -> None:
    """`sys.exit` in a reward would end a run as if it were done."""

    def leaves(prompt: str, completion: str, answer: str) -> float:
        del prompt, completion, answer
        sys.exit(0)

    with pytest.raises(RewardError, match="reward='leaves' for prompt='p' raised SystemExit: 0; mend the function"):
        score(leaves, ["p"], ["c"], ["a"])


def test_a_function_without_a_signature_is_left_to_its_first_call() -> None:
    """Some functions in C do not say what they take."""
    assert resolve_reward("builtins:max", _problems(None)) is max


def test_unequal_numbers_are_refused() -> None:
    """Completions without an answer are not silently left out."""
    with pytest.raises(ValueError, match="zip"):
        score(exact_match, ["p"], ["c", "d"], ["a"])


def test_anything_with_a_name_and_a_score_can_be_resolved() -> None:
    """The problems are asked for their name and verifier alone."""
    assert resolve_reward("verifier", SimpleNamespace(name="mine", score=_verifier)) is _verifier


def test_rewards_load_without_torch() -> None:
    """Resolving a name does not cost the import of torch."""
    program = (
        "import sys, lightrft.rewards.resolve, lightrft.data.tasks, lightrft.data.splits; print('torch' in sys.modules)"
    )
    ran = subprocess.run(  # noqa: S603 (our own program)
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert ran.stdout == "False\n"
