"""Where results go: a journal on disk first, and from there to MLflow.

Importing this package imports neither mlflow nor pandas, so that training workers can write journals
without them.
"""

from tt_ray.tracking.connection import START_SERVER, START_SHARED_SERVER, connect
from tt_ray.tracking.courier import Courier
from tt_ray.tracking.journal import Journal, read
from tt_ray.tracking.mlflow_run import MlflowRun, MlflowTracker
from tt_ray.tracking.mlflow_store import send_leftovers
from tt_ray.tracking.results import download_checkpoint, results_table
from tt_ray.tracking.run import JournalTracker, MemoryTracker, Run, Tracker, open_journal, provenance_tags

__all__ = [
    "START_SERVER",
    "START_SHARED_SERVER",
    "Courier",
    "Journal",
    "JournalTracker",
    "MemoryTracker",
    "MlflowRun",
    "MlflowTracker",
    "Run",
    "Tracker",
    "connect",
    "download_checkpoint",
    "open_journal",
    "provenance_tags",
    "read",
    "results_table",
    "send_leftovers",
]
