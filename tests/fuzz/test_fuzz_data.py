"""Damaged data files: whatever HDF5 makes of them happens in a process apart, and is one line here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pandas as pd
import pytest
from damage import ODD, count_of, damaged, fuzz, json_texts, odd_data, result_or_line
from hypothesis import strategies as st

from tt_ray.data import limited
from tt_ray.data.importing import import_files
from tt_ray.data.minari_reader import load_episodes, local_storage, own_metadata
from tt_ray.data.minari_sets import RecordedEpisode, describe, list_datasets, write_dataset
from tt_ray.data.observations import observation_leaves
from tt_ray.evaluation.environments import make_environment
from tt_ray.evaluation.work_folder import WorkFolder

ID = "test/box-v0"


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process apart that hangs is not waited for long."""
    monkeypatch.setattr(limited, "CPU_SECONDS", 10)


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def recorded(length: int, seed: int) -> RecordedEpisode:
    rng = np.random.default_rng(seed)
    return RecordedEpisode(
        observations=rng.normal(size=(length + 1, 3)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(length, 1)).astype(np.float32),
        rewards=rng.normal(size=length).astype(np.float32),
        terminations=np.arange(length) == length - 1,
        truncations=np.zeros(length, dtype=bool),
        behavior_policy="policy",
        seed=seed,
    )


def write_set(episodes: int = 3) -> Path:
    folder = write_dataset(
        ID,
        [recorded(4 + seed, seed) for seed in range(episodes)],
        environment="Pendulum-v1",
        observation_space=gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32),
    )
    return folder / "data"


def structure_changes(content: bytes) -> st.SearchStrategy[bytes]:
    """HDF5 files damaged where their structure is, rather than their numbers: near the names."""
    marks = [b"TREE", b"HEAP", b"SNOD", b"OHDR", b"GCOL", b"\x89HDF", b"rewards", b"episode_1"]
    places = [at for mark in marks for at in range(len(content)) if content.startswith(mark, at)]

    def change(draw: tuple[int, int, int]) -> bytes:
        place, offset, value = draw
        data = bytearray(content)
        data[(places[place] + offset) % len(data)] = value
        return bytes(data)

    return st.tuples(st.integers(0, len(places) - 1), st.integers(-16, 300), st.integers(0, 255)).map(change)


@count_of(25, 400)
def test_damaged_hdf5_of_minari(count: int, minari_root: Path) -> None:
    file = write_set() / "main_data.hdf5"
    sound = file.read_bytes()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        found = result_or_line(lambda: describe(ID))
        assert found is None or all(np.isfinite(column.mean) for column in found.columns)

    fuzz(st.one_of(damaged(sound), structure_changes(sound), structure_changes(sound)), check, count)


@count_of(25, 400)
def test_damaged_hdf5_of_d4rl(count: int, minari_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "hopper.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "observations", data=rng.normal(size=(60, 11)), chunks=(20, 11), compression="gzip"
        )
        file["actions"] = rng.uniform(-1, 1, size=(60, 3))
        file["rewards"] = rng.normal(size=60)
        for name in ("terminals", "timeouts"):
            file[name] = np.arange(60) % 20 == 19
    sound = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        result_or_line(lambda: import_files(path, "mine/hopper-v0", overwrite=True))

    fuzz(st.one_of(damaged(sound), structure_changes(sound)), check, count)


@pytest.mark.parametrize("kind", ["csv", "parquet", "npz"])
@count_of(8, 300)
def test_damaged_tables(count: int, kind: str, minari_root: Path, tmp_path: Path) -> None:
    path, rng = tmp_path / f"log.{kind}", np.random.default_rng(0)
    columns = {name: rng.normal(size=40).astype(np.float32) for name in ("obs_0", "obs_1", "act_0", "reward")}
    frame = pd.DataFrame({**columns, "episode": np.arange(40) // 10, "step": np.arange(40) % 10})
    if kind == "npz":
        np.savez_compressed(path, **{name: frame[name].to_numpy() for name in frame})
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    sound = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        made = result_or_line(lambda: import_files(path, "mine/log-v0", overwrite=True))
        if made is not None:
            loaded = load_episodes("mine/log-v0")
            assert (len(loaded), len(loaded.rewards)) == (made.episodes, made.steps)

    fuzz(damaged(sound), check, count)


@count_of(250, 5000)
def test_damaged_metadata(count: int, minari_root: Path) -> None:
    file = write_set() / "metadata.json"
    plain = json.loads(file.read_text())
    spaces = {name: json.loads(plain[name]) for name in ("observation_space", "action_space", "env_spec")}
    inner = odd_data(spaces).map(
        lambda data: json.dumps(
            {**plain, **{name: json.dumps(value) for name, value in data.items()}}
        ).encode()
    )

    def check(content: bytes) -> None:
        file.write_bytes(content)
        (info,) = list_datasets()
        assert isinstance(info.environment, str)
        result_or_line(lambda: own_metadata(ID))
        storage = result_or_line(lambda: local_storage(ID))
        if storage is not None:
            assert sum(size for _, size in observation_leaves(storage.observation_space)) < 10_000

    fuzz(st.one_of(json_texts(plain), inner), check, count)


def test_metadata_without_spaces_makes_no_environment(
    minari_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_set() / "metadata.json"
    plain = json.loads(file.read_text())
    command = {"entry_point": "os:system", "kwargs": {"command": "touch executed"}}
    plain["env_spec"] = json.dumps({**json.loads(plain["env_spec"]), **command})
    del plain["action_space"]
    file.write_text(json.dumps(plain))
    assert result_or_line(lambda: describe(ID)) is None
    assert not (tmp_path / "executed").exists()


@count_of(150, 3000)
def test_odd_descriptions_of_environments(count: int) -> None:
    plain = json.loads(gym.spec("Pendulum-v1").to_json())
    plain["additional_wrappers"] = [
        {
            "name": "w",
            "entry_point": "gymnasium.wrappers.common:TimeLimit",
            "kwargs": {"max_episode_steps": 9},
        }
    ]
    make_environment(plain).close()

    def check(description: Any) -> None:
        made = result_or_line(lambda: make_environment(description))
        if made is not None:
            made.close()

    fuzz(odd_data(plain), check, count)


@count_of(100, 2000)
def test_damaged_shards_of_a_collection(count: int, minari_root: Path) -> None:
    class State:
        def __init__(self, round_: Any) -> None:
            self.round = round_

    with WorkFolder(ID, "identity") as work:
        work.save(State(np.int64(3)), [recorded(4, 0), recorded(6, 1)])
        (file,) = work.path.glob("*.npz")
        sound = file.read_bytes()

        def check(content: bytes) -> None:
            file.write_bytes(content)
            state = work.resume(lambda shard: State(int(shard["round"])))
            left = list(work.episodes())
            assert (state is not None) == file.exists()
            assert len(left) in (0, 2) or state is not None
            file.write_bytes(sound)

        fuzz(damaged(sound), check, count)


@pytest.mark.parametrize("odd", ODD, ids=lambda value: repr(value)[:12])
def test_any_environment_that_is_stored(odd: Any, minari_root: Path) -> None:
    file = write_set() / "metadata.json"
    plain = json.loads(file.read_text())
    for name in ("environment", "metadata"):
        file.write_text(json.dumps({**plain, "tt_ray": {**plain["tt_ray"], name: odd}}))
        (info,) = list_datasets()
        assert info.problem is not None or isinstance(info.environment, str)
