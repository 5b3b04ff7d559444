"""What `evaluate` refuses of goals and critics: in one line, before anything starts."""

from dataclasses import replace
from pathlib import Path

from commands import Refused, train_here, training_job, write_data

from tt_ray.config import CriticConfig
from tt_ray.data.episodes import Episodes
from tt_ray.data.minari_reader import load_episodes
from tt_ray.training.critic import CriticJob, Transitions, fit_critic


def train_critic(folder: Path, episodes: Episodes) -> Path:
    config = CriticConfig(steps=2, hidden=(4,), batch_size=4)
    fit_critic(CriticJob(config, Transitions.of(episodes), episodes.spec, 0), folder, lambda *_: None)
    return folder


def model(here: Path) -> tuple[str, Episodes]:
    write_data()
    job = training_job()
    checkpoint = train_here(job, here / "model")
    return str(checkpoint), load_episodes(job.spec.dataset_id)


def test_a_model_without_goals(here: Path, refused: Refused) -> None:
    checkpoint, _ = model(here)
    refused("evaluate", checkpoint, "planner.objective=goal", parts=("planner.objective", "goal"))
    refused("evaluate", checkpoint, "planner.goal=[1.0]", parts=("planner.goal", "goal"))


def test_an_objective_that_is_none(here: Path, refused: Refused) -> None:
    checkpoint, _ = model(here)
    refused("evaluate", checkpoint, "planner.objective=retrun", parts=("did you mean return?",))


def test_q_without_a_critic(here: Path, refused: Refused) -> None:
    checkpoint, _ = model(here)
    refused("evaluate", checkpoint, "planner.objective=q", parts=("critic",))
    refused(
        "evaluate",
        checkpoint,
        "planner.objective=q",
        "--critic",
        "nowhere",
        parts=("nowhere: no critic's folder",),
    )


def test_a_critic_of_other_data(here: Path, refused: Refused) -> None:
    checkpoint, episodes = model(here)
    other = replace(episodes, spec=replace(episodes.spec, fingerprint="0123", dataset_id="tests/other-v0"))
    critic = str(train_critic(here / "critic", other))
    parts = ("the critic was trained on other data than the model", "tests/other-v0")
    refused("evaluate", checkpoint, "planner.objective=q", "--critic", critic, parts=parts)


def test_a_damaged_critic(here: Path, refused: Refused) -> None:
    checkpoint, episodes = model(here)
    (step,) = (train_critic(here / "critic", episodes) / "checkpoints").iterdir()
    (step / "model.safetensors").write_bytes(b"?")
    parts = ("model.safetensors: damaged or truncated",)
    refused("evaluate", checkpoint, "planner.objective=q", "--critic", str(step), parts=parts)
