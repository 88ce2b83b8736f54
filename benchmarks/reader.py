"""Readers against a plain pyarrow scan of the same columns: ``python -m benchmarks.reader STORE direct|ray_data``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.data import BATCH, LONG, SHORT, schema
from benchmarks.measure import Outcome, Spent, in_turns, rates, report, timed
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader, RayDataReader
from rayfm.data.steps import ReadPlan
from rayfm.data.store import ExampleStore


def scan(store: ExampleStore, periods: Sequence[str], columns: list[str]) -> float:
    """Decode the columns of every lane file, a row group at a time, in one thread as a worker does; returns rows."""
    rows = 0
    for period in periods:
        for _, path in store.files(period, "impression"):
            file = pq.ParquetFile(path, memory_map=False, pre_buffer=True)
            for group in range(file.num_row_groups):
                rows += file.read_row_group(group, columns=columns, use_threads=False).num_rows
    return rows


def direct(store: ExampleStore) -> Outcome:
    """The direct reader over the long period."""
    encoder = Encoder(schema())
    plan = ReadPlan(store, tuple(encoder.columns), BATCH)

    def read() -> float:
        return sum(len(batch) for batch in ArrowReader(plan, encoder).batches(LONG))

    pairs = in_turns(lambda: timed(read), lambda: timed(lambda: scan(store, [LONG], encoder.columns)), repeats=5)
    return rates(pairs, "rows")


def ray_data(store: ExampleStore) -> Outcome:
    """The Ray Data reader: its rate once it runs.

    A pipeline takes seconds to start, whatever it reads, and a trainer starts it once for all periods. So the rate is
    of the rows that reading both periods has more than reading the short one alone.
    """
    import ray

    encoder = Encoder(schema())
    plan = ReadPlan(store, tuple(encoder.columns), BATCH)

    def read(periods: list[str]) -> float:
        reader = RayDataReader(plan, encoder, periods)
        return sum(len(batch) for period in periods for batch in reader.batches(period))

    def ours() -> Spent:
        short = timed(lambda: read([SHORT]), children=True)
        both = timed(lambda: read([SHORT, LONG]), children=True)
        return Spent(both.units - short.units, both.wall - short.wall, both.cpu - short.cpu)

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        pairs = in_turns(ours, lambda: timed(lambda: scan(store, [LONG], encoder.columns)), repeats=3)
    finally:
        ray.shutdown()
    return rates(pairs, "rows")


if __name__ == "__main__":
    report({"direct": direct, "ray_data": ray_data}[sys.argv[2]](ExampleStore(Path(sys.argv[1]))))
