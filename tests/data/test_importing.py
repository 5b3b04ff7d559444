"""Logs of people's own, in every format, as Minari data sets; and what is told of them before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from tt_ray.data.importing import ImportOptions, find, import_files
from tt_ray.data.log_layout import Columns
from tt_ray.data.log_report import Report, stored_findings
from tt_ray.data.minari_reader import load_episodes, own_metadata
from tt_ray.errors import UserError

pytestmark = pytest.mark.usefixtures("minari_root")
ID = "mine/log-v0"
LENGTHS = (4, 3, 5)


def table(seed: int = 0) -> pd.DataFrame:
    """Twelve rows of three episodes of Pendulum's shapes, float32: terminated, cut off, unfinished."""
    rng = np.random.default_rng(seed)
    rows = sum(LENGTHS)
    frame = pd.DataFrame(rng.normal(size=(rows, 3)).astype(np.float32), columns=["obs_0", "obs_1", "obs_2"])
    frame["act_0"] = rng.uniform(-2, 2, rows).astype(np.float32)
    frame["reward"] = rng.normal(size=rows).astype(np.float32)
    frame["episode_id"] = np.repeat(["a", "b", "c"], LENGTHS)
    frame["step"] = np.concatenate([np.arange(length) for length in LENGTHS])
    frame["terminated"] = np.arange(rows) == 3
    frame["truncated"] = np.arange(rows) == 6
    return frame


def as_csv(frame: pd.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "log.csv", index=False)
    return folder / "log.csv"


def as_tsv(frame: pd.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "log.tsv", index=False, sep="\t")
    return folder / "log.tsv"


def as_parquet(frame: pd.DataFrame, folder: Path) -> Path:
    frame.to_parquet(folder / "log.parquet", row_group_size=5)
    return folder / "log.parquet"


def as_vectors(frame: pd.DataFrame, folder: Path) -> Path:
    """Parquet whose observations are a column of lists, and whose time is a date."""
    columns = {
        "observation.state": pa.array(frame.filter(like="obs_").to_numpy().tolist(), pa.list_(pa.float32())),
        "action": pa.FixedSizeListArray.from_arrays(pa.array(frame["act_0"].to_numpy()), 1),
        "next.reward": pa.array(frame["reward"].to_numpy()),
        "episode_index": pa.array(pd.factorize(frame["episode_id"])[0]),
        "timestamp": pa.array(pd.Timestamp("2030-01-01") + pd.to_timedelta(frame["step"], "s")),
        "terminated": pa.array(frame["terminated"].to_numpy()),
        "truncated": pa.array(frame["truncated"].to_numpy()),
    }
    pa_parquet.write_table(pa.table(columns), folder / "vectors.parquet")
    return folder / "vectors.parquet"


def arrays(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    return {
        "observations": frame.filter(like="obs_").to_numpy(),
        "actions": frame.filter(like="act_").to_numpy(),
        "rewards": frame["reward"].to_numpy(),
        "terminals": frame["terminated"].to_numpy(),
        "timeouts": frame["truncated"].to_numpy(),
    }


def as_npz(frame: pd.DataFrame, folder: Path) -> Path:
    np.savez_compressed(folder / "log.npz", **arrays(frame))
    return folder / "log.npz"


def as_npy(frame: pd.DataFrame, folder: Path) -> Path:
    (folder / "log").mkdir()
    for name, values in arrays(frame).items():
        np.save(folder / "log" / f"{name}.npy", values)
    return folder / "log"


def columns_npz(frame: pd.DataFrame, folder: Path) -> Path:
    named = {name: frame[name].to_numpy() for name in frame if name != "episode_id"}
    np.savez(folder / "columns.npz", episode_id=frame["episode_id"].to_numpy().astype("U"), **named)
    return folder / "columns.npz"


Writer = Callable[[pd.DataFrame, Path], Path]
WRITERS = [as_csv, as_tsv, as_parquet, as_vectors, as_npz, as_npy, columns_npz]


def examine(frame: pd.DataFrame, folder: Path, **options: Any) -> Report:
    """What is told of a table that is given as CSV."""
    columns = Columns(**options.pop("columns", {}))
    return find([as_csv(frame, folder)], ID, ImportOptions(columns=columns, **options)).report


def finding(report: Report, kind: str) -> tuple[str, str]:
    """Level and text of the one finding of a kind."""
    (found,) = [found for found in report.findings if found.kind == kind]
    return found.level, found.text


def refused(action: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


class TestRoundTrip:
    @pytest.mark.parametrize("write", WRITERS)
    def test_every_format_gives_back_every_bit(self, write: Writer, tmp_path: Path) -> None:
        frame = table()
        import_files(write(frame, tmp_path), ID, ImportOptions(environment="Pendulum-v1"))
        loaded = load_episodes(ID)
        expected = arrays(frame)
        for name in ("observations", "actions", "rewards"):
            np.testing.assert_array_equal(getattr(loaded, name), expected[name])
        assert loaded.lengths.tolist() == list(LENGTHS)
        assert np.flatnonzero(loaded.terminated).tolist() == [3]
        assert np.flatnonzero(loaded.truncated).tolist() == [6, 11]
        assert loaded.spec.environment["id"] == "Pendulum-v1"
        assert loaded.spec.action_high == (2.0,)

    def test_odd_float32_numbers_survive_text(self, tmp_path: Path) -> None:
        bits = np.random.default_rng(1).integers(0, 2**32, 4000, dtype=np.uint32)
        values = bits.view(np.float32)
        values = values[np.isfinite(values)][:3600].reshape(-1, 3)
        frame = pd.DataFrame(values, columns=["obs_0", "act_0", "reward"])
        import_files(as_csv(frame, tmp_path), ID)
        loaded = load_episodes(ID)
        np.testing.assert_array_equal(np.c_[loaded.observations, loaded.actions, loaded.rewards], values)

    def test_several_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file larger than a block, whose episodes' names are told apart over its blocks."""
        rows = 70_000
        rng = np.random.default_rng(0)
        numbers = rng.normal(size=(rows, 8)).astype(np.float32)
        frame = pd.DataFrame(numbers, columns=[*(f"obs_{i}" for i in range(6)), "act_0", "reward"])
        frame["episode"] = np.arange(rows) // 100
        for write in (as_csv, as_parquet):
            import_files(write(frame, tmp_path), ID, overwrite=True)
            loaded = load_episodes(ID)
            assert len(loaded) == 700
            np.testing.assert_array_equal(loaded.observations, numbers[:, :6])

    def test_an_observation_after_the_last_action(self, tmp_path: Path) -> None:
        """In an .npz as one more row, in a table as a row without an action, or as its next observation."""
        frame, final = table().iloc[:4], np.float32([[7, 8, 9]])
        whole = arrays(frame)
        whole["observations"] = np.concatenate([whole["observations"], final])
        np.savez(tmp_path / "one.npz", **whole)
        row = dict(zip(["obs_0", "obs_1", "obs_2"], final[0], strict=True))
        last = pd.DataFrame([{**row, "episode_id": "a", "step": 4}])
        rows = pd.concat([frame.drop(columns="truncated"), last])
        rows["terminated"] = rows["terminated"].astype("boolean")
        following = frame.assign(**{f"next_obs_{i}": 0.0 for i in range(3)})
        following.loc[3, [f"next_obs_{i}" for i in range(3)]] = final[0]
        for path in (tmp_path / "one.npz", as_csv(rows, tmp_path), as_parquet(following, tmp_path)):
            import_files(path, ID, overwrite=True)
            (episode,) = minari.load_dataset(ID)
            np.testing.assert_array_equal(episode.observations[-1], final[0])
            assert len(episode.rewards) == 4
            assert episode.terminations[-1]

    def test_the_report_is_kept(self, tmp_path: Path) -> None:
        path = as_csv(table(), tmp_path)
        report = import_files(path, ID, ImportOptions(reference_scores=(-10, 5)))
        kept = own_metadata(ID)
        assert kept["report"] == json.loads(json.dumps(report.to_json()))
        assert kept["report"]["files"] == ["log.csv"]
        assert str(tmp_path) not in json.dumps(kept)
        assert [found.kind for found in stored_findings(kept)] == ["environment"]
        spec = load_episodes(ID).spec
        assert (spec.ref_min_score, spec.ref_max_score) == (-10, 5)

    def test_a_set_without_an_environment_is_another(self, tmp_path: Path) -> None:
        """Else a model of the one would be taken for a model of the other, which can be played."""
        path = as_csv(table(), tmp_path)
        import_files(path, ID)
        import_files(path, "mine/played-v0", ImportOptions(environment="Pendulum-v1"))
        import_files(path, "mine/again-v0", ImportOptions(environment="Pendulum-v1"))
        prints = [load_episodes(f"mine/{name}-v0").spec.fingerprint for name in ("log", "played", "again")]
        assert prints[0] != prints[1] == prints[2]


class TestColumns:
    def test_named_by_lists_and_patterns(self, tmp_path: Path) -> None:
        frame = table().rename(columns={"obs_0": "x", "obs_1": "y", "obs_2": "vx", "act_0": "push"})
        frame = frame.rename(columns={"reward": "gain", "episode_id": "flight", "step": "clock"})
        said = {"observations": "y, x,v*", "actions": "push", "reward": "gain", "episode": "flight"}
        report = examine(frame, tmp_path, columns={**said, "time": "clock"})
        assert report.roles["observations"] == ["y", "x", "vx"]
        assert report.guessed == ("terminated", "truncated")
        assert report.lengths == {"min": 3, "mean": 4, "max": 5}

    def test_numbered_columns_stand_by_their_number(self, tmp_path: Path) -> None:
        frame = table()[["reward", "act_0"]].assign(**{f"obs_{i}": float(i) for i in (10, 2, 1)})
        assert examine(frame, tmp_path).roles["observations"] == ["obs_1", "obs_2", "obs_10"]

    def test_done_alone_and_beside_the_others(self, tmp_path: Path) -> None:
        frame = table()
        frame["done"] = frame["terminated"] | frame["truncated"]
        both = ["terminated", "truncated"]
        for left_out, terminated in ((both[:1], 1), (both[1:], 1), (both, 2)):
            report = examine(frame.drop(columns=left_out), tmp_path)
            assert (report.terminated, report.episodes) == (terminated, 3)

    @pytest.mark.parametrize(
        ("columns", "part"),
        [
            ({"observations": "obz_*"}, "no column 'obz_*' (--observations)"),
            ({"reward": "rewart"}, "no column 'rewart' (--reward): did you mean reward?"),
            ({"reward": "obs_*"}, "--reward 'obs_*' means several columns: obs_0, obs_1, obs_2"),
            ({"actions": "act_0,obs_1", "observations": "obs_*"}, "'obs_1' is given twice"),
            ({"reward": "episode_id"}, "row 0: episode_id is 'a', not a number"),
            ({"terminated": "obs_0"}, "row 0: obs_0 is"),
        ],
    )
    def test_columns_that_cannot_be(self, columns: dict[str, str], part: str, tmp_path: Path) -> None:
        refused(lambda: examine(table(), tmp_path, columns=columns), part, "log.csv")

    def test_columns_that_cannot_be_told(self, tmp_path: Path) -> None:
        frame = table()
        refused(lambda: examine(frame.drop(columns="act_0"), tmp_path), "--actions", "it has obs_0, obs_1")
        refused(lambda: examine(frame.drop(columns="reward"), tmp_path), "--reward NAME (or none)")
        report = examine(frame.drop(columns="reward"), tmp_path, columns={"reward": "none"})
        assert report.returns == {"min": 0, "mean": 0, "max": 0}

    def test_tables_that_are_none(self, tmp_path: Path, minari_root: Path) -> None:
        table().to_csv(tmp_path / "bare.csv", index=False, header=False, columns=["obs_0", "act_0", "reward"])
        (tmp_path / "empty.csv").write_text("")
        (tmp_path / "head.csv").write_text("obs_0,act_0,reward\n")
        (tmp_path / "twice.csv").write_text("obs,obs\n1,2\n")
        (tmp_path / "ragged.csv").write_text("obs_0,act_0,reward\n1,2,3\n1,2\n")
        (tmp_path / "text.parquet").write_text("PAR1 no PAR1")
        (tmp_path / "text.npz").write_text("PK no")
        np.savez(
            tmp_path / "objects.npz",
            observations=np.array([{}, 1], object),
            actions=np.zeros(2),
            r=np.zeros(2),
        )
        parts = {
            "bare.csv": "has no header",
            "empty.csv": "has no header",
            "head.csv": "holds no rows",
            "twice.csv": "two columns of the name 'obs'",
            "absent.csv": "no file",
            **dict.fromkeys(("ragged.csv", "text.parquet", "text.npz", "objects.npz"), "cannot be read"),
        }
        for name, part in parts.items():
            path = tmp_path / name
            refused(lambda path=path: import_files(path, ID), str(path), part)  # type: ignore[misc]
        assert not minari_root.exists()


class TestFiles:
    def test_several_make_one_set(self, tmp_path: Path) -> None:
        """A name means another episode in another file, unless the files are one log."""
        for number in (10, 2):
            table(number).to_csv(tmp_path / f"part-{number}.csv", index=False)
        report = import_files(tmp_path, ID)
        assert [Path(file).name for file in report.files] == ["part-2.csv", "part-10.csv"]
        assert report.episodes == 6
        assert (
            "names of episodes that stand in several files: 3, taken as different ones"
            in finding(report, "names")[1]
        )
        expected = np.concatenate([arrays(table(number))["observations"] for number in (2, 10)])
        np.testing.assert_array_equal(load_episodes(ID).observations, expected)
        frame = table()
        frame[:5].to_csv(tmp_path / "part-2.csv", index=False)
        frame[5:].to_csv(tmp_path / "part-10.csv", index=False)
        assert import_files(tmp_path, ID, ImportOptions(joined=True), overwrite=True).episodes == 3
        np.testing.assert_array_equal(load_episodes(ID).observations, arrays(frame)["observations"])

    def test_files_that_do_not_go_together(self, tmp_path: Path) -> None:
        one = as_csv(table(), tmp_path)
        other = as_parquet(table(), tmp_path)
        refused(lambda: import_files([one, other], ID), "one format", ".csv and .parquet")
        refused(lambda: import_files([one, one], ID), "log.csv is given twice")
        narrow = tmp_path / "narrow.csv"
        table().drop(columns="obs_2").to_csv(narrow, index=False)
        refused(lambda: import_files([one, narrow], ID), "narrow.csv has no column 'obs_2'")
        (tmp_path / "nothing").mkdir()
        refused(lambda: import_files(tmp_path / "nothing", ID), "holds none of")

    def test_without_names_time_and_flags_and_files_cut(self, tmp_path: Path) -> None:
        bare = table().drop(columns=["episode_id", "terminated", "truncated"])
        assert examine(bare, tmp_path).lengths == {"min": 3, "mean": 4, "max": 5}
        assert examine(bare.drop(columns="step"), tmp_path).episodes == 1
        flags = table().drop(columns=["episode_id", "step"])
        assert examine(flags, tmp_path).lengths == {"min": 3, "mean": 4, "max": 5}

    def test_rows_out_of_order(self, tmp_path: Path) -> None:
        frame = table()
        report = import_files(as_csv(frame.sample(frac=1, random_state=0), tmp_path), ID)
        assert finding(report, "order")[0] == "note"
        returns = frame.groupby("episode_id")["reward"].sum()
        np.testing.assert_allclose(np.sort(load_episodes(ID).returns), np.sort(returns), rtol=1e-5)


class TestReport:
    def test_a_clean_log(self, tmp_path: Path) -> None:
        report = examine(table(), tmp_path, environment="Pendulum-v1")
        assert (report.rows, report.steps, report.episodes, report.terminated, report.truncated) == (
            12,
            12,
            3,
            1,
            2,
        )
        assert report.findings == ()
        assert [column.name for column in report.columns] == ["obs_0", "obs_1", "obs_2", "act_0", "reward"]
        assert report.columns[3].minimum == pytest.approx(table()["act_0"].min())

    def test_missing_and_infinite_numbers(self, tmp_path: Path) -> None:
        frame = table()
        frame.loc[5, "obs_1"], frame.loc[9, "reward"] = np.nan, np.inf
        level, text = finding(examine(frame, tmp_path), "missing")
        assert level == "error"
        assert "log.csv, row 5: obs_1 is missing" in text
        assert "(2 episodes have such)" in text
        report = import_files(as_csv(frame, tmp_path), ID, ImportOptions(drop_incomplete=True))
        assert "episodes left out: 2" in finding(report, "left-out")[1]
        np.testing.assert_array_equal(load_episodes(ID).observations, arrays(table())["observations"][:4])
        frame["obs_1"] = np.nan
        refused(
            lambda: import_files(
                as_csv(frame, tmp_path), "mine/other-v0", ImportOptions(drop_incomplete=True)
            ),
            "no episode is left",
        )

    def test_gaps_and_repeated_times(self, tmp_path: Path) -> None:
        frame = table()
        report = examine(frame.drop(index=[8, 9]), tmp_path)
        level, text = finding(report, "gaps")
        assert level == "warning"
        assert "gaps in step: 1, missing steps of 1: 2, episodes that have some: 1" in text
        assert "log.csv, row 8" in text
        frame.loc[9, "step"] = 1
        level, text = finding(examine(frame, tmp_path), "repeated-time")
        assert level == "error"
        assert "log.csv, row 9: step 1 stands twice" in text

    def test_rows_and_episodes_that_stand_twice(self, tmp_path: Path) -> None:
        frame = table()
        again = pd.concat([frame, frame.iloc[[2]]])
        report = import_files(as_csv(again, tmp_path), ID)
        assert "rows left out that repeat another, time and all: 1" in finding(report, "duplicate-rows")[1]
        np.testing.assert_array_equal(load_episodes(ID).observations, arrays(frame)["observations"])
        untimed = examine(again.drop(columns="step"), tmp_path)
        assert "rows that equal an earlier one of their episode: 1" in finding(untimed, "duplicate-rows")[1]
        assert untimed.steps == 13
        twice = pd.concat([frame, frame.iloc[4:7].assign(episode_id="d")])
        level, text = finding(examine(twice, tmp_path), "duplicate-episodes")
        assert (level, "episodes that equal an earlier one: 1" in text) == ("warning", True)
        assert "log.csv, row 12" in text

    def test_constant_and_unused_columns(self, tmp_path: Path) -> None:
        report = examine(table().assign(obs_1=0.5, battery=1.0), tmp_path)
        assert finding(report, "constant") == ("warning", "obs_1 is 0.5 in every row")
        assert finding(report, "unused") == ("note", "not used: battery")

    def test_the_environment_does_not_fit(self, tmp_path: Path) -> None:
        report = examine(table().assign(act_0=[2.5, *[0.1] * 11]), tmp_path, environment="Pendulum-v1")
        level, text = finding(report, "bounds")
        assert level == "warning"
        assert "act_0 lies outside Pendulum-v1's bounds [-2, 2] in 1 rows" in text
        path = as_csv(table().drop(columns="obs_2"), tmp_path)
        refused(
            lambda: import_files(path, ID, ImportOptions(environment="Pendulum-v1")),
            f"{path}: observations have 2 dimensions, but Pendulum-v1 has 3",
        )

    def test_rows_after_the_end(self, tmp_path: Path) -> None:
        frame = table()
        frame.loc[1, "terminated"] = True
        level, text = finding(examine(frame, tmp_path), "after-end")
        assert level == "error"
        assert "log.csv, row 2: the row before has ended the episode" in text

    def test_nothing_says_how_episodes_ended(self, tmp_path: Path) -> None:
        report = examine(table().drop(columns=["terminated", "truncated"]), tmp_path)
        assert finding(report, "endings")[0] == "warning"
        assert (report.terminated, report.truncated) == (0, 3)

    def test_reference_scores(self, tmp_path: Path) -> None:
        path = as_csv(table(), tmp_path)
        for said in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)):
            options = ImportOptions(reference_scores=said)
            refused(lambda options=options: import_files(path, ID, options), "--reference-scores")  # type: ignore[misc]
