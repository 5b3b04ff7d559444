"""What the tests of the stage store have in common."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from tt_ray.distributed import holders
from tt_ray.distributed.stages import MANIFEST, Input, Stage, StageStore

KEY, OTHER, THIRD = "0123456789abcdef", "fedcba9876543210", "00000000deadbeef"
LONG_AGO = timedelta(days=40)


def make(store: StageStore, kind: str, key: str, *inputs: Input, age: timedelta = LONG_AGO) -> Stage:
    """A complete stage that was last used `age` ago."""
    with store.claim(kind, key) as stage:
        write(stage)
        stage.publish({"name": key}, inputs, seconds=5.0)
    age_by(stage.path / MANIFEST, age)
    return stage


def write(stage: Stage, text: str = "some data") -> None:
    stage.path.mkdir(parents=True, exist_ok=True)
    (stage.path / "data").write_text(text)


def age_by(path: Path, age: timedelta) -> None:
    then = path.stat().st_mtime - age.total_seconds()
    os.utime(path, (then, then))


def keys(stages: list[Stage]) -> list[str]:
    return [f"{stage.kind}/{stage.key}" for stage in stages]


def hidden(store: StageStore) -> list[str]:
    return sorted(path.name for path in store.root.rglob(".*"))


@contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if this process were on another host."""
    with monkeypatch.context() as patch:
        patch.setattr(holders, "_machine", lambda: "anotherhost")
        yield


def kill_a_holder(store: StageStore, key: str) -> None:
    """A process claims a model, writes, and is killed."""
    program = (
        "import os, signal, sys; from pathlib import Path; from tt_ray.distributed.stages import StageStore\n"
        "root, key, tokens = sys.argv[1:]\n"
        "with StageStore(Path(root)).claim('models', key, inputs=[('tokens', tokens)]) as stage:\n"
        "    stage.path.mkdir()\n"
        "    (stage.path / 'data').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(store.root), key, OTHER], check=False)
    assert store.claims["models"].begun() == {key}
