"""The stage store: what has been computed once is found again by everyone who shares the storage folder.

    <root>/<kind>/<key>/             a stage's own files, written by whoever computes it
    <root>/<kind>/<key>/stage.json   its manifest, which comes last and makes the stage complete
    <root>/<kind>/.claims            who is computing what, only while someone is (claims.py)
    <root>/<kind>/.trash~...         what is being removed (pruning.py)

The key is a fingerprint of everything that the stage depends on, so equal keys mean equal contents. A stage
without a manifest is partial: whoever claims it next goes on from its files.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, TypeAdapter, ValidationError

from tt_ray.distributed.claims import Claim, Claims, Timing, sync
from tt_ray.distributed.holders import Holder
from tt_ray.errors import UserError

KINDS = ("tokens", "models", "critics", "dynamics", "evaluations")
"""A stage is made from stages of the kinds before its own."""
MANIFEST = "stage.json"
KEY = re.compile(r"([a-z]+-)?[0-9a-f]{8,64}")

Input = tuple[str, str]
"""Kind and key of a stage that another was made from."""
OnWait = Callable[[float, Holder | None], None]
"""Called with the seconds waited so far and who holds the stage (None: it has just changed hands)."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a complete stage."""

    kind: str
    key: str
    created: AwareDatetime  # UTC
    seconds: float
    """What it took to compute, interrupted attempts included: the time that a reuse saves."""
    bytes: int
    host: str
    versions: dict[str, str]
    description: dict[str, Any]
    inputs: list[Input]


_MANIFESTS = TypeAdapter(Manifest)


class Stage:
    """One stage in a store: complete, or partial; a partial one may be held in order to compute it."""

    def __init__(self, path: Path, manifest: Manifest | None, claim: Claim | None = None) -> None:
        self.path, self.manifest, self._claim = path, manifest, claim

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.path.parent.name

    @property
    def key(self) -> str:
        """Fingerprint of all that the stage depends on."""
        return self.path.name

    @property
    def complete(self) -> bool:
        """Whether it has been published."""
        return self.manifest is not None

    @property
    def held(self) -> bool:
        """Whether this process may write here; turns false when others had reason to believe it dead."""
        return self._claim is not None and self._claim.held

    @property
    def seconds(self) -> float:
        """What it took to compute; so far, while it is held; 0 for a partial one that is not held."""
        published = self.manifest.seconds if self.manifest is not None else 0.0
        return published + (self._claim.seconds if self._claim is not None and self._claim.held else 0.0)

    @property
    def bytes(self) -> int:
        """Size of its files."""
        if self.manifest is not None:
            return self.manifest.bytes
        return sum(file.stat().st_size for file in self._files() if file.exists())

    @property
    def created(self) -> datetime | None:
        """When it was published, in UTC."""
        return self.manifest.created if self.manifest is not None else None

    @property
    def description(self) -> Mapping[str, Any]:
        """What its publisher said about it."""
        return self.manifest.description if self.manifest is not None else {}

    @property
    def inputs(self) -> Sequence[Input]:
        """The stages that it was made from."""
        return self.manifest.inputs if self.manifest is not None else []

    @property
    def last_used(self) -> datetime:
        """When it was published or last reused; for a partial one, when it was last written to. In UTC."""
        files = [self.path / MANIFEST] if self.complete else [self.path, *self._files()]
        times = [file.stat().st_mtime for file in files if file.exists()]
        return datetime.fromtimestamp(max(times, default=0.0), UTC)

    def mark_used(self) -> None:
        """Note that it was reused just now; a store that cannot be written keeps no such notes."""
        with suppress(OSError):
            os.utime(self.path / MANIFEST)

    def publish(
        self, description: Mapping[str, Any], inputs: Sequence[Input] = (), seconds: float | None = None
    ) -> None:
        """Declare the files in `path` complete, and end the claim.

        `inputs` come on top of those that were claimed with; `seconds` replaces the time measured.
        `UserError` when the claim was lost, or the disk is full.
        """
        if self._claim is None:
            raise RuntimeError(f"{self.path}: published without being held")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            all_inputs = list(dict.fromkeys([*self._claim.inputs, *inputs]))
            manifest = self._manifest(description, all_inputs, self.seconds if seconds is None else seconds)
            published = self._claim.publish(_MANIFESTS.dump_json(manifest, indent=1), self.path / MANIFEST)
        except OSError as error:
            raise UserError(f"{self.path}: cannot publish this stage: {error.strerror}") from error
        if not published:
            raise UserError(
                f"{self.path}: not published, because this process was not heard of for "
                f"{self._claim.claims.timing.expiry:.0f} s and another has taken over; run the same command "
                "again to use what that one computes"
            )
        self.manifest, self._claim = manifest, None

    def release(self) -> None:
        """End the claim, if there is one, without publishing; the files stay."""
        if self._claim is not None:
            self._claim.release(remember=self.path.exists())

    def _manifest(self, description: Mapping[str, Any], inputs: list[Input], seconds: float) -> Manifest:
        """With all files brought to the disk, so that none is missing behind a manifest after a power cut."""
        size = 0
        for file in self._files():
            sync(file)
            size += file.stat().st_size
        return Manifest(
            kind=self.kind,
            key=self.key,
            created=datetime.now(UTC).replace(microsecond=0),
            seconds=round(seconds, 3),
            bytes=size,
            host=socket.gethostname(),
            versions=_versions(),
            description=dict(description),
            inputs=inputs,
        )

    def _files(self) -> list[Path]:
        return [file for file in self.path.rglob("*") if file.is_file() and file != self.path / MANIFEST]


class StageStore:
    """All stages below `root`, which may be shared by any number of processes and hosts."""

    def __init__(self, root: Path, timing: Timing | None = None) -> None:
        self.root = root
        self.claims = {kind: Claims(root / kind / ".claims", timing or Timing()) for kind in KINDS}

    def find(self, kind: str, key: str) -> Stage | None:
        """The stage if it is complete. `UserError` for a key that is none, and for a damaged manifest."""
        stage = Stage(path := self.path(kind, key), read_manifest(path))
        return stage if stage.complete else None

    def path(self, kind: str, key: str) -> Path:
        """Where the files of a stage belong; `UserError` for a key that is no fingerprint."""
        if kind not in KINDS:
            raise ValueError(f"{kind} is not one of {', '.join(KINDS)}")
        if not KEY.fullmatch(key):
            raise UserError(f"{key!r}: not the key of a stage, which is a fingerprint of hexadecimal digits")
        return self.root / kind / key

    def holder(self, kind: str, key: str) -> Holder | None:
        """Who holds the stage at the moment."""
        return self.claims[kind].holder(self.path(kind, key).name)

    @contextmanager
    def claim(
        self,
        kind: str,
        key: str,
        *,
        inputs: Sequence[Input] = (),
        enough: Callable[[Stage], bool] = lambda stage: True,
        on_wait: OnWait | None = None,
    ) -> Iterator[Stage]:
        """The stage, complete, or partial and held by this process for the duration of the block.

        Waits while another process holds it. A complete one for which `enough` is false is held too, to be
        extended and published again. `inputs` are kept from pruning until then. Leaving the block without
        `publish` keeps the files for whoever comes next. `UserError` where nothing can be written.
        """
        stage = self._wait(kind, key, inputs, enough, on_wait)
        try:
            yield stage
        finally:
            stage.release()

    def stages(self, *, partial: bool = False) -> Iterator[Stage]:
        """Every complete stage, with `partial` the others too."""
        for folder in (folder for kind in KINDS for folder in sorted((self.root / kind).glob("*"))):
            if KEY.fullmatch(folder.name):
                stage = Stage(folder, read_manifest(folder))
                if stage.complete or partial:
                    yield stage

    def _wait(
        self,
        kind: str,
        key: str,
        inputs: Sequence[Input],
        enough: Callable[[Stage], bool],
        on_wait: OnWait | None,
    ) -> Stage:
        claims, path = self.claims[kind], self.path(kind, key)
        started, pause = time.monotonic(), 0.02
        while True:
            stage = self.find(kind, key)
            if stage is not None and enough(stage):
                stage.mark_used()
                claims.clear(key)
                return stage
            try:
                claim = claims.take(key, inputs, anew=not path.exists())
            except OSError as error:
                raise UserError(f"{path.parent}: cannot write there: {error.strerror}") from error
            if claim is not None:
                return _taken(path, claim, enough)
            if on_wait is not None:
                on_wait(time.monotonic() - started, claims.holder(key))
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(1.5 * pause, claims.timing.poll)


def _taken(path: Path, claim: Claim, enough: Callable[[Stage], bool]) -> Stage:
    """The stage as it is now that it is held; given back at once if it was published just before."""
    try:
        stage = Stage(path, read_manifest(path), claim)
        if not (stage.complete and enough(stage)):
            return stage
    except BaseException:
        claim.release(remember=True)
        raise
    claim.release(remember=False)
    return Stage(path, stage.manifest)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a stage's folder; None for a partial one, `UserError` naming a damaged file."""
    file = folder / MANIFEST
    try:
        manifest = _MANIFESTS.validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
    else:
        if (manifest.kind, manifest.key) == (folder.parent.name, folder.name):
            return manifest
        reason = f"it is that of {manifest.kind}/{manifest.key}"
    raise UserError(f"{file}: damaged ({reason}); remove this file, and the stage is made complete again")


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("tt-ray", "torch", "ray"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
