"""The files in sweeps/: valid, each with its question and its cost, and what their headers promise holds."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tt_ray.config import CriticConfig, to_dict
from tt_ray.data.d4rl_names import parse_d4rl_name
from tt_ray.distributed.evaluate import GREEDY
from tt_ray.evaluation.mazes import MEDIUM_MAZE_FAR, Grid
from tt_ray.fingerprints import model_fingerprint, tokens_fingerprint
from tt_ray.sweep_file import Sweep, Trial, load_sweep

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

import published

FOLDER = Path(__file__).parents[1] / "sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))
QUICKSTART = FOLDER / "quickstart.yaml"
PREDICTION = FOLDER / "prediction.yaml"  # for `tt-ray predict`
STUDIES = [file for file in FILES if file not in (QUICKSTART, PREDICTION)]
SIZES = {  # trials, training seeds, episodes of each
    "action_filters": (24, 2, 10),
    "antmaze": (5, 5, 20),
    "beam_search_asha": (40, 1, 20),
    "bins": (6, 3, 20),
    "context_length": (12, 2, 20),
    "data_fraction": (6, 3, 20),
    "delayed_rewards": (4, 3, 20),
    "discretisation": (12, 3, 20),
    "frontier": (27, 1, 10),
    "goal_reaching": (6, 1, 100),
    "imitation": (8, 5, 20),
    "locomotion": (12, 5, 20),
    "pointmaze_q": (9, 1, 50),
    "replanning": (5, 3, 20),
    "tuning": (24, 1, 5),
    "uniform_vs_quantile": (4, 3, 20),
}
DOWNLOADED = ["antmaze", "imitation", "locomotion"]
"""Files that collect nothing."""
ONE_MODEL = ["action_filters", "beam_search_asha", "frontier", "replanning"]
"""Files that vary nothing but the planner."""
AUTHORS = {  # horizon, beam width; the others have 15 and 128
    "halfcheetah-medium-expert": (15, 32),
    "halfcheetah-medium": (5, 32),
    "halfcheetah-medium-replay": (5, 32),
    "walker2d-medium-expert": (5, 128),
    "walker2d-medium-replay": (20, 32),
    "ant-medium-expert": (5, 128),
    "ant-medium": (5, 128),
    "ant-medium-replay": (5, 128),
}


WINDOW = ("max_context_transitions", "window", "keep")


def task_name(text: str) -> str | None:
    """The published task that a case or a data set names."""
    return published.task_name(text, published.read_published())


def header(file: Path) -> str:
    """The comments at the head of a file, as running text."""
    text = file.read_text().partition("\nname:")[0]
    assert all(line.startswith("#") for line in text.splitlines())
    return re.sub(r"\s*\n#\s*", " ", text)


def sizes(sweep: Sweep) -> tuple[int, int, int]:
    return sweep.search.count, len(sweep.base.seeds), sweep.base.evaluation.episodes


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_a_valid_sweep_with_a_question_and_a_cost(file: Path) -> None:
    sweep = load_sweep(file)
    assert sweep.base.name == file.stem
    assert sweep.base.question.endswith("?")
    assert "Usage:" in header(file)
    assert "Cost:" in header(file)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_header_names_the_command_and_what_it_costs_where(file: Path) -> None:
    text = header(file)
    assert f"# Usage: tt-ray sweep sweeps/{file.name} [" in text
    assert re.search(r"Laptop: .* on 2 CPU cores.* on 8", text)
    assert re.search(r"GPU cluster, 8 x A100: .*\(an estimate, not measured\)", text)


def test_the_number_of_trials() -> None:
    assert {file.stem: sizes(load_sweep(file)) for file in STUDIES} == SIZES


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_what_a_header_offers_to_run_is_valid(file: Path) -> None:
    commands = re.findall(r"tt-ray sweep sweeps/(\w+\.yaml)((?: [\w.]+=\S+)*)", header(file))
    assert (file.name, "") in commands
    assert len(commands) > 1 or file.stem == "locomotion"
    for name, overrides in commands:
        sweep = load_sweep(FOLDER / name, overrides.split())
        assert sizes(sweep)[0] == SIZES[Path(name).stem][0]
        if "collect=null" in overrides:
            assert sweep.base.collect is None
            assert parse_d4rl_name(sweep.base.dataset.id)


def test_one_data_set_is_collected_in_one_way() -> None:
    made: dict[str, Any] = {}
    for file in STUDIES:
        sweep = load_sweep(file)
        for case in sweep.case_names:
            config = sweep.trial(
                {k: space.at(0) for k, space in sweep.search.parameters.items()}, case
            ).config
            if file.stem in DOWNLOADED:
                assert config.collect is None
            else:
                assert config.collect is not None
                assert made.setdefault(config.dataset.id, config.collect) == config.collect
    mazes = ["study/fourrooms-v0", "study/mediummaze-directed-v0", "study/mediummaze-undirected-v0"]
    assert sorted(made) == sorted(["study/halfcheetah-v0", "study/hopper-v0", *mazes])


def test_files_that_vary_the_planner_share_their_models() -> None:
    stages = []
    for name in [*ONE_MODEL, "bins", "data_fraction"]:
        sweep = load_sweep(FOLDER / f"{name}.yaml")
        varied = {key.partition(".")[0] for key in sweep.search.parameters}
        assert varied == {"planner"} or name not in ONE_MODEL
        assert 0 in sweep.base.seeds
        whole = to_dict(sweep.base)
        stages.append({key: whole[key] for key in ("dataset", "discretizer", "model", "training")})
    assert all(stage == stages[0] for stage in stages)


def models(name: str) -> set[str]:
    """Fingerprints of the models of a file's trials, were all data the same."""
    trials = load_sweep(FOLDER / f"{name}.yaml").trials()
    return {
        model_fingerprint(trial.config, tokens_fingerprint(trial.config, trial.config.dataset.id), seed)
        for trial in trials
        for seed in trial.config.seeds
    }


def test_the_studies_of_bins_and_of_delayed_rewards_share_the_models_of_others() -> None:
    discretisation, delayed = models("discretisation"), models("delayed_rewards")
    assert (len(discretisation), len(delayed)) == (12 * 3, 4 * 3)
    assert models("bins") < discretisation
    assert len(models("uniform_vs_quantile") & discretisation) == 2 * 3  # one of its two data sets
    assert len(models("bins") & delayed) == 3  # paid at every step, and discounted


def test_the_locomotion_table_has_every_task_with_the_authors_settings() -> None:
    trials = load_sweep(FOLDER / "locomotion.yaml").trials()
    tasks = {f"{env}-{kind}" for env in ("halfcheetah", "hopper", "walker2d", "ant") for kind in
             ("medium", "medium-replay", "medium-expert")}  # fmt: skip
    assert {trial.case for trial in trials} == tasks
    for trial in trials:
        assert trial.case is not None
        config, planner = trial.config, trial.config.planner
        assert config.dataset.id == f"{trial.case}-v2"
        assert parse_d4rl_name(config.dataset.id)
        assert (planner.horizon, planner.beam_width) == AUTHORS.get(trial.case, (15, 128))
        assert planner.k_act == (40 if trial.case == "walker2d-medium-replay" else None)
        assert (planner.n_expand, planner.k_obs, planner.cdf_act) == (2, 1, 0.6)
        assert (planner.max_context_transitions, *planner.resolve_window(10)) == (5, 5, 4)
        ends = not trial.case.startswith("halfcheetah")
        assert config.dataset.terminal_penalty == (-100 if ends else None)
        assert config.dataset.observation_dims == (27 if trial.case.startswith("ant") else None)
        model, training = config.model, config.training
        assert (model.num_layers, model.num_heads, model.embed_dim) == (4, 4, 128)
        assert (model.context_transitions, model.dropout) == (10, 0.1)
        assert (training.steps, training.batch_size, training.learning_rate) == (195_000, 256, 6e-4)
        assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.95, 0.1)
        assert (training.warmup_steps, training.gradient_clip, training.action_weight) == (2_000, 1.0, 5.0)
    assert {trial.config.seeds for trial in trials} == {(0, 1, 2, 3, 4)}


def planners(name: str) -> dict[str, list[Trial]]:
    """The trials of a file by data set."""
    found: dict[str, list[Trial]] = {}
    for trial in load_sweep(FOLDER / f"{name}.yaml").trials():
        found.setdefault(trial.config.dataset.id, []).append(trial)
    return found


@pytest.mark.parametrize("name", ["imitation", "pointmaze_q"])
def test_planners_that_are_compared_differ_in_nothing_else(name: str) -> None:
    tasks: dict[tuple[str, str | None], list[Trial]] = {}
    for task, of_task in planners(name).items():
        for trial in of_task:
            tasks.setdefault((task, trial.config.evaluation.environment), []).append(trial)
    assert len(tasks) == (2 if name == "imitation" else 3)
    for (task, _), trials in tasks.items():
        greedy, *searches = trials
        alone = replace(GREEDY, **{key: getattr(greedy.config.planner, key) for key in WINDOW})
        assert greedy.config.planner == alone
        wanted = {"return", "likelihood" if name == "imitation" else "q"}
        assert {trial.config.planner.objective for trial in searches} == wanted
        rest = [replace(trial.config, planner=greedy.config.planner) for trial in trials]
        assert all(config == rest[0] for config in rest)
        if name == "imitation":
            assert all(task_name(str(trial.case)) == task_name(task) for trial in trials)
    assert len(models(name)) == 2 * len(trials[0].config.seeds)


def test_imitation_has_the_authors_model_and_protocol() -> None:
    imitation, locomotion = (load_sweep(FOLDER / f"{name}.yaml").base for name in ("imitation", "locomotion"))
    for section in ("discretizer", "model", "training", "planner", "seeds"):
        assert getattr(imitation, section) == getattr(locomotion, section)
    assert set(planners("imitation")) == {"hopper-expert-v2", "walker2d-expert-v2"}


def test_goals_are_places_and_their_paths_are_kept() -> None:
    trials = load_sweep(FOLDER / "goal_reaching.yaml").trials()
    for trial in trials:
        config = trial.config
        assert config.goal is not None
        assert config.goal.dims == config.evaluation.record == (0, 1)
        assert config.dataset.observation_keys == ("observation",)
        assert config.planner.objective == "goal" or config.planner.beam_width == config.planner.n_expand == 1
    assert len(models("goal_reaching")) == 2
    ways = {(t.config.goal.relabel, t.case) for t in trials if t.config.goal}
    assert ways == {(goal, way) for goal in ("last", "future") for way in ("likeliest", "means", "drawn")}


def test_undirected_data_never_goes_all_the_way() -> None:
    for task, trials in planners("pointmaze_q").items():
        how = trials[0].config.collect
        assert how is not None
        assert how.method == "waypoints"
        assert (how.segment_cells is None) == ("directed" in task and "undirected" not in task)
        grid = Grid(MEDIUM_MAZE_FAR)
        whole = grid.distances(grid.goals[0])[1, 1]
        assert how.environment.endswith(":MediumMazeFar-v0")
        assert how.segment_cells is None or 2 * how.segment_cells <= whole


def test_antmaze_has_the_papers_tasks_and_iqls_settings() -> None:
    (figures,) = (group.tasks for group in published.read_published() if group.name == "AntMaze")
    trials = load_sweep(FOLDER / "antmaze.yaml").trials()
    assert {task_name(str(trial.case)) for trial in trials} == set(figures)
    assert all(task_name(trial.config.dataset.id) == task_name(str(trial.case)) for trial in trials)
    for trial in trials:
        critic = trial.config.critic
        assert trial.config.planner.objective == "q"
        assert critic == CriticConfig(expectile=0.9, reward_shift=-1.0)
        assert re.fullmatch(r"D4RL/antmaze/(umaze|(medium|large)-(play|diverse))-v1", trial.config.dataset.id)
        assert f" {figures[str(task_name(str(trial.case)))][0]}" in header(FOLDER / "antmaze.yaml")


def test_the_readme_lists_every_file() -> None:
    text = (FOLDER / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[(\w+)\.yaml\]\(\w+\.yaml\) \|(.*)\|$", text, flags=re.MULTILINE))
    assert sorted(rows) == [file.stem for file in FILES]
    for name, (count, seeds, _) in SIZES.items():
        cells = [cell.strip() for cell in rows[name].split("|")]
        assert cells[0].endswith("?")
        assert cells[1] == f"{count} x {seeds}"
