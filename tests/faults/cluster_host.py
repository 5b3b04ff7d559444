"""A Ray cluster of several nodes on this machine, told what to do on its standard input.

Prints the cluster's address, then a line for each line that it reads: `add` starts a node of one CPU,
`kill NAME` ends all of Ray on one, where NAME is `head` or a number from 0. It ends with its input, and the
cluster with it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ray.cluster_utils import Cluster

from tt_ray.distributed.patience import patiently

STORE = 100_000_000  # bytes of each node's object store


def main() -> None:
    """Do as told; the cluster belongs to the main thread."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    with patiently():
        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: list[Any] = []
    print(cluster.address, file=answers)
    for line in sys.stdin:
        what, _, name = line.strip().partition(" ")
        if what == "add":
            with patiently():
                nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE))
        else:
            node = cluster.head_node if name == "head" else nodes[int(name)]
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        print("done", file=answers)
    for node in [*nodes, cluster.head_node]:
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    os._exit(0)


if __name__ == "__main__":
    main()
