"""Jobs: sent once whatever the head answers, and ended with their own exit status."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tt_ray.distributed.launch import jobs
from tt_ray.errors import UserError


class Client:
    """In place of Ray's job server: answers in turn what it is told to, and knows how a job has ended."""

    def __init__(self, *answers: str, status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.answers, self.status, self.code = list(answers), status, code
        self.sent: list[tuple[str, str, list[str]]] = []

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, str]) -> str:
        folder = Path(runtime_env["working_dir"])
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self.sent.append((entrypoint, submission_id, names))
        if answer := self.answers.pop(0):
            raise RuntimeError(answer)
        return submission_id

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(value=self.status)

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(
            status=self.get_job_status(job), driver_exit_code=self.code, message="it broke"
        )

    def stop_job(self, job: str) -> None:
        self.status = "STOPPED"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in ("one\n", "two\n"):
            yield text


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "large").write_text("result")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    return tmp_path / "mine.yaml"


def send(client: Client, file: Path, *arguments: str) -> jobs.Submitted:
    return jobs.submit(client, "sweep", file, arguments, lambda text: None)  # type: ignore[arg-type]


def test_the_command_names_the_file_and_the_shared_storage(work: Path) -> None:
    client = Client("", "")
    send(client, work, "planner.horizon=5", "--resume")
    send(client, work, "resources.storage=/elsewhere", "name=a b")
    first, second = (entry for entry, _, _ in client.sent)
    assert first.startswith("tt-ray sweep mine.yaml planner.horizon=5 --resume resources.storage=")
    assert "TT_RAY_STORAGE" in first
    assert second == "tt-ray sweep mine.yaml resources.storage=/elsewhere 'name=a b'"
    assert [names for _, _, names in client.sent] == [["mine.yaml"]] * 2


def test_a_busy_head_is_asked_again_for_the_same_job(work: Path) -> None:
    client = Client("Request failed with status code 504: .", "Job with submission_id x already exists")
    job = send(client, work)
    assert {sent for _, sent, _ in client.sent} == {job.id}
    assert len(client.sent) == 2


def test_other_refusals_are_one_line(work: Path) -> None:
    client = Client("Request failed with status code 400: \nValueError: no such thing\n")
    with pytest.raises(UserError, match=r"^the cluster's job server: ValueError: no such thing$"):
        send(client, work)
    assert len(client.sent) == 1


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", -15, 1)],
)
def test_a_followed_job_ends_with_its_own_status(status: str, code: int | None, expected: int) -> None:
    said: list[str] = []
    assert jobs.follow(Client(status=status, code=code), "job", said.append) == expected  # type: ignore[arg-type]
    assert said[:2] == ["one\n", "two\n"]
    assert len(said) == 2 or said[2] == f"job job: {status}: it broke\n"


def test_a_stopped_job_says_so() -> None:
    assert jobs.stop(Client(status="RUNNING"), "job") == "STOPPED"  # type: ignore[arg-type]
