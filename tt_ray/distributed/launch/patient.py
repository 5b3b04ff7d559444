"""`python -m tt_ray.distributed.launch.patient ray start ...`: Ray's own command, with more patience.

Ray 2.60 has limits that a busy host exceeds and no setting changes (see `tt_ray.distributed.patience`), and
its autoscaler never again tries a host of one's own whose start has failed.
"""

from __future__ import annotations

import sys

from tt_ray.distributed.patience import patiently

PATIENCE = 240.0  # seconds


def main() -> None:
    """Exit as `ray` does."""
    from ray.scripts import scripts

    sys.argv = sys.argv[1:]
    with patiently(PATIENCE):
        scripts.main()


if __name__ == "__main__":
    main()
