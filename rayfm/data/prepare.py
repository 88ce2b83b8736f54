"""Raw logs into the example store, period by period, as a stream.

::

    source.dataset --map: validate, sort, spill--> <root>/.staging --reduce: merge, deal to lanes--> <root>/examples

The memory of a task does not grow with the log; the bytes written do not depend on how many tasks there were. A period
is complete when its manifest stands, so a killed run is simply run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import DataError, RayfmError
from rayfm.config.nodes import NodeLabels
from rayfm.data.capacity import check_disk, estimate_bytes
from rayfm.data.conform import store_schema
from rayfm.data.lanes import LaneWriter
from rayfm.data.lock import prepare_lock
from rayfm.data.rejects import write_rejects
from rayfm.data.sources.base import KIND_COLUMN, Period, Source
from rayfm.data.staging import (
    UNKNOWN_PERIOD,
    WINDOW_ROWS,
    Fragment,
    disk_errors,
    duplicated_ids,
    fragment_columns,
    merge_sorted,
    stage_rejects,
    stage_rows,
)
from rayfm.data.store import MANIFEST, ExampleStore, PeriodManifest
from rayfm.data.validate import split_duplicates
from rayfm.schema import KINDS, Kind, Schema

if TYPE_CHECKING:
    import ray.data

FORMAT = 1
"""Version of what prepare writes; part of the hash that says whether a period can be reused."""

STAGING = ".staging"

Progress = Callable[[str, int, int], None]
"""Called with a phase (``read``, ``write``), what is done and the total (rows read, periods written; total 0: unknown).
"""


def source_hash(source: Source, schema: Schema, lanes: int) -> str:
    """What a period was prepared from: 16 hex digits of the SHA-256 of the configuration."""
    described = {"format": FORMAT, "source": source.config.dump(), "schema": _stored(schema), "lanes": lanes}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _stored(schema: Schema) -> dict[str, Any]:
    """What of the schema shapes the files: not the tables, nor what is done with a value when it is read."""
    stored = schema.dump()
    del stored["tables"]
    read_later = ("table", "transform", "mean", "std", "missing")
    for feature in stored["features"]:
        for name in read_later:
            del feature[name]
    return stored


@dataclasses.dataclass(frozen=True)
class _Tasks:
    """What each task asks for, how many run at once (None: what there is room for), and on which nodes."""

    cpus: float
    at_once: int | None
    nodes: NodeLabels


def prepare(
    source: Source,
    schema: Schema,
    store: ExampleStore,
    lanes: int = 8,
    progress: Progress | None = None,
    cpus_per_task: float = 0.25,
    only: Collection[str] | None = None,
    tasks: int | None = None,
    nodes: NodeLabels | None = None,
) -> list[PeriodManifest]:
    """Write every period of ``source`` that ``store`` lacks; the manifests of all of them, in time order.

    Args:
        lanes: L; rows of a (period, kind) in time order are dealt to the lanes in turn.
        cpus_per_task: CPUs that each Ray task asks for; a fraction lets prepare run beside trainers.
        nodes: labels of the nodes that tasks run on.
        only: names of the periods to write, where more may still be added to the others; by default all.
        tasks: how many tasks read at once; by default as many as the cluster has room for, now and when it has grown.
            Each has a process of its own, which costs CPU-seconds to start: more than there are CPUs only slow it down.

    Raises:
        DataError: the logs are missing, unreadable or of the wrong columns or types; a period has no impressions; a
            period in the store was prepared from another configuration; the store cannot be written, or another
            process is preparing it.
        CapacityError: too little disk.
    """
    store = ExampleStore(store.root.expanduser().absolute())  # a Ray task may run in another folder
    periods = source.periods()
    if not periods:
        raise DataError("the source has no periods; check its path and its start and end")
    digest = source_hash(source, schema, lanes)
    options = _Tasks(cpus_per_task, tasks, nodes or {})
    missing = _wanted(missing_periods(source, schema, store, lanes), only)
    if missing:
        share = len(missing) / len(periods)
        check_disk(store.root, round(estimate_bytes(source.estimated_rows(), schema) * share))
        with prepare_lock(store.root):
            # Who held the lock until now may have written some of them.
            missing = _wanted(missing_periods(source, schema, store, lanes), only)
            if missing:
                _write_missing(source, schema, store, lanes, digest, periods, missing, progress, options)
    return [store.manifest(period.name) for period in _wanted(periods, only)]


def _wanted(periods: list[Period], only: Collection[str] | None) -> list[Period]:
    return [period for period in periods if only is None or period.name in only]


def _write_missing(
    source: Source,
    schema: Schema,
    store: ExampleStore,
    lanes: int,
    digest: str,
    periods: list[Period],
    missing: list[Period],
    progress: Progress | None,
    options: _Tasks,
) -> None:
    staging = store.root / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    try:
        source.cpus_per_task, source.scratch = options.cpus, staging / "source"
        fragments = _stage(source, schema, periods, missing, staging, progress, options)
        unknown = [fragment for fragment in fragments if fragment.period == UNKNOWN_PERIOD]
        write_rejects(store.rejects_path(UNKNOWN_PERIOD), unknown)
        work = [(period, [fragment for fragment in fragments if fragment.period == period.name]) for period in missing]
        for period, own in work:
            _refuse_empty(period, own)
        _reduce(work, schema, store, lanes, digest, progress, options)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def missing_periods(source: Source, schema: Schema, store: ExampleStore, lanes: int) -> list[Period]:
    """Periods of ``source`` that ``store`` lacks.

    Raises:
        DataError: a period in the store was prepared from another configuration.
    """
    digest = source_hash(source, schema, lanes)
    return [period for period in source.periods() if not _is_prepared(store, period.name, digest)]


def _is_prepared(store: ExampleStore, period: str, digest: str) -> bool:
    if not (store.period_dir(period) / MANIFEST).exists():
        return False
    if store.manifest(period).source != digest:
        raise DataError(
            f"{store.period_dir(period)}: prepared from another source, schema or number of lanes; choose another "
            "example store root, or remove the period"
        )
    return True


def _refuse_empty(period: Period, fragments: Sequence[Fragment]) -> None:
    if any(fragment.first_times for fragment in fragments):
        return
    counts = _rejected(fragments)
    why = f"; rejected: {', '.join(f'{count} for {reason}' for reason, count in counts.items())}" if counts else ""
    raise DataError(
        f"period {period.name} has no impressions{why}; fix the log, or set the source's start and end around it"
    )


def _rejected(fragments: Sequence[Fragment]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for fragment in fragments:
        for reason, rows in fragment.rejected.items():
            counts[reason] = counts.get(reason, 0) + rows
    return dict(sorted(counts.items()))


def _stage(
    source: Source,
    schema: Schema,
    periods: list[Period],
    missing: list[Period],
    staging: Path,
    progress: Progress | None,
    options: _Tasks,
) -> list[Fragment]:
    stage = functools.partial(
        _stage_block,
        schema=schema,
        periods=periods,
        wanted=frozenset(period.name for period in missing),
        folder=staging,
    )
    fragments: list[Fragment] = []
    rows, expected = 0, source.estimated_rows()
    with _quiet_ray_data(options), _user_errors():
        dataset: ray.data.Dataset = source.dataset(missing)
        written = dataset.map_batches(stage, batch_size=None, batch_format="pyarrow", num_cpus=options.cpus)
        for block in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            new = [Fragment.model_validate_json(text) for text in pa.table(block)["fragment"].to_pylist()]
            fragments += new
            rows += sum(fragment.rows for fragment in new)
            if progress is not None:
                progress("read", rows, max(expected, rows))
    return fragments


def _stage_block(
    table: pa.Table, schema: Schema, periods: list[Period], wanted: frozenset[str], folder: Path
) -> Iterator[pa.Table]:
    # A generator, since Ray Data keeps the type of an error that a generator raises (and of a function's it does not).
    fragments = stage_rows(table, schema, periods, wanted, folder)
    yield pa.table({"fragment": pa.array([fragment.model_dump_json() for fragment in fragments], pa.string())})


@contextlib.contextmanager
def _quiet_ray_data(tasks: _Tasks) -> Iterator[None]:
    """Ray Data without progress bars and messages; what is run inside has no more tasks, and on no other nodes."""
    import ray.data

    context = ray.data.DataContext.get_current()
    options, bars, logger = context.execution_options, context.enable_progress_bars, logging.getLogger("ray.data")
    level, limits, selector = logger.level, options.resource_limits, options.label_selector
    context.enable_progress_bars = False
    if tasks.at_once is not None:
        options.resource_limits = limits.copy(cpu=tasks.at_once * tasks.cpus)
    options.label_selector = tasks.nodes or None
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars, options.resource_limits, options.label_selector = bars, limits, selector
        logger.setLevel(level)


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Let a RayfmError that was raised in a Ray task come out as itself, without Ray's wrapping and traceback."""
    try:
        yield
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, RayfmError):
            # Ray adds lines of its own after ours.
            raise type(cause)(str(cause).split("\n", 1)[0]) from None
        raise


def _reduce(
    work: list[tuple[Period, list[Fragment]]],
    schema: Schema,
    store: ExampleStore,
    lanes: int,
    digest: str,
    progress: Progress | None,
    options: _Tasks,
) -> None:
    """Few tasks with several periods each, at most one a CPU at a time, the earliest periods first."""
    import ray

    cluster: Any = ray  # parts of Ray's API have no types
    cpus = max(1, int(cluster.cluster_resources().get("CPU", 1)))
    groups = [group.tolist() for group in np.array_split(np.arange(len(work)), min(len(work), 2 * cpus))]
    task = ray.remote(num_cpus=options.cpus, label_selector=options.nodes)(_write_periods)
    running: dict[Any, int] = {}
    done = 0
    try:
        while groups or running:
            while groups and len(running) < cpus:
                group = groups.pop(0)
                entry = task.remote([work[position] for position in group], schema, store.root, lanes, digest)
                running[entry] = len(group)
            ready, _ = ray.wait(list(running))
            for entry in ready:
                count = running.pop(entry)
                with _user_errors():
                    ray.get(entry)
                done += count
            if progress is not None:
                progress("write", done, len(work))
    finally:
        for entry in running:
            ray.cancel(entry)


def _write_periods(
    work: list[tuple[Period, list[Fragment]]], schema: Schema, root: Path, lanes: int, digest: str
) -> None:
    store = ExampleStore(root)
    for period, fragments in work:
        if not (store.period_dir(period.name) / MANIFEST).exists():  # a retried task may have written some
            write_period(period, fragments, schema, store, lanes, digest)


def write_period(
    period: Period,
    fragments: Sequence[Fragment],
    schema: Schema,
    store: ExampleStore,
    lanes: int,
    digest: str,
    window_rows: int = WINDOW_ROWS,
) -> PeriodManifest:
    """Merge a period's staged fragments into its lanes.

    The lanes are written in the staging folder and moved into place with their manifest in one step, so that whatever a
    killed run still does cannot mix with them.

    Raises:
        DataError: no impression was left.
        CapacityError: the disk is full.
    """
    # In path order nothing depends on which task wrote what; the merge's own order is by time and id.
    good = sorted((fragment for fragment in fragments if fragment.first_times), key=lambda fragment: fragment.path)
    bad = [fragment for fragment in fragments if fragment.rejected]
    staging = Path(good[0].path).parents[1]
    scratch = ExampleStore(staging / f"out-{uuid.uuid4().hex}")
    columns = store_schema(schema, fragment_columns(good))
    lane_columns = columns.remove(columns.get_field_index(KIND_COLUMN))
    duplicated = duplicated_ids(good)
    seen = np.zeros(len(duplicated), np.bool_)
    writers: dict[Kind, LaneWriter] = {}
    with disk_errors(store.root):
        for window in merge_sorted(good, columns, window_rows):
            window, again = split_duplicates(window, duplicated, seen)
            if again.num_rows:
                bad += stage_rejects(again, [period], frozenset([period.name]), staging)
            kinds = window[KIND_COLUMN]
            for kind in KINDS:
                chosen = pc.equal(kinds, kind)
                count = pc.sum(chosen, min_count=0).as_py()
                if count:
                    rows = (window if count == window.num_rows else window.filter(chosen)).drop_columns(KIND_COLUMN)
                    if kind not in writers:
                        writers[kind] = LaneWriter(scratch, period.name, kind, lanes, schema, lane_columns)
                    writers[kind].write(rows)
        write_rejects(store.rejects_path(period.name), bad)
        if "impression" not in writers:
            raise DataError(
                f"period {period.name} has considerations but no impressions; fix the log, or set the source's start "
                "and end around it"
            )
        files = [file for kind in KINDS if kind in writers for file in writers[kind].close()]
    truth = tuple(name for name in lane_columns.names if name.startswith("truth/"))
    manifest = PeriodManifest(
        period=period.name,
        start=period.start.isoformat(),
        end=period.end.isoformat(),
        lanes=lanes,
        files=tuple(files),
        columns={field.name: str(field.type) for field in lane_columns if field.name not in truth},
        rejected=_rejected(bad),
        truth=truth,
        marginals=tuple(entry for kind in KINDS if kind in writers for entry in writers[kind].marginals()),
        source=digest,
    )
    scratch.commit(manifest)
    if truth:
        _move(scratch.truth_path(period.name, "impression", 0).parents[1], store)
    _move(scratch.period_dir(period.name), store)
    return manifest


def _move(folder: Path, store: ExampleStore) -> None:
    """Move ``<scratch>/<room>/period=<p>`` to the same place in the store."""
    target = store.root / folder.parent.name / folder.name
    shutil.rmtree(target, ignore_errors=True)  # what a killed run left
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
