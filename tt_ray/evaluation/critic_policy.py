"""The policy that was extracted with a critic, as one to compare planners with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tt_ray.evaluation.policies import Deterministic
from tt_ray.model.critic import CriticCheckpoint


class CriticPolicy(Deterministic):
    """Mean actions of the policy that was extracted with a critic (IQL's own), within the bounds."""

    def __init__(self, checkpoint: CriticCheckpoint, slots: int = 1) -> None:
        super().__init__(slots)
        self._critic, spec = checkpoint.critic, checkpoint.spec
        self._low = np.asarray(spec.action_low, dtype=np.float32)
        self._high = np.asarray(spec.action_high, dtype=np.float32)
        self._goal_dim = spec.goal_dim

    @torch.inference_mode()
    def _apply(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        action = self._critic.act(torch.from_numpy(np.array(observation[self._goal_dim :])))
        return np.clip(action.numpy(), self._low, self._high)
