"""What the documentation takes from elsewhere while it is built: modules, laws, tables of benchmarks."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightrft.testing.law import Law

__all__ = ["laws_of", "modules_of", "on_page_markdown"]

LAWS = "<!-- laws -->"
TESTED = re.compile(r"<!-- tested laws of (strategy|engine) -->")
RESULTS = "<!-- results -->"
MODULES = re.compile(r"<!-- modules (\S+) -->")
APART = "lightrft.strategy.protocols"
"""A package with a page of its own, inside of another one's."""

PROTOCOLS = ("strategy", "collectives", "training", "checkpointing", "rollout")


def modules_of(name: str) -> list[str]:
    """Return a module and all public modules inside of it, by full names.

    Args:
        name: its full name.
    """
    module = import_module(name)
    inner = pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}.")
    public = [found.name for found in inner if not any(part.startswith("_") for part in found.name.split("."))]
    return [name, *sorted(found for found in public if name == APART or not found.startswith(APART))]


def laws_of(module: str) -> Iterator[tuple[str, str]]:
    """Yield (protocol, its laws) for the protocols of a module.

    Args:
        module: its full name.
    """
    loaded = import_module(module)
    for name in loaded.__all__:
        member = getattr(loaded, name)
        if not inspect.isclass(member):
            continue
        texts = [inspect.getdoc(member) or "", inspect.getdoc(vars(member).get("__call__")) or ""]
        for text in texts:
            for found in re.finditer(r"\bLaws?: (.+?)(?:\n\n|\Z)", text, re.DOTALL | re.IGNORECASE):
                yield name, " ".join(found[1].split())


def _laws() -> str:
    parts: list[str] = []
    for name in PROTOCOLS:
        module = f"lightrft.strategy.protocols.{name}"
        rows = [f"| [`{protocol}`][{module}.{protocol}] | {law} |" for protocol, law in laws_of(module)]
        parts += [f"### Contracts of {name}\n", "| protocol | laws |", "| --- | --- |", *rows, ""]
    return "\n".join(parts)


def _tested_laws(found: re.Match[str]) -> str:
    """Return the laws of a registry as one table a section, with the bugs that were planted to try them."""
    from lightrft.testing.laws.registry import ENGINE_LAWS, STRATEGY_LAWS
    from lightrft.testing.mutants.registry import MUTANTS

    laws = STRATEGY_LAWS if found[1] == "strategy" else ENGINE_LAWS
    parts: list[str] = []
    for section, chosen in groupby(laws.values(), key=_section):
        rows = [f"| `{law.id}` | {law.statement} | {_conditions(law)} |" for law in chosen]
        parts += [f"### {section.capitalize()}\n", "| law | what it says | said of |", "| --- | --- | --- |", *rows, ""]
        planted = [mutant for mutant in MUTANTS.values() if mutant.id.partition(".")[0] == section]
        if planted:
            rows = [f"| {mutant.defect} | `{mutant.law}` |" for mutant in planted]
            parts += ["| bug that was planted | law that finds it |", "| --- | --- |", *rows, ""]
    return "\n".join(parts)


def _section(law: Law) -> str:
    return law.id.partition(".")[0]


def _conditions(law: Law) -> str:
    worlds = {"one": ["one rank"], "every": [], "several": ["two ranks or more"]}[law.worlds]
    return ", ".join([*worlds, *(f"`{name}`" for name in sorted(law.requires))]) or "all"


def _results() -> str:
    files = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*.md"))
    return "\n\n".join(re.sub(r"^#", "##", file.read_text(encoding="utf-8"), flags=re.MULTILINE) for file in files)


def _references(found: re.Match[str]) -> str:
    return "\n\n".join(f"::: {name}" for name in modules_of(found[1]))


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return the page with its generated parts in place; mkdocs calls it for each page.

    Args:
        markdown: the page as it was written.
    """
    page = MODULES.sub(_references, markdown)
    page = page.replace(LAWS, _laws()) if LAWS in page else page
    page = TESTED.sub(_tested_laws, page)
    return page.replace(RESULTS, _results()) if RESULTS in page else page
