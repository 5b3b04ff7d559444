import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from minari_examples import OBSERVATIONS, minaris, one_line, recorded, write

from tt_ray.data import minari_sets
from tt_ray.data.minari_sets import describe, download_minari, list_datasets, load_episodes
from tt_ray.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("minari_root"),
    pytest.mark.filterwarnings("ignore::UserWarning:minari.utils"),
]


class TestListAndDescribe:
    def test_the_list(self, minari_root: Path) -> None:
        assert list_datasets() == []
        write("test/b-v0", ref_min_score=1, ref_max_score=2)
        minaris("test/deep/a-v0", [recorded(2)], OBSERVATIONS, "arrow")
        first, second = list_datasets()
        assert (first.id, first.environment, first.episodes, first.steps) == ("test/b-v0", "Hopper-v5", 3, 12)
        assert (first.format, first.ref_min_score, first.ref_max_score) == ("hdf5", 1, 2)
        assert first.size_mb == pytest.approx(
            sum(path.stat().st_size for path in (minari_root / "test/b-v0/data").iterdir()) / 1e6
        )
        assert (second.id, second.format, second.environment) == ("test/deep/a-v0", "arrow", "")

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"env_spec": "{}"}', '{"tt_ray": 3}'])
    def test_a_broken_entry_is_listed_with_its_problem(self, content: str, minari_root: Path) -> None:
        write("test/good-v0")
        (minari_root / "no version" / "data").mkdir(parents=True)
        (minari_root / "no version" / "data" / "metadata.json").write_text(content)
        broken, good = list_datasets()
        assert (broken.id, good.id) == ("no version", "test/good-v0")
        assert broken.problem
        assert good.problem is None

    def test_no_folder_at_all(self, minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari_root / "not made yet"))
        assert list_datasets() == []
        assert not (minari_root / "not made yet").exists()

    def test_the_description(self) -> None:
        episodes = [
            recorded(2, seed, "terminated" if seed % 2 else "truncated", rewards=np.full(2, float(seed)))
            for seed in range(20)
        ]
        write(episodes=episodes, metadata={"seeds": [1, 2], "iterations": 7}, description="words")
        described = describe("test/box-v0")
        assert described.info.episodes == 20
        assert described.flattening == (("", 3),)
        assert [column.name for column in described.columns] == [
            *("observation 0", "observation 1", "observation 2", "action 0", "action 1", "reward")
        ]
        reward = described.columns[-1]
        assert (reward.minimum, reward.maximum, reward.distinct) == (0, 19, 20)
        assert reward.mean == pytest.approx(9.5)
        assert reward.std == pytest.approx(np.arange(20).std())
        assert described.returns["mean"] == pytest.approx(19)
        assert described.returns["best_tenth"] == pytest.approx(37)
        assert (described.returns["min"], described.returns["max"]) == (0, 38)
        assert described.lengths == {"mean": 2, "min": 2, "max": 2}
        assert (described.terminations, described.truncations) == (10, 10)
        assert described.fingerprint == load_episodes("test/box-v0").spec.fingerprint
        assert described.metadata["iterations"] == 7
        assert described.metadata["seeds"] == [1, 2]
        assert described.metadata["description"] == "words"


class TestDownload:
    """Minari's hub is replaced: its client writes to the local folder, or raises."""

    def test_a_set_arrives_whole(self, minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = write("hub/box-v0")
        kept = minari_root.with_name(minari_root.name + "-hub")
        shutil.move(source, kept)

        def fake(dataset_id: str) -> None:
            print("chatter")
            shutil.copytree(kept, Path(os.environ["MINARI_DATASETS_PATH"]) / dataset_id)

        monkeypatch.setattr(minari_sets.minari, "download_dataset", fake)
        assert download_minari("hub/box-v0") == "hub/box-v0"
        assert len(load_episodes("hub/box-v0")) == 3
        assert os.environ["MINARI_DATASETS_PATH"] == str(minari_root)
        monkeypatch.setattr(minari_sets.minari, "download_dataset", pytest.fail)
        assert download_minari("hub/box-v0") == "hub/box-v0"  # here already

    @pytest.mark.parametrize(
        ("error", "part"),
        [
            (ConnectionError("no route\nto host"), "no route to host"),
            (ValueError("Couldn't find any version for dataset x"), "Couldn't find"),
            (ImportError("huggingface_hub is not installed"), 'pip install "minari[hf]"'),
        ],
        ids=["network", "unknown", "package"],
    )
    def test_failures_are_one_line_and_leave_nothing(
        self, error: Exception, part: str, minari_root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fake(dataset_id: str) -> None:
            half = Path(os.environ["MINARI_DATASETS_PATH"]) / dataset_id / "data"
            half.mkdir(parents=True)
            (half / "main_data.hdf5").write_bytes(b"half")
            raise error

        monkeypatch.setattr(minari_sets.minari, "download_dataset", fake)
        with pytest.raises(UserError) as caught:
            download_minari("hub/box-v0")
        one_line(caught, part)
        assert list(minari_root.iterdir()) == []

    def test_a_hub_that_sends_nothing(self, minari_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(minari_sets.minari, "download_dataset", lambda dataset_id: None)
        with pytest.raises(UserError) as caught:
            download_minari("hub/box-v0")
        one_line(caught, "hub/box-v0", "nothing")
        assert list(minari_root.iterdir()) == []
