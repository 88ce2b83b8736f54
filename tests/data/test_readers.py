"""Readers: equal batches from both, whatever the number of workers, from any cursor."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from example_store import IdLookup, IdVectors, every_feature_rows, every_feature_schema, write_store

from rayfm.config import ConfigError, DataError
from rayfm.data import reader as reader_module
from rayfm.data.batch import Batch
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader, RayDataReader, ahead
from rayfm.data.span import ReadSpan
from rayfm.data.steps import ReadPlan
from rayfm.data.store import ExampleStore
from rayfm.schema import string_ids, table_rows

SUPERVISION = ("teacher/click", "logged/ranking/click")
REPRESENTATIONS = (("teacher", 2), ("absent", 3))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExampleStore:
    return write_store(tmp_path_factory.mktemp("store"), ["2024-01-01", "2024-01-02"], 1001, 603)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "CHUNK_ROWS", 256)
    monkeypatch.setattr(reader_module, "ROW_GROUP", 128)


def make(store: ExampleStore, share: float = 0.5, **kwargs) -> tuple[ReadPlan, Encoder]:
    encoder = Encoder(every_feature_schema(), supervision=SUPERVISION, representations=REPRESENTATIONS)
    columns = (*encoder.columns, "user_id", "request_id", "logged/ranking/click")
    plan = ReadPlan(store, columns, 64, SUPERVISION, (IdLookup(),), share, REPRESENTATIONS, (IdVectors(),), **kwargs)
    return plan, encoder


@pytest.mark.parametrize("value", [1.2, -0.1, float("nan"), float("inf")])
def test_supervision_of_a_binary_task_is_a_probability(value: float) -> None:
    names = ("fm/watch", "fm/click")
    encoder = Encoder(every_feature_schema(), supervision=names)
    table, kind = every_feature_rows(3, seed=1), np.zeros(3, np.int64)
    supervision = np.array([[5.0, 0.0], [-7.0, 1.0], [0.0, value]], np.float32)
    mask = np.array([[True, True], [True, True], [True, False]])
    encoder.encode(table, kind, supervision, mask)  # a regression may have any value; what is masked does not count
    mask[2, 1] = True
    with pytest.raises(DataError, match=f"supervision column 'fm/click': {value:g} is no probability"):
        encoder.encode(table, kind, supervision, mask)


def break_pages(path: Path) -> None:
    """Overwrite the first pages of a Parquet file; its footer stays."""
    data = bytearray(path.read_bytes())
    data[20:600] = bytes(580)
    path.write_bytes(data)


def assert_equal(left: Batch, right: Batch) -> None:
    for name in vars(left):
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name
        elif hasattr(a, "keys"):
            assert a.keys() == b.keys()
            assert torch.equal(a.values(), b.values())
            assert torch.equal(a.lengths(), b.lengths())
            assert (a.weights_or_none() is None) == (b.weights_or_none() is None)
            if a.weights_or_none() is not None:
                assert torch.equal(a.weights(), b.weights())
        else:
            assert a == b


def rows_of(batch: Batch) -> dict[int, tuple]:
    """Every row of a batch, by kind and id, as plain values."""
    kjts = [batch.sparse, batch.weighted, batch.sequence]
    jagged = [(key, kjt[key].to_dense()) for kjt in kjts for key in kjt.keys()]  # noqa: SIM118
    return {
        (int(batch.kind[i]), int(batch.example_id[i])): (
            batch.dense[i].tolist(),
            batch.labels[i].tolist(),
            batch.label_mask[i].tolist(),
            batch.supervision[i].tolist(),
            batch.supervision_mask[i].tolist(),
            batch.representation[i].tolist(),
            batch.representation_mask[i].tolist(),
            {key: dense[i].tolist() for key, dense in jagged},
            int(batch.user[i]),
            int(batch.group[i]),
            int(batch.traffic[i]),
        )
        for i in range(len(batch))
    }


def test_steps_do_not_depend_on_the_number_of_workers(store: ExampleStore) -> None:
    plan, encoder = make(store)
    whole = list(ArrowReader(plan, encoder).batches("2024-01-01"))
    for world in (2, 4):
        parts = [list(ArrowReader(plan, encoder, rank, world).batches("2024-01-01")) for rank in range(world)]
        assert {len(part) for part in parts} == {len(whole)}
        for step, batch in enumerate(whole):
            merged: dict = {}
            for part in parts:
                rows = rows_of(part[step])
                assert not merged.keys() & rows.keys()
                merged |= rows
            assert merged == rows_of(batch)


def test_every_impression_is_read_once_in_time_order(store: ExampleStore) -> None:
    plan, encoder = make(store)
    batches = list(ArrowReader(plan, encoder).batches("2024-01-01"))
    ids = torch.cat([batch.example_id[batch.kind == 0] for batch in batches])
    assert len(ids) == 1001 == len(set(ids.tolist()))
    lanes = [store.open_lane("2024-01-01", "impression", lane).read() for lane in range(4)]
    time = dict(zip(*(pa.concat_tables(lanes)[name].to_pylist() for name in ("example_id", "time")), strict=True))
    step_times = [[time[int(i)] for i in batch.example_id[batch.kind == 0]] for batch in batches]
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(step_times))


def test_considerations_join_by_time_at_their_share(store: ExampleStore) -> None:
    plan, encoder = make(store, share=0.5)
    batches = list(ArrowReader(plan, encoder).batches("2024-01-01"))
    seen = sum(int((batch.kind == 1).sum()) for batch in batches)
    assert 0.4 * 603 < seen < 0.6 * 603
    everything = list(ArrowReader(make(store, share=1.0)[0], encoder).batches("2024-01-01"))
    assert sum(int((batch.kind == 1).sum()) for batch in everything) == 603
    assert not any(bool(batch.label_mask[batch.kind == 1].any()) for batch in everything)
    none = list(ArrowReader(make(store, share=0.0)[0], encoder).batches("2024-01-01"))
    assert all(bool((batch.kind == 0).all()) for batch in none)


def test_a_reader_starts_at_any_step(store: ExampleStore) -> None:
    plan, encoder = make(store)
    whole = list(ArrowReader(plan, encoder).batches("2024-01-02"))
    rest = list(ArrowReader(plan, encoder).batches("2024-01-02", start=5))
    assert len(rest) == len(whole) - 5
    for left, right in zip(whole[5:], rest, strict=True):
        assert_equal(left, right)


def test_supervision_comes_from_lookups_and_logged_columns(store: ExampleStore) -> None:
    plan, encoder = make(store)
    for batch in ArrowReader(plan, encoder).batches("2024-01-01"):
        value, mask = batch.supervised("teacher/click")
        ids = batch.example_id
        assert torch.equal(mask, ids % 7 != 0)
        torch.testing.assert_close(value, (ids % 1000).float() / 1000)
        logged, known = batch.supervised("logged/ranking/click")
        assert bool(known.any())
        assert not bool(known.all())
        assert bool((logged[~known] == 0).all())


def test_representations_come_from_lookups(store: ExampleStore) -> None:
    plan, encoder = make(store)
    seen = 0
    for batch in ArrowReader(plan, encoder).batches("2024-01-01"):
        values, mask = batch.represented("teacher")
        ids = batch.example_id
        assert torch.equal(mask, ids % 5 != 0)
        assert torch.equal(values, torch.stack([ids % 100, ids % 9], 1).float())
        values, mask = batch.represented("absent")
        assert values.shape == (len(batch), 3)
        assert not bool(mask.any() or values.any()), "what no look-up has is masked"
        seen += int((batch.kind == 1).sum())
    assert seen > 200, "considerations have them too"
    with pytest.raises(ValueError, match="no representation 'fm'"):
        batch.represented("fm")
    moved = batch.to(torch.device("cpu"), non_blocking=True)
    assert torch.equal(moved.represented("teacher")[0], batch.represented("teacher")[0])
    assert batch.to(torch.device("meta")).representation_mask.device.type == "meta"


def test_a_reader_without_representations_makes_none(store: ExampleStore) -> None:
    encoder = Encoder(every_feature_schema())
    batch = next(ArrowReader(ReadPlan(store, tuple(encoder.columns), 64), encoder).batches("2024-01-01"))
    assert (batch.representation, batch.representation_mask) == (None, None)
    assert batch.to(torch.device("cpu")).representation is None


def test_encoding_against_plain_python(store: ExampleStore) -> None:
    schema = every_feature_schema()
    plan, encoder = make(store, share=0.0)
    rows: dict = {}
    for batch in ArrowReader(plan, encoder).batches("2024-01-01"):
        dense = {key: batch.sequence[key] for key in ("history",)}
        for i, example in enumerate(batch.example_id.tolist()):
            tags, ads, users = batch.sparse["tags"], batch.sparse["ad"], batch.sparse["user"]
            rows[example] = (
                batch.dense[i, 0].item(),
                [jt.values()[jt.offsets()[i] : jt.offsets()[i + 1]].tolist() for jt in (users, ads, tags)],
                dense["history"].values()[dense["history"].offsets()[i] : dense["history"].offsets()[i + 1]].tolist(),
                batch.weighted["topics"]
                .weights()[batch.weighted["topics"].offsets()[i] : batch.weighted["topics"].offsets()[i + 1]]
                .tolist(),
                batch.labels[i].tolist(),
                schema.traffics[batch.traffic[i]],
            )

    def row_of(table: str, values: list) -> list[int]:
        if not values:
            return []
        ids = string_ids(pa.array(values)) if isinstance(values[0], str) else np.array(values, np.int64)
        return table_rows(ids, schema.tables[table].rows, schema.salt(table)).tolist()

    for lane in range(4):
        for row in store.open_lane("2024-01-01", "impression", lane).read().to_pylist():
            age, (users, ads, tags), history, weights, labels, traffic = rows[row["example_id"]]
            assert age == pytest.approx(np.log1p(30.0 if row["age"] is None else row["age"]) / 2, rel=1e-5)
            assert users == ([] if row["user"] is None else row_of("user", [row["user"]]))
            assert ads == row_of("ad", [row["ad"]])
            assert tags == row_of("tag", row["tags"][:3])
            assert history == row_of("ad", row["history"][-4:])
            assert weights == pytest.approx(row["topics__weights"])
            assert labels == pytest.approx([row["click"], np.log1p(row["watch"])], rel=1e-5)
            assert traffic == row["traffic"]


def test_a_reading_task_has_whole_chunks_about_a_row_group_of_each_lane(
    store: ExampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = make(store)
    manifest = store.manifest("2024-01-01")
    # 64 rows a step, 16 of each of 4 lanes; a chunk of 256 rows is 4 steps, a row group of 128 rows 8 steps.
    assert reader_module.chunk_steps(plan) == 4
    assert reader_module.span_steps(plan, manifest) == 8
    monkeypatch.setattr(reader_module, "SPAN_BYTES", 1)
    assert reader_module.span_steps(plan, manifest) == 4
    monkeypatch.setattr(reader_module, "ROW_GROUP", 1)
    assert reader_module.span_steps(plan, manifest) == 4


def test_leaving_a_reader_ends_its_threads(store: ExampleStore) -> None:
    before = threading.active_count()
    plan, encoder = make(store)
    batches = ArrowReader(plan, encoder).batches("2024-01-01")
    next(batches)
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [1, 4])
def test_items_are_made_so_many_ahead_and_no_more(count: int) -> None:
    made = list[int]()
    waiting = threading.Event()

    def items() -> Iterator[int]:
        for item in range(20):
            made.append(item)
            if len(made) == 1 + count + 1:  # one taken, ``count`` kept, and one in hand
                waiting.set()
            yield item

    taken = ahead(items(), count)
    assert next(taken) == 0
    assert waiting.wait(30)
    threading.Event().wait(0.3)  # the thread tries again every tenth of a second
    assert len(made) == count + 2
    assert list(taken) == list(range(1, 20))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_data_gives_the_same_batches(store: ExampleStore) -> None:
    plan, encoder = make(store)
    periods = ["2024-01-01", "2024-01-02"]
    for rank, world, start in ((0, 1, 3), (1, 2, 0)):
        pipeline = RayDataReader(plan, encoder, periods, rank, world, start=start)
        direct = ArrowReader(plan, encoder, rank, world)
        for period in periods:
            begin = start if period == periods[0] else 0
            pairs = zip(pipeline.batches(period, begin), direct.batches(period, begin), strict=True)
            for left, right in pairs:
                assert_equal(left, right)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_data_names_a_corrupt_lane_as_the_direct_reader_does(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The footer is whole, so that only a reading task finds out; what lies before it is read all the same."""
    store = write_store(tmp_path, ["2024-01-01", "2024-01-02"], 1001, 603)
    break_pages(store.lane_path("2024-01-02", "impression", 2))
    plan, encoder = make(store)
    messages = []
    for reader in (RayDataReader(plan, encoder, ["2024-01-01", "2024-01-02"]), ArrowReader(plan, encoder)):
        assert len(list(reader.batches("2024-01-01"))) == reader.steps("2024-01-01")
        with pytest.raises(
            DataError, match=r"lane-2\.parquet: corrupt Parquet file .*; prepare period 2024-01-02 a"
        ) as error:
            list(reader.batches("2024-01-02"))
        assert type(error.value) is DataError
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert "Traceback" not in capfd.readouterr().err


def read_here(monkeypatch: pytest.MonkeyPatch, order: Callable[[int], list[int]]) -> None:
    """Have `RayDataReader` get its blocks without Ray, in this ``order`` of their places."""

    def run(reader: RayDataReader, rank: int, world: int) -> Iterator[tuple[tuple[str, int, int], pa.Table]]:
        spans = reader._spans
        read = ReadSpan(reader.plan, spans, [4] * len(spans), rank, world)
        for span, place in zip(spans, order(len(spans)), strict=True):
            yield span, read(pa.table({"span": [place]}))

    monkeypatch.setattr(RayDataReader, "_run", run)


def test_blocks_in_their_order_are_read_as_directly(store: ExampleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read_here(monkeypatch, lambda count: list(range(count)))
    plan, encoder = make(store)
    pairs = zip(
        RayDataReader(plan, encoder, ["2024-01-01"], 1, 2).batches("2024-01-01"),
        ArrowReader(plan, encoder, 1, 2).batches("2024-01-01"),
        strict=True,
    )
    for left, right in pairs:
        assert_equal(left, right)


@pytest.mark.parametrize("moved", [1, -1])
def test_a_block_of_other_steps_is_refused_before_it_is_trained(
    store: ExampleStore, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """Were the pipeline to lose its order: whatever came first, none of its rows is taken for those that are due."""
    monkeypatch.setattr(reader_module, "ROW_GROUP", 64)
    read_here(monkeypatch, lambda count: [(place + moved) % count for place in range(count)])
    plan, encoder = make(store)
    reader = RayDataReader(plan, encoder, ["2024-01-01"])
    (_, first, last), steps = reader._spans[0], reader.steps("2024-01-01")
    assert len(reader._spans) > 2
    period, start, stop = reader._spans[moved]
    due = rf"Ray Data gave steps {start}\.\.{stop - 1} where {first}\.\.{last - 1} are due"
    assert (period, stop <= steps) == ("2024-01-01", True)
    batches = reader.batches("2024-01-01")
    with pytest.raises(DataError, match=due):
        next(batches)


def test_batch_size_that_does_not_divide_into_lanes_is_refused(store: ExampleStore) -> None:
    plan, encoder = make(store)
    wrong = ReadPlan(store, plan.columns, 62)
    with pytest.raises(ConfigError, match="62 is not a multiple of the 4 lanes"):
        list(ArrowReader(wrong, encoder).batches("2024-01-01"))


def test_an_incomplete_period_is_refused(store: ExampleStore, tmp_path: Path) -> None:
    plan, encoder = make(write_store(tmp_path, ["2024-01-01"], 100))
    with pytest.raises(DataError, match="2024-01-05 is not in the store"):
        list(ArrowReader(plan, encoder).batches("2024-01-05"))
    (tmp_path / "examples" / "period=2024-01-01" / "manifest.json").unlink()
    with pytest.raises(DataError, match="2024-01-01 is incomplete"):
        list(ArrowReader(plan, encoder).batches("2024-01-01"))


def test_a_corrupt_lane_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path, ["2024-01-01"], 200)
    path = store.lane_path("2024-01-01", "impression", 2)
    path.write_bytes(path.read_bytes()[:-100])
    plan, encoder = make(store)
    with pytest.raises(DataError, match=r"lane-2\.parquet: corrupt"):
        list(ArrowReader(plan, encoder).batches("2024-01-01"))
    with pytest.raises(DataError, match=r"lane-2\.parquet: bytes differ"):
        store.verify("2024-01-01")


def test_an_unknown_traffic_is_named(store: ExampleStore) -> None:
    schema = every_feature_schema().model_copy(update={"traffics": ("feed",)})
    plan, _ = make(store)
    with pytest.raises(DataError, match="traffic 'search'"):
        list(ArrowReader(plan, Encoder(schema, supervision=SUPERVISION)).batches("2024-01-01"))
