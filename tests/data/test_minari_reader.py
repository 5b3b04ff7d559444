import os
import shutil
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Dict, Discrete, MultiDiscrete
from minari_examples import (
    ACTIONS,
    NESTED,
    OBSERVATIONS,
    change_metadata,
    minaris,
    one_line,
    recorded,
    shorten,
    write,
)

from tt_ray.data.minari_sets import describe, load_episodes
from tt_ray.errors import UserError

# Minari asks for an author, an algorithm and so on.
pytestmark = [
    pytest.mark.usefixtures("minari_root"),
    pytest.mark.filterwarnings("ignore::UserWarning:minari.utils"),
]


class TestLoad:
    def test_what_was_written_comes_back(self) -> None:
        episodes = [recorded(4, 0), recorded(1, 1, "truncated"), recorded(7, 2)]
        write(episodes=episodes, ref_min_score=1.5, ref_max_score=9.5)
        loaded = load_episodes("test/box-v0")
        assert loaded.offsets.tolist() == [0, 4, 5, 12]
        np.testing.assert_array_equal(
            loaded.observations, np.concatenate([e.observations[:-1] for e in episodes])
        )
        np.testing.assert_array_equal(loaded.actions, np.concatenate([e.actions for e in episodes]))
        np.testing.assert_array_equal(loaded.rewards, np.concatenate([e.rewards for e in episodes]))
        assert np.flatnonzero(loaded.terminated).tolist() == [3, 11]
        assert np.flatnonzero(loaded.truncated).tolist() == [4]
        assert loaded.observations.dtype == loaded.actions.dtype == loaded.rewards.dtype == np.float32
        spec = loaded.spec
        assert (spec.dataset_id, spec.observation_keys) == ("test/box-v0", ())
        assert (spec.observation_dim, spec.action_dim) == (3, 2)
        assert (spec.action_low, spec.action_high) == ((-1, -2), (1, 2))
        assert (spec.ref_min_score, spec.ref_max_score) == (1.5, 9.5)
        assert spec.environment["entry_point"] == "gymnasium.envs.mujoco.hopper_v5:HopperEnv"

    def test_cropping_keeps_the_first_dimensions_and_the_fingerprint(self) -> None:
        write()
        whole, cropped = load_episodes("test/box-v0"), load_episodes("test/box-v0", observation_dims=2)
        np.testing.assert_array_equal(cropped.observations, whole.observations[:, :2])
        assert cropped.spec.observation_dim == 2
        assert cropped.spec.fingerprint == whole.spec.fingerprint

    @pytest.mark.parametrize("dims", [0, 4])
    def test_cropping_to_what_is_not_there_is_refused(self, dims: int) -> None:
        write()
        with pytest.raises(UserError) as caught:
            load_episodes("test/box-v0", observation_dims=dims)
        one_line(caught, "dataset.observation_dims", "between 1 and 3", str(dims))

    def test_an_episode_that_just_stops_counts_as_truncated(self) -> None:
        write(episodes=[recorded(3, ending="none")])
        loaded = load_episodes("test/box-v0")
        assert loaded.truncated.tolist() == [False, False, True]
        assert not loaded.terminated.any()

    def test_flags_in_the_middle_of_an_episode_do_not_count(self) -> None:
        middle = np.array([False, True, False])
        write(episodes=[recorded(3, ending="truncated", terminations=middle)])
        loaded = load_episodes("test/box-v0")
        assert not loaded.terminated.any()
        assert loaded.truncated.tolist() == [False, False, True]

    def test_constant_columns_are_fine(self) -> None:
        write(episodes=[recorded(5, observations=np.zeros((6, 3), np.float32), rewards=np.ones(5))])
        assert load_episodes("test/box-v0").returns.tolist() == [5.0]

    @pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
    def test_formats_agree_to_the_fingerprint(self, data_format: str) -> None:
        episodes = [recorded(4, 0), recorded(2, 1)]
        write("test/ours-v0", episodes, environment={"id": ""})
        minaris("test/other-v0", episodes, OBSERVATIONS, data_format)
        ours, other = load_episodes("test/ours-v0"), load_episodes("test/other-v0")
        np.testing.assert_array_equal(ours.observations, other.observations)
        np.testing.assert_array_equal(ours.terminated, other.terminated)
        assert ours.spec.fingerprint == other.spec.fingerprint

    def test_the_fingerprint_sees_every_array_and_the_episodes(self) -> None:
        base = recorded(4, 0)
        variants = {
            "base-v0": [base],
            "rewards-v0": [recorded(4, 0, rewards=base.rewards + 1)],
            "actions-v0": [recorded(4, 0, actions=base.actions * 0.5)],
            "observations-v0": [recorded(4, 0, observations=base.observations + 1)],
            "ending-v0": [recorded(4, 0, "truncated")],
            "split-v0": [recorded(2, 0, observations=base.observations[:3]), recorded(2, 0)],
        }
        for name, episodes in variants.items():
            write(f"test/{name}", episodes)
        prints = {load_episodes(f"test/{name}").spec.fingerprint for name in variants}
        assert len(prints) == len(variants)

    @pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
    def test_nested_dict_observations(self, data_format: str) -> None:
        rng = np.random.default_rng(0)
        nested = {
            "position": rng.uniform(size=(4, 2)).astype(np.float32),
            "body": {
                "spin": rng.uniform(size=(4, 1)).astype(np.float32),
                "mass": rng.uniform(size=(4, 2)).astype(np.float32),
            },
        }
        minaris("test/nested-v0", [recorded(3, observations=nested)], NESTED, data_format)
        loaded = load_episodes("test/nested-v0")
        assert loaded.spec.observation_keys == ("body/mass", "body/spin", "position")
        expected = np.concatenate(
            [nested["body"]["mass"], nested["body"]["spin"], nested["position"]], axis=1
        )
        np.testing.assert_array_equal(loaded.observations, expected[:-1])
        described = describe("test/nested-v0")
        assert described.flattening == (("body/mass", 2), ("body/spin", 1), ("position", 2))
        assert [column.name for column in described.columns][:3] == [
            "body/mass 0",
            "body/mass 1",
            "body/spin 0",
        ]

    @pytest.mark.parametrize(
        ("environment", "scores"),
        [
            ("Walker2d-v4", (1.629008, 4592.3)),
            ("HalfCheetah-v5", (-280.178953, 12135.0)),
            ("my.own:Hopper-v2", (-20.272305, 3234.3)),
            ("Ant-v5", (-325.6, 3879.7)),
            ("AntMaze_UMaze-v5", (None, None)),
            ("Humanoid-v5", (None, None)),
        ],
    )
    def test_d4rl_reference_scores_are_the_fallback(self, environment: str, scores: tuple) -> None:
        write(environment={"id": environment})
        spec = load_episodes("test/box-v0").spec
        assert (spec.ref_min_score, spec.ref_max_score) == scores

    def test_the_environment_for_evaluation_goes_first(self) -> None:
        minaris("test/eval-v0", [recorded(2)], OBSERVATIONS, "hdf5")
        assert load_episodes("test/eval-v0").spec.environment["id"] == ""
        change_metadata("test/eval-v0", env_spec=gym.spec("Hopper-v5").to_json())
        assert load_episodes("test/eval-v0").spec.environment["id"] == "Hopper-v5"
        change_metadata("test/eval-v0", eval_env_spec=gym.spec("Ant-v5").to_json())
        assert load_episodes("test/eval-v0").spec.environment["id"] == "Ant-v5"

    def test_a_d4rl_name_finds_its_minari_set(self) -> None:
        write("d4rl/hopper/medium-replay-v2")
        assert load_episodes("hopper-medium-replay-v2").spec.dataset_id == "d4rl/hopper/medium-replay-v2"


class TestLoadRefuses:
    def test_a_missing_set_and_names_its_neighbours(self) -> None:
        write("mujoco/hopper/medium-v0")
        with pytest.raises(UserError) as caught:
            load_episodes("mujoco/hopper/medum-v0")
        one_line(caught, "mujoco/hopper/medium-v0", "tt-ray data download", "tt-ray data collect")

    def test_a_missing_d4rl_set_and_says_how_to_download_it(self) -> None:
        with pytest.raises(UserError) as caught:
            load_episodes("hopper-medium-replay-v2")
        one_line(caught, "tt-ray data download hopper-medium-replay-v2")

    @pytest.mark.parametrize("bad", ["../elsewhere", "", "a b", "/etc-v0"])
    def test_a_malformed_id(self, bad: str) -> None:
        with pytest.raises(UserError) as caught:
            load_episodes(bad)
        one_line(caught, "malformed")

    @pytest.mark.parametrize(
        ("field", "index", "value", "label"),
        [
            ("observations", (3, 2), np.nan, "observation 2 is NaN"),
            ("actions", (3, 1), np.inf, "action 1 is infinite"),
            ("rewards", (3,), -np.inf, "reward is infinite"),
        ],
    )
    def test_values_that_are_not_finite(self, field: str, index: tuple, value: float, label: str) -> None:
        bad = recorded(6)
        getattr(bad, field)[index] = value
        write(episodes=[recorded(2), bad])
        with pytest.raises(UserError) as caught:
            load_episodes("test/box-v0")
        one_line(caught, "test/box-v0", "episode 1", "step 3", label)

    def test_an_empty_episode(self) -> None:
        folder = write()
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            for key in ("rewards", "actions", "terminations", "truncations"):
                shorten(file["episode_1"], key, 0)
        with pytest.raises(UserError) as caught:
            load_episodes("test/box-v0")
        one_line(caught, "episode 1", "empty")

    def test_arrays_of_unequal_length(self) -> None:
        folder = write()
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            shorten(file["episode_2"], "observations", 5)
        with pytest.raises(UserError) as caught:
            load_episodes("test/box-v0")
        one_line(caught, "episode 2", "do not fit")

    @pytest.mark.parametrize("space", [Discrete(4), MultiDiscrete([2, 3])])
    def test_discrete_actions(self, space: gym.Space) -> None:
        actions = np.stack([space.sample() for _ in range(3)])
        minaris("test/discrete-v0", [recorded(3, actions=actions)], OBSERVATIONS, "hdf5", space)
        with pytest.raises(UserError) as caught:
            load_episodes("test/discrete-v0")
        one_line(caught, "discrete action space", str(space))

    def test_other_actions_and_observations(self) -> None:
        minaris("test/other-v0", [recorded(3)], OBSERVATIONS, "hdf5", ACTIONS)
        change_metadata(
            "test/other-v0", action_space=minari.serialization.serialize_space(Dict({"a": ACTIONS}))
        )
        with pytest.raises(UserError) as caught:
            load_episodes("test/other-v0")
        one_line(caught, "must be a Box")
        minaris("test/states-v0", [recorded(3, observations=np.zeros(4, int))], Discrete(3), "hdf5")
        with pytest.raises(UserError) as caught:
            load_episodes("test/states-v0")
        one_line(caught, "test/states-v0", "Discrete(3)")

    @pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
    def test_a_damaged_file(self, kept: float) -> None:
        path = write() / "data" / "main_data.hdf5"
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(UserError) as caught:
            load_episodes("test/box-v0")
        one_line(caught, "test/box-v0", str(path), "damaged")

    def test_a_file_that_is_gone_and_metadata_that_is_no_json(self) -> None:
        data = write() / "data"
        (data / "main_data.hdf5").rename(data / "elsewhere")
        with pytest.raises(UserError) as caught:
            load_episodes("test/box-v0")
        one_line(caught, "test/box-v0")
        (data / "metadata.json").write_text("{")
        with pytest.raises(UserError) as caught:
            load_episodes("test/box-v0")
        one_line(caught, "test/box-v0")

    def test_missing_episodes(self, minari_root: Path) -> None:
        minaris("test/arrow-v0", [recorded(2), recorded(3)], OBSERVATIONS, "arrow")
        shutil.rmtree(minari_root / "test/arrow-v0/data/1")
        with pytest.raises(UserError) as caught:
            load_episodes("test/arrow-v0")
        one_line(caught, "test/arrow-v0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "episodes", "steps", "mean", "std"),
    [
        ("hopper/medium-v0", 456, 200_093, 1600, 818),
        ("hopper/expert-v0", 105, 100_985, 3446, 504),
        ("hopper/mixed-v0", 544, 100_102, 558, 805),
        ("pointmaze/umaze-v0", 67, 20_100, 4.1, 1.5),
        ("pointmaze/fourrooms-v0", 331, 50_075, 1.0, 0.0),
    ],
)
def test_recorded_sets_have_their_known_returns(
    name: str, episodes: int, steps: int, mean: float, std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "TT_RAY_BENCH_DATA" not in os.environ:
        pytest.skip("TT_RAY_BENCH_DATA is not set: it names the folder of recorded data sets")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path(os.environ["TT_RAY_BENCH_DATA"]) / "minari"))
    loaded = load_episodes(f"bench/{name}")
    assert (len(loaded), len(loaded.rewards)) == (episodes, steps)
    decimals = 0 if mean > 10 else 1
    assert round(float(loaded.returns.mean()), decimals) == mean
    assert round(float(loaded.returns.std()), decimals) == std
