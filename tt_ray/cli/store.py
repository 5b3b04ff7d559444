"""`tt-ray store`: what has been computed once and is kept, and removing what nobody needs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from tt_ray.cli.view import confirmed, console, duration, empty_table
from tt_ray.config import ResourcesConfig
from tt_ray.errors import UserError

if TYPE_CHECKING:
    from tt_ray.distributed.holders import Holder
    from tt_ray.distributed.stages import Stage, StageStore

store_app = typer.Typer(
    help="List and prune what has been computed once: tokens, models, critics, dynamics, evaluations.",
    no_args_is_help=True,
)
UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
LONGEST = timedelta(days=36500)
SHORT_KEY = 8  # digits of a key that is only referred to

Storage = Annotated[Path, typer.Option(help="The storage folder (resources.storage).")]
Kind = Annotated[
    list[str] | None, typer.Option(help="Only this kind: tokens, models, critics, dynamics or evaluations.")
]


@dataclass(frozen=True)
class Entry:
    """A stage as it was when it was looked at; others may change or remove it at any moment."""

    stage: Stage
    bytes: int
    last_used: datetime
    holder: Holder | None

    @property
    def name(self) -> str:
        """Kind and key, which are also its folder below the store."""
        return f"{self.stage.kind}/{self.stage.key}"

    def to_json(self) -> dict[str, Any]:
        """All that is known of it, as plain data; sizes in bytes, times in seconds and UTC."""
        stage = self.stage
        return {
            "kind": stage.kind,
            "key": stage.key,
            "path": str(stage.path),
            "complete": stage.complete,
            "description": dict(stage.description),
            "bytes": self.bytes,
            "seconds": stage.seconds if stage.complete else None,
            "created": stage.created.isoformat() if stage.created is not None else None,
            "last_used": self.last_used.isoformat(timespec="seconds"),
            "inputs": [list(entry) for entry in stage.inputs],
            "holder": None if self.holder is None else str(self.holder),
        }


@store_app.command("list")
def list_command(
    storage: Storage = Path(ResourcesConfig().storage),
    kind: Kind = None,
    partial: Annotated[bool, typer.Option("--partial", help="Also what is not complete.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """What the store holds, how large it is, and how long it took to compute."""
    store, kinds = _open(storage), _checked_kinds(kind)
    found = [entry for entry in _entries(store) if entry.stage.kind in kinds]
    shown = [entry for entry in found if partial or entry.stage.complete]
    if as_json:
        typer.echo(json.dumps([entry.to_json() for entry in shown], indent=1))
        return
    if shown:
        console.print(_stages_table(shown, f"Stages in {storage}"))
        console.print(_totals_table(shown))
    else:
        console.print(f"no {'' if partial else 'complete '}stages in {storage}", soft_wrap=True)
    if left := len(found) - len(shown):
        held = sum(entry.holder is not None for entry in found if not entry.stage.complete)
        also = f", {held} of them being computed" if held else ""
        console.print(f"\n{left} more not complete{also}: --partial lists them")


@store_app.command()
def prune(
    storage: Storage = Path(ResourcesConfig().storage),
    older_than: Annotated[
        str | None, typer.Option(help="What was not used for so long, such as 12h, 30d or 2w.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Whenever it was last used.")] = False,
    kind: Kind = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what was not used for some time; never what is in use, or what is kept was made from."""
    from tt_ray.distributed import pruning

    age = _checked_age(older_than, everything)
    store, kinds = _open(storage), _checked_kinds(kind)
    if not (dry_run or yes or sys.stdin.isatty()):
        raise UserError("there is no terminal to ask on: add --yes to remove, or --dry-run to look first")
    doomed = {(s.kind, s.key) for s in pruning.prune(store, older_than=age, kinds=kinds, dry_run=True)}
    before = list(_entries(store))
    going = [entry for entry in before if (entry.stage.kind, entry.stage.key) in doomed]
    if not going:
        console.print(f"nothing to remove from {storage}: {_reason(older_than, kinds)}", soft_wrap=True)
    else:
        console.print(_stages_table(going, f"{'Would go' if dry_run else 'To be removed'} from {storage}"))
        console.print(_totals_table(going))
    if dry_run or (going and not yes and not confirmed(f"\nRemove {_counted(going)}?")):
        console.print("\nnothing was removed")
        return
    removed = pruning.prune(store, older_than=age, kinds=kinds)  # also the leftovers of killed processes
    if going or removed:
        _show_removed(removed, before, going)


def _show_removed(removed: Sequence[Stage], before: Sequence[Entry], going: Sequence[Entry]) -> None:
    """What went, and what did not although it had been announced."""
    known = {entry.name: entry for entry in before}
    gone = [known[name] for name in (f"{stage.kind}/{stage.key}" for stage in removed) if name in known]
    console.print(f"\nremoved {_counted(gone)} freed", soft_wrap=True)
    for entry in going:
        if entry not in gone:
            console.print(f"kept {entry.name}: it has come into use", soft_wrap=True)


def _open(storage: Path) -> StageStore:
    from tt_ray.distributed.stages import StageStore

    if not storage.is_dir():
        what = "is not a folder" if storage.exists() else "there is no such folder"
        raise UserError(f"--storage {storage}: {what}; give the resources.storage that the experiments had")
    return StageStore(storage)


def _checked_kinds(given: Sequence[str] | None) -> list[str]:
    from tt_ray.distributed.stages import KINDS

    for kind in given or ():
        if kind not in KINDS:
            raise UserError(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    return [kind for kind in KINDS if not given or kind in given]


def _checked_age(text: str | None, everything: bool) -> timedelta | None:
    """The age of `--older-than`; None for `--all`."""
    if (text is None) != everything:
        raise UserError("say what may go: either --older-than (such as 30d) or --all")
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})([hdw])", text.strip())
    if match is None:
        raise UserError(
            f"--older-than {text}: expected a whole number of hours, days or weeks, such as 12h, 30d or 2w"
        )
    age = int(match[1]) * UNITS[match[2]]
    if age > LONGEST:
        raise UserError(f"--older-than {text}: is more than {LONGEST.days}d")
    return age


def _reason(older_than: str | None, kinds: Sequence[str]) -> str:
    age = "" if older_than is None else f" unused for {older_than}"
    return f"no {' or '.join(kinds)}{age} that nobody uses or needs"


def _entries(store: StageStore) -> Iterator[Entry]:
    """Every stage, complete or not, and those of which only a claim is there yet; by kind."""
    from tt_ray.distributed.stages import KINDS, Stage

    stages = list(store.stages(partial=True))
    known = {(stage.kind, stage.key) for stage in stages}
    begun = {(kind, key) for kind in KINDS for key in store.claims[kind].begun()}
    stages += [Stage(store.root / kind / key, None) for kind, key in sorted(begun - known)]
    for stage in sorted(stages, key=lambda stage: KINDS.index(stage.kind)):
        entry = _measured(store, stage)
        if entry is not None and (entry.holder is not None or (stage.kind, stage.key) in known):
            yield entry


def _measured(store: StageStore, stage: Stage) -> Entry | None:
    """The stage with its size and times; None where it is being removed."""
    for _ in range(5):  # files of a stage that is being computed come and go
        try:
            return Entry(stage, stage.bytes, stage.last_used, store.holder(stage.kind, stage.key))
        except FileNotFoundError:
            continue
    return None


def _stages_table(entries: Sequence[Entry], title: str) -> Table:
    """A section for each kind; below a stage's key what it is, and who is computing it."""
    table = empty_table(title)
    table.add_column("stage", overflow="fold", ratio=1)
    for column in ("size", "took", "created", "used"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("made from", min_width=len("evaluations "), overflow="fold")
    table.expand = True
    now, kind = datetime.now(UTC), None
    for entry in entries:
        stage = entry.stage
        if stage.kind != kind:
            table.add_section()
            table.add_row(Text(stage.kind, style="bold"))
        kind = stage.kind
        table.add_row(
            Text.assemble(stage.key, ("\n".join(["", *_remarks(entry)]), "dim")),
            decimal(entry.bytes) if stage.path.exists() else "",
            duration(stage.seconds) if stage.complete else "",
            "" if stage.created is None else _age(now, stage.created),
            _age(now, entry.last_used) if entry.stage.path.exists() else "",
            "\n".join(f"{kind} {key[:SHORT_KEY]}" for kind, key in stage.inputs),
        )
    return table


def _remarks(entry: Entry) -> list[str]:
    """What a stage is, that it is not complete, and who holds it."""
    remarks = [_described(entry.stage.description)] if entry.stage.description else []
    if entry.holder is not None:
        remarks.append(f"being {'extended' if entry.stage.complete else 'computed'} by {entry.holder}")
    elif not entry.stage.complete:
        remarks.append("not complete")
    return remarks


def _described(description: Mapping[str, Any]) -> str:
    """Names as they are, everything else with its key."""
    parts = []
    for key, value in description.items():
        if isinstance(value, str):
            parts.append(value)
        else:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {json.dumps(value)}")
    return ", ".join(parts)


def _age(now: datetime, then: datetime) -> str:
    """How long ago; clocks of other hosts may be ahead."""
    return duration(max(0.0, (now - then).total_seconds()))


def _totals_table(entries: Sequence[Entry]) -> Table:
    """Number, size and time by kind."""
    table = empty_table("Total")
    table.add_column("kind")
    for column in ("stages", "size", "took"):
        table.add_column(column, justify="right", no_wrap=True)
    kinds = list(dict.fromkeys(entry.stage.kind for entry in entries))
    for kind in kinds:
        table.add_row(kind, *_sums([entry for entry in entries if entry.stage.kind == kind]))
    if len(kinds) > 1:
        table.add_section()
        table.add_row("all", *_sums(entries))
    return table


def _sums(entries: Sequence[Entry]) -> tuple[str, str, str]:
    seconds = sum(entry.stage.seconds for entry in entries)
    return str(len(entries)), decimal(sum(entry.bytes for entry in entries)), duration(seconds)


def _counted(entries: Sequence[Entry]) -> str:
    """Such as `3 stages (tokens 2, models 1), 1.2 MB`."""
    number, size, _ = _sums(entries)
    kinds = [entry.stage.kind for entry in entries]
    each = ", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(kinds))
    return f"{number} stage{'s' if number != '1' else ''}{f' ({each})' if each else ''}, {size}"
