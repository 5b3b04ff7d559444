"""What goes to a cluster: the working folder without its weight, and data sets whole or not at all."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from tt_ray.distributed.launch import lifecycle, ssh
from tt_ray.distributed.launch.bundle import job_path, make_bundle
from tt_ray.distributed.launch.folders import digest
from tt_ray.distributed.launch.receive import look, take
from tt_ray.errors import UserError

SET = "me/task-v0"


def tree(folder: Path, *names: str, size: int = 1000) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_job_gets_code_and_nothing_heavy(tmp_path: Path) -> None:
    code = ["my_objectives.py", "sweeps/mine.yaml", "package/deep/module.py", "README.md"]
    left = [
        *(
            ".git/objects/aa",
            ".venv/bin/python",
            "env/pyvenv.cfg",
            "env/lib/torch.so",
            "package/__pycache__/a.pyc",
        ),
        *("runs/models/x", "mlruns/1/a", "mlflow.db", "mlflow.db-wal", "mine.hdf5", "x.egg-info/PKG", ".env"),
        *("sets/me/task-v0/data/main_data.hdf5", "sets/me/task-v0/data/metadata.json"),
    ]
    folder = tree(tmp_path / "work", *code, *left)
    size = make_bundle(folder, folder / "sweeps" / "mine.yaml", tmp_path / "job")
    assert names(tmp_path / "job") == sorted(code)
    assert size == 4000


def test_a_file_from_elsewhere_comes_along(tmp_path: Path) -> None:
    folder = tree(tmp_path / "work", "a.py")
    outside = tree(tmp_path, "mine.yaml") / "mine.yaml"
    make_bundle(folder, outside, tmp_path / "job")
    assert names(tmp_path / "job") == ["a.py", "mine.yaml"]
    assert job_path(folder, outside) == Path("mine.yaml")


def test_too_much_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    folder = tree(tmp_path / "work", "big/one.bin", "big/two.bin", size=4_000_000)
    tree(folder, "mine.yaml")
    with pytest.raises(UserError, match=r"has 8 MB for the job, and 5 MB is the limit \(big 8 MB, mine"):
        make_bundle(folder, folder / "mine.yaml", tmp_path / "job", limit=5_000_000)
    assert not (tmp_path / "job").exists()


def test_a_pushed_data_set_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "datasets"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    mine = tree(tmp_path / "mine", "data/main_data.hdf5", "data/metadata.json")
    state, _, place = look(SET, digest(mine)).partition(" ")
    assert state == "missing"
    tree(Path(place), "data/main_data.hdf5")  # the transfer breaks off
    with pytest.raises(UserError, match="did not arrive"):
        take(SET, digest(mine), overwrite=False)
    assert not (root / SET).exists()
    tree(Path(look(SET, digest(mine)).partition(" ")[2]), "data/metadata.json")  # and goes on
    assert take(SET, digest(mine), overwrite=False) == root / SET
    assert digest(root / SET) == digest(mine)
    assert look(SET, digest(mine)).startswith("same ")
    assert sorted(path.name for path in root.iterdir()) == ["me"]
    assert (root / "me" / "namespace_metadata.json").exists()


def test_another_set_of_the_same_id_is_replaced_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    tree(tmp_path / "datasets" / SET, "data/main_data.hdf5", size=5)
    mine = tree(tmp_path / "mine", "data/main_data.hdf5")
    state, _, place = look(SET, digest(mine)).partition(" ")
    assert state == "other"
    tree(Path(place), "data/main_data.hdf5")
    with pytest.raises(UserError, match="exists already"):
        take(SET, digest(mine), overwrite=False)
    take(SET, digest(mine), overwrite=True)
    assert digest(tmp_path / "datasets" / SET) == digest(mine)


def test_a_digest_tells_names_and_contents_apart(tmp_path: Path) -> None:
    one = digest(tree(tmp_path / "one", "a", "b/c"))
    assert one == digest(tree(tmp_path / "two", "b/c", "a"))
    assert one != digest(tree(tmp_path / "three", "a", "b/d"))
    assert one != digest(tree(tmp_path / "four", "a", "b/c", size=999))


def test_the_token_is_made_once_and_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = lifecycle.make_token()
    token = path.read_text()
    assert path == tmp_path / ".tt-ray" / "auth_token"
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert lifecycle.make_token().read_text() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]


def test_a_port_that_somebody_else_listens_on_is_no_tunnel() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "60"]) as other:
        port = server.getsockname()[1]
        try:
            assert ssh._listens(os.getpid(), port)
            assert not ssh._listens(os.getpid(), ssh.free_port())
            assert not ssh._listens(other.pid, port)
        finally:
            other.kill()
    assert not ssh._listens(other.pid, port)
