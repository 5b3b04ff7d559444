"""Videos of recorded episodes: a process of its own takes the same actions once more, and draws.

Drawing so keeps away from the episode that counts; OpenGL, which is chosen once in a process and may end it,
from everything else; and the number of frames is known in advance. `python -m tt_ray.evaluation.camera FILE`
is that process; its request is a JSON file beside the actions.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tt_ray.data.episodes import DataSpec
from tt_ray.errors import UserError
from tt_ray.evaluation.environments import FlatEnvironment, make_environment
from tt_ray.evaluation.replay import Recording
from tt_ray.files import whole_file

Frame = NDArray[np.uint8]

MOST_FRAMES = 240
"""A frame takes a CPU about 30 ms; longer episodes leave steps out."""
SMOOTH, SLOWEST = 30, 15
"""Frames a second: more are not asked for, fewer look like a slide show, so time is sped up."""
SIZE = 320
"""Pixels of a frame's side, where the environment lets itself be told."""
PATIENCE = 600.0
"""Seconds for a film."""
FINAL = 3
"""Exit code of the drawing process where nothing else to draw with would help."""


class NoVideoError(Exception):
    """Why there is no video, in one line."""


def make_video(recording: Recording, spec: DataSpec, max_steps: int | None, path: Path) -> None:
    """The recorded episode as an mp4 in `path`, whole or not at all; `NoVideoError` where it cannot be drawn.

    Drawn with OpenGL by EGL or else OSMesa where there is no display, or as MUJOCO_GL says.
    """
    name = spec.environment.get("id", "the environment")
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        film = Path(folder) / "film.mp4"
        np.save(Path(folder) / "actions.npy", recording.actions, allow_pickle=False)
        facts = {"seed": recording.seed, "rewards": recording.rewards.tolist(), "max_steps": max_steps}
        request.write_text(json.dumps({**facts, "spec": spec.to_json(), "film": str(film)}))
        causes: dict[str, str] = {}
        for backend in backends():
            cause, final = _draw_apart(request, backend)
            if cause is None:
                with whole_file(path) as temporary:
                    temporary.write_bytes(film.read_bytes())
                return
            if final:
                raise NoVideoError(f"no video of {name}: {cause}")
            causes.setdefault(cause, f"{backend}: {cause}" if backend else cause)
    raise NoVideoError(f"no video of {name}: it cannot be drawn here ({'; '.join(causes.values())})")


def backends() -> list[str]:
    """What to draw with, in the order of trying; empty: whatever this machine draws with."""
    if os.environ.get("MUJOCO_GL"):
        return [os.environ["MUJOCO_GL"]]
    if sys.platform != "linux" or os.environ.get("DISPLAY"):
        return [""]
    return ["egl", "osmesa"]


def _draw_apart(request: Path, backend: str) -> tuple[str | None, bool]:
    """Draw in a process of its own; None, or in a line why that failed, and whether that is final."""
    command = [sys.executable, "-m", "tt_ray.evaluation.camera", str(request)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"} | ({"MUJOCO_GL": backend} if backend else {})
    environment |= {"SDL_VIDEODRIVER": os.environ.get("SDL_VIDEODRIVER", "dummy")}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {PATIENCE:.0f} s", True
    if done.returncode == 0:
        return None, True
    last = done.stderr.strip().splitlines()[-1:]
    cause = last[0] if last and done.returncode > 0 else f"the drawing process died ({done.returncode})"
    return cause, done.returncode == FINAL


def main(request: Path) -> None:
    """Draw what `make_video` has asked for; where that fails, the last line on stderr says why."""
    asked = json.loads(request.read_text())
    actions = np.load(request.with_name("actions.npy"), allow_pickle=False)
    try:
        _film(asked, actions)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(FINAL)
    except Exception as error:  # an environment's, OpenGL's or ffmpeg's, whatever it is
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


def _film(asked: dict[str, Any], actions: NDArray[np.float32]) -> None:
    import imageio.v2 as imageio

    spec = DataSpec.from_json(asked["spec"])
    env = make_environment(
        spec.environment, observation_keys=spec.observation_keys, max_steps=asked["max_steps"], render=True
    )
    speed = float(env.metadata.get("render_fps") or SMOOTH)
    stride = max(1, round(speed / SMOOTH), math.ceil(len(actions) / MOST_FRAMES))
    fps = min(SMOOTH, max(SLOWEST, speed / stride))
    faster = fps * stride / speed
    pace = "" if abs(faster - 1) < 0.1 else f"   {faster:.1f}x speed"
    writer: Any = imageio.get_writer(asked["film"], fps=fps, macro_block_size=2, quality=7)
    with writer:
        for step, total, frame in _frames(env, asked, actions, stride):
            writer.append_data(captioned(frame, f"step {step}   return {total:.1f}{pace}"))
    env.close()


def _frames(
    env: FlatEnvironment, asked: dict[str, Any], actions: NDArray[np.float32], stride: int
) -> Iterator[tuple[int, float, Frame]]:
    """Steps so far, return so far, and the frame, of every `stride`-th step and the last."""
    env.reset(seed=asked["seed"])
    total = 0.0
    yield 0, total, _first(env)
    for step, (action, expected) in enumerate(zip(actions, asked["rewards"], strict=True), start=1):
        reward = env.step(action)[1]
        if not math.isclose(reward, expected, rel_tol=1e-6, abs_tol=1e-6):
            raise UserError(f"the same actions gave another reward at step {step}: {reward}, not {expected}")
        total += reward
        if step % stride == 0 or step == len(actions):
            yield step, total, np.asarray(env.render(), dtype=np.uint8)


def _first(env: FlatEnvironment) -> Frame:
    """The first frame; MuJoCo is told how large, and to leave out shadows, which take most of the time."""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None:
        import mujoco

        renderer.width = renderer.height = SIZE
        # The camera that goes along, where the model has one: by default the body soon leaves the picture.
        along = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        renderer.camera_id = along if along >= 0 else renderer.camera_id
    frame = np.asarray(env.render(), dtype=np.uint8)
    if frame.ndim != 3 or frame.std() == 0:
        raise RuntimeError("what it draws is empty")
    scene = getattr(getattr(renderer, "viewer", None), "scn", None)
    if scene is None:
        return frame
    scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return np.asarray(env.render(), dtype=np.uint8)


def captioned(frame: Frame, text: str) -> Frame:
    """A frame [h, w, 3] with a line of text below it, its sides even as the codec wants them."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
    strip = Image.new("RGB", (width, 22), "white")
    ImageDraw.Draw(strip).text((6, 3), text, fill="black", font=ImageFont.load_default(13))
    return np.concatenate([frame[:height, :width], np.asarray(strip, dtype=np.uint8)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
