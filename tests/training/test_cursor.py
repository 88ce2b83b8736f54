"""The cursor of a checkpoint: periods by name, whatever the source has by the time that a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import training_runs as runs
from example_store import write_store

from rayfm.config import DataError
from rayfm.snapshots.load import SnapshotStore
from rayfm.training.checkpoint import Cursor

DAYS = ("d0", "d1", "d2", "d3")


@pytest.mark.parametrize(
    ("cursor", "periods", "expected"),
    [
        (Cursor(), DAYS, 0),
        (Cursor(finished=DAYS[:2]), DAYS, 2),
        (Cursor(finished=DAYS[:2], period="d2", step=5), DAYS, 2),
        (Cursor(period="d0", step=5), DAYS, 0),
        # More periods at the end are what a run goes on with.
        (Cursor(finished=DAYS), DAYS, 4),
        (Cursor(finished=DAYS[:2]), ("d0", "d1"), 2),
        # Nothing was predicted yet beyond d1: what comes next may still change.
        (Cursor(finished=DAYS[:2]), ("d0", "d1", "d1b", "d2"), 2),
    ],
)
def test_it_goes_on_where_it_stood(cursor: Cursor, periods: tuple[str, ...], expected: int) -> None:
    assert cursor.index(periods, "here") == expected
    assert Cursor.model_validate(cursor.dump()) == cursor


@pytest.mark.parametrize(
    ("cursor", "periods", "message"),
    [
        (Cursor(finished=DAYS[:2]), ("d-1", *DAYS), "where d0 was the source now has d-1"),
        (Cursor(finished=DAYS[:2]), ("d0", "d0b", *DAYS[1:]), "where d1 was the source now has d0b"),
        (Cursor(finished=DAYS[:2]), DAYS[1:], "where d0 was the source now has d1"),
        (Cursor(finished=DAYS[:2]), DAYS[:1], "where d1 was the source now ends"),
        (Cursor(finished=DAYS[:2], period="d2", step=5), ("d0", "d1", "d1b", "d2"), "where d2 was the source now has"),
        (Cursor(finished=DAYS[:2], period="d2", step=5), DAYS[:2], "where d2 was the source now ends"),
    ],
)
def test_other_periods_behind_it_are_refused(cursor: Cursor, periods: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=f"^here: training went through d0 .. {cursor.period or 'd1'}, and {message}"):
        cursor.index(periods, "here")


def test_a_run_with_a_period_filled_in_is_not_gone_on_with(tmp_path: Path) -> None:
    early, *rest = runs.PERIODS
    write_store(tmp_path / "store", list(runs.PERIODS), impressions=100, considerations=0)
    spec = runs.spec(tmp_path / "store", tmp_path / "run", runs.learner("fm"))
    runs.train_here(spec.model_copy(update={"periods": tuple(rest)}))
    with pytest.raises(DataError, match=f"where {rest[0]} was the source now has {early}"):
        runs.train_here(spec)
    # What was trained through the last period is not published again as of another.
    assert len(SnapshotStore(tmp_path / "run").versions("fm.none.1")) == 2
