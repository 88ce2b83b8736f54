"""KuaiVideo_x1: its files as published, sequences that see nothing too early, visual features that stay on disk."""

from __future__ import annotations

import builtins
import gzip
import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucketed import examples_of

from rayfm.config import ConfigError, DataError, read_yaml, validate
from rayfm.data.prepare import prepare
from rayfm.data.sources import buckets as buckets_module
from rayfm.data.sources import tables as tables_module
from rayfm.data.sources.kuaivideo import KuaiVideoConfig, KuaiVideoSource
from rayfm.data.sources.vectors import Vectors
from rayfm.data.store import ExampleStore
from rayfm.data.validate import split_rejects
from rayfm.schema import Schema

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
T0 = 761_105_059_450
"""Milliseconds of the shifted clock: 2:04 of 13 February 1994."""
DAY = 86_400_000
HEADER = "timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items\n"
TRAIN = f"""{HEADER}{T0},0,10,1,0,0,,
{T0 + 1000},0,11,0,0,0,10,
{T0 + 1000},1,11,1,1,0,,
{T0 + 61_000},0,12,1,1,1,10,11
{T0 + 61_001},0,13,0,0,0,10,11
{T0 + DAY},1,2,0,0,0,11,
"""
TEST = f"""{HEADER}{T0 + 30_000},0,3,1,0,0,10,11
{T0 + 3 * DAY},0,11,0,0,0,10^12^3,11^13
"""


def schema_of(**more: object) -> Schema:
    return validate(
        Schema,
        {
            "tables": {"user": {"rows": 100}, "item": {"rows": 100}},
            "features": [
                {"name": "user_id", "kind": "sparse", "table": "user"},
                {"name": "item_id", "kind": "sparse", "table": "item"},
                *({"name": name, "kind": "sequence", "table": "item"} for name in ("pos_items", "neg_items")),
                *({"name": name, "kind": "sequence", "table": "item", "max_len": 100} for name in ("clicked", "liked")),
                *({"name": name, "kind": "sequence", "table": "item", "max_len": 1} for name in ("not_clicked",)),
            ],
            "tasks": [{"name": "click"}, {"name": "like"}, {"name": "follow"}],
            **more,
        },
    )


VISUAL = [
    {"name": "item_id", "kind": "sparse", "table": "item"},
    {"name": "item_visual_0", "kind": "dense"},
    {"name": "item_visual_63", "kind": "dense"},
    {"name": "user_visual_5", "kind": "dense"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.csv").write_text(TRAIN)
    (tmp_path / "test.csv").write_text(TEST)
    np.save(tmp_path / "item_visual_emb_dim64.npy", np.arange(13 * 64, dtype=np.float32).reshape(13, 64))
    np.save(tmp_path / "user_visual_emb_dim64.npy", -np.arange(2 * 64, dtype=np.float64).reshape(2, 64))
    return tmp_path


def source(folder: Path, schema: Schema | None = None, **more: object) -> KuaiVideoSource:
    return KuaiVideoSource(KuaiVideoConfig.model_validate({"path": str(folder), **more}), schema or schema_of())


def test_rows_are_the_files(folder):
    table = examples_of(source(folder)).to_pydict()
    assert table["example_id"] == [0, 1, 2, 3, 4, 5, 1 << 40, (1 << 40) + 1], "train is file 0, test file 1"
    after = [0, 1000, 1000, 61_000, 61_001, DAY, 30_000, 3 * DAY]
    assert table["time"] == [1000 * (T0 + milliseconds) for milliseconds in after]
    assert table["user_id"] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert table["item_id"] == [10, 11, 11, 12, 13, 2, 3, 11]
    assert table["click"] == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert table["like"] == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert table["follow"] == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert table["pos_items"] == [[], [10], [], [10], [10], [11], [10], [10, 12, 3]]
    assert table["neg_items"] == [[], [], [], [11], [11], [], [11], [11, 13]]


def test_sequences_are_strictly_before_the_delay(folder):
    table = examples_of(source(folder)).to_pydict()
    # Row 3 (T0 + 61 s): T0 is known by then, T0 + 1 s is the bound itself; the test file's row of T0 + 30 s is later.
    assert table["clicked"] == [[], [], [], [10], [10], [11], [], [10, 3, 12]]
    assert table["not_clicked"] == [[], [], [], [], [11], [], [], [13]], "the newest one"
    assert table["liked"] == [[], [], [], [], [], [11], [], [12]]
    now = examples_of(source(folder, feedback_delay=0)).to_pydict()
    assert now["clicked"] == [[], [10], [], [10, 3], [10, 3, 12], [11], [10], [10, 3, 12]]
    assert now["not_clicked"][6] == [11]


@pytest.mark.parametrize("delay", [0, 60])
def test_sequences_against_their_definition(tmp_path, delay):
    rng = np.random.default_rng(0)
    rows = 300
    log = pd.DataFrame(
        {
            "timestamp": np.sort(T0 + 30_000 * rng.integers(0, 200, rows)),
            "user_id": rng.integers(0, 5, rows),
            "item_id": rng.integers(0, 40, rows),
            "is_click": rng.integers(0, 2, rows),
            "is_like": 0,
            "is_follow": 0,
            "pos_items": "",
            "neg_items": "",
        }
    )
    log[:200].to_csv(tmp_path / "train.csv", index=False)
    log[200:].to_csv(tmp_path / "test.csv", index=False)
    table = examples_of(source(tmp_path, feedback_delay=delay), 2)["clicked"].to_pylist()
    for row in log.itertuples():
        past = log[(log.user_id == row.user_id) & (log.timestamp < row.timestamp - 1000 * delay) & (log.is_click == 1)]
        assert table[row.Index] == past.item_id.tolist()[-100:]


def test_periods_are_days_from_the_first_row_on(folder):
    periods = source(folder).periods()
    assert [period.name for period in periods] == ["1994-02-13", "1994-02-14", "1994-02-16"]
    assert periods[0].start.isoformat() == "1994-02-13T02:00:00+00:00"
    assert (periods[0].end - periods[0].start).total_seconds() == 86_400
    (folder / "train.csv").write_text(f"{HEADER}1,0,1,1,0,0,,\n{2 * DAY},0,1,1,0,0,,\n")
    (folder / "test.csv").write_text(f"{HEADER}2,0,1,1,0,0,,\n")
    with pytest.raises(DataError, match="span 2001 days in the unit 's'; set the source's time_unit"):
        source(folder, time_unit="s").periods()


def test_seconds(folder):
    for name, text in (("train", TRAIN), ("test", TEST)):
        frame = pd.read_csv(pd.io.common.StringIO(text), dtype=str)
        frame["timestamp"] = (frame["timestamp"].astype(int) // 1000).astype(str)
        frame.to_csv(folder / f"{name}.csv", index=False)
    table = examples_of(source(folder, time_unit="s"))
    assert table["time"][0].as_py() == T0 // 1000 * 1_000_000
    assert source(folder, time_unit="s").periods()[0].name == "1994-02-13"


def test_visual_features(folder):
    table = examples_of(source(folder, schema_of(features=VISUAL))).to_pydict()
    first = [64.0 * item if item < 13 else None for item in (10, 11, 11, 12, 13, 2, 3, 11)]
    assert table["item_visual_0"] == first, "an item beyond the file has none"
    assert table["item_visual_63"] == [None if value is None else value + 63 for value in first]
    assert table["user_visual_5"] == [-5.0 - 64 * user for user in (0, 0, 1, 0, 0, 1, 0, 0)]


def test_visual_features_in_hdf5(folder, tmp_path):
    h5py = pytest.importorskip("h5py")
    whole = examples_of(source(folder, schema_of(features=VISUAL)))
    for key in ("item", "user"):
        values = np.load(folder / f"{key}_visual_emb_dim64.npy")
        with h5py.File(folder / f"{key}_visual_emb_dim64.h5", "w") as file:
            file.create_dataset("key", data=list(range(len(values))))
            file.create_dataset("value", data=values)
        (folder / f"{key}_visual_emb_dim64.npy").unlink()
    assert examples_of(source(folder, schema_of(features=VISUAL))).equals(whole)
    path = tmp_path / "odd.h5"
    for written, message in [
        ({"value": values}, "the data sets 'key' and 'value' are wanted"),
        ({"key": [1, 0], "value": values}, "the keys do not count 0, 1"),
        ({"key": [0], "value": values}, "do not fit together"),
    ]:
        with h5py.File(path, "w") as file:
            for name, data in written.items():
                file.create_dataset(name, data=data)
        with pytest.raises(DataError, match=message):
            Vectors.open(path, tmp_path)


def test_hdf5_without_its_library_says_what_to_do(folder, monkeypatch):
    (folder / "item_visual_emb_dim64.npy").rename(folder / "item_visual_emb_dim64.h5")

    def no_h5py(name: str, *more: object) -> object:
        if name == "h5py":
            raise ImportError(name)
        return builtins.__import__(name)

    monkeypatch.setattr(importlib, "import_module", no_h5py)
    with pytest.raises(
        DataError, match=r"item_visual_emb_dim64\.h5: h5py is needed to read it; `pip install h5py`, or"
    ):
        Vectors.open(folder / "item_visual_emb_dim64.h5", folder)


def test_bad_vectors(folder):
    path = folder / "item_visual_emb_dim64.npy"
    np.save(path, np.zeros((5, 32), np.float32))
    with pytest.raises(DataError, match=r"item_visual_emb_dim64\.npy: vectors of 32 dimensions, 64 are wanted"):
        examples_of(source(folder, schema_of(features=VISUAL)))
    np.save(path, np.zeros(5, np.int64))
    with pytest.raises(DataError, match=r"int64 \[5\], floating-point \[ids, dimensions\] is wanted"):
        examples_of(source(folder, schema_of(features=VISUAL)))
    path.write_bytes(b"no array")
    with pytest.raises(DataError, match=r"item_visual_emb_dim64\.npy: cannot be read"):
        examples_of(source(folder, schema_of(features=VISUAL)))
    path.unlink()
    with pytest.raises(DataError, match=r"item_visual_emb_dim64\.h5 \(or \.npy\) is missing; download"):
        source(folder, schema_of(features=VISUAL)).parts()


@pytest.mark.parametrize("buckets", [1, 3])
def test_any_cut_of_the_files_gives_the_same_examples(folder, buckets, monkeypatch):
    whole = examples_of(source(folder))
    monkeypatch.setattr(tables_module, "PART_BYTES", 40)
    monkeypatch.setattr(buckets_module, "RUN_BYTES", 1)
    own = source(folder)
    assert len(own.parts()) > 8
    assert examples_of(own, buckets).equals(whole)


def test_gzip_and_parquet_say_the_same(folder, tmp_path_factory):
    whole = examples_of(source(folder))
    other = tmp_path_factory.mktemp("other")
    frame = pd.read_csv(folder / "train.csv", dtype={"pos_items": str, "neg_items": str})
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), other / "train.parquet", row_group_size=2)
    frame = pd.read_csv(folder / "test.csv", dtype={"pos_items": str, "neg_items": str})
    for name in ("pos_items", "neg_items"):
        frame[name] = [[int(item) for item in text.split("^")] for text in frame[name]]
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), other / "test.parquet")
    assert examples_of(source(other), 2).equals(whole), "lists as text and as lists"
    for path in folder.glob("*.csv"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert examples_of(source(folder)).equals(whole)


def test_bad_rows_are_rejected_and_missing_ids_kill_nothing(folder):
    bad = f",0,1,1,0,0,,\n-4,0,1,1,0,0,,\n{T0},,1,1,0,0,,\n{T0},0,,1,0,0,,\n{T0},0,1,7,0,0,,\n{T0},0,1,,0,0,,\n"
    (folder / "train.csv").write_text(TRAIN + bad)
    own = source(folder)
    good, rejects = split_rejects(examples_of(own), own.schema, own.periods())
    assert rejects.sort_by("example_id")["reason"].to_pylist() == [
        "null time",
        "negative time",
        "label 'click' is not 0 or 1",
    ]
    rows = {row["example_id"]: row for row in good.to_pylist()}
    assert rows[8]["user_id"] is None
    assert rows[8]["clicked"] == []
    assert rows[9]["item_id"] is None
    assert rows[11]["click"] is None
    assert rows[4]["clicked"] == [10], "an event without an item is none"


def test_errors_name_files_and_columns(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder; download and unpack KuaiVideo_x1"):
        source(tmp_path / "nowhere").periods()
    (folder / "train.csv").write_text(TRAIN.replace("item_id", "photo_id"))
    with pytest.raises(DataError, match=r"train\.csv: column 'item_id' is missing"):
        source(folder).periods()
    (folder / "train.csv").write_text(TRAIN.replace("10^", "ten^").replace(",10,11\n", ",ten,11\n"))
    with pytest.raises(DataError, match=r"train\.csv: column 'pos_items' is string, list<.*int64> is wanted \(.*ten"):
        examples_of(source(folder))
    for name in ("train", "test"):
        (folder / f"{name}.csv").write_text(HEADER)
    with pytest.raises(DataError, match="no row of train and test has a timestamp"):
        source(folder).periods()
    (folder / "test.csv").unlink()
    with pytest.raises(DataError, match=r"test\.csv \(or \.csv\.gz, \.parquet\) is missing"):
        source(folder).periods()
    with pytest.raises(ConfigError, match="kuaivideo has no feature 'hour'"):
        source(folder, schema_of(features=[{"name": "hour", "kind": "sparse", "table": "item"}]))
    with pytest.raises(ConfigError, match="has no task 'long_view'"):
        source(folder, schema_of(tasks=[{"name": "long_view"}]))


def test_the_example_schema_fits(folder):
    schema = validate(Schema, read_yaml(EXAMPLES / "kuaivideo_schema.yaml"))
    own = source(folder, schema)
    good, rejects = split_rejects(examples_of(own), schema, own.periods())
    assert (good.num_rows, rejects.num_rows) == (8, 0)
    assert sum(feature.name.startswith("item_visual_") for feature in schema.features) == 64


@pytest.mark.ray
def test_prepare_on_ray(folder, tmp_path, ray_session):
    store = ExampleStore(tmp_path / "store")
    own = source(folder, schema_of(features=VISUAL))
    own.buckets = lambda: 2
    manifests = prepare(own, own.schema, store, lanes=2)
    assert [(manifest.period, manifest.rows("impression")) for manifest in manifests] == [
        ("1994-02-13", 6),
        ("1994-02-14", 1),
        ("1994-02-16", 1),
    ]
