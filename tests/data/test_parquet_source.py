"""Plain Parquet logs: the mapping, times, periods and what is said about bad files."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayfm.config import ConfigError, DataError, validate
from rayfm.data.config import DataConfig
from rayfm.data.sources.base import SOURCES
from rayfm.data.sources.files import list_files
from rayfm.data.sources.parquet import ParquetConfig, ParquetSource, read_units
from rayfm.data.sources.times import TimeColumn, to_microseconds
from rayfm.data.validate import split_rejects
from rayfm.schema import Schema

SCHEMA = Schema.model_validate(
    {
        "tables": {"user": {"rows": 10}, "ad": {"rows": 10}},
        "features": [{"name": "user", "kind": "sparse"}, {"name": "ads", "kind": "multi", "table": "ad"}],
        "tasks": [{"name": "click"}],
        "traffics": ["all", "0", "1"],
    }
)
DAY_S = 86_400
BASE = 1_650_000_000 // DAY_S * DAY_S  # 2022-04-15


def log(rows: int = 10, day: int = 0, **replaced: pa.Array) -> pa.Table:
    columns = {
        "uid": pa.array(np.arange(rows)),
        "ads": pa.array([[1, 2]] * rows),
        "clicked": pa.array([True, False] * (rows // 2)),
        "at": pa.array(BASE + day * DAY_S + np.arange(rows)),
        "tab": pa.array([0, 1] * (rows // 2)),
    }
    return pa.table(columns | replaced)


def source(folder: Path, **more: object) -> ParquetSource:
    config = {
        "path": str(folder),
        "columns": {"user": "uid", "click": "clicked"},
        "time": {"column": "at", "unit": "s"},
    }
    return ParquetSource(ParquetConfig.model_validate(config | more), SCHEMA)


def read(own: ParquetSource) -> pa.Table:
    """What the source's tasks give, without Ray."""
    units, wanted = own._units, own._wanted
    batch = pa.table({"id": range(len(units))})
    periods = own.periods()
    return pa.concat_tables(list(read_units(batch, units, own._parquet, SCHEMA, wanted, periods)))


def test_a_mapping_and_ids_from_file_and_row(tmp_path):
    pq.write_table(log(10), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(log(4, day=1), tmp_path / "b.parquet")
    own = source(tmp_path)
    table = read(own)
    assert table["example_id"].to_pylist() == [*range(10), *(2**40 + row for row in range(4))]
    assert [period.name for period in own.periods()] == ["2022-04-15", "2022-04-16"]
    assert own.estimated_rows() == 14
    good, rejects = split_rejects(table, SCHEMA, own.periods())
    assert rejects.num_rows == 0
    assert good["user"].to_pylist()[:3] == [0, 1, 2]
    assert good["click"].to_pylist()[:3] == [1.0, 0.0, 1.0]
    assert good["traffic"].to_pylist()[0] == "all"
    assert good["kind"].to_pylist()[0] == "impression"
    assert good["time"][0].as_py() == BASE * 1_000_000


def test_units_split_at_row_groups_keep_row_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("rayfm.data.sources.parquet.UNIT_ROWS", 4)
    monkeypatch.setattr("rayfm.data.sources.parquet.BLOCK_ROWS", 2)
    pq.write_table(log(10), tmp_path / "a.parquet", row_group_size=3)
    own = source(tmp_path)
    assert [unit.groups for unit in own._units] == [(0, 1), (2, 3)]
    table = read(own)
    np.testing.assert_array_equal(table["example_id"].to_numpy(), table["user"].to_numpy())


def test_traffic_kind_and_reserved_columns(tmp_path):
    kinds = pa.array(["impression", "consideration"] * 5)
    extra = {"stage": kinds, "rank": pa.array(range(10)), "logged/early/click": pa.array(np.ones(10)), "junk": kinds}
    pq.write_table(log(10, clicked=pa.array([True, None] * 5), **extra), tmp_path / "a.parquet")
    own = source(tmp_path, traffic={"column": "tab"}, kind={"column": "stage"})
    good, rejects = split_rejects(read(own), SCHEMA, own.periods())
    assert rejects.num_rows == 0
    assert good["traffic"].to_pylist()[:2] == ["0", "1"]
    assert good["kind"].to_pylist()[:2] == ["impression", "consideration"]
    assert good.schema.field("rank").type == pa.int32()
    assert good.schema.field("logged/early/click").type == pa.float32()
    assert "junk" not in good.column_names


def test_start_and_end_choose_rows(tmp_path):
    pq.write_table(pa.concat_tables([log(10, day) for day in range(4)]), tmp_path / "a.parquet")
    first = datetime.datetime.fromtimestamp(BASE + DAY_S + 4, datetime.UTC)
    last = datetime.datetime.fromtimestamp(BASE + 2 * DAY_S + 3, datetime.UTC)
    own = source(tmp_path, start=first, end=last)
    assert [period.name for period in own.periods()] == ["2022-04-16", "2022-04-17"]
    times = read(own)["time"].to_numpy() // 1_000_000 - BASE
    assert times.tolist() == [DAY_S + row for row in range(4, 10)] + [2 * DAY_S + row for row in range(3)]
    assert own.periods()[0].start == first
    assert own.periods()[-1].end == last
    whole = source(tmp_path, start="2022-04-16", end="2022-04-20")
    assert len(whole.periods()) == 4, "days without rows are there, for prepare to complain about"
    with pytest.raises(ValueError, match="is not before end"):
        source(tmp_path, start=last, end=first)
    with pytest.raises(DataError, match="no row has a time between start and end"):
        source(tmp_path, start="2030-01-01").periods()


def test_hours_as_periods(tmp_path):
    pq.write_table(log(4, at=pa.array([BASE, BASE + 3600, BASE + 3601, BASE + 9 * 3600])), tmp_path / "a.parquet")
    names = [period.name for period in source(tmp_path, period="1h").periods()]
    assert names == ["2022-04-15T00", "2022-04-15T01", "2022-04-15T09"]


def test_a_bad_time_is_a_reject_and_no_period(tmp_path):
    times = pa.array([BASE, None, -7, 10**18, 2**62, BASE + 1])
    pq.write_table(log(6, at=times), tmp_path / "a.parquet")
    own = source(tmp_path)
    assert [period.name for period in own.periods()] == ["2022-04-15"]
    good, rejects = split_rejects(read(own), SCHEMA, own.periods())
    assert good.num_rows == 2
    assert rejects["reason"].to_pylist() == ["null time", *["negative time"] * 3]


@pytest.mark.parametrize(
    ("unit", "array", "expected"),
    [
        ("s", pa.array([5, None]), [5_000_000, None]),
        ("ms", pa.array([5], pa.int32()), [5_000]),
        ("us", pa.array([5, 2**64 - 1], pa.uint64()), [5, -1]),
        ("us", pa.array([datetime.datetime(1970, 1, 1, 0, 0, 5)]), [5_000_000]),
        ("us", pa.array([datetime.date(1970, 1, 2)]), [86_400_000_000]),
        ("ms", pa.array([5_000], pa.timestamp("ms", "Asia/Shanghai")), [5_000_000]),
        (
            "iso",
            pa.array(["1970-01-01T00:00:05", "1970-01-01 08:00:05.5+08:00", "1970-01-02", "1970-02-30", "x", None]),
            [5_000_000, 5_500_000, 86_400_000_000, -1, -1, None],
        ),
        ("iso", pa.array(["1970-01-01T00:00:05Z"]).dictionary_encode(), [5_000_000]),
    ],
)
def test_times(unit, array, expected):
    assert to_microseconds("f", pa.chunked_array([array]), TimeColumn(unit=unit)).to_pylist() == expected


@pytest.mark.parametrize(
    ("unit", "array", "message"),
    [
        ("s", pa.array(["1970"]), r"^f: time column 'time' is string, unit 's' wants int64 .*unit 'iso'"),
        ("s", pa.array([1.5]), r"^f: time column 'time' is double, unit 's' wants int64"),
        ("iso", pa.array([5]), r"^f: time column 'time' is int64, unit 'iso' wants string"),
    ],
)
def test_times_of_the_wrong_type(unit, array, message):
    with pytest.raises(DataError, match=message):
        to_microseconds("f", pa.chunked_array([array]), TimeColumn(unit=unit))


def test_a_missing_column_names_file_and_nearest(tmp_path):
    pq.write_table(log(), tmp_path / "a.parquet")
    pq.write_table(log().rename_columns(["uid", "ads", "click_ed", "at", "tab"]), tmp_path / "b.parquet")
    with pytest.raises(
        DataError, match=r"b\.parquet: column 'clicked' \(for 'click'\) is missing; did you mean 'click_ed'"
    ):
        source(tmp_path).periods()


def test_a_mapping_to_an_unknown_schema_column(tmp_path):
    pq.write_table(log(), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"source.columns: the schema has no column 'usr'; did you mean 'user'"):
        source(tmp_path, columns={"usr": "uid", "click": "clicked"}).periods()


def test_a_wrong_type_names_file_column_and_types(tmp_path):
    pq.write_table(log(uid=pa.array(["u"] * 10)), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet: column 'uid' is string, the schema wants int64; .*id_type: string"
    ):
        read(source(tmp_path))


def test_corrupt_files_are_named(tmp_path):
    pq.write_table(log(), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(
        DataError, match=r"b\.parquet: corrupt or unreadable Parquet file \(.*\); replace it or leave it"
    ):
        source(tmp_path).periods()
    pq.write_table(log(1000), tmp_path / "b.parquet", compression="zstd")
    data = bytearray((tmp_path / "b.parquet").read_bytes())
    data[20:400] = bytes(380)
    (tmp_path / "b.parquet").write_bytes(data)
    own = source(tmp_path, start="2022-04-15", end="2022-04-16")
    assert own.periods()
    with pytest.raises(DataError, match=r"b\.parquet: corrupt or unreadable Parquet file"):
        read(own)


def test_paths_globs_and_uris(tmp_path):
    for name in ("day=1/a.parquet", "day=2/b.parquet", "day=2/_tmp.parquet", ".hidden/c.parquet", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(log(), tmp_path / name)

    def names(path: str) -> list[str]:
        return [Path(file).name for file in list_files(path)[1]]

    assert names(str(tmp_path)) == ["a.parquet", "b.parquet"]
    assert names(f"{tmp_path}/day=*/[ab].parquet") == ["a.parquet", "b.parquet"]
    assert names(f"{tmp_path}/**/b.parquet") == ["b.parquet"]
    assert names(f"{tmp_path}/day=1/a.parquet") == ["a.parquet"]
    assert names(tmp_path.as_uri()) == ["a.parquet", "b.parquet"]
    assert names(f"{tmp_path.as_uri()}/day=2/*.parquet") == ["_tmp.parquet", "b.parquet"]
    for missing in ("nothing", "*.csv", "day=1/nothing.parquet"):
        with pytest.raises(
            DataError, match=r"(no such file or folder|no \.parquet file matches); check the source's path"
        ):
            list_files(f"{tmp_path}/{missing}")
    with pytest.raises(DataError, match="cannot be listed"):
        list_files("nosuchscheme://bucket/x")


def test_the_config_is_a_union_told_apart_by_type(tmp_path):
    config = validate(DataConfig, {"source": {"type": "parquet", "path": str(tmp_path)}, "lanes": 4})
    assert isinstance(config.source, ParquetConfig)
    assert validate(DataConfig, config.dump()) == config
    assert isinstance(SOURCES.build(config.source, SCHEMA), ParquetSource)
    with pytest.raises(ConfigError, match=r"'source.type': unknown 'parqet'; did you mean 'parquet'"):
        validate(DataConfig, {"source": {"type": "parqet"}})
    with pytest.raises(ConfigError, match=r"unknown key 'source.colums'; did you mean 'columns'"):
        validate(DataConfig, {"source": {"type": "parquet", "path": "x", "colums": {}}})
