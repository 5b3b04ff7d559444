"""Predicted beside true trajectories as pictures: rendered where a state can be set, as curves everywhere.

A MuJoCo environment's state can be set from an observation that holds its joint positions, all but the first
few, and then its velocities; those first positions are the way along x (and y), which follows from the
velocity. Shape letters: L states, R rollouts, H steps, N observation.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_ray.data.episodes import DataSpec
from tt_ray.evaluation.environments import make_environment
from tt_ray.evaluation.figure_parts import COLORS, SMALL, open_figure, tidy
from tt_ray.files import whole_file

logger = logging.getLogger(__name__)

Frame = NDArray[np.uint8]

SPEED = 25
"""Frames a second of a video: slower than life for most, so that steps can be told apart."""
BANDS = ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3))
"""Quantiles of the rollouts, and how dark the band between them is."""


class StateRenderer:
    """Renders observations of an environment whose state can be set from one; `of` says whether it can."""

    def __init__(self, env: Any, left_out: int) -> None:
        self.env, self.body, self.left_out = env, env.unwrapped, left_out

    @classmethod
    def of(cls, spec: DataSpec) -> StateRenderer | None:
        """A renderer for the data's environment; None, and one logged line why, where there can be none."""
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # what is tried first needs a display
        try:
            env = make_environment(
                spec.environment, observation_keys=spec.observation_keys,
                observation_dim=spec.observation_dim, render=True,
            )  # fmt: skip
        except Exception as error:  # no environment, or whatever a machine without OpenGL raises
            _say_why(spec, error)
            return None
        try:
            observation, _ = env.reset(seed=0)
            body = env.unwrapped
            left_out = int(body.model.nq + body.model.nv) - len(observation)
            renderer = cls(env, left_out)
            if left_out not in (0, 1, 2) or not renderer._returns(observation):
                raise ValueError("its state does not follow from an observation")
            env.render()
        except Exception as error:
            env.close()
            _say_why(spec, error)
            return None
        return renderer

    def frames(self, states: NDArray[np.float32]) -> list[Frame]:
        """RGB frames of states [L, N] that follow each other; none from the first NaN on."""
        place, frames = np.zeros(self.left_out), []
        for state in states:
            if not np.isfinite(state).all():
                break
            positions, velocities = self._split(state)
            self.body.set_state(np.concatenate([place, positions]), velocities)
            frames.append(np.asarray(self.env.render(), dtype=np.uint8))
            place = place + velocities[: self.left_out] * self.body.dt
        return frames

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _split(self, state: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Joint positions, the left out ones aside, and velocities."""
        known = int(self.body.model.nq) - self.left_out
        return state[:known].astype(np.float64), state[known:].astype(np.float64)

    def _returns(self, observation: NDArray[np.float32]) -> bool:
        """Whether a state set from an observation gives that observation."""
        positions, velocities = self._split(observation)
        self.body.set_state(np.concatenate([np.zeros(self.left_out), positions]), velocities)
        again = np.asarray(self.body._get_obs(), dtype=np.float64)[: len(observation)]
        return bool(np.allclose(again, observation, atol=1e-5))


def _say_why(spec: DataSpec, error: Exception) -> None:
    reason = " ".join(f"{error}".split()) or type(error).__name__
    logger.warning("no film strip of %s: %s", spec.environment.get("id", "the data"), reason)


def film_strip(rows: Mapping[str, Sequence[Frame]], steps: Sequence[int], path: Path) -> None:
    """Frames of several trajectories below each other at chosen steps, of which 0 is the start.

    A rollout that has ended by a step shows nothing there.
    """
    with open_figure(path, 1.5 * len(steps) + 0.4, 1.55 * len(rows) + 0.3) as figure:
        grid = figure.subplots(len(rows), len(steps), squeeze=False)
        for line, (label, frames) in zip(grid, rows.items(), strict=True):
            for axes, step in zip(line, steps, strict=True):
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if step < len(frames):
                    axes.imshow(frames[step])
            line[0].set_ylabel(label, fontsize=SMALL)
        for axes, step in zip(grid[0], steps, strict=True):
            axes.set_title("start" if step == 0 else f"step {step}", fontsize=SMALL)


def film(rows: Mapping[str, Sequence[Frame]], path: Path) -> None:
    """The same trajectories side by side as an mp4, left to right; one that ends early stays black."""
    import imageio.v2 as imageio

    length = max(len(frames) for frames in rows.values())
    blank = np.zeros_like(next(frame for frames in rows.values() for frame in frames))

    def beside(step: int) -> Frame:
        pictures = [frames[step] if step < len(frames) else blank for frames in rows.values()]
        return np.concatenate(pictures, axis=1)

    with whole_file(path) as file:
        imageio.mimwrite(file, [beside(step) for step in range(length)], fps=SPEED)


def state_strip(
    reference: NDArray[np.float32],
    rollouts: Mapping[str, NDArray[np.float32]],
    path: Path,
    names: Sequence[str],
) -> None:
    """What really followed [H, N] and bands of each model's rollouts [R, H, N], dimension by dimension."""
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    steps = np.arange(1, len(reference) + 1)
    with open_figure(path, 3.0 * columns, 1.7 * lines + 0.5) as figure:
        panels = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
        for n, (axes, name) in enumerate(zip(panels, names, strict=False)):
            for (label, drawn), color in zip(rollouts.items(), COLORS, strict=False):
                _bands(axes, steps, drawn[..., n], color, label)
            axes.plot(steps, reference[:, n], color="black", linewidth=1.5, label="what followed")
            axes.set_title(name, fontsize=SMALL, loc="left")
            axes.tick_params(labelsize=SMALL - 1)
            tidy(axes)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=len(labels), fontsize=SMALL, frameon=False
        )
        figure.supxlabel("steps predicted (bands: 50 % and 90 % of the rollouts)", fontsize=SMALL)


def _bands(axes: Any, steps: NDArray[np.int64], drawn: NDArray[np.float32], color: str, label: str) -> None:
    """Bands and median of rollouts [R, H] over the steps at which any is alive."""
    alive = np.isfinite(drawn).any(axis=0)
    steps, drawn = steps[alive], drawn[:, alive]
    for low, high, alpha in BANDS:
        edges = np.nanquantile(drawn, [low, high], axis=0)
        axes.fill_between(steps, *edges, color=color, alpha=alpha, linewidth=0)
    axes.plot(steps, np.nanquantile(drawn, 0.5, axis=0), color=color, linewidth=1.2, label=label)
