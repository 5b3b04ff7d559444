"""Trains once for each file operation of a training, killed by SIGKILL just before it, and resumes.

Usage: python die_everywhere.py FOLDER; prints one JSON line for each operation. A child is forked for each
trial: the kill is real, and nothing that would tidy up after an exception gets to run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch._dynamo  # noqa: F401  # the optimizer would import it in every child

from tt_ray.distributed import train
from tt_ray.distributed.cluster import Allocation
from tt_ray.model.checkpoint import checkpoint_folders, load_checkpoint, load_training_state

STEPS = 3  # each with a checkpoint; the third makes an older one go
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def before_each_operation(below: Path, call: Callable[[str], None]) -> None:
    """From now on `call` gets the name of each file operation below a folder, before it is done."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS:
            # What rmtree removes it names relative to the folder's file descriptor, the last argument.
            inside = event in ("os.remove", "os.rmdir") and arguments[-1] != -1
            if inside or str(arguments[0]).startswith(str(below)):
                call(f"{event} {Path(str(arguments[0])).name}")

    sys.addaudithook(hook)


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a process of its own; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Trial:
    """A training in a folder of its own, killed before the operation numbered `fatal` (from 1)."""

    def __init__(self, folder: Path, fatal: int) -> None:
        self.folder, self.fatal, self.count = folder, fatal, 0
        self.log = folder / "operations"
        folder.mkdir()
        self.config = tiny.experiment(folder, steps=STEPS, validate_every=1)
        self.tokens, self.model = tiny.prepare(self.config)

    def train(self) -> None:
        train.train_model(self.config, self.tokens, self.model, 0, Allocation())

    def die(self) -> None:
        with self.log.open("w", buffering=1) as log:

            def call(operation: str) -> None:
                self.count += 1
                log.write(operation + "\n")
                if self.count == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

            before_each_operation(self.model, call)
            self.train()

    def operations(self) -> list[str]:
        return self.log.read_text().splitlines()


def main(folder: Path) -> None:
    undisturbed = Trial(folder / "undisturbed", fatal=0)
    assert in_child(undisturbed.die) == 0
    for fatal in range(1, len(undisturbed.operations()) + 1):
        trial = Trial(folder / str(fatal), fatal)
        assert in_child(trial.die) == -signal.SIGKILL
        whole = checkpoint_folders(trial.model)
        for checkpoint in whole:
            load_checkpoint(checkpoint)
            load_training_state(checkpoint)
        left = tiny.leftovers(trial.model)
        assert in_child(trial.train) == 0
        tiny.assert_same(trial.model, undisturbed.model, STEPS)
        assert train.steps_done(trial.model) == STEPS
        assert tiny.leftovers(trial.folder) == []
        report = {
            "operation": trial.operations()[-1],
            "checkpoints": [path.name for path in whole],
            "left": left,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
