"""The rows that a version is checked on before it is published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from example_store import every_feature_schema, write_store

from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader
from rayfm.data.steps import LaneCache, ReadPlan
from rayfm.data.store import ExampleStore
from rayfm.training.export_check import first_step

SCHEMA = every_feature_schema()
DAY = "2024-01-01"


def reading(root: Path, impressions: int) -> tuple[ReadPlan, Encoder]:
    write_store(root, [DAY], impressions=impressions, considerations=50)
    encoder = Encoder(SCHEMA, None, ())
    return ReadPlan(ExampleStore(root), (*encoder.columns, "sampling_weight", "user_id"), batch_size=32), encoder


def test_they_are_the_first_step_and_nothing_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, encoder = reading(tmp_path, 700)
    expected = next(iter(ArrowReader(plan, encoder, 0, 1).batches(DAY)))
    read: list[int] = []
    original = LaneCache.read

    def keep(self: LaneCache, *arguments):  # type: ignore[no-untyped-def]
        table = original(self, *arguments)
        read.append(table.num_rows)
        return table

    monkeypatch.setattr(LaneCache, "read", keep)
    found = first_step(plan, encoder, DAY)
    assert sum(read) == 32
    assert found is not None
    assert torch.equal(found.example_id, expected.example_id)
    assert torch.equal(found.dense, expected.dense)
    assert torch.equal(found.labels, expected.labels)
    for name in ("sparse", "weighted", "sequence"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert torch.equal(ours.values(), theirs.values())
        assert torch.equal(ours.lengths(), theirs.lengths())


def test_a_period_without_impressions_has_none(tmp_path: Path) -> None:
    plan, encoder = reading(tmp_path, 0)
    assert first_step(plan, encoder, DAY) is None
