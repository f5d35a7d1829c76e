"""The code in README and documentation works as it stands."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks_of, pages_with

from lightrft.cli.arguments import parse
from lightrft.config import from_mapping
from lightrft.strategy import get_fake_strategy


@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace and an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, object] = {"__name__": page}
    try:
        for block in blocks_of(ROOT / page):
            if block.kind in {"python", "setup"} and block.skipped is None:
                # blank lines before the code, so that a traceback names the line of the page
                exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)  # noqa: S102 (our own pages)
    finally:
        get_fake_strategy().teardown()


@pytest.mark.parametrize("page", pages_with("toml"))
def test_the_configurations_of_a_page_are_valid(page: str) -> None:
    """Every block of TOML is a configuration of a run, or says why it is none."""
    for block in blocks_of(ROOT / page):
        if block.kind == "toml" and block.skipped is None:
            assert from_mapping(tomllib.loads(block.code), source=f"{page}:{block.line}")


@pytest.mark.parametrize("page", pages_with("sh"))
def test_the_commands_of_a_page_exist(page: str) -> None:
    """Every command line of lightrft names a command and options that there are."""
    for block in blocks_of(ROOT / page):
        for line in block.code.splitlines():
            words = shlex.split(line, comments=True)
            if block.kind == "sh" and words[:1] == ["lightrft"]:
                command, _, _ = parse(words[1:])
                assert command.name == words[1]


def test_every_block_has_a_language() -> None:
    """No block is left out of these tests because its language is missing or unknown."""
    kinds = {"python", "setup", "toml", "sh", "text", "json"}
    strange = [f"{page}:{block.line}" for page in PAGES for block in blocks_of(page) if block.kind not in kinds]
    assert strange == []


def test_few_blocks_are_not_run() -> None:
    """At most one block in ten is left out."""
    blocks = [block for page in PAGES for block in blocks_of(page) if block.kind == "python"]
    assert len(blocks) > 20
    assert sum(block.skipped is not None for block in blocks) <= len(blocks) / 10
