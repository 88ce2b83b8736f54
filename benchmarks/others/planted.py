"""Criteo-shaped Parquet with a label that can be learned: 13 dense and 26 sparse features, ids skewed as in click logs.

A sparse feature has as many ids as the one of Criteo's display advertising challenge in its place, at most 100,000; or
all have 100,000, which is what the tables of the fixed case of benchmarks/data.py are for. A click is drawn from a
logistic function that was planted: every other sparse feature's ids have a hidden effect, ids of four pairs of features
have hidden vectors whose inner product counts, and so do five dense features.
"""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.schema import mix64

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MOST_IDS = 100_000
CRITEO_IDS = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
AS_CRITEO = tuple(min(count, MOST_IDS) for count in CRITEO_IDS)
"""Ids of each sparse feature."""

DENSE, SPARSE = 13, len(AS_CRITEO)
ALL_LARGE = (MOST_IDS,) * SPARSE
MISSING = 5
"""Dense features a tenth of whose values is missing."""

BLOCK = 65_536
TEST_SHARE = 0.1
"""The newest rows, which are held out."""

BIAS = -1.3
EFFECT_STD = 0.25
PAIRS = ((0, 1), (4, 7), (10, 12), (17, 18))
PAIR_DIM, PAIR_STD = 4, 0.5
DENSE_WEIGHTS = {0: 0.3, 3: -0.2, 6: 0.2, 8: -0.15, 11: 0.1}
"""Dense feature -> weight of ``log(1 + x)`` less ``LOG_MEAN``."""
LOG_MEAN = 2.5
_EFFECTS_SEED = 20_250_101

DAY = datetime.timedelta(days=1)
TRAIN_DAY = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
"""Rows to train on lie in this day, rows that are held out in the one after it."""
PERIODS = ("2025-01-01", "2025-01-02")


@functools.cache
def effects(feature: int) -> Floats:
    """Hidden effect of each id that a sparse feature may have, ``[ids]``: zeros for every other feature."""
    if feature % 2:
        return np.zeros(MOST_IDS)
    return np.random.default_rng((_EFFECTS_SEED, feature)).normal(0.0, EFFECT_STD, MOST_IDS)


@functools.cache
def vectors(feature: int) -> Floats:
    """Hidden vector of each id that a feature which is one of a pair may have, ``[ids, PAIR_DIM]``."""
    return np.random.default_rng((_EFFECTS_SEED, SPARSE + feature)).normal(0.0, PAIR_STD, (MOST_IDS, PAIR_DIM))


def planted_logits(ranks_NS: Ints, dense_ND: Floats) -> Floats:
    """Logit of the click of each row, ``[N]``.

    Args:
        ranks_NS: number of each sparse feature's id, counted from its most frequent one.
        dense_ND: values of the dense features; 0 where one is missing.
    """
    logits = np.full(len(ranks_NS), BIAS)
    for feature in range(SPARSE):
        logits += effects(feature)[ranks_NS[:, feature]]
    for one, other in PAIRS:
        logits += (vectors(one)[ranks_NS[:, one]] * vectors(other)[ranks_NS[:, other]]).sum(axis=1)
    for feature, weight in DENSE_WEIGHTS.items():
        logits += weight * (np.log1p(dense_ND[:, feature]) - LOG_MEAN)
    return logits


def block(rows: int, first: int, seed: int, ids: tuple[int, ...]) -> pa.Table:
    """``rows`` rows from row ``first`` on, without their times."""
    rng = np.random.default_rng((seed, first))
    dense_ND = rng.exponential(20.0, (rows, DENSE))
    missing_ND = np.zeros((rows, DENSE), np.bool_)
    missing_ND[:, :MISSING] = rng.random((rows, MISSING)) < 0.1
    # A power of a uniform number: few ids are frequent, most are rare.
    ranks_NS = (rng.random((rows, SPARSE)) ** 4 * np.array(ids)).astype(np.int64)
    logits = planted_logits(ranks_NS, np.where(missing_ND, 0.0, dense_ND))
    clicks = rng.random(rows) < 1.0 / (1.0 + np.exp(-logits))
    columns: dict[str, Any] = {
        f"i{feature}": pa.array(dense_ND[:, feature].astype(np.float32), mask=missing_ND[:, feature])
        for feature in range(DENSE)
    }
    for feature in range(SPARSE):  # scrambled, so that an id says nothing of how frequent it is
        scrambled = mix64(np.ascontiguousarray(ranks_NS[:, feature]), feature) >> np.uint64(1)
        columns[f"c{feature}"] = pa.array(scrambled.view(np.int64))
    return pa.table(columns | {"click": pa.array(clicks.astype(np.float32))})


def timed(table: pa.Table, day: int, first: int, rows: int) -> pa.Table:
    """The table with a column ``time`` (microseconds): its rows are those from ``first`` on of a day of ``rows``."""
    start = round((TRAIN_DAY + day * DAY).timestamp() * 1e6)
    step = round(DAY.total_seconds() * 1e6) // rows
    return table.append_column("time", pa.array(start + step * np.arange(first, first + table.num_rows)))


def write(folder: Path, rows: int, ids: tuple[int, ...], seed: int = 1) -> None:
    """Write ``train/*.parquet`` and ``test/*.parquet``, ``rows`` rows in all, a million a file."""
    held_out = round(rows * TEST_SHARE)
    for day, (part, count) in enumerate((("train", rows - held_out), ("test", held_out))):
        (folder / part).mkdir(parents=True)
        writer: pq.ParquetWriter | None = None
        for first in range(0, count, BLOCK):
            number = min(BLOCK, count - first)
            table = timed(block(number, first + day * (rows - held_out), seed, ids), day, first, count)
            if writer is None or first % (16 * BLOCK) == 0:
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(folder / part / f"part-{first // (16 * BLOCK):04}.parquet", table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
