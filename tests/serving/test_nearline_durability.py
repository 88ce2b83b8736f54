"""What a consumer labelled is durable before the spooled rows go."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from nearline_cases import TEACHER, V1, Bench, rows

from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.spool import Spool
from rayfm.serving.nearline.tickets import new_ticket


@pytest.fixture
def bench(root):
    return Bench(root)


class Syncs:
    """Records what is made durable, below the label table's folder, and what then lets the spooled rows go."""

    def __init__(self, bench: Bench, monkeypatch) -> None:
        self.events: list[str] = []
        fsync, finish, folder = os.fsync, Spool.finish, bench.labels.folder.resolve()

        def recorded(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path == folder or folder in path.parents:
                self.events.append(str(path.relative_to(folder)))

        def finished(spool: Spool, ticket: str, *rest) -> None:
            self.events.append(ticket)
            finish(spool, ticket, *rest)

        monkeypatch.setattr(os, "fsync", recorded)
        monkeypatch.setattr(Spool, "finish", finished)

    def before(self, ticket: str) -> set[str]:
        """Durable when a ticket's rows went."""
        return set(self.events[: self.events.index(ticket)])


def commit_file(version: int) -> str:
    return f"_delta_log/{version:020d}.json"


def unsynced(root: Path, table: pa.Table) -> None:
    """A commit of a writer that is slow, or dies, before it syncs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayfm.serving.nearline.labels.sync_file", lambda path: None)
        NearLineLabels(root).append(TEACHER, table)


def test_the_table_is_durable_from_its_making_on(bench, monkeypatch):
    ticket = bench.accept(rows(2))
    syncs = Syncs(bench, monkeypatch)
    bench.label(ticket)
    synced = syncs.before(ticket)
    folder = f"teacher={TEACHER}/period=2024-01-02"
    assert synced >= {commit_file(0), commit_file(1), "_delta_log", ".", f"teacher={TEACHER}", folder}
    assert sum(name.startswith(f"{folder}/") for name in synced) == 1, "the data file, before it was whole"
    more = bench.labeller._scored([bench.spool.read(bench.accept(rows(1, 9)))], bench.versions.get(V1))
    syncs.events.clear()
    done = bench.labels.append(TEACHER, more.append_column("task_share", pa.array([0.25], pa.float32())))
    assert done.table_version == 3
    assert set(syncs.events) >= {commit_file(2), commit_file(3)}, "the new column's commit too"
    assert commit_file(1) not in syncs.events, "it is durable already"


def test_commits_of_others_are_durable_before_spooled_rows_go(bench, monkeypatch):
    """A log with a hole after a power cut would have lost what stands behind the hole."""
    ticket, other, third = bench.accept(rows(2)), bench.accept(rows(2, 10)), bench.accept(rows(2, 20))
    entries = {name: bench.spool.read(name) for name in (ticket, other, third)}
    scored = {name: bench.labeller._scored([entry], bench.versions.get(V1)) for name, entry in entries.items()}
    root = Path(bench.config.root)
    unsynced(root, scored[other])  # makes the table as well: versions 0 and 1
    real = DeltaTable.update_incremental

    def late(table):  # another commit comes between ours and our look at what we committed
        if table.version() == 1 and NearLineLabels(root).open().version() == 2:
            unsynced(root, scored[third])
        return real(table)

    monkeypatch.setattr(DeltaTable, "update_incremental", late)
    syncs = Syncs(bench, monkeypatch)
    assert bench.label(ticket) == {ticket: None}
    assert bench.spool.status(ticket).table_version == 3
    assert syncs.before(ticket) >= {commit_file(version) for version in range(4)}


@pytest.mark.parametrize("late", [False, True], ids=["seen before scoring", "seen at the commit"])
def test_a_ticket_that_another_committed_ends_once_that_is_durable(bench, monkeypatch, late):
    ticket = bench.accept(rows(2))
    entry = bench.spool.read(ticket)
    scored = bench.labeller._scored([entry], bench.versions.get(V1))
    root = Path(bench.config.root)

    def score(table, version):
        unsynced(root, scored)
        return bench.oracle(table, version)

    if late:
        bench.labeller._score = score
    else:
        unsynced(root, scored)
    syncs = Syncs(bench, monkeypatch)
    assert bench.labeller.label([entry]) == {ticket: None}
    assert syncs.before(ticket) >= {commit_file(0), commit_file(1)}


def test_a_checkpoint_is_durable_with_its_commit(bench, monkeypatch):
    """Delta Lake's code writes one every hundred commits, and opens no table whose newest is half there."""
    ticket, other = bench.accept(rows(2)), bench.accept(rows(2, 10))
    unsynced(Path(bench.config.root), bench.labeller._scored([bench.spool.read(other)], bench.versions.get(V1)))
    bench.labels.open().create_checkpoint()
    syncs = Syncs(bench, monkeypatch)
    bench.label(ticket)
    checkpoint = commit_file(1).replace(".json", ".checkpoint.parquet")
    assert syncs.before(ticket) >= {checkpoint, "_delta_log/_last_checkpoint"}


def test_old_commits_are_not_synced_again(bench, monkeypatch):
    for number in range(3):
        bench.label(bench.accept(rows(2, 10 * number)))
    old = bench.labels.folder / commit_file(1)
    os.utime(old, (0, 0))
    ticket = bench.accept(rows(2, 90))
    fresh = Bench(Path(bench.config.root))
    syncs = Syncs(bench, monkeypatch)
    fresh.label(ticket)
    found = {event for event in syncs.before(ticket) if event.endswith(".json")}
    assert found == {commit_file(version) for version in (1, 2, 3, 4)}


def test_a_compacted_period_still_knows_its_tickets(bench, monkeypatch):
    tickets = [bench.accept(rows(2, 10 * number)) for number in range(4)]
    entries = [bench.spool.read(ticket) for ticket in tickets]
    for entry in entries:
        bench.labeller.label([entry])
    before = bench.stored()
    syncs = Syncs(bench, monkeypatch)
    assert bench.labels.compact(TEACHER, "2024-01-02") == 4
    (joined,) = bench.labels.open().file_uris()
    joined = str(Path(joined).relative_to(bench.labels.folder))
    assert set(syncs.events) >= {joined, str(Path(joined).parent), commit_file(5), "_delta_log"}
    assert syncs.events.index(joined) < syncs.events.index(commit_file(5))
    assert len(bench.labels.open().file_uris()) == 1
    assert bench.stored().equals(before)
    assert bench.labels.held(bench.labels.open(), TEACHER, frozenset([*tickets, new_ticket()])) == frozenset(tickets)
    bench.labeller.label(entries)
    assert bench.stored().equals(before)
    assert NearLineLabels(bench.config.root + "/none").compact(TEACHER, "2024-01-02") == 0
