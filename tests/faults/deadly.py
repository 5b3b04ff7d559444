"""An environment that kills the process it is stepped in, until a file says that it is mended."""

import os
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

MENDED = "DEADLY_MENDED"
"""Environment variable with the path of that file."""


class Deadly(PendulumEnv):
    def step(self, action: Any) -> Any:
        if not Path(os.environ[MENDED]).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


gym.register("Deadly-v0", entry_point=Deadly, max_episode_steps=200)
