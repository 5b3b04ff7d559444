"""A tokenised data set on disk: made once for each (data, bins), read by every worker that trains on it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
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
        """Write `folder` whole or not at all; another process that was faster has written the same."""
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
        """Inverse of `save`."""
        arrays = load_file(folder / "tokens.safetensors")
        description = json.loads((folder / "tokens.json").read_text())
        return cls(
            arrays["tokens"],
            arrays["offsets"],
            arrays["terminated"],
            Discretizer.from_arrays(description["strategy"], arrays),
            TokenLayout.from_json(description["layout"]),
            DataSpec.from_json(description["data"]),
        )


def read_spec(folder: Path) -> DataSpec:
    """The data spec of the tokens in `folder`, without reading them."""
    return DataSpec.from_json(json.loads((folder / "tokens.json").read_text())["data"])
