"""What is run on a host before Ray: checks of environment and storage, and what shells are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tt_ray.distributed.launch import host, install
from tt_ray.distributed.launch.host import check_storage, prepare
from tt_ray.errors import UserError

ROOT = Path(__file__).parents[3]


def test_this_environment_is_found_to_be_what_is_pinned() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tt_ray" / "distributed" / "launch" / "install.py")],
        env={"TT_RAY_VENV": sys.prefix, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == (f"environment {sys.prefix} has the pinned versions\n", 0), (
        done.stderr
    )


def test_what_an_environment_lacks_is_named() -> None:
    pins = install.pinned("# all\nRay==2.60.0\ntorch==2.13.0 ; python_version > '3'\nPy_YAML==6.0\n")
    assert pins == {"Ray": "2.60.0", "torch": "2.13.0", "Py_YAML": "6.0"}
    have = {"ray": "2.60.0", "torch": "2.13.0+cpu", "py-yaml": "6.0", "other": "1"}
    assert install.faults_of(have, ["ray", "PY.yaml"], pins) == []
    assert install.faults_of(have | {"ray": "2.59.0"}, ["ray", "mlflow"], pins) == [
        "mlflow is missing",
        "Ray is 2.59.0, not 2.60.0",
    ]


def test_extras_count_as_wanted() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    plain, more = install.wanted_names(text, ""), install.wanted_names(text, "postgres,aws")
    assert {"tt-ray", "ray", "torch", "mlflow"} <= set(plain)
    assert set(more) - set(plain) == {"psycopg", "boto3"}
    pins = {install.normal(name) for name in install.pinned((ROOT / "constraints.txt").read_text())}
    everything = install.wanted_names(text, "optuna,postgres,mazes,aws")
    assert {install.normal(name) for name in everything} - pins == {"tt-ray"}


def test_every_shell_knows_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, storage = tmp_path / "home", tmp_path / "sto rage"
    (home / ".tt-ray").mkdir(parents=True)
    (home / ".tt-ray" / "settings.sh").write_text("export TT_RAY_HEAD_OPTIONS='--num-cpus=0'\n")
    (home / ".bashrc").write_text("case $- in *i*) ;; *) return;; esac\n")
    (home / host.BOOTSTRAP).write_text("provider: {type: local, head_ip: 127.0.0.1}\n")
    given = {"TT_RAY_STORAGE": str(storage), "TT_RAY_VENV": str(tmp_path / "venv")}
    for _ in range(2):  # the second changes nothing
        assert prepare(home, given) == f"head of the cluster at 127.0.0.1, storage {storage}"
    assert (home / ".bashrc").read_text().count("tt-ray/environment.sh") == 2  # of one line
    shown = "$MLFLOW_TRACKING_URI|$MINARI_DATASETS_PATH|$RAY_AUTH_MODE|$TT_RAY_HEAD_OPTIONS|$PATH"
    done = subprocess.run(
        ["bash", "-c", f'. "$HOME/.bashrc"; . "$HOME/.tt-ray/environment.sh"; echo "{shown}"'],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == (
        f"http://127.0.0.1:5000|{storage}/datasets|token|--num-cpus=0|{tmp_path}/venv/bin:/usr/bin:/bin"
    )
    assert sorted(path.name for path in storage.iterdir()) == [host.MARKER, "datasets", "mlflow", "runs"]


def test_a_worker_must_see_the_heads_own_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_SEEN_WITHIN", 0.0)
    shared, other = tmp_path / "shared", tmp_path / "other"
    other.mkdir()
    check_storage(shared, "10.0.0.1", is_head=True)
    check_storage(shared, "10.0.0.1", is_head=False)
    for folder, head in ((other, "10.0.0.1"), (shared, "10.0.0.2")):
        with pytest.raises(UserError, match="is not the folder that the head"):
            check_storage(folder, head, is_head=False)
    assert list(other.iterdir()) == []
    (tmp_path / "file").touch()
    for is_head in (True, False):
        with pytest.raises(UserError, match="cannot be written"):
            check_storage(tmp_path / "file" / "below", "10.0.0.1", is_head=is_head)


def test_a_host_that_ray_has_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `tt-ray cluster up`"):
        prepare(tmp_path, {"TT_RAY_STORAGE": str(tmp_path), "TT_RAY_VENV": "/venv"})


def test_a_busy_host_gets_three_attempts_to_start(tmp_path: Path) -> None:
    (tmp_path / ".tt-ray").mkdir()
    (tmp_path / ".tt-ray" / "settings.sh").touch()
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n[ "$1" = stop ]\n')
    (tmp_path / "ray").chmod(0o755)
    script = host.environment("127.0.0.1", tmp_path, tmp_path) + "tt_ray_try ray start --head"
    given = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], env=given, capture_output=True, check=False)
    assert done.returncode != 0
    assert (tmp_path / "said").read_text().split("\n")[:-1] == ["start --head", "stop"] * 2 + ["start --head"]
