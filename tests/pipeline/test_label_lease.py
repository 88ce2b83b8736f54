"""The lease of a label job lives as long as the job, whatever the metadata store does for a moment."""

from __future__ import annotations

import time

import torch
from small_pipeline import PERIODS, small_pipeline

from rayfm.pipeline import label_jobs, stream
from rayfm.pipeline.plan import teacher_key
from rayfm.snapshots import StoreUnavailable
from rayfm.snapshots.publish import publish


def test_a_store_that_is_away_for_a_moment_ends_no_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(label_jobs, "LEASE_S", 3.0)  # a busy machine may keep the keeper from its turn for a second
    pipeline = stream.Pipeline(small_pipeline(tmp_path))
    model = teacher_key(pipeline.config, "fm")
    publish(pipeline.run_dir, model, "v1", {"w": torch.ones(2)})
    pipeline.tickets.put("trained", "fm", PERIODS[0], {"versions": {model: "v1"}})
    monkeypatch.setattr(label_jobs, "wait_prepared", lambda *_: None)
    extend, asked, seen = type(pipeline.metadata).extend, [], []

    def away_at_first(self, lease, ttl_s):
        asked.append(lease)
        if len(asked) == 1:
            raise StoreUnavailable("away")
        return extend(self, lease, ttl_s)

    def label(*_arguments, **_options):
        deadline = time.monotonic() + 7.5
        while time.monotonic() < deadline:
            time.sleep(0.1)
        seen.extend(pipeline.collector.holders(model, "v1"))
        ticket = {"version": "v1", "table_version": 0, "labelled": 0, "coverage": {}, "seconds": 7.5}
        return ticket | {"period": PERIODS[1], "trained_through": PERIODS[0]}

    monkeypatch.setattr(type(pipeline.metadata), "extend", away_at_first)
    monkeypatch.setattr(label_jobs, "label_period", label)
    pipeline.label("fm", None, (PERIODS[1],))
    assert [lease.owner for lease in seen] == [f"label {PERIODS[1]}"]
    assert not pipeline.collector.holders(model, "v1"), "it is given back at the end"
