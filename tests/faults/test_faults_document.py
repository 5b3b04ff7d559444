"""docs/faults.md tells of every kind of fault that is tried here."""

import re
from pathlib import Path

from ledger import KINDS, Row, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"


def test_every_kind_of_fault_stands_in_the_document() -> None:
    text = DOCUMENT.read_text()
    told = set(re.findall(r"^\| ([^|]+?) \|", text, flags=re.MULTILINE))
    assert set(KINDS) - told == set()
    assert "FAILED" not in text


def test_the_table_is_in_the_order_of_the_kinds() -> None:
    rows = [Row("Ctrl-C", "twice", "--resume", None), Row("driver", "step 3", "equal", 12.4)]
    assert table(rows).splitlines()[2:] == [
        "| driver | step 3 | equal | 12 |",
        "| Ctrl-C | twice | --resume |  |",
    ]
