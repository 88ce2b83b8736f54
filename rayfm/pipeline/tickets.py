"""Period tickets: prepared -> trained -> labelled, kept in the metadata store so that they outlive every process.

A ticket is a key that is written once (or again with the same meaning after a crash); waiting is polling it. What
fails writes a failure ticket, which ends every wait.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

from rayfm.config import DataError, LabelError, RayfmError
from rayfm.data.store import ExampleStore
from rayfm.pipeline.config import LabelsConfig
from rayfm.snapshots.metadata.base import Conflict, MetadataStore
from rayfm.training.follow import StopRequested
from rayfm.training.spec import PinnedLabels

POLL_S = 0.05


class Tickets:
    """Tickets of one run.

    Args:
        metadata: the metadata store.
        run: name of the run; tickets of runs do not mix.
    """

    def __init__(self, metadata: MetadataStore, run: str) -> None:
        self.metadata, self.run = metadata, run

    def _key(self, *parts: str) -> str:
        return "/".join(("tickets", self.run, *parts))

    def put(self, kind: str, owner: str, period: str, value: dict[str, Any]) -> None:
        """Write a ticket; one that stands is overwritten."""
        self._set(self._key(kind, owner, period), value)

    def get(self, kind: str, owner: str, period: str) -> dict[str, Any] | None:
        """A ticket, or None while there is none."""
        entry = self.metadata.get(self._key(kind, owner, period))
        if entry is None:
            return None
        value: dict[str, Any] = json.loads(entry.value)
        return value

    def wait(self, kind: str, owner: str, period: str, timeout: float | None = None) -> dict[str, Any] | None:
        """A ticket once it is there; None when ``timeout`` seconds have passed without it.

        Raises:
            RayfmError: some part of the run failed.
            StopRequested: the run was asked to stop.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            found = self.get(kind, owner, period)
            if found is not None:
                return found
            self.check()
            self.check_stop()
            if deadline is not None and time.monotonic() >= deadline:
                return None
            time.sleep(POLL_S)

    def fail(self, who: str, message: str) -> None:
        """Say that a part of the run failed: every wait ends."""
        if self.metadata.get(self._key("failed")) is None:
            self._set(self._key("failed"), {"who": who, "message": message})

    def failure(self) -> dict[str, str] | None:
        """The first failure, if any."""
        entry = self.metadata.get(self._key("failed"))
        if entry is None:
            return None
        value: dict[str, str] = json.loads(entry.value)
        return value

    def check(self) -> None:
        """Raises RayfmError where some part of the run failed."""
        failure = self.failure()
        if failure is not None:
            raise RayfmError(f"stopped because {failure['who']} failed: {failure['message']}")

    def clear_failure(self) -> None:
        """Forget a failure, to resume."""
        self._delete(self._key("failed"))

    def stop(self) -> None:
        """Ask a run that follows to stop: every wait ends, every trainer checkpoints the step under way."""
        self._set(self._key("stop"), {})

    def stopping(self) -> bool:
        """Whether the run was asked to stop."""
        return self.metadata.get(self._key("stop")) is not None

    def check_stop(self) -> None:
        """Raises StopRequested where the run was asked to stop."""
        if self.stopping():
            raise StopRequested

    def clear_stop(self) -> None:
        """Forget that the run was asked to stop, to go on."""
        self._delete(self._key("stop"))

    def all(self, kind: str, owner: str) -> list[dict[str, Any]]:
        """An owner's tickets of one kind, in the order of their periods."""
        return [json.loads(entry.value) for entry in self.metadata.list(self._key(kind, owner) + "/")]

    def remove(self, kind: str, owner: str, period: str) -> None:
        """Take a ticket back, if it is there."""
        self._delete(self._key(kind, owner, period))

    def _delete(self, key: str) -> None:
        entry = self.metadata.get(key)
        if entry is not None:
            self.metadata.delete(entry.key, entry.revision)

    def _set(self, key: str, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        while True:
            entry = self.metadata.get(key)
            try:
                self.metadata.compare_and_set(key, text, None if entry is None else entry.revision)
            except Conflict:
                continue
            return


@dataclasses.dataclass(eq=False)
class TrainerTickets:
    """The coordinator of one trainer's loop (rank 0 calls it).

    Args:
        tickets: the run's tickets.
        trainer: the trainer's name.
        store: the example store, whose manifests say what is prepared.
        periods: the run's periods.
        teachers: teachers whose labels the trainer reads; empty for a teacher.
        labels: what it asks of them.
        labelled: for a teacher that labels, the periods that it does: it waits with period i until the labels of i - 1
            stand, so that it runs at most one period ahead of the label jobs that need its snapshots.
        prepare_timeout: seconds to wait for a period to be prepared; 0 refuses at once.
    """

    tickets: Tickets
    trainer: str
    store: ExampleStore
    periods: tuple[str, ...]
    teachers: tuple[str, ...] = ()
    labels: LabelsConfig = dataclasses.field(default_factory=LabelsConfig)
    labelled: tuple[str, ...] = ()
    prepare_timeout: float = 3600.0

    def wait_prepared(self, period: str) -> None:
        deadline = time.monotonic() + self.prepare_timeout
        while not (self.store.period_dir(period) / "manifest.json").exists():
            self.tickets.check()
            self.tickets.check_stop()
            if time.monotonic() >= deadline:
                self.store.manifest(period)  # says what is missing
            time.sleep(POLL_S)
        index = self.periods.index(period)
        if index >= 1 and self.periods[index - 1] in self.labelled:
            self.tickets.wait("labelled", self.trainer, self.periods[index - 1])

    def wait_labels(self, period: str) -> dict[str, PinnedLabels]:
        """The period's labels by teacher; none before ``labels.first``: no teacher was trained before the stream."""
        if self.periods.index(period) < self.labels.first:
            return {}
        versions = {}
        for teacher in self.teachers:
            ticket = self.tickets.wait("labelled", teacher, period, self.labels.wait)
            covered = 0.0 if ticket is None else float(ticket["coverage"].get("impression", 0.0))
            if ticket is None or covered < self.labels.min_coverage:
                what = "are not there" if ticket is None else f"cover {covered:.1%} of the impressions"
                if self.labels.on_missing == "fail":
                    raise LabelError(
                        f"{self.trainer}: labels of {teacher} for period {period} {what} after {self.labels.wait:g} s "
                        f"(min_coverage {self.labels.min_coverage:.1%}); run `rayfm label`, or set on_missing: "
                        "train_without"
                    )
                self.tickets.put("without", f"{self.trainer}.{teacher}", period, {"reason": what})
                continue
            versions[teacher] = PinnedLabels(
                version=ticket["version"], table_version=ticket["table_version"], near_line=ticket.get("near_line")
            )
        return versions

    def trained(self, period: str, versions: dict[str, str]) -> None:
        self.tickets.put("trained", self.trainer, period, {"versions": versions})

    def stopped(self) -> bool:
        return self.tickets.failure() is not None

    def failed(self, message: str) -> None:
        self.tickets.fail(self.trainer, message)


def check_order(periods: tuple[str, ...]) -> None:
    """Raises DataError where periods are out of order."""
    for before, after in itertools.pairwise(periods):
        if after <= before:
            raise DataError(
                f"period {after} comes after {before}: a stream goes forward; list the periods in time order"
            )


def metadata_path(run_dir: Path) -> Path:
    """Where a run on one machine keeps its metadata."""
    return run_dir / "metadata.sqlite"
