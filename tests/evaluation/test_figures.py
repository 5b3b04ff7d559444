from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from tt_ray.evaluation.figures import return_figure
from tt_ray.evaluation.scores import mean_interval


def test_a_return_figure_is_a_picture_with_something_in_it(tmp_path: Path) -> None:
    returns = np.random.default_rng(0).normal(size=400)
    rows = [(label, list(returns), mean_interval(returns)) for label in ("data set", "planner, seed 0")]
    return_figure(rows, tmp_path / "returns.png")
    picture = imread(tmp_path / "returns.png")
    assert picture.shape[0] > 200
    assert picture.shape[1] > 800
    assert picture[..., :3].std() > 0.02
    assert [path.name for path in tmp_path.iterdir()] == ["returns.png"]
