from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake.exceptions import CommitFailedError
from nearline_cases import (
    DAY2_US,
    DAY_US,
    MODEL,
    TEACHER,
    V1,
    V2,
    Bench,
    predicted,
    publish_teacher,
    rows,
)

from rayfm.config import CapacityError, DataError, LabelError, SnapshotError
from rayfm.serving.nearline.batcher import Batcher
from rayfm.serving.nearline.labeller import Failure, Labeller, is_lasting
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.rows import Versions, check_post, fitted, period_of
from rayfm.snapshots import SnapshotStore


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    for version in (V1, V2):
        publish_teacher(root, version)
    return root


@pytest.fixture
def versions(root):
    return Versions(SnapshotStore(root), MODEL)


@pytest.fixture
def bench(root):
    return Bench(root)


def test_a_version_says_what_a_post_must_have(versions):
    newest = versions.current()
    assert (newest.version, newest.trained_through) == (V2, "2024-01-02")
    assert newest.columns == ["example_id", "time", "traffic", "age", "user"], "the teacher does not read 'unread'"
    assert [task.name for task in newest.tasks] == ["click", "watch"]
    assert Versions(SnapshotStore(versions._store.root), MODEL, V1).current().version == V1


def test_without_a_snapshot_nothing_is_accepted(tmp_path):
    with pytest.raises(SnapshotError, match=r"no snapshot of 'fm\.teacher\.0' is published yet"):
        Versions(SnapshotStore(tmp_path), MODEL).current()


def test_a_newer_snapshot_is_noticed(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("rayfm.serving.nearline.rows.time.monotonic", lambda: clock[0])
    publish_teacher(tmp_path, V1)
    versions = Versions(SnapshotStore(tmp_path), MODEL)
    assert versions.current().version == V1
    publish_teacher(tmp_path, V2)
    clock[0] += 60
    assert versions.current().version == V2


def test_bad_rows_are_set_apart_with_their_reasons(versions):
    table = rows(8)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["age"][1] = float("nan")
    columns["user"][2] = 2**63
    columns["traffic"][3] = "billboard"
    columns["time"][4] = DAY2_US - 1
    columns["example_id"][5] = columns["example_id"][0]
    columns["time"][6] = None
    post = check_post(pa.table(columns | {"user": pa.array(columns["user"], pa.uint64())}), TEACHER, versions.get(V1))
    assert post.good["example_id"].to_pylist() == [0, 7]
    assert post.good["nearline/row"].to_pylist() == [0, 7]
    assert post.good["note"].to_pylist() == ["n0", "n7"], "what the teacher does not read is kept"
    reasons = dict(zip(post.rejects["nearline/row"].to_pylist(), post.rejects["reason"].to_pylist(), strict=True))
    assert reasons == {
        1: "dense 'age' is not finite",
        2: "id beyond int64 in 'user'",
        3: "unknown traffic",
        4: "leak: fm@2024-01-01-aaaaaaaa was trained through 2024-01-01 and must not label period 2024-01-01; "
        "label it with a version trained through an earlier period",
        5: "example_id twice in the post",
        6: "null time",
    }
    assert post.rejects["note"].to_pylist() == ["n1", "n2", "n3", "n4", "n5", "n6"]


def test_a_post_of_many_periods_or_of_the_future_is_refused(versions, monkeypatch):
    """Each period is a file in the commit, with two syncs: ten thousand of them would outlast their consumer."""
    monkeypatch.setattr("rayfm.serving.nearline.rows.time.time", lambda: (DAY2_US + 5 * DAY_US) / 1e6)
    version = versions.get(V1)
    columns = rows(9).to_pydict()
    columns["time"] = [DAY2_US + day * DAY_US for day in (0, 1, 2, 3, 4, 5, 6, 7, 2_900_000)]
    post = check_post(pa.table(columns), TEACHER, version, periods=7, ahead_s=86_400)
    assert post.good["example_id"].to_pylist() == list(range(7))
    assert set(post.rejects["reason"].to_pylist()) == {"time is more than 86400 s in the future"}
    with pytest.raises(DataError, match="the post's rows are of 7 days; send those of at most 6 at a time"):
        check_post(pa.table(columns), TEACHER, version, periods=6, ahead_s=86_400)
    with pytest.raises(DataError, match="the post's rows are of 7 hours; send those of at most 6 at a time"):
        check_post(pa.table(columns), TEACHER, version, "hour", periods=6, ahead_s=86_400)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["user"]), "lacks column 'user'"),
        (lambda t: t.append_column("age", t["age"]), "column 'age' twice"),
        (lambda t: t.set_column(3, "age", pa.array(["old"] * len(t))), "column 'age' is string"),
    ],
)
def test_a_column_that_can_never_fit_refuses_the_post(versions, change, message):
    with pytest.raises(DataError, match=message):
        check_post(change(rows(3)), TEACHER, versions.get(V1))


def test_periods_are_days_or_hours_in_utc():
    times = np.array([DAY2_US, DAY2_US + DAY_US - 1, DAY2_US + DAY_US, DAY2_US + 3_600_000_000 * 5 + 1])
    assert period_of(times, "day").tolist() == ["2024-01-02", "2024-01-02", "2024-01-03", "2024-01-02"]
    assert period_of(times, "hour").tolist() == ["2024-01-02T00", "2024-01-02T23", "2024-01-03T00", "2024-01-02T05"]
    assert period_of(times[:0], "day").tolist() == []


def test_tickets_are_labelled_in_one_forward_and_one_commit(bench):
    tables = [rows(5), rows(7, 100, day=1), rows(1, 200)]
    tickets = [bench.accept(table) for table in tables]
    assert bench.label(*tickets) == dict.fromkeys(tickets)
    assert bench.oracle.asked == [13]
    stored = bench.stored()
    assert bench.labels.open().version() == 1, "the table was made, then one commit"
    expected = pa.concat_tables(tables)
    assert stored["example_id"].to_pylist() == expected["example_id"].to_pylist()
    assert stored["ticket"].to_pylist() == [tickets[0]] * 5 + [tickets[1]] * 7 + [tickets[2]]
    assert stored["row"].to_pylist() == [*range(5), *range(7), 0]
    assert stored["period"].to_pylist() == ["2024-01-02"] * 5 + ["2024-01-03"] * 7 + ["2024-01-02"]
    assert set(stored["version"].to_pylist()) == {V1}
    assert stored["task_click"].equals(predicted(expected)["click"])
    assert stored["task_watch"].equals(predicted(expected)["watch"])
    for ticket, table in zip(tickets, tables, strict=True):
        status = bench.spool.status(ticket)
        assert (status.state, status.rows, status.version, status.table_version) == ("committed", len(table), V1, 1)


def test_versions_do_not_mix_in_a_batch(bench):
    old, new = bench.accept(rows(4, day=1)), bench.accept(rows(4, day=1), V2)
    bench.label(old, new)
    assert bench.oracle.asked == [4, 4]
    stored = bench.stored()
    for ticket, version in ((old, V1), (new, V2)):
        part = stored.filter(pc.equal(stored["ticket"], ticket))
        assert set(part["version"].to_pylist()) == {version}
        assert part["task_click"].equals(predicted(rows(4), version)["click"])


def test_a_ticket_that_is_delivered_again_is_not_labelled_again(bench):
    """Its consumer died after the commit and before it said so."""
    ticket, other = bench.accept(rows(5)), bench.accept(rows(3, 50))
    entries = [bench.spool.read(ticket), bench.spool.read(other)]
    bench.labels.append(TEACHER, bench.labeller._scored(entries[:1], bench.versions.get(V1)))
    assert bench.labeller.label(entries) == {ticket: None, other: None}
    assert bench.oracle.asked == [5, 3], "the held ticket is not scored a second time"
    stored = bench.stored()
    assert sorted(stored["example_id"].to_pylist()) == [*range(5), 50, 51, 52]
    assert bench.spool.status(ticket).state == "committed"
    bench.labeller.label(entries)
    assert bench.stored().num_rows == 8
    assert bench.oracle.asked == [5, 3]


def test_two_consumers_with_the_same_tickets_label_them_once(bench, monkeypatch):
    """Both have scored before either commits, in batches that overlap in part."""
    tickets = [bench.accept(rows(2, 10 * number)) for number in range(3)]
    entries = [bench.spool.read(ticket) for ticket in tickets]
    first = bench.labeller._scored(entries[:2], bench.versions.get(V1))
    second = bench.labeller._scored(entries[1:], bench.versions.get(V1))
    # The second decides before the first commits: its commit must fail, and be decided anew.
    decide = bench.labels.held
    decided = []

    def held(table, teacher, wanted):
        found = decide(table, teacher, wanted)
        if not decided:
            decided.append(found)
            NearLineLabels(bench.config.root).append(TEACHER, first)
        return found

    monkeypatch.setattr(bench.labels, "held", held)
    done = bench.labels.append(TEACHER, second)
    assert decided == [frozenset()]
    assert (done.added, done.held) == (frozenset(tickets[2:]), frozenset(tickets[1:2]))
    assert bench.stored()["example_id"].to_pylist() == [0, 1, 10, 11, 20, 21]


def test_many_writers_label_each_ticket_once(bench):
    tickets = [bench.accept(rows(3, 10 * number)) for number in range(8)]
    entries = {ticket: bench.spool.read(ticket) for ticket in tickets}

    def work(seed: int) -> None:
        mine = Bench(Path(bench.config.root))
        for ticket in np.random.default_rng(seed).permutation(tickets):
            assert mine.labeller.label([entries[str(ticket)]]) == {str(ticket): None}

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = bench.stored()
    assert stored.num_rows == 24
    assert len(set(zip(stored["ticket"].to_pylist(), stored["row"].to_pylist(), strict=True))) == 24


def test_one_bad_ticket_spoils_no_other(bench):
    good, bad, last = bench.accept(rows(3)), bench.accept(rows(3, 66)), bench.accept(rows(3, 90))
    bench.oracle.poison = {67}
    outcome = bench.label(good, bad, last)
    assert outcome[good] is None
    assert outcome[last] is None
    assert outcome[bad].lasting
    assert outcome[bad].why == "RuntimeError: index out of range"
    assert bench.oracle.asked == [9, 3, 3, 3]
    assert set(bench.stored()["ticket"].to_pylist()) == {good, last}
    assert bench.spool.status(bad).reason == "RuntimeError: index out of range"


def test_a_service_that_is_down_is_asked_once_a_batch(bench):
    tickets = [bench.accept(rows(3)), bench.accept(rows(3, 66))]
    bench.oracle.error = TimeoutError("no answer")
    outcome = bench.label(*tickets)
    assert [failure.lasting for failure in outcome.values()] == [False, False]
    assert bench.oracle.asked == [6]
    bench.oracle.error = None
    assert bench.label(*tickets) == dict.fromkeys(tickets)


def test_a_slow_teacher_is_not_asked_for_longer_than_a_consumer_may_take(bench, monkeypatch):
    """Else its consumer would be replaced in the middle, again and again, and its tickets be taken for deadly."""
    clock = [0.0]
    monkeypatch.setattr("rayfm.serving.nearline.labeller.time.monotonic", lambda: clock[0])
    tickets = [bench.accept(rows(2, day=1), version) for version in (V1, V2)]
    asked = []

    def slow(table, version):
        asked.append(version)
        clock[0] += bench.config.consumer.score_timeout_s + 0.1
        raise TimeoutError("no answer")

    labeller = Labeller(bench.config, bench.spool, bench.labels, bench.versions, slow)
    outcome = labeller.label([bench.spool.read(ticket) for ticket in tickets])
    assert asked == [V1]
    assert clock[0] < 2 * bench.config.consumer.stall_s
    assert outcome[tickets[0]] == Failure("TimeoutError: no answer", lasting=False)
    assert outcome[tickets[1]] == Failure("the teacher took too long over others of the batch", lasting=False)


@pytest.mark.parametrize(
    ("click", "message"),
    [(float("nan"), "task 'click': the teacher predicts nan"), (1.5, "task 'click': the teacher predicts 1.5")],
)
def test_what_is_no_probability_is_no_label(bench, click, message):
    ticket = bench.accept(rows(2))

    def score(table, version):
        return version, pa.table({"click": pa.array([0.5, click], pa.float32()), "watch": table["age"]})

    labeller = Labeller(bench.config, bench.spool, bench.labels, bench.versions, score)
    failure = labeller.label([bench.spool.read(ticket)])[ticket]
    assert failure.lasting
    assert message in failure.why
    assert "row 1 of" in failure.why
    assert bench.labels.open() is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda table, version: (V2, predicted(table)), f"asked {V1}, the service answered with {V2}"),
        (lambda table, version: (version, predicted(table).slice(1)), "asked 2 rows, the service answered 1"),
    ],
)
def test_an_answer_to_another_question_is_no_label(bench, answer, message):
    ticket = bench.accept(rows(2))
    labeller = Labeller(bench.config, bench.spool, bench.labels, bench.versions, answer)
    assert message in labeller.label([bench.spool.read(ticket)])[ticket].why
    assert bench.labels.open() is None


def test_a_replay_with_a_version_that_saw_the_rows_is_refused(bench):
    ticket = bench.accept(rows(2))
    bench.spool.bury(ticket, "test")
    bench.spool.replay(ticket, V2)
    assert "leak: fm@2024-01-02-bbbbbbbb was trained through 2024-01-02" in bench.label(ticket)[ticket].why
    assert bench.labels.open() is None


def test_a_snapshot_that_is_gone_is_said(bench):
    ticket = bench.spool.accept(bench.spool.read(bench.accept(rows(2))).table, "2023-12-31-gone")
    failure = bench.label(ticket)[ticket]
    assert failure.lasting
    assert "fm.teacher.0@2023-12-31-gone is not published" in failure.why


def test_rows_for_another_versions_columns_are_refused(bench):
    with pytest.raises(DataError, match="reads column 'user', which the posted rows lack"):
        fitted(rows(2).drop_columns(["user"]), bench.versions.get(V1))


def test_which_errors_last():
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.serve.exceptions import BackPressureError

    lasting = [
        DataError("x"), SnapshotError("x"), LabelError("x"), RuntimeError("x"), TypeError("x"),
        RayTaskError("score", "trace", RuntimeError("x")).as_instanceof_cause(),
        RayTaskError("score", "trace", SnapshotError("x")).as_instanceof_cause(),
    ]  # fmt: skip
    passing = [
        CapacityError("x"), OSError("x"), TimeoutError("x"), ActorDiedError(), BackPressureError(1, 2),
        RayTaskError("score", "trace", OSError("disk")).as_instanceof_cause(),
    ]  # fmt: skip
    assert [is_lasting(error) for error in lasting] == [True] * len(lasting)
    assert [is_lasting(error) for error in passing] == [False] * len(passing)


def test_labels_are_looked_up_by_example(bench):
    first = bench.accept(rows(4))
    bench.label(first)
    before = bench.labels.open().version()
    bench.label(bench.accept(rows(6, 2)))  # ids 2 and 3 again
    ids = np.array([3, 99, 0, 7])
    found = bench.labels.lookup(TEACHER, V1, "2024-01-02", ids, ("watch", "click"))
    assert found.mask.tolist() == [[True, True], [False, False], [True, True], [True, True]]
    np.testing.assert_allclose(found.values[:, 0], [3, 0, 0, 7])
    np.testing.assert_allclose(found.values[:, 1], [3 / 250, 0, 0, 7 / 250], rtol=1e-6)
    at_first = bench.labels.lookup(TEACHER, V1, "2024-01-02", ids, ("watch",), before)
    assert at_first.mask[:, 0].tolist() == [True, False, True, False]
    assert not bench.labels.lookup(TEACHER, V2, "2024-01-02", ids, ("watch",)).mask.any()
    assert not bench.labels.lookup(TEACHER, V1, "2024-01-03", ids, ("watch",)).mask.any()
    with pytest.raises(LabelError, match="no labels of task 'clicks'"):
        bench.labels.lookup(TEACHER, V1, "2024-01-02", ids, ("clicks",))


def test_the_first_tickets_label_is_the_examples(bench):
    """Were a snapshot not to score alike twice, the answer for a table version would still never change."""
    early, late = bench.accept(rows(2)), bench.accept(rows(2))
    scored = bench.labeller._scored([bench.spool.read(late)], bench.versions.get(V1))
    column = scored.column_names.index("task_watch")
    bench.labels.append(TEACHER, scored.set_column(column, "task_watch", pa.array([0.5, 0.5], pa.float32())))
    ids = np.array([0, 1])
    assert bench.labels.lookup(TEACHER, V1, "2024-01-02", ids, ("watch",)).values[:, 0].tolist() == [0.5, 0.5]
    bench.label(early)
    assert bench.labels.lookup(TEACHER, V1, "2024-01-02", ids, ("watch",)).values[:, 0].tolist() == [0.0, 1.0]


def test_a_later_task_is_a_new_column(bench):
    bench.label(bench.accept(rows(2)))
    more = bench.labeller._scored([bench.spool.read(bench.accept(rows(1, 9)))], bench.versions.get(V1))
    bench.labels.append(TEACHER, more.append_column("task_share", pa.array([0.25], pa.float32())))
    assert bench.labels.tasks(bench.labels.open()) == ("click", "watch", "share")
    assert bench.stored()["task_share"].to_pylist() == [None, None, 0.25]


def test_commits_that_never_win_are_tried_later(bench, monkeypatch):
    ticket = bench.accept(rows(2))
    bench.label(bench.accept(rows(1, 9)))

    def lose(*args, **options):
        raise CommitFailedError("another was faster")

    monkeypatch.setattr("rayfm.serving.nearline.labels.DeltaTable.create_write_transaction", lose)
    monkeypatch.setattr("rayfm.serving.nearline.labels.time.sleep", lambda seconds: None)
    failure = bench.label(ticket)[ticket]
    assert "gave way to 101 other commits" in failure.why
    assert not failure.lasting
    assert bench.spool.status(ticket).state == "queued"


def test_another_table_is_not_taken_for_this_one(tmp_path):
    from deltalake import write_deltalake

    write_deltalake(str(tmp_path / "nearline" / "labels"), pa.table({"teacher": ["a"], "period": ["b"]}))
    with pytest.raises(LabelError, match="column 'version' is missing; name another root"):
        NearLineLabels(tmp_path).open()


def test_tickets_that_come_together_are_a_batch(bench):
    entries = [bench.spool.read(bench.accept(rows(4, 10 * number))) for number in range(5)]
    sizes = []

    def label(batch):
        sizes.append([entry.table.num_rows for entry in batch])
        return {entry.ticket: None for entry in batch}

    batcher = Batcher(label, tickets=3, rows=1000, delay_s=30.0)
    futures = [batcher.submit(entry) for entry in [*entries[:2], entries[0]]]
    assert [future.result(10) for future in futures] == [None] * 3
    assert sizes == [[4, 4]], "full at three deliveries, of which two are of one ticket"
    batcher.stop()
    assert not batcher.alive()
    sizes.clear()
    batcher = Batcher(label, tickets=99, rows=8, delay_s=30.0)
    futures = [batcher.submit(entry) for entry in entries[:4]]
    assert [future.result(10) for future in futures] == [None] * 4
    assert sizes == [[4, 4], [4, 4]], "full at eight rows"
    batcher.stop()


def test_a_batch_that_raises_is_told_to_all_and_ends_nothing(bench):
    calls = []

    def label(batch):
        calls.append(len(batch))
        if len(calls) == 1:
            raise ValueError("a bug")
        return {entry.ticket: None for entry in batch}

    batcher = Batcher(label, tickets=1, rows=10, delay_s=0.0)
    entry = bench.spool.read(bench.accept(rows(2)))
    with pytest.raises(ValueError, match="a bug"):
        batcher.submit(entry).result(10)
    assert batcher.submit(entry).result(10) is None
    assert batcher.alive()
    batcher.stop()
