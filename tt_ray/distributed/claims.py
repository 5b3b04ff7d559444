"""Claims: of all processes that want the same thing, on any host with the same disk, one at a time holds it.

The claim on KEY is the folder `<claims>/KEY` with one file in it, whose name says who holds it and is never
used twice. Holders touch their file every few seconds.

    take        a folder of one's own with that file is renamed to KEY, which works only while KEY is missing
                or empty: of any number that try one wins, and no claim is ever without its holder's name
    give back   the file is removed, by its unique name, and then KEY if it is empty
    take over   a dead holder's file is removed likewise, and then anyone may take
    publish     the file is renamed to what it publishes: the claim's end and the result's appearance are one

No step has to follow another in time, so pauses and kills between any two of them do no harm:
- two find the same dead claim: the slower removes that one dead file or nothing, and the rename decides;
- a holder that was silent too long wakes up: its file is gone, so it can neither publish nor undo others;
- killed while taking: a folder KEY~HOLDER is left, which whoever comes next clears away;
- killed between file and folder, or just after publishing: an empty KEY is left, which is free;
- killed after taking what has just been published: a dead claim on it, which whoever uses it clears away.

A holder on this host is dead when its process is (one that is only stopped lives); on another host, when its
last touch is `expiry` seconds old by the file system's clock, so that hosts need not agree on the time.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tt_ray.distributed.holders import Holder
from tt_ray.plain import MALFORMED, convert, read_json

_NOTE = {"seconds": float, "started": float, "inputs": list[list[str]]}
"""What a claim or record says of itself."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How often claims are touched and looked at, in seconds."""

    heartbeat: float = 5.0
    expiry: float = 30.0
    """A holder on another host is dead after this long without a heartbeat."""
    poll: float = 1.0
    """Those who wait look at least this often."""


class Claims:
    """The claims in a folder, which exists only while there are any."""

    def __init__(self, folder: Path, timing: Timing) -> None:
        self.folder, self.timing = folder, timing

    def take(self, key: str, inputs: Sequence[Sequence[str]] = (), *, anew: bool = False) -> Claim | None:
        """The claim on `key`, taken over from a dead holder if need be; None while a live one has it.

        `inputs` are noted in it for those who prune; with `anew` the time of earlier holders does not count.
        `OSError` where the folder cannot be written.
        """
        place = self.folder / key
        if anew:
            self.forget(key)
        for name in _names(place):
            if not self._is_dead(place / name):
                return None
            self._remember(key, _spent(place / name))
            (place / name).unlink(missing_ok=True)
        holder, before = Holder.new(), 0.0 if anew else self.seconds_before(key)
        own = self._temporary(key, holder)
        try:
            own.mkdir()
            with (own / holder.name).open("w") as file:
                note = {"seconds": before, "inputs": [list(entry) for entry in inputs]}
                json.dump({**note, "started": os.fstat(file.fileno()).st_mtime}, file)
            _rename_if_free(own, place)
        except FileNotFoundError:  # whoever was last has just removed the folder: as good as taken
            return None
        finally:
            shutil.rmtree(own, ignore_errors=True)
        # Not the rename's word: on a network disk its success may be reported as a failure after a retry.
        return Claim(self, key, holder, note) if (place / holder.name).exists() else None

    def holder(self, key: str) -> Holder | None:
        """The live holder of `key`, or None."""
        place = self.folder / key
        alive = (name for name in _names(place) if not self._is_dead(place / name))
        return next((holder for holder in map(Holder.parse, alive) if holder is not None), None)

    def begun(self) -> set[str]:
        """Keys that someone holds, or has held without publishing."""
        names = [name for name in _names(self.folder) if "~" not in name]
        records = {name.removesuffix(".json") for name in names if name.endswith(".json")}
        return records | {name for name in names if _names(self.folder / name)}

    def inputs(self, key: str) -> set[tuple[str, ...]]:
        """What those who hold `key`, or have held it without publishing, have noted as their inputs."""
        place = self.folder / key
        notes = [_note(file) for file in (self._record(key), *(place / name for name in _names(place)))]
        return {tuple(entry) for note in notes for entry in note.get("inputs", ())}

    def seconds_before(self, key: str) -> float:
        """Seconds that earlier holders have spent on `key` without publishing."""
        return _note(self._record(key)).get("seconds", 0.0)

    def forget(self, key: str) -> None:
        """Drop the record of earlier holders."""
        self._record(key).unlink(missing_ok=True)

    def clear(self, key: str) -> None:
        """Clear away all that dead holders have left of `key`, which needs nothing more; never fails."""
        place = self.folder / key
        with suppress(OSError):
            for name in _names(place):
                if self._is_dead(place / name):
                    (place / name).unlink(missing_ok=True)
            self.forget(key)
        self.tidy(key)

    def tidy(self, key: str | None = None) -> None:
        """Clear away what killed processes have left of `key` or all keys; claims and records stay."""
        for name in _names(self.folder):
            owner, temporary, _ = name.partition("~")
            path = self.folder / name
            with suppress(OSError):
                if temporary and self._is_dead(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                elif not temporary and owner == (key or owner):
                    path.rmdir()
        with suppress(OSError):
            self.folder.rmdir()

    def _is_dead(self, file: Path) -> bool:
        holder = Holder.parse(file.name.partition("~")[2] if file.name.count("~") == 5 else file.name)
        if holder is None:
            return False  # a network disk's own file, which will go
        running = holder.runs()
        if running is not None:
            return not running
        try:
            descriptor = os.open(file, os.O_RDONLY)  # a network disk may answer stat from memory, not this
        except FileNotFoundError:
            return True
        try:
            # In this order: a pause between the two makes the holder look younger, not older.
            return self._now() - os.fstat(descriptor).st_mtime > self.timing.expiry
        finally:
            os.close(descriptor)

    def _now(self) -> float:
        """The time on the file system's clock; where it cannot be had, one at which nobody is dead yet."""
        try:
            file = self._temporary("clock", Holder.new())
            file.touch()
            try:
                return file.stat().st_mtime
            finally:
                file.unlink()
        except OSError:
            return -math.inf

    def _remember(self, key: str, note: dict[str, Any]) -> None:
        """Note how long holders up to now have worked; no more than that is lost if this fails."""
        if note["seconds"] <= self.seconds_before(key):
            return
        with suppress(OSError):
            file = self._temporary(key, Holder.new())
            file.write_text(json.dumps(note))
            os.replace(file, self._record(key))

    def _record(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _temporary(self, key: str, holder: Holder) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{key}~{holder.name}"


class Claim:
    """A claim that this process has taken, and touches until it ends or is lost."""

    def __init__(self, claims: Claims, key: str, holder: Holder, note: dict[str, Any]) -> None:
        self.claims, self.key, self.holder = claims, key, holder
        self.file = claims.folder / key / holder.name
        self._note, self._started = note, time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name=f"claim {key}", daemon=True).start()

    @property
    def held(self) -> bool:
        """Whether nobody has taken it over."""
        return not self._ended.is_set() and self.file.exists()

    @property
    def seconds(self) -> float:
        """How long this process has held it, and those before that did not publish."""
        return float(self._note["seconds"]) + time.monotonic() - self._started

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """Those that it was taken with."""
        return [(kind, key) for kind, key in self._note["inputs"]]

    def publish(self, content: bytes, target: Path) -> bool:
        """Write `content` to `target`, whole or not at all, and end the claim; False when it was lost before.

        `OSError` where it cannot be written; the claim is then still held.
        """
        try:
            with self.file.open("r+b") as file:
                file.write(content)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            self.claims.forget(
                self.key
            )  # before: a kill must not leave it behind, and the content has the seconds
            os.rename(self.file, target)
        except FileNotFoundError:
            if not (target.exists() and target.read_bytes() == content):  # a network disk's retry may say so
                return False
        with suppress(OSError):  # not every disk can do this to a folder
            sync(target.parent)
        self._end()
        return True

    def release(self, *, remember: bool) -> None:
        """End the claim unless it has ended; with `remember` its time counts for whoever goes on."""
        if self._ended.is_set() or self.holder.pid != os.getpid():  # a forked copy owns nothing
            return
        if self.held:
            if remember:
                self.claims._remember(self.key, {**self._note, "seconds": self.seconds})
            else:
                self.claims.forget(self.key)
            with suppress(OSError):
                self.file.unlink()
        self._end()

    def _end(self) -> None:
        self._ended.set()
        self.claims.tidy(self.key)

    def _beat(self) -> None:
        while not self._ended.wait(self.claims.timing.heartbeat):
            try:
                os.utime(self.file)
            except FileNotFoundError:
                return
            except OSError:
                continue  # the disk is away; if others can reach it and take over, this shows when it is back


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, from memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_if_free(folder: Path, place: Path) -> None:
    try:
        os.rename(folder, place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _note(file: Path) -> dict[str, Any]:
    """What a claim or record says; nothing where it is gone, or was being written when its holder died."""
    try:
        return {name: convert(_NOTE[name], value) for name, value in read_json(file).items() if name in _NOTE}
    except MALFORMED:
        return {}


def _spent(file: Path) -> dict[str, Any]:
    """What is worth remembering of a dead holder: its inputs, and the seconds up to its last touch."""
    note = _note(file)
    seconds = note.get("seconds", 0.0)
    with suppress(OSError, KeyError):
        seconds += file.stat().st_mtime - note["started"]
    return {"seconds": seconds, "inputs": note.get("inputs", [])}
