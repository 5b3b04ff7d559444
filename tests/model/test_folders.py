from __future__ import annotations

import json
from pathlib import Path

import pytest

from tt_ray.errors import UserError
from tt_ray.model.folders import CHECKSUMS, sha256, write_folder


def write_number(place: Path, number: int = 1) -> None:
    (place / "number").write_text(str(number))


def test_a_folder_has_a_checksum_for_each_file_and_replaces_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    write_folder(folder, "thing", write_number)
    write_folder(folder, "thing", lambda place: write_number(place, 2))
    assert (folder / "number").read_text() == "2"
    assert json.loads((folder / CHECKSUMS).read_text()) == {"number": sha256(folder / "number")}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "folder"
    write_folder(folder, "thing", write_number)

    def fail(place: Path) -> None:
        write_number(place, 2)
        raise error

    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        write_folder(folder, "thing", fail)
    if expected is UserError:
        assert str(raised.value) == f"{folder}: cannot write the thing: disk full"
    assert (folder / "number").read_text() == "1"
    assert list(tmp_path.iterdir()) == [folder]
