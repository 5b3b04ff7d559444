"""Environments from descriptions: flat observations, bounded actions, no hidden reset, clear errors."""

import dataclasses
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from tt_ray.data.episodes import DataSpec
from tt_ray.errors import UserError
from tt_ray.evaluation.environments import check_compatible, make_environment, random_episode_returns

TOY = '''
import gymnasium as gym
import numpy as np

class Toy(gym.Env):
    """Dict observations: two leaves side by side, one of them nested and two-dimensional."""
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    observation_space = gym.spaces.Dict({
        "speed": gym.spaces.Box(-9.0, 9.0, (1,)),
        "place": gym.spaces.Dict({"grid": gym.spaces.Box(-9.0, 9.0, (2, 2))}),
    })

    def __init__(self, scale=1.0):
        self.scale = scale

    def observe(self):
        grid = np.array([[1.0, 2.0], [3.0, self.x]], dtype=np.float32)
        return {"speed": np.array([self.x * self.scale], dtype=np.float32), "place": {"grid": grid}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-1, 1))
        return self.observe(), {}

    def step(self, action):
        self.x += float(action[0])
        return self.observe(), -abs(self.x), False, False, {}

class Words(Toy):
    observation_space = gym.spaces.Text(5)

class Goal(Toy):
    observation_space = gym.spaces.Dict({
        "observation": gym.spaces.Box(-9.0, 9.0, (3,)),
        "desired_goal": gym.spaces.Box(-9.0, 9.0, (2,)),
        "achieved_goal": gym.spaces.Box(-9.0, 9.0, (1,)),
    })

    def observe(self):
        values = np.float32([self.x, 10, 20, 30, 40, 50])
        return {"observation": values[3:], "desired_goal": values[1:3], "achieved_goal": values[:1]}

gym.register("ToyGoal-v0", entry_point=Goal)
gym.register("ToyDict-v0", entry_point=Toy, max_episode_steps=5)
gym.register("ToyWords-v0", entry_point=Words)
'''


@pytest.fixture
def toy_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working folder that registers environments when it is imported."""
    (tmp_path / "toy_envs.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "toy_envs", raising=False)
    return "toy_envs"


def spec_of(environment: dict, **changes: object) -> DataSpec:
    fields = {
        "dataset_id": "a/b-v0",
        "environment": environment,
        "observation_keys": (),
        "observation_dim": 11,
        "action_dim": 3,
        "action_low": (-1.0,) * 3,
        "action_high": (1.0,) * 3,
        "ref_min_score": None,
        "ref_max_score": None,
        "fingerprint": "0",
    }
    return DataSpec(**{**fields, **changes})


def test_observations_are_those_of_the_environment_in_float32_and_cropped() -> None:
    expected, _ = gym.make("Hopper-v5").reset(seed=3)
    whole, _ = make_environment({"id": "Hopper-v5"}).reset(seed=3)
    cropped, _ = make_environment({"id": "Hopper-v5"}, observation_dim=5).reset(seed=3)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, expected.astype(np.float32))
    np.testing.assert_array_equal(cropped, whole[:5])


def test_actions_are_clipped_to_the_bounds() -> None:
    def after(action: np.ndarray) -> np.ndarray:
        env = make_environment({"id": "Hopper-v5"})
        env.reset(seed=0)
        return env.step(action)[0]

    far, bound, inside = (after(np.array([x, 0.0, -x])) for x in (100.0, 1.0, 0.5))
    np.testing.assert_array_equal(far, bound)
    assert not np.array_equal(bound, inside)


def test_max_steps_replaces_the_limit_and_nothing_resets_by_itself() -> None:
    description = json.loads(gym.spec("HalfCheetah-v5").to_json())
    env = make_environment(description, max_steps=3)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(6))
    env.reset(seed=0)
    flags = [env.step(np.zeros(6))[2:4] for _ in range(3)]
    assert flags == [(False, False), (False, False), (False, True)]
    with pytest.raises(RuntimeError, match="over"):
        env.step(np.zeros(6))
    long = make_environment(description, max_steps=1200)
    long.reset(seed=0)
    assert not any(long.step(np.zeros(6))[3] for _ in range(1100))


def test_import_path_dict_observations_and_their_order(toy_module: str) -> None:
    env = make_environment({"id": f"{toy_module}:ToyDict-v0"})
    flat, _ = env.reset(seed=1)
    x = flat[4]
    np.testing.assert_array_equal(flat, np.array([1, 2, 3, x, x], dtype=np.float32))  # place/grid, then speed
    nested = env.unflatten(np.stack([flat, flat]))
    np.testing.assert_array_equal(nested["place"]["grid"][1], [[1, 2], [3, x]])
    np.testing.assert_array_equal(nested["speed"], [[x], [x]])
    other = make_environment({"id": f"{toy_module}:ToyDict-v0"}, observation_keys=("speed",))
    assert other.reset(seed=1)[0].tolist() == [x]


def test_only_the_named_parts_of_an_observation_are_kept(toy_module: str) -> None:
    env = make_environment({"id": f"{toy_module}:ToyDict-v0"}, observation_keys=("place/grid",))
    flat, _ = env.reset(seed=1)
    np.testing.assert_array_equal(flat[:3], [1, 2, 3])
    assert (flat.shape, env.observation_space.shape, env.goal_dim) == ((4,), (4,), 0)
    np.testing.assert_array_equal(env.unflatten(flat[None])["place"]["grid"][0], flat.reshape(2, 2))


def test_the_goal_comes_before_the_observation(toy_module: str) -> None:
    description = {"id": f"{toy_module}:ToyGoal-v0"}
    whole, _ = make_environment(description).reset(seed=1)
    achieved, desired, seen = whole[:1], whole[1:3], whole[3:]
    keys = ("achieved_goal", "observation")
    env = make_environment(description, observation_keys=keys, goal_keys=("desired_goal",))
    first, _ = env.reset(seed=1)
    np.testing.assert_array_equal(first, np.concatenate([desired, achieved, seen]))
    assert (env.goal_dim, env.observation_space.shape, first.dtype) == (2, (6,), np.float32)
    assert env.step(np.zeros(1))[0].shape == (6,)
    nested = env.unflatten(np.stack([first, first]))
    np.testing.assert_array_equal(nested["desired_goal"], [desired, desired])
    np.testing.assert_array_equal(nested["observation"], [seen, seen])


def test_a_goal_is_never_cropped_and_never_observed_by_default(toy_module: str) -> None:
    description = {"id": f"{toy_module}:ToyGoal-v0"}
    whole, _ = make_environment(description).reset(seed=1)
    goal_keys = ("desired_goal",)
    usual, _ = make_environment(description, goal_keys=goal_keys).reset(seed=1)
    np.testing.assert_array_equal(usual, whole[[1, 2, 0, 3, 4, 5]])
    env = make_environment(description, goal_keys=goal_keys, observation_dim=2)
    np.testing.assert_array_equal(env.reset(seed=1)[0], whole[[1, 2, 0, 3]])
    assert env.observation_space.shape == (4,)
    with pytest.raises(UserError, match="ToyDict-v0 has no observation 'desired_goal'"):
        make_environment({"id": f"{toy_module}:ToyDict-v0"}, goal_keys=goal_keys)


def test_a_goal_model_and_an_environment_that_do_not_fit(toy_module: str) -> None:
    description = {"id": f"{toy_module}:ToyGoal-v0"}
    env = make_environment(description, goal_keys=("desired_goal",))
    spec = spec_of(
        description,
        observation_keys=("achieved_goal", "observation"),
        observation_dim=4,
        action_dim=1,
        goal_keys=("desired_goal",),
        leaf_sizes=(2, 1, 3),
    )
    check_compatible(spec, env)
    with pytest.raises(UserError, match=r"2 goal dimensions.*trained with 3"):
        check_compatible(dataclasses.replace(spec, leaf_sizes=(3, 1, 3)), env)
    with pytest.raises(UserError, match=r"4 observation dimensions.*trained with 6"):
        check_compatible(dataclasses.replace(spec, observation_dim=6), env)
    with pytest.raises(UserError, match=r"2 goal dimensions.*trained with 0"):
        check_compatible(dataclasses.replace(spec, goal_keys=(), leaf_sizes=()), env)


def test_descriptions_of_older_gymnasium_with_their_arguments(toy_module: str) -> None:
    description = {
        "id": "ToyDict-v0",
        "entry_point": "toy_envs:Toy",
        "max_episode_steps": 2,
        "autoreset": False,
        "apply_api_compatibility": False,
        "kwargs": {"scale": 10.0},
        "additional_wrappers": [],
        "vector_entry_point": None,
    }
    env = make_environment(description)
    flat, _ = env.reset(seed=0)
    np.testing.assert_allclose(flat[4], 10 * flat[3], rtol=1e-6)
    assert [env.step(np.zeros(1))[3] for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"id": "Hoper-v5"}, "unknown environment 'Hoper-v5': did you mean .*Hopper-v5"),
        ({"id": "Zzzzzz-v0"}, "unknown environment 'Zzzzzz-v0'.*import path"),
        ({"id": "no_such_package.envs:X-v0"}, "module 'no_such_package.envs'.*cannot be imported"),
        ({"id": "X-v0", "entry_point": "no_such_package:X"}, "module 'no_such_package'.*cannot be imported"),
        ({"id": "CartPole-v1"}, r"CartPole-v1 .*Discrete\(2\)"),
        ({"id": "Hopper-v5", "kwargs": {"no_such": 1}}, "Hopper-v5 cannot be made.*no_such"),
        ({"id": ""}, "names no environment"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(environment: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_environment(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "description",
    [
        {"id": "X-v0", "entry_point": "os:system", "kwargs": {"command": "touch executed"}},
        {"id": "X-v0", "entry_point": "subprocess:Popen", "kwargs": {"args": ["touch", "executed"]}},
        {"id": "X-v0", "entry_point": "os:no_such_thing"},
        {"id": "X-v0", "entry_point": "os"},
        {
            "id": "Hopper-v5",
            "additional_wrappers": [{"name": "x", "entry_point": "os:system", "kwargs": {"command": "x"}}],
        },
    ],
)
def test_a_description_can_call_nothing_but_environments(
    description: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes with data and checkpoints of others, and its arguments stand beside it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not called") as error:
        make_environment(description)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_registered_function_may_make_the_environment(
    toy_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_envs.py").write_text(
        "import gymnasium as gym\n"
        "def make(**options):\n    return gym.make('Pendulum-v1', **options).unwrapped\n"
        "gym.register('Made-v0', entry_point='made_envs:make')\n"
    )
    monkeypatch.chdir(tmp_path)
    make_environment({"id": "made_envs:Made-v0", "entry_point": "made_envs:make"}).close()
    with pytest.raises(UserError, match="not called"):
        make_environment({"id": "made_envs:Other-v0", "entry_point": "made_envs:make"})


def test_unsupported_observations_are_named(toy_module: str) -> None:
    with pytest.raises(UserError, match=r"ToyWords-v0.*Text"):
        make_environment({"id": f"{toy_module}:ToyWords-v0"})
    with pytest.raises(UserError, match="no observation 'velocity', only place/grid, speed"):
        make_environment({"id": f"{toy_module}:ToyDict-v0"}, observation_keys=("speed", "velocity"))


def test_a_module_that_fails_is_named_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_envs.py").write_text("raise ValueError('two\\nlines')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'broken_envs'.*ValueError: two lines"):
        make_environment({"id": "broken_envs:X-v0"})


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    description = {"id": "PointMaze_UMaze-v3", "entry_point": "gymnasium_robotics.envs.maze:PointMazeEnv"}
    with pytest.raises(UserError, match="pip install 'tt-ray\\[mazes\\]'"):
        make_environment(description)


def test_a_model_and_an_environment_that_do_not_fit() -> None:
    env = make_environment({"id": "Hopper-v5"})
    spec = spec_of({"id": "Hopper-v5"})
    check_compatible(spec, env)
    with pytest.raises(UserError, match=r"11 observation dimensions.*trained with 17"):
        check_compatible(dataclasses.replace(spec, observation_dim=17), env)
    with pytest.raises(UserError, match=r"3 action dimensions.*trained with 6"):
        check_compatible(dataclasses.replace(spec, action_dim=6), env)


def test_random_returns_are_fixed_by_their_seeds() -> None:
    first = random_episode_returns({"id": "Hopper-v5"}, [0, 1, 2])
    again = random_episode_returns({"id": "Hopper-v5"}, [2, 0])
    assert again == [first[2], first[0]]
    assert len(set(first)) == 3
    assert 0 < np.mean(first) < 200


def test_mujoco_writes_no_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_environment({"id": "HalfCheetah-v5"})
    assert list(tmp_path.iterdir()) == []
