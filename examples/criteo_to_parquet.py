"""Criteo's click logs as Parquet: ``python examples/criteo_to_parquet.py OUT FILE [FILE ...] [--days 7]``.

Each FILE is tab-separated text without a header, as Criteo publishes it (plain or .gz): label, 13 counts, 26 categories
as hexadecimal text; missing values are empty. Several files are one day each, in the order given (``day_0`` to
``day_23`` of the terabyte). One file is divided into ``--days`` days of equally many rows: the challenge's
``train.txt`` is in the order of time, seven days of it, without times. Rows get times that spread them over their day.

Beside the columns ``click``, ``I1`` ... ``I13`` and ``C1`` ... ``C26`` a file has ``example_id``, the row's number over
all files, and ``time`` in microseconds. Memory holds one block of rows, not a file.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

COUNTS = [f"I{number}" for number in range(1, 14)]
CATEGORIES = [f"C{number}" for number in range(1, 27)]
TYPES = {"click": pa.int8(), **dict.fromkeys(COUNTS, pa.int64()), **dict.fromkeys(CATEGORIES, pa.string())}
FIRST_DAY = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
"""Any: the logs do not say when they were."""
DAY_US = 24 * 3600 * 1_000_000


def blocks(path: Path) -> Iterator[pa.Table]:
    """The rows of a file, a block at a time. An empty category is an id of its own, an empty count is missing."""
    reader = pa_csv.open_csv(
        path,
        read_options=pa_csv.ReadOptions(column_names=list(TYPES), block_size=1 << 25),
        parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=pa_csv.ConvertOptions(column_types=TYPES, null_values=[""], strings_can_be_null=False),
    )
    for batch in reader:
        yield pa.Table.from_batches([batch])


def count(path: Path) -> int:
    """Rows of a file."""
    return sum(block.num_rows for block in blocks(path))


def convert(out: Path, files: list[Path], days: int) -> int:
    """Write the Parquet files, one for each of ``files``; the number of rows."""
    out.mkdir(parents=True, exist_ok=True)
    start, number = round(FIRST_DAY.timestamp() * 1e6), 0
    for position, path in enumerate(files):
        rows, seen = count(path), 0
        length = DAY_US * (days if len(files) == 1 else 1)
        first = start + (0 if len(files) == 1 else position * DAY_US)
        partial = out / f".{path.name}.partial"
        schema = pa.schema({**TYPES, "example_id": pa.int64(), "time": pa.int64()})
        with pq.ParquetWriter(partial, schema) as writer:
            for block in blocks(path):
                place = np.arange(seen, seen + block.num_rows)
                block = block.append_column("example_id", pa.array(number + place))
                block = block.append_column("time", pa.array(first + (place * (length / rows)).astype(np.int64)))
                writer.write_table(block)
                seen += block.num_rows
        partial.rename(out / f"{path.name.removesuffix('.gz').removesuffix('.txt')}.parquet")
        number += rows
    return number


def main(arguments: list[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("files", type=Path, nargs="+", help="in the order of time")
    parser.add_argument("--days", type=int, default=7, help="days of a single file")
    asked = parser.parse_args(arguments)
    try:
        rows = convert(asked.out, asked.files, asked.days)
    except (OSError, pa.ArrowInvalid) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{rows:,} rows in {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
