"""The items that can be retrieved: a Parquet catalogue, or the distinct items of the example store's latest periods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfm.config import DataError
from rayfm.data.store import ExampleStore
from rayfm.schema import TIME


def read_catalogue(path: str | Path, item: str, columns: list[str]) -> pa.Table:
    """One row an item.

    Args:
        path: a Parquet file, or a folder of them.
        item: the column that tells items apart.
        columns: what is read, ``item`` among them.

    Raises:
        DataError: the catalogue is not there, lacks a column, has no row, or has an item without an id or twice.
    """
    path = Path(path)
    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: has no Parquet file; write the catalogue there, a row an item")
    table = pa.concat_tables([_read(file, columns) for file in files], promote_options="permissive")
    if not table.num_rows:
        raise DataError(f"{path}: the catalogue has no item")
    ids = table[item]
    if ids.null_count:
        raise DataError(f"{path}: column {item!r} is null in {ids.null_count} rows; each item needs an id")
    counts = pc.value_counts(ids.combine_chunks())
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise DataError(f"{path}: item {twice[0]['values'].as_py()!r} stands twice; write one row for each item")
    return table


def latest_items(store: ExampleStore, item: str, columns: list[str], periods: int) -> pa.Table:
    """The distinct items of the newest ``periods`` periods, each as its newest example has it.

    Args:
        store: the example store.
        item: the feature that tells items apart; examples without it are passed over.
        columns: what is read, ``item`` among them.
        periods: how many.

    Raises:
        DataError: there is no period or no item, or a column is missing.
    """
    known = store.periods()[-periods:]
    if not known:
        raise DataError(f"{store.root}: no period is prepared; there are no items to retrieve")
    newest: pa.Table | None = None
    for period in known:
        parts = [_newest(table, item) for table in _lanes(store, period, [*columns, TIME])]
        if newest is not None:
            parts.insert(0, newest)
        newest = _newest(pa.concat_tables(parts), item)
    if newest is None or not newest.num_rows:
        raise DataError(f"{store.root}: no example of {known[0]} .. {known[-1]} has a {item!r}")
    return newest.select(columns)


def _lanes(store: ExampleStore, period: str, columns: list[str]) -> Iterator[pa.Table]:
    for kind in ("impression", "consideration"):
        for _, path in store.files(period, kind):
            yield _read(path, columns)


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: column {missing[0]!r} is missing, and the item tower reads it")
            return file.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _newest(table: pa.Table, item: str) -> pa.Table:
    """Each item's last row by time; of equal times, the last in order."""
    table = table.filter(pc.is_valid(table[item]))
    order = pc.sort_indices(table[TIME].combine_chunks()) if table.num_rows else pa.array([], pa.uint64())
    table = table.take(order)
    codes = table[item].combine_chunks()
    codes = codes if isinstance(codes, pa.Array) else pa.array([], table.schema.field(item).type)
    numbers = codes.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    _, from_end = np.unique(numbers[::-1], return_index=True)
    return table.take(pa.array(np.sort(len(numbers) - 1 - from_end)))
