"""The rows of a check hold the histories that their own model reads, and no other's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import training_runs as runs
from example_store import every_feature_schema, write_store

from rayfm.export.rows import only_inputs
from rayfm.models.histories import HistoryFeature
from rayfm.models.synthetic import synthetic_batch
from rayfm.snapshots.load import SnapshotStore

NAMES = (("history/big/user", 5), ("history/big/ad", 3))


@pytest.mark.parametrize(
    ("kept", "columns", "masks"),
    [
        (None, slice(0, 8), [0, 1]),
        (["history/big/user"], slice(0, 5), [0]),
        (["history/big/ad"], slice(5, 8), [1]),
    ],
)
def test_vectors_are_chosen_by_name(kept: list[str] | None, columns: slice, masks: list[int]) -> None:
    batch = dataclasses.replace(
        synthetic_batch(every_feature_schema(), rows=9),
        representation=torch.randn(9, 8),
        representation_mask=torch.rand(9, 2) < 0.5,
        representation_widths=NAMES,
    )
    assert batch.representation is not None
    assert batch.representation_mask is not None
    found = only_inputs(batch, None, 4, kept)
    assert found.representation_widths == tuple(pair for pair in NAMES if kept is None or pair[0] in kept)
    torch.testing.assert_close(found.representation, batch.representation[:4, columns], rtol=0, atol=0)
    torch.testing.assert_close(found.representation_mask, batch.representation_mask[:4, masks], rtol=0, atol=0)
    none = only_inputs(batch, None, 4, [])
    assert (none.representation, none.representation_mask, none.representation_widths) == (None, None, ())


def test_a_model_without_histories_is_checked_without(tmp_path: Path) -> None:
    write_store(tmp_path / "store", list(runs.PERIODS[:1]), impressions=40, considerations=0)
    plain, told = runs.learner("fm"), runs.learner("fm", seed=2)
    history = HistoryFeature(teacher="big", key="user", width=4)
    told = told.model_copy(update={"model": told.model.model_copy(update={"histories": (history,)})})
    spec = runs.spec(tmp_path / "store", tmp_path / "run", plain, told)
    runs.train_here(spec.model_copy(update={"periods": runs.PERIODS[:1]}))
    store = SnapshotStore(tmp_path / "run")
    for learner, widths in ((plain, ()), (told, ((history.name, 4),))):
        rows = store.check_rows(learner.key, store.latest(learner.key))
        assert rows is not None
        assert rows.batch.representation_widths == widths
        assert (rows.batch.representation is not None) == bool(widths)
