"""docs/troubleshooting.md tells of every message that a user can be refused with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "tt_ray").rglob("*.py"), *(ROOT / "analysis").glob("*.py")])
RAISED = {"UserError": 0, "MlflowAwayError": 0, "require": 2, "Fault": 1, "warning": 0}
"""What makes a message, and the place of the text among its arguments."""


def told(text: str) -> str:
    """A text as it is compared: no backticks, no line breaks, nothing escaped."""
    return " ".join(text.replace("`", "").replace("\\|", "|").split())


DOCUMENT = told((ROOT / "docs" / "troubleshooting.md").read_text())


@dataclass(frozen=True)
class Words:
    """A literal part of a message, and the line that says it."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text!r}"


def literals(node: ast.AST) -> Iterator[str]:
    """The fixed parts of an expression that makes a text, without the `%s` of logged ones."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from re.split(r"%[-.\d]*[srdgf]", node.value)
    elif isinstance(node, ast.JoinedStr):
        yield from (part.value for part in node.values if isinstance(part, ast.Constant))
    elif isinstance(node, ast.BinOp):
        yield from (*literals(node.left), *literals(node.right))


def longest(node: ast.AST) -> str:
    """The longest fixed part, as it is compared; empty where there is none with a word in it."""
    parts = [told(part) for part in literals(node) if re.search(r"[a-z]{3}", part)]
    return max(parts, key=len, default="")


def texts(node: ast.AST, around: ast.AST, module: ast.Module, deep: int = 3) -> Iterator[ast.AST]:
    """The expressions that a message is made of: itself, and what its names and calls stand for nearby."""
    if isinstance(node, ast.IfExp):
        yield from (*texts(node.body, around, module, deep), *texts(node.orelse, around, module, deep))
        return
    yield node
    used = [child for child in ast.walk(node) if isinstance(child, ast.Name)] if deep else []
    for name in {child.id for child in used}:
        for value in _meanings(name, around, module):
            yield from texts(value, around, module, deep - 1)


def _meanings(name: str, around: ast.AST, module: ast.Module) -> Iterator[ast.AST]:
    """What is assigned to a name, or returned by the module's function of that name."""
    for node in ast.walk(around):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    yield node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                    yield from (v for t, v in pairs if isinstance(t, ast.Name) and t.id == name)
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            yield from (r.value for r in ast.walk(node) if isinstance(r, ast.Return) and r.value)
        elif isinstance(node, ast.Assign) and any(getattr(t, "id", None) == name for t in node.targets):
            yield node.value


def messages(source: str, place: str) -> Iterator[Words]:
    """Every literal that a reader may look for, of the messages in a module."""
    module = ast.parse(source)
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    for call in ast.walk(module):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        if len(call.args) <= RAISED.get(name, len(call.args)):
            continue
        inner = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
        around = max(inner, key=lambda function: function.lineno, default=module)
        for node in texts(call.args[RAISED[name]], around, module):
            found = longest(node)
            if " " in found or (found and node is call.args[RAISED[name]]):  # a name alone is no message
                yield Words(f"{place}:{node.lineno}", found)  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_message_stands_in_the_document(file: Path) -> None:
    place = str(file.relative_to(ROOT))
    missing = [words for words in messages(file.read_text(), place) if words.text not in DOCUMENT]
    assert not missing, "docs/troubleshooting.md lacks " + "; ".join(
        f"{m.place}: {m.text!r}" for m in missing
    )


def promised() -> Iterator[tuple[int, str]]:
    """Line numbers of the document, and what is fixed in its messages, in pieces of four words at least."""
    lines = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        messages = re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", line)[1]) if line.startswith("| `") else []
        for message in messages:
            pieces = (piece.strip(" ,.()") for piece in re.split(r"<[^>]*>|[:;] |\.\.\.", message))
            yield from ((number, told(piece)) for piece in pieces if len(piece.split()) > 3)


def test_every_message_of_the_document_is_in_the_code() -> None:
    nodes = (node for file in SOURCES for node in ast.walk(ast.parse(file.read_text())))
    constants = (node.value for node in nodes if isinstance(node, ast.Constant))
    code = "\n".join(told(value) for value in constants if isinstance(value, str))
    made = ("must be at least", "must be positive", "must lie in")  # by the rules of the sections
    gone = [(number, text) for number, text in promised() if text not in code and not text.startswith(made)]
    assert gone == []


@pytest.mark.parametrize(
    "body",
    [
        'raise UserError(f"{path}: of a new kind: {why}")',
        'why = f"of a {other} new kind:"; raise UserError(f"{path}: {why}")',
        'require(fine, key, "is fine" if old else "of a new kind:")',
        "raise UserError(said(path))",
        'logger.warning("%s: of a new kind: %s", path, why)',
    ],
)
def test_a_message_is_found_however_it_is_put(body: str) -> None:
    source = f'def said(path):\n    return "of a new kind:" + path\n\ndef check(path):\n    {body}\n'
    found = [words.text for words in messages(source, "module.py")]
    assert any("new kind:" in text and text not in DOCUMENT for text in found)
