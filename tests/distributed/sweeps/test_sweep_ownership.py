"""A sweep is not taken up where another user may have put pickles for Ray to read."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from study_tools import make_sweep

from tt_ray.distributed.sweeps.checks import Flags, check_sweep
from tt_ray.distributed.sweeps.ownership import require_own
from tt_ray.errors import UserError

STRANGER = 65_533


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a sweep that was interrupted."""
    folder = tmp_path / "runs" / "sweeps" / "study"
    (folder / "tune").mkdir(parents=True)
    (folder / "tune" / "error.pkl").write_bytes(b"")
    return folder


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the file another user's; where that takes root, let it look so."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
        return
    real = os.lstat

    def lstat(asked: Path) -> os.stat_result:
        found = list(real(asked))
        if Path(asked) == path:
            found[4] = STRANGER
        return os.stat_result(found)

    monkeypatch.setattr(os, "lstat", lstat)


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        require_own(folder)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_one_s_own_folder_is_fine(sweep: Path) -> None:
    require_own(sweep)
    require_own(sweep.parent / "another")


@pytest.mark.parametrize("name", ["", "tune", "tune/error.pkl"])
def test_what_belongs_to_others(name: str, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(sweep / name, monkeypatch)
    refused(sweep, str(sweep / name), "belongs to user 65533", "choose another name or resources.storage")


def test_a_link_to_a_file_of_others(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = sweep / "tune" / "link"
    link.symlink_to("/etc/hostname")
    require_own(sweep)
    give_away(link, monkeypatch)
    refused(sweep, str(link), "belongs to user")


@pytest.mark.parametrize("name", ["", "tune", "tune/error.pkl"])
def test_what_others_may_write(name: str, sweep: Path) -> None:
    (sweep / name).chmod(0o777)
    refused(sweep, str(sweep / name), "other users may write there", f"chmod -R go-w {sweep}")


@pytest.mark.parametrize("above", ["runs", "runs/sweeps"])
def test_folders_above_it(above: str, sweep: Path, tmp_path: Path) -> None:
    (tmp_path / above).chmod(0o777)
    refused(sweep, f"chmod +t {tmp_path / above}")
    refused(sweep.parent / "another", f"chmod +t {tmp_path / above}")
    (tmp_path / above).chmod(0o1777)
    require_own(sweep)


def test_a_way_round_through_a_link_is_seen(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "short").symlink_to(sweep)
    sweep.parent.chmod(0o777)
    refused(tmp_path / "short", f"chmod +t {sweep.parent}")


@pytest.mark.parametrize("flags", [Flags(), Flags(resume=True), Flags(only_failed=True)])
def test_a_sweep_is_refused_before_it_starts(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = check_sweep(make_sweep(tmp_path), Flags())
    study.folder.mkdir(parents=True, exist_ok=True)
    give_away(study.folder, monkeypatch)
    with pytest.raises(UserError, match="belongs to user"):
        check_sweep(make_sweep(tmp_path), flags)
    check_sweep(make_sweep(tmp_path), Flags(dry_run=True))


def test_tune_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tt_ray.distributed.sweeps.tuning import Tuning

    tuning = object.__new__(Tuning)
    object.__setattr__(tuning, "folder", tmp_path / "sweep" / "tune")
    prepare: Callable[[], None] = tuning._prepare_folder
    prepare()
    assert tuning.folder.stat().st_mode & 0o777 == 0o700
    (tuning.folder / "left.pkl").write_bytes(b"")
    prepare()
    assert list(tuning.folder.iterdir()) == []
    tuning.folder.parent.chmod(0o777)
    with pytest.raises(UserError, match=r"chmod \+t"):
        prepare()
