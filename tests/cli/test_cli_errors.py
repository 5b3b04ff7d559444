"""Bad input: one clear line, exit code 2, nothing half-written."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
from commands import (
    DATASET,
    Refused,
    as_refusal,
    files_below,
    recorded,
    settings,
    train_here,
    training_job,
    tt_ray,
    write_data,
    write_file,
)

from tt_ray.cli.view import Bars
from tt_ray.distributed.line import Line
from tt_ray.experiment_file import experiment_from_dict
from tt_ray.tracking import MlflowTracker


@pytest.fixture
def nowhere() -> str:
    """The address of a port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# The experiment file and the overrides. No data set is there: they are looked at first.


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("planer.horizon=5", ("unknown key planer.horizon", "did you mean planner.horizon?")),
        ("planner.horzion=5", ("unknown key planner.horzion", "did you mean planner.horizon?")),
        ("horizon=5", ("did you mean planner.horizon",)),
        ("planner.horizon=five", ('planner.horizon: expected a whole number, found text "five"',)),
        ("planner.horizon=2.5", ("planner.horizon: expected a whole number, found 2.5",)),
        ("training.learning_rate=.nan", ("training.learning_rate", "not finite")),
        ("discretizer.strategy=quantiles", ("discretizer.strategy", "did you mean quantile?")),
        ("planner.horizon", ("write it as section.key=value",)),
        ("planner.horizon=0", ("planner.horizon: must be at least 1, not 0",)),
        ("planner.beam_width=0", ("planner.beam_width: must be at least 1, not 0",)),
        ("planner.window=11", ("planner.window: 11 is larger than the model's context of 4 transitions",)),
        ("model.embed_dim=15", ("model.embed_dim: 15 is not divisible by model.num_heads = 2",)),
        ("discretizer.num_bins=40000", ("discretizer.num_bins: must lie between 2 and 32766", "16-bit")),
    ],
)
def test_an_override_that_cannot_be(
    here: Path, refused: Refused, override: str, parts: tuple[str, ...]
) -> None:
    write_file(here)
    refused("run", "tiny.yaml", override, parts=(f"override '{override}': ", *parts))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("tiny.yaml: is empty",)),
        ("name: [1", ("tiny.yaml:1: not valid YAML",)),
        (
            "name: x\ndataset: {id: a/b-v0}\nmodle: {num_layers: 2}",
            ("tiny.yaml:3: modle", "did you mean model?"),
        ),
        ("name: x\ndataset: {id: a/b-v0}\nmodel: {layers: 2}", ("tiny.yaml:3: model.layers: unknown key",)),
        ("name: x\ndataset: {id: 5}", ("tiny.yaml:2: dataset.id: expected text, found 5",)),
        ("name: x\nplanner: {horizon: 2}", ("dataset.id: this key is required",)),
        (
            "name: x\ndataset: {id: a/b-v0}\nsearch: {}",
            ("tiny.yaml:3: search: this file is a sweep: run it with `tt-ray sweep FILE`",),
        ),
    ],
)
def test_a_file_that_cannot_be(here: Path, refused: Refused, text: str, parts: tuple[str, ...]) -> None:
    (here / "tiny.yaml").write_text(text)
    refused("train", "tiny.yaml", parts=parts)


def test_a_file_that_is_not_there(refused: Refused) -> None:
    refused("run", "missing.yaml", parts=("missing.yaml: cannot be read: No such file or directory",))


def test_a_batch_that_the_workers_cannot_share(here: Path, refused: Refused) -> None:
    write_file(here, training={"batch_size": 1}, resources={"workers": 2})
    refused(
        "run", "tiny.yaml", parts=("training.batch_size: 1 windows cannot be shared", "resources.workers = 2")
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run"], ("Missing argument", "`tt-ray run -h`")),
        (["run", "tiny.yaml", "--resum"], ("No such option: --resum", "`tt-ray run -h`")),
        (["trian", "tiny.yaml"], ("No such command 'trian'", "`tt-ray -h`")),
        (["data", "import", "x.hdf5"], ("Missing option '--id'", "`tt-ray data import -h`")),
    ],
)
def test_a_command_that_cannot_be(refused: Refused, arguments: list[str], parts: tuple[str, ...]) -> None:
    refused(*arguments, parts=parts)


# Data sets: looked at before MLflow and Ray are.


def test_a_data_set_that_is_not_there(here: Path, refused: Refused) -> None:
    write_file(here)
    line = refused("run", "tiny.yaml", parts=(f"no data set {DATASET} in {here / 'data'}",))
    assert f"`tt-ray data download {DATASET}`" in line
    assert "`tt-ray data collect ENV`" in line
    refused(
        "train",
        "tiny.yaml",
        "dataset.id=hopper-medium-v2",
        parts=("`tt-ray data download hopper-medium-v2`",),
    )


def test_a_misspelt_data_set(here: Path, refused: Refused) -> None:
    write_data()
    refused("data", "show", "tiny/pendulm-v0", parts=("no data set", f"did you mean {DATASET}?"))
    refused("data", "show", "nonsense", parts=("nonsense", "tt-ray data collect"))


@pytest.mark.parametrize(
    ("name", "place", "value", "what"),
    [
        ("observations", (3, 2), np.nan, "step 3: observation 2 is NaN"),
        ("actions", (0, 0), np.inf, "step 0: action 0 is infinite"),
        ("rewards", (7,), -np.inf, "step 7: reward is infinite"),
    ],
)
def test_numbers_that_are_none(
    here: Path, refused: Refused, name: str, place: tuple[int, ...], value: float, what: str
) -> None:
    episode = recorded(8, 1)
    getattr(episode, name)[place] = value
    write_data([recorded(8, 0), episode])
    write_file(here)
    refused(
        "run", "tiny.yaml", parts=(f"data set {DATASET}, episode 1, {what}", "repair or remove the episode")
    )


def test_an_empty_episode(here: Path, refused: Refused) -> None:
    folder = write_data()
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        group = file["episode_5"]
        for key in ("actions", "rewards", "terminations", "truncations"):
            values = group[key][:0]
            del group[key]
            group[key] = values
    write_file(here)
    refused("run", "tiny.yaml", parts=(f"data set {DATASET}, episode 5: it is empty; remove it",))


def test_a_damaged_data_set(here: Path, refused: Refused) -> None:
    file = write_data() / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    write_file(here)
    refused("run", "tiny.yaml", parts=(f"data set {DATASET} cannot be read", str(file)))


def test_discrete_actions(here: Path, refused: Refused) -> None:
    refused("data", "collect", "CartPole-v1", parts=("environment CartPole-v1", "Discrete(2)", "continuous"))
    write_data(
        [recorded(4, actions=np.zeros(4, np.int64))],
        environment="CartPole-v1",
        action_space=gym.spaces.Discrete(2),
    )
    write_file(here)
    refused("run", "tiny.yaml", parts=(f"data set {DATASET} has the discrete action space Discrete(2)",))


def test_an_environment_that_cannot_be_made(here: Path, refused: Refused) -> None:
    refused("data", "collect", "Penduluum-v1", parts=("unknown environment 'Penduluum-v1'", "Pendulum-v1"))
    refused("data", "collect", "no_such_module:Task-v0", parts=("module 'no_such_module' of environment",))
    write_file(here, collect={"environment": "Penduluum-v1"})
    refused("run", "tiny.yaml", parts=("unknown environment 'Penduluum-v1'", "did you mean Pendulum-v1"))
    write_data(environment="no_such_module:Task-v0")
    write_file(here)
    refused("run", "tiny.yaml", parts=("module 'no_such_module' of environment no_such_module:Task-v0",))


def test_data_without_an_environment_cannot_be_played(here: Path, refused: Refused) -> None:
    write_data(environment={"id": ""})
    write_file(here)
    refused("run", "tiny.yaml", parts=("the data set names no environment", "evaluation.environment"))


def test_data_of_another_environment(here: Path, refused: Refused) -> None:
    write_data(environment="InvertedPendulum-v5")
    write_file(here)
    refused("run", "tiny.yaml", parts=("InvertedPendulum-v5 has 4 observation dimensions", "trained with 3"))


def test_a_data_set_that_was_made_otherwise(here: Path, refused: Refused) -> None:
    write_data()
    write_file(here, collect={"environment": "Pendulum-v1"})
    refused("run", "tiny.yaml", parts=(f"data set {DATASET} exists", "choose another id, or overwrite it"))


def test_collecting_with_settings_that_cannot_be(here: Path, refused: Refused) -> None:
    refused("data", "collect", "Pendulum-v1", "step=5", parts=("did you mean collect.steps?",))
    refused("data", "collect", "Pendulum-v1", "steps=0", parts=("collect.steps: must be at least 1",))
    refused("data", "collect", "Pendulum-v1", "--id", "x", parts=("'x'", "namespace/name-vN"))
    write_file(here)
    refused("data", "collect", "tiny.yaml", parts=("tiny.yaml: collect: this section is missing",))
    refused("data", "collect", "tiny.yaml", "steps=9", parts=("collect.environment: this key is required",))


def test_a_download_from_nowhere(refused: Refused, nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TT_RAY_D4RL_URL", nowhere)
    line = refused(
        "data", "download", "hopper-medium-v2", parts=("cannot be downloaded", "refused"), left=("data",)
    )
    assert f"{nowhere}/hopper_medium-v2.hdf5" in line


def test_importing_a_bad_table(here: Path, refused: Refused, command: Callable[..., object]) -> None:
    """The report is shown before the refusal, and a dry run writes nothing."""
    bad = ("data", "import", "log.csv", "--id", "mine/log-v0")
    (here / "log.csv").write_text("obs_0,act_0,reward\n1,2,3\n4,,6\n7,8,9\n")
    refused(*bad, parts=("log.csv, row 1: act_0 is missing or no number (NaN)", "--drop-incomplete"))
    assert "Columns" in command(*bad).out
    (here / "log.csv").write_text("obs_0,act_0,reward\n1,2,3\n4,5,6\n")
    before = files_below(here)
    shown = command(*bad, "--dry-run")
    assert (shown.code, files_below(here)) == (0, before)
    assert "nothing was written" in shown.out
    refused(*bad, "--env", "Pendulum-v1", parts=("observations have 1 dimensions, but Pendulum-v1 has 3",))


def test_importing_a_bad_file(here: Path, refused: Refused) -> None:
    (here / "bad.hdf5").write_text("no HDF5 at all")
    bad = ("data", "import", "bad.hdf5", "--id", "mine/hopper-v0")
    refused(*bad, parts=("bad.hdf5 is not a readable HDF5 file",))
    refused("data", "import", "missing.hdf5", "--id", "mine/hopper-v0", parts=("no file missing.hdf5",))
    with h5py.File(here / "bad.hdf5", "w") as file:
        file["observations"] = np.zeros((5, 11), np.float32)
    refused(*bad, parts=("bad.hdf5 lacks actions, rewards, terminals, timeouts",))
    with h5py.File(here / "bad.hdf5", "a") as file:
        file["actions"] = np.zeros((5, 3), np.float32)
        file["rewards"] = np.array([0, 1, np.nan, 0, 0], np.float32)
        file["terminals"] = file["timeouts"] = np.zeros(5, bool)
    refused(*bad, parts=("bad.hdf5, row 2: rewards is missing or no number (NaN)",))
    refused(
        *bad,
        "--environment",
        "Pendulum-v1",
        parts=("observations have 11 dimensions, but Pendulum-v1 has 3",),
    )


# Checkpoints.


def test_a_checkpoint_that_is_not_there(here: Path, refused: Refused) -> None:
    refused("evaluate", "./missing", parts=("./missing: no such folder",))
    (here / "empty").mkdir()
    refused("evaluate", "empty", parts=("empty: no checkpoint folder (checksums.json is missing)",))
    write_file(here)
    refused("evaluate", "tiny.yaml", parts=("tiny.yaml: is a file, not a checkpoint folder",))
    refused("evaluate", "nonsense", parts=(f"no MLflow database {here / 'mlflow.db'}", "MLFLOW_TRACKING_URI"))


def test_a_checkpoint_that_is_damaged(here: Path, refused: Refused) -> None:
    write_data()
    checkpoint = train_here(training_job(), here / "model")
    for name in ("model.safetensors", "discretizer.safetensors", "config.json"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        refused("evaluate", "model", parts=(f"{checkpoint / name}: damaged or truncated",))
        (checkpoint / name).write_bytes(whole[:-1] + b"?")
        refused("evaluate", str(checkpoint), parts=(f"{checkpoint / name}: damaged or truncated",))
        (checkpoint / name).unlink()
        refused("evaluate", str(checkpoint), parts=(f"{checkpoint / name}: missing from the checkpoint",))
        (checkpoint / name).write_bytes(whole)
    (checkpoint / "checksums.json").write_text("{")
    refused("evaluate", str(checkpoint), parts=(f"{checkpoint / 'checksums.json'}: damaged",))


def test_a_checkpoint_for_another_environment(here: Path, refused: Refused) -> None:
    write_data()
    job = training_job()
    elsewhere = replace(job, spec=replace(job.spec, environment={"id": "InvertedPendulum-v5"}))
    checkpoint = train_here(elsewhere, here / "model")
    parts = ("InvertedPendulum-v5 has 4 observation dimensions", "trained with 3", DATASET)
    refused("evaluate", str(checkpoint), parts=parts)


def test_overrides_that_a_checkpoint_cannot_take(here: Path, refused: Refused) -> None:
    write_data()
    checkpoint = str(train_here(training_job(), here / "model"))
    refused(
        "evaluate", checkpoint, "planner.window=5", parts=("planner.window: 5 is larger than the model's",)
    )
    refused(
        "evaluate", checkpoint, "model.num_layers=2", parts=("model is settled here", "planner, evaluation")
    )


def test_a_training_that_was_begun(here: Path, refused: Refused) -> None:
    write_data()
    write_file(here)
    line = Line(experiment_from_dict(settings()), Bars())
    line.check(resume=False)
    train_here(training_job(), line.models[0])
    parts = ("training of seed 0 stopped after 1 of 20 steps", "add --resume to go on from there")
    refused("run", "tiny.yaml", parts=(str(line.models[0]), *parts))


# The machine, and MLflow.


def test_a_folder_that_cannot_be_written(
    here: Path, store: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data()
    write_file(here)
    (here / "file").touch()
    parts = ("resources.storage: cannot write in file/runs: Not a directory",)
    refused("run", "tiny.yaml", "resources.storage=file/runs", parts=parts)
    parts = ("cannot write /proc/none/mlflow.db",)
    refused("run", "tiny.yaml", "tracking.uri=sqlite:////proc/none/mlflow.db", parts=parts)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(here / "file" / "data"))
    refused("data", "collect", "Pendulum-v1", "steps=100", parts=("cannot be written", "Not a directory"))


def test_what_mlflow_does_not_have(here: Path, store: str, refused: Refused) -> None:
    with MlflowTracker(store, "tiny", interval=0.1).start("a run", here / "run"):
        pass
    refused("results", "tiny", "--csv", "missing/table.csv", parts=("missing",))
    refused("results", "tinny", parts=(f"no experiment 'tinny' in MLflow at {store}: did you mean tiny?",))
    refused("evaluate", "0123456789abcdef", parts=("no checkpoint for MLflow run '0123456789abcdef'",))


def test_a_tracking_server_out_of_reach(here: Path, refused: Refused, nowhere: str) -> None:
    write_data()
    write_file(here)
    parts = (f"MLflow at {nowhere} cannot be used", "refused", "Start one with: mlflow server")
    refused("run", "tiny.yaml", f"tracking.uri={nowhere}", parts=parts)


@pytest.mark.parametrize("reader", [("results", "tiny"), ("evaluate", "0123456789abcdef")])
def test_a_tracking_server_out_of_reach_of_its_readers(
    refused: Refused, nowhere: str, monkeypatch: pytest.MonkeyPatch, reader: tuple[str, str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nowhere)
    refused(*reader, parts=(f"MLflow at {nowhere} cannot be used",))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/mlruns")
    refused(*reader, parts=("is a file store, which MLflow has given up",))


def test_a_cluster_out_of_reach(
    here: Path, store: str, refused: Refused, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data()
    write_file(here)
    address = nowhere.removeprefix("http://")
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = refused("run", "tiny.yaml", parts=(f"RAY_ADDRESS={address}", "refused"), left=("runs",))
    assert "unset RAY_ADDRESS" in line


@pytest.mark.ray
def test_more_workers_than_the_machine_has(ray_local: None, here: Path, store: str, refused: Refused) -> None:
    write_data()
    write_file(here, training={"batch_size": 64})
    parts = ("resources.workers: 64 workers need a CPU each, but Ray has 2",)
    refused("run", "tiny.yaml", "resources.workers=64", parts=parts, left=("runs",))


# What looks odd and is none the less good.


@pytest.mark.ray
@pytest.mark.parametrize("odd", ["one step", "constant"])
def test_odd_data_is_trained_on(
    ray_local: None, here: Path, store: str, command: Callable[..., object], odd: str
) -> None:
    changes = {"observations": np.ones((9, 3), np.float32), "rewards": np.zeros(8, np.float32)}
    lengths = [1] * 6 + [5] * 6
    odd_ones = [recorded(8, i, **changes) for i in range(12)]
    write_data(odd_ones if odd == "constant" else [recorded(n, i) for i, n in enumerate(lengths)])
    write_file(here, training={"steps": 2})
    outcome = command("train", "tiny.yaml")
    assert outcome.code == 0, outcome
    assert "Models" in outcome.out


@pytest.mark.ray
def test_data_without_an_environment_is_trained_on(
    ray_local: None, here: Path, store: str, command: Callable[..., object]
) -> None:
    write_data(environment={"id": ""})
    write_file(here, training={"steps": 2})
    outcome = command("train", "tiny.yaml")
    assert outcome.code == 0, outcome
    assert "Models" in outcome.out


# The real command, once for each way in which an error can come about.


def test_the_installed_command(tmp_path: Path) -> None:
    write_file(tmp_path)
    before = files_below(tmp_path)
    as_refusal(tt_ray(tmp_path, "run", "tiny.yaml", "planner.horizn=5"), "did you mean planner.horizon?")
    as_refusal(tt_ray(tmp_path, "run", "tiny.yaml"), f"no data set {DATASET}")
    as_refusal(tt_ray(tmp_path, "run"), "Missing argument")
    as_refusal(tt_ray(tmp_path, "data", "collect", "CartPole-v1"), "Discrete(2)")
    assert files_below(tmp_path) == before


def test_help_is_no_error(tmp_path: Path) -> None:
    for arguments in ([], ["data"], ["-h"], ["run", "-h"]):
        outcome = tt_ray(tmp_path, *arguments)
        assert outcome.code == (0 if "-h" in arguments else 2)
        assert "Usage: tt-ray" in outcome.out
        assert outcome.err == ""
