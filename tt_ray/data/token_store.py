"""A tokenised data set on disk: made once for each (data, bins), read by every worker that trains on it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tt_ray.config import DatasetConfig, DiscretizerConfig, GoalConfig
from tt_ray.data.discretizer import Discretizer
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.tokens import TokenLayout, fit_tokens
from tt_ray.errors import UserError
from tt_ray.plain import MALFORMED, convert, read_json


@dataclass(frozen=True)
class TokenSet:
    """Everything that training needs of a data set."""

    tokens: NDArray[np.integer]  # [T, D]
    offsets: NDArray[np.int64]  # [E + 1]
    terminated: NDArray[np.bool_]  # [T]
    discretizer: Discretizer
    layout: TokenLayout
    spec: DataSpec

    @classmethod
    def build(
        cls,
        episodes: Episodes,
        dataset: DatasetConfig,
        discretizer: DiscretizerConfig,
        goal: GoalConfig | None = None,
    ) -> TokenSet:
        """Fit the bins to `episodes`, loaded with the same `goal`, and encode them."""
        tokens, bins, layout = fit_tokens(episodes, dataset, discretizer, goal)
        return cls(tokens, episodes.offsets, episodes.terminated, bins, layout, episodes.spec)

    def save(self, folder: Path) -> None:
        """Write `folder` whole or not at all; another process that was faster has written the same.

        `UserError` where the disk is full or cannot be written.
        """
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.mkdir(parents=True)
            arrays = {"tokens": self.tokens, "offsets": self.offsets, "terminated": self.terminated}
            save_file({**arrays, **self.discretizer.to_arrays()}, temporary / "tokens.safetensors")
            description = {
                "strategy": self.discretizer.strategy,
                "layout": self.layout.to_json(),
                "data": self.spec.to_json(),
            }
            (temporary / "tokens.json").write_text(json.dumps(description, indent=1))
            os.rename(temporary, folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not folder.exists():
                raise UserError(f"{folder}: cannot write the tokens: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> TokenSet:
        """Inverse of `save`; `UserError` where the files are damaged."""
        with _reading(folder):
            arrays = load_file(folder / "tokens.safetensors")
            description = read_json(folder / "tokens.json")
            found = cls(
                arrays["tokens"],
                arrays["offsets"],
                arrays["terminated"],
                Discretizer.from_arrays(convert(str, description["strategy"]), arrays),
                TokenLayout.from_json(description["layout"]),
                DataSpec.from_json(description["data"]),
            )
            found._check()
            return found

    def _check(self) -> None:
        """`ValueError` where the parts do not fit together."""
        layout, bins, offsets, rows = self.layout, self.discretizer, self.offsets, len(self.tokens)
        widths = [(one.observation_dim, one.action_dim) for one in (self.spec, layout)]
        sizes = [(bins.dims, bins.num_bins), (layout.slots, layout.num_bins)]
        if self.tokens.shape != (rows, layout.slots) or widths[0] != widths[1] or sizes[0] != sizes[1]:
            raise ValueError("they are not of the size that tokens.json says")
        if self.tokens.dtype.kind not in "ui" or not 0 <= self.tokens.min() <= self.tokens.max():
            raise ValueError("they are no tokens")
        if self.tokens.max() > layout.stop_token + layout.partial:
            raise ValueError("they are of more bins than there are")
        if self.terminated.shape != (rows,) or self.terminated.dtype != np.bool_:
            raise ValueError("it is not known where episodes terminate")
        ascending = offsets.ndim == 1 and len(offsets) > 1 and (np.diff(offsets) > 0).all()
        if offsets.dtype != np.int64 or not ascending or (offsets[0], offsets[-1]) != (0, rows):
            raise ValueError("it is not known where episodes begin")


def read_spec(folder: Path) -> DataSpec:
    """The data spec of the tokens in `folder`, without reading them; `UserError` where it is damaged."""
    with _reading(folder):
        return DataSpec.from_json(read_json(folder / "tokens.json")["data"])


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (*MALFORMED, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{folder}: damaged tokens ({reason}); remove it, and they are made again") from error
