"""What the documentation takes from elsewhere while it is built."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
from collections.abc import Iterator

from pages import ROOT

from lightrft.testing.laws.registry import ENGINE_LAWS, STRATEGY_LAWS

GENERATED = runpy.run_path(str(ROOT / "docs" / "generated.py"))


def contracts_of(name: str) -> Iterator[tuple[str, str]]:
    """Yield the docstrings of a module's protocols and of their calls, each on one line."""
    module = importlib.import_module(name)
    for public in module.__all__:
        member = getattr(module, public)
        if inspect.isclass(member):
            for documented in (member, vars(member).get("__call__")):
                yield public, " ".join((getattr(documented, "__doc__", None) or "").split())


def test_every_law_of_the_protocols_is_on_the_page() -> None:
    """Each protocol whose docstring states a law is on the page of laws, with the sentence that it begins with."""
    page = GENERATED["on_page_markdown"]((ROOT / "docs" / "laws.md").read_text())
    laws = [
        (public, first_words)
        for name in GENERATED["PROTOCOLS"]
        for public, text in contracts_of(f"lightrft.strategy.protocols.{name}")
        for first_words in re.findall(r"Laws?: (.{20})", text)
    ]
    assert len(laws) > 15
    assert [public for public, first_words in laws if first_words not in page] == []


def test_every_law_of_the_suite_is_on_the_page() -> None:
    """Each law that is tested is on the page, with its sentence, under its section."""
    page = GENERATED["on_page_markdown"]((ROOT / "docs" / "laws.md").read_text())
    for law in [*STRATEGY_LAWS.values(), *ENGINE_LAWS.values()]:
        assert f"| `{law.id}` | {law.statement} |" in page
        assert page.count(f"### {law.id.partition('.')[0].capitalize()}\n") == 1


def test_the_tables_of_benchmark_runs_are_on_their_page() -> None:
    """Every file of results is in the page of benchmarks, one level down."""
    page = GENERATED["on_page_markdown"]((ROOT / "docs" / "benchmarks.md").read_text())
    files = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    assert files
    for file in files:
        assert f"#{file.read_text().splitlines()[0]}" in page


def test_other_pages_stay_as_they_were_written() -> None:
    """A page without a mark is not changed."""
    text = (ROOT / "docs" / "concepts.md").read_text()
    assert GENERATED["on_page_markdown"](text) == text
