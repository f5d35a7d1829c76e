"""Programs of users, right and wrong, that mypy and pyright read and nobody runs.

Beside each line of a wrong program stands what the checkers must say about it: `# mypy: <code>, pyright: <rule>`. A
checker that is not named there must say nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROGRAMS = sorted([*HERE.glob("right/*.py"), *HERE.glob("wrong/*.py")])

Findings: TypeAlias = dict[tuple[str, int], set[str]]
"""Codes by program and line."""


def expected(checker: str) -> Findings:
    """Return what the comments demand of a checker."""
    return {
        (name_of(path), number): {found[1]}
        for path in PROGRAMS
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if (found := re.search(rf"#.*\b{checker}: ([\w-]+)", line))
    }


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def run(*command: str) -> str:
    """Return what a checker prints about the programs."""
    files = [str(path) for path in PROGRAMS]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def collect(findings: list[tuple[str, int, str]]) -> Findings:
    collected: Findings = {}
    for file, line, code in findings:
        collected.setdefault((name_of(Path(file)), line), set()).add(code)
    return collected


def findings_of_mypy() -> Findings:
    rows = [json.loads(line) for line in run(sys.executable, "-m", "mypy", "--strict", "--output=json").splitlines()]
    return collect([(row["file"], row["line"], row["code"]) for row in rows if row["severity"] == "error"])


def findings_of_pyright() -> Findings:
    rows = json.loads(run(sys.executable, "-m", "pyright", "--outputjson"))["generalDiagnostics"]
    return collect([(row["file"], row["range"]["start"]["line"] + 1, row.get("rule", "error")) for row in rows])


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_the_checker_finds_exactly_the_mistakes(checker: str) -> None:
    """The checker gives every error that stands beside a line, and no other: none at all in the right programs."""
    found = findings_of_mypy() if checker == "mypy" else findings_of_pyright()
    assert found == expected(checker)


def test_every_wrong_program_is_full_of_mistakes() -> None:
    """Comments are where the mistakes are: each wrong program has at least eight, and a right one has none."""
    marked = [file for file, _ in expected("mypy")]
    for path in PROGRAMS:
        assert (marked.count(name_of(path)) >= 8) == (path.parent.name == "wrong")
