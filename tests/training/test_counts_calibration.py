"""Calibration on counts per cell alone, where the positives of rows are hidden (SEAD section 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import training_runs as runs
from example_store import every_feature_schema, write_store
from small_pipeline import mapping, merged

from rayfm.config import ConfigError, DataError, validate
from rayfm.data.encode import Encoder
from rayfm.data.store import ExampleStore
from rayfm.export.aggregated import fit_platt_aggregated
from rayfm.export.aggregated_sums import AggregatedSums
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import student_specs
from rayfm.snapshots.load import SnapshotStore
from rayfm.training import calibration
from rayfm.training.calibration import CountCalibration, CountsCalibration, reported_counts, start_calibrations
from rayfm.training.lost_labels import LostLabels
from rayfm.training.scoring import PeriodScores
from rayfm.training.spec import TrainerSpec

SCHEMA = every_feature_schema()
HIDDEN = LostLabels(traffics=SCHEMA.traffics, kept=0.0)


def shifts(spec: TrainerSpec, key: str) -> list[tuple[float, float]]:
    store = SnapshotStore(spec.run_dir)
    loaded = [store.load(key, version) for version in store.versions(key)]
    return [(float(t["calibrator.click.scale"]), float(t["calibrator.click.shift"])) for t in loaded]


def test_sums_stand_for_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    cell = torch.randint(0, 12, (20_000,), generator=generator)
    logit = torch.randn(20_000, generator=generator) + cell / 4 - 3
    weight = 1 + torch.rand(20_000, generator=generator)
    label = (torch.rand(20_000, generator=generator) < torch.sigmoid(0.7 * logit + 0.5)).float()
    sums = AggregatedSums(("click", "like"), 12)
    for part in range(0, 20_000, 1000):
        rows = slice(part, part + 1000)
        sums.update("like", logit[rows], cell[rows], weight[rows])
        sums.count("like", cell[rows], label[rows], weight[rows])
    counts = torch.zeros(12, dtype=torch.float64).index_add_(0, cell, (weight * label).double())
    torch.testing.assert_close(sums.counts[1], counts)
    expected = fit_platt_aggregated(logit, cell, counts, weight)
    found = sums.fit({"click": (2.0, 3.0)})
    assert found["like"] == pytest.approx(expected, abs=2e-4)
    assert found["like"][0] == pytest.approx(0.7, abs=0.15)
    assert found["click"] == (2.0, 3.0), "no counts: what was fitted before stays"


def test_counts_of_cells_without_rows_are_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    sums = AggregatedSums(("click",), 3)
    sums.update("click", torch.zeros(100), torch.zeros(100, dtype=torch.long), torch.ones(100))
    sums.counts[0] = torch.tensor([50.0, 0.0, 7.0])
    scale, shift = sums.fit({})["click"]
    assert scale * 0 + shift == pytest.approx(0.0, abs=1e-6)
    assert "7 counts are of cells without a row" in caplog.text


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_store(root, list(runs.PERIODS), impressions=700, considerations=300)
    return root


def counts_file(store: Path, path: Path, by: str) -> str:
    """The true counts, as a partner would report them."""
    parts = []
    for period in runs.PERIODS:
        lanes = [ExampleStore(store).open_lane(period, "impression", lane).read() for lane in range(4)]
        table = pa.concat_tables(lanes)
        table = table.filter(table[by].is_valid()).group_by(by).aggregate([("click", "sum")])
        parts.append(pa.table({"period": [period] * len(table), by: table[by], "click": table["click_sum"]}))
    pq.write_table(pa.concat_tables(parts), path)
    return str(path)


@pytest.mark.parametrize("by", ["traffic", "ad"])
def test_hidden_positives_are_made_up_for_by_their_counts(store: Path, tmp_path: Path, by: str) -> None:
    own = runs.learner("fm", lost_labels=HIDDEN, calibrate=CountsCalibration(by=by))
    file = counts_file(store, tmp_path / "counts.parquet", by)
    reported = runs.learner("fm", seed=2, lost_labels=HIDDEN, calibrate=CountsCalibration(by=by, counts=file))
    spec = runs.spec(store, tmp_path / "run", own, reported)
    rows: dict[int, list[tuple[torch.Tensor, ...]]] = {1: [], 2: []}
    original = PeriodScores.score

    def keep(self: Any, state: Any, learner: Any, batch: Any, logits: dict[str, torch.Tensor], copies: Any) -> None:
        original(self, state, learner, batch, logits, copies)
        label, known = batch.label("click")
        shown = known & (batch.kind == 0)
        rows[learner.config.seed].append((logits["click"][shown], label[shown]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeriodScores, "score", keep)
        runs.train_here(spec)
    for seed, batches in rows.items():
        fits = shifts(spec, f"fm.none.{seed}")
        assert fits[0] == (1, 0)
        half = len(batches) // 2
        for (scale, shift), part in zip(fits[1:], (batches[:half], batches[half:]), strict=True):
            logit, label = (torch.cat([row[i] for row in part]).double() for i in range(2))
            assert abs(torch.sigmoid(logit).sum() / label.sum() - 1) > 0.2, "nothing to make up for shows nothing"
            # Rows without an ad are in no cell.
            assert torch.sigmoid(scale * logit + shift).sum() == pytest.approx(float(label.sum()), rel=0.02)


def test_reported_counts_are_the_examples_own(store: Path, tmp_path: Path) -> None:
    for by in ("traffic", "ad"):
        config = CountsCalibration(by=by, counts=counts_file(store, tmp_path / f"{by}.parquet", by))
        found = reported_counts(config, SCHEMA, ("click",), runs.PERIODS[1], runs.PERIODS)
        expected = torch.zeros(1, config.cells(SCHEMA), dtype=torch.float64)
        for lane in range(4):
            table = ExampleStore(store).open_lane(runs.PERIODS[1], "impression", lane).read()
            table = table.filter(table[by].is_valid())
            cell = pc.index_in(table["traffic"], value_set=pa.array(SCHEMA.traffics)).to_numpy()
            if by != "traffic":
                encoder = Encoder(SCHEMA, (by,), labels=False)
                cell = encoder.table_rows_of(SCHEMA.feature(by), table[by].combine_chunks())
            click = pc.fill_null(table["click"].cast(pa.float64()), 0.0).to_numpy()
            expected[0].index_add_(0, torch.from_numpy(cell.copy()).long(), torch.from_numpy(click.copy()))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            {"period": ["p"], "traffic": ["feed"]},
            "column 'click' is missing; the file of counts has period, traffic, cl",
        ),
        ({"period": ["p"], "traffic": ["fed"], "click": [1]}, "traffic fed is not in the schema; did you mean 'feed'?"),
        ({"period": ["p"], "traffic": ["feed"], "click": [-1]}, "period p: a count of task 'click' is negative"),
        (
            {"period": ["20220501", "20220502"], "traffic": ["feed"] * 2, "click": [1, 1]},
            "none of its periods (20220501 .. 20220502) is one of the run's (p .. q)",
        ),
        (
            {"period": [20220501], "traffic": ["feed"], "click": [1]},
            "column 'period' is int64; write the periods as the run names them, as strings: 'p'",
        ),
    ],
)
def test_a_bad_file_of_counts_is_refused(tmp_path: Path, table: dict[str, list[Any]], expected: str) -> None:
    path = tmp_path / "counts.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(DataError) as raised:
        reported_counts(CountsCalibration(by="traffic", counts=str(path)), SCHEMA, ("click",), "p", ("p", "q"))
    assert expected in str(raised.value)
    with pytest.raises(DataError, match="cannot read the counts"):
        reported_counts(CountsCalibration(by="traffic", counts=str(tmp_path / "no")), SCHEMA, ("click",), "p", ("p",))


@pytest.mark.parametrize("had", [["q"], []])
def test_a_period_without_counts_is_logged(tmp_path: Path, had: list[str], caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "counts.parquet"
    names = pa.array(had, pa.string())
    pq.write_table(
        pa.table({"period": names, "traffic": pa.array(["feed"] * len(had), pa.string()), "click": names}), path
    )
    config = CountsCalibration(by="traffic", counts=str(path))
    assert not reported_counts(config, SCHEMA, ("click",), "p", ("p", "q")).any()
    assert f"no counts of period p (its periods: {'q .. q' if had else 'none'}); the calibrator stays" in caplog.text


def test_a_file_of_counts_is_read_once_and_by_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "counts.parquet"
    pq.write_table(pa.table({"period": ["p"], "traffic": ["feed"], "click": [5.0]}), path)
    config = CountsCalibration(by="traffic", counts=str(path))
    asked: dict[str, Any] = dict.fromkeys(("one", "two"), (config, ("click",))) | {"rows": (True, ("click",))}
    asked["none"] = (False, ("click",))
    times = []

    def read(*arguments: Any) -> torch.Tensor:
        times.append(arguments)
        return reported_counts(*arguments)

    monkeypatch.setattr(calibration, "reported_counts", read)
    first, second = (start_calibrations(asked, SCHEMA, "p", ("p",), rank) for rank in (0, 1))
    assert len(times) == 1
    assert list(first) == list(second) == ["one", "two", "rows"]
    cell = SCHEMA.traffics.index("feed")
    for key in ("one", "two"):
        for ranks, expected in ((first, 5.0), (second, 0.0)):
            own = ranks[key]
            assert isinstance(own, CountCalibration)
            own.reduce_()
            own.sums.counts.mul_(2)  # as a sum over ranks does, in place
            assert own.sums.counts[0, cell] == own.sums.counts.sum() == 2 * expected


def test_the_config_names_cells_that_there_are(tmp_path: Path) -> None:
    changed = {"students": {"vm": {"calibrate": {"by": "advert"}}}}
    with pytest.raises(ConfigError, match=r"vm: calibrate\.by: 'advert' is no sparse feature"):
        validate(PipelineConfig, merged(mapping(tmp_path), changed), "here")
    (tmp_path / "log").mkdir()
    changed = {"students": {"vm": {"calibrate": {"by": "city"}, "model": {"features": ["user"]}}}}
    sparse = [feature.name for feature in SCHEMA.features if feature.kind == "sparse"]
    changed["students"]["vm"]["calibrate"]["by"] = other = next(name for name in sparse if name != "user")
    config = validate(PipelineConfig, merged(mapping(tmp_path), changed), "here")
    # The model does not read it, and the reader does.
    assert set(student_specs(config, ("a", "b", "c"))[0].features or ()) == {"user", other}
