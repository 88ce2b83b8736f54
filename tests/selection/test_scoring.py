"""Work items against Algorithm 1 written out: the Arrow column shuffled, encoded and scored again, row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from example_store import every_feature_schema, write_store
from served_models import publish_model

from rayfm.config import DataError
from rayfm.data.encode import Encoder
from rayfm.data.store import ExampleStore
from rayfm.models import MODELS
from rayfm.selection import scoring
from rayfm.selection.importance import batch_bounds, shuffle_orders
from rayfm.selection.job import score_here, unscored
from rayfm.selection.scoring import Item, ItemScorer, Measured, gather, work_items

PERIOD, SCHEMA = "2024-01-02", every_feature_schema()
FEATURES = tuple(feature.name for feature in SCHEMA.features)
CONFIG = MODELS["deepfm"].Config(embedding_dim=8, hidden=(8,))


class Labels:
    """A teacher's labels, in another order than the tasks'; none for every ninth row, never one for a whole lane."""

    columns = ("teacher/watch", "teacher/click")

    def rows(self, period, kind, lane, start, stop, ids):
        click = (ids % 1000 / 1000).astype(np.float32)
        known = (ids % 9 != 0) & (lane != 2)
        return np.stack([3 * click, click], 1), np.stack([known, known], 1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    root = tmp_path_factory.mktemp("scoring")
    store = write_store(root / "data", [PERIOD], impressions=260, considerations=200, lanes=4)
    publish_model(root, "m.v.0", "v1", seed=1, config=CONFIG)
    return Measured(
        store=ExampleStore(store.root),
        root=str(root),
        model="m.v.0",
        version="v1",
        teacher="teacher",
        lookups={PERIOD: Labels()},
        batch_size=20,
        batches_per_lane=None,
        shuffles=2,
        seed=5,
        folder=root / "items",
    )


def mean_loss(model: torch.nn.Module, table: pa.Table, kind: str, lane: int, start: int) -> float:
    """Binary cross-entropy of click plus squared error of watch, a row at a time."""
    rows = len(table)
    none = np.zeros((rows, 0), np.float32)
    encoder = Encoder(SCHEMA)
    batch = encoder.batch(encoder.encode(table, np.zeros(rows, np.int64), none, none.astype(bool)), 0, rows)
    with torch.no_grad():
        logits = model(batch).logits
    ids = table["example_id"].to_numpy()
    values, known = Labels().rows(PERIOD, kind, lane, start, start + rows, ids)
    click, watch = [], []
    for row in range(rows):
        if kind == "impression":
            y, w = table["click"][row].as_py(), np.log1p(table["watch"][row].as_py())
        elif known[row, 0]:
            w, y = values[row].tolist()
        else:
            continue
        p = 1 / (1 + np.exp(-float(logits["click"][row])))
        click.append(-(y * np.log(p) + (1 - y) * np.log(1 - p)))
        watch.append((float(logits["watch"][row]) - w) ** 2)
    return float(np.mean(click) + np.mean(watch))


@pytest.mark.parametrize("kind", ["impression", "consideration"])
def test_an_item_is_algorithm_1(measured: Measured, kind: str, tmp_path: Path) -> None:
    item = Item(PERIOD, kind, 1, FEATURES, 0)
    changes, losses, rows = ItemScorer(measured).measure(item)
    table = measured.store.open_lane(PERIOD, kind, 1).read()
    bounds = batch_bounds(len(table), 20)
    assert rows == len(table)
    assert changes.shape == (len(FEATURES), len(bounds), 2)
    model = publish_model(tmp_path, "m", "v1", seed=1, config=CONFIG)
    for number, (start, stop) in enumerate(bounds):
        batch = table.slice(start, stop - start)
        original = mean_loss(model, batch, kind, 1, start)
        assert losses[number] == pytest.approx(original, rel=1e-5)
        orders = shuffle_orders(5, (PERIOD, kind, 1, number), 2, stop - start)
        for position, feature in enumerate(FEATURES):
            columns = [feature, "topics__weights"] if feature == "topics" else [feature]
            for shuffle, order in enumerate(orders):
                moved = batch
                for column in columns:
                    place = moved.column_names.index(column)
                    moved = moved.set_column(place, column, moved[column].take(pa.array(order)))
                change = mean_loss(model, moved, kind, 1, start) - original
                assert changes[position, number, shuffle] == pytest.approx(change, abs=2e-5)
    assert (np.abs(changes).max(axis=(1, 2)) > 1e-3).all(), "every feature changes the loss of this model"


def test_batches_without_a_label_are_left_out(measured: Measured) -> None:
    changes, losses, rows = ItemScorer(measured).measure(Item(PERIOD, "consideration", 2, FEATURES, 0))
    assert (changes.shape, losses.shape, rows) == ((len(FEATURES), 0, 2), (0,), 0)


def test_items_are_lanes_times_blocks_of_features(measured: Measured) -> None:
    items = work_items(measured.store, [PERIOD], FEATURES, 4)
    assert len(items) == 2 * 4 * 2
    assert {item.features for item in items} == {FEATURES[:4], FEATURES[4:]}
    assert len({item.path(Path("x")) for item in items}) == len(items)


def test_a_killed_job_goes_on_and_nothing_is_scored_twice(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    items = work_items(measured.store, [PERIOD], FEATURES, 4)
    scored: list[Item] = []
    measure = ItemScorer.measure

    def counted(self: ItemScorer, item: Item):
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.append(item)
        return measure(self, item)

    monkeypatch.setattr(ItemScorer, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        score_here(measured, items)
    assert len(unscored(measured, items)) == len(items) - 5
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(ItemScorer, "measure", lambda self, item: scored.append(item) or measure(self, item))
    score_here(measured, items, lambda *done: seen.append(done))
    assert sorted(scored, key=str) == sorted(items, key=str), "each once"
    assert (seen[0], seen[-1]) == ((6, 16), (16, 16))
    assert not unscored(measured, items)

    # The blocks of a lane are put together, and cutting the features otherwise gives the same numbers.
    whole = work_items(measured.store, [PERIOD], FEATURES, 64)
    folder = measured.folder.parent / "whole"
    score_here(Measured(**{**vars(measured), "folder": folder}), whole)
    for kind in ("impression", "consideration"):
        one = gather(items, measured.folder, FEATURES, kind)
        other = gather(whole, folder, FEATURES, kind)
        np.testing.assert_array_equal(one.mean, other.mean)
        np.testing.assert_array_equal(one.deviation, other.deviation)
        assert (one.loss, one.batches, one.rows) == (other.loss, other.batches, other.rows)
    assert one.rows == 150, "three lanes of fifty considerations have labels"


def test_an_unreadable_item_is_named(measured: Measured, tmp_path: Path) -> None:
    item = Item(PERIOD, "impression", 0, FEATURES, 0)
    item.path(tmp_path).write_bytes(b"PK half a file")
    with pytest.raises(DataError, match=r"impression\.0\.0\.npz: cannot be read .* delete it"):
        gather([item], tmp_path, FEATURES, "impression")
    with pytest.raises(DataError, match="have no considerations"):
        gather([item], tmp_path, FEATURES, "consideration")


def test_a_model_of_an_extension_is_given_the_shuffled_feature(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = Item(PERIOD, "impression", 3, FEATURES, 0)
    fast = ItemScorer(measured).measure(item)
    given: list[str] = []
    plain = scoring.shuffled
    monkeypatch.setattr(scoring, "replayable", lambda *_: frozenset(FEATURES) - {"history", "age"})
    monkeypatch.setattr(
        scoring, "shuffled", lambda batch, feature, *rest: given.append(feature) or plain(batch, feature, *rest)
    )
    slow = ItemScorer(measured).measure(item)
    assert set(given) == {"history", "age"}
    np.testing.assert_allclose(slow[0], fast[0], atol=1e-6)
