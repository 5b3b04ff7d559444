"""Claims on stages: one process holds, the others wait, and the dead are succeeded."""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from stage_helpers import KEY, OTHER, age_by, elsewhere, hidden, kill_a_holder, make, write

from tt_ray.distributed.claims import Timing
from tt_ray.distributed.holders import Holder
from tt_ray.distributed.stages import MANIFEST, StageStore
from tt_ray.errors import UserError


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    return StageStore(tmp_path / "store", Timing(heartbeat=0.02, expiry=30.0, poll=0.02))


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_others_wait_and_are_told_for_whom(store: StageStore) -> None:
    waits: list[tuple[float, Holder | None]] = []
    waiting = threading.Event()
    results: list[bool] = []

    def on_wait(seconds: float, holder: Holder | None) -> None:
        waits.append((seconds, holder))
        waiting.set()

    def second() -> None:
        with store.claim("tokens", KEY, on_wait=on_wait) as stage:
            results.append(stage.complete)

    with store.claim("tokens", KEY) as stage:
        thread = in_thread(second)
        assert waiting.wait(60)
        with store.claim("tokens", OTHER) as other, store.claim("models", KEY) as third:
            assert other.held
            assert third.held
        stage.publish({})
    thread.join(60)
    assert results == [True]
    assert waits[0][0] >= 0
    assert str(waits[0][1]).startswith(f"process {os.getpid()} on ")


def test_whoever_waits_can_give_up(store: StageStore) -> None:
    def give_up(seconds: float, holder: Holder | None) -> None:
        raise KeyboardInterrupt

    with store.claim("tokens", KEY) as stage:
        with pytest.raises(KeyboardInterrupt), store.claim("tokens", KEY, on_wait=give_up):
            pass
        assert stage.held


def test_a_holder_on_another_host_lives_by_its_heartbeat(
    store: StageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = StageStore(store.root, Timing(heartbeat=1000.0, expiry=30.0))
    with elsewhere(monkeypatch):
        claim = quiet.claims["models"].take(KEY)
    assert claim is not None
    age_by(claim.file, timedelta(seconds=25))
    assert store.claims["models"].take(KEY) is None
    assert store.holder("models", KEY) == claim.holder
    age_by(claim.file, timedelta(seconds=6))
    assert store.holder("models", KEY) is None
    successor = store.claims["models"].take(KEY)
    assert successor is not None
    assert (claim.held, successor.held) == (False, True)
    assert claim.publish(b"{}", store.root / "result") is False
    assert not (store.root / "result").exists()
    claim.release(remember=True)
    assert successor.held
    successor.release(remember=False)
    assert hidden(store) == []


def test_a_lost_claim_cannot_be_published(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = StageStore(store.root, Timing(heartbeat=1000.0, expiry=30.0))
    with elsewhere(monkeypatch):
        block = quiet.claim("models", KEY)
        late = block.__enter__()
    write(late)
    (file,) = (store.root / "models" / ".claims" / KEY).iterdir()
    age_by(file, timedelta(seconds=31))
    with store.claim("models", KEY) as stage:
        assert (late.held, stage.held) == (False, True)
        with pytest.raises(
            UserError, match=r"not published, because .* 30 s and another has taken over"
        ) as error:
            late.publish({})
        assert "\n" not in str(error.value)
        block.__exit__(None, None, None)
        assert stage.held
        stage.publish({"by": "the other"})
    found = store.find("models", KEY)
    assert found is not None
    assert found.description == {"by": "the other"}
    assert hidden(store) == []


def test_the_heart_beats_while_a_stage_is_held(store: StageStore) -> None:
    with store.claim("models", KEY):
        (file,) = (store.root / "models" / ".claims" / KEY).iterdir()
        age_by(file, timedelta(seconds=100))
        old = file.stat().st_mtime
        deadline = time.monotonic() + 60
        while file.stat().st_mtime < old + 99 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert file.stat().st_mtime >= old + 99


def test_a_reused_process_id_is_not_the_holder(store: StageStore) -> None:
    holder = Holder.new()
    assert holder.runs() is True
    assert Holder.parse(holder.name) == holder
    assert holder._replace(start=holder.start + 1000).runs() is False
    assert holder._replace(machine="anotherhost").runs() is None
    assert Holder.parse(".nfs0000000000000001") is None


def test_a_forked_copy_does_not_end_the_claim(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.claim("models", KEY) as stage:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            stage._claim.release(remember=False)  # type: ignore[union-attr]
        assert stage.held


def test_the_time_of_a_killed_holder_counts(store: StageStore) -> None:
    kill_a_holder(store, KEY)
    (claim,) = (store.root / "models" / ".claims" / KEY).iterdir()
    age_by(claim, timedelta(seconds=-100))  # its last touch
    with store.claim("models", KEY) as stage:
        assert 100 <= stage.seconds < 200
        assert (stage.path / "data").read_text() == "half"
        stage.publish({})
    assert hidden(store) == []


def test_what_died_over_a_complete_stage_is_cleared_by_its_next_user(store: StageStore) -> None:
    stage = make(store, "models", KEY)
    manifest = (stage.path / MANIFEST).rename(store.root / "kept")
    stage.path.rename(store.root / "moved")
    kill_a_holder(store, KEY)
    manifest.rename(stage.path / MANIFEST)
    assert hidden(store) == [".claims"]
    with store.claim("models", KEY) as stage:
        assert stage.complete
    assert hidden(store) == []
