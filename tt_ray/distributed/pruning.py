"""Removing from a stage store what nobody needs any more, while others go on using it.

A stage is removed by whoever holds its claim, and under its name there is either all of it or nothing: it is
renamed first. Never removed are stages that someone holds, that were used within the last minute, or that are
inputs of what is kept or being computed; and folders that the store has not begun itself, such as models
trained before there was one.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tt_ray.distributed.stages import KINDS, Stage, StageStore, read_manifest
from tt_ray.errors import UserError

ABANDONED = timedelta(days=1)
"""Age at which what a killed process has left is no longer worth going on from."""
FRESH = timedelta(minutes=1)
"""A stage that was taken so recently may be about to be read."""
TRASH = ".trash~"


def prune(
    store: StageStore,
    *,
    older_than: timedelta | None = None,
    kinds: Collection[str] = KINDS,
    dry_run: bool = False,
) -> list[Stage]:
    """Remove stages of `kinds` not used for `older_than` (None: whenever used), and leftovers; those removed.

    Leftovers are partial stages and temporary files of killed processes, untouched for a day. With `dry_run`
    nothing is removed. `UserError` where the store cannot be written.
    """
    now = datetime.now(UTC)
    used, begun = now - max(older_than or FRESH, FRESH), now - ABANDONED
    unneeded = _unneeded(store, kinds, used, begun)
    if dry_run:
        return unneeded
    try:
        removed = []
        for stage in reversed(unneeded):  # what was made from others goes before them
            if _remove(store, stage, used if stage.complete else begun):
                removed.append(stage)
        for kind in kinds:
            _sweep(store, kind, begun)
    except OSError as error:
        raise UserError(f"{store.root}: cannot remove from there: {error.strerror}") from error
    return removed[::-1]


def _unneeded(store: StageStore, kinds: Collection[str], used: datetime, begun: datetime) -> list[Stage]:
    """Stages that may go: complete ones last used before `used`, partial ones last touched before `begun`."""
    stages = list(store.stages(partial=True))
    known = {(stage.kind, stage.key) for stage in stages}
    ours = {(kind, key) for kind, claims in store.claims.items() for key in claims.begun()}

    def is_old(stage: Stage) -> bool:
        if stage.kind not in kinds or store.holder(stage.kind, stage.key) is not None:
            return False
        if stage.complete:
            return stage.last_used < used
        return (stage.kind, stage.key) in ours and stage.last_used < begun

    unneeded: list[Stage] = []
    needed = {entry for kind, key in ours - known for entry in store.claims[kind].inputs(key)}
    for stage in reversed(stages):  # by kind: what was made from others before them
        if (stage.kind, stage.key) not in needed and is_old(stage):
            unneeded.append(stage)
        else:
            needed.update(stage.inputs, store.claims[stage.kind].inputs(stage.key))
    return unneeded[::-1]


def _remove(store: StageStore, stage: Stage, limit: datetime) -> bool:
    """Remove a stage, unless someone has come in between: holds it, or has used it since `limit`."""
    claim = store.claims[stage.kind].take(stage.key)
    if claim is None:
        return False
    trash = stage.path.parent / f"{TRASH}{stage.key}~{secrets.token_hex(4)}"
    try:
        now = Stage(stage.path, read_manifest(stage.path))
        as_judged = now.path.exists() and now.complete == stage.complete and now.last_used < limit
        if not (as_judged and claim.held):
            return False
        os.rename(stage.path, trash)
    finally:
        claim.release(remember=stage.path.exists() and not stage.complete)
    shutil.rmtree(trash, ignore_errors=True)
    return True


def _sweep(store: StageStore, kind: str, abandoned: datetime) -> None:
    """Clear away what killed processes have left beside the stages."""
    claims, folder = store.claims[kind], store.root / kind
    for key in claims.begun():
        if not (folder / key).exists() or read_manifest(folder / key) is not None:
            claims.clear(key)
    claims.tidy()
    for path in folder.glob(".*"):
        if path.name.startswith(TRASH) or (path.name != ".claims" and _is_older(path, abandoned)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_older(path: Path, limit: datetime) -> bool:
    with suppress(FileNotFoundError):
        return datetime.fromtimestamp(path.stat().st_mtime, UTC) < limit
    return False
