"""Files of others are read in a process that may crash, hang or grow, and this one only says so."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from minari_examples import write

from tt_ray.data import limited
from tt_ray.data.importing import import_files
from tt_ray.data.limited import read_apart
from tt_ray.data.minari_sets import load_episodes
from tt_ray.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.hdf5"
    path.write_bytes(b"\x01\x02")
    return path


def test_arrays_come_back(file: Path) -> None:
    found = read_apart("odd_readers:add", file, number=3)
    assert found["bytes"].tolist() == [4, 5]
    assert found["none"].shape == (0, 3)


def test_no_secrets_are_handed_down(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    kept = {*limited._KEPT, "PYTHONPATH", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "LC_CTYPE"}
    assert set(read_apart("odd_readers:environment", file)["names"].tolist()) <= kept


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        ("crash", r"reading it crashes \(SIGSEGV\)"),
        ("spin", "not read after 1 s of CPU time"),
        ("wait", "not read after 4 s"),
        ("fill_memory", "needs more than 64 MiB of memory"),
        ("fill_disk", "cannot be read: OSError"),
        ("outgrow", "it holds far more than it looks"),
        ("objects", "cannot be read: ValueError"),
        ("leave", "cannot be read: the reader ended with code 0"),
    ],
)
def test_what_goes_wrong_is_one_line(
    reader: str, message: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, "CPU_SECONDS", 1)
    monkeypatch.setattr(limited, "PATIENCE", 4 if reader == "wait" else 100)
    monkeypatch.setattr(limited, "MEMORY_BYTES", 64 << 20)
    with pytest.raises(UserError, match=message) as caught:
        read_apart(f"odd_readers:{reader}", file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_other_file_can_be_opened(file: Path) -> None:
    assert read_apart("odd_readers:open_another", file)["opened"] == 0


def test_this_process_opens_no_hdf5(
    minari_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    expected = load_episodes("test/box-v0")

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("an HDF5 file was opened in this process")

    monkeypatch.setattr(h5py, "File", forbidden)
    np.testing.assert_array_equal(load_episodes("test/box-v0").observations, expected.observations)
    (tmp_path / "hopper.hdf5").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="HDF5"):
        import_files(tmp_path / "hopper.hdf5", "mine/hopper-v0")


@pytest.mark.parametrize("kind", ["external", "virtual", "link"])
def test_a_file_cannot_bring_in_another(kind: str, minari_root: Path, tmp_path: Path) -> None:
    """What stands in the user's other files must not end up in a data set that is then passed on."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4 * 6 * 11))
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["observations"] = np.zeros((6, 11), np.float32)
    path = tmp_path / "hopper.hdf5"
    with h5py.File(path, "w") as file:
        file["actions"] = np.zeros((6, 3), np.float32)
        file["rewards"] = np.zeros(6, np.float32)
        for name in ("terminals", "timeouts"):
            file[name] = np.arange(6) == 5
        if kind == "external":
            place = [(os.fspath(secret), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("observations", (6, 11), np.float32, external=place)
        elif kind == "virtual":
            layout = h5py.VirtualLayout((6, 11), np.float32)
            layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "observations", (6, 11))
            file.create_virtual_dataset("observations", layout)
        else:
            file["observations"] = h5py.ExternalLink(tmp_path / "other.hdf5", "observations")
    with pytest.raises(UserError) as caught:
        import_files(path, "mine/hopper-v0")
    assert str(path) in str(caught.value)
    assert "lies in other files" in str(caught.value) or kind == "link"
    assert not (minari_root / "mine").exists()
