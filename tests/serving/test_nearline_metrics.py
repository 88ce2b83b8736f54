"""What a near-line consumer records of its teacher's backlog."""

from __future__ import annotations

from types import SimpleNamespace

from rayfm.operations.metrics import NEARLINE_DEAD, NEARLINE_OLDEST, NEARLINE_QUEUED, NEARLINE_REJECTED, capture
from rayfm.serving.nearline.consumer import NearLineConsumer
from rayfm.serving.nearline.tickets import Backlog


def test_the_backlog_is_recorded_and_not_at_each_look():
    looks = []

    def backlog() -> Backlog:
        looks.append(1)
        return Backlog(waiting=3, oldest_s=12.5, dead_letters=2, rejected_rows=7)

    consumer = NearLineConsumer.__new__(NearLineConsumer)  # without its threads and its queue
    consumer.config = SimpleNamespace(root="/data/runs/ads", teacher="fm")
    consumer.spool = SimpleNamespace(backlog=backlog)
    consumer._next_tell = 0.0
    with capture() as seen:
        consumer._tell()
        consumer._tell()
    labels = {"run": "ads", "teacher": "fm"}
    assert seen.get(NEARLINE_QUEUED, **labels) == 3
    assert seen.get(NEARLINE_OLDEST, **labels) == 12.5
    assert seen.get(NEARLINE_DEAD, **labels) == 2
    assert seen.get(NEARLINE_REJECTED, **labels) == 7
    assert looks == [1], "folders are listed at most every ten seconds"
