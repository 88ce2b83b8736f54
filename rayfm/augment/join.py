"""The feedback join as a running thing: batches in, labelled examples out, each exactly once."""

from __future__ import annotations

import base64
import dataclasses
import datetime
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from rayfm.augment.arrivals import Arrivals, now_us, take_feedback, take_impressions
from rayfm.augment.config import IMPRESSIONS, JoinConfig
from rayfm.augment.journal import EXAMPLES, Journal, Output, Record
from rayfm.augment.periods import is_complete, period_of
from rayfm.augment.rules import Rules
from rayfm.augment.state import FEEDBACK, NEVER, STREAM, TASK, Index, State, restore
from rayfm.augment.step import Closed, Step, step
from rayfm.augment.streams import FileStreams
from rayfm.config import CapacityError, DataError
from rayfm.data.sources.times import microseconds
from rayfm.schema import EXAMPLE_ID, TIME

COMPACT_ROWS = 65_536
"""Segments are written anew when they hold more than twice the rows that are needed, and this many beside."""

COMPACT_SEGMENTS = 256
"""More segments than these are merged: each is a file, mapped into memory and read at the start."""

_FREE = ("batch_rows", "max_state_rows", "root", "labelling", "random_logs")
"""Keys that may change between two runs of a join; so may the streams' paths."""


class FeedbackJoin:
    """A join and its folder, which it holds until it is closed. Use it as a context manager.

    Args:
        config: the join.
        clock: this machine's time in microseconds since 1970 UTC; event times far ahead of it are rejected.

    Raises:
        DataError: another process runs the join, its folder belongs to another config, or is damaged.
    """

    def __init__(self, config: JoinConfig, clock: Callable[[], int] = now_us) -> None:
        self.config, self.rules, self._clock = config, Rules.of(config), clock
        self._journal = Journal(config.root, _identity(config))
        try:
            self._load()
        except Exception:
            self.close()
            raise

    def _load(self) -> None:
        record, journal = self._journal.last(), self._journal
        stored = journal.meta("impressions")
        self._schema = None if stored is None else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored)))
        self.batch = 0 if record is None else record.batch
        self._impressions = {} if record is None else {n: journal.segment(IMPRESSIONS, n) for n in record.impressions}
        feedback = {} if record is None else {n: journal.segment("feedback", n) for n in record.feedback}
        self._feedback_rows = {number: table.num_rows for number, table in feedback.items()}
        if record is None:
            self.state = State.empty()
        else:
            self.state = restore(self.rules, self._impressions, feedback, record.seen, record.watermark)

    def __enter__(self) -> FeedbackJoin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; what is committed stays."""
        self._journal.close()

    @property
    def offsets(self) -> dict[str, Any]:
        """Where each source stands, as committed with the batches.

        Raises:
            DataError: the join is closed.
        """
        self._journal.check_open()
        return self._journal.offsets()

    def process(
        self,
        impressions: pa.Table | None = None,
        feedback: Mapping[str, pa.Table] | None = None,
        *,
        offsets: Mapping[str, Any] | None = None,
        through: datetime.datetime | None = None,
        where: str = "batch",
    ) -> dict[str, Any]:
        """Take in one micro-batch, wholly or not at all.

        Args:
            impressions: rows of the log of impressions, with its own columns.
            feedback: by stream, rows of it.
            offsets: where the sources stand after the batch (a name -> what JSON can hold); committed with it.
            through: every row with an earlier event time has come, whatever the streams say (UTC).
            where: what the rows are, for messages.

        Returns:
            The batch's counts, as its line of ``counts.jsonl``.

        Raises:
            DataError: a column is missing or of a type that never fits; the folder cannot be written; the join is
                closed. Nothing of the batch is taken in.
            CapacityError: more rows would wait than ``max_state_rows``, or the disk is full. Nothing of the batch is
                taken in: give the stream that is behind first, or free space.
            BatchCommitted: the whole batch is taken in, and then its files could not be moved to their places. The join
                is closed; open it again and go on after `offsets`.
        """
        self._journal.check_open()
        clock = self._clock()
        arrived = {}
        if impressions is not None:
            arrived[IMPRESSIONS] = take_impressions(where, self.config, impressions, clock)
        for stream, table in (feedback or {}).items():
            if stream not in self.config.feedback:
                raise DataError(f"{where}: no stream of feedback is called {stream!r}; see the config's 'feedback'")
            arrived[stream] = take_feedback(where, self.config, stream, table, clock)
        taken = self._fit(where, arrived[IMPRESSIONS].good) if IMPRESSIONS in arrived else self._no_impressions()
        batch = self.batch + 1
        done = step(
            self.rules,
            self.state,
            batch,
            taken,
            pa.concat_tables(
                [FEEDBACK.empty_table(), *(arrived[name].good for name in arrived if name != IMPRESSIONS)]
            ),
            {stream: part.newest for stream, part in arrived.items() if part.newest is not None},
            NEVER if through is None else microseconds(through),
        )
        if done.state.rows > self.config.max_state_rows:
            raise CapacityError(self._too_much(done.state))
        return self._commit(batch, arrived, done, offsets or {})

    def run(
        self,
        through: datetime.datetime | None = None,
        watch: Callable[[dict[str, Any]], None] | None = None,
    ) -> int:
        """Read every file of the streams that is not read yet; the number of batches.

        Args:
            through: as `process`'s, for after the last file.
            watch: called with each batch's counts.

        Raises:
            DataError, CapacityError, BatchCommitted: as `process`; a stream has no files, or a file changed after it
                was read.
        """
        streams, first = FileStreams(self.config, self.offsets), self.batch
        while (chunk := streams.next(self.state.seen)) is not None:
            rows = {chunk.stream: chunk.table}
            counts = self.process(rows.pop(IMPRESSIONS, None), rows, offsets=chunk.offsets, where=chunk.path)
            if watch is not None:
                watch(counts)
        if through is not None and microseconds(through) > self.state.watermark:
            counts = self.process(through=through)
            if watch is not None:
                watch(counts)
        return self.batch - first

    def _no_impressions(self) -> pa.Table:
        schema = pa.schema([(EXAMPLE_ID, pa.int64()), (TIME, pa.int64())]) if self._schema is None else self._schema
        return schema.empty_table()

    def _fit(self, where: str, table: pa.Table) -> pa.Table:
        """The impressions in the columns and types that the first ones had."""
        if self._schema is None:
            return table
        for name in table.column_names:
            if name not in self._schema.names:
                raise DataError(
                    f"{where}: column {name!r} is new: earlier impressions had none; leave it out of the log"
                )
        for name in self._schema.names:
            if name not in table.column_names:
                raise DataError(f"{where}: column {name!r} is missing, which earlier impressions had; add it")
        columns = []
        for field in self._schema:
            try:
                columns.append(table[field.name].cast(field.type))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"{where}: column {field.name!r} is {table[field.name].type}, earlier impressions had {field.type} "
                    f"({str(error).splitlines()[0]}); write it as before"
                ) from None
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _too_much(self, state: State) -> str:
        ends = {stream: state.seen.get(stream, NEVER) - slack for stream, slack in self.rules.disorder_us.items()}
        behind = min(ends, key=lambda stream: ends[stream])
        stands = "nothing came of it yet" if behind not in state.seen else f"stands at {_iso(state.seen[behind])}"
        return (
            f"{self.config.root}: {state.rows:,} rows would wait ({len(state.index):,} impressions, "
            f"{state.feedback.num_rows:,} events), more than max_state_rows {self.config.max_state_rows:,}; the stream "
            f"that holds the watermark back is {behind!r} ({stands}): bring it on, shorten windows or lateness, or "
            "raise max_state_rows"
        )

    def _commit(
        self, batch: int, arrived: Mapping[str, Arrivals], done: Step, offsets: Mapping[str, Any]
    ) -> dict[str, Any]:
        journal = self._journal
        files: list[Output] = []
        segments = {**self._impressions, batch: done.accepted}
        for part in done.closed:
            files += self._write_examples(batch, part, segments)
        name = f"batch-{batch:08d}.parquet"
        if done.corrections.num_rows:
            files.append(journal.stage(batch, f"corrections/{name}", done.corrections))
        for stream, arrivals in arrived.items():
            if arrivals.bad.num_rows:
                files.append(journal.stage(batch, f"rejects/read/{stream}/{name}", arrivals.bad))
        if done.late_impressions.num_rows:
            files.append(journal.stage(batch, f"rejects/join/impressions/{name}", done.late_impressions))
        if done.rejected.num_rows:
            files.append(journal.stage(batch, f"rejects/join/feedback/{name}", self._named(done.rejected)))

        state, impressions = self._keep_impressions(batch, done.state, segments)
        feedback_rows = self._keep_feedback(batch, done)
        groups = {_dataset(part): part.group for part in done.closed}
        open_periods = {(dataset, period): start for dataset, period, start in journal.open_periods()}
        open_periods |= {(file.dataset, file.period): file.start_us for file in files if file.dataset}
        complete = tuple(
            place
            for place, start in sorted(open_periods.items())
            if is_complete(self.rules, groups[place[0]], start, state.watermark)
        )
        counts: dict[str, Any] = {
            "batch": batch,
            "watermark": None if state.watermark == NEVER else _iso(state.watermark),
            "rows": {stream: part.good.num_rows + part.bad.num_rows for stream, part in arrived.items()},
            "bad": sum(part.bad.num_rows for part in arrived.values()),
            **done.counts,
            "complete": ["/".join([dataset, period]) for dataset, period in complete],
        }
        record = Record(
            batch=batch,
            watermark=state.watermark,
            seen=dict(state.seen),
            files=tuple(files),
            impressions=tuple(sorted(impressions)),
            feedback=tuple(sorted(feedback_rows)),
            complete=complete,
            counts=counts,
        )
        meta = {}
        if self._schema is None and done.accepted.num_rows:
            meta["impressions"] = base64.b64encode(done.accepted.schema.serialize().to_pybytes()).decode()
        journal.commit(record, offsets, meta)
        self._schema = done.accepted.schema if meta else self._schema
        self.batch, self.state = batch, state
        self._impressions, self._feedback_rows = impressions, feedback_rows
        return counts

    def _write_examples(self, batch: int, part: Closed, segments: Mapping[int, pa.Table]) -> list[Output]:
        if not len(part.index):
            return []
        table = gather(segments, part.index)
        for task, labels in zip(part.group.tasks, part.labels, strict=True):
            table = table.append_column(self.rules.tasks[task], labels)
        if part.group.name is not None:
            for name in self.rules.tasks:
                if name != part.group.name:
                    table = table.append_column(name, pa.nulls(len(table), pa.float32()))
        numbers = part.index.time // self.rules.period_us
        cuts = np.flatnonzero(np.diff(numbers, prepend=-1))
        files = []
        for start, stop in zip(cuts, np.append(cuts[1:], len(numbers)), strict=True):
            begin = int(numbers[start]) * self.rules.period_us
            period, dataset = period_of(begin, self.rules.period_us), _dataset(part)
            path = f"{dataset}/period={period}/batch-{batch:08d}.parquet"
            rows = table.slice(int(start), int(stop - start))
            files.append(self._journal.stage(batch, path, rows, dataset, period, begin))
        return files

    def _keep_impressions(
        self, batch: int, state: State, segments: Mapping[int, pa.Table]
    ) -> tuple[State, dict[int, pa.Table]]:
        """The segments that the state needs, the batch's own written. It takes up all others where most rows are gone,
        and where they are too many the smaller half: a row is then copied a few times, however many batches follow."""
        live = {int(number) for number in np.unique(state.index.segment)}
        held = {number: table for number, table in segments.items() if number in live}
        merged: list[int] = []
        if sum(table.num_rows for table in held.values()) > 2 * len(state.index) + COMPACT_ROWS:
            merged = list(held)
        elif len(held) > COMPACT_SEGMENTS:
            merged = sorted(held, key=lambda number: (number != batch, held[number].num_rows, number))[: len(held) // 2]
        if merged:
            mine = np.isin(state.index.segment, merged)
            part = state.index.take(mine)
            rows = gather({number: held[number] for number in merged}, part)
            segment, row = state.index.segment.copy(), state.index.row.copy()
            segment[mine], row[mine] = batch, np.arange(len(part))
            index = dataclasses.replace(state.index, segment=segment, row=row)
            held = {number: table for number, table in held.items() if number not in merged} | {batch: rows}
            state = dataclasses.replace(state, index=index)
        if batch in held:
            held[batch] = self._journal.write_segment(IMPRESSIONS, batch, held[batch])
        return state, held

    def _keep_feedback(self, batch: int, done: Step) -> dict[int, int]:
        """The same for feedback: rows of each segment."""
        needed = done.state.feedback.num_rows
        rows = dict(self._feedback_rows)
        if done.events.num_rows:
            rows[batch] = done.events.num_rows
        new = done.events
        if not needed:
            return {}
        if sum(rows.values()) > 2 * needed + COMPACT_ROWS or len(rows) > COMPACT_SEGMENTS:
            rows, new = {batch: needed}, done.state.feedback
        if batch in rows:
            self._journal.write_segment("feedback", batch, new)
        return rows

    def _named(self, rejected: pa.Table) -> pa.Table:
        """Rejected feedback with the names of streams and tasks in place of their positions."""
        for column, names in ((STREAM, list(self.config.feedback)), (TASK, list(self.rules.tasks))):
            values = pa.array(names, pa.string()).take(rejected[column].combine_chunks().cast(pa.int32()))
            rejected = rejected.set_column(rejected.column_names.index(column), column, values)
        return rejected


def gather(segments: Mapping[int, pa.Table], index: Index) -> pa.Table:
    """The rows that ``index`` points at, in its order."""
    order = np.argsort(index.segment, kind="stable")
    numbers, starts = np.unique(index.segment[order], return_index=True)
    stops = np.append(starts[1:], len(order))
    if not len(numbers):
        return next(iter(segments.values())).slice(0, 0)
    parts = [
        segments[int(number)].take(pa.array(index.row[order[start:stop]]))
        for number, start, stop in zip(numbers, starts, stops, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_tables(parts).take(pa.array(back))


def _dataset(part: Closed) -> str:
    return EXAMPLES if part.group.name is None else f"{EXAMPLES}/task={part.group.name}"


def _iso(time_us: int) -> str:
    return (datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(microseconds=time_us)).isoformat()


def _identity(config: JoinConfig) -> dict[str, Any]:
    identity = {key: value for key, value in config.dump().items() if key not in _FREE}
    streams = [identity["impressions"], *identity["feedback"].values()]
    for stream in streams:
        del stream["path"]
    # The order of tasks and streams is that of their numbers in the state.
    return {**identity, "order": [list(config.feedback), list(config.tasks)]}
