"""`tt-ray predict` as a user has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import Command, Refused, recorded, train_here, training_job, write_data, write_file

from tt_ray.config import ResourcesConfig
from tt_ray.distributed import cluster
from tt_ray.distributed.cluster import Allocation

TINY = {
    "dataset": {"validation_fraction": 0.2},
    "training": {"steps": 4, "validate_every": 2},
    "ensemble": {"members": 2, "hidden": [8], "steps": 4, "checkpoint_every": 2},
    "prediction": {"rollouts": 4, "horizon": 3, "starts": 2, "context": 2},
    "evaluation": {"bootstrap_samples": 50},
}


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one worker computes, it computes in this process: Ray has nothing to do."""

    @contextmanager
    def connect(resources: ResourcesConfig) -> Iterator[Allocation]:
        yield Allocation()

    monkeypatch.setattr(cluster, "connect", connect)


@pytest.mark.usefixtures("without_ray")
def test_a_file_and_then_its_model(here: Path, store: str, command: Command) -> None:
    """The tables come out; the model's own folder gives the same study, with everything reused."""
    write_data([recorded(12, seed) for seed in range(12)])
    write_file(here, **TINY, tracking={"uri": store})
    outcome = command("predict", "tiny.yaml")
    assert outcome.code == 0, outcome.err
    for text in (
        "Log-likelihood of what followed",
        "step 1",
        "step 3",
        "Markovian Transformer",
        "discrete oracle",
    ):
        assert text in outcome.out
    (model,) = [line.split()[1] for line in outcome.out.splitlines() if line.startswith("transformer:")]
    again = command("predict", str(Path(model).parents[1]), f"tracking.uri={store}")
    assert again.code == 0, again.err
    table = "Log-likelihood of what followed"
    rows = [text[text.index(table) : text.index("Time")] for text in (outcome.out, again.out)]
    assert rows[0] == rows[1]
    assert "model 0, ensemble, rollouts" in again.out


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("prediction.context=9", ("prediction.context: 9 transitions are more than", "= 4")),
        (
            "prediction.horizon=90",
            ("none of its 2 held-out episodes has the 92 rows", "lower prediction.horizon"),
        ),
        ("prediction.rolouts=9", ("did you mean prediction.rollouts?",)),
        ("prediction.floor=0", ("prediction.floor: must lie between 0 and 1",)),
    ],
)
def test_what_cannot_be_predicted(
    here: Path, refused: Refused, override: str, parts: tuple[str, ...]
) -> None:
    write_data([recorded(12, seed) for seed in range(12)])
    write_file(here, **TINY)
    refused("predict", "tiny.yaml", override, parts=parts)


def test_a_target_that_is_none(here: Path, refused: Refused) -> None:
    refused("predict", "./nowhere", parts=("./nowhere: no such folder",))
    refused("predict", "missing.yaml", parts=("missing.yaml: cannot be read",))


def test_a_checkpoint_of_other_data(here: Path, refused: Refused) -> None:
    write_data([recorded(12, seed) for seed in range(12)])
    train_here(training_job(**TINY | {"training": {"steps": 1}}), here / "model")
    write_data([recorded(12, seed + 1) for seed in range(12)], overwrite=True)
    refused("predict", "model", parts=("was trained on another tiny/pendulum-v0",))


def test_only_the_prediction_of_a_checkpoint_can_be_changed(here: Path, refused: Refused) -> None:
    write_data([recorded(12, seed) for seed in range(12)])
    train_here(training_job(**TINY | {"training": {"steps": 1}}), here / "model")
    refused("predict", "model", "model.num_layers=2", parts=("model is settled here",))
