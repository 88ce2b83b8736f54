"""KuaiRand: features and labels as in the files, days as in the log, and sequences that never see too much."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from rayfm.config import ConfigError, DataError, read_yaml, validate
from rayfm.data.prepare import prepare
from rayfm.data.sources.history import Clock, Events
from rayfm.data.sources.kuairand import KuaiRandConfig, KuaiRandSource
from rayfm.data.sources.kuairand_examples import SEQUENCES, TASKS, USER_COLUMNS, VIDEO_COLUMNS, build_buckets
from rayfm.data.store import ExampleStore
from rayfm.data.validate import split_rejects
from rayfm.schema import KINDS, Schema

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCHEMA = validate(Schema, read_yaml(EXAMPLES / "kuairand_schema.yaml"))
LOG = "log_standard_4_25_to_5_08_pure.parquet"
FIRST_DAY_MS = 1_650_815_520_000
"""23:52 of 24 April, UTC+8."""
DAY_MS = 86_400_000


def synthetic_log(rows: int, seed: int, days: int = 3) -> pd.DataFrame:
    """Few users and coarse times, so that ties and short gaps abound."""
    rng = np.random.default_rng(seed)
    since = np.sort(rng.integers(0, days * 1440, rows)) * 60_000
    day = since // DAY_MS
    flags = {column: (rng.random(rows) < 0.5).astype(int) for column in TASKS.values() if column != "play_time_ms"}
    return pd.DataFrame(
        {
            "user_id": rng.integers(0, 12, rows),
            "video_id": rng.integers(0, 30, rows),
            "date": 20220425 + day,
            "hourmin": since % DAY_MS // 3_600_000 * 100,
            "time_ms": FIRST_DAY_MS + since,
            **flags,
            "play_time_ms": rng.integers(0, 90_000, rows),
            "tab": rng.integers(0, 15, rows),
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small KuaiRand: 11 of 12 users and 29 of 30 videos have features, 8 users have a history."""
    rng = np.random.default_rng(5)
    synthetic_log(400, 0).to_parquet(tmp_path / LOG)
    users = {"user_id": np.arange(11)[::-1], **{name: rng.integers(0, 3, 11) for name in USER_COLUMNS}}
    users["user_active_degree"] = np.array(["full_active", "UNKNOWN", ""])[users["user_active_degree"]]
    for name in ("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range"):
        users[name] = np.array(["0", "(0,10]", "500+"])[users[name]]
    users["is_live_streamer"] = np.where(users["is_live_streamer"] > 1, 1, -124)
    users["onehot_feat4"] = np.where(np.arange(11) == 2, np.nan, users["onehot_feat4"].astype(float))
    pd.DataFrame(users).to_csv(tmp_path / "user_features_pure.csv", index=False)
    videos = {"video_id": np.arange(29), **{name: rng.integers(0, 3, 29) for name in VIDEO_COLUMNS}}
    videos["tag"] = np.array(["39", "20,43", ""])[videos["tag"]]
    videos["video_type"], videos["upload_type"] = np.array(["NORMAL"] * 29), np.array(["Web"] * 29)
    videos["upload_dt"] = np.array(["2022-04-10"] * 29)
    videos["video_duration"] = np.where(np.arange(29) < 3, np.nan, 1000.0 * np.arange(29))
    pd.DataFrame(videos).to_csv(tmp_path / "video_features_basic_pure.csv", index=False)
    history = pd.DataFrame(
        {
            "user_id": np.arange(8),
            "last_time_ms": FIRST_DAY_MS - rng.integers(-5, 60, 8) * 60_000,
            **{name: [rng.integers(100, 200, rng.integers(0, 6)) for _ in range(8)] for _, name in SEQUENCES.values()},
        }
    )
    history.to_parquet(tmp_path / "user_history_before_4_25.parquet")
    return tmp_path


def source(folder: Path, schema: Schema = SCHEMA, **more: object) -> KuaiRandSource:
    return KuaiRandSource(KuaiRandConfig.model_validate({"path": str(folder), **more}), schema)


def read(own: KuaiRandSource, buckets: int = 1) -> pa.Table:
    """What the source's tasks give, without Ray, by example id."""
    builder = own.builder(own.periods(), buckets)
    tables = [table for bucket in range(buckets) for table in build_buckets(pa.table({"id": [bucket]}), builder)]
    return pa.concat_tables(tables).sort_by("example_id")


def expected_sequence(
    log: pd.DataFrame, history: pd.DataFrame | None, row: int, name: str, delay_ms: int, max_len: int
) -> list[int]:
    """The definition itself, one row at a time."""
    flag, column = SEQUENCES[name]
    own = log.loc[row]
    before = own.time_ms - delay_ms
    events = []
    if history is not None:
        past = history[(history.user_id == own.user_id) & (history.last_time_ms < before)]
        events = [(time, video) for time, seq in zip(past.last_time_ms, past[column], strict=True) for video in seq]
    rows = log[(log.user_id == own.user_id) & (log[flag] == 1) & (log.time_ms < before)]
    events += list(zip(rows.time_ms, rows.video_id, strict=True))
    return [int(video) for _, video in sorted(events, key=lambda event: event[0])][-max_len:]


@pytest.mark.parametrize("delay", [0.0, 60.0, 5400.0])
@pytest.mark.parametrize("buckets", [1, 3])
def test_sequences_are_the_events_strictly_before_the_delay(folder, delay, buckets):
    table = read(source(folder, feedback_delay=delay), buckets)
    log, history = pd.read_parquet(folder / LOG), pd.read_parquet(folder / "user_history_before_4_25.parquet")
    assert table["example_id"].to_pylist() == list(range(400))
    for name in SEQUENCES:
        found = table[name].to_pylist()
        max_len = SCHEMA.feature(name).max_len
        for row in range(400):
            want = expected_sequence(log, history, row, name, round(delay * 1000), max_len)
            assert found[row] == want, (name, row)
    assert max(len(videos) for videos in table["watched"].to_pylist()) > 10


def test_sequences_keep_the_newest(folder):
    features = [f.dump() | ({"max_len": 3} if f.name == "watched" else {}) for f in SCHEMA.features]
    short = read(source(folder, Schema.model_validate(SCHEMA.dump() | {"features": features})))
    whole = read(source(folder))
    assert short["watched"].to_pylist() == [videos[-3:] for videos in whole["watched"].to_pylist()]


def test_no_row_sees_itself_a_tie_or_a_later_event():
    users = np.zeros(6, np.int64)
    times = np.array([100, 200, 200, 200, 300, 301])
    clock = Clock.of(users, times)
    events = Events.of(clock, users, times, np.arange(6))
    first, last = events.before(users, times, 0, 50)
    videos, offsets = events.gather(first, last)
    lists = [videos[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert lists == [[], [0], [0], [0], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    first, last = events.before(users, times, 100, 50)
    assert (last - first).tolist() == [0, 0, 0, 0, 1, 4]


def test_a_later_log_changes_no_earlier_sequence(folder):
    """Appending rows after a moment leaves every sequence up to it as it was."""
    before = read(source(folder))
    log = pd.read_parquet(folder / LOG)
    later = synthetic_log(50, 9, days=1).assign(time_ms=log.time_ms.max(), date=log.date.max())
    pd.concat([log, later]).to_parquet(folder / LOG)
    after = read(source(folder)).slice(0, 400)
    for name in SEQUENCES:
        assert after[name].to_pylist() == before[name].to_pylist()


def test_features_and_labels_are_the_files(folder):
    table = read(source(folder)).to_pandas()
    log = pd.read_parquet(folder / LOG)
    users = pd.read_csv(folder / "user_features_pure.csv", keep_default_na=False, na_values=[""])
    videos = pd.read_csv(folder / "video_features_basic_pure.csv", dtype={"tag": str})
    joined = log.merge(users, on="user_id", how="left").merge(videos, on="video_id", how="left")
    for name in ("user_active_degree", "follow_user_num_range", "video_type", "upload_dt"):
        assert table[name].where(table[name].notna(), None).tolist() == (
            joined[name].where(joined[name].notna(), None).tolist()
        )
    for name in ("is_live_streamer", "onehot_feat4", "onehot_feat17", "author_id", "music_type", "fans_user_num"):
        np.testing.assert_array_equal(table[name].to_numpy(float), joined[name].to_numpy(float), err_msg=name)
    np.testing.assert_array_equal(table["video_duration"].to_numpy(float), joined["video_duration"].to_numpy(float))
    tags = [[] if tag is None else list(tag) for tag in table["tag"]]
    assert tags == [[int(tag) for tag in text.split(",")] if isinstance(text, str) else [] for text in joined["tag"]]
    assert [20, 43] in tags
    np.testing.assert_array_equal(table["hour"], log["hourmin"] // 100)
    np.testing.assert_array_equal(table["traffic"], log["tab"].astype(str))
    np.testing.assert_array_equal(table["time"], log["time_ms"] * 1000)
    for task, column in TASKS.items():
        if task in table:
            scale = 1000.0 if task == "watch_time" else 1.0
            np.testing.assert_allclose(table[task], log[column] / scale, rtol=1e-6)
    assert table["user_active_degree"].isna().any()
    assert table["onehot_feat4"].isna().any()


def test_every_row_is_good_and_the_types_fit(folder):
    own = source(folder)
    good, rejects = split_rejects(read(own), SCHEMA, own.periods())
    assert rejects.num_rows == 0
    assert good.num_rows == 400


def test_csv_and_parquet_say_the_same(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("csv")
    for path in folder.iterdir():
        if path.name != LOG:
            (other / path.name).write_bytes(path.read_bytes())
    pcsv.write_csv(pq.read_table(folder / LOG), other / LOG.replace(".parquet", ".csv"))
    assert read(source(other)).equals(read(source(folder)))


def test_the_official_pair_of_logs(folder):
    early = synthetic_log(100, 3, days=2)
    early = early.assign(time_ms=early.time_ms - 7 * DAY_MS, date=early.date - 7)
    pcsv.write_csv(pa.Table.from_pandas(early), folder / "log_standard_4_08_to_4_21_pure.csv")
    log = pd.read_parquet(folder / LOG)
    pcsv.write_csv(pa.Table.from_pandas(log), folder / "log_standard_4_22_to_5_08_pure.csv")
    own = source(folder, start="2022-04-25", feedback_delay=0)
    table = read(own)
    assert table["example_id"].to_pylist() == [2**40 + row for row in range(400)], "the tail file would be a copy"
    assert [period.name for period in own.periods()] == ["2022-04-25", "2022-04-26", "2022-04-27"]
    assert own.periods()[0].start_us == FIRST_DAY_MS * 1000, "earlier rows are left out, as start says"
    both = pd.concat([early, log], ignore_index=True)
    found = table["watched"].to_pylist()
    for row in range(0, 400, 7):
        want = expected_sequence(both, None, row + 100, "watched", 0, 50)
        assert found[row] == want, "earlier rows of the log take the history file's place"


def test_random_exposures_are_asked_for(folder):
    with pytest.raises(DataError, match=r"log_random_4_22_to_5_08_pure\.csv"):
        source(folder, random_exposures=True).periods()
    synthetic_log(20, 4).to_parquet(folder / "log_random_4_22_to_5_08_pure.parquet")
    assert read(source(folder)).num_rows == 400
    assert read(source(folder, random_exposures=True)).num_rows == 420


def test_bad_times_are_rejected_and_kill_nothing(folder):
    log = pd.read_parquet(folder / LOG).astype({"time_ms": "Int64"})
    log.loc[3, "time_ms"], log.loc[4, "time_ms"], log.loc[5, "time_ms"] = None, -1, 9_000_000_000_000_000
    log.to_parquet(folder / LOG)
    own = source(folder)
    assert len(own.periods()) == 3
    good, rejects = split_rejects(read(own), SCHEMA, own.periods())
    assert good.num_rows == 397
    assert sorted(rejects["reason"].to_pylist()) == ["negative time", "null time", "time outside every period"]


def test_missing_users_and_videos_are_missing_features(folder):
    log = pd.read_parquet(folder / LOG).astype({"user_id": "Int64", "video_id": "Int64"})
    log.loc[3, "user_id"], log.loc[4, "video_id"] = None, None
    log.to_parquet(folder / LOG)
    table = read(source(folder))
    assert table["user_id"][3].as_py() is None
    assert table["watched"][3].as_py() == []
    assert table["author_id"][4].as_py() is None
    assert split_rejects(table, SCHEMA, source(folder).periods())[1].num_rows == 0


def test_dates_that_are_not_the_times_are_refused(folder):
    log = pd.read_parquet(folder / LOG)
    log.assign(time_ms=log.time_ms + 10 * DAY_MS).to_parquet(folder / LOG)
    with pytest.raises(DataError, match=r"400 of 400 rows have a time_ms that is not on their date; expected date as"):
        source(folder).periods()


def test_errors_name_files_and_columns(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"none of log_standard_4_08_to_4_21_pure, .* is here as \.csv or \.parquet"):
        source(tmp_path / "empty").periods()
    with pytest.raises(DataError, match="no such folder"):
        source(tmp_path / "nowhere").periods()
    log = pd.read_parquet(folder / LOG)
    log.rename(columns={"is_like": "is_liked"}).to_parquet(folder / LOG)
    with pytest.raises(DataError, match=rf"{LOG}: column 'is_like' is missing; did you mean 'is_liked'"):
        read(source(folder))
    log.assign(tab="one").to_parquet(folder / LOG)
    with pytest.raises(DataError, match=rf"{LOG}: column 'tab' is .*string, KuaiRand has int64"):
        read(source(folder))
    log.to_parquet(folder / LOG)
    users = folder / "user_features_pure.csv"
    text = users.read_text()
    users.write_text(text.replace("full_active,0", "full_active,zero", 1).replace("UNKNOWN,0", "UNKNOWN,zero", 1))
    with pytest.raises(DataError, match=r"user_features_pure.csv: cannot be read \(.*zero"):
        read(source(folder))
    users.unlink()
    with pytest.raises(DataError, match=r"user_features_pure.csv \(or .parquet\) is missing"):
        read(source(folder))
    (folder / LOG).write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=rf"{LOG}: corrupt or unreadable"):
        source(folder).periods()


def test_start_after_the_log(folder):
    with pytest.raises(DataError, match="the log has 2022-04-25 to 2022-04-27, none of it between start and end"):
        source(folder, start="2023-01-01").periods()


def test_unknown_features_and_tasks_are_refused():
    features = [*SCHEMA.dump()["features"], {"name": "watchd", "kind": "sequence", "table": "video"}]
    with pytest.raises(ConfigError, match="kuairand has no feature 'watchd'; did you mean 'watched'"):
        source(Path("x"), Schema.model_validate(SCHEMA.dump() | {"features": features}))
    with pytest.raises(ConfigError, match="kuairand has no task 'clicks'; did you mean 'click'"):
        source(Path("x"), Schema.model_validate(SCHEMA.dump() | {"tasks": [{"name": "clicks"}]}))


def test_text_for_numbers_is_refused(folder):
    features = [f.dump() | ({"id_type": "int64"} if f.name == "video_type" else {}) for f in SCHEMA.features]
    with pytest.raises(DataError, match="'video_type' is text; write `id_type: string`"):
        read(source(folder, Schema.model_validate(SCHEMA.dump() | {"features": features})))


def test_the_example_schema_has_the_baselines_features():
    categorical = [f for f in SCHEMA.features if f.kind in ("sparse", "multi")]
    assert len(categorical) == 38
    assert [task.name for task in SCHEMA.tasks] == ["click", "long_view", "like", "follow", "watch_time"]
    assert SCHEMA.traffics == tuple(str(tab) for tab in range(15))


@pytest.mark.ray
def test_the_real_log(kuairand, tmp_path, ray_session):
    """All rows arrive, on their days, with labels, features and sequences that a plain recomputation gives."""
    store = ExampleStore(tmp_path)
    manifests = prepare(source(kuairand), SCHEMA, store)
    assert [manifest.period for manifest in manifests] == [
        *(f"2022-04-{day}" for day in range(25, 31)),
        *(f"2022-05-0{day}" for day in range(1, 9)),
    ]
    assert sum(manifest.rows("impression") for manifest in manifests) == 228_329
    assert not any(manifest.rejected for manifest in manifests)
    names = ["example_id", "time", "click", "watch_time", *SEQUENCES]
    table = pa.concat_tables(
        pq.read_table(path, columns=names).append_column("period", pa.repeat(manifest.period, file.rows))
        for manifest in manifests
        for kind in KINDS
        for file, path in store.files(manifest.period, kind)
    ).sort_by("example_id")
    log = pd.read_parquet(kuairand / LOG)
    history = pd.read_parquet(kuairand / "user_history_before_4_25.parquet")
    np.testing.assert_array_equal(table["example_id"].to_numpy(), np.arange(len(log)))
    np.testing.assert_array_equal(table["time"].to_numpy(), log["time_ms"] * 1000)
    np.testing.assert_array_equal(table["click"].to_numpy(), log["is_click"])
    np.testing.assert_allclose(table["watch_time"].to_numpy(), log["play_time_ms"] / 1000, rtol=1e-6)
    dated = pd.to_datetime(log["date"].astype(str)).dt.strftime("%Y-%m-%d")
    assert (dated.to_numpy() != np.array(table["period"].to_pylist())).mean() < 0.01
    busiest = log["user_id"].value_counts().index[:3].tolist()
    rows = [
        *np.random.default_rng(0).choice(len(log), 40, replace=False),
        *log.index[log["user_id"].isin(busiest)][:40],
    ]
    for name in SEQUENCES:
        found = table[name].to_pylist()
        for row in rows:
            want = expected_sequence(log, history, row, name, 60_000, SCHEMA.feature(name).max_len)
            assert found[row] == want, (name, row)
