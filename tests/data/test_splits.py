from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.config.sections import DataConfig
from lightrft.data.splits import split_problems
from lightrft.errors import ConfigError, DataError

DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def _write(path: Path, questions: list[str]) -> str:
    rows = [json.dumps({"prompt": question, "answer": str(index)}) for index, question in enumerate(questions)]
    path.write_text("\n".join(rows))
    return str(path)


def test_a_task_is_split_into_disjoint_problems() -> None:
    """Both parts have their sizes and the verifier, and share no question though the task repeats itself."""
    config = DataConfig(task="chain_sum", task_options=DIGITS, train_size=120, heldout_size=70, template="{question} ?")
    train, heldout = split_problems(config)
    questions = {problem.question for problem in (*train.problems, *heldout.problems)}
    assert (len(train.problems), len(heldout.problems), len(questions)) == (120, 70, 190)
    assert heldout.score is not None
    assert train.score is not None
    for problem in heldout.problems:
        assert problem.question.endswith("= ?")
        assert (
            train.score(problem.question, problem.answer, "")
            == heldout.score(problem.question, problem.answer, "")
            == 1
        )
    again = split_problems(config)
    assert (again[0].problems, again[1].problems) == (train.problems, heldout.problems)


@settings(deadline=None, max_examples=50)
@given(numbers=st.lists(st.integers(0, 12), min_size=1, max_size=25), size=st.integers(1, 10), seed=st.integers(0, 5))
def test_a_file_is_split_without_a_shared_question_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], size: int, seed: int
) -> None:
    """The parts hold all lines once, share no question and keep the order, or the error says why not."""
    path = _write(tmp_path_factory.mktemp("data") / "p.jsonl", [f"q{number}" for number in numbers])
    config = DataConfig(path=path, heldout_size=size, seed=seed)
    num_once = sum(numbers.count(number) == 1 for number in numbers)
    if size > num_once or size == len(numbers):
        with pytest.raises(DataError, match=f"has {len(numbers)} problems, {num_once} of them"):
            split_problems(config)
        return
    train, heldout = (part.problems for part in split_problems(config))
    assert len(heldout) == size
    assert sorted(int(problem.answer) for problem in (*train, *heldout)) == list(range(len(numbers)))
    assert not {problem.question for problem in train} & {problem.question for problem in heldout}
    for part in (train, heldout):
        assert [int(problem.answer) for problem in part] == sorted(int(problem.answer) for problem in part)


def test_the_split_of_a_file_is_by_the_seed(tmp_path: Path) -> None:
    """The same seed holds out the same problems; other seeds hold out others."""
    path = _write(tmp_path / "p.jsonl", [f"q{number}" for number in range(50)])
    parts = [split_problems(DataConfig(path=path, heldout_size=10, seed=seed))[1].problems for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


def test_a_heldout_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """With a file of its own the held-out part is its first problems, and train_size keeps the first of the other."""
    path = _write(tmp_path / "p.jsonl", ["a", "b", "c"])
    other = _write(tmp_path / "h.jsonl", ["x", "y"])
    train, heldout = split_problems(DataConfig(path=path, heldout_path=other, heldout_size=1, train_size=2))
    assert [problem.question for problem in train.problems] == ["a", "b"]
    assert [problem.question for problem in heldout.problems] == ["x"]
    assert (train.name, heldout.name, train.score, heldout.score) == (path, other, None, None)


def test_heldout_problems_that_are_trained_on_are_refused(tmp_path: Path) -> None:
    """Two files that share a question would measure memory."""
    path, other = _write(tmp_path / "p.jsonl", ["a", "b"]), _write(tmp_path / "h.jsonl", ["b", "y"])
    with pytest.raises(DataError, match=r"shares 1 problems with .*, such as 'b'; remove them"):
        split_problems(DataConfig(path=path, heldout_path=other, heldout_size=1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heldout_size": 3, "heldout_path": True}, "heldout_size=3 is more than the 2 problems"),
        ({"heldout_size": 1, "train_size": 3}, "train_size=3 is more than the 2 problems"),
    ],
)
def test_too_small_files_say_how_much_they_hold(tmp_path: Path, settings: dict[str, int], said: str) -> None:
    """Sizes that a file cannot fill are an error and not silently less."""
    path, other = _write(tmp_path / "p.jsonl", ["a", "b", "c"]), _write(tmp_path / "h.jsonl", ["x", "y"])
    chosen = {**settings, "heldout_path": other} if "heldout_path" in settings else settings
    with pytest.raises(DataError, match=said):
        split_problems(DataConfig(path=path, **chosen))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DataConfig(), "task=None and path=None leave no problems; set data.task or data.path"),
        (DataConfig(task="chain_sum"), "train_size=0 .* task='chain_sum' .*; set data.train_size"),
        (DataConfig(task="chain_sum", train_size=1, heldout_path="x"), "heldout_path='x' goes with data.path"),
        (DataConfig(task="chain_sun", train_size=1), "near ones: chain_sum"),
    ],
)
def test_settings_without_meaning_are_config_errors(config: DataConfig, said: str) -> None:
    """What names no problems is refused with the setting that does."""
    with pytest.raises(ConfigError, match=said):
        split_problems(config)
