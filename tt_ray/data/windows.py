"""Training windows over the token array: which start where, how they are padded, which targets count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tt_ray.data.tokens import TokenLayout


def split_episodes(
    count: int, validation_fraction: float, seed: int, fraction: float = 1.0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation episode numbers, sorted. At least one episode stays for training.

    `fraction` of the training episodes is used: a smaller share is part of a larger one, and which episodes
    are held out does not depend on it.
    """
    held_out = min(round(count * validation_fraction), count - 1)
    if validation_fraction > 0 and count > 1:
        held_out = max(held_out, 1)
    order = np.random.default_rng(seed).permutation(count)
    used = max(1, round((count - held_out) * fraction))
    return np.sort(order[held_out : held_out + used]), np.sort(order[:held_out])


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_of_step(seed: int, step: int, batch_size: int, count: int) -> NDArray[np.int64]:
    """Which of `count` windows step `step` (from 0) trains on, [batch_size].

    Every epoch is a new permutation; a batch may span two or more. A pure function of its arguments, so that
    training can be taken up at any step and every worker knows the whole batch.
    """
    chunks: list[NDArray[np.int64]] = []
    position, missing = step * batch_size, batch_size
    while missing > 0:
        epoch, offset = divmod(position, count)
        chunk = _epoch_order(seed, epoch, count)[offset : offset + missing]
        chunks.append(chunk)
        position, missing = position + len(chunk), missing - len(chunk)
    return np.concatenate(chunks)


def goals_of_step(seed: int, step: int, batch_size: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that choose the goals of step `step`'s windows, [batch_size].

    A pure function of its arguments, like `batch_of_step`, and independent of that.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, step), spawn_key=(1,))).random(batch_size)


def goals_of_windows(count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) that choose the goals of windows 0 to before `count` wherever these are compared."""
    return np.random.default_rng(0).random(count)


@dataclass(frozen=True)
class WindowSet:
    """Every window of W transitions that starts at a transition of the chosen episodes.

    A window that reaches past its episode's end is padded with the stop token. Targets in the padding count
    only after a real termination: after a time limit the future is unknown, not over. Hidden observations are
    no targets either.

    Where the layout has G goal slots, a window's goal is what a later row of its episode holds there: the
    episode's last row (relabel "last"), or one chosen evenly among those after the window's first ("future").
    """

    tokens: Tensor  # [T, D] resident, uint8 or int16
    starts: Tensor  # [count] row of each window's first transition
    ends: Tensor  # [count] one past the last row of its episode
    terminated: Tensor  # [count] whether that episode really terminated
    window: int
    layout: TokenLayout
    relabel: Literal["last", "future"] = "last"

    @classmethod
    def build(
        cls,
        tokens: NDArray[np.integer],
        offsets: NDArray[np.int64],
        terminated: NDArray[np.bool_],
        episodes: NDArray[np.int64],
        window: int,
        layout: TokenLayout,
        relabel: Literal["last", "future"] = "last",
    ) -> WindowSet:
        """Windows of the episodes numbered `episodes`; `terminated` is [T], by row."""
        starts = [np.arange(offsets[e], offsets[e + 1]) for e in episodes]
        ends = [np.full(len(rows), offsets[e + 1]) for e, rows in zip(episodes, starts, strict=True)]
        start = torch.from_numpy(np.concatenate(starts)) if starts else torch.zeros(0, dtype=torch.int64)
        end = torch.from_numpy(np.concatenate(ends)) if ends else torch.zeros(0, dtype=torch.int64)
        flags = torch.from_numpy(np.ascontiguousarray(terminated))
        ended = flags[end - 1] if len(end) else torch.zeros(0, dtype=torch.bool)
        array = torch.from_numpy(np.ascontiguousarray(tokens))
        return cls(array, start, end, ended, window, layout, relabel)

    def __len__(self) -> int:
        return len(self.starts)

    def to(self, device: torch.device) -> WindowSet:
        """The same set with its arrays resident on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "starts", "ends", "terminated")}
        return replace(self, **moved)

    def gather(self, indices: Tensor, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs [b, G + W * D - 1], targets [b, W * D - 1], and the mask of targets that count.

        `uniforms` [b] in [0, 1) choose the goals, which takes them with relabel "future" only.
        """
        tokens, counts = self._cut(indices)
        inputs = tokens[:, :-1]
        if self.layout.goal_dim:
            inputs = torch.cat([self._goals(indices, uniforms), inputs], dim=1)
        return inputs, tokens[:, 1:], counts[:, 1:]

    def count_targets(self, indices: Tensor) -> Tensor:
        """Targets that count in the windows `indices`; a scalar."""
        if self.layout.partial:
            return self._cut(indices)[1][:, 1:].sum()
        inside = (self.ends[indices] - self.starts[indices]).clamp(max=self.window)
        rows = torch.where(self.terminated[indices], self.window, inside)
        return (rows * self.layout.slots - 1).sum()

    def _cut(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [b, W * D] of whole windows, and which of them would count as targets."""
        rows = self.starts[indices, None] + torch.arange(self.window, device=self.starts.device)
        inside = rows < self.ends[indices, None]
        # Past the end lie the next episode's rows, or none: read what is there, then overwrite it.
        tokens = self.tokens[rows.clamp(max=len(self.tokens) - 1)].long()
        tokens = torch.where(inside[..., None], tokens, self.layout.stop_token).flatten(1)
        counts = inside | self.terminated[indices, None]
        mask = counts.repeat_interleave(self.layout.slots, dim=1)
        if self.layout.partial:
            mask = mask & (tokens != self.layout.hidden_token)
        return tokens, mask

    def _goals(self, indices: Tensor, uniforms: Tensor | None) -> Tensor:
        """Goal tokens [b, G] of windows."""
        starts, rows = self.starts[indices], self.ends[indices] - 1
        if self.relabel == "future":
            if uniforms is None:
                raise ValueError("goals of any later row take numbers that choose the row")
            # Of none but the first row itself the product is 0 and the row would be the next episode's.
            rows = torch.minimum(starts + 1 + (uniforms * (rows - starts)).long(), rows)
        return self.tokens[rows][:, list(self.layout.goal_slots)].long()
