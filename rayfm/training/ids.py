"""The vocabularies of a trainer: counted period by period, kept beside its checkpoints, published with its models.

::

    <trainer>/ids/<period>-<sha256, 16 digits>.safetensors     what was counted through a period, by table

A period's ids are counted before it is trained on, and after it was predicted: what is admitted then has learned when
it is published, and a prediction never knows of the period it is made for. A checkpoint's cursor names the period, and
with it the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from rayfm.config import RayfmError
from rayfm.config.durable import write_whole
from rayfm.data.span import rank_lanes
from rayfm.data.store import ExampleStore
from rayfm.data.vocabulary import Counted, IdsRecord, IntArray, Vocabulary, merge_counts, raw_ids
from rayfm.export.served import IDS_PREFIX
from rayfm.schema import Feature, Schema
from rayfm.snapshots.publish import TensorSlice

BLOCK_ROWS = 65_536
DIGITS = 16


class Vocabularies:
    """The vocabularies of the tables that a trainer reads; collective calls, equal on every rank.

    Args:
        schema: the pipeline's schema.
        features: names of the features that the trainer reads; None for all.
        store: the example store.
        folder: where the counts are kept.
        keep: how many periods' files to keep.
    """

    def __init__(
        self, schema: Schema, features: tuple[str, ...] | None, store: ExampleStore, folder: Path, keep: int
    ) -> None:
        self.schema, self.store, self.folder, self.keep = schema, store, folder, keep
        self._readers: dict[str, list[Feature]] = {}
        for feature in schema.features:
            read = feature.kind != "dense" and (features is None or feature.name in features)
            if read and schema.tables[feature.table_name].id_policy != "hash":
                self._readers.setdefault(feature.table_name, []).append(feature)
        self._counted = {table: Counted.nothing() for table in self._readers}
        self.current: dict[str, Vocabulary] = {}
        self.replaced: dict[str, IntArray] = {}
        """Table -> rows that the newest period gave from one id to another."""
        self._made()

    def _made(self) -> None:
        self.current = {table: counted.vocabulary(self.schema, table) for table, counted in self._counted.items()}

    def learn(self, period: str) -> dict[str, dict[str, Any]]:
        """Count the period's impressions, admit what was seen often enough, keep the counts. Every rank calls it.

        Returns:
            Table -> its `IdsRecord`, as plain values.
        """
        if not self._readers:
            return {}
        rank, world = dist.get_rank(), dist.get_world_size()
        lanes = rank_lanes(self.store.manifest(period).lanes, rank, world)
        mine = {table: count_ids(self.store, period, readers, lanes) for table, readers in self._readers.items()}
        parts: list[Any] = [mine]
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, mine)
        records: dict[str, IdsRecord] = {}
        self.replaced = {}
        for table in self._readers:
            seen_U, times_U = merge_counts([part[table] for part in parts])
            counted, records[table] = self._counted[table].grown(seen_U, times_U, self.schema.tables[table])
            self._counted[table] = counted
            self.replaced[table] = self.schema.tables[table].shared_rows + counted.replaced_K
        self._made()
        if rank == 0:
            self._write(period)
        if world > 1:
            dist.barrier()
        return {table: record.dump() for table, record in records.items()}

    def restore(self, period: str | None) -> None:
        """Go back to what was counted through ``period``; None: nothing was.

        Raises:
            RayfmError: its file is not there, or not as it was written.
        """
        if not self._readers or period is None:
            return
        found = sorted(self.folder.glob(f"{period}-*.safetensors"))
        if not found:
            raise RayfmError(
                f"{self.folder}: the vocabularies through {period} are gone, and the checkpoint needs them; start a "
                "new run"
            )
        path = found[0]
        data = path.read_bytes()
        try:
            if path.stem.rpartition("-")[2] != _digest(data):
                raise ValueError("other bytes than were written")
            arrays = load_arrays(data)
            self._counted = {
                table: Counted(*(arrays[f"{table}/{part}"] for part in ("ids", "scores", "candidates", "counts")))
                for table in self._readers
            }
        except (SafetensorError, KeyError, ValueError) as error:
            raise RayfmError(f"{path}: no vocabularies of this run ({error}); start a new run") from None
        self._made()

    def slices(self, features: tuple[str, ...] | None) -> list[TensorSlice]:
        """What a model that reads ``features`` (None: all) publishes of them: ``ids.<table>``, int64 ``[V]``."""
        tables = {
            reader.table_name
            for readers in self._readers.values()
            for reader in readers
            if features is None or reader.name in features
        }
        return [
            TensorSlice.whole(IDS_PREFIX + table, torch.from_numpy(self._counted[table].ids_V.copy()))
            for table in sorted(tables)
        ]

    def _write(self, period: str) -> None:
        arrays = {
            f"{table}/{part}": np.ascontiguousarray(value)
            for table, counted in self._counted.items()
            for part, value in (
                ("ids", counted.ids_V),
                ("scores", counted.scores_V),
                ("candidates", counted.candidates_C),
                ("counts", counted.counts_C),
            )
        }
        data = save_arrays(arrays)
        for stale in self.folder.glob(f"{period}-*.safetensors"):
            stale.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / f"{period}-{_digest(data)}.safetensors", lambda file: file.write(data))
        for old in sorted(self.folder.glob("*.safetensors"))[: -self.keep]:
            old.unlink()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def count_ids(
    store: ExampleStore, period: str, features: list[Feature], lanes: Iterable[int]
) -> tuple[IntArray, IntArray]:
    """How often each id stands in the impressions of some lanes, in any of ``features``, lists item by item.

    Returns:
        Ids ascending, none twice, and their counts: ``[U]`` each.
    """
    none = np.zeros(0, np.int64)
    parts: list[tuple[IntArray, IntArray]] = [(none, none)]
    names = [feature.name for feature in features]
    counts = {file.lane: file.rows for file, _ in store.files(period, "impression")}
    for lane in lanes:
        if not counts.get(lane):
            continue
        for block in store.open_lane(period, "impression", lane).iter_batches(BLOCK_ROWS, columns=names):
            for name in names:
                column = block.column(name)
                values = column.flatten() if pa.types.is_list(column.type) else column
                found = raw_ids(values.drop_null())
                parts.append(np.unique(found, return_counts=True))
        parts = [merge_counts(parts)]
    return merge_counts(parts)
