"""`tt-ray import-checkpoint`: published runs become checkpoints that play, or one line says why not."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import DATASET, Command, Refused, write_data
from published_originals import (
    AuthorsGPT,
    PortGPT,
    authors_settings,
    port_edges,
    randomized,
    write_authors_run,
    write_pickled_config,
    write_port_run,
)

from tt_ray.config import DatasetConfig, PlannerConfig
from tt_ray.config import ModelConfig as Sizes
from tt_ray.data.minari_reader import load_episodes
from tt_ray.data.tokens import TokenLayout, token_columns
from tt_ray.distributed.checkpoints import load_for_evaluation
from tt_ray.distributed.evaluate import Planner, Worker, episodes_here
from tt_ray.model.checkpoint import load_checkpoint

PENDULUM = TokenLayout(observation_dim=3, action_dim=1, num_bins=10)
HOPPER = TokenLayout(observation_dim=11, action_dim=3, num_bins=10)
SIZES = Sizes(num_layers=1, num_heads=2, embed_dim=16, context_transitions=4)
SMALL = ["planner.horizon=2", "planner.beam_width=2"]


def authors_run(here: Path, layout: TokenLayout = PENDULUM, **data: Any) -> Path:
    model = randomized(AuthorsGPT(SIZES, layout), scale=0.1)
    return write_authors_run(here / "run", model, SIZES, layout, **{"env": DATASET, **data})


def port_run(here: Path, layout: TokenLayout, **data: Any) -> Path:
    columns = np.random.default_rng(0).normal(size=(200, layout.slots))
    edges = port_edges(columns, "uniform", layout.num_bins)
    model = randomized(PortGPT(SIZES, layout), scale=0.1)
    return write_port_run(here / "run", model, SIZES, layout, edges, **data)


def play(folder: Path) -> list[int]:
    """One short episode; its length."""
    config, spec, _ = load_for_evaluation(folder, SMALL)
    planner = Planner(folder, config.planner, config.dataset.discount, slots=1)
    return [result.length for result in episodes_here(Worker(planner, spec, 4), [0])]


def test_a_run_of_the_released_code(here: Path, command: Command) -> None:
    write_data()
    run = authors_run(here)
    (run / "state_9.pt").write_bytes(b"an earlier state, which nobody asked for")
    done = command("import-checkpoint", "run")
    assert done.code == 0, done.err
    folder = here / "runs" / "imported" / "run"
    assert "tt-ray evaluate runs/imported/run" in done.out
    assert "rebuilt from tiny/pendulum-v0" in done.out
    checkpoint = load_checkpoint(folder)
    tokens = torch.randint(0, 10, (2, 4 * PENDULUM.slots - 1))
    with torch.inference_mode():
        theirs = randomized(AuthorsGPT(SIZES, PENDULUM), scale=0.1)(tokens)
        torch.testing.assert_close(checkpoint.model(tokens), theirs, rtol=1e-5, atol=1e-5)
    config, spec, _ = load_for_evaluation(folder, [])
    assert config.dataset == DatasetConfig(id=DATASET, discount=0.99, terminal_penalty=-100)
    assert (config.planner.window, config.planner.keep) == (4, 3)
    assert spec == load_episodes(DATASET).spec
    origin = checkpoint.origin
    assert origin["files"].keys() == {"state_40.pt", "model_config.pkl", "data_config.pkl"}
    assert origin["settings"]["data_config.pkl"]["env"] == DATASET
    assert origin["folder"] == str(run)
    assert play(folder) == [4]


def test_the_loss_tells_whether_the_data_fits(here: Path, command: Command) -> None:
    write_data()
    run = authors_run(here)
    model = AuthorsGPT(SIZES, PENDULUM)
    with torch.no_grad():  # certain of a token that is never there: the stop token
        model.head.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.head.weight[:, -1] = 1.0
    torch.save(model.state_dict(), run / "state_40.pt")
    done = command("import-checkpoint", "run", "--data", DATASET)
    assert done.code == 0
    assert f"all bins alike: {math.log(10):.2f}" in done.out
    assert done.err.startswith(f"tt-ray: warning: the model knows nothing of {DATASET}")
    assert done.err.count("\n") == 1
    assert load_checkpoint(here / "runs/imported/run").origin["loss_on_data"] > math.log(10)


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_a_run_of_the_port_with_its_data(here: Path, command: Command, strategy: str) -> None:
    write_data()
    columns = token_columns(load_episodes(DATASET), DatasetConfig(id=DATASET)).astype(np.float64)
    edges = port_edges(columns, strategy, 10)
    model = randomized(PortGPT(SIZES, PENDULUM), scale=0.1)
    write_port_run(here / "run", model, SIZES, PENDULUM, edges, strategy=strategy, env_name=DATASET)
    done = command("import-checkpoint", "run", "--data", DATASET, "--output", "made")
    assert done.code == 0, done.err
    assert f"{strategy}, as saved with the model" in done.out
    checkpoint = load_checkpoint(here / "made")
    tokens = torch.randint(0, 10, (2, 4 * PENDULUM.slots - 1))
    with torch.inference_mode():
        ours = checkpoint.model(tokens)[..., :-1]
        torch.testing.assert_close(ours, model(tokens), rtol=1e-5, atol=1e-5)
    assert checkpoint.discretizer.strategy == strategy
    config, _, _ = load_for_evaluation(here / "made", [])
    assert config.planner == PlannerConfig(beam_width=16, horizon=3, cdf_act=None, max_context_transitions=4)
    assert play(here / "made") == [4]


def test_a_run_of_the_port_needs_no_data(here: Path, command: Command) -> None:
    port_run(here, HOPPER)
    done = command("import-checkpoint", "run")
    assert (done.code, done.err) == (0, "")
    spec = load_checkpoint(here / "runs/imported/run").spec
    assert (spec.dataset_id, spec.environment["id"]) == ("d4rl/hopper/medium-v2", "Hopper-v5")
    assert (spec.action_low, spec.action_high) == ((-1.0,) * 3, (1.0,) * 3)
    assert (spec.ref_min_score, spec.ref_max_score) == (-20.272305, 3234.3)


def test_studies_of_held_out_episodes_are_refused(here: Path, command: Command, refused: Refused) -> None:
    write_data()
    authors_run(here)
    assert command("import-checkpoint", "run").code == 0
    for study in ("attention", "predict"):
        refused(study, "runs/imported/run", parts=("was imported", "nobody knows"))


def test_what_is_there_stays(here: Path, command: Command, refused: Refused) -> None:
    write_data()
    authors_run(here)
    assert command("import-checkpoint", "run").code == 0
    refused("import-checkpoint", "run", parts=("runs/imported/run: exists already", "--overwrite"))
    assert command("import-checkpoint", "run", "--overwrite").code == 0
    for folder in (".", "run", "runs"):
        options = ("--output", folder, "--overwrite")
        refused("import-checkpoint", "run", *options, parts=("is no checkpoint folder",))
    assert command("import-checkpoint", "runs/imported/run", "--output", "run").code == 2
    assert (here / "run" / "state_40.pt").is_file()


def test_folders_that_are_no_runs(here: Path, refused: Refused) -> None:
    refused("import-checkpoint", "nowhere", parts=("nowhere: no such folder",))
    (here / "run").mkdir()
    refused("import-checkpoint", "run", parts=("neither a run of the released code", "config.yaml"))
    write_pickled_config(here / "run" / "model_config.pkl", "GPT")
    refused("import-checkpoint", "run", parts=("no weights (state_N.pt)",))


def test_epochs(here: Path, refused: Refused) -> None:
    authors_run(here)
    refused("import-checkpoint", "run", "--epoch", "7", parts=("run/state_7.pt: missing from",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 10}, "step is 10; only 1 can be imported"),
        ({"discretizer": "Other"}, "discretizer is 'Other'"),
        ({"N": 50}, "N is 50; only 10 can be imported"),
        ({"discount": "high"}, "expected float, found 'high'"),
        ({"discount": 2.0}, "dataset.discount"),
        ({"env": "hopper-medium-v2"}, "no data set d4rl/hopper/medium-v2"),
    ],
)
def test_settings_of_data_that_cannot_be_had(
    here: Path, refused: Refused, change: dict[str, Any], said: str
) -> None:
    write_data()
    authors_run(here, **change)
    refused("import-checkpoint", "run", parts=(said,))


def test_a_goal_model_of_theirs(here: Path, refused: Refused) -> None:
    run = authors_run(here)
    settings = authors_settings(SIZES, PENDULUM)
    write_pickled_config(run / "model_config.pkl", "ConditionalGPT", **settings)
    refused("import-checkpoint", "run", parts=("ConditionalGPT; only a GPT can be imported",))


def test_data_of_other_dimensions(here: Path, refused: Refused) -> None:
    write_data()
    authors_run(here, HOPPER)
    parts = ("11 observation and 3 action dimensions", f"data set {DATASET} has 3 and 1")
    refused("import-checkpoint", "run", parts=parts)


def test_an_environment_of_other_dimensions(here: Path, refused: Refused) -> None:
    write_data()
    run = authors_run(here)
    refused("import-checkpoint", "run", "--env", "CartPole-v1", parts=("CartPole-v1",))
    refused("import-checkpoint", "run", "--env", "Hopper-v5", parts=("Hopper-v5 has 11 observation",))
    for file in run.iterdir():
        file.unlink()
    port_run(here, PENDULUM, env_name="somebody/task-v0")
    refused("import-checkpoint", "run", parts=("environment is not known", "--env", "--data"))
    refused("import-checkpoint", "run", "--env", "Hopper-v5", parts=("Hopper-v5 has 11 and 3",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: 3", "no settings of the faster port"),
        ("[1, 2]", "no settings of the faster port"),
        ("model: !!python/object/apply:os.system [touch executed]", "not valid YAML"),
        ("model: {}\ndataset: {}", "observation_dim is missing"),
    ],
)
def test_a_config_file_of_the_port_that_is_none(here: Path, refused: Refused, text: str, said: str) -> None:
    run = port_run(here, PENDULUM)
    (run / "config.yaml").write_text(text)
    refused("import-checkpoint", "run", parts=("run/config.yaml", said))


def test_bins_of_another_model(here: Path, refused: Refused) -> None:
    run = port_run(here, PENDULUM)
    config = yaml.safe_load((run / "config.yaml").read_text())
    write_port_run(run, PortGPT(SIZES, PENDULUM), SIZES, PENDULUM, np.zeros((6, 5)))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    refused("import-checkpoint", "run", parts=("discretizer.pt: has edges [6, 5]", "[6, 11]"))


class Runs:
    """Pickled as a call that would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", ["model_config.pkl", "data_config.pkl", "state_40.pt"])
def test_a_hostile_run(here: Path, refused: Refused, name: str) -> None:
    write_data()
    run = authors_run(here)
    if name.endswith(".pt"):
        torch.save({"w": Runs(here / "executed")}, run / name)
    else:
        (run / name).write_bytes(pickle.dumps(Runs(here / "executed")))
    refused("import-checkpoint", "run", parts=(name,))  # which also looks for new files
    assert not (here / "executed").exists()


def test_the_origin_is_plain_data(here: Path, command: Command) -> None:
    write_data()
    authors_run(here)
    assert command("import-checkpoint", "run").code == 0
    config = json.loads((here / "runs/imported/run/config.json").read_text())
    assert config["origin"]["source"] == "released research code"
    assert "port" not in config
