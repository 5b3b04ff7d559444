"""Two commands on the same experiment at once: the second refuses, and leaves the first alone."""

from pathlib import Path

import pytest
import tiny
from command import Command
from processes import wait_until

from tt_ray.errors import UserError
from tt_ray.locks import exclusive

ONE_WORKER = "resources.workers=1"


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    with exclusive(tmp_path / "new", "in use"):
        with pytest.raises(UserError, match=r"/new: in use$"), exclusive(tmp_path / "new", "in use"):
            pass
        with exclusive(tmp_path / "other", "in use"):
            pass
    with exclusive(tmp_path / "new", "in use"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"/file/new: cannot write there: Not a directory"
    with pytest.raises(UserError, match=message), exclusive(tmp_path / "file" / "new", "in use"):
        pass


@pytest.mark.ray
@pytest.mark.slow
def test_the_second_command_refuses(undisturbed: Path, tmp_path: Path) -> None:
    file = tiny.write_file(tmp_path)
    first = Command(tmp_path, "train", file)
    wait_until(lambda: any((tmp_path / "runs" / "models").glob("[!.]*")), "training begins")
    model = tiny.model_folder(tmp_path)
    (running,) = (tmp_path / "runs" / "experiments").iterdir()
    others = [Command(tmp_path, "train", file, *more) for more in ([], ["--resume"], [ONE_WORKER])]
    refused = [other.wait(2).strip() for other in others]
    assert refused == 3 * [f"tt-ray: error: {running}: another command is running this experiment"]
    first.wait()
    tiny.assert_same(model, undisturbed)
    assert tiny.mlflow_curves(tmp_path, "faults seed 0") == tiny.curves(undisturbed)
    assert tiny.mlflow_runs(tmp_path) == [("faults", "FINISHED"), ("faults seed 0", "FINISHED")]


@pytest.mark.ray
@pytest.mark.slow
def test_of_two_commands_at_the_same_instant_one_goes_on(tmp_path: Path) -> None:
    file = tiny.write_file(tmp_path)
    both = [Command(tmp_path, "train", file, ONE_WORKER) for _ in range(2)]
    assert sorted(command.process.wait() for command in both) == [0, 2]
    (refused,) = (command.output.read_text() for command in both if command.process.returncode == 2)
    assert refused.startswith("tt-ray: error: ")
    assert "another " in refused
    assert refused.count("\n") == 1
    model = tiny.model_folder(tmp_path)
    assert tiny.mlflow_curves(tmp_path, "faults seed 0") == tiny.curves(model)
    assert tiny.mlflow_runs(tmp_path) == [("faults", "FINISHED"), ("faults seed 0", "FINISHED")]
    assert tiny.leftovers(tmp_path) == []
