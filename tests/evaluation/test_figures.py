from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from tt_ray.evaluation.figure_parts import COLORS
from tt_ray.evaluation.figures import data_figure, return_figure, training_figure
from tt_ray.evaluation.scores import mean_interval

TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def test_a_return_figure_is_a_picture_with_something_in_it(tmp_path: Path) -> None:
    returns = np.random.default_rng(0).normal(size=400)
    rows = [(label, list(returns), mean_interval(returns)) for label in ("data set", "planner, seed 0")]
    return_figure(rows, tmp_path / "returns.png")
    picture = imread(tmp_path / "returns.png")
    assert picture.shape[0] > 200
    assert picture.shape[1] > 800
    assert picture[..., :3].std() > 0.02
    assert [path.name for path in tmp_path.iterdir()] == ["returns.png"]


def test_curves_and_returns_of_data(tmp_path: Path) -> None:
    steps = [0, 10, 20]
    points = {name: (steps, [3.0, 2.0, 1.0]) for name in ("train/loss", "val/loss", "train/loss_action")}
    training_figure(points, tmp_path / "full.png", "a $study$")
    training_figure({}, tmp_path / "empty.png", "nothing yet")
    data_figure([1.0, 1.0, 5.0], [3, 3, 9], tmp_path / "data.png", "tiny/data-v0")
    data_figure([2.0], [4], tmp_path / "one.png", "tiny/one-v0")
    for name in ("full", "empty", "data", "one"):
        assert imread(tmp_path / f"{name}.png")[..., :3].std() > 0.01
    returns = [("data set", [1.0, 1.0], mean_interval([1.0, 1.0]))]  # all the same: no density
    return_figure(returns, tmp_path / "same.png")


# What the two common kinds of colour blindness leave of linear RGB (Machado, Oliveira and Fernandes 2009).
BLIND = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "usual": np.eye(3).tolist(),
}


@pytest.mark.parametrize("eyes", BLIND)
def test_the_colours_can_be_told_apart(eyes: str) -> None:
    """Any two differ by at least 10 in CIELAB, about four times what is just noticeable."""
    seen = np.array([to_rgb(color) for color in COLORS])
    linear = np.where(seen <= 0.04045, seen / 12.92, ((seen + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.array(BLIND[eyes]).T, 0, 1) @ TO_XYZ.T / TO_XYZ.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e3 * np.eye(len(lab))
    assert apart.min() > 10
