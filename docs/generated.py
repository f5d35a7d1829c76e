"""What the documentation takes from elsewhere while it is built: laws from docstrings, tables from benchmark runs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

__all__ = ["laws_of", "on_page_markdown"]

LAWS = "<!-- laws -->"
RESULTS = "<!-- results -->"
PROTOCOLS = ("strategy", "collectives", "training", "checkpointing", "rollout")


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
        parts += [f"## {name.capitalize()}\n", "| protocol | laws |", "| --- | --- |", *rows, ""]
    return "\n".join(parts)


def _results() -> str:
    files = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*.md"))
    return "\n\n".join(re.sub(r"^#", "##", file.read_text(encoding="utf-8"), flags=re.MULTILINE) for file in files)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return the page with its generated parts in place; mkdocs calls it for each page.

    Args:
        markdown: the page as it was written.
    """
    if LAWS in markdown:
        return markdown.replace(LAWS, _laws())
    return markdown.replace(RESULTS, _results()) if RESULTS in markdown else markdown
