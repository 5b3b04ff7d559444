"""Small studies in a real MLflow database, as `tt-ray sweep` leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

CASES = {"hopper-medium": "d4rl/hopper/medium-v2", "cheetah": "mujoco/halfcheetah/medium-expert-v0"}
STRATEGIES = ("uniform", "quantile")
SEEDS = (0, 1, 2)
EPISODES = (100, 101, 102, 103)
FRESH = (900, 901, 902)
MISSING = ("hopper-medium", "quantile", 2)  # a cell that has not been computed yet
FAILED = ("cheetah", "uniform")


def score_of(case: str, strategy: str, seed: int, episode: int, shift: float = 0.0) -> float:
    """Some number for every episode; the quantile bins are better, episodes and seeds differ."""
    level = {"hopper-medium": 50.0, "cheetah": 80.0}[case] + (9.0 if strategy == "quantile" else 0.0)
    return level + 3.0 * seed + (episode * 7 % 11) + (seed * episode % 5) * 0.5 + shift


@dataclass
class Written:
    """What went into MLflow."""

    uri: str
    name: str
    run_id: str
    trials: pd.DataFrame
    episodes: pd.DataFrame
    cells: dict[tuple[int, int], str] = field(default_factory=dict)
    """MLflow run id by (trial index, training seed)."""


class StudyWriter:
    """Writes one sweep into an MLflow database."""

    def __init__(self, uri: str, name: str, folder: Path) -> None:
        from mlflow import MlflowClient

        self.uri, self.name, self.folder = uri, name, folder
        self.client = MlflowClient(tracking_uri=uri)
        location = (folder / "artifacts").as_uri()
        self.experiment = self.client.create_experiment(f"study of {name}", artifact_location=location)
        folder.mkdir(parents=True, exist_ok=True)

    def parent(self, trials: pd.DataFrame, episodes: pd.DataFrame | None, **tags: str) -> str:
        """The sweep's run with its tables."""
        tags = {"kind": "sweep", "sweep": self.name, "search.metric": "score/mean", **tags}
        run = self.client.create_run(self.experiment, tags=tags, run_name=self.name)
        for name, frame in (("trials", trials), ("episodes", episodes)):
            if frame is not None:
                frame.to_parquet(self.folder / f"{name}.parquet")
                self.client.log_artifact(run.info.run_id, str(self.folder / f"{name}.parquet"))
        return run.info.run_id

    def cell(
        self, parent: str, trial: pd.Series, seed: int, params: Mapping[str, Any], curve: list[float] | None
    ) -> str:
        """One trial with one training seed; `curve` is its validation loss every 100 steps."""
        tags = {
            "mlflow.parentRunId": parent,
            "kind": "trial",
            "trial": trial["fingerprint"],
            "trial.index": str(trial["index"]),
            "trial.case": trial["case"],
            "seed": str(seed),
            "stage.model": f"model of {trial['trial']} {seed}" if curve else "",
        }
        run = self.client.create_run(self.experiment, tags=tags, run_name=f"{trial['trial']} seed {seed}")
        for key, value in {**params, "seed": seed}.items():
            self.client.log_param(run.info.run_id, key, value)
        for i, loss in enumerate(curve or []):
            self.client.log_metric(run.info.run_id, "val/loss", loss, step=100 * i)
        return run.info.run_id


def write_study(
    uri: str, name: str, folder: Path, shift: float = 0.0, before: Sequence[pd.Series] = ()
) -> Written:
    """2 cases x 2 strategies x 3 seeds x 4 episodes; one trial failed, and one cell is missing.

    MLflow also has a cell of each trial in `before`, which the tables do not have.
    """
    rows, episodes = [], []
    for index, (case, strategy) in enumerate((c, s) for c in CASES for s in STRATEGIES):
        trial = f"{case}, strategy={strategy}"
        row: dict[str, Any] = {"index": index, "trial": trial, "fingerprint": f"f{index}", "case": case}
        row |= {"status": "finished", "cause": "", "discretizer.strategy": strategy, "reused": "tokens"}
        if (case, strategy) == FAILED:
            row |= {"status": "failed", "cause": "OSError: no space left on device", "reused": ""}
        else:
            seeds = [seed for seed in SEEDS if (case, strategy, seed) != MISSING]
            best = strategy == "quantile" and case == "cheetah"
            for seed in seeds:
                for episode in (*EPISODES, *(FRESH if best else ())):
                    score = score_of(case, strategy, seed, episode, shift)
                    place = {"trial_index": index, "trial": trial, "fingerprint": f"f{index}", "case": case}
                    place |= {"training_seed": seed}
                    result = {"seed": episode, "episode_return": 30.0 * score, "score": score}
                    episodes.append({**place, **result, "fresh": episode in FRESH})
            row |= _aggregates([e for e in episodes if e["trial_index"] == index], seeds)
            row |= {"speed/latency_p50_ms": 20.0 + 5.0 * index, "seconds": 100.0, "saved": 50.0}
        rows.append(row)
    trials, played = pd.DataFrame(rows), pd.DataFrame(episodes)
    writer = StudyWriter(uri, name, folder)
    tags = {"question": "Do quantile bins beat uniform bins?", "search.method": "grid"}
    written = Written(uri, name, writer.parent(trials, played, **tags), trials, played)
    for trial in before:
        params = {"dataset.id": "d4rl/walker2d/medium-v2", "planner.horizon": 99}
        writer.cell(written.run_id, trial, 0, params, [9.0, 8.0])
    for _, trial in trials.iterrows():
        for seed in SEEDS:
            if (trial["case"], trial["discretizer.strategy"], seed) != MISSING:
                params = {
                    "dataset.id": CASES[trial["case"]],
                    "discretizer.strategy": trial["discretizer.strategy"],
                    "planner.horizon": 5 + int(shift),
                }
                curve = None if trial["status"] == "failed" else list(4.0 / (1.0 + np.arange(6)) + 0.1 * seed)
                cell = writer.cell(written.run_id, trial, seed, params, curve)
                written.cells[int(trial["index"]), seed] = cell
    return written


def _aggregates(episodes: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    usual = np.array([e["score"] for e in episodes if not e["fresh"]])
    fresh = np.array([e["score"] for e in episodes if e["fresh"]])
    figures = {"seeds": len(seeds), "episodes": len(usual), "score/mean": usual.mean()}
    figures |= {"score/ci_low": usual.mean() - 1.5, "score/ci_high": usual.mean() + 1.5}
    if len(fresh):
        figures["confirmed/mean"] = fresh.mean()
        figures |= {"confirmed/ci_low": fresh.mean() - 2.0, "confirmed/ci_high": fresh.mean() + 2.0}
    return figures
