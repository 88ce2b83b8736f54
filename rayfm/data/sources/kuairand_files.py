"""The files of KuaiRand-Pure under their official names, CSV or Parquet (https://kuairand.com).

Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from rayfm.config import Config, DataError, nearest
from rayfm.data.sources.files import NULLS, first_line, parquet_errors, text_errors

STANDARD_LOGS = ("log_standard_4_08_to_4_21_pure", "log_standard_4_22_to_5_08_pure")
TAIL_LOG = "log_standard_4_25_to_5_08_pure"
"""The last 14 days alone; read where the official second log is not there."""

RANDOM_LOG = "log_random_4_22_to_5_08_pure"
USERS, VIDEOS, HISTORY = "user_features_pure", "video_features_basic_pure", "user_history_before_4_25"

CSV_ROW_BYTES = 75
"""Bytes of a log's CSV line, to guess its rows."""

BLOCK_BYTES = 8 << 20


class LogFile(Config):
    """One log; ``index`` is part of its rows' example ids."""

    path: str
    index: int


def find(folder: Path, stem: str) -> Path | None:
    """The file called ``stem`` as Parquet or, failing that, as CSV."""
    for suffix in (".parquet", ".csv"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    return None


def find_required(folder: Path, stem: str) -> Path:
    """As `find`. Raises DataError where there is neither."""
    path = find(folder, stem)
    if path is None:
        raise DataError(f"{folder}: {stem}.csv (or .parquet) is missing; point the source's path at KuaiRand-Pure")
    return path


def find_logs(folder: Path, random: bool) -> list[LogFile]:
    """The logs to read, in time order; the random-exposure log after them where wanted.

    Raises:
        DataError: the folder has no log.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; point the source's path at KuaiRand-Pure")
    paths = [path for stem in STANDARD_LOGS if (path := find(folder, stem)) is not None]
    if find(folder, STANDARD_LOGS[-1]) is None:
        tail = find(folder, TAIL_LOG)
        paths += [tail] if tail is not None else []
    if random:
        paths.append(find_required(folder, RANDOM_LOG))
    if not paths:
        raise DataError(
            f"{folder}: none of {', '.join([*STANDARD_LOGS, TAIL_LOG])} is here as .csv or .parquet; point the "
            "source's path at KuaiRand-Pure"
        )
    return [LogFile(path=str(path), index=index) for index, path in enumerate(paths)]


def guess_rows(path: str) -> int:
    """Rows of a log: exact for Parquet, from the file's size for CSV."""
    if path.endswith(".parquet"):
        with parquet_errors(path):
            return int(pq.read_metadata(path).num_rows)
    return Path(path).stat().st_size // CSV_ROW_BYTES


def read_batches(path: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Integer ``columns`` of a log, a few MB at a time, in the file's order.

    Raises:
        DataError: the file is corrupt, lacks a column, or a value is no whole number.
    """
    if path.endswith(".parquet"):
        with parquet_errors(path):
            file = pq.ParquetFile(path)
        _require(path, columns, file.schema_arrow.names)
        batches = file.iter_batches(131_072, columns=list(columns), use_threads=False)
    else:
        _require(path, columns, _header(path))
        options = pcsv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.int64()), include_columns=list(columns), null_values=NULLS
        )
        read = pcsv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
        with text_errors(path):
            batches = iter(pcsv.open_csv(path, read_options=read, convert_options=options))
    while True:
        with text_errors(path) if path.endswith(".csv") else parquet_errors(path):
            batch = next(batches, None)
        if batch is None:
            return
        table = pa.Table.from_batches([batch]).select(list(columns))
        for name in columns:
            if not pa.types.is_integer(table.schema.field(name).type):
                raise DataError(f"{path}: column {name!r} is {table.schema.field(name).type}, KuaiRand has int64")
        yield table.cast(pa.schema([pa.field(name, pa.int64()) for name in columns]))


def read_features(path: Path, key: str, columns: Sequence[str], text: frozenset[str]) -> pa.Table:
    """A feature file sorted by ``key``: columns in ``text`` as strings, the others as int64 (1.0 is 1), missing null.

    Raises:
        DataError: the file is corrupt, lacks a column, or a value is not of the column's type.
    """
    names = list(dict.fromkeys([key, *columns]))
    if path.suffix == ".parquet":
        with parquet_errors(str(path)):
            _require(str(path), names, pq.read_schema(path).names)
            table = pq.read_table(path, columns=names)
    else:
        _require(str(path), names, _header(str(path)))
        types = {name: pa.string() if name in text else pa.float64() for name in names}
        options = pcsv.ConvertOptions(
            column_types=types, include_columns=names, null_values=NULLS, strings_can_be_null=True
        )
        with text_errors(str(path)):
            table = pcsv.read_csv(path, convert_options=options)
    arrays = []
    for name in names:
        column = table[name]
        try:
            if name in text:
                column = column.cast(pa.string())
                arrays.append(pc.if_else(pc.is_in(column, pa.array(NULLS)), pa.scalar(None, pa.string()), column))
            else:
                if pa.types.is_floating(column.type):
                    column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
                arrays.append(column.cast(pa.int64()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"{path}: column {name!r}: {first_line(error)}") from None
    result = pa.table(arrays, names=names)
    return result.filter(result[key].is_valid()).sort_by(key).combine_chunks()


def _require(path: str, columns: Sequence[str], known: list[str]) -> None:
    for name in columns:
        if name not in known:
            raise DataError(f"{path}: column {name!r} is missing{nearest(name, known)}")


def _header(path: str) -> list[str]:
    with text_errors(path), open(path, encoding="utf-8", errors="replace") as file:
        return [name.strip().strip('"') for name in file.readline().split(",")]
