"""Copies of the tracking database on the shared storage, so that results outlive the head.

A dump's name says when it was begun (UTC), of which kind of database it is, of which database (an id that
a restored one goes on with), and the hash of its contents:
`20260102T030405Z-sqlite-89abcdef-0123456789abcdef.dump`. It gets that name once it is whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tt_ray.distributed.launch.database import Database
from tt_ray.errors import UserError
from tt_ray.files import whole_file

logger = logging.getLogger(__name__)

KEEP = 6  # of the newest dumps
KEEP_DAYS = 7  # and the newest of so many days on which there was one
_NAME = re.compile(r"(\d{8}T\d{6}Z)-([a-z]+)-([0-9a-f]{8})-([0-9a-f]{16})\.dump")
_TIME = "%Y%m%dT%H%M%SZ"
_TEMPORARY = ".writing-"
_ABANDONED = 86_400.0  # seconds after which nobody still writes a temporary file


@dataclass(frozen=True)
class Dump:
    """A finished dump."""

    path: Path
    taken: float
    """When it was begun, in seconds since 1970."""
    kind: str
    identity: str
    digest: str

    def is_good(self) -> bool:
        """Whether the file still is what was written."""
        return _digest(self.path) == self.digest


def finished(folder: Path) -> list[Dump]:
    """The dumps in `folder`, the newest first."""
    found = []
    for path in folder.glob("*.dump"):
        if match := _NAME.fullmatch(path.name):
            taken = datetime.strptime(match[1], _TIME).replace(tzinfo=UTC).timestamp()
            found.append(Dump(path, taken, *match.group(2, 3, 4)))
    return sorted(found, key=lambda dump: dump.path.name, reverse=True)


class Keeper:
    """Keeps a head's database and its dumps together.

    folder: of the dumps, on the shared storage. state: a folder on this host, where it is noted which
    database this is and when it was last in use.
    """

    def __init__(self, database: Database, folder: Path, state: Path) -> None:
        self.database, self.folder = database, folder
        self._identity, self._served = state / "identity", state / "served"

    def in_use(self) -> None:
        """Note that the database is in use, or complete, at this moment."""
        self._served.touch()

    def save(self) -> Path:
        """Dump the database, and remove its older dumps (`KEEP`, `KEEP_DAYS`); the new file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        began = datetime.now(UTC).strftime(_TIME)
        temporary = self.folder / f"{_TEMPORARY}{began}-{os.getpid()}"
        identity = self._identity.read_text()
        try:
            self.database.dump(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            name = f"{began}-{self.database.kind}-{identity}-{_digest(temporary)}.dump"
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        self.in_use()
        self._tidy(identity)
        return self.folder / name

    def bring_back(self) -> str:
        """Make the (started) database the newest there is: this host's own, or else the newest good dump.

        A dump that is newer than the last use of this host's database wins, and that is kept under another
        name. Says in a line what was done; `UserError` where there are dumps, and none can be used.
        """
        dump = next(self._good(), None)
        if self.database.exists():
            if dump is None or (self._served.exists() and dump.taken <= self._served.stat().st_mtime):
                return "the database on this host is the newest"
        elif dump is None:
            if finished(self.folder):
                raise UserError(f"no dump in {self.folder} is whole: bring one back, or move them away")
            self._become(secrets.token_hex(4))  # first: without an identity it could not be dumped
            self.database.create()
            return "a new database"
        assert dump is not None
        if dump.kind != self.database.kind:
            raise UserError(
                f"{dump.path} is a dump of {dump.kind}, and this head uses {self.database.kind}: set "
                f"TT_RAY_DATABASE={dump.kind} (and install it), or move the dumps away to begin anew"
            )
        return self._restore()

    def _restore(self) -> str:
        aside, served = "", float("-inf")
        if self.database.exists():
            served = self._served.stat().st_mtime if self._served.exists() else served
            name = f"mlflow_until_{datetime.now(UTC).strftime(_TIME).lower()}"
            self.database.set_aside(name)
            aside = f"; the older one of this host is kept as {name}"
        for dump in self._good():
            if dump.taken <= served:
                break  # older than what has been set aside
            try:
                self.database.restore(dump.path)
            except ValueError as error:
                logger.warning("%s", error)
                continue
            self._become(dump.identity)
            return f"restored {dump.path.name}{aside}"
        raise UserError(f"no dump in {self.folder} can be restored{aside}")

    def _become(self, identity: str) -> None:
        with whole_file(self._identity) as path:
            path.write_text(identity)
        self.in_use()

    def _good(self) -> Iterator[Dump]:
        for dump in finished(self.folder):
            if dump.is_good():
                yield dump
            else:
                logger.warning("%s is damaged", dump.path)

    def _tidy(self, identity: str) -> None:
        """Other databases' dumps stay: they are there by mistake, and may be all that is left of them."""
        own = [dump for dump in finished(self.folder) if dump.identity == identity]
        last_of_days = {dump.path.name[:8]: dump for dump in reversed(own)}
        kept = {*own[:KEEP], *sorted(last_of_days.values(), key=lambda dump: dump.taken)[-KEEP_DAYS:]}
        for dump in own:
            if dump not in kept:
                dump.path.unlink(missing_ok=True)
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
