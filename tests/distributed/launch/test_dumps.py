"""The tracking database's copies on the shared storage, and which of them comes back."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tt_ray.distributed.launch import dumps
from tt_ray.distributed.launch.database import Sqlite, choose
from tt_ray.distributed.launch.dumps import KEEP, KEEP_DAYS, Keeper, finished
from tt_ray.errors import UserError


def head(folder: Path, name: str) -> Keeper:
    """A head's disk, and the storage that all heads share."""
    (folder / name).mkdir(exist_ok=True)
    return Keeper(Sqlite(folder / name), folder / "storage", folder / name)


def write(keeper: Keeper, value: str) -> None:
    with closing(sqlite3.connect(keeper.database.file)) as database, database:  # type: ignore[attr-defined]
        database.execute("CREATE TABLE IF NOT EXISTS runs (name)")
        database.execute("INSERT INTO runs VALUES (?)", [value])


def runs(keeper: Keeper) -> list[str]:
    with closing(sqlite3.connect(keeper.database.file)) as database:  # type: ignore[attr-defined]
        return [name for (name,) in database.execute("SELECT name FROM runs")]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seconds since 1970 at which the next dump is begun, and databases are in use."""
    now = [1_800_000_000]

    class Clock(dumps.datetime):
        @classmethod
        def now(cls, tz: object = None) -> dumps.datetime:
            now[0] += 60
            return cls.fromtimestamp(now[0], dumps.UTC)

    monkeypatch.setattr(dumps, "datetime", Clock)
    monkeypatch.setattr(Keeper, "in_use", lambda self: used(self, now[0]))
    return now


def used(keeper: Keeper, at: int) -> None:
    keeper._served.touch()
    os.utime(keeper._served, (at, at))


def test_a_new_head_goes_on_where_the_last_one_ended(tmp_path: Path, clock: list[int]) -> None:
    first = head(tmp_path, "first")
    assert first.bring_back() == "a new database"
    write(first, "one")
    saved = first.save()
    second = head(tmp_path, "second")
    assert second.bring_back() == f"restored {saved.name}"
    assert runs(second) == ["one"]
    write(second, "two")
    assert {dump.identity for dump in finished(tmp_path / "storage")} == {finished(saved.parent)[0].identity}
    assert second.bring_back() == "the database on this host is the newest"
    assert runs(second) == ["one", "two"]


def test_an_older_database_is_kept_aside_and_a_newer_one_is_left_alone(
    tmp_path: Path, clock: list[int]
) -> None:
    old, new = head(tmp_path, "old"), head(tmp_path, "new")
    old.bring_back()
    write(old, "one")
    old.save()
    new.bring_back()
    write(new, "two")
    new.save()
    write(old, "unsaved")
    said = old.bring_back()
    assert runs(old) == ["one", "two"]
    aside = tmp_path / "old" / f"{said.rpartition(' ')[2]}.db"
    with closing(sqlite3.connect(aside)) as database:
        assert ("unsaved",) in database.execute("SELECT name FROM runs").fetchall()
    write(old, "three")
    used(old, clock[0] + 1)
    assert old.bring_back() == "the database on this host is the newest"
    assert runs(old) == ["one", "two", "three"]


def test_a_damaged_dump_is_passed_over(
    tmp_path: Path, clock: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = head(tmp_path, "first")
    first.bring_back()
    write(first, "one")
    good = first.save()
    write(first, "two")
    bad = first.save()
    bad.write_bytes(bad.read_bytes()[:-100])
    second = head(tmp_path, "second")
    assert second.bring_back() == f"restored {good.name}"
    assert runs(second) == ["one"]
    assert f"{bad} is damaged" in caplog.messages
    good.unlink()
    with pytest.raises(UserError, match=r"no dump in .* is whole"):
        head(tmp_path, "third").bring_back()
    assert not (tmp_path / "third" / "mlflow.db").exists()


def test_only_the_last_few_stay_and_only_of_the_same_database(tmp_path: Path, clock: list[int]) -> None:
    lost = head(tmp_path, "lost")
    lost.bring_back()
    write(lost, "precious")
    precious = lost.save()
    precious = precious.rename(
        tmp_path / precious.name
    )  # the storage was not mounted when the next head came up
    keeper = head(tmp_path, "keeper")
    keeper.bring_back()
    write(keeper, "one")
    precious = precious.rename(tmp_path / "storage" / precious.name)
    made = [keeper.save() for _ in range(KEEP + 3)]
    assert [dump.path for dump in finished(tmp_path / "storage")] == [*reversed(made[-KEEP:]), precious]


def test_of_each_of_the_last_days_the_newest_stays(tmp_path: Path, clock: list[int]) -> None:
    keeper = head(tmp_path, "keeper")
    keeper.bring_back()
    write(keeper, "one")
    kind, identity, digest = keeper.save().stem.split("-")[1:]
    folder = tmp_path / "storage"
    older = [f"202501{day:02}T{hour:02}0000Z" for day in range(1, 12) for hour in (3, 15)]
    for time in older:
        (folder / f"{time}-{kind}-{identity}-{digest}.dump").touch()
    for _ in range(KEEP):
        newest = keeper.save()
    kept = [dump.path.name[:16] for dump in finished(folder)]
    assert kept[:1] == [newest.name[:16]]
    days = range(11, 11 - KEEP_DAYS + 1, -1)
    assert kept[-len(days) :] == [f"202501{day:02}T150000Z" for day in days]


def test_a_dump_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = head(tmp_path, "head")
    keeper.bring_back()
    write(keeper, "one")
    keeper.save()
    before = sorted((tmp_path / "storage").iterdir())

    def full(self: Sqlite, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Sqlite, "dump", full)
    with pytest.raises(OSError, match="No space"):
        keeper.save()
    assert sorted((tmp_path / "storage").iterdir()) == before


def test_what_is_no_database_is_not_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    storage = tmp_path / "storage"
    storage.mkdir()
    (storage / "note").write_bytes(b"hello " * 999)
    name = f"20260102T030405Z-sqlite-89abcdef-{dumps._digest(storage / 'note')}.dump"
    (storage / "note").rename(storage / name)
    keeper = head(tmp_path, "head")
    with pytest.raises(UserError, match="can be restored"):
        keeper.bring_back()
    assert not keeper.database.exists()
    (storage / name).rename(storage / name.replace("sqlite", "postgresql"))
    with pytest.raises(UserError, match="set TT_RAY_DATABASE=postgresql"):
        keeper.bring_back()


def test_an_unknown_kind_of_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="TT_RAY_DATABASE=oracle"):
        choose("oracle", tmp_path)
