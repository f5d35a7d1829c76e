"""The reference holds every public name, and each of them says what it is."""

from __future__ import annotations

import re
import runpy

import griffe
import pytest
from pages import ROOT

ON_PAGE_MARKDOWN = runpy.run_path(str(ROOT / "docs" / "generated.py"))["on_page_markdown"]
PACKAGE = griffe.load("lightrft", search_paths=[str(ROOT)])


def public_modules(module: griffe.Module) -> list[griffe.Module]:
    """Return the module and those inside of it, without private ones."""
    inner = [member for name, member in module.modules.items() if not name.startswith("_") and not member.is_alias]
    return [module, *(found for member in inner for found in public_modules(member))]


MODULES = {module.path: module for module in public_modules(PACKAGE)}


def test_every_public_module_is_in_the_reference_once() -> None:
    """The pages of the reference name each public module once, and nothing else."""
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    written = [ON_PAGE_MARKDOWN(page.read_text()) for page in pages]
    named = [name for text in written for name in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)]
    assert sorted(named) == sorted(MODULES)


@pytest.mark.parametrize("path", sorted(MODULES))
def test_every_public_name_is_documented(path: str) -> None:
    """Each name in `__all__` has a docstring, so that the reference shows it; constants and aliases too."""
    module = MODULES[path]
    public = [str(name) for name in module.exports or []]
    missing = [name for name in public if not module[name].has_docstring and name != "__version__"]
    assert missing == []


def test_the_fields_of_public_records_are_described() -> None:
    """A record that describes some of its attributes describes them all; protocols describe those of functions."""
    missing = []
    for module in MODULES.values():
        for name in module.exports or []:
            member = module[str(name)]
            if member.is_alias or not member.is_class or not member.has_docstring:
                continue
            described = member.docstring.value
            fields = [
                field
                for field in member.attributes.values()
                if field.annotation is not None and not field.has_docstring
            ]
            if "Attributes:" in described:
                missing += [
                    field.path for field in fields if not field.is_private and f"{field.name}:" not in described
                ]
    assert missing == []
