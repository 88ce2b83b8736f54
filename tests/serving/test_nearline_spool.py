from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pyarrow as pa
import pytest
from nearline_cases import TEACHER, V1, V2, config, rows

from rayfm.config import CapacityError, DataError, LabelError
from rayfm.config.durable import TEMPORARY
from rayfm.serving.nearline.labeller import Failure, process_name, settle, take
from rayfm.serving.nearline.spool import ROW, Spool
from rayfm.serving.nearline.tickets import check_ticket, new_ticket, ticket_time


def numbered(count: int, first_id: int = 0) -> pa.Table:
    return rows(count, first_id).append_column(ROW, pa.array(range(count), pa.int64()))


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path, TEACHER)


def test_tickets_are_random_and_in_the_order_of_their_time():
    now = 1_700_000_000.123
    first, twin, later = new_ticket(now), new_ticket(now), new_ticket(now + 0.001)
    assert len(first) == 32, "what Delta Lake keeps of a text in its statistics"
    assert first[:10] == twin[:10]
    assert first[10:] != twin[10:]
    assert max(first, twin) < later
    assert ticket_time(first) == now
    assert len({new_ticket() for _ in range(1000)}) == 1000
    # 110 random bits: each of the 32 digits turns up about as often as another.
    digits = "".join(new_ticket()[10:] for _ in range(2000))
    counts = [digits.count(digit) for digit in set(digits)]
    assert len(counts) == 32
    assert 1000 < min(counts) <= max(counts) < 1800


@pytest.mark.parametrize(
    "text",
    ["", "../../etc/passwd", "x" * 32, new_ticket().upper(), new_ticket() + "0", "a\0b"],
    ids=["empty", "outside", "letters", "capitals", "long", "zero byte"],
)
def test_what_is_no_ticket_reaches_no_file(spool, text):
    with pytest.raises(DataError, match="no ticket"):
        check_ticket(text)
    with pytest.raises(DataError, match="no ticket"):
        spool.status(text)


def test_a_teachers_name_cannot_leave_its_folder(tmp_path):
    with pytest.raises(LabelError, match="letters, digits"):
        Spool(tmp_path, "../fm")


def test_rows_come_back_as_they_were_posted(spool):
    table = numbered(5)
    ticket = spool.accept(table, V1, rows(2).append_column("reason", pa.array(["a", "b"])))
    found = Spool(spool.folder.parents[2], TEACHER).read(ticket)
    assert found is not None
    assert found.table.replace_schema_metadata(None).equals(table)
    assert (found.ticket, found.version, found.rejected) == (ticket, V1, 2)
    assert spool.rejected_rows() == 2
    status = spool.status(ticket)
    assert status is not None
    assert (status.state, status.rows, status.rejected, status.version) == ("queued", 5, 2, V1)


def test_the_journal_is_a_tickets_life(spool):
    ticket = spool.accept(numbered(3), V1)
    spool.note(ticket, "delivered")
    spool.note(ticket, "failed", why="disk full", lasting=False)
    spool.note(ticket, "delivered")
    spool.note(ticket, "scored", version=V1)
    history = spool.history(ticket)
    assert (history.deliveries, history.failures, history.lasting, history.scored) == (2, 1, 0, True)
    assert spool.status(ticket).state == "scored"
    spool.note(ticket, "delivered")
    assert spool.status(ticket).state == "queued", "its consumer died after it was scored: it is scored again"
    with (spool.folder / "journal" / f"{ticket}.jsonl").open("a") as file:
        file.write('{"event": "fai')  # a power cut
    assert spool.history(ticket).deliveries == 3


def test_a_committed_ticket_is_known_until_it_expires(spool):
    ticket = spool.accept(numbered(3), V1)
    spool.note(ticket, "delivered")
    spool.finish(ticket, V1, 3, 0, 7, ttl_s=100.0)
    status = spool.status(ticket)
    assert (status.state, status.table_version, status.rows) == ("committed", 7, 3)
    assert spool.read(ticket) is None
    assert list(spool.waiting()) == []
    assert not list((spool.folder / "journal").iterdir())
    assert spool.sweep(time.time() + 99) == 0
    assert spool.sweep(time.time() + 101) == 1
    assert spool.status(ticket) is None


def test_a_dead_letter_keeps_the_rows_and_can_be_replayed(spool):
    table = numbered(4)
    ticket = spool.accept(table, V1)
    spool.note(ticket, "delivered")
    spool.note(ticket, "failed", why="bad row", lasting=True)
    assert spool.bury(ticket, "bad row")
    assert not spool.bury(ticket, "again"), "it is dead already, with its first reason"
    (letter,) = spool.dead_letters()
    assert (letter.ticket, letter.reason) == (ticket, "bad row")
    assert [line["event"] for line in letter.journal] == ["delivered", "failed"]
    status = spool.status(ticket)
    assert (status.state, status.reason, status.failures, status.rows) == ("dead", "bad row", 1, 4)
    assert spool.read(ticket) is None
    assert spool.dead_rows(ticket).table.replace_schema_metadata(None).equals(table)

    spool.replay(ticket)
    assert spool.status(ticket).state == "queued"
    assert spool.history(ticket).failures == 0, "a replayed ticket starts anew"
    assert spool.dead_letters() == []
    spool.bury(ticket, "again")
    spool.replay(ticket, V2)
    again = spool.read(ticket)
    assert again.version == V2
    assert again.table.replace_schema_metadata(None).equals(table)
    with pytest.raises(DataError, match="no dead letter"):
        spool.replay(ticket)
    with pytest.raises(DataError, match="no dead letter"):
        spool.discard(ticket)
    spool.bury(ticket, "for good")
    spool.discard(ticket)
    assert spool.status(ticket) is None
    assert not list((spool.folder / "dead").iterdir())


def test_a_ticket_that_was_buried_while_it_was_committed_is_committed(spool):
    ticket = spool.accept(numbered(2), V1)
    spool.bury(ticket, "slow")
    spool.finish(ticket, V1, 2, 0, 1, ttl_s=100.0)
    assert spool.status(ticket).state == "committed"
    assert spool.dead_letters() == []


def test_a_lasting_error_is_tried_again_a_few_times_and_a_passing_one_for_long(spool, tmp_path):
    limits = config(tmp_path, consumer={"retries": 2, "crashes": 9})
    ticket = spool.accept(numbered(2), V1)
    verdicts = []
    for _ in range(3):
        assert take(spool, ticket, limits) is not None
        spool.note(ticket, "failed", why="no such id", lasting=True)
        verdicts.append(settle(spool, ticket, Failure("no such id", lasting=True), limits))
    assert verdicts == [False, False, True]
    assert spool.status(ticket).state == "dead"

    other = spool.accept(numbered(2), V1)
    for _ in range(20):
        assert take(spool, other, limits) is not None
        spool.note(other, "failed", why="service down", lasting=False)
        assert not settle(spool, other, Failure("service down", lasting=False), limits)
    assert spool.status(other).state == "queued"


def test_a_ticket_that_takes_its_consumers_down_is_given_up(spool, tmp_path, monkeypatch):
    limits = config(tmp_path, consumer={"crashes": 3})
    ticket = spool.accept(numbered(2), V1)
    for process in ("a", "b", "c", "d"):
        monkeypatch.setattr("rayfm.serving.nearline.labeller.process_name", lambda process=process: process)
        assert (take(spool, ticket, limits) is not None) == (process != "d")
    assert spool.status(ticket).state == "dead"
    assert spool.status(ticket).reason == "3 consumers took it and came to no end: they died with it"


def test_what_waits_for_a_slow_teacher_has_not_crashed(spool, tmp_path, monkeypatch):
    """Deliveries of a ticket that wait in a living process, and those of any process that came to an end."""
    limits = config(tmp_path, consumer={"crashes": 3})
    ticket = spool.accept(numbered(2), V1)
    for process in ("a", "b", "c", "d"):
        monkeypatch.setattr("rayfm.serving.nearline.labeller.process_name", lambda process=process: process)
        entries = [take(spool, ticket, limits) for _ in range(10)]
        assert None not in entries
        spool.note(ticket, "failed", why="TimeoutError: no answer", lasting=False)  # once for all: they were merged
        for entry in entries if process != "b" else entries[1:]:
            spool.end(entry)
    history = spool.history(ticket)
    assert (history.deliveries, history.failures) == (40, 4)
    assert (history.crashes("d"), history.crashes("b")) == (1, 0), "b died with one of them"
    entry = take(spool, ticket, limits)
    spool.finish(ticket, V1, 2, 0, 1, ttl_s=100.0)
    spool.end(entry)
    assert not list((spool.folder / "journal").iterdir()), "an end brings no journal back"


def test_a_process_is_called_as_no_other_is(monkeypatch):
    mine = process_name()
    assert process_name() == mine
    monkeypatch.setattr(os, "getpid", lambda: 1)  # a fork, or the first process of a container
    assert process_name() != mine


def test_damaged_rows_are_a_dead_letter_and_not_forgotten(spool, tmp_path):
    ticket = spool.accept(numbered(50), V1)
    path = spool.folder / "queued" / f"{ticket}.arrow"
    path.write_bytes(path.read_bytes()[:100])
    assert take(spool, ticket, config(tmp_path)) is None
    assert spool.status(ticket).state == "dead"
    assert "damaged" in spool.dead_letters()[0].reason


def test_the_way_to_accepted_rows_is_durable(tmp_path, monkeypatch):
    fsync, synced = os.fsync, set()

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", recorded)
    spool = Spool(tmp_path / "run", TEACHER)
    spool.accept(numbered(2), V1)
    way = ["run", "run/nearline", "run/nearline/spool", f"run/nearline/spool/{TEACHER}"]
    way.append(f"{way[-1]}/queued")
    assert synced >= {str(tmp_path.resolve() / folder) for folder in way}


def test_a_full_disk_accepts_nothing(spool, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="No space left on device"):
        spool.accept(numbered(2), V1)
    assert list(spool.waiting()) == []
    assert not list((spool.folder / "queued").iterdir())


def test_refused_rows_are_kept_for_a_while_and_counted_when_they_go(spool, caplog):
    bad = rows(2).append_column("reason", pa.array(["a", "b"]))
    for _ in range(3):
        spool.accept(numbered(1), V1, bad)
    assert spool.rejected_bytes() == sum(path.stat().st_size for path in spool.rejects.iterdir()) > 0
    assert spool.sweep(time.time() + 10_000) == 0, "they are kept where nobody says for how long"
    assert spool.sweep(time.time() + 99, 100.0) == 0
    assert spool.rejected_rows() == 6
    assert spool.sweep(time.time() + 101, 100.0) == 3
    assert (spool.rejected_rows(), spool.rejected_bytes()) == (0, 0)
    assert "teacher fm: 6 refused rows of 3 posts are dropped, 100 s after they were refused" in caplog.text
    assert spool.queued()[0] == 3, "the good rows of these posts wait on"


def test_what_a_killed_writer_leaves_is_swept_once_it_is_old(spool):
    left = spool.folder / "queued" / f"{TEMPORARY}abc"
    left.write_bytes(b"half")
    orphan = spool.folder / "journal" / f"{new_ticket()}.jsonl"
    orphan.write_text("{}\n")
    assert list(spool.waiting()) == []
    assert spool.sweep(time.time() + 60) == 0
    assert spool.sweep(time.time() + 2 * 3600) == 2


def test_what_was_accepted_survives_the_kill_of_its_process(tmp_path):
    """The process prints each ticket after it is accepted, and is killed in the middle of its work."""
    script = textwrap.dedent(
        f"""
        import pyarrow as pa
        from rayfm.serving.nearline.spool import Spool
        spool = Spool({str(tmp_path)!r}, "fm")
        table = pa.table({{"example_id": range(20)}})
        while True:
            print(spool.accept(table, "v1"), flush=True)
        """
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        told = [process.stdout.readline().strip() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        told += [line.strip() for line in process.stdout if len(line) == 33]
    spool = Spool(tmp_path, "fm")
    assert len(told) >= 20
    assert {ticket for ticket, _ in spool.waiting()} >= set(told)
    assert all(spool.read(ticket).table.num_rows == 20 for ticket, _ in spool.waiting())
