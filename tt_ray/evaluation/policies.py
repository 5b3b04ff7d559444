"""Policies to compare planners with, without torch: random actions, and the linear ones of random search."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike, NDArray


class RandomPolicy:
    """Actions uniform within the bounds: the baseline whose return is normalised score 0."""

    def __init__(self, low: ArrayLike, high: ArrayLike, slots: int = 1) -> None:
        self.slots = slots
        self._low = np.asarray(low, dtype=np.float32)
        self._high = np.asarray(high, dtype=np.float32)
        self._streams: dict[int, np.random.Generator] = {}

    def add(self, episode: int, seed: int, observation: NDArray[np.float32]) -> None:
        """Start an episode with a random stream of its own."""
        # The environment draws its start from default_rng(seed): the extra word keeps the two streams apart.
        self._streams[episode] = np.random.default_rng([seed, 1])

    def act(self, episodes: Collection[int] | None = None) -> dict[int, NDArray[np.float32]]:
        """An action [M] for each of `episodes`, or for all."""
        return {
            key: self._draw(self._streams[key]) for key in (self._streams if episodes is None else episodes)
        }

    def _draw(self, stream: np.random.Generator) -> NDArray[np.float32]:
        return stream.uniform(self._low, self._high).astype(np.float32)

    def observe(
        self, episode: int, action: NDArray[np.float32], reward: float, next_observation: NDArray[np.float32]
    ) -> None:
        """Nothing to learn."""

    def remove(self, episode: int) -> None:
        """Free the episode's slot."""
        del self._streams[episode]


class Deterministic:
    """A deterministic policy of the present observation alone; derived classes have `_apply`."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._observations: dict[int, NDArray[np.float32]] = {}

    def add(self, episode: int, seed: int, observation: NDArray[np.float32]) -> None:
        """Start an episode; the policy is deterministic and leaves `seed` alone."""
        self._observations[episode] = observation

    def act(self, episodes: Collection[int] | None = None) -> dict[int, NDArray[np.float32]]:
        """An action [M] for each of `episodes`, or for all."""
        # One product per episode: a batched one would round differently with the number of neighbours.
        chosen = self._observations if episodes is None else episodes
        return {key: self._apply(self._observations[key]) for key in chosen}

    def _apply(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        raise NotImplementedError

    def observe(
        self, episode: int, action: NDArray[np.float32], reward: float, next_observation: NDArray[np.float32]
    ) -> None:
        """Remember where the episode is now."""
        self._observations[episode] = next_observation

    def remove(self, episode: int) -> None:
        """Free the episode's slot."""
        del self._observations[episode]


class LinearPolicy(Deterministic):
    """Actions weights @ ((observation - mean) / std), the form that random search learns."""

    def __init__(self, weights: ArrayLike, mean: ArrayLike, std: ArrayLike, slots: int = 1) -> None:
        super().__init__(slots)
        self._weights = np.asarray(weights, dtype=np.float64)  # [M, N]
        self._mean = np.asarray(mean, dtype=np.float64)  # [N]
        self._std = np.asarray(std, dtype=np.float64)  # [N]

    def _apply(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        return (self._weights @ ((observation - self._mean) / self._std)).astype(np.float32)
