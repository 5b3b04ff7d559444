"""Environments from a data set's description: flat observations, bounded actions, no hidden reset."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
import importlib.util
import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from numpy.typing import NDArray

from tt_ray.data import observations as flattening
from tt_ray.data.episodes import DataSpec
from tt_ray.errors import UserError
from tt_ray.evaluation.mazes import import_robotics, remove_leftover

logger = logging.getLogger(__name__)


class FlatEnvironment(gym.Wrapper):
    """An environment as the planner sees it: observations float32 [N], actions [M] clipped to their bounds.

    For a goal model, the goal that the environment asks for comes first in every observation, [G + N].
    Nothing is reset by itself: a step after the end of an episode raises `RuntimeError`.
    """

    def __init__(
        self, env: gym.Env, keys: Sequence[str], observation_dim: int | None, goal_keys: Sequence[str] = ()
    ) -> None:
        super().__init__(env)
        self._keys = (*goal_keys, *keys)
        self.goal_dim = sum(_leaf_size(env.observation_space, key) for key in goal_keys)
        """G, dimensions of the goal at the front of every observation; 0 for none."""
        whole = sum(_leaf_size(env.observation_space, key) for key in keys or ("",))
        self._dim = self.goal_dim + min(whole, observation_dim or whole)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self._dim,), np.float32)
        self._low = env.action_space.low
        self._high = env.action_space.high
        self._running = False

    def _flat(self, observation: Any) -> NDArray[np.float32]:
        return flattening.flatten_observation(observation, self._keys)[: self._dim]

    def unflatten(self, observations: NDArray[np.float32]) -> Any:
        """Flat observations [L, G + N] as the environment gives them: an array or a nested dict of them.

        Leaves that are not kept are missing. Not for observations of which only the first dimensions are.
        """
        leaves = [(key, _leaf_shape(self.env.observation_space, key)) for key in self._keys or ("",)]
        parts = np.split(observations, np.cumsum([math.prod(shape) for _, shape in leaves])[:-1], axis=1)
        tree: dict[str, Any] = {}
        for (key, shape), part in zip(leaves, parts, strict=True):
            *parents, name = key.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = part.reshape(len(part), *shape)
        return tree if self._keys else tree[""]

    def clip(self, action: Any) -> NDArray[np.float32]:
        """The action [M] that a step really takes: `action` within the space's bounds, float32."""
        return np.minimum(np.maximum(action, self._low), self._high).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; the first observation [G + N]."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._running = True
        return self._flat(observation), info

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One step with the clipped action: observation [G + N], reward, terminated, truncated, info."""
        if not self._running:
            raise RuntimeError("the episode is over (or was never begun): call reset first")
        observation, reward, terminated, truncated, info = self.env.step(self.clip(action))
        self._running = not (terminated or truncated)
        return self._flat(observation), float(reward), bool(terminated), bool(truncated), info


def make_environment(
    environment: Mapping[str, Any],
    *,
    observation_keys: Sequence[str] = (),
    observation_dim: int | None = None,
    goal_keys: Sequence[str] = (),
    max_steps: int | None = None,
    render: bool = False,
) -> FlatEnvironment:
    """The environment that a data set's description names, its actions clipped and its observations flat.

    `environment` is Gymnasium's EnvSpec as JSON data, or `{"id": ...}` alone; the id may be an import path
    (`package.module:EnvId`), whose module is also looked for in the working folder. `observation_keys` are
    the parts of a Dict observation that are kept, in the order in which they are flattened (none given: all,
    sorted by path), `observation_dim` how many dimensions of these; `goal_keys` come before them and are no
    part of them. `max_steps` replaces the time limit; `render`: `env.render()` returns an RGB frame.

    A description comes with data and checkpoints of others, so it may name classes of environments and
    wrappers, whose modules are imported from this machine, and nothing else that can be called.

    Raises `UserError` where the environment is unknown, cannot be imported, or its spaces are not supported.
    """
    _forward_mujoco_warnings()
    options: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
    try:
        spec = _environment_spec(environment)
        env = gym.make(spec, max_episode_steps=max_steps, disable_env_checker=True, **options)
    except UserError:
        raise
    except Exception as error:  # the environment may be anybody's, and fail in any way
        raise UserError(f"environment {environment.get('id')} cannot be made: {_one_line(error)}") from error
    remove_leftover(env)
    try:
        return _flatten(env, environment["id"], observation_keys, observation_dim, goal_keys)
    except UserError:
        env.close()
        raise


def check_compatible(spec: DataSpec, env: gym.Env) -> None:
    """`UserError` where an environment from `make_environment` does not fit a model's data."""
    name = spec.environment.get("id", "the environment")
    goal_dim = getattr(env, "goal_dim", 0)
    for word, trained, offered in (
        ("goal", spec.goal_dim, goal_dim),
        ("observation", spec.observation_dim, env.observation_space.shape[0] - goal_dim),
        ("action", spec.action_dim, math.prod(env.action_space.shape)),
    ):
        if trained != offered:
            raise UserError(
                f"{name} has {offered} {word} dimensions, but the model was trained with {trained} "
                f"({spec.dataset_id}): evaluate in the environment that the data set was recorded in"
            )


def random_episode_returns(
    environment: Mapping[str, Any], seeds: Sequence[int], *, max_steps: int | None = None
) -> list[float]:
    """Undiscounted returns of a uniformly random policy: one episode for each of `seeds`."""
    env = make_environment(environment, max_steps=max_steps)
    try:
        return [random_return(env, seed) for seed in seeds]
    finally:
        env.close()


def random_return(env: gym.Env, seed: int) -> float:
    """Undiscounted return of one uniformly random episode; `seed` fixes its start and its actions."""
    env.reset(seed=seed)
    env.action_space.seed(seed)
    total, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        total += float(reward)
        over = terminated or truncated
    return total


def _environment_spec(environment: Mapping[str, Any]) -> EnvSpec:
    """The description as Gymnasium's EnvSpec, its module imported."""
    if not environment.get("id") or not isinstance(environment["id"], str):
        raise UserError(
            "the data set names no environment, and episodes need one: set evaluation.environment, "
            "or import the data again with --env"
        )
    module, _, name = environment["id"].rpartition(":")
    if module:
        _import_module(module, environment["id"])
    elif importlib.util.find_spec("gymnasium_robotics") is not None:
        gym.register_envs(import_robotics())
    entry_point = str(environment.get("entry_point") or "")
    if (
        entry_point.startswith("gymnasium_robotics")
        and importlib.util.find_spec("gymnasium_robotics") is None
    ):
        raise UserError(f"environment {name} needs a further package: pip install 'tt-ray[mazes]'")
    if entry_point:
        _check_entry_point(entry_point, gym.Env, environment["id"])
        spec = EnvSpec(id=name)
    else:
        spec = _registered_spec(name)
    # Descriptions written by older releases hold fields that EnvSpec no longer has.
    known = {field.name for field in dataclasses.fields(EnvSpec) if field.init} - {
        "id",
        "additional_wrappers",
    }
    changes = {key: copy.deepcopy(value) for key, value in environment.items() if key in known}
    wrappers = environment.get("additional_wrappers") or ()
    if wrappers:
        changes["additional_wrappers"] = tuple(WrapperSpec(**wrapper) for wrapper in wrappers)
        for wrapper in changes["additional_wrappers"]:
            _check_entry_point(wrapper.entry_point, gym.Wrapper, environment["id"])
    return dataclasses.replace(spec, **changes)


def _registered_spec(name: str) -> EnvSpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older version of an environment is what the data set asks for
        try:
            return copy.deepcopy(gym.spec(name))
        except gym.error.Error as error:
            near = difflib.get_close_matches(name, gym.registry, n=3)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else "give an import path, package.module:EnvId"
            )
            if importlib.util.find_spec("gymnasium_robotics") is None and not near:
                hint += ", or pip install 'tt-ray[mazes]' if it is a maze's or a robot's"
            raise UserError(f"unknown environment {name!r}: {hint}") from error


def _check_entry_point(entry_point: str, kind: type, environment_id: str) -> None:
    """`UserError` unless it is a class of that kind, or what is registered here under the environment's id.

    Gymnasium calls an entry point with the arguments that stand beside it, whatever it is.
    """
    module, _, name = entry_point.partition(":")
    _import_module(module, environment_id)
    registered = gym.registry.get(environment_id.rpartition(":")[2])
    found = getattr(sys.modules[module], name, None)
    if isinstance(found, type) and issubclass(found, kind):
        return
    if registered is None or registered.entry_point != entry_point:
        raise UserError(
            f"environment {environment_id}: its entry point {entry_point} is no {kind.__name__} class, "
            "and is not called; register the environment in a module, and name it as module:EnvId"
        )


def _import_module(module: str, environment_id: str) -> None:
    """Import `module`, from the working folder too (an installed command does not look there)."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except Exception as error:  # the module is the user's, and may fail in any way
        raise UserError(
            f"module {module!r} of environment {environment_id} cannot be imported: "
            f"{type(error).__name__}: {_one_line(error)}"
        ) from error


def _flatten(
    env: gym.Env, name: str, keys: Sequence[str], observation_dim: int | None, goal_keys: Sequence[str]
) -> FlatEnvironment:
    if not isinstance(env.action_space, gym.spaces.Box) or len(env.action_space.shape) != 1:
        raise UserError(
            f"environment {name} has the action space {env.action_space}: "
            "only vectors of continuous actions (Box) are supported"
        )
    try:
        available = flattening.observation_keys(env.observation_space)
    except UserError as error:
        raise UserError(f"environment {name}: {error}") from error
    missing = sorted({*keys, *goal_keys} - set(available))
    if missing:
        raise UserError(
            f"environment {name} has no observation {missing[0]!r}, only {', '.join(available) or 'a Box'}"
        )
    kept = tuple(keys) or tuple(key for key in available if key not in goal_keys)
    return FlatEnvironment(env, kept, observation_dim, goal_keys)


def _leaf_size(space: gym.Space, key: str) -> int:
    return math.prod(_leaf_shape(space, key))


def _leaf_shape(space: Any, key: str) -> tuple[int, ...]:
    for part in filter(None, key.split("/")):
        space = space[part]
    return space.shape


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _forward_mujoco_warnings() -> None:
    """Send MuJoCo's warnings to the log: else it prints them and writes MUJOCO_LOG.TXT where it runs."""
    try:
        import mujoco
    except ImportError:
        return
    mujoco.set_mju_user_warning(_log_mujoco_warning)


def _log_mujoco_warning(message: str) -> None:
    level = logging.DEBUG if "deprecated" in message else logging.WARNING
    logger.log(level, "mujoco: %s", message)
