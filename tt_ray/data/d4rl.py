"""D4RL's published files: downloading them, to be imported as Minari data sets."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tt_ray.data.d4rl_file import SIGNATURE
from tt_ray.data.d4rl_names import D4RL_ENVIRONMENTS, D4RL_QUALITIES, parse_d4rl_name, resolve_id
from tt_ray.data.importing import import_files
from tt_ray.data.minari_folder import check_new_id, staging_folder
from tt_ray.errors import UserError

__all__ = ["download", "resolve_id"]

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
"""Where D4RL publishes its files; TT_RAY_D4RL_URL names a mirror."""

Progress = Callable[[int, int | None], None]
"""Called with the bytes that have arrived and the bytes in all (None: the server does not say)."""

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte


def download(name: str, progress: Progress | None = None, overwrite: bool = False) -> str:
    """Download D4RL's file for a v2 name (`hopper-medium-replay-v2`) and convert it; returns the Minari id.

    A data set that is here already is left as it is unless `overwrite`. `UserError`: unknown name, server not
    reached, file missing, incomplete or not HDF5; nothing is left behind then.
    """
    parts = parse_d4rl_name(name)
    if parts is None:
        raise UserError(
            f"{name!r} is no D4RL v2 data set: it must be one of {', '.join(D4RL_ENVIRONMENTS)}, a dash, and "
            f"one of {', '.join(f'{quality}-v2' for quality in D4RL_QUALITIES)}"
        )
    dataset_id = resolve_id(name)
    if check_new_id(dataset_id, overwrite=True).exists() and not overwrite:
        return dataset_id
    file_name = f"{parts[0]}_{parts[1].replace('-', '_')}-v2.hdf5"
    url = f"{os.environ.get('TT_RAY_D4RL_URL', D4RL_URL).rstrip('/')}/{file_name}"
    with staging_folder(dataset_id) as staging:
        path = staging / file_name
        _fetch(url, path, progress)
        import_files(path, dataset_id, overwrite=overwrite)
    return dataset_id


def _fetch(url: str, path: Path, progress: Progress | None) -> None:
    """Download `url` to `path` and check that it is a whole HDF5 file."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, path.open("wb") as file:
            size = response.headers.get("Content-Length")
            expected = int(size) if size else None
            received = 0
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
                if progress:
                    progress(received, expected)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} cannot be downloaded: the server says {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UserError(f"{url} cannot be downloaded: {reason}") from error
    if expected is not None and received != expected:
        raise UserError(f"{url} arrived incomplete ({received} of {expected} bytes): try again")
    with path.open("rb") as file:
        begins = file.read(len(SIGNATURE))
    if begins != SIGNATURE:
        raise UserError(f"{url} is not an HDF5 file: is TT_RAY_D4RL_URL right?")
