"""Which leaves of a Dict observation are kept, which is the goal that is asked for, and what forms a goal."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from minari_examples import NESTED, one_line, recorded, write

from tt_ray.config import DatasetConfig, DiscretizerConfig, GoalConfig
from tt_ray.data.episodes import DataSpec, Episodes
from tt_ray.data.goals import goal_slots
from tt_ray.data.minari_sets import load_episodes
from tt_ray.data.token_store import TokenSet
from tt_ray.data.tokens import TokenLayout
from tt_ray.errors import UserError

MAZE = Dict(
    {
        "observation": Box(-9, 9, (4,)),
        "achieved_goal": Box(-9, 9, (2,)),
        "desired_goal": Box(-9, 9, (2,)),
    }
)
PLACE = Dict(
    {"a_speed": Box(-9, 9, (3,)), "achieved_goal": Box(-9, 9, (2,)), "desired_goal": Box(-9, 9, (2,))}
)
DEEP = Dict(
    {
        "achieved_goal": Dict({"door": Box(-9, 9, (1,)), "lamp": Box(-9, 9, (1,))}),
        "desired_goal": Dict({"door": Box(-9, 9, (1,)), "lamp": Box(-9, 9, (1,))}),
        "desired_goal_seen": Box(-9, 9, (1,)),
    }
)


def sample(space: Any, rows: int, rng: np.random.Generator) -> Any:
    """Rows of a nested dict of arrays, no two values alike."""
    if isinstance(space, Dict):
        return {key: sample(child, rows, rng) for key, child in space.spaces.items()}
    return rng.normal(size=(rows, *space.shape)).astype(np.float32)


def write_dicts(space: Dict, dataset_id: str = "test/maze-v0") -> list[Any]:
    """A data set of two episodes; returns their observations, but for the last that are not kept."""
    rng = np.random.default_rng(7)
    seen = [sample(space, length + 1, rng) for length in (5, 3)]
    episodes = [recorded(length, observations=one) for length, one in zip((5, 3), seen, strict=True)]
    write(dataset_id, episodes, observation_space=space)
    return seen


def joined(seen: list[Any], *paths: str) -> np.ndarray:
    """The leaves `paths` side by side, the episodes end to end."""
    rows = []
    for one in seen:
        leaves = []
        for path in paths:
            leaf = one
            for part in path.split("/"):
                leaf = leaf[part]
            leaves.append(leaf[:-1])
        rows.append(np.concatenate(leaves, axis=1))
    return np.concatenate(rows)


@pytest.mark.usefixtures("minari_root")
class TestKeys:
    def test_only_the_chosen_leaves_are_kept_in_their_usual_order(self) -> None:
        seen = write_dicts(MAZE)
        whole = load_episodes("test/maze-v0")
        some = load_episodes("test/maze-v0", observation_keys=("observation", "achieved_goal"))
        np.testing.assert_array_equal(some.observations, joined(seen, "achieved_goal", "observation"))
        assert some.spec.observation_keys == ("achieved_goal", "observation")
        assert some.spec.observation_dim == 6
        assert (some.spec.cropped, whole.spec.cropped) == (True, False)
        assert some.spec.fingerprint == whole.spec.fingerprint
        assert some.spec.goal_keys == ()

    def test_all_leaves_named_are_all_leaves(self) -> None:
        write_dicts(NESTED)
        whole = load_episodes("test/maze-v0")
        named = load_episodes("test/maze-v0", observation_keys=("position", "body/mass", "body/spin"))
        np.testing.assert_array_equal(named.observations, whole.observations)
        assert named.spec == whole.spec

    def test_a_nested_leaf_and_only_its_first_dimension(self) -> None:
        seen = write_dicts(NESTED)
        some = load_episodes("test/maze-v0", 2, ("position", "body/mass"))
        np.testing.assert_array_equal(some.observations, joined(seen, "body/mass"))
        assert (some.spec.observation_dim, some.spec.cropped) == (2, True)
        with pytest.raises(UserError) as caught:
            load_episodes("test/maze-v0", 5, ("position", "body/mass"))
        one_line(caught, "dataset.observation_dims", "between 1 and 4", "test/maze-v0", "5")

    def test_an_unknown_key_is_refused_with_the_nearest(self) -> None:
        write_dicts(MAZE)
        with pytest.raises(UserError) as caught:
            load_episodes("test/maze-v0", observation_keys=("observation", "achieved"))
        one_line(caught, "dataset.observation_keys", "test/maze-v0", "'achieved'", "achieved_goal?")
        with pytest.raises(UserError) as caught:
            load_episodes("test/maze-v0", observation_keys=("xyz",))
        one_line(caught, "'xyz'", "achieved_goal or desired_goal or observation?")

    def test_plain_vectors_have_no_keys(self) -> None:
        write()
        with pytest.raises(UserError) as caught:
            load_episodes("test/box-v0", observation_keys=("observation",))
        one_line(caught, "dataset.observation_keys", "test/box-v0", "plain vectors")


@pytest.mark.usefixtures("minari_root")
class TestGoals:
    def test_the_desired_goal_is_no_part_of_a_goal_models_observations(self) -> None:
        seen = write_dicts(MAZE)
        data = load_episodes("test/maze-v0", goal=GoalConfig())
        np.testing.assert_array_equal(data.observations, joined(seen, "achieved_goal", "observation"))
        assert data.spec.goal_keys == ("desired_goal",)
        assert (data.spec.goal_dim, data.spec.observation_dim, data.spec.cropped) == (2, 6, True)
        assert goal_slots(GoalConfig(), data.spec) == (0, 1)
        assert goal_slots(None, data.spec) == ()

    def test_the_achieved_goal_is_found_wherever_it_lies(self) -> None:
        write_dicts(PLACE)
        data = load_episodes("test/maze-v0", goal=GoalConfig())
        assert data.spec.observation_keys == ("a_speed", "achieved_goal")
        assert goal_slots(GoalConfig(), data.spec) == (3, 4)

    def test_goals_of_several_leaves(self) -> None:
        seen = write_dicts(DEEP)
        data = load_episodes("test/maze-v0", goal=GoalConfig())
        assert data.spec.goal_keys == ("desired_goal/door", "desired_goal/lamp")
        assert data.spec.observation_keys == ("achieved_goal/door", "achieved_goal/lamp", "desired_goal_seen")
        assert goal_slots(GoalConfig(), data.spec) == (0, 1)
        expected = joined(seen, "achieved_goal/door", "achieved_goal/lamp", "desired_goal_seen")
        np.testing.assert_array_equal(data.observations, expected)

    def test_without_an_environments_goal_all_dimensions_form_one(self) -> None:
        write()
        data = load_episodes("test/box-v0", goal=GoalConfig())
        assert goal_slots(GoalConfig(), data.spec) == (0, 1, 2)
        assert (data.spec.goal_keys, data.spec.goal_dim, data.spec.cropped) == ((), 0, False)
        assert goal_slots(GoalConfig(dims=(2, 0)), data.spec) == (2, 0)
        cropped = load_episodes("test/box-v0", 2, goal=GoalConfig())
        assert goal_slots(GoalConfig(), cropped.spec) == (0, 1)
        write_dicts(NESTED)
        assert goal_slots(GoalConfig(), load_episodes("test/maze-v0", goal=GoalConfig()).spec) == (
            0,
            1,
            2,
            3,
            4,
        )

    def test_the_dimensions_that_the_environment_means_can_be_named(self) -> None:
        write_dicts(MAZE)
        goal = GoalConfig(dims=(1, 0))
        data = load_episodes("test/maze-v0", observation_keys=("observation",), goal=goal)
        assert goal_slots(goal, data.spec) == (1, 0)

    @pytest.mark.parametrize(
        ("keys", "goal", "parts"),
        [
            (
                None,
                GoalConfig(dims=(0, 6)),
                ("6 is none of the observation dimensions 0 to 5", "test/maze-v0"),
            ),
            (None, GoalConfig(dims=(0, 1, 2)), ("3 of the observation dimensions", "goals of 2")),
            (("observation",), GoalConfig(), ("4 of the observation dimensions", "goals of 2")),
        ],
    )
    def test_goals_that_do_not_fit_are_refused(
        self, keys: tuple[str, ...] | None, goal: GoalConfig, parts: tuple[str, ...]
    ) -> None:
        write_dicts(MAZE)
        with pytest.raises(UserError) as caught:
            load_episodes("test/maze-v0", observation_keys=keys, goal=goal)
        one_line(caught, "goal.dims: ", *parts)

    def test_half_of_an_achieved_goal_is_none(self) -> None:
        write_dicts(MAZE)
        with pytest.raises(UserError) as caught:
            load_episodes("test/maze-v0", 1, goal=GoalConfig())
        one_line(caught, "dataset.observation_dims: 1", "achieved_goal", "at least 2", "goal.dims")

    def test_something_must_be_left_to_observe(self) -> None:
        write_dicts(MAZE)
        with pytest.raises(UserError) as caught:
            load_episodes("test/maze-v0", observation_keys=("desired_goal",), goal=GoalConfig())
        one_line(caught, "dataset.observation_keys", "desired_goal")


@pytest.mark.usefixtures("minari_root")
class TestStores:
    def build(self, goal: GoalConfig | None) -> tuple[Episodes, TokenSet]:
        write_dicts(MAZE)
        data = load_episodes("test/maze-v0", goal=goal)
        return data, TokenSet.build(data, DatasetConfig(id="x"), DiscretizerConfig(num_bins=9), goal)

    def test_tokens_know_the_goals_slots_and_keep_them(self, tmp_path: Path) -> None:
        data, tokens = self.build(GoalConfig())
        assert tokens.layout == TokenLayout(6, 2, 9, goal_slots=(0, 1))
        assert tokens.tokens.shape == (8, 10)
        tokens.save(tmp_path / "tokens")
        loaded = TokenSet.load(tmp_path / "tokens")
        assert (loaded.layout, loaded.spec) == (tokens.layout, data.spec)
        np.testing.assert_array_equal(loaded.tokens, tokens.tokens)

    def test_without_goals_nothing_of_them_is_written(self, tmp_path: Path) -> None:
        data, tokens = self.build(None)
        assert tokens.layout.goal_dim == 0
        tokens.save(tmp_path / "tokens")
        written = json.loads((tmp_path / "tokens" / "tokens.json").read_text())["data"]
        assert not {"goal_keys", "leaf_sizes"} & written.keys()
        assert DataSpec.from_json(written) == data.spec

    def test_specs_and_layouts_come_back_from_json(self) -> None:
        data, tokens = self.build(GoalConfig())
        for spec in (data.spec, replace(data.spec, goal_keys=(), leaf_sizes=())):
            assert DataSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
        for layout in (tokens.layout, TokenLayout(6, 2, 9, partial=True)):
            assert TokenLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout

    def test_what_was_written_before_there_were_goals_can_still_be_read(self) -> None:
        old = {"observation_dim": 6, "action_dim": 2, "num_bins": 9}
        assert TokenLayout.from_json(old) == TokenLayout(6, 2, 9)
        write()
        spec = load_episodes("test/box-v0").spec
        lists = json.loads(json.dumps(asdict(spec)))
        written = {key: value for key, value in lists.items() if key not in ("goal_keys", "leaf_sizes")}
        assert DataSpec.from_json(written) == spec
        assert spec.goal_keys == ()
