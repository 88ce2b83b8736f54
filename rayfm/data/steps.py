"""Which rows make which global step: the arithmetic that both readers share, so that their batches are equal.

Global step k takes rows ``[k * b, (k + 1) * b)`` of each lane, b = batch size / lanes. A consideration joins the step
of the first impression of its lane that is not earlier; those after the lane's last impression join its last step.
Which considerations are read is the choice of a sampling policy (sampling.py).
Nothing here knows how many workers there are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayfm.config import ConfigError, DataError
from rayfm.data.kinds import CONSIDERATION, IMPRESSION
from rayfm.data.sampling import SamplingPolicy, Scale, policy_of
from rayfm.data.store import ExampleStore, PeriodManifest
from rayfm.schema import EXAMPLE_ID, LOGGED_PREFIX, TIME, Kind, unit_interval

CONSIDERATION_SALT = 0x5EED
"""Salt of the hash that samples considerations."""

STEP, KIND, SUPERVISION, SUPERVISION_MASK = "__step", "__kind", "__supervision", "__supervision_mask"
REPRESENTATION, REPRESENTATION_MASK = "__representation", "__representation_mask"

WEIGHT = "sampling_weight"

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


class Lookup(Protocol):
    """Supervision by place: what the label store (or the simulator's truth) knows about rows of a lane."""

    columns: tuple[str, ...]
    """Names of the supervision columns, ``S'`` of them."""

    def rows(
        self, period: str, kind: Kind, lane: int, start: int, stop: int, ids: npt.NDArray[np.int64]
    ) -> tuple[Float32, Bool]:
        """Values ``[stop - start, S']`` and mask of rows ``[start, stop)`` of a lane whose example ids are ``ids``."""
        ...


class RepresentationLookup(Protocol):
    """Stored representations by place: what the label store knows about rows of a lane beside the predictions."""

    name: str
    """As in ``Batch.representation_widths``."""
    width: int
    """R."""

    def vectors(
        self, period: str, kind: Kind, lane: int, start: int, stop: int, ids: npt.NDArray[np.int64]
    ) -> tuple[Float32, Bool]:
        """Values ``[stop - start, R]`` (0 where there is none) and mask ``[stop - start]``, as `Lookup.rows`."""
        ...


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """What a reader reads, apart from which rank it is."""

    store: ExampleStore
    columns: tuple[str, ...]
    """Columns of the example store (reserved ones are read where present)."""
    batch_size: int
    """Global batch size in impressions, a multiple of the number of lanes."""
    supervision: tuple[str, ...] = ()
    lookups: tuple[Lookup, ...] = ()
    consideration_share: float | SamplingPolicy = 0.0
    """Share of the considerations to read, or a policy; rows are chosen by a hash of the example id."""
    representations: tuple[tuple[str, int], ...] = ()
    """Name and width of the stored representations to read; one that no look-up has is masked."""
    representation_lookups: tuple[RepresentationLookup, ...] = ()

    @property
    def sampling(self) -> SamplingPolicy:
        """Which considerations are read."""
        return policy_of(self.consideration_share)

    def rows_per_lane(self, lanes: int) -> int:
        if self.batch_size % lanes:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of the {lanes} lanes of {self.store.root}; "
                f"take {max(1, self.batch_size // lanes) * lanes}"
            )
        return self.batch_size // lanes


def count_steps(plan: ReadPlan, manifest: PeriodManifest) -> int:
    """Steps of a period: every rank takes this many."""
    longest = max((manifest.lane_rows("impression", lane) for lane in range(manifest.lanes)), default=0)
    return math.ceil(longest / plan.rows_per_lane(manifest.lanes))


@dataclasses.dataclass
class LaneSteps:
    """Where the steps of one lane lie: computed once per lane and period from its time columns."""

    impressions: int
    per_step: int
    considerations: npt.NDArray[np.int64]
    """Rows of the sampled considerations."""
    consideration_steps: npt.NDArray[np.int64]
    """Step of each sampled consideration; rises."""
    consideration_weights: Float32 | None = None
    """Inverse probability of each sampled consideration, where the policy weighs by it."""

    @classmethod
    def of(cls, plan: ReadPlan, manifest: PeriodManifest, lane: int, scale: Callable[[], Scale]) -> LaneSteps:
        per_step = plan.rows_per_lane(manifest.lanes)
        impressions = manifest.lane_rows("impression", lane)
        empty = np.zeros(0, np.int64)
        policy = plan.sampling
        if policy.nothing or not manifest.lane_rows("consideration", lane) or not impressions:
            return cls(impressions, per_step, empty, empty)
        times = _read_column(plan.store, manifest.period, "impression", lane, TIME)
        names = tuple(dict.fromkeys((EXAMPLE_ID, TIME, *policy.columns)))
        table = _read_lane(plan.store, manifest.period, "consideration", lane, names)
        ids, seen = (table[name].to_numpy() for name in (EXAMPLE_ID, TIME))
        probability = policy.probability(table, scale())
        rows = np.flatnonzero(unit_interval(ids, CONSIDERATION_SALT) < probability)
        position = np.minimum(np.searchsorted(times, seen[rows], "left"), impressions - 1)
        weights = (1 / probability[rows]).astype(np.float32) if policy.reweight else None
        return cls(impressions, per_step, rows, position // per_step, weights)


def period_scale(plan: ReadPlan, manifest: PeriodManifest) -> Scale:
    """What the sampling policy's probabilities need to know of a whole period: the same in every process.

    Raises:
        DataError: the period lacks a column that the policy reads.
    """
    policy, period = plan.sampling, manifest.period
    missing = [name for name in policy.columns if name not in manifest.columns]
    if missing:
        raise DataError(
            f"{plan.store.period_dir(period)}: column {missing[0]!r} is missing, and the policy of consideration_share "
            "chooses by it; prepare the period from a log that has it, or take another policy"
        )

    def parts() -> Iterator[pa.Table]:
        for lane in range(manifest.lanes):
            if manifest.lane_rows("consideration", lane):
                yield from _read_groups(plan.store, period, "consideration", lane, policy.columns)

    return policy.scale(parts, manifest.rows("impression"), manifest.rows("consideration"))


class LaneCache:
    """Opened lane files and step boundaries of the period being read."""

    def __init__(self, plan: ReadPlan) -> None:
        self.plan = plan
        self._period = ""
        self._manifest: PeriodManifest | None = None
        self._steps: dict[int, LaneSteps] = {}
        self._scale: Scale | None = None
        self._files: dict[tuple[Kind, int], _LaneFile] = {}

    def manifest(self, period: str) -> PeriodManifest:
        if period != self._period or self._manifest is None:
            self._manifest = self.plan.store.manifest(period)
            self._period = period
            self._steps.clear()
            self._scale = None
            self._files.clear()
        return self._manifest

    def steps(self, period: str, lane: int) -> LaneSteps:
        manifest = self.manifest(period)
        if lane not in self._steps:
            self._steps[lane] = LaneSteps.of(self.plan, manifest, lane, lambda: self._period_scale(manifest))
        return self._steps[lane]

    def _period_scale(self, manifest: PeriodManifest) -> Scale:
        if self._scale is None:
            self._scale = period_scale(self.plan, manifest)
        return self._scale

    def read(self, period: str, kind: Kind, lane: int, start: int, stop: int) -> pa.Table:
        """Rows ``[start, stop)`` of a lane: the row groups that overlap, cut without a copy."""
        self.manifest(period)
        lane_file = self._files.get((kind, lane))
        if lane_file is None:
            opened = self.plan.store.open_lane(period, kind, lane)
            lane_file = self._files[kind, lane] = _LaneFile(opened, self.plan.columns)
        try:
            return lane_file.read(start, stop)
        except (OSError, pa.ArrowInvalid) as error:
            raise _corrupt(self.plan.store.lane_path(period, kind, lane), period, error) from None


class _LaneFile:
    """An open lane file and the row groups decoded last."""

    def __init__(self, file: pq.ParquetFile, columns: Sequence[str]) -> None:
        names = set(file.schema_arrow.names)
        self.file, self.columns = file, [name for name in columns if name in names]
        metadata = file.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.bounds = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        """Row group g has rows ``[bounds[g], bounds[g + 1])``."""
        self._held: dict[int, pa.Table] = {}

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows ``[start, stop)``, at least one: the row groups that overlap, cut without a copy."""
        first, last = np.searchsorted(self.bounds, [start, stop - 1], "right") - 1
        groups = range(int(first), int(last) + 1)
        # A chunk is smaller than a row group: what was decoded for the chunk before is not decoded again.
        held = self._held
        self._held = {
            group: held[group] if group in held else self.file.read_row_group(group, self.columns, use_threads=False)
            for group in groups
        }
        offset = start - int(self.bounds[first])
        return pa.concat_tables(self._held.values()).slice(offset, stop - start)


@dataclasses.dataclass(frozen=True)
class StepRows:
    """Rows of consecutive steps, in step order but for the columns of the example store.

    Shape letters: N rows, S supervision columns, V stored representations, R their width.
    """

    table: pa.Table
    """The store's columns, lane by lane."""
    order: npt.NDArray[np.int64] | None
    """``[N]``: row i is row ``order[i]`` of ``table``; None: row i."""
    step: npt.NDArray[np.int64]
    """``[N]``; rises."""
    kind: npt.NDArray[np.int64]
    """``[N]``"""
    supervision: Float32
    """``[N, S]``"""
    supervision_mask: Bool
    representation: Float32 | None
    """``[N, sum of R]``; None where the plan reads none."""
    representation_mask: Bool | None
    """``[N, V]``"""

    def ordered(self) -> pa.Table:
        """The store's columns in step order, copied."""
        return self.table if self.order is None else self.table.take(pa.array(self.order))


def read_steps(plan: ReadPlan, cache: LaneCache, period: str, lanes: Sequence[int], first: int, last: int) -> StepRows:
    """The rows of ``lanes`` for steps ``[first, last)``."""
    policy, pieces = plan.sampling, list[_Piece]()
    for lane in lanes:
        boundaries = cache.steps(period, lane)
        per_step = boundaries.per_step
        start = min(first * per_step, boundaries.impressions)
        stop = min(last * per_step, boundaries.impressions)
        if stop > start:
            rows = np.arange(start, stop)
            table = cache.read(period, "impression", lane, start, stop)
            if policy.reweight:  # so that every block of a reader has the column
                table = reweighted(table, np.ones(table.num_rows, np.float32))
            pieces.append(_Piece(plan, table, period, "impression", lane, rows, rows // per_step))
        chosen = slice(*np.searchsorted(boundaries.consideration_steps, [first, last], "left"))
        rows = boundaries.considerations[chosen]
        if len(rows):
            table = cache.read(period, "consideration", lane, int(rows[0]), int(rows[-1]) + 1)
            if len(rows) < table.num_rows:
                table = table.take(pa.array(rows - rows[0]))
            if boundaries.consideration_weights is not None:
                table = reweighted(table, boundaries.consideration_weights[chosen])
            pieces.append(
                _Piece(plan, table, period, "consideration", lane, rows, boundaries.consideration_steps[chosen])
            )
    if not pieces:
        table = plan.store.open_lane(period, "impression", 0).schema_arrow.empty_table()
        none = np.zeros(0, np.int64)
        shape = (0, len(plan.supervision))
        values, mask = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
        return StepRows(table, None, none, none, values, mask, *_representation(plan, [], none))
    step = np.concatenate([piece.step for piece in pieces])
    order = np.argsort(step, kind="stable")
    supervision = [_supervision(plan, piece) for piece in pieces]
    representation, representation_mask = _representation(plan, pieces, order)
    kinds = [
        np.full(len(piece.rows), IMPRESSION if piece.kind == "impression" else CONSIDERATION, np.int64)
        for piece in pieces
    ]
    return StepRows(
        table=pa.concat_tables([piece.table for piece in pieces], promote_options="default"),
        order=order if len(pieces) > 1 else None,
        step=step[order],
        kind=np.concatenate(kinds)[order],
        supervision=np.concatenate([values for values, _ in supervision])[order],
        supervision_mask=np.concatenate([mask for _, mask in supervision])[order],
        representation=representation,
        representation_mask=representation_mask,
    )


class _Piece:
    """Rows of one lane, and the run of consecutive rows around them, which is what look-ups are asked for.

    Args:
        plan: what is read.
        table: the rows' columns.
        period, kind, lane: where they lie.
        rows: their positions in the lane; rise.
        step: the step of each.
    """

    def __init__(
        self,
        plan: ReadPlan,
        table: pa.Table,
        period: str,
        kind: Kind,
        lane: int,
        rows: npt.NDArray[np.int64],
        step: npt.NDArray[np.int64],
    ) -> None:
        self.plan, self.table, self.rows, self.step = plan, table, rows, step
        self.period, self.kind, self.lane = period, kind, lane
        self.start, self.stop = int(rows[0]), int(rows[-1]) + 1

    @functools.cached_property
    def run_ids(self) -> npt.NDArray[np.int64]:
        """Example ids of rows ``[start, stop)``."""
        if self.whole:
            ids: npt.NDArray[np.int64] = self.table[EXAMPLE_ID].to_numpy()
            return ids
        return _read_column(self.plan.store, self.period, self.kind, self.lane, EXAMPLE_ID)[self.start : self.stop]

    @property
    def whole(self) -> bool:
        """Whether the run has no other rows."""
        return self.stop - self.start == len(self.rows)

    def ask(self, call: Callable[..., tuple[Float32, Bool]]) -> tuple[Float32, Bool]:
        """What a look-up's method says of the rows."""
        values, mask = call(self.period, self.kind, self.lane, self.start, self.stop, self.run_ids)
        return (values, mask) if self.whole else (values[self.rows - self.start], mask[self.rows - self.start])


def _supervision(plan: ReadPlan, piece: _Piece) -> tuple[Float32, Bool]:
    """Values ``[n, S]`` and mask of a piece's rows."""
    table = piece.table
    values = np.zeros((len(piece.rows), len(plan.supervision)), np.float32)
    mask = np.zeros((len(piece.rows), len(plan.supervision)), np.bool_)
    found: dict[str, tuple[Float32, Bool]] = {}
    for lookup in plan.lookups:
        if not set(lookup.columns) & set(plan.supervision):
            continue
        value, known = piece.ask(lookup.rows)
        found |= {name: (value[:, i], known[:, i]) for i, name in enumerate(lookup.columns)}
    for position, name in enumerate(plan.supervision):
        if name in found:
            values[:, position], mask[:, position] = found[name]
        elif name.startswith(LOGGED_PREFIX) and name in table.column_names:
            column = table[name].combine_chunks()
            mask[:, position] = column.is_valid().to_numpy(zero_copy_only=False)
            values[:, position] = pc.fill_null(column, pa.scalar(0.0, column.type)).to_numpy(zero_copy_only=False)
    return values, mask


def _representation(
    plan: ReadPlan, pieces: Sequence[_Piece], order: npt.NDArray[np.int64]
) -> tuple[Float32 | None, Bool | None]:
    """Values ``[N, sum of R]`` and mask ``[N, V]`` of the pieces' rows in ``order``.

    The look-ups answer with views of what Arrow read, and each row is copied once, to its place: representations are
    wide.
    """
    if not plan.representations:
        return None, None
    rows = len(order)
    values = np.zeros((rows, sum(width for _, width in plan.representations)), np.float32)
    mask = np.zeros((rows, len(plan.representations)), np.bool_)
    place = np.empty(rows, np.int64)
    place[order] = np.arange(rows)
    lookups = {(lookup.name, lookup.width): lookup for lookup in plan.representation_lookups}
    first = 0
    for piece in pieces:
        target = place[first : first + len(piece.rows)]
        first += len(piece.rows)
        column = 0
        for position, (name, width) in enumerate(plan.representations):
            lookup = lookups.get((name, width))
            if lookup is not None:
                values[target, column : column + width], mask[target, position] = piece.ask(lookup.vectors)
            column += width
    return values, mask


def _corrupt(path: Path, period: str, error: Exception) -> DataError:
    why = " ".join(str(error).split())  # Arrow's messages have several lines
    return DataError(f"{path}: corrupt Parquet file ({why}); prepare period {period} again")


def reweighted(table: pa.Table, weight: Float32) -> pa.Table:
    """``table`` with its sampling weights, 1 where it has none, multiplied by ``weight`` ``[n]``."""
    if WEIGHT not in table.column_names:
        return table.append_column(WEIGHT, pa.array(weight))
    column = table[WEIGHT]
    own = pc.fill_null(column, pa.scalar(1.0, column.type)).to_numpy().astype(np.float32, copy=False)
    return table.set_column(table.column_names.index(WEIGHT), WEIGHT, pa.array(own * weight))


def _read_lane(store: ExampleStore, period: str, kind: Kind, lane: int, names: Sequence[str]) -> pa.Table:
    file = store.open_lane(period, kind, lane)
    try:
        return file.read(columns=list(names), use_threads=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise _corrupt(store.lane_path(period, kind, lane), period, error) from None


def _read_groups(store: ExampleStore, period: str, kind: Kind, lane: int, names: Sequence[str]) -> Iterator[pa.Table]:
    """A lane's row groups one by one: what is summed over a period need not be held at once."""
    file = store.open_lane(period, kind, lane)
    for group in range(file.num_row_groups):
        try:
            table = file.read_row_group(group, list(names), use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise _corrupt(store.lane_path(period, kind, lane), period, error) from None
        yield table


def _read_column(store: ExampleStore, period: str, kind: Kind, lane: int, name: str) -> npt.NDArray[np.int64]:
    values: npt.NDArray[np.int64] = _read_lane(store, period, kind, lane, [name])[name].to_numpy()
    return values


class TruthLookup:
    """The simulator's true probabilities, for evaluation alone: columns ``truth/<task>``."""

    def __init__(self, store: ExampleStore, columns: tuple[str, ...]) -> None:
        self.store, self.columns = store, columns
        self._cached: tuple[tuple[str, Kind, int], Float32] | None = None

    def rows(
        self, period: str, kind: Kind, lane: int, start: int, stop: int, ids: npt.NDArray[np.int64]
    ) -> tuple[Float32, Bool]:
        """As `Lookup.rows`; truth files have their lane's order."""
        key = (period, kind, lane)
        if self._cached is None or self._cached[0] != key:
            table = pq.read_table(self.store.truth_path(period, kind, lane), columns=list(self.columns))
            self._cached = key, np.stack([table[name].to_numpy() for name in self.columns], 1).astype(np.float32)
        values = self._cached[1][start:stop]
        return values, ~np.isnan(values)
