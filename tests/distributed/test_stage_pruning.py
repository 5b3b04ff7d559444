"""Pruning a stage store: what is old and unneeded goes, and nothing else."""

from datetime import timedelta
from pathlib import Path

import pytest
from stage_helpers import KEY, OTHER, THIRD, age_by, hidden, keys, kill_a_holder, make

from tt_ray.distributed.claims import Timing
from tt_ray.distributed.pruning import prune
from tt_ray.distributed.stages import StageStore


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    return StageStore(tmp_path / "store", Timing(heartbeat=0.02, expiry=30.0, poll=0.02))


def test_pruning_takes_what_is_old_and_not_needed(store: StageStore) -> None:
    make(store, "tokens", KEY)
    make(store, "models", KEY, ("tokens", KEY))
    make(store, "evaluations", KEY, ("models", KEY), age=timedelta(hours=1))
    make(store, "tokens", OTHER)
    make(store, "models", OTHER, ("tokens", OTHER))
    make(store, "tokens", THIRD, age=timedelta(hours=1))
    make(store, "critics", THIRD, ("tokens", THIRD), age=timedelta())
    before = keys(list(store.stages()))
    month = timedelta(days=30)
    assert keys(prune(store, older_than=month, dry_run=True)) == [f"tokens/{OTHER}", f"models/{OTHER}"]
    assert keys(list(store.stages())) == before
    assert keys(prune(store, older_than=month, kinds=["tokens"])) == []
    removed = prune(store, older_than=month)
    assert keys(removed) == [f"tokens/{OTHER}", f"models/{OTHER}"]
    assert [stage.bytes for stage in removed] == [9, 9]
    assert not any(stage.path.exists() for stage in removed)
    assert keys(prune(store)) == [f"tokens/{KEY}", f"models/{KEY}", f"evaluations/{KEY}"]
    assert keys(list(store.stages())) == [
        f"tokens/{THIRD}",
        f"critics/{THIRD}",
    ]  # used just now, and its input
    assert hidden(store) == []


def test_what_is_held_and_its_inputs_are_not_pruned(store: StageStore) -> None:
    make(store, "tokens", KEY)
    make(store, "models", OTHER)
    with (
        store.claim("models", KEY, inputs=[("tokens", KEY)]),
        store.claim("models", OTHER, enough=lambda stage: False) as extended,
    ):
        assert extended.complete
        assert prune(store) == []
    assert keys(prune(store)) == [f"tokens/{KEY}", f"models/{OTHER}"]


def test_a_stage_used_while_pruning_stays(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    make(store, "models", KEY)
    take = store.claims["models"].take

    def used_first(key: str, *arguments: object) -> object:
        with store.claim("models", KEY):
            return take(key)

    monkeypatch.setattr(store.claims["models"], "take", used_first)
    assert prune(store) == []
    assert store.find("models", KEY) is not None
    assert hidden(store) == []


def test_what_killed_processes_have_left_is_pruned_after_a_day(store: StageStore) -> None:
    make(store, "tokens", OTHER)
    kill_a_holder(store, KEY)
    own = store.path("models", THIRD)  # no store has begun this one
    own.mkdir()
    torn = store.root / "tokens" / f".{KEY}.1234.tmp"
    torn.mkdir()
    trash = store.root / "models" / f".trash~{THIRD}~1234"
    trash.mkdir()
    assert prune(store) == []  # the killed one may be gone on with, and needs its input
    assert not trash.exists()
    assert torn.exists()
    partial = store.path("models", KEY)
    for path in (partial / "data", partial, own, torn):
        age_by(path, timedelta(hours=25))
    assert keys(prune(store)) == [f"tokens/{OTHER}", f"models/{KEY}"]
    assert sorted(path.name for path in store.root.rglob("*")) == sorted(["models", "tokens", THIRD])
