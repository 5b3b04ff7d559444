"""`tt-ray data push`: a data set of this machine to a cluster's shared storage."""

from __future__ import annotations

from collections.abc import Callable

from tt_ray.data.minari_folder import check_new_id, dataset_folder, datasets_root
from tt_ray.distributed.launch.cluster_file import ClusterFile
from tt_ray.distributed.launch.folders import digest
from tt_ray.errors import UserError

CHECKING = 3600.0  # seconds for a large set's checksums on a network disk


def push(cluster: ClusterFile, dataset: str, *, force: bool, say: Callable[[str], None]) -> str:
    """Send the data set; what has become of it, in a line.

    It gets its name there once all of it has arrived and been checked. `UserError` where another data set has
    that name there (unless `force`), or there is none here.
    """
    folder = dataset_folder(dataset)
    check_new_id(dataset, overwrite=True)
    if not (folder / "data").is_dir():
        raise UserError(f"no data set {dataset} in {datasets_root()}: `tt-ray data list` shows what there is")
    expected = digest(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    head = cluster.head_host()
    state, _, place = (
        head.module("receive", "look", dataset, expected, timeout=CHECKING).strip().partition(" ")
    )
    if state == "same":
        return f"data set {dataset} is on the cluster already"
    if state == "other" and not force:
        raise UserError(f"the cluster has another data set {dataset}: give yours another id, or add --force")
    say(f"sending {size / 1e6:.1f} MB to {head.address}")
    head.send(folder, place)
    flags = ["--overwrite"] if force else []
    there = head.module("receive", "take", dataset, expected, *flags, timeout=CHECKING).strip()
    return f"data set {dataset} is on the cluster: {there}"
