"""Consumers and intakes that are killed at every boundary between two durable steps."""

from __future__ import annotations

import signal

import nearline_work
import processes
from nearline_cases import TEACHER, V1, config, publish_teacher, rows

from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.rows import Versions, check_post
from rayfm.serving.nearline.spool import Spool
from rayfm.snapshots import SnapshotStore

STEPS = 16
"""A batch of three tickets syncs its data file and three folders, the commit and its folder, and three records with
theirs; the first batch the table's making as well."""


def run(target, *arguments) -> int:
    """A process's exit code."""
    process = processes.context().Process(target=target, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def test_a_consumer_killed_at_every_step_labels_each_row_once(tmp_path):
    publish_teacher(tmp_path, V1)
    settings = config(tmp_path)
    spool = Spool(tmp_path, TEACHER)
    version = Versions(SnapshotStore(tmp_path), settings.model).get(V1)
    accepted: dict[str, list[int]] = {}
    killed = 0
    for step in range(1, STEPS + 1):
        for number in range(2):  # posts keep coming; those of the killed lie there still
            table = rows(3, 100 * step + 10 * number)
            ticket = spool.accept(check_post(table, TEACHER, version).good, V1)
            accepted[ticket] = table["example_id"].to_pylist()
        code = run(nearline_work.label_all, settings.dump(), step, step % 2 == 0)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
    assert killed >= STEPS / 2
    assert run(nearline_work.label_all, settings.dump(), 0, False) == 0
    stored = NearLineLabels(tmp_path).rows(TEACHER)
    found = list(zip(stored["ticket"].to_pylist(), stored["example_id"].to_pylist(), strict=True))
    assert sorted(found) == sorted((ticket, row) for ticket, ids in accepted.items() for row in ids)
    assert stored["task_watch"].to_pylist() == [float(row) for row in stored["example_id"].to_pylist()]
    assert {spool.status(ticket).state for ticket in accepted} == {"committed"}
    assert spool.dead_letters() == []


def test_an_intake_killed_at_every_step_keeps_what_it_told(tmp_path):
    settings = config(tmp_path)
    told = tmp_path / "told"
    # Rejects and rows: a file and its folder each, for three posts.
    for step in range(1, 13):
        code = run(nearline_work.accept_some, settings.dump(), step, step % 2 == 0, str(told))
        assert code == -signal.SIGKILL
    spool = Spool(tmp_path, TEACHER)
    tickets = told.read_text().split()
    assert len(tickets) == len(set(tickets)) >= 12
    waiting = {ticket for ticket, _ in spool.waiting()}
    assert waiting >= set(tickets)
    for ticket in waiting:
        assert spool.read(ticket).table.num_rows == 2
