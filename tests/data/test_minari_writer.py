import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari_examples import files_in, one_line, recorded, write

from tt_ray.data.minari_sets import RecordedEpisode, load_episodes
from tt_ray.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("minari_root"),
    pytest.mark.filterwarnings("ignore::UserWarning:minari.utils"),
]


class TestWrite:
    def test_minari_reads_it_with_seeds_and_policies(self) -> None:
        write()
        dataset = minari.load_dataset("test/box-v0")
        assert (dataset.total_episodes, dataset.total_steps) == (3, 12)
        assert dataset.env_spec.id == "Hopper-v5"
        stored = list(dataset.storage.get_episode_metadata(range(3)))
        assert [metadata["seed"] for metadata in stored] == [0, 1, 2]
        assert [metadata["behavior_policy"] for metadata in stored] == ["policy 0", "policy 1", "policy 0"]
        assert "test" in minari.namespace.list_local_namespaces()

    @pytest.mark.parametrize("environment", ["my_module:Thing-v0", "my.package.module:space/Thing-v0"])
    def test_an_import_path_is_kept_and_minari_still_reads(self, environment: str) -> None:
        write(environment=environment)
        assert load_episodes("test/box-v0").spec.environment["id"] == environment
        assert minari.load_dataset("test/box-v0").total_episodes == 3

    def test_a_description_with_arguments_is_kept(self) -> None:
        given = {**json.loads(gym.spec("Ant-v5").to_json()), "kwargs": {"healthy_reward": 0.5}}
        write(environment=given)
        assert load_episodes("test/box-v0").spec.environment == given
        assert minari.load_dataset("test/box-v0").env_spec.kwargs == {"healthy_reward": 0.5}

    @pytest.mark.parametrize("bad", ["box-v0", "test/box", "test/box-1", "x y/box-v0", "test/../box-v0", ""])
    def test_ids_need_namespace_and_version(self, bad: str, minari_root: Path) -> None:
        with pytest.raises(UserError) as caught:
            write(bad)
        one_line(caught, repr(bad), "namespace/name-vN")
        assert not minari_root.exists()

    def test_a_taken_id_is_refused_unless_overwritten(self) -> None:
        write(episodes=[recorded(5)])
        with pytest.raises(UserError) as caught:
            write(episodes=[recorded(9)])
        one_line(caught, "test/box-v0", "exists")
        assert load_episodes("test/box-v0").lengths.tolist() == [5]
        write(episodes=[recorded(9)], overwrite=True)
        assert load_episodes("test/box-v0").lengths.tolist() == [9]

    def test_nothing_is_left_when_the_episodes_fail(self, minari_root: Path) -> None:
        write("test/first-v0")
        before = files_in(minari_root)

        def broken() -> Iterator[RecordedEpisode]:
            yield recorded(3)
            raise FileNotFoundError("the collector's own trouble")

        with pytest.raises(FileNotFoundError, match="own trouble"):
            write("other/broken-v0", broken())
        assert files_in(minari_root) == before
        assert {path.name for path in minari_root.iterdir()} == {"test"}

    def test_an_overwrite_that_fails_keeps_the_old_set(self) -> None:
        write(episodes=[recorded(5)])
        with pytest.raises(UserError):
            write(episodes=[recorded(2), recorded(0)], overwrite=True)
        assert load_episodes("test/box-v0").lengths.tolist() == [5]

    @pytest.mark.parametrize(
        ("episodes", "part"),
        [
            ([], "no episodes"),
            ([recorded(2), recorded(0)], "episode 1"),
            ([recorded(2, observations=np.zeros((2, 3)))], "3 observations"),
            ([recorded(2, actions=np.zeros((3, 2)))], "3 actions"),
        ],
        ids=["none", "empty", "observations", "actions"],
    )
    def test_bad_episodes(self, episodes: list, part: str, minari_root: Path) -> None:
        with pytest.raises(UserError) as caught:
            write(episodes=episodes)
        one_line(caught, "test/box-v0", part)
        assert files_in(minari_root) == set()

    def test_a_folder_that_cannot_be_written(self, minari_root: Path) -> None:
        minari_root.write_text("a file in its place")
        with pytest.raises(UserError) as caught:
            write()
        one_line(caught, "cannot be written", str(minari_root))

    def test_a_full_disk_is_one_line(self, minari_root: Path) -> None:
        minari_root.mkdir()
        script = """
import resource, signal
from minari_examples import recorded, write
from tt_ray.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write(episodes=[recorded(100, seed) for seed in range(50)])
except UserError as error:
    print(error)
"""
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout.startswith("data set test/box-v0 cannot be written")
        assert done.stdout.count("\n") == 1
        assert done.stderr == ""
        assert list(minari_root.iterdir()) == []
