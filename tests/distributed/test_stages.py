"""The stage store: what is complete is found, what is partial is gone on with, what is wrong is named."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from stage_helpers import (
    KEY,
    LONG_AGO,
    OTHER,
    THIRD,
    hidden,
    keys,
    make,
    write,
)

from tt_ray.distributed.claims import Timing
from tt_ray.distributed.pruning import prune
from tt_ray.distributed.stages import MANIFEST, Stage, StageStore
from tt_ray.errors import UserError


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    return StageStore(tmp_path / "store", Timing(heartbeat=0.02, expiry=30.0, poll=0.02))


def test_a_stage_is_computed_once(store: StageStore) -> None:
    assert store.find("models", KEY) is None
    with store.claim("models", KEY, inputs=[("tokens", OTHER)]) as stage:
        assert (stage.complete, stage.held) == (False, True)
        assert not stage.path.exists()
        write(stage)
        stage.publish({"seed": 3}, [("tokens", OTHER), ("tokens", THIRD)])
        assert (stage.complete, stage.held) == (True, False)
    with store.claim("models", KEY) as again:
        assert (again.complete, again.held) == (True, False)
    found = store.find("models", KEY)
    assert found is not None
    assert found.manifest == again.manifest == stage.manifest
    assert (found.kind, found.key, found.bytes) == ("models", KEY, len("some data"))
    assert (found.description, found.inputs) == ({"seed": 3}, [("tokens", OTHER), ("tokens", THIRD)])
    assert found.created is not None
    assert found.created.utcoffset() == timedelta(0)
    assert hidden(store) == []


def test_the_manifest_is_plain_json(store: StageStore) -> None:
    stage = make(store, "tokens", KEY)
    plain = json.loads((stage.path / MANIFEST).read_text())
    assert plain.keys() == {
        *("kind", "key", "created", "seconds", "bytes", "host", "versions", "description", "inputs")
    }
    assert datetime.fromisoformat(plain["created"]).utcoffset() == timedelta(0)
    assert plain["seconds"] == 5.0
    assert "tt-ray" in plain["versions"]


def test_an_unfinished_stage_keeps_its_files_and_its_time(store: StageStore) -> None:
    def fail() -> None:
        with store.claim("models", KEY) as stage:
            write(stage, "half")
            time.sleep(0.02)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.find("models", KEY) is None
    assert store.holder("models", KEY) is None
    assert [stage.complete for stage in store.stages(partial=True)] == [False]
    assert list(store.stages()) == []
    with store.claim("models", KEY) as stage:
        assert (stage.path / "data").read_text() == "half"
        assert stage.seconds > 0.02
        stage.publish({})
    assert stage.seconds > 0.02
    assert hidden(store) == []


def test_the_time_of_an_attempt_whose_files_are_gone_does_not_count(store: StageStore) -> None:
    with store.claim("models", KEY) as stage:
        write(stage)
    store.claims["models"]._remember(KEY, {"seconds": 1000.0, "inputs": []})
    with store.claim("models", KEY) as stage:
        assert stage.seconds > 1000
    shutil.rmtree(stage.path)
    with store.claim("models", KEY) as stage:
        assert stage.seconds < 1000


def test_a_folder_made_without_a_store_is_adopted(store: StageStore) -> None:
    folder = store.path("models", KEY)
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text("{}")
    with store.claim("models", KEY) as stage:
        assert not stage.complete
        stage.publish({"adopted": True}, seconds=0.0)
    assert keys(list(store.stages())) == [f"models/{KEY}"]


def test_a_stage_that_is_not_enough_is_extended(store: StageStore) -> None:
    with store.claim("evaluations", f"random-{KEY}") as stage:
        write(stage, "1\n")
        stage.publish({"episodes": 1}, seconds=5.0)

    def enough(stage: Stage) -> bool:
        return stage.description["episodes"] >= 2

    with store.claim("evaluations", f"random-{KEY}", enough=enough) as stage:
        assert (stage.complete, stage.held) == (True, True)
        write(stage, "1\n2\n")
        time.sleep(0.01)
        assert store.find("evaluations", f"random-{KEY}") is not None
        stage.publish({"episodes": 2})
    assert (stage.bytes, stage.description) == (4, {"episodes": 2})
    assert 5.0 < stage.seconds < 10.0
    with store.claim("evaluations", f"random-{KEY}", enough=enough) as stage:
        assert not stage.held
    assert hidden(store) == []


@pytest.mark.parametrize(
    "key", ["", "xyz", "../models", "0123", "ABCDEF0123456789", "a b", f"{KEY}/x", f"/{KEY}"]
)
def test_a_key_that_is_no_fingerprint_is_refused(store: StageStore, key: str) -> None:
    with pytest.raises(UserError, match="not the key of a stage"):
        store.find("models", key)
    with pytest.raises(UserError, match="not the key of a stage"), store.claim("models", key):
        pass


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: "", "Invalid JSON"),
        (lambda text: text.replace('"seconds"', '"sec"'), "Field required"),
        (lambda text: text.replace(KEY, OTHER), f"it is that of models/{OTHER}"),
    ],
)
def test_a_damaged_manifest_is_named(store: StageStore, damage: Callable[[str], str], reason: str) -> None:
    file = make(store, "models", KEY).path / MANIFEST
    file.write_text(damage(file.read_text()))
    uses: list[Callable[[], object]] = [
        lambda: store.find("models", KEY),
        lambda: list(store.stages()),
        lambda: prune(store),
        lambda: store.claim("models", KEY).__enter__(),
    ]
    for use in uses:
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value).startswith(f"{file}: damaged (")
        assert reason in str(error.value)
        assert str(error.value).endswith("remove this file, and the stage is made complete again")
        assert "\n" not in str(error.value)
    file.unlink()
    with store.claim("models", KEY) as stage:
        assert (stage.path / "data").exists()
        stage.publish({})
    assert hidden(store) == []


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = StageStore(tmp_path / "file")
    with pytest.raises(UserError, match=r"/file/models: cannot write there: Not a directory$"):
        store.claim("models", KEY).__enter__()


def test_a_read_only_store_can_be_used(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    make(store, "models", KEY)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("utime", "mkdir", "rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, refuse)
    with store.claim("models", KEY) as stage:
        assert stage.complete
    assert keys(list(store.stages())) == [f"models/{KEY}"]
    assert keys(prune(store, dry_run=True)) == [f"models/{KEY}"]
    with pytest.raises(UserError, match="cannot write there: Read-only file system"):
        store.claim("models", OTHER).__enter__()
    with pytest.raises(UserError, match="cannot remove from there: Read-only file system"):
        prune(store)


def test_a_full_disk_is_named_and_nothing_is_lost(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with store.claim("models", KEY) as stage:
        write(stage)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=r"cannot publish this stage: No space left on device$"):
                stage.publish({})
        assert store.find("models", KEY) is None
        assert stage.held
        stage.publish({})
    assert hidden(store) == []


def test_publishing_what_is_not_held_is_a_mistake(store: StageStore) -> None:
    stage = make(store, "models", KEY)
    with pytest.raises(RuntimeError, match="without being held"):
        stage.publish({})


def test_use_is_noted_and_looking_is_not(store: StageStore) -> None:
    stage = make(store, "models", KEY)
    old = stage.last_used
    assert store.find("models", KEY) is not None
    assert [found.last_used for found in store.stages()] == [old]
    with store.claim("models", KEY) as again:
        assert again.last_used > old + LONG_AGO / 2
        assert again.created == stage.created
