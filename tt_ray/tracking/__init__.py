"""Where results go: a journal on disk first, and from there to MLflow.

Importing this package imports neither mlflow nor pandas, so that training workers can write journals
without them.
"""

from tt_ray.tracking.connection import START_SERVER, START_SHARED_SERVER, connect
from tt_ray.tracking.courier import Courier
from tt_ray.tracking.journal import Journal, read
from tt_ray.tracking.mlflow_run import MlflowRun, MlflowTracker
from tt_ray.tracking.mlflow_store import MlflowStore, send_leftovers
from tt_ray.tracking.registry import NOTE, Champion, experiment_page, register, show_runs
from tt_ray.tracking.results import download_checkpoint, results_table
from tt_ray.tracking.run import JournalTracker, MemoryTracker, Run, Tracker, open_journal, provenance_tags
from tt_ray.tracking.system import system_metrics

__all__ = [
    "NOTE",
    "START_SERVER",
    "START_SHARED_SERVER",
    "Champion",
    "Courier",
    "Journal",
    "JournalTracker",
    "MemoryTracker",
    "MlflowRun",
    "MlflowStore",
    "MlflowTracker",
    "Run",
    "Tracker",
    "connect",
    "download_checkpoint",
    "experiment_page",
    "open_journal",
    "provenance_tags",
    "read",
    "register",
    "results_table",
    "send_leftovers",
    "show_runs",
    "system_metrics",
]
