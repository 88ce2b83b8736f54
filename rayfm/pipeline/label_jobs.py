"""The label jobs of a run: each period labelled with the snapshot that was trained through the one before it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rayfm.config import DataError
from rayfm.labels.history import HistoryStore
from rayfm.operations.metrics import COVERAGE, LABEL_SECONDS, LABELLED_ROWS, TEACHER_FRESHNESS
from rayfm.pipeline.follow import POLL_S, seconds_of
from rayfm.pipeline.plan import histories, periods_to_label, teacher_key
from rayfm.pipeline.state import RunState
from rayfm.serving.labelling import history_spec, label_period
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.snapshots.keeper import LeaseKeeper

LEASE_S = 120.0


def label(
    run: RunState,
    teacher: str,
    handle: Any,
    periods: tuple[str, ...] | None = None,
    timeout: float | None = None,
    choose: Callable[[str, str, str], str] | None = None,
) -> None:
    """Label periods in order, each with the snapshot trained through the period before it.

    Args:
        run: the run.
        teacher: the teacher.
        handle: its service.
        periods: which; all but the first by default.
        timeout: seconds to wait for the snapshot that a period needs; by default as long as it takes.
        choose: (teacher, that snapshot, period) -> the one that labels; by default that snapshot itself.

    Raises:
        LabelError: the snapshot did not come, or the label store refuses; or there are no near-line labels such as
            the config states.
    """
    key = teacher_key(run.config, teacher)
    near_line, posted = run.config.teachers[teacher].near_line, NearLineLabels(run.run_dir)
    if near_line is not None:  # what is stated wrongly is said before anybody waits for a snapshot
        posted.pin(teacher, run.periods[0], near_line.table_version)
    for index, period in walk(run):
        wanted = periods_to_label(run.config, run.periods, teacher) if run.follow else periods
        if index == 0 or (wanted is not None and period not in wanted):
            continue
        if run.tickets.get("labelled", teacher, period) is not None:
            continue
        before = run.periods[index - 1]
        trained = run.tickets.wait("trained", teacher, before, timeout)
        if trained is None:
            raise DataError(
                f"teacher {teacher}: no snapshot is trained through {before}, which labels of {period} need; "
                "run `rayfm train` for it first"
            )
        wait_prepared(run, period, timeout)
        _histories(run, teacher, index)
        version = str(trained["versions"][key])
        if choose is not None:
            version = choose(teacher, version, period)
        with contextlib.closing(LeaseKeeper(run.collector.metadata, LEASE_S)) as keeper:
            keeper.keep(run.collector.hold(key, version, f"label {period}", LEASE_S))
            ticket = label_period(
                run.labels,
                run.snapshots,
                run.store,
                teacher,
                key,
                version,
                period,
                run.config.tasks_of(run.config.teachers[teacher]),
                handle,
                considerations=run.config.teachers[teacher].label_considerations,
                rows_per_request=run.config.serving.rows_per_request,
                store_representation=run.config.teachers[teacher].store_representation,
                nodes=run.config.ray.nodes.data,
            )
        if near_line is not None:
            # In the ticket, so that all students read one version, whatever is labelled near-line meanwhile.
            ticket["near_line"] = posted.pin(teacher, period, near_line.table_version)
        run.tickets.put("labelled", teacher, period, ticket)
        _record(run, teacher, ticket)


def _record(run: RunState, teacher: str, ticket: Mapping[str, Any]) -> None:
    labels = {"run": run.config.name, "teacher": teacher}
    for kind, share in ticket["coverage"].items():
        COVERAGE.set(share, kind=kind, **labels)
    LABELLED_ROWS.add(ticket["labelled"], **labels)
    LABEL_SECONDS.set(ticket["seconds"], **labels)
    gap = freshness(run, ticket)
    if gap is not None:
        TEACHER_FRESHNESS.set(gap, **labels)


def freshness(run: RunState, ticket: Mapping[str, Any]) -> float | None:
    """ExFM's freshness gap of a period's labels, in seconds of the data's time.

    From the end of the last period that the snapshot was trained on to the end of the one that it labelled; None where
    the store has one of them no more.
    """
    try:
        labelled, trained = (run.store.manifest(str(ticket[key])).end for key in ("period", "trained_through"))
    except DataError:
        return None
    return seconds_of(labelled) - seconds_of(trained)


def walk(run: RunState) -> Iterator[tuple[int, str]]:
    """The periods with their places; where the run follows, also those that come while it does."""
    place = 0
    while True:
        ended = not run.follow or run.stream.ended()  # asked first, so that what came last is not overlooked
        if place < len(run.periods):
            yield place, run.periods[place]
            place += 1
        elif ended:
            return
        else:
            run.tickets.check()
            run.tickets.check_stop()
            time.sleep(POLL_S)


def _histories(run: RunState, teacher: str, index: int) -> None:
    """Before a period is labelled: what its students may know of the labels of the periods before it."""
    before = run.tickets.get("labelled", teacher, run.periods[index - 1])
    earlier = None
    if before is not None:
        earlier = run.periods[index - 1], str(before["version"]), int(before["table_version"])
    for history in histories(run.config):
        if history.teacher == teacher:
            HistoryStore(run.labels.storage, run.metadata).advance(
                history_spec(history),
                run.store,
                run.periods[index],
                earlier,
            )


def wait_prepared(run: RunState, period: str, timeout: float | None) -> None:
    """Wait until a period is in the store; after ``timeout`` seconds, say what is missing."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while period not in run.store.periods():
        run.tickets.check()
        run.tickets.check_stop()
        if deadline is not None and time.monotonic() > deadline:
            run.store.manifest(period)
        time.sleep(0.1)
