"""What a teacher thought of an entity's past: decayed averages of its stored representations (LoopFM, 2605.29280).

Beside the label table stands one Parquet file per (teacher, key, period):
``<root>/histories/<teacher>/<key>/<period>.parquet``. It is the state *before* the period: made of representations of
earlier periods alone, so a student may read it when it predicts the period. Each follows from the one before it,

    weight(p + 1) = decay * weight(p) + n(p),    sum(p + 1) = decay * sum(p) + sum over the period's impressions of r,

with ``vector = sum / weight``. The file of a period is written once; writing it again gives the same bytes.

Shape letters: K entities, N rows, R width of the representation.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfm.config import LabelError
from rayfm.data.store import ExampleStore
from rayfm.labels.columns import check_part
from rayfm.labels.files import one_line
from rayfm.labels.kept_pins import KeptPins
from rayfm.labels.lookup import LabelLookup
from rayfm.labels.storage import HISTORIES, Storage
from rayfm.schema import Kind
from rayfm.snapshots.metadata.base import MetadataStore

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

KEY, WEIGHT, VECTOR = "key", "weight", "vector"
FORGOTTEN = 1e-3
"""An entity whose weight has decayed below this is left out, so that the state does not grow for ever."""
ROWS_AT_ONCE = 16_384
GATHERED_VALUES = 1 << 18
"""Values, at the least, that an update gathers before it adds them to its sums."""


@dataclasses.dataclass(frozen=True)
class HistorySpec:
    """Which history: whose representations, by what, and how they are averaged."""

    teacher: str
    key: str
    decay: float
    positives_of: str | None
    width: int

    @property
    def name(self) -> str:
        """As ``HistoryFeature.name``, by which a batch knows it."""
        return f"history/{self.teacher}/{self.key}"


@dataclasses.dataclass(frozen=True)
class HistoryState:
    """The averages before a period, by entity."""

    keys: pa.Array
    """int64 or string ``[K]``, each once."""
    weight: Float64
    """``[K]``: impressions behind each average, decayed."""
    vector: Float32
    """``[K, R]``."""

    @classmethod
    def empty(cls, width: int, key_type: pa.DataType) -> HistoryState:
        """Nobody is known."""
        return cls(pa.array([], key_type), np.zeros(0), np.zeros((0, width), np.float32))

    def then(self, decay: float, rows: Iterable[tuple[pa.Array, Float32]]) -> HistoryState:
        """The state one period later.

        Memory is of the order of the state and of one part, whatever the period's rows: what is gathered joins the sums
        as soon as it is as large as they are. So time is linear in the rows too.

        Args:
            decay: what an earlier impression counts for now.
            rows: keys ``[N]`` and representations ``[N, R]`` of the period's impressions, part by part.
        """
        sums: Sums = self.keys, decay * self.weight, decay * self.weight[:, None] * self.vector.astype(np.float64)
        gathered: list[Sums] = []
        for part, vectors in rows:
            if len(part):
                keys = part.cast(self.keys.type)
                gathered.append(_grouped(keys, np.ones(len(part)), vectors.astype(np.float64)))
            if sum(total.size for _, _, total in gathered) > max(sums[2].size, GATHERED_VALUES):
                sums, gathered = _added(sums, gathered), []
        key, weight, total = _added(sums, gathered)
        kept = weight >= FORGOTTEN
        vector = (total[kept] / weight[kept, None]).astype(np.float32)
        return HistoryState(key.filter(pa.array(kept)), weight[kept], vector)


Sums = tuple[pa.Array, Float64, Float64]
"""Keys ``[K]``, each once, with their weights ``[K]`` and sums ``[K, R]``."""


def _added(sums: Sums, others: Sequence[Sums]) -> Sums:
    """All of them as one, the keys in the order in which they first stand."""
    keys, weights, totals = zip(sums, *others, strict=True)
    return _grouped(pa.concat_arrays(keys), np.concatenate(weights), np.concatenate(totals))


def _grouped(keys: pa.Array, weight: Float64, total: Float64) -> Sums:
    """Sums by key, the keys in the order of their first row."""
    if not len(keys):
        return keys, weight, total
    encoded = keys.dictionary_encode()
    code = encoded.indices.to_numpy()
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    return encoded.dictionary, np.add.reduceat(weight[order], starts), np.add.reduceat(total[order], starts, axis=0)


class HistoryStore:
    """The files of histories below ``<root>/histories``.

    Args:
        root: the label store's root, as `LabelStore`'s.
        metadata: where pins live; None for one that only reads and writes states, or whose labels nobody vacuums.

    Raises:
        ConfigError: the root is no folder and no ``s3://bucket/prefix``.
    """

    def __init__(self, root: str | Path | Storage, metadata: MetadataStore | None = None) -> None:
        self.storage, self.metadata = Storage.of(root), metadata
        self.files = self.storage.files(HISTORIES)

    def path(self, spec: HistorySpec, period: str) -> str:
        """The state before ``period``, relative to ``<root>/histories``."""
        return f"{check_part('teacher', spec.teacher)}/{check_part('key', spec.key)}/{period}.parquet"

    def _where(self, spec: HistorySpec, period: str) -> str:
        return f"{self.files.place}/{self.path(spec, period)}"

    def write(self, spec: HistorySpec, period: str, state: HistoryState, version: str | None) -> None:
        """Write the state before ``period``, durably or not at all; one that stands is replaced.

        Args:
            spec: which history.
            period: before which.
            state: what to write.
            version: the teacher's version whose labels came in last; None: there were none.

        Raises:
            LabelError: it cannot be written.
        """
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(state.vector.reshape(-1)), spec.width)
        meta = {"rayfm": json.dumps({**dataclasses.asdict(spec), "version": version})}
        table = pa.table({KEY: state.keys, WEIGHT: state.weight, VECTOR: vectors}).replace_schema_metadata(meta)
        self.files.put(self.path(spec, period), lambda file: pq.write_table(table, file, compression="zstd"))

    def stands(self, spec: HistorySpec, period: str) -> bool:
        """Whether there is a state before ``period``.

        Raises:
            LabelError: the storage cannot be asked.
        """
        try:
            (size,) = self.files.sizes([self.path(spec, period)])
        except OSError as error:
            raise LabelError(f"{self._where(spec, period)}: cannot be seen ({one_line(error)}); check access") from None
        return size is not None

    def read(self, spec: HistorySpec, period: str) -> HistoryState:
        """The state before ``period``.

        Raises:
            LabelError: it is not there, corrupt, or another history's.
        """
        where = self._where(spec, period)
        try:
            with self.files.read(self.path(spec, period)) as file:
                table = pq.read_table(file)
        except FileNotFoundError:
            raise LabelError(f"{where}: no history before this period; label the periods in order") from None
        except (OSError, pa.ArrowInvalid) as error:
            raise LabelError(
                f"{where}: corrupt history ({one_line(error)}); remove it and label the period again"
            ) from None
        made = json.loads((table.schema.metadata or {}).get(b"rayfm", b"{}"))
        for field, value in dataclasses.asdict(spec).items():
            if made.get(field) != value:
                raise LabelError(
                    f"{where}: made with {field} {made.get(field)!r}, asked with {value!r}; start a new run, or remove "
                    "the folder and the labels after it"
                )
        vectors = table[VECTOR].combine_chunks()
        flat = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, spec.width)
        return HistoryState(table[KEY].combine_chunks(), table[WEIGHT].to_numpy(), flat)

    def advance(
        self,
        spec: HistorySpec,
        store: ExampleStore,
        period: str,
        before: tuple[str, str, int] | None,
    ) -> None:
        """Make the state before ``period``; nothing is done where it stands. The labels are pinned while they are read.

        Args:
            spec: which history.
            store: the example store.
            period: before which.
            before: the period before it, with the teacher's version and the version of the label table that hold its
                labels; None where the teacher labelled none.

        Raises:
            LabelError: the state before the period before it is missing; or representations are, or their width is
                another; or the table version cannot be pinned any more.
            DataError: the examples of the period before it cannot be read.
        """
        if self.stands(spec, period):
            return
        if before is None:
            self.write(spec, period, HistoryState.empty(spec.width, _key_type(store, period, spec.key)), None)
            return
        earlier, version, table_version = before
        with KeptPins(self.storage, self.metadata, f"{spec.name} before {period}") as pins:
            pin = pins.pin(spec.teacher, version, table_version)
            lookup = LabelLookup(pin, spec.teacher, version, (), spec.width)
            state = self.read(spec, earlier).then(spec.decay, _rows(spec, store, earlier, lookup))
        self.write(spec, period, state, version)


def _key_type(store: ExampleStore, period: str, key: str) -> pa.DataType:
    manifest = store.manifest(period)
    for lane in range(manifest.lanes):
        if manifest.lane_rows("impression", lane):
            return store.open_lane(period, "impression", lane).schema_arrow.field(key).type
    return pa.int64()


def _rows(
    spec: HistorySpec, store: ExampleStore, period: str, lookup: LabelLookup
) -> Iterator[tuple[pa.Array, Float32]]:
    """Keys and representations of a period's impressions that have both, a bounded number of rows at a time."""
    manifest = store.manifest(period)
    columns = ["example_id", spec.key, *([spec.positives_of] if spec.positives_of else [])]
    for lane in range(manifest.lanes):
        if not manifest.lane_rows("impression", lane):
            continue
        start = 0
        file = store.open_lane(period, "impression", lane)
        for block in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            stop = start + block.num_rows
            ids = block["example_id"].to_numpy(zero_copy_only=False)
            vectors, known = lookup.vectors(period, "impression", lane, start, stop, ids)
            wanted = pc.and_(pa.array(known), block[spec.key].is_valid())
            if spec.positives_of is not None:
                wanted = pc.and_(wanted, pc.fill_null(pc.greater(block[spec.positives_of], 0), False))
            chosen = wanted.to_numpy(zero_copy_only=False)
            yield block[spec.key].filter(wanted), vectors[chosen]
            start = stop


class HistoryLookup:
    """The histories of a period's rows, by place: what a reader asks for beside supervision.

    Args:
        root: the label store's root, as `LabelStore`'s. It does not travel with the look-up, which has the state.
        spec: which history.
        store: the example store, whose rows have the keys.
        period: the period that is read; the state before it is what its rows get.

    Raises:
        LabelError: there is no such state.
    """

    def __init__(self, root: str | Path | Storage, spec: HistorySpec, store: ExampleStore, period: str) -> None:
        self.name, self.width = spec.name, spec.width
        self.spec, self.store, self.period = spec, store, period
        self.state = HistoryStore(root).read(spec, period)
        self._lanes: dict[tuple[Kind, int], _LaneKeys] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {"_lanes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def vectors(self, period: str, kind: Kind, lane: int, start: int, stop: int, ids: Int64) -> tuple[Float32, Bool]:
        """Averages ``[stop - start, R]`` (0 where there is none) and mask of rows ``[start, stop)`` of a lane.

        Raises:
            LabelError: the rows are of another period than the state.
        """
        if period != self.period:
            raise LabelError(f"{self.name}: the state is the one before {self.period}, the rows are of {period}")
        with self._lock:
            if (kind, lane) not in self._lanes:
                self._lanes[kind, lane] = _LaneKeys(self.store.open_lane(period, kind, lane), self.spec.key, self.state)
            place = self._lanes[kind, lane].places(start, stop)
        known = place >= 0
        vectors = np.zeros((stop - start, self.width), np.float32)
        vectors[known] = self.state.vector[place[known]]
        return vectors, known


class _LaneKeys:
    """Where the entities of a lane's rows stand in a state, one row group at a time."""

    def __init__(self, file: pq.ParquetFile, key: str, state: HistoryState) -> None:
        self.file, self.key, self.keys = file, key, state.keys
        counts = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        self.bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._kept: dict[int, Int64] = {}

    def places(self, start: int, stop: int) -> Int64:
        """Position in the state ``[stop - start]``, -1 for entities that it does not have."""
        first, last = np.searchsorted(self.bounds, (start, stop - 1), side="right") - 1
        groups = range(int(first), int(last) + 1) if stop > start else range(0)
        self._kept = {group: self._kept[group] if group in self._kept else self._load(group) for group in groups}
        parts = [self._kept[group][max(0, start - self.bounds[group]) : stop - self.bounds[group]] for group in groups]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _load(self, group: int) -> Int64:
        column = self.file.read_row_group(group, columns=[self.key], use_threads=False)[self.key]
        place = pc.fill_null(pc.index_in(column.cast(self.keys.type), value_set=self.keys, skip_nulls=True), -1)
        found: Int64 = place.to_numpy().astype(np.int64)
        return found
