"""Hosts for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest


@pytest.fixture(scope="session")
def possible() -> None:
    """Skip where this machine cannot make the hosts."""
    if reason := hosts.why_not():
        pytest.skip(reason)


@pytest.fixture
def site(possible: None, tmp_path: Path) -> Iterator[hosts.Site]:
    """Fresh hosts."""
    with hosts.site(tmp_path) as made:
        yield made
