"""Training under Ray: the number of workers changes nothing but the time."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from tt_ray.config import ExperimentConfig
from tt_ray.distributed import train
from tt_ray.distributed.cluster import Allocation
from tt_ray.distributed.line import Line
from tt_ray.distributed.train import steps_done, train_model
from tt_ray.errors import UserError


@pytest.fixture(autouse=True, scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        tiny.write_data()
        yield


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker trains in this process; more of them would be an error."""
    monkeypatch.delattr(train, "_train_with_ray")


def workers(count: int) -> Allocation:
    return Allocation(workers=count)


def trained(config: ExperimentConfig, count: int) -> Path:
    tokens, model = tiny.prepare(config)
    train_model(config, tokens, model, 0, workers(count))
    return model


@pytest.mark.ray
def test_two_workers_take_the_steps_of_one(ray_local: None, tmp_path: Path) -> None:
    """An odd batch, so that the shards are unequal and a mean of their means would be wrong."""
    one, two = (
        trained(tiny.experiment(tmp_path / str(count), dropout=0.0, batch_size=7), count) for count in (1, 2)
    )
    assert one.name == two.name  # the same stage: resources are not part of it
    expected, seen = tiny.curves(one), tiny.curves(two)
    assert seen.keys() == expected.keys()
    assert len([key for key in seen if key[0] == "train/loss"]) == tiny.STEPS
    assert len([key for key in seen if key[0] == "val/loss"]) == tiny.STEPS // tiny.EVERY
    assert seen == pytest.approx(expected, rel=1e-4)
    states = [tiny.final_state(model) for model in (one, two)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert steps_done(two) == tiny.STEPS
    assert tiny.leftovers(tmp_path) == []


@pytest.mark.ray
def test_what_stops_a_worker_is_told_in_one_line(ray_local: None, tmp_path: Path) -> None:
    plain = tiny.experiment(tmp_path)
    config = dataclasses.replace(plain, resources=dataclasses.replace(plain.resources, max_failures=0))
    tokens, model = tiny.prepare(config)
    model.mkdir(parents=True)
    (model / "checkpoints").touch()  # a file where a folder should be
    with pytest.raises(
        UserError, match=r"^training failed: .*step-00000020: cannot write .*--resume"
    ) as caught:
        train_model(config, tokens, model, 0, workers(2))
    assert "\n" not in str(caught.value)
    assert steps_done(model) == 0


def test_a_training_that_lacks_only_its_publication_is_finished_at_once(
    without_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.experiment(tmp_path, steps=4, validate_every=2)
    model = trained(config, 1)
    state, curves, kept = tiny.final_state(model, steps=4), tiny.curves(model), tiny.checkpoints(model)
    shutil.copytree(model / "checkpoints" / kept[-1], model / "checkpoints" / ".step-00000002.old")
    (model / train.RAY / model.name).mkdir(parents=True)
    assert steps_done(model) == 4

    def fail(*_: Any) -> None:
        raise AssertionError("a step was redone")

    monkeypatch.setattr(train, "_train", fail)
    tokens = Path(config.resources.storage) / "tokens"
    train_model(config, next(tokens.iterdir()), model, 0, workers(2))
    assert tiny.curves(model) == curves
    assert tiny.checkpoints(model) == kept
    assert tiny.leftovers(tmp_path) == []
    assert not (model / train.RAY).exists()
    assert all(torch.equal(state[name], value) for name, value in tiny.final_state(model, steps=4).items())


def test_tokens_half_written_by_a_killed_command_are_removed(tmp_path: Path) -> None:
    line = Line(tiny.experiment(tmp_path), progress=None)  # type: ignore[arg-type]  # shows nothing here
    line.check(resume=False)
    (line.tokens.parent / f".{line.tokens.name}.0123abcd.tmp").mkdir(parents=True)
    line.prepare_data()
    assert [path.name for path in line.tokens.parent.iterdir()] == [line.tokens.name]
    assert line.store.find("tokens", line.tokens.name) is not None


def test_a_model_that_was_begun_needs_resume(without_ray: None, tmp_path: Path) -> None:
    config = tiny.experiment(tmp_path, steps=4, validate_every=2)
    trained(config, 1)
    line = Line(config, progress=None)  # type: ignore[arg-type]
    line.check(resume=True)
    with pytest.raises(UserError, match=r"training of seed 0 stopped after 4 of 4 steps; add --resume"):
        line.check(resume=False)
