"""Processes that compute stages of a store, to be killed; each prints or returns what it has seen.

python stage_worker.py one ROOT KEY UNITS      computes one stage, printing a line for each thing it does
python stage_worker.py crowd ROOT SEED KILLS   many processes, killed and stopped at random; prints JSON
python stage_worker.py spread ROOT SEED KILLS  the same, each as if on a host of its own
python stage_worker.py everywhere ROOT         killed before each file operation in turn; prints JSON
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from tt_ray.distributed import holders
from tt_ray.distributed.claims import Timing
from tt_ray.distributed.stages import Stage, StageStore
from tt_ray.errors import UserError

KEYS = [f"{number:016x}" for number in range(40)]
WORKERS = 8
UNITS = 4
OPERATIONS = ("open", "os.listdir", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
FAST = Timing(heartbeat=0.05, expiry=0.4, poll=0.05)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def work(stage: Stage, units: int, pause: float) -> None:
    """Append `units` numbered lines in all, going on after those that are there."""
    stage.path.mkdir(parents=True, exist_ok=True)
    file = stage.path / "work.txt"
    for unit in range(len(lines(file)), units):
        with file.open("a") as stream:
            stream.write(f"{unit}\n")
        time.sleep(pause)


def one(root: Path, key: str, units: int) -> None:
    with StageStore(root).claim(
        "models", key, on_wait=lambda seconds, holder: print(f"waits for {holder}", flush=True)
    ) as stage:
        if stage.complete:
            print("reuses", flush=True)
            return
        print(f"begins at {len(lines(stage.path / 'work.txt'))}", flush=True)
        work(stage, units, 0.05)
        stage.publish({"units": units})
    print("publishes", flush=True)


class Member:
    """One process of the crowd: computes every stage that it can get hold of."""

    def __init__(self, root: Path, seed: int, spread: bool) -> None:
        self.root, self.random, self.spread = root, random.Random(seed), spread
        self.store = StageStore(root / "store", FAST)
        if spread:
            holders._machine = lambda: f"{seed:08x}"

    def __call__(self) -> None:
        sys.addaudithook(self.dawdle)
        # Most of them all want the same one at the same moment.
        for key in KEYS if self.random.random() < 0.75 else self.random.sample(KEYS, len(KEYS)):
            with self.store.claim("models", key) as stage:
                if not stage.complete:
                    self.compute(stage)

    def dawdle(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Pause before some file operations, so that others come in between that and the one before."""
        if event in OPERATIONS and self.random.random() < 0.1:
            time.sleep(self.random.uniform(0, 0.01))

    def compute(self, stage: Stage) -> None:
        self.note("begun", stage.key)
        witness = self.root / "holding" / stage.key
        if not self.spread:  # there, one that is stopped has lost the claim and does not know it yet
            self.enter(witness)
        if (stage.path / "stage.json").exists():
            self.note("violations", f"{stage.key} was complete when {os.getpid()} began")
        work(stage, UNITS, self.random.uniform(0.001, 0.03))
        if not self.spread:
            witness.unlink()
        try:
            stage.publish({"process": os.getpid()}, inputs=[("tokens", KEYS[0])])
            self.note("published", stage.key)
        except UserError as error:
            self.note("refused", str(error))

    def enter(self, witness: Path) -> None:
        """Nobody else alive may be where this process is now."""
        try:
            with witness.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            other = int(witness.read_text() or 0)
            if other and psutil.pid_exists(other) and psutil.Process(other).status() != "zombie":
                self.note("violations", f"{witness.name} held by {other} and {os.getpid()}")
            witness.unlink()
            self.enter(witness)

    def note(self, file: str, line: str) -> None:
        with (self.root / file).open("a") as stream:
            stream.write(line + "\n")


def crowd(root: Path, seed: int, kills: int, spread: bool) -> dict[str, Any]:
    """Start the crowd, kill `kills` of them and stop some others, and let the rest finish."""
    (root / "holding").mkdir(parents=True)
    choose = random.Random(seed)
    children = [start(root, choose.randrange(2**31), spread) for _ in range(WORKERS)]
    done = {"kills": 0, "stops": 0}
    while done["kills"] < kills and len(set(lines(root / "published"))) < len(KEYS):
        time.sleep(choose.uniform(0.002, 0.02))
        victim = choose.randrange(WORKERS)
        if choose.random() < 0.8:
            os.kill(children[victim], signal.SIGKILL)
            os.waitpid(children[victim], 0)
            children[victim] = start(root, choose.randrange(2**31), spread)
            done["kills"] += 1
        else:
            os.kill(children[victim], signal.SIGSTOP)
            time.sleep(2 * FAST.expiry if spread else 0.1)
            os.kill(children[victim], signal.SIGCONT)
            done["stops"] += 1
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    store = StageStore(root / "store")
    return {
        **done,
        "codes": codes,
        "complete": sum(store.find("models", key) is not None for key in KEYS),
        "begun": len(lines(root / "begun")),
        "published": len(lines(root / "published")),
        "twice": [key for key, count in Counter(lines(root / "published")).items() if count > 1],
        "refused": len(lines(root / "refused")),
        "violations": lines(root / "violations"),
        "left": sorted(path.name for path in (root / "store" / "models").glob(".*")),
    }


def start(root: Path, seed: int, spread: bool) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            Member(root, seed, spread)()
            status = 0
        finally:
            os._exit(status)
    return pid


class Trial:
    """One stage, computed by a process that is killed before the file operation numbered `fatal` (from 1)."""

    def __init__(self, root: Path, fatal: int) -> None:
        self.root, self.fatal, self.count = root, fatal, 0
        self.operations: list[str] = []
        root.mkdir(parents=True)

    def compute(self) -> None:
        store = StageStore(self.root / "store")
        with store.claim("models", KEYS[0]) as stage:
            if not stage.complete:
                work(stage, 2, 0.0)
                stage.publish({})

    def die(self) -> None:
        from die_everywhere import before_each_operation

        def call(operation: str) -> None:
            self.count += 1
            with (self.root / "operations").open("a") as file:
                file.write(operation + "\n")
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        before_each_operation(self.root / "store", call)
        self.compute()

    def outcome(self) -> dict[str, Any]:
        """Kill, look, go on."""
        from die_everywhere import in_child

        killed = in_child(self.die)
        store = StageStore(self.root / "store")
        found = store.find("models", KEYS[0])
        again = in_child(self.compute)
        path = store.path("models", KEYS[0])
        return {
            "operation": lines(self.root / "operations")[self.fatal - 1],
            "killed": killed,
            "complete": found is not None,
            "again": again,
            "work": lines(path / "work.txt"),
            "left": sorted(file.name for file in (self.root / "store" / "models").rglob("*")),
        }


def everywhere(root: Path) -> list[dict[str, Any]]:
    from die_everywhere import in_child

    undisturbed = Trial(root / "undisturbed", 0)
    assert in_child(undisturbed.die) == 0
    count = len(lines(undisturbed.root / "operations"))
    return [Trial(root / str(fatal), fatal).outcome() for fatal in range(1, count + 1)]


if __name__ == "__main__":
    mode, folder, *rest = sys.argv[1:]
    if mode == "one":
        one(Path(folder), rest[0], int(rest[1]))
    elif mode == "everywhere":
        print(json.dumps(everywhere(Path(folder))))
    else:
        print(json.dumps(crowd(Path(folder), int(rest[0]), int(rest[1]), spread=mode == "spread")))
