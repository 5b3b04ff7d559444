"""The documentation is true: its code blocks are run or parsed, as each says, and its links lead somewhere.

A block's first line says what becomes of it here:

- `sh run`, `python run`: it is run in an empty folder with the repository's sweeps/ and analysis/; with
  `slow` after it, only by `make test-slow`
- `sh parsed`: its commands, options, settings, scripts and make targets exist; [optional parts] are included,
  `a | b` stands for either, and CAPITALS for something of the reader's
- `yaml parsed`: laid over a minimal experiment, it is a valid one
- `text`: output and formulae
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tt_ray.cli.app import app
from tt_ray.config import CollectConfig, ExperimentConfig
from tt_ray.experiment_file import SECTIONS, load_experiment
from tt_ray.strict_yaml import parse
from tt_ray.sweep_file import load_sweep

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*FILES, ROOT / "sweeps" / "README.md"]
TAGS = ("sh run", "sh run slow", "sh parsed", "yaml parsed", "python run", "python run slow", "text")
COMMANDS: Any = typer.main.get_command(app)
MAKEFILE = (ROOT / "Makefile").read_text()
MINIMAL: dict[str, Any] = {"name": "docs", "dataset": {"id": "docs/any-v0"}}
PLACEHOLDER_VALUES = ("value", "...")
RUN_LIMIT = 400.0  # seconds


def named(file: Path) -> str:
    """A file as a failure names it."""
    return str(file.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block: its file, the line of its fence, what stands after the fence, and its text."""

    file: Path
    line: int
    info: str
    text: str

    @property
    def place(self) -> str:
        return f"{named(self.file)}:{self.line}"


def blocks_of(file: Path) -> Iterator[Block]:
    opened, info, kept = 0, "", list[str]()
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if line.startswith("```") and not opened:
            opened, info, kept = number, line[3:].strip(), []
        elif line == "```":
            yield Block(file, opened, info, "\n".join(kept) + "\n")
            opened = 0
        elif opened:
            kept.append(line)
    assert not opened, f"{named(file)}:{opened}: this block has no end"


BLOCKS = [block for file in FILES for block in blocks_of(file)]


def tagged(*tags: str) -> list[Any]:
    """The blocks with one of these tags, as parameters of a test."""
    chosen = [block for block in BLOCKS if block.info in tags]
    slow = (pytest.mark.slow, pytest.mark.ray)
    return [
        pytest.param(block, id=block.place, marks=slow if "slow" in block.info.split() else ())
        for block in chosen
    ]


@pytest.mark.parametrize("file", FILES, ids=named)
def test_every_block_is_fenced_and_says_what_is_done_with_it(file: Path) -> None:
    for block in blocks_of(file):
        assert block.info in TAGS, f"{block.place}: {block.info!r} is none of {', '.join(TAGS)}"
    text = re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    indented = re.search(r"\n\n(?: {4}|\t| +```)[^\n]+", text)
    assert indented is None, (
        f"{named(file)}: write this as a fenced block: {indented and indented[0].strip()}"
    )


def shell_lines(text: str) -> list[str]:
    """Commands of a block, one a line, without what is set before them."""
    lines = text.replace("\\\n", " ").splitlines()
    return [re.sub(r"^(\w+=\S* )+(?=\w)", "", line.strip()) for line in lines if line.strip()]


def choices(line: str) -> list[str]:
    """The commands that a line with [optional parts] and `a | b` stands for."""
    line = re.sub(r"(^|\s)#.*", "", line).strip()
    lines = [""]
    for part in re.split(r"(?<!\S)(\[.*?\])(?!\S)", line):
        first, *others = (part[1:-1] if part.startswith("[") else part).split(" | ")
        prefix = first.rpartition(" ")[0] if part.startswith("[") else _group(first)
        lines = [f"{have} {new}" for have in lines for new in (first, *(f"{prefix} {o}" for o in others))]
    return lines


def _group(command: str) -> str:
    """What the alternatives of `tt-ray data list | show ID` begin with: `tt-ray data`."""
    words = command.split()
    return " ".join(words[: 2 if words[1:2] and words[1] in ("data", "store", "cluster") else 1])


def filled(command: str) -> list[str]:
    """Its words, with something in place of CAPITALS; dots for more of the same are left out."""
    words = [word.removesuffix("...") for word in shlex.split(command)]
    return ["1" if re.fullmatch(r"[A-Z][A-Z0-9_]*", word) else word for word in words if word]


def check_tt_ray(words: list[str]) -> None:
    """That our own parser takes these words, and that the settings among them exist."""
    context = COMMANDS.make_context("tt-ray", words)
    command = COMMANDS
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    own = {
        item.name for item in fields(CollectConfig if words[:2] == ["data", "collect"] else ExperimentConfig)
    }
    for word in words:
        key, found, value = word.partition("=")
        section, _, name = key.partition(".")
        if not found or word.startswith("-") or value in PLACEHOLDER_VALUES or section == "search":
            continue
        known = {item.name for item in fields(SECTIONS[section])} if name else {*own, *SECTIONS}
        assert (name or section) in known, f"there is no setting {key}"


class Parsed(Exception):  # noqa: N818
    """The script has read its command line; it shall do no more."""


def check_script(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """That a script of ours is there, and that its parser takes these words; the reader's own may pass."""
    script = ROOT / words[0]
    if not words[0].startswith("analysis/"):
        return
    assert script.is_file(), f"there is no {words[0]}"
    parse = argparse.ArgumentParser.parse_args

    def stopping(*arguments: Any, **named: Any) -> None:
        parse(*arguments, **named)
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", stopping)
    patch.syspath_prepend(str(script.parent))
    patch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def check_shell(text: str, patch: pytest.MonkeyPatch) -> None:
    """That a shell block is one that a reader could type."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, capture_output=True)
    for line in shell_lines(text):
        program = line.split()[0]
        for command in choices(line) if program in ("tt-ray", "python", "make") else ():
            words = filled(command)[1:]
            with patch.context() as inner:
                if program == "tt-ray":
                    check_tt_ray(words)
                elif program == "python":
                    check_script(words, inner)
                else:
                    assert all(re.search(rf"^{word}:", MAKEFILE, re.MULTILINE) for word in words), line


@pytest.mark.parametrize("block", tagged("sh run", "sh run slow", "sh parsed"))
def test_a_command_exists_with_its_options(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    check_shell(block.text, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "tt-ray fly FILE",
        "tt-ray sweep FILE [--dry-run | --dry]",
        "tt-ray store list | prone",
        "tt-ray run FILE planner.horizont=5",
        "tt-ray data collect ENV metod=waypoints",
        "tt-ray predict",
        "python analysis/nothing.py",
        "python analysis/objectives.py SWEEP --angainst 2",
        "make everything",
        "tt-ray list (",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)):
        check_shell(line, monkeypatch)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    both = {key: {**below[key], **above[key]} for key in below.keys() & above if isinstance(above[key], dict)}
    return {**below, **above, **both}


@pytest.mark.parametrize("block", tagged("yaml parsed"))
def test_a_fragment_belongs_into_an_experiment(block: Block, tmp_path: Path) -> None:
    data, _ = parse(block.text, lambda line: f"{named(block.file)}:{block.line + line}")
    if "provider" in data:  # a cluster's file is Ray's
        return
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(merged(MINIMAL, data)))
    (load_sweep if "search" in data else load_experiment)(file)


@pytest.mark.parametrize("block", tagged("sh run", "sh run slow", "python run", "python run slow"))
def test_a_block_runs(block: Block, tmp_path: Path) -> None:
    for name in ("sweeps", "analysis"):
        (tmp_path / name).symlink_to(ROOT / name)
    gone = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in gone} | {
        "MINARI_DATASETS_PATH": str(tmp_path / "data"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    shell = [shutil.which("bash") or "bash", "-eu", "-o", "pipefail", "-c", block.text]
    command = [sys.executable, "-c", block.text] if block.info.startswith("python") else shell
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=RUN_LIMIT
    )
    assert done.returncode == 0, f"{block.place}: {done.stdout}{done.stderr}"


def anchors(file: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("file", LINKED, ids=named)
def test_links_lead_somewhere(file: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"{named(file)}: {target} does not exist"
        assert not anchor or anchor in anchors(there), f"{named(file)}: {path or file.name} has no #{anchor}"


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    listed = set(re.findall(r"^\| \[[\w-]+\.md\]\(([\w-]+\.md)\) \|", index, re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
