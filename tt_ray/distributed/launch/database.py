"""The database behind MLflow on a cluster's head: an SQLite file, or a PostgreSQL of its own.

PostgreSQL listens on a socket in a folder that only its user may enter, and on no network address; it has no
password that could be lost.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from tt_ray.errors import UserError

KINDS = ("postgresql", "sqlite")
NAME = "mlflow"
_USER = "postgres"  # as whom PostgreSQL runs where we are root, which it does not run as
_LONGEST_SOCKET = 100  # characters of its path; the system allows 107


class Database(Protocol):
    """What the service does with either kind."""

    kind: str

    @property
    def uri(self) -> str:
        """For SQLAlchemy."""

    def start(self) -> None:
        """Make it answer, if it does not."""

    def stop(self) -> None:
        """End its processes, if it has any."""

    def exists(self) -> bool:
        """Whether it holds MLflow's tables, or may do so."""

    def create(self) -> None:
        """Make it, empty; MLflow makes its tables."""

    def dump(self, path: Path) -> None:
        """Write a consistent copy to a new file, while it is being used."""

    def restore(self, path: Path) -> None:
        """Fill it from a dump; it must not exist. Raises ValueError, leaving nothing, for a bad dump."""

    def set_aside(self, name: str) -> None:
        """Give it another name, under which it is kept."""


def choose(kind: str, state: Path) -> Database:
    """The database of `kind`, or for `auto` PostgreSQL where this host has it."""
    if kind not in (*KINDS, "auto"):
        raise UserError(f"TT_RAY_DATABASE={kind}: it is one of {', '.join(KINDS)} and auto")
    programs = find_postgres()
    if kind == "sqlite" or (kind == "auto" and programs is None):
        return Sqlite(state)
    if programs is None:
        raise UserError("TT_RAY_DATABASE=postgresql: PostgreSQL's server is not installed on this host")
    return Postgres(state, programs)


def find_postgres() -> Path | None:
    """The folder of PostgreSQL's server programs; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda f: int(f.parent.name), reverse=True
    )
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


class Sqlite:
    """One file."""

    kind = "sqlite"

    def __init__(self, state: Path) -> None:
        self.file = state / f"{NAME}.db"

    @property
    def uri(self) -> str:
        """As `Database.uri`."""
        return f"sqlite:///{self.file}"

    def start(self) -> None:
        """Nothing to start."""
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Nothing to stop."""

    def exists(self) -> bool:
        """As `Database.exists`."""
        return self.file.exists()

    def create(self) -> None:
        """Nothing to make: MLflow makes the file."""

    def dump(self, path: Path) -> None:
        """As `Database.dump`."""
        with closing(sqlite3.connect(self.file)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)

    def restore(self, path: Path) -> None:
        """As `Database.restore`."""
        copy = self.file.with_name(f".{self.file.name}.restored")
        shutil.copyfile(path, copy)
        try:
            with closing(sqlite3.connect(copy)) as database:
                if database.execute("PRAGMA quick_check").fetchone() != ("ok",):
                    raise ValueError(f"{path} is damaged")
            os.replace(copy, self.file)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no SQLite database") from error
        finally:
            copy.unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        """As `Database.set_aside`."""
        with closing(sqlite3.connect(self.file)) as database:  # what its log still holds goes into the file
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.replace(self.file, self.file.with_name(f"{name}.db"))


class Postgres:
    """A PostgreSQL cluster of this service alone."""

    kind = "postgresql"

    def __init__(self, state: Path, programs: Path) -> None:
        self.programs = programs
        self.data, self.socket, self.log = state / "postgres", state / "socket", state / "postgres.log"
        if len(str(self.socket)) > _LONGEST_SOCKET - len("/.s.PGSQL.5432"):
            raise UserError(f"{state}: this path is too long for PostgreSQL's socket")

    @property
    def uri(self) -> str:
        """As `Database.uri`."""
        return f"postgresql+psycopg://{NAME}@/{NAME}?host={self.socket}"

    def start(self) -> None:
        """As `Database.start`; makes the cluster where there is none."""
        for folder in (self.data.parent, self.socket):
            folder.mkdir(parents=True, exist_ok=True)
        self.socket.chmod(0o700)
        self.log.touch()
        if os.geteuid() == 0:
            for path in (self.data.parent, self.socket, self.log):
                shutil.chown(path, _USER, _USER)
        if not (self.data / "PG_VERSION").exists():
            self._make()
        if self._call("pg_ctl", "-D", str(self.data), "status", check=False).returncode:
            places = f"-c listen_addresses='' -c unix_socket_directories='{self.socket}'"
            options = f"{places} -c unix_socket_permissions=0700"
            self._call("pg_ctl", "-D", str(self.data), "-l", str(self.log), "-w", "-o", options, "start")

    def stop(self) -> None:
        """As `Database.stop`."""
        self._call("pg_ctl", "-D", str(self.data), "-m", "fast", "-w", "stop", check=False)

    def exists(self) -> bool:
        """As `Database.exists`."""
        return self._sql(f"SELECT 1 FROM pg_database WHERE datname = '{NAME}'").strip() == "1"

    def create(self) -> None:
        """As `Database.create`."""
        self._sql(f"CREATE DATABASE {NAME}")

    def dump(self, path: Path) -> None:
        """As `Database.dump`."""
        with path.open("wb") as file:  # ours: PostgreSQL's user may not write to the storage
            self._call("pg_dump", *self._at, "--format=custom", NAME, stdout=file.fileno())

    def restore(self, path: Path) -> None:
        """As `Database.restore`."""
        self._sql("DROP DATABASE IF EXISTS incoming")
        self._sql("CREATE DATABASE incoming")
        try:
            with path.open("rb") as file:
                options = ["--exit-on-error", "--single-transaction", "--no-owner", "--dbname=incoming"]
                self._call("pg_restore", *self._at, *options, stdin=file.fileno())
        except UserError as error:
            self._sql("DROP DATABASE incoming")
            raise ValueError(f"{path}: {error}") from error
        self._sql(f"ALTER DATABASE incoming RENAME TO {NAME}")

    def set_aside(self, name: str) -> None:
        """As `Database.set_aside`."""
        self._sql(f'ALTER DATABASE {NAME} RENAME TO "{name}"')

    @property
    def _at(self) -> list[str]:
        return ["--host", str(self.socket), "--username", NAME]

    def _make(self) -> None:
        """`initdb` beside the place, then rename: one that was cut short is made again."""
        making = self.data.with_name("postgres.making")
        shutil.rmtree(making, ignore_errors=True)
        who = ["--username", NAME, "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8"]
        self._call("initdb", "-D", str(making), *who)
        os.replace(making, self.data)

    def _sql(self, statement: str) -> str:
        options = ["--no-psqlrc", "--tuples-only", "--no-align", "--dbname=postgres", "--command", statement]
        return self._call("psql", *self._at, *options).stdout.decode(errors="replace")

    def _call(
        self,
        program: str,
        *arguments: str,
        check: bool = True,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run one of PostgreSQL's programs; `UserError` with its first line where it fails."""
        command: Sequence[str] = [str(self.programs / program), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", _USER, "--", *command]
        keeps_output = program == "pg_ctl" and arguments[-1] == "start"  # its server would hold a pipe open
        with self.log.open("ab") as log:
            said = log.fileno() if keeps_output else subprocess.PIPE
            done = subprocess.run(
                command,
                stdin=stdin,
                stdout=said if keeps_output else stdout,
                stderr=said,
                check=False,
                cwd="/",
            )
        if check and done.returncode:
            words = (done.stderr or b"").decode(errors="replace").strip() or f"see {self.log}"
            raise UserError(f"{program} failed: {words.splitlines()[0]}")
        return done
