"""A small sweep in MLflow, such as `tt-ray sweep` leaves one, made without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tt_ray.tracking.connection import prepare_environment

CAUSE = "RolloutError: actor 3 died 3 times in episode 17;\nsee its log"
SECONDS = {"seconds/training": 1200.0, "seconds/evaluation": 80.0, "seconds/waiting": 50.0}


class Study:
    """Makes and changes runs of one MLflow experiment."""

    def __init__(self, uri: str, name: str) -> None:
        prepare_environment()
        from mlflow import MlflowClient

        self.uri, self.name = uri, name
        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = self.client.create_experiment(name)

    def start(
        self,
        name: str,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> str:
        """A run under way; its id."""
        from mlflow.entities import Param

        tags = {key: str(value) for key, value in (tags or {}).items()}
        tags |= {"mlflow.parentRunId": parent} if parent else {}
        run_id = self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id
        self.client.log_batch(
            run_id, params=[Param(key, str(value)) for key, value in (params or {}).items()]
        )
        return str(run_id)

    def sweep(self, name: str = "bins") -> str:
        """A sweep under way, without trials yet; its id."""
        return self.start(name, tags={"kind": "sweep", "search.metric": "score/mean"})

    def trial(
        self, sweep: str, index: int, seed: int = 0, fingerprint: str | None = None, **settings: Any
    ) -> str:
        """A trial under way with `settings` of the planner; its id."""
        name = ", ".join(f"{key}={value}" for key, value in settings.items())
        tags = {
            "kind": "trial",
            "trial": fingerprint or f"{index:016x}",
            "trial.name": name,
            "trial.index": index,
            "seed": seed,
        }
        params = {"model.embed_dim": 16, "seed": seed} | {f"planner.{k}": v for k, v in settings.items()}
        return self.start(f"{name} seed {seed}", sweep, params, tags | {"trial.case": ""})

    def log(self, run_id: str, metrics: Mapping[str, float], step: int = 1) -> None:
        """Metrics of a run."""
        from mlflow.entities import Metric

        self.client.log_batch(run_id, metrics=[Metric(key, value, 0, step) for key, value in metrics.items()])

    def end(self, run_id: str, status: str = "FINISHED", **tags: str) -> None:
        """End a run, with its last tags (`trial.status` as `trial_status`)."""
        for key, value in tags.items():
            self.client.set_tag(run_id, key.replace("_", "."), value)
        self.client.set_terminated(run_id, status)

    def score(self, run_id: str, mean: float, **more: float) -> None:
        """The metrics of an evaluated trial."""
        bounds = {"score/ci_low": mean - 2.0, "score/ci_high": mean + 3.0}
        self.log(
            run_id, {"score/mean": mean, **bounds, "return/mean": 100 * mean, "val/loss": 4.5, **SECONDS}
        )
        self.log(run_id, more)


def make_study(uri: str, name: str = "a study") -> tuple[Study, dict[str, str]]:
    """A sweep in which one run of each kind is found, and beside it a run that is no sweep's; ids by name."""
    study = Study(uri, name)
    plain = study.start("plain", params={"planner.horizon": 7, "model.embed_dim": 16})
    study.score(plain, 50.0)
    study.end(plain)
    sweep = study.sweep()
    ids = {"plain": plain, "sweep": sweep}
    for name, index, seed in (("stopped", 10, 0), ("failed", 1, 1), ("finished", 1, 0), ("running", 2, 0)):
        ids[name] = study.trial(sweep, index, seed, horizon=5 * index, beam_width=128)
    study.score(ids["finished"], 70.0)
    study.end(ids["finished"], trial_status="finished", reused="")
    study.end(ids["failed"], "FAILED", trial_status="failed", error=CAUSE, reused="tokens")
    study.score(ids["stopped"], 60.0)
    study.log(ids["stopped"], {"seconds/saved": 1230.0})
    study.end(ids["stopped"], trial_status="stopped", reused="tokens, model 0, 20 episodes (planner, seed 0)")
    study.log(ids["running"], {"val/loss": 4.75})
    winner = {"mean": 70.0, "ci_low": 68.0, "ci_high": 73.0}
    study.log(sweep, {f"best/score/{part}": value for part, value in winner.items()} | {"best/val/loss": 4.5})
    study.log(
        sweep, {"best/score/seed_std": 8.25, "best/val/loss_observation": 9.75, "best/return/mean": 7000}
    )
    study.log(sweep, {"data/return/mean": 3120.0, "data/score/mean": 44.5})
    study.log(sweep, {f"confirmed/score/{part}": value - 4 for part, value in winner.items()})
    return study, ids
