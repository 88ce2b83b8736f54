"""Following a stream: which periods are complete, in which order they are taken, who may be how far ahead.

The stream is a list in the metadata store that only ever grows at its end: a ticket a place, written once. All parts of
a run walk through it, and so does the run that goes on with it after a stop or a crash.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from rayfm.config import DataError
from rayfm.data.sources.base import SOURCES, Period, Source
from rayfm.data.store import ExampleStore
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.tickets import Tickets, TrainerTickets
from rayfm.training.follow import StopRequested

log = logging.getLogger(__name__)

POLL_S = 0.25


class LatePeriodError(DataError):
    """A period is complete now that lies before one that the run has taken."""


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A complete period: its name, ``[start, end)`` in UTC, and when the run saw it (seconds since 1970)."""

    period: str
    start: float
    end: float
    at: float = 0.0


def complete_in_source(
    periods: Sequence[Period], prepared: set[str], close_after_s: float | None, now: float
) -> list[Arrival]:
    """Those of a source's periods that nothing is added to any more, in time order.

    All but the newest; that one too where its manifest stands in the store, or where ``close_after_s`` seconds have
    passed since its end.

    Args:
        periods: what the source has.
        prepared: names of the periods in the store.
        close_after_s: see ``follow.close_after_s`` of the config.
        now: seconds since 1970.
    """
    found = []
    for position, period in enumerate(periods):
        closed = close_after_s is not None and now >= period.end.timestamp() + close_after_s
        if position < len(periods) - 1 or closed or period.name in prepared:
            found.append(Arrival(period.name, period.start.timestamp(), period.end.timestamp()))
    return found


def complete_in_store(store: ExampleStore, lanes: int, known: Sequence[str]) -> list[Arrival]:
    """The store's periods that are not ``known``, in time order.

    Raises:
        DataError: one is dealt to another number of lanes than the run's batches are made of.
    """
    found, before = [], set(known)
    for name in store.periods():
        if name in before:
            continue
        manifest = store.manifest(name)
        if manifest.lanes != lanes:
            raise DataError(
                f"{store.period_dir(name)}: has {manifest.lanes} lanes, and data.lanes is {lanes}; prepare it with "
                "that many"
            )
        found.append(Arrival(name, seconds_of(manifest.start), seconds_of(manifest.end)))
    return found


def open_source(config: PipelineConfig) -> Source | None:
    """The source as it is now; None where somebody else prepares."""
    return SOURCES.build(config.data.source, config.schema_) if config.follow.prepare else None


def complete_periods(
    config: PipelineConfig, store: ExampleStore, source: Source | None, known: Sequence[str] = ()
) -> list[Arrival]:
    """The complete periods within the schedule, in time order; of a store (no source), those that are not ``known``.

    Raises:
        DataError: the source or a manifest cannot be read.
    """
    if source is None:
        found = complete_in_store(store, config.data.lanes, known)
    else:
        found = complete_in_source(source.periods(), set(store.periods()), config.follow.close_after_s, time.time())
    first, last = config.schedule.first, config.schedule.last
    return [
        arrival
        for arrival in found
        if (first is None or arrival.period >= first) and (last is None or arrival.period <= last)
    ]


def seconds_of(text: str) -> float:
    """Seconds since 1970 of an ISO time, which is in UTC unless it says otherwise."""
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


class Admission:
    """Which complete periods a stream takes, and when: in time order, each once.

    A period that begins where the newest taken one ends is taken at once. One after a gap waits ``gap_s`` seconds for
    what may fill it: several periods that are prepared together become complete in any order.

    Args:
        gap_s: see ``follow.gap_s`` of the config.
        origin: opens the error message.
    """

    def __init__(self, gap_s: float, origin: str) -> None:
        self.gap_s, self.origin = gap_s, origin
        self._since: dict[str, float] = {}

    def admit(self, complete: Sequence[Arrival], taken: Sequence[str], end: float, now: float) -> list[Arrival]:
        """What to append to the stream, in order.

        Args:
            complete: the complete periods, in time order; taken ones may be among them.
            taken: those of the stream, in order; not empty.
            end: the end of its newest, seconds since 1970.
            now: seconds by any clock that goes forward.

        Raises:
            LatePeriodError: a period that is not among those taken lies before the newest of them.
        """
        standing = set(taken)
        new = [arrival for arrival in complete if arrival.period not in standing]
        if new and new[0].period < taken[-1]:
            raise LatePeriodError(
                f"{self.origin}: period {new[0].period} is complete now, and the run has gone on to {taken[-1]}: a "
                "stream goes forward; take the period away again, or start a new run that has it"
            )
        admitted = []
        for arrival in new:
            since = self._since.setdefault(arrival.period, now)
            if arrival.start > end and now - since < self.gap_s:
                break
            admitted.append(arrival)
            end = arrival.end
            del self._since[arrival.period]
        return admitted


class Stream:
    """The durable list of a run's periods.

    Args:
        tickets: the run's tickets.
    """

    def __init__(self, tickets: Tickets) -> None:
        self.tickets = tickets

    def arrivals(self) -> list[Arrival]:
        """All that was taken, in order."""
        return [Arrival(**value) for value in self.tickets.all("stream", "place")]

    def at(self, place: int) -> str | None:
        """The period at a place, or None while the stream has not come so far."""
        found = self.tickets.get("stream", "place", _place(place))
        return None if found is None else str(found["period"])

    def append(self, place: int, arrival: Arrival) -> None:
        """Take a period at the stream's end, which is ``place``."""
        self.tickets.put("stream", "place", _place(place), dataclasses.asdict(arrival))

    def end(self) -> None:
        """Say that nothing follows."""
        self.tickets.put("stream", "state", "ended", {})

    def go_on(self) -> None:
        """Take back that nothing follows."""
        self.tickets.remove("stream", "state", "ended")

    def ended(self) -> bool:
        return self.tickets.get("stream", "state", "ended") is not None

    def see(self, newest: Arrival) -> None:
        """Write down the newest complete period, taken or not: what lag is reckoned from."""
        if self.newest() != newest:
            self.tickets.put("stream", "state", "newest", dataclasses.asdict(newest))

    def newest(self) -> Arrival | None:
        """The newest complete period that was seen."""
        found = self.tickets.get("stream", "state", "newest")
        return None if found is None else Arrival(**found)


def _place(place: int) -> str:
    return f"{place:08d}"


@dataclasses.dataclass(frozen=True)
class Lag:
    """How far a trainer is behind the newest complete period."""

    trainer: str
    newest: str
    trained: str | None
    """The newest period that it has trained, evaluated and published."""
    periods: int
    """Complete periods of the stream after that one."""
    seconds: float
    """From the end of that one to the end of the newest complete one, in the data's time."""

    def __str__(self) -> str:
        if not self.periods:
            return "up to date"
        return f"{self.periods} period{'s' if self.periods > 1 else ''} behind ({self.seconds:,.0f} s)"


def lag(trainer: str, done: int, arrivals: Sequence[Arrival], newest: Arrival) -> Lag:
    """The lag of a trainer that has finished the first ``done`` of the stream's periods."""
    trained = arrivals[done - 1] if done else None
    behind = len(arrivals) - done + (newest.period > arrivals[-1].period)
    since = arrivals[0].start if trained is None else trained.end
    seconds = max(0.0, newest.end - since) if behind else 0.0
    return Lag(trainer, newest.period, None if trained is None else trained.period, behind, seconds)


@dataclasses.dataclass(eq=False)
class FollowingTickets(TrainerTickets):
    """The coordinator of a trainer that follows.

    Args of `TrainerTickets`: ``periods`` and ``labelled`` are as far as they are known when the run starts, and a
    period is waited for as long as it takes.

    Args:
        readers: trainers that read this one's labels, each with its first period.
        ahead: periods that this trainer may be ahead of any of them.
        labels_on: whether its teacher also labels what follows.
    """

    prepare_timeout: float = math.inf
    readers: dict[str, str] = dataclasses.field(default_factory=dict)
    ahead: int = 2
    labels_on: bool = False

    def next_period(self, after: str) -> str | None:
        place = self.periods.index(after) + 1
        stream = Stream(self.tickets)
        while place == len(self.periods):
            ended = stream.ended()  # asked before the place: what is appended last is then not overlooked
            found = stream.at(place)
            if found is not None:
                self.periods = (*self.periods, found)
                if self.labels_on:
                    self.labelled = (*self.labelled, found)
            elif ended:
                return None
            else:
                self.tickets.check()
                self.tickets.check_stop()
                time.sleep(POLL_S)
        return self.periods[place]

    def wait_prepared(self, period: str) -> None:
        super().wait_prepared(period)
        behind = self.periods.index(period) - self.ahead
        if behind < 0:
            return
        for reader, first in self.readers.items():
            if self.periods[behind] >= first:
                self.tickets.wait("trained", reader, self.periods[behind])

    def stopping(self) -> bool:
        return self.tickets.stopping()


class Follower:
    """Looks for complete periods, takes them into the stream, prepares them.

    Args:
        config: the run's.
        stream: where they are taken; it has a period already.
        store: the example store.
        prepare: brings the named periods into the store.
        slowest: how many of the stream's periods the slowest trainer has finished.
        taken: called with each period that the stream takes.
    """

    def __init__(
        self,
        config: PipelineConfig,
        stream: Stream,
        store: ExampleStore,
        prepare: Callable[[Source, list[str]], Any],
        slowest: Callable[[], int],
        taken: Callable[[Arrival], None],
    ) -> None:
        self.config, self.stream, self.store = config, stream, store
        self.prepare, self.slowest, self.taken = prepare, slowest, taken
        place = vars(config.data.source).get("path", "the source") if config.follow.prepare else store.root
        self._admission = Admission(config.follow.gap_s, str(place))
        self._unreadable: float | None = None

    def run(self) -> None:
        """Look until the run is asked to stop, or the schedule's last period is taken and prepared.

        Raises:
            LatePeriodError: a period came too late.
            DataError: the source cannot be read, and the time for that is over.
            RayfmError: some part of the run failed.
        """
        tickets = self.stream.tickets
        try:
            while not self.look():
                deadline = time.monotonic() + self.config.follow.poll_s
                while time.monotonic() < deadline:
                    tickets.check()
                    tickets.check_stop()
                    time.sleep(min(POLL_S, self.config.follow.poll_s))
        except StopRequested:
            return
        self.stream.end()

    def look(self) -> bool:
        """Look once. Returns whether nothing is left to come.

        Raises:
            LatePeriodError, DataError: as `run`.
        """
        arrivals = self.stream.arrivals()
        taken = [arrival.period for arrival in arrivals]
        try:
            source = open_source(self.config)
            complete = complete_periods(self.config, self.store, source, taken)
            self._unreadable = None
        except DataError as error:
            # A writer may be in the middle of a file.
            now = time.monotonic()
            self._unreadable = now if self._unreadable is None else self._unreadable
            if now - self._unreadable >= self.config.follow.gap_s:
                raise
            log.warning("the next look may find it readable: %s", error)
            return False
        for arrival in self._admission.admit(complete, taken, arrivals[-1].end, time.monotonic()):
            arrivals.append(dataclasses.replace(arrival, at=time.time()))
            self.stream.append(len(arrivals) - 1, arrivals[-1])
            self.taken(arrivals[-1])
        self.stream.see(max([arrivals[-1], *complete], key=lambda arrival: arrival.period))
        waiting = self._prepare(source, [arrival.period for arrival in arrivals]) if source is not None else 0
        return arrivals[-1].period == self.config.schedule.last and not waiting

    def _prepare(self, source: Source, taken: list[str]) -> int:
        """Prepare what may be prepared now; returns how many of the taken periods still have to be."""
        prepared = set(self.store.periods())
        slowest = self.slowest()
        # What every trainer is done with need not stand any more.
        missing = [period for place, period in enumerate(taken) if period not in prepared and place >= slowest]
        within = set(taken[: slowest + self.config.follow.ahead])
        now = [period for period in missing if period in within]
        if now:
            self.prepare(source, now)
        return len(missing) - len(now)


def stream_event(arrival: Arrival) -> dict[str, Any]:
    """The line of ``progress.jsonl`` that says when a period was seen to be complete."""
    return {"event": "arrived", "period": arrival.period, "at": round(arrival.at, 3)}


def lag_event(found: Lag) -> dict[str, Any]:
    """The line of ``progress.jsonl`` about a trainer's lag."""
    return {"event": "lag", "period": found.newest, **dataclasses.asdict(found)}
