"""Prepare as a whole, on Ray: any parallelism gives the same bytes, a killed run is run again, errors are plain."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from example_store import DAY_US, every_feature_rows, every_feature_schema

from rayfm.config import CapacityError, DataError
from rayfm.data import capacity
from rayfm.data.capacity import check_disk, estimate_bytes
from rayfm.data.lock import prepare_lock
from rayfm.data.prepare import STAGING, prepare
from rayfm.data.sources import parquet
from rayfm.data.sources.parquet import ParquetConfig, ParquetSource
from rayfm.data.store import MANIFEST, ExampleStore

SCHEMA = every_feature_schema()
LANES = 4
DAYS = 4


def write_logs(folder: Path, rows: int = 600, **replaced: pa.Array) -> Path:
    """Two files with four days of rows in no order, and a few bad ones."""
    parts = [
        every_feature_rows(count, 2 * day + (kind == "consideration"), kind, start=day * DAY_US).append_column(
            "kind", pa.repeat(kind, count)
        )
        for day in range(DAYS)
        for kind, count in (("impression", rows), ("consideration", rows // 4))
    ]
    table = pa.concat_tables(parts)
    table = table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
    user = pa.array([-1, -2, *table["user"].to_pylist()[2:]])
    table = table.set_column(table.column_names.index("user"), "user", user)
    table = pa.concat_tables([table, table.slice(30, 5)])
    times = pa.array([*table["time"].to_pylist()[:-5], *table["time"].to_pylist()[30:34], None], pa.int64())
    table = table.set_column(1, "time", times)
    for name, array in replaced.items():
        table = table.set_column(table.column_names.index(name), name, array)
    folder.mkdir(parents=True, exist_ok=True)
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), folder / "part-0.parquet", row_group_size=200)
    pq.write_table(table.slice(half), folder / "part-1.parquet", row_group_size=300)
    return folder


def source_of(folder: Path, **more: object) -> ParquetSource:
    config = {
        "path": str(folder),
        "example_id": "example_id",
        "traffic": {"column": "traffic"},
        "kind": {"column": "kind"},
    }
    return ParquetSource(ParquetConfig.model_validate(config | more), SCHEMA)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("lane-*.parquet"))}


@pytest.mark.ray
def test_the_same_bytes_whatever_the_parallelism(tmp_path, ray_session, monkeypatch):
    logs = write_logs(tmp_path / "logs")
    seen = []
    first = prepare(source_of(logs), SCHEMA, ExampleStore(tmp_path / "a"), LANES, progress=lambda *p: seen.append(p))
    monkeypatch.setattr(parquet, "UNIT_ROWS", 200)
    import ray.data

    limits = ray.data.DataContext.get_current().execution_options.resource_limits
    second = prepare(source_of(logs), SCHEMA, ExampleStore(tmp_path / "b"), LANES, cpus_per_task=1, tasks=1)
    assert ray.data.DataContext.get_current().execution_options.resource_limits == limits
    assert first == second
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert [manifest.period for manifest in first] == [f"1970-01-0{day + 1}" for day in range(DAYS)]
    kept = sum(manifest.rows("impression") + manifest.rows("consideration") for manifest in first)
    assert kept == DAYS * 750 - 2
    totals: dict[str, int] = {}
    for manifest in first:
        for reason, rows in manifest.rejected.items():
            totals[reason] = totals.get(reason, 0) + rows
    assert totals == {"negative id in 'user'": 2, "example_id twice in its period": 4}
    unknown = pq.read_table(ExampleStore(tmp_path / "a").rejects_path("unknown"))
    assert unknown["reason"].to_pylist() == ["null time"]
    assert seen[-1] == ("write", DAYS, DAYS)
    assert ("read", DAYS * 750 + 5, DAYS * 750 + 5) in seen
    assert not (tmp_path / "a" / STAGING).exists()


KILLED = """
import os, signal, sys
import ray
from test_prepare import ExampleStore, LANES, SCHEMA, prepare, source_of
from pathlib import Path
logs, root, address = sys.argv[1:]

def die(phase, done, total):
    if phase == "write" and done:
        os.kill(os.getpid(), signal.SIGKILL)

ray.init(address=address, log_to_driver=False, logging_level="ERROR")
prepare(source_of(Path(logs)), SCHEMA, ExampleStore(root), LANES, progress=die)
"""


@pytest.mark.ray
def test_a_killed_run_is_run_again(tmp_path, ray_session):
    import ray

    logs, root = write_logs(tmp_path / "logs"), tmp_path / "store"
    address = ray.get_runtime_context().gcs_address
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(logs), str(root), address]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    store = ExampleStore(root)
    done = store.periods()
    assert done
    assert (root / STAGING).exists()
    # A period that was being written when the machine died: lanes without a manifest.
    broken = store.lane_path(done[-1], "impression", 0)
    (store.period_dir(done[-1]) / MANIFEST).unlink()
    broken.write_bytes(b"half a file")
    kept = {period: (store.period_dir(period) / MANIFEST).stat().st_mtime_ns for period in done[:-1]}

    manifests = prepare(source_of(logs), SCHEMA, store, LANES)
    assert manifests == prepare(source_of(logs), SCHEMA, ExampleStore(tmp_path / "whole"), LANES)
    assert files_of(root) == files_of(tmp_path / "whole")
    for period, stamp in kept.items():
        assert (store.period_dir(period) / MANIFEST).stat().st_mtime_ns == stamp
    assert not (root / STAGING).exists()


@pytest.mark.ray
def test_periods_of_another_configuration_are_not_mixed(tmp_path, ray_session):
    logs, store = write_logs(tmp_path / "logs"), ExampleStore(tmp_path / "store")
    day = datetime.datetime(1970, 1, 2)
    prepare(source_of(logs, start=day, end=day + datetime.timedelta(days=1)), SCHEMA, store, LANES)
    assert store.periods() == ["1970-01-02"]
    with pytest.raises(DataError, match=r"period=1970-01-02: prepared from another source, .* choose another .* root"):
        prepare(source_of(logs), SCHEMA, store, LANES)
    with pytest.raises(DataError, match="another source, schema or number of lanes"):
        prepare(source_of(logs, start=day, end=day + datetime.timedelta(days=1)), SCHEMA, store, LANES * 2)


@pytest.mark.ray
def test_an_empty_period_is_named(tmp_path, ray_session):
    logs = write_logs(tmp_path / "logs")
    start, end = datetime.datetime(1970, 1, 3), datetime.datetime(1970, 1, 7)
    with pytest.raises(DataError, match=r"^period 1970-01-05 has no impressions; fix the log, or set .*start and end"):
        prepare(source_of(logs, start=start, end=end), SCHEMA, ExampleStore(tmp_path / "store"), LANES)


@pytest.mark.ray
def test_a_period_of_bad_rows_alone_says_why(tmp_path, ray_session):
    rows = 2 * DAYS * 375 + 5
    logs = write_logs(tmp_path / "logs", age=pa.array([float("nan")] * rows, pa.float32()))
    with pytest.raises(DataError, match=r"1970-01-01 has no impressions; rejected: \d+ for dense 'age' is not finite"):
        prepare(source_of(logs), SCHEMA, ExampleStore(tmp_path / "store"), LANES)


@pytest.mark.ray
def test_an_error_in_a_task_comes_out_plain(tmp_path, ray_session):
    logs = write_logs(tmp_path / "logs")
    table = pq.read_table(logs / "part-1.parquet")
    position = table.column_names.index("user")
    pq.write_table(table.set_column(position, "user", pa.array(["u"] * table.num_rows)), logs / "part-1.parquet")
    with pytest.raises(DataError) as error:
        prepare(source_of(logs), SCHEMA, ExampleStore(tmp_path / "store"), LANES)
    assert type(error.value) is DataError
    assert str(error.value).startswith(f"{logs}/part-1.parquet: column 'user' is string, the schema wants int64")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store" / STAGING).exists()


@pytest.mark.ray
def test_an_error_while_staging_comes_out_plain(tmp_path, ray_session):
    class Mistaken(ParquetSource):
        """Forgets a column, which only the staging task finds out."""

        def dataset(self, periods):
            return super().dataset(periods).drop_columns(["age"])

    source = source_of(write_logs(tmp_path / "logs"))
    source.__class__ = Mistaken
    with pytest.raises(DataError) as error:
        prepare(source, SCHEMA, ExampleStore(tmp_path / "store"), LANES)
    assert type(error.value) is DataError
    assert str(error.value).startswith("the source's examples lack column 'age'")
    assert "\n" not in str(error.value)


HOLDER = """
import sys, time
from pathlib import Path
from rayfm.data.lock import prepare_lock
with prepare_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_store_is_prepared_by_one_process_at_a_time(tmp_path):
    source = source_of(write_logs(tmp_path / "logs"))
    root = tmp_path / "store"
    other = root / STAGING / "period=1970-01-01" / "of-the-other.arrow"
    other.parent.mkdir(parents=True)
    other.touch()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataError) as error:
            prepare(source, SCHEMA, ExampleStore(root), LANES)
        message = str(error.value)
        assert message.startswith(f"{root}: process {holder.pid} on ")
        assert message.endswith(" is preparing this example store; wait until it is done, or choose another root")
        assert other.exists(), "what the other stages is left alone"
    finally:
        holder.kill()
        holder.wait()
    with prepare_lock(root), pytest.raises(DataError, match=f"process {os.getpid()} on"), prepare_lock(root):
        pass
    with prepare_lock(root):
        pass


def test_the_root_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    source = source_of(write_logs(tmp_path / "logs"))
    with pytest.raises(DataError, match=r"file/store: cannot write the example store here \(Not a directory\); choose"):
        prepare(source, SCHEMA, ExampleStore(tmp_path / "file" / "store"), LANES)


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    source = source_of(write_logs(tmp_path / "logs"))
    need = estimate_bytes(source.estimated_rows(), SCHEMA)
    usage = type("Usage", (), {"free": need - 1})
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CapacityError, match=r"needs about .* GB of disk, .* GB are free; free space or choose another"):
        prepare(source, SCHEMA, ExampleStore(tmp_path / "store"), LANES)
    assert list((tmp_path / "store").iterdir()) == []
    check_disk(tmp_path / "store", need - 1)


def test_the_estimate_grows_with_rows_and_lists():
    assert estimate_bytes(0, SCHEMA) == 0
    assert estimate_bytes(2000, SCHEMA) == 2 * estimate_bytes(1000, SCHEMA)
    dump = SCHEMA.dump()
    fewer = SCHEMA.model_validate(json.loads(json.dumps(dump | {"features": dump["features"][:3]})))
    assert estimate_bytes(1000, fewer) < estimate_bytes(1000, SCHEMA)
