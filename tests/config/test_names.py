from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft import algorithms
from lightrft.config._names import dotted, hint, one_edit
from lightrft.config.sections import ADVANTAGE_NAMES, AGGREGATION_NAMES, CORRECTION_NAMES, KL_NAMES, LOSS_NAMES


def _distance(first: str, second: str) -> int:
    """Optimal string alignment distance by the textbook table, as a reference."""
    rows = [[i + j if i * j == 0 else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i in range(1, len(first) + 1):
        for j in range(1, len(second) + 1):
            changed = rows[i - 1][j - 1] + (first[i - 1] != second[j - 1])
            rows[i][j] = min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, changed)
            if i > 1 and j > 1 and first[i - 1] == second[j - 2] and first[i - 2] == second[j - 1]:
                rows[i][j] = min(rows[i][j], rows[i - 2][j - 2] + 1)
    return rows[-1][-1]


@pytest.mark.parametrize(
    ("names", "mapping"),
    [
        (ADVANTAGE_NAMES, algorithms.ADVANTAGES),
        (LOSS_NAMES, algorithms.LOSSES),
        (KL_NAMES, algorithms.KL_ESTIMATORS),
        (CORRECTION_NAMES, algorithms.IMPORTANCE_CORRECTIONS),
        (AGGREGATION_NAMES, algorithms.AGGREGATION_MODES),
    ],
)
def test_names_are_those_of_the_algorithms(names: tuple[str, ...], mapping: object) -> None:
    """A name is accepted by a config exactly if there is an algorithm of that name."""
    assert set(names) == set(mapping)  # type: ignore[call-overload]


@settings(deadline=None, max_examples=300)
@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_one_edit_is_distance_one(first: str, second: str) -> None:
    """Two names are one edit apart exactly if their optimal string alignment distance is 1."""
    assert one_edit(first, second) == (_distance(first, second) == 1)


def test_hint_names_all_that_are_equally_near() -> None:
    """Of two settings that are one edit away both are suggested, and without one the most alike."""
    assert hint("top_x", ["top_p", "top_k", "seed"]) == "did you mean 'top_k' or 'top_p'? Known: seed, top_k, top_p"
    assert hint("sedding", ["top_p", "seed"]) == "did you mean 'seed'? Known: seed, top_p"


def test_dotted_quotes_what_is_no_bare_key() -> None:
    """A path is written on one line, as TOML would read it."""
    assert dotted(["data", "a b", "c\nd\x7f", 1]) == 'data."a b"."c\\nd\\u007f".1'
