"""The far side of `tt-ray data push`, run on a cluster's head.

look ID DIGEST      says `same`, `other` or `missing` of the data set in the storage, and where to send it
take ID DIGEST      checks what has been sent, and puts it in its place; --overwrite replaces another one
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tt_ray.data.minari_folder import check_new_id, dataset_folder, datasets_root, install
from tt_ray.distributed.launch.folders import digest
from tt_ray.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 1 and one line where it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tt_ray.distributed.launch.receive")
    parser.add_argument("action", choices=("look", "take"))
    parser.add_argument("dataset")
    parser.add_argument("digest")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.action == "look":
            print(look(options.dataset, options.digest))
        else:
            print(take(options.dataset, options.digest, overwrite=options.overwrite))
    except (UserError, OSError) as error:
        sys.exit(f"tt-ray: {error}")


def staging(dataset: str, expected: str) -> Path:
    """Where a data set is sent: one place for each content, so that a transfer that broke off goes on."""
    return datasets_root() / f".tt-ray-push-{expected[:16]}" / dataset


def look(dataset: str, expected: str) -> str:
    """`same`, `other` or `missing`, and the folder to send to, which is made."""
    place = staging(dataset, expected)
    folder = dataset_folder(dataset)
    if folder.exists() and digest(folder) == expected:
        return f"same {place}"
    place.mkdir(parents=True, exist_ok=True)
    return f"{'other' if folder.exists() else 'missing'} {place}"


def take(dataset: str, expected: str, *, overwrite: bool) -> Path:
    """Put what was sent in its place, whole or not at all; `UserError` where it is not what it should be."""
    check_new_id(dataset, overwrite)
    place = staging(dataset, expected)
    if digest(place) != expected:
        raise UserError(f"data set {dataset} did not arrive as it was sent; run the command again")
    outer = datasets_root() / f".tt-ray-push-{expected[:16]}"
    folder = install(outer, dataset, overwrite)
    shutil.rmtree(outer, ignore_errors=True)
    return folder


if __name__ == "__main__":
    main()
