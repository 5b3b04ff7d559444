"""`tt-ray store`: what is listed, and what may be removed from a storage folder."""

import io
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from commands import Command, Refused, files_below
from rich.console import Console

from tt_ray.cli import store as store_command
from tt_ray.distributed import pruning
from tt_ray.distributed.stages import MANIFEST, StageStore

TOKENS, MODEL, OTHER, EVALUATION = (
    "0123456789abcdef",
    "fedcba9876543210",
    "00000000deadbeef",
    "1111222233334444",
)
DAY = 86_400.0
DESCRIPTION = {
    "dataset": "mujoco/halfcheetah/medium-expert-v0",
    "experiment": "bins",
    "seed": 0,
    "steps": 4000,
}


@pytest.fixture
def runs(here: Path) -> StageStore:
    """A storage folder `runs`: an old model that an evaluation needs, and an old one that nobody does."""
    store = StageStore(here / "runs")
    make(store, "tokens", TOKENS, {"dataset": "a/b-v0"}, size=21_000_000, seconds=12.3, age=40 * DAY)
    make(store, "models", MODEL, DESCRIPTION | {"val/loss": 4.1234567}, ("tokens", TOKENS), age=35 * DAY)
    make(store, "models", OTHER, {"experiment": "[bold]"}, ("tokens", TOKENS), seconds=5000.0, age=31 * DAY)
    make(store, "evaluations", EVALUATION, {"episodes": 20}, ("models", MODEL), size=50_000, age=3600.0)
    return store


def make(
    store: StageStore,
    kind: str,
    key: str,
    description: dict[str, object],
    *inputs: tuple[str, str],
    size: int = 3_000_000,
    seconds: float = 600.0,
    age: float,
) -> None:
    """A complete stage of `size` bytes that was last used `age` seconds ago."""
    with store.claim(kind, key) as stage:
        stage.path.mkdir(parents=True)
        with open(stage.path / "data", "wb") as file:
            file.truncate(size)
        stage.publish(description, inputs, seconds=seconds)
    os.utime(stage.path / MANIFEST, (time.time() - age,) * 2)


def names(store: StageStore) -> set[str]:
    return {f"{stage.kind}/{stage.key}" for stage in store.stages(partial=True)}


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each line that begins a stage, by key."""
    lines = [re.split("  +", line.strip()) for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if re.fullmatch("([a-z]+-)?[0-9a-f]{16}", cells[0])}


def joined(text: str) -> str:
    """The text without blanks and line ends: what is there, however it was wrapped."""
    return re.sub(r"\s", "", text)


# --- list


@pytest.mark.parametrize("width", [80, 120])
def test_list_shows_every_stage_whole(
    runs: StageStore, command: Command, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(store_command.console, "width", width)
    text = command("store", "list").out
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    found = rows(text)
    assert found.keys() == {TOKENS, MODEL, OTHER, EVALUATION}
    assert found[TOKENS][:2] == ["21.0 MB", "12 s"]
    assert found[TOKENS][3] == "40 d"
    assert found[OTHER][:2] == ["3.0 MB", "1.4 h"]
    assert found[EVALUATION][3:] == ["1.0 h", f"models {MODEL[:8]}"]
    for part in ("mujoco/halfcheetah/medium-expert-v0, bins, seed 0, steps 4000, val/loss 4.123", "[bold]"):
        assert joined(part) in joined("".join(line[: width - 50] for line in text.splitlines()))
    totals = text[text.index("\nTotal") :]
    assert re.search(r"models +2 +6\.0 MB +1\.6 h\n", totals)
    assert re.search(r"all +4 +27\.1 MB +1\.7 h\n", totals)


def test_list_shows_what_is_not_complete_and_who_computes_it(runs: StageStore, command: Command) -> None:
    mine = f"process {os.getpid()}"
    left = runs.path("models", "aaaaaaaaaaaaaaaa")
    left.mkdir()
    with (
        runs.claim("models", "bbbbbbbbbbbbbbbb") as held,
        runs.claim("critics", "cccccccccccccccc"),  # nothing has been written yet
        runs.claim("evaluations", EVALUATION, enough=lambda stage: False),
    ):
        held.path.mkdir()
        (held.path / "half").write_text("half")
        short = command("store", "list").out
        assert rows(short).keys() == {TOKENS, MODEL, OTHER, EVALUATION}
        assert f"being extended by {mine}" in short
        assert "3 more not complete, 2 of them being computed: --partial lists them" in short
        full = command("store", "list", "--partial").out
        assert rows(full).keys() > {left.name, held.key, "cccccccccccccccc"}
        assert full.count(f"being computed by {mine}") == 2
        assert full.count("not complete") == 1
        plain = {
            entry["key"]: entry for entry in json.loads(command("store", "list", "--partial", "--json").out)
        }
    assert plain[held.key]["holder"].startswith(mine)
    assert (plain[held.key]["complete"], plain[held.key]["bytes"], plain[held.key]["seconds"]) == (
        False,
        4,
        None,
    )
    assert plain[left.name]["holder"] is None


def test_list_as_json(runs: StageStore, command: Command) -> None:
    found = json.loads(command("store", "list", "--json", "--kind", "models", "--kind", "critics").out)
    assert [entry["key"] for entry in found] == sorted([MODEL, OTHER])
    (model,) = (entry for entry in found if entry["key"] == MODEL)
    assert model["description"] == DESCRIPTION | {"val/loss": 4.1234567}
    assert (model["bytes"], model["seconds"], model["inputs"]) == (3_000_000, 600.0, [["tokens", TOKENS]])
    assert (Path(model["path"]) / MANIFEST).is_file()
    assert model["last_used"] < model["created"]


def test_list_of_an_empty_store(here: Path, command: Command) -> None:
    (here / "runs").mkdir()
    assert "no complete stages in runs" in command("store", "list").out
    assert json.loads(command("store", "list", "--json").out) == []
    assert files_below(here) == {"runs"}


def test_a_stage_that_goes_while_it_is_looked_at(
    runs: StageStore, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tt_ray.distributed.stages import Stage

    size, tries = Stage.bytes.fget, list[str]()  # type: ignore[attr-defined]

    def vanishing(stage: Stage) -> int:
        tries.append(stage.key)
        if stage.key == OTHER or tries.count(stage.key) < 2:
            raise FileNotFoundError(stage.path / "temporary")
        return int(size(stage))

    monkeypatch.setattr(Stage, "bytes", property(vanishing))
    assert rows(command("store", "list").out).keys() == {TOKENS, MODEL, EVALUATION}


# --- prune


def test_prune_shows_and_removes_what_is_old_and_not_needed(runs: StageStore, command: Command) -> None:
    before = files_below(runs.root)
    dry = command("store", "prune", "--older-than", "30d", "--dry-run")
    assert (dry.code, rows(dry.out).keys()) == (0, {OTHER})
    assert re.search(r"models +1 +3\.0 MB", dry.out)
    assert "nothing was removed" in dry.out
    assert files_below(runs.root) == before
    done = command("store", "prune", "--older-than", "30d", "--yes")
    assert rows(done.out).keys() == {OTHER}
    assert "removed 1 stage (models 1), 3.0 MB freed" in done.out
    assert names(runs) == {f"tokens/{TOKENS}", f"models/{MODEL}", f"evaluations/{EVALUATION}"}
    again = command("store", "prune", "--older-than", "30d", "--yes")
    assert (again.code, again.out.count("\n")) == (0, 1)
    assert again.out.startswith("nothing to remove from runs: ")


def test_prune_all_of_a_kind(runs: StageStore, command: Command) -> None:
    outcome = command("store", "prune", "--all", "--kind", "evaluations", "--yes")
    assert "removed 1 stage (evaluations 1), 50.0 kB freed" in outcome.out
    outcome = command("store", "prune", "--all", "--yes")
    assert "removed 3 stages (tokens 1, models 2), 27.0 MB freed" in outcome.out
    assert names(runs) == set()


@pytest.mark.parametrize("left", [12.0, 25.0])
def test_prune_counts_what_killed_processes_have_left(
    runs: StageStore, command: Command, left: float
) -> None:
    with runs.claim("models", "aaaaaaaaaaaaaaaa") as stage:
        stage.path.mkdir()
        (stage.path / "half").write_bytes(bytes(7000))
    then = time.time() - 3600 * left
    for path in (stage.path / "half", stage.path):
        os.utime(path, (then, then))
    outcome = command("store", "prune", "--older-than", "52w", "--yes")
    assert stage.path.exists() == (left < 24)
    assert ("removed 1 stage (models 1), 7.0 kB freed" in outcome.out) == (left > 24)


@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_prune_asks_on_a_terminal(
    runs: StageStore, command: Command, monkeypatch: pytest.MonkeyPatch, answer: str, gone: bool
) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    outcome = command("store", "prune", "--older-than", "1w")
    assert outcome.code == 0
    assert "Remove 1 stage (models 1), 3.0 MB?" in outcome.out
    assert ("nothing was removed" in outcome.out) == (not gone)
    assert (f"models/{OTHER}" not in names(runs)) == gone


def test_what_comes_into_use_in_the_meantime_is_kept(
    runs: StageStore, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = pruning.prune

    def used_first(store: StageStore, *, dry_run: bool = False, **given: object) -> object:
        if not dry_run:
            with runs.claim("models", OTHER):
                pass
        return prune(store, dry_run=dry_run, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(pruning, "prune", used_first)
    outcome = command("store", "prune", "--older-than", "30d", "--yes")
    assert f"kept models/{OTHER}: it has come into use" in outcome.out
    assert "removed 0 stages, 0 bytes freed" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("prune",), ("either --older-than (such as 30d) or --all",)),
        (("prune", "--all", "--older-than", "3d"), ("either --older-than (such as 30d) or --all",)),
        (("prune", "--all"), ("there is no terminal", "--yes")),
        (("prune", "--older-than", "30", "--yes"), ("--older-than 30:", "12h, 30d or 2w")),
        (("prune", "--older-than", "5m", "--yes"), ("--older-than 5m:", "12h, 30d or 2w")),
        (("prune", "--older-than", "0d", "--yes"), ("--older-than 0d:",)),
        (("prune", "--older-than", "-3d", "--yes"), ("--older-than -3d:",)),
        (("prune", "--older-than", "1.5d", "--yes"), ("--older-than 1.5d:",)),
        (("prune", "--older-than", "99999w", "--yes"), ("--older-than 99999w: is more than 36500d",)),
        (("prune", "--all", "--yes", "--kind", "model"), ("--kind model: expected one of tokens, models",)),
        (("list", "--kind", "model"), ("--kind model: expected one of tokens, models",)),
        (("list", "--storage", "nowhere"), ("--storage nowhere: there is no such folder",)),
        (
            ("prune", "--all", "--yes", "--storage", "nowhere"),
            ("--storage nowhere: there is no such folder",),
        ),
        (("list", "--storage", "runs/tokens/0123456789abcdef/data"), ("is not a folder",)),
    ],
)
def test_mistakes_are_refused_in_one_line(
    runs: StageStore,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    refused("store", *arguments, parts=parts)


def test_a_damaged_manifest_is_named(runs: StageStore, refused: Refused) -> None:
    manifest = runs.path("models", MODEL) / MANIFEST
    manifest.write_text("{")
    refused("store", "list", parts=(f"models/{MODEL}/{MANIFEST}: damaged", "remove this file"))


def test_colours_do_not_touch_what_is_said(runs: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, markup=False)
    monkeypatch.setattr(store_command, "console", console)
    store_command.list_command(runs.root, None, False, False)
    assert "[bold]" in console.file.getvalue()  # type: ignore[attr-defined]
