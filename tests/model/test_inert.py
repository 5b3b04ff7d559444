"""Hostile files of published runs: nothing in them runs, and the refusal is one line."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_originals import write_pickled_config

from tt_ray.data.limited import read_apart
from tt_ray.errors import UserError
from tt_ray.model.inert import read_run, read_settings, read_weights

SETTINGS = ("model_config.pkl", "data_config.pkl")


class Calls:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


def touching(file: Path) -> dict[str, Any]:
    """Objects whose loading would make `file`, each in another way."""
    return {
        "os.system": Calls(os.system, f"touch {file}"),
        "eval": Calls(eval, f"open({str(file)!r}, 'w').close()"),
        "exec": Calls(exec, f"open({str(file)!r}, 'w').close()"),
        "nested": {"_class": Calls(getattr, Calls(__import__, "os"), "system"), "_dict": [touch(file)]},
        "open": Calls(open, str(file), "w"),
        "torch": Calls(torch.load, Calls(open, str(file), "w")),
    }


def touch(file: Path) -> Calls:
    return Calls(os.system, f"touch {file}")


KINDS = sorted(touching(Path("x")))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that hostile files try to make."""
    return tmp_path / "executed"


def refusal(read: Callable[[], Any], mark: Path) -> str:
    """The one line with which `read` refuses, having run nothing."""
    with pytest.raises(UserError) as caught:
        read()
    assert not mark.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls(tmp_path: Path, mark: Path, kind: str, protocol: int) -> None:
    file = tmp_path / "model_config.pkl"
    file.write_bytes(pickle.dumps(touching(mark)[kind], protocol=protocol))
    assert str(file) in refusal(lambda: read_settings(file), mark)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_among_good_settings(tmp_path: Path, mark: Path, kind: str) -> None:
    file = tmp_path / "data_config.pkl"
    write_pickled_config(file, "DiscretizedDataset", env="hopper-medium-v2", N=touching(mark)[kind])
    refusal(lambda: read_settings(file), mark)


def test_the_hostile_files_would_work_elsewhere(mark: Path) -> None:
    """Python's own reader runs them: what the other tests show is not that these do nothing anyway."""
    pickle.loads(pickle.dumps(touch(mark)))
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "no pickle": b"hello",
        "persistent id": b"\x80\x02X\x01\x00\x00\x00xQ.",
        "old instance": b"(S'true'\nios\nsystem\n.",
        "extension": b"\x80\x02\x82\x01.",
        "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        "no mark": b"\x80\x02e.",
        "only a class": b"\x80\x02ctrajectory.utils.config\nConfig\n.",
        "state of a list": b"\x80\x02]}b.",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_broken_pickle(tmp_path: Path, mark: Path, content: tuple[str, bytes]) -> None:
    file = tmp_path / "model_config.pkl"
    file.write_bytes(content[1])
    refusal(lambda: read_settings(file), mark)


def test_a_small_pickle_of_endless_data(tmp_path: Path, mark: Path) -> None:
    """Lists that hold each other twice, forty deep: a trillion values in a kilobyte. And one in itself."""
    laughs: list[Any] = []
    for _ in range(15):
        laughs = [laughs, laughs]
    for value in (laughs, list(range(20_000)), (cycle := [])):
        cycle.append(cycle) if value is cycle else None
        file = tmp_path / "data_config.pkl"
        write_pickled_config(file, "DiscretizedDataset", env=value)
        assert "too many values" in refusal(lambda file=file: read_settings(file), mark)


def test_a_large_file_of_settings_is_not_read(tmp_path: Path, mark: Path) -> None:
    file = tmp_path / "model_config.pkl"
    file.write_bytes(bytes(2 << 20))
    assert "not read" in refusal(lambda: read_settings(file), mark)


@pytest.mark.parametrize("kind", [*KINDS, "nothing"])
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_call(tmp_path: Path, mark: Path, kind: str, legacy: bool) -> None:
    file = tmp_path / "state_1.pt"
    content = {"tok_emb.weight": torch.ones(2), "other": touching(mark).get(kind, {"a": 1})}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    line = refusal(lambda: read_weights(file), mark)
    if kind == "os.system":
        assert "asks for posix.system" in line


@pytest.mark.parametrize("kind", KINDS)
def test_bins_that_call(tmp_path: Path, mark: Path, kind: str) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model_last.pt")
    torch.save(touching(mark)[kind], tmp_path / "discretizer.pt")
    refusal(lambda: read_run(tmp_path, "model_last.pt", [], "discretizer.pt"), mark)


def claim(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
    return tensor.as_strided(sizes, (0,) * len(sizes))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"w": claim(torch.ones(1), 1 << 20, 1 << 20)}, "larger than what is stored"),
        ({"w": torch.ones(2).to_sparse()}, "not a tensor of numbers"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "not a tensor of numbers"),
        ({3: torch.ones(2)}, "not a state dict"),
        ([torch.ones(2)], "not a state dict"),
    ],
)
def test_tensors_that_are_none(tmp_path: Path, mark: Path, content: Any, said: str) -> None:
    file = tmp_path / "state_1.pt"
    torch.save(content, file)
    assert said in refusal(lambda: read_weights(file), mark)


def rewritten(file: Path, change: Callable[[zipfile.ZipInfo], str], kind: int = zipfile.ZIP_STORED) -> None:
    """The archive's parts under other names, packed or not."""
    with zipfile.ZipFile(file) as archive:
        parts = [(change(entry), archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in parts:
            archive.writestr(name, content)


def test_archives_as_torch_never_writes_them(tmp_path: Path, mark: Path) -> None:
    file = tmp_path / "state_1.pt"
    torch.save({"w": torch.zeros(1000, 1000)}, file)
    assert read_weights(file)["w"].shape == (1000, 1000)
    rewritten(file, lambda entry: entry.filename, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(lambda: read_weights(file), mark)
    for name in ("../../executed", "/executed", "a/../../executed", "a\\..\\executed"):
        torch.save({"w": torch.zeros(3)}, file)
        rewritten(file, lambda entry, name=name: name if "data/0" in entry.filename else entry.filename)
        assert "outside itself" in refusal(lambda: read_weights(file), mark)


def test_a_tar_archive(tmp_path: Path, mark: Path) -> None:
    file = tmp_path / "state_1.pt"
    with tarfile.open(file, "w") as archive:
        entry = tarfile.TarInfo("../executed")
        archive.addfile(entry, io.BytesIO(b""))
    assert "tar archive" in refusal(lambda: read_weights(file), mark)


def test_cut_weights(tmp_path: Path, mark: Path) -> None:
    file = tmp_path / "state_1.pt"
    torch.save({"w": torch.zeros(100)}, file)
    whole = file.read_bytes()
    for end in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        refusal(lambda: read_weights(file), mark)


def test_a_claim_of_more_memory_than_there_is(tmp_path: Path, mark: Path) -> None:
    """Neither a slot of the memo at four billion nor a storage of a terabyte grows this process."""
    for name in SETTINGS:
        write_pickled_config(tmp_path / name, "GPT")
    torch.save({"w": torch.zeros(3)}, tmp_path / "state_1.pt")
    (tmp_path / SETTINGS[0]).write_bytes(b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFF0) + b".")

    def read() -> Any:
        options: dict[str, Any] = {"weights": "state_1.pt", "settings": list(SETTINGS), "bins": None}
        return read_apart("tt_ray.model.inert:read_run", tmp_path, **options)

    assert SETTINGS[0] in refusal(read, mark)
    write_pickled_config(tmp_path / SETTINGS[0], "GPT")
    assert "weights/w" in read()
    file = tmp_path / "state_1.pt"
    torch.save({"w": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    small, large = b"K\x03N", b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"N"
    assert content.count(small) == 1  # the storage's size, in its persistent id
    file.write_bytes(content.replace(small, large))
    refusal(read, mark)
