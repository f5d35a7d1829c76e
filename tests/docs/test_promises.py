"""Every promise about checkpoints is tested, and what the page says of its tests is there."""

from __future__ import annotations

import ast
import re

from pages import ROOT

from lightrft.testing.laws.registry import STRATEGY_LAWS

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
PROMISES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in re.search(r"\| promise \| laws \| tests \|\n\| --- .*\n((?:\|.*\n)+)", PAGE)[1].splitlines()
]
TESTS = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)


def test_every_promise_has_a_test() -> None:
    """Each row of the table names a law or a test, and nothing that is neither."""
    assert len(PROMISES) > 10
    for promise, laws, tests in PROMISES:
        assert promise.endswith((".", "stands below."))
        named = re.findall(r"`([^`]+)`", laws) + re.findall(r"`(tests/[^`]+)`", tests)
        assert named, promise
        assert set(re.findall(r"`([^`]+)`", laws)) <= set(STRATEGY_LAWS), promise


def test_every_test_that_is_named_is_there() -> None:
    """Files and functions of tests have the names that the page gives them."""
    assert TESTS
    for file, function in TESTS:
        names = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert any(name.startswith("test_") for name in names), file
        assert not function or function in names, (file, function)
    assert len(re.findall(r"`tests/", PAGE)) == len(TESTS)  # no name is overlooked


def test_every_law_of_checkpoints_is_on_the_page() -> None:
    """No law about checkpoints and exports is left out."""
    laws = {name for name in STRATEGY_LAWS if name.partition(".")[0] in {"checkpoint", "export"}}
    named = {name for _, cell, _ in PROMISES for name in re.findall(r"`([^`]+)`", cell)}
    assert laws == named
