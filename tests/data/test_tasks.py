from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from lightrft.data.tasks import _as_json, load_task
from lightrft.errors import ConfigError, DataError, MissingPackageError

DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_problems_are_distinct_scored_and_as_many_as_wanted() -> None:
    """All questions differ; the verifier gives 1 to the answer and less to another one."""
    sums = load_task("chain_sum", options=DIGITS, size=60, seed=0)
    assert len({problem.question for problem in sums.problems}) == len(sums.problems) == 60
    assert sums.score is not None
    for problem in sums.problems:
        assert sums.score(problem.question, problem.answer, problem.answer) == 1.0
        assert sums.score(problem.question, "12345", problem.answer) < 1.0
        assert problem.metadata["source_dataset"] == "chain_sum"


def test_the_verifier_knows_its_problem_by_the_prompt() -> None:
    """The score follows the problem that the prompt names, template included, not the answer that is passed."""
    sums = load_task("chain_sum", options=DIGITS, size=5, seed=0, template="Q: {question}")
    problem = sums.problems[3]
    assert problem.question.startswith("Q: State")
    assert sums.score is not None
    assert sums.score(problem.question, problem.answer, "nonsense") == 1.0
    with pytest.raises(DataError, match="prompt='1' is not one of the problems of task='chain_sum'"):
        sums.score("1", "1", "1")


def test_problems_are_a_function_of_the_seed_and_leave_the_global_random_state() -> None:
    """The same seed gives the same problems, another one others; Python's global generator is not touched."""
    state = random.getstate()
    first = load_task("chain_sum", options={}, size=20, seed=1)
    assert random.getstate() == state
    assert first.problems == load_task("chain_sum", options={}, size=20, seed=1).problems
    assert first.problems != load_task("chain_sum", options={}, size=20, seed=2).problems


def test_problems_do_not_depend_on_hash_randomisation() -> None:
    """A process with a string hash of its own makes the same problems as this one."""
    program = (
        "from lightrft.data.tasks import load_task;"
        "print([p.question for p in load_task('chain_sum', options={}, size=20, seed=3).problems])"
    )
    ran = subprocess.run(  # noqa: S603 (our own program)
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    expected = [problem.question for problem in load_task("chain_sum", options={}, size=20, seed=3).problems]
    assert ran.stdout == f"{expected}\n"


def test_all_questions_of_a_small_task_are_found_and_no_more() -> None:
    """Two digits have 200 sums and differences: 200 can be had, and for 201 the error says how many there are."""
    assert len(load_task("chain_sum", options=DIGITS, size=200, seed=0).problems) == 200
    with pytest.raises(DataError, match=r"task='chain_sum' made only 200 different questions .* 201 are wanted; lower"):
        load_task("chain_sum", options=DIGITS, size=201, seed=0)


def test_a_puzzle_without_an_answer_has_an_empty_one() -> None:
    """Tasks with many solutions name none; the verifier scores completions from what it knows."""
    puzzles = load_task("graph_color", options={}, size=2, seed=0)
    assert [problem.answer for problem in puzzles.problems] == ["", ""]
    json.dumps([dict(problem.metadata) for problem in puzzles.problems], allow_nan=False)
    assert puzzles.score is not None
    assert puzzles.score(puzzles.problems[0].question, "no", "") < 1.0


@pytest.mark.parametrize(("name", "near"), [("chain_sums", "chain_sum"), ("sodoku", "sudoku"), ("%", "ab, acre")])
def test_an_unknown_task_names_near_ones(name: str, near: str) -> None:
    """The message lists names that may have been meant, and all of them where nothing is near."""
    with pytest.raises(ConfigError, match=f"task='{name}' is not known; near ones: .*{near}"):
        load_task(name, options={}, size=1, seed=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_term": 3}, "task_options.max_term is not known to task='chain_sum'; did you mean 'max_terms'"),
        ({"max_terms": 2.7}, "task_options.max_terms=2.7 of task='chain_sum' is not of type int"),
        ({"max_terms": True}, "task_options.max_terms=True of task='chain_sum' is not of type int"),
        ({"allow_negation": "false"}, "task_options.allow_negation='false' .* is not of type bool"),
        ({"max_terms": 1}, r"do not suit task='chain_sum' \(max_terms must be >= min_terms\)"),
        ({"seed": 3}, "task_options.seed=3 is set elsewhere; use data.seed"),
        ({"size": 3}, "task_options.size=3 is set elsewhere; use data.train_size"),
    ],
)
def test_a_bad_option_names_option_and_task(options: dict[str, object], said: str) -> None:
    """A misspelt option, a wrong type, a value that the task refuses and what is ours to set are config errors."""
    with pytest.raises(ConfigError, match=said):
        load_task("chain_sum", options=options, size=1, seed=0)


def test_an_integer_is_good_for_a_float_option() -> None:
    """TOML writes 1 for 1.0; a task whose config checks nothing is fine too."""
    assert load_task("power_function", options={"min_base": -5}, size=1, seed=0).problems


def test_too_few_problems_to_ask_for() -> None:
    """Nothing is not a number of problems."""
    with pytest.raises(ConfigError, match="size=0 is too small for task='chain_sum'"):
        load_task("chain_sum", options={}, size=0, seed=0)


def test_options_that_make_a_problem_impossible_are_a_config_error() -> None:
    """A failure inside the task while it makes a problem names the task, the problem and the options."""
    with pytest.raises(ConfigError, match=r"task='chain_sum' cannot make problem 0 .*4300 digits.*; change"):
        load_task("chain_sum", options={"min_digits": 5000, "max_digits": 5000}, size=1, seed=0)


def test_without_the_package_the_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional; what needs it says how to get it."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingPackageError, match=r"task='chain_sum' .*pip install 'lightrft\[tasks\]'"):
        load_task("chain_sum", options={}, size=1, seed=0)


def test_metadata_becomes_what_json_can_hold() -> None:
    """Tuples become lists, keys strings, and what JSON cannot hold its representation."""
    value = {1: (1, 2.5, None, True), "set": {3}, "nan": float("nan")}
    assert _as_json(value) == {"1": [1, 2.5, None, True], "set": "{3}", "nan": "nan"}


def test_questions_that_differ_in_case_alone_are_one() -> None:
    """No two of many words to spell are the same word in capitals, so none can leak from training into held-out."""
    problems = load_task("spell_backward", options={"max_word_len": 4}, size=2000, seed=0).problems
    folded = [problem.question.casefold() for problem in problems]
    assert len(set(folded)) == len(folded)
    assert len({problem.question for problem in problems} - set(folded)) > 0


def test_neighbouring_seeds_have_problems_of_their_own() -> None:
    """Seeds one apart share no more problems than chance brings, though reasoning-gym's own seeds would."""
    options = {"min_terms": 4, "max_terms": 4, "min_digits": 4, "max_digits": 4}
    first, second = (
        {problem.question for problem in load_task("chain_sum", options=options, size=200, seed=seed).problems}
        for seed in (0, 1)
    )
    assert not first & second
