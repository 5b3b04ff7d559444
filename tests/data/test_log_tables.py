"""Tables are read block by block, and a block says nothing of the next."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tt_ray.data import log_tables
from tt_ray.errors import UserError


def write(folder: Path, **columns: object) -> Path:
    frame = pd.DataFrame({"obs_0": np.zeros(6), "act_0": np.zeros(6), "reward": np.zeros(6), **columns})
    frame.to_parquet(folder / "log.parquet")
    return folder / "log.parquet"


@pytest.mark.parametrize(("written", "seconds"), [("2030-01-01T00:00:0{}", 1893456000.0), ("{}.0", 0.0)])
def test_times_may_begin_after_the_first_block(
    written: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_tables, "BLOCK_ROWS", 2)
    texts = [None, None, *(written.format(second) for second in range(4))]
    found = log_tables.read_table(write(tmp_path, timestamp=texts), {})
    np.testing.assert_array_equal(found["times"], [np.nan, np.nan, *(seconds + np.arange(4))])


def test_a_text_among_numbers_is_named_with_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_tables, "BLOCK_ROWS", 2)
    file = write(tmp_path, reward=["1", "2", "3", "4", "5", "much"])
    with pytest.raises(UserError, match="row 5: reward is 'much', not a number"):
        log_tables.read_table(file, {})
