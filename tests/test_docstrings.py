"""Public names say what they do, and which of them refuse a user's mistake say that too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = sorted((ROOT / "tt_ray" / "config").glob("*.py"))
SOURCES = sorted((ROOT / "tt_ray").rglob("*.py"))
LIBRARY = ("data", "model", "planning", "training", "evaluation")
"""Folders that are used without the command line; there docstrings say what is raised."""
Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def public(node: Documented) -> Iterator[Documented]:
    """A module, class or function and what is public in it; what a function defines inside is not."""
    yield node
    for child in () if isinstance(node, ast.FunctionDef) else node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield from public(child)


def refuses(node: ast.FunctionDef) -> bool:
    """Whether the function itself raises a `UserError`, or ends another one in it."""
    raised = [child.exc for child in ast.walk(node) if isinstance(child, ast.Raise) and child.exc]
    return any(isinstance(exc, ast.Call) and getattr(exc.func, "id", "") == "UserError" for exc in raised)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_public_has_a_docstring_that_names_its_refusals(file: Path) -> None:
    place = file.relative_to(ROOT)
    for node in public(ast.parse(file.read_text())):
        told = ast.get_docstring(node) or ""
        name = getattr(node, "name", "the module")
        assert told or file.name == "__init__.py", f"{place}: {name} has no docstring"
        if isinstance(node, ast.FunctionDef) and place.parts[1] in LIBRARY and refuses(node):
            assert "UserError" in told, f"{place}:{node.lineno}: {name} raises UserError and does not say so"


def fields(file: Path) -> Iterator[tuple[str, bool]]:
    """Each key of the sections in a file, and whether a text follows it or the keys right after it."""
    for node in ast.parse(file.read_text()).body:
        if not (
            isinstance(node, ast.ClassDef) and any("dataclass" in ast.dump(d) for d in node.decorator_list)
        ):
            continue
        told = False
        for item in reversed(node.body):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                section = ast.unparse(item.annotation).removesuffix(" | None").endswith("Config")
                if "ClassVar" not in ast.unparse(item.annotation):
                    yield f"{node.name}.{item.target.id}", told or section
            else:
                told = isinstance(item, ast.Expr)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tt_ray" / "config").glob("*.py")), ids=lambda file: file.name
)
def test_every_key_of_an_experiment_file_says_what_it_is(file: Path) -> None:
    assert [name for name, told in fields(file) if not told] == []
