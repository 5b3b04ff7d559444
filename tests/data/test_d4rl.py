import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest

from tt_ray.data.d4rl import download, resolve_id
from tt_ray.data.importing import ImportOptions, import_files
from tt_ray.data.minari_sets import list_datasets, load_episodes
from tt_ray.errors import UserError

pytestmark = pytest.mark.usefixtures("minari_root")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Files whose name begins with `ant` break off half-way."""
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "/ant" in self.path else content)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that an HTTP server on the loopback interface offers in D4RL's place."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("TT_RAY_D4RL_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        server.shutdown()
        thread.join()


def flat(rows: int = 10, dims: int = 11, action_dim: int = 3, **changes: Any) -> dict[str, np.ndarray]:
    """Ten rows: a terminal after the fourth, a timeout after the seventh, three unfinished ones."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(rows, dims)).astype(np.float32)
    arrays = {
        "observations": observations,
        "next_observations": observations + 100,
        "actions": rng.uniform(-1, 1, size=(rows, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.arange(rows) == 3,
        "timeouts": np.arange(rows) == 6,
    }
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


def store(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


def refused(action: Any, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


class TestNames:
    def test_d4rl_names_become_minari_ids(self) -> None:
        assert resolve_id("hopper-medium-replay-v2") == "d4rl/hopper/medium-replay-v2"
        assert resolve_id("ant-random-v2") == "d4rl/ant/random-v2"

    @pytest.mark.parametrize("name", ["mujoco/hopper/medium-v0", "hopper-medium-v0", "antmaze-umaze-v2", ""])
    def test_other_names_stay(self, name: str) -> None:
        assert resolve_id(name) == name


class TestConvert:
    def test_the_set_equals_its_source(self, tmp_path: Path) -> None:
        arrays = flat()
        import_files(store(tmp_path / "hopper_medium-v2.hdf5", arrays), "d4rl/hopper/medium-v2")
        loaded = load_episodes("hopper-medium-v2")
        assert loaded.lengths.tolist() == [4, 3, 3]
        for key in ("observations", "actions", "rewards"):
            np.testing.assert_array_equal(getattr(loaded, key), arrays[key])
        assert np.flatnonzero(loaded.terminated).tolist() == [3]
        assert np.flatnonzero(loaded.truncated).tolist() == [6, 9]
        assert (loaded.spec.ref_min_score, loaded.spec.ref_max_score) == (-20.272305, 3234.3)
        assert loaded.spec.environment["id"] == "Hopper-v5"
        assert loaded.spec.action_low == (-1, -1, -1)

    @pytest.mark.parametrize("known", [True, False])
    def test_the_final_observation(self, known: bool, tmp_path: Path) -> None:
        arrays = flat() if known else flat(next_observations=None)
        import_files(store(tmp_path / "file.hdf5", arrays), "d4rl/hopper/medium-v2")
        finals = [episode.observations[-1] for episode in minari.load_dataset("d4rl/hopper/medium-v2")]
        rows = [3, 6, 9]
        np.testing.assert_array_equal(finals, arrays["observations"][rows] + (100 if known else 0))

    def test_a_last_row_that_ends_its_episode(self, tmp_path: Path) -> None:
        ends = np.arange(10) == 9
        path = store(tmp_path / "file.hdf5", flat(terminals=ends, timeouts=np.zeros(10, bool)))
        import_files(path, "d4rl/hopper/medium-v2")
        loaded = load_episodes("hopper-medium-v2")
        assert loaded.lengths.tolist() == [10]
        assert loaded.terminated[-1]
        assert not loaded.truncated.any()

    def test_ant_without_its_contact_forces(self, tmp_path: Path) -> None:
        arrays = flat(dims=111, action_dim=8)
        import_files(store(tmp_path / "ant_medium-v2.hdf5", arrays), "d4rl/ant/medium-v2")
        loaded = load_episodes("ant-medium-v2")
        np.testing.assert_array_equal(loaded.observations, arrays["observations"][:, :27])
        assert loaded.spec.environment["id"] == "Ant-v5"
        env = gym.make(minari.load_dataset("d4rl/ant/medium-v2").env_spec)
        assert env.observation_space.shape == (27,)
        env.close()

    @pytest.mark.parametrize(
        ("name", "dims", "actions", "environment"),
        [("halfcheetah", 17, 6, "HalfCheetah-v5"), ("walker2d", 17, 6, "Walker2d-v4")],
    )
    def test_environments(self, name: str, dims: int, actions: int, environment: str, tmp_path: Path) -> None:
        path = store(tmp_path / "file.hdf5", flat(dims=dims, action_dim=actions))
        import_files(path, f"d4rl/{name}/expert-v2")
        assert load_episodes(f"{name}-expert-v2").spec.environment["id"] == environment

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"rewards": np.zeros(9)}, "rewards has 9 rows"),
            ({"timeouts": None}, "lacks timeouts"),
            ({"terminals": None, "actions": None}, "lacks actions, terminals"),
            ({"actions": np.zeros((10, 4))}, "actions have 4 dimensions"),
            ({"observations": np.zeros((10, 12)), "next_observations": None}, "observations have 12"),
            ({"next_observations": np.zeros((10, 12))}, "next_observations"),
            ({"rewards": np.full(10, np.nan)}, "row 0: rewards is missing or no number"),
            ({"observations": np.full((10, 11), np.inf)}, "row 0: observations[0] is infinite"),
            ({"actions": np.zeros(10)}, "actions has shape [10]"),
            ({"rewards": np.zeros((10, 2))}, "rewards has shape [10, 2]"),
            ({"rewards": np.array([b"one"] * 10)}, "not numbers"),
        ],
    )
    def test_files_that_do_not_fit(self, changes: dict, part: str, tmp_path: Path, minari_root: Path) -> None:
        path = store(tmp_path / "file.hdf5", flat(**changes))
        refused(lambda: import_files(path, "d4rl/hopper/medium-v2"), str(path), part)
        assert not minari_root.exists()

    def test_files_that_are_none(self, tmp_path: Path, minari_root: Path) -> None:
        absent, text, cut = (tmp_path / name for name in ("absent", "text", "cut"))
        text.write_text("observations")
        cut.write_bytes(store(tmp_path / "good", flat()).read_bytes()[:3000])
        empty = store(tmp_path / "empty", flat(rows=0))
        for path in (absent, text, cut, empty):
            refused(functools.partial(import_files, path, "d4rl/hopper/medium-v2"), str(path))
        assert not minari_root.exists()


class TestImport:
    def test_the_environment_is_deduced_from_the_names(self, tmp_path: Path) -> None:
        import_files(store(tmp_path / "my-hopper.hdf5", flat()), "mine/first-v0")
        assert load_episodes("mine/first-v0").spec.environment["id"] == "Hopper-v5"

    @pytest.mark.parametrize("name", ["elephant.hdf5", "antmaze.hdf5", "hopper_walker2d.hdf5"])
    def test_or_else_there_is_none(self, name: str, tmp_path: Path) -> None:
        arrays = flat()
        report = import_files(store(tmp_path / name, arrays), "mine/first-v0")
        assert [finding.kind for finding in report.findings] == ["environment"]
        spec = load_episodes("mine/first-v0").spec
        assert (spec.environment["id"], spec.ref_min_score) == ("", None)
        np.testing.assert_array_equal(np.float32(spec.action_low), arrays["actions"].min(axis=0))
        assert len(minari.load_dataset("mine/first-v0")) == 3

    def test_a_given_environment_sets_the_spaces(self, tmp_path: Path) -> None:
        path = store(tmp_path / "file.hdf5", flat(dims=3, action_dim=1))
        import_files(path, "mine/swing-v0", ImportOptions(environment="Pendulum-v1"))
        spec = load_episodes("mine/swing-v0").spec
        assert spec.environment == {**spec.environment, "id": "Pendulum-v1", "max_episode_steps": 200}
        assert (spec.action_low, spec.action_high) == ((-2,), (2,))
        assert (spec.ref_min_score, spec.ref_max_score) == (None, None)

    def test_an_import_path_is_kept(self, tmp_path: Path) -> None:
        path = store(tmp_path / "file.hdf5", flat(dims=3, action_dim=1))
        import_files(path, "mine/swing-v0", ImportOptions(environment="gymnasium:Pendulum-v1"))
        assert load_episodes("mine/swing-v0").spec.environment["id"] == "gymnasium:Pendulum-v1"

    @pytest.mark.parametrize(
        ("environment", "part"),
        [
            ("Pendulum-v1", "Pendulum-v1 has 3"),
            ("CartPole-v1", "action space Discrete(2)"),
            ("NoSuchThing-v0", "cannot be made"),
            ("no_such_module:Thing-v0", "cannot be made"),
        ],
    )
    def test_environments_that_do_not_fit(self, environment: str, part: str, tmp_path: Path) -> None:
        path = store(tmp_path / "file.hdf5", flat())
        refused(lambda: import_files(path, "mine/first-v0", ImportOptions(environment=environment)), part)
        assert list_datasets() == []

    def test_a_taken_or_malformed_id(self, tmp_path: Path) -> None:
        path = store(tmp_path / "hopper.hdf5", flat())
        import_files(path, "mine/first-v0")
        refused(lambda: import_files(path, "mine/first-v0"), "exists")
        refused(lambda: import_files(path, "first"), "namespace/name-vN")
        import_files(store(path, flat(rows=5)), "mine/first-v0", overwrite=True)
        assert len(load_episodes("mine/first-v0").rewards) == 5


class TestDownload:
    def test_a_good_file_becomes_a_set(self, served: Path, minari_root: Path) -> None:
        arrays = flat()
        source = store(served / "hopper_medium_replay-v2.hdf5", arrays)
        seen: list[tuple[int, int | None]] = []
        assert download("hopper-medium-replay-v2", lambda *step: seen.append(step)) == (
            "d4rl/hopper/medium-replay-v2"
        )
        loaded = load_episodes("hopper-medium-replay-v2")
        np.testing.assert_array_equal(loaded.observations, arrays["observations"])
        size = source.stat().st_size
        assert seen[-1] == (size, size)
        assert {path.name for path in minari_root.iterdir()} == {"d4rl"}  # the downloaded file is gone
        source.unlink()
        assert download("hopper-medium-replay-v2") == "d4rl/hopper/medium-replay-v2"  # here already

    def test_failures_are_one_line_and_leave_nothing(self, served: Path, minari_root: Path) -> None:
        store(served / "ant_medium-v2.hdf5", flat(dims=111, action_dim=8))
        (served / "hopper_medium-v2.hdf5").write_text("<html>moved</html>")
        store(served / "hopper_expert-v2.hdf5", flat(dims=5))
        content = store(served / "hopper_random-v2.hdf5", flat()).read_bytes()
        (served / "hopper_random-v2.hdf5").write_bytes(content[:-500])
        refused(lambda: download("ant-medium-v2"), "ant_medium-v2.hdf5", "incomplete")
        refused(lambda: download("hopper-medium-v2"), "hopper_medium-v2.hdf5", "not an HDF5 file")
        refused(lambda: download("hopper-expert-v2"), "observations have 5 dimensions")
        refused(lambda: download("hopper-random-v2"), "hopper_random-v2.hdf5", "not a readable HDF5 file")
        refused(lambda: download("walker2d-random-v2"), "walker2d_random-v2.hdf5", "404")
        assert list(minari_root.iterdir()) == []

    def test_a_server_that_is_not_there(self, minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
            port = server.server_port
        monkeypatch.setenv("TT_RAY_D4RL_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        refused(lambda: download("hopper-medium-v2"), f"127.0.0.1:{port}/hopper_medium-v2.hdf5", "refused")
        monkeypatch.setenv("TT_RAY_D4RL_URL", "not a url")
        refused(lambda: download("hopper-medium-v2"), "not a url", "cannot be downloaded")
        assert list(minari_root.iterdir()) == []

    def test_an_interrupted_download_leaves_nothing(self, served: Path, minari_root: Path) -> None:
        store(served / "hopper_medium-v2.hdf5", flat())

        def interrupt(received: int, expected: int | None) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            download("hopper-medium-v2", interrupt)
        assert list(minari_root.iterdir()) == []

    def test_unknown_names(self) -> None:
        refused(lambda: download("hopper-best-v2"), "hopper-best-v2", "medium-replay-v2")


@pytest.mark.slow
def test_a_real_flat_file_gives_back_the_episodes_that_it_was_made_of(
    minari_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "TT_RAY_BENCH_DATA" not in os.environ:
        pytest.skip("TT_RAY_BENCH_DATA is not set: it names the folder of recorded data sets")
    bench = Path(os.environ["TT_RAY_BENCH_DATA"])
    options = ImportOptions(environment="Hopper-v5")
    import_files(bench / "hopper_medium_d4rl.hdf5", "mine/hopper-v0", options)
    converted = load_episodes("mine/hopper-v0")
    assert (len(converted), len(converted.rewards)) == (111, 49_853)
    assert (converted.spec.ref_min_score, converted.spec.ref_max_score) == (-20.272305, 3234.3)
    finals = [episode.observations[-1] for episode in minari.load_dataset("mine/hopper-v0")]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(bench / "minari"))
    whole = load_episodes("bench/hopper/medium-v0")
    starts = {whole.observations[start].tobytes(): index for index, start in enumerate(whole.offsets[:-1])}
    found = [starts[converted.observations[begin].tobytes()] for begin in converted.offsets[:-1]]
    assert len(set(found)) == len(found)
    for episode, begin, end in zip(found, converted.offsets[:-1], converted.offsets[1:], strict=True):
        assert whole.lengths[episode] == end - begin
        same = whole.offsets[episode]
        for key in ("observations", "actions", "rewards", "terminated", "truncated"):
            expected = getattr(whole, key)[same : same + end - begin]
            np.testing.assert_array_equal(getattr(converted, key)[begin:end], expected)
    source = minari.load_dataset("bench/hopper/medium-v0").iterate_episodes(found)
    np.testing.assert_array_equal(finals, [episode.observations[-1] for episode in source])
