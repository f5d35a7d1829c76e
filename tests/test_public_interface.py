"""What is public: every name in the `__all__` of every module without a leading underscore in its path."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import lightrft

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(lightrft.__path__, "lightrft.")
    if not any(part.startswith("_") for part in found.name.split("."))
)


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> ModuleType:
    """Return one public module after the other."""
    return importlib.import_module(request.param)


def annotations(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield each annotation that a user of the module may see, with its owner's name; no body is looked into."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg) and argument.annotation is not None:
                    yield f"{node.name}({argument.arg})", argument.annotation
            if node.returns is not None:
                yield node.name, node.returns
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from annotations(node)
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), node.annotation
            if node.value is not None and ast.unparse(node.annotation).endswith("TypeAlias"):
                yield ast.unparse(node.target), node.value
        elif isinstance(node, ast.If):
            yield from annotations(node)


def names_in(annotation: ast.expr) -> set[str]:
    """Return the names in an annotation, also those inside of strings."""
    names: set[str] = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isprintable():
            try:
                names |= names_in(ast.parse(node.value, mode="eval").body)
            except SyntaxError:  # a literal, not a type
                continue
    return names


def test_no_public_annotation_is_any(module: ModuleType) -> None:
    """No annotation that a user sees says Any, under that name or inside of a string."""
    tree = ast.parse(inspect.getsource(module))
    assert [owner for owner, annotation in annotations(tree) if "Any" in names_in(annotation)] == []


def test_the_search_finds_any() -> None:
    """The walk above sees parameters, results, fields, aliases, strings and dotted names."""
    source = """
x: Any = 1
Alias: TypeAlias = "list[Any]"
def function(first: int, *rest: typing.Any, key: dict[str, "Any"]) -> Any:
    inner: Any
class Record:
    field: list[Any]
    def method(self) -> int: ...
"""
    found = [owner for owner, annotation in annotations(ast.parse(source)) if "Any" in names_in(annotation)]
    assert sorted(found) == ["Alias", "field", "function", "function(key)", "function(rest)", "x"]


def test_every_public_name_exists_and_is_in_order(module: ModuleType) -> None:
    """`__all__` names what is there, without a private name."""
    names: list[str] = list(getattr(module, "__all__", []))
    assert [name for name in names if not hasattr(module, name)] == []
    assert [name for name in names if name.startswith("_") and name != "__version__"] == []
    assert len(set(names)) == len(names)


def test_every_public_name_says_what_it_is(module: ModuleType) -> None:
    """The module, and each class and function that it makes public, has a docstring of its own."""
    assert module.__doc__
    made_here = [
        member
        for name in getattr(module, "__all__", [])
        if inspect.isfunction(member := getattr(module, name)) or inspect.isclass(member)
    ]
    assert [member.__qualname__ for member in made_here if not (member.__doc__ or "").strip()] == []


def test_no_class_of_ours_is_inherited() -> None:
    """Of our own classes only errors and protocols have subclasses."""
    heirs = []
    for name in MODULES:
        module = importlib.import_module(name)
        for owned in vars(module).values():
            if inspect.isclass(owned) and owned.__module__ == name and not issubclass(owned, Exception):
                ours = [base for base in owned.__mro__[1:] if base.__module__.startswith("lightrft.")]
                heirs += [f"{name}.{owned.__name__}" for base in ours if not getattr(base, "_is_protocol", False)]
    assert heirs == []
