"""Reading a bucketed source as its tasks do, without Ray."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa

from rayfm.data.sources.buckets import BucketedSource, deal


def examples_of(source: BucketedSource, buckets: int = 1) -> pa.Table:
    """All examples of a source's periods, by example id."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [run for number, part in enumerate(source.parts()) for run in deal(part, number, buckets, Path(folder))]
        build = source.builder(source.periods(), runs, Path(folder))
        tables = [table for bucket in range(buckets) for table in build(bucket)]
    return pa.concat_tables(tables).sort_by("example_id")
