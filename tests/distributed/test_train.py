"""Training under Ray: the number of workers changes nothing but the time."""

from pathlib import Path

import pytest
import tiny
import torch

from tt_ray.distributed.cluster import Allocation
from tt_ray.distributed.train import is_trained, train_model

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True, scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        tiny.write_data()
        yield


def workers(count: int) -> Allocation:
    return Allocation(count, 0, 2, 1, 0)


def trained(folder: Path, count: int, batch_size: int = 8) -> Path:
    folder.mkdir(exist_ok=True)
    config = tiny.experiment(folder, dropout=0.0, batch_size=batch_size)
    tokens, model = tiny.prepare(config)
    train_model(config, tokens, model, 0, workers(count))
    return model


def test_two_workers_take_the_steps_of_one(ray_local: None, tmp_path: Path) -> None:
    """An odd batch, so that the shards are unequal and a mean of their means would be wrong."""
    one, two = (trained(tmp_path / str(count), count, batch_size=7) for count in (1, 2))
    assert one.name == two.name  # the same stage: resources are not part of it
    expected, seen = tiny.curves(one), tiny.curves(two)
    assert seen.keys() == expected.keys()
    assert len([key for key in seen if key[0] == "train/loss"]) == tiny.STEPS
    assert len([key for key in seen if key[0] == "val/loss"]) == tiny.STEPS // tiny.EVERY
    assert seen == pytest.approx(expected, rel=1e-4)
    states = [tiny.final_state(model) for model in (one, two)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert is_trained(two)
    assert tiny.leftovers(tmp_path) == []
