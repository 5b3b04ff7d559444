"""Nobody else may have a hand in the folder of a sweep: Ray Tune keeps pickles there, and reads them back.

Reading a pickle runs what its writer wants. Everything else in a storage folder is plain data.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tt_ray.errors import UserError

ROOT = 0


def require_own(folder: Path) -> None:
    """`UserError` unless `folder`, which need not exist, and all in it are this user's (or root's) alone.

    A folder above it may belong to others, but not be writable for others unless it is sticky, as /tmp is:
    then they could put a folder of their own in its place.
    """
    place, user = folder.resolve(), os.geteuid()
    for path in _everything(place):
        try:
            status = os.lstat(path)
        except FileNotFoundError:  # a temporary file of somebody who looks at the sweep
            continue
        if status.st_uid not in (user, ROOT):
            raise UserError(
                f"{path}: belongs to user {_name(status.st_uid)}, so this sweep is not taken up: Ray would "
                "run what its files say; choose another name or resources.storage"
            )
        if _others_may_write(status):
            raise UserError(
                f"{path}: other users may write there, so this sweep is not taken up: Ray would run what its "
                f"files say; make sure that they are yours, then chmod -R go-w {place}"
            )
    for path in place.parents:
        if path.exists() and _others_may_write(status := path.stat()) and not status.st_mode & stat.S_ISVTX:
            raise UserError(
                f"{path}: other users may rename what is in it, so no sweep is run below it: "
                f"chmod +t {path}, or choose another resources.storage"
            )


def _everything(folder: Path) -> Iterator[Path]:
    if not folder.exists():
        return
    yield folder
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))


def _others_may_write(status: os.stat_result) -> bool:
    if stat.S_ISLNK(status.st_mode):  # what it leads to counts
        return False
    group = bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid)
    return group or bool(status.st_mode & stat.S_IWOTH)


def _is_own_group(number: int) -> bool:
    """Whether it is the group of one user alone, by the usual sign: it has that user's name."""
    with suppress(KeyError):
        return grp.getgrgid(number).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    return False


def _name(number: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return str(number)
