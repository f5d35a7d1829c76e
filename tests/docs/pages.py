"""What stands in a page of the documentation: blocks of code, and what is to be done with them.

A block of Python is run, in one namespace with the others of its page. `<!-- setup` ... `-->` holds code that is run,
but not shown. `<!-- not run: why -->` on the line before a block leaves it out, and says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$|^(?:<!-- not run: (?P<why>.+?) -->\n+)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """One block of code.

    Attributes:
        kind: its language; "setup" for code that is not shown.
        code: its text.
        line: number of its first line in the page.
        skipped: why it is not run; None if it is.
    """

    kind: str
    code: str
    line: int
    skipped: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        is_setup = found["setup"] is not None
        code = found["setup"] if is_setup else found["code"]
        line = text.count("\n", 0, found.start("setup" if is_setup else "code")) + 1
        yield Block("setup" if is_setup else found["kind"], code, line, found["why"])


def pages_with(*kinds: str) -> list[str]:
    """Return the pages that have blocks of these kinds, by path."""
    return [str(page.relative_to(ROOT)) for page in PAGES if any(block.kind in kinds for block in blocks_of(page))]
