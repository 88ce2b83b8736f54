"""The log: what prepare gets, and what no row of it may know."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from rayfm.config import ConfigError, read_yaml
from rayfm.data.sources.base import Period
from rayfm.data.validate import split_rejects
from rayfm.schema import Schema
from rayfm.simulator import simulation as simulation_module
from rayfm.simulator.config import STAGES, ConsiderationShareConfig, SimulatorConfig, WidthsConfig
from rayfm.simulator.features import feature_specs
from rayfm.simulator.log import log_schema, period_tables, tables
from rayfm.simulator.simulation import Simulation
from rayfm.simulator.source import SimulatorSource
from rayfm.simulator.world import Truth, World

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCHEMA = Schema.model_validate(read_yaml(EXAMPLES / "simulator_schema.yaml"))
SHARE = ConsiderationShareConfig(retrieval=0.02, early=0.2, ranking=0.5)
SMALL = SimulatorConfig(
    periods=3, users=400, ads=200, candidates=100, requests_per_period=600, consideration_share=SHARE
)


@functools.cache
def log(config: SimulatorConfig = SMALL) -> dict[tuple[int, str], pa.Table]:
    return {(number, kind): table for number, kind, table in tables(config, SCHEMA)}


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def both(number: int) -> pa.Table:
    return pa.concat_tables([log()[number, "impression"], log()[number, "consideration"]])


def test_same_config_same_rows_other_seed_another_world():
    again = {(number, kind): table for number, kind, table in tables(SMALL, SCHEMA)}
    assert again.keys() == log().keys() == {(n, k) for n in range(3) for k in ("impression", "consideration")}
    for key, table in log().items():
        assert table.equals(again[key])
    other = next(tables(SMALL.model_copy(update={"seed": 1}), SCHEMA))[2]
    assert not np.array_equal(column(other, "click"), column(log()[0, "impression"], "click"))


def test_fewer_periods_are_the_first_of_more():
    for number, kind, table in tables(SMALL, SCHEMA, periods=1):
        assert table.equals(log()[number, kind])


def test_columns_and_validity():
    source = SimulatorSource(SMALL, SCHEMA)
    for (number, kind), table in log().items():
        assert table.schema.equals(log_schema(SCHEMA))
        good, bad = split_rejects(table, SCHEMA, [source.periods()[number]])
        assert bad.num_rows == 0
        assert good.num_rows == table.num_rows > 0
        assert set(table["kind"].to_pylist()) == {kind}
        assert (np.diff(column(table, "time")) >= 0).all()
    for number in range(3):
        ids = column(both(number), "example_id")
        assert len(np.unique(ids)) == len(ids)


def test_impressions_have_labels_and_considerations_have_none():
    for (_, kind), table in log().items():
        for task in SCHEMA.tasks:
            assert table[task.name].null_count == (table.num_rows if kind == "consideration" else 0)
            assert table[f"truth/{task.name}"].null_count == 0


def test_the_cascade_s_widths_show_in_the_log():
    shown = log()[1, "impression"]
    request, counts = np.unique(column(shown, "request_id"), return_counts=True)
    assert (counts == 3).all()
    assert len(request) == 600
    assert request.min() == 600
    assert set(shown["stage_reached"].to_pylist()) == {"shown"}
    considered = log()[1, "consideration"]
    stage = np.array(considered["stage_reached"].to_pylist())
    rank = column(considered, "rank")
    edges = {"retrieval": (40, 100), "early": (20, 40), "ranking": (3, 20)}
    for name, (first, last) in edges.items():
        own = stage == name
        assert rank[own].min() > first
        assert rank[own].max() <= last
        share = getattr(SHARE, name)
        expected = 600 * (last - first) * share
        assert abs(own.sum() - expected) < 5 * np.sqrt(expected)
        assert column(considered, "sampling_weight")[own] == pytest.approx(1 / share)
    assert column(shown, "sampling_weight") == pytest.approx(1.0)


def test_a_stage_logs_what_it_saw_and_nothing_else():
    table = both(2)
    stage = np.array(table["stage_reached"].to_pylist())
    for place, name in enumerate(STAGES):
        values = table[f"logged/{name}/click"]
        seen = np.isin(stage, [*STAGES[place:], "shown"])
        assert np.array_equal(values.is_valid().to_numpy(), seen)
        known = values.drop_null().to_numpy()
        assert ((known > 0) & (known < 1)).all()


def test_ranks_follow_logged_probability_times_bid():
    table = log()[2, "impression"]
    value = (column(table, "logged/ranking/click") * column(table, "ad_bid")).reshape(-1, 3)
    rank = column(table, "rank").reshape(-1, 3)
    assert (rank == [1, 2, 3]).all()
    in_order = (np.diff(value, axis=1) <= 0).all(axis=1)
    assert in_order.mean() > 0.9  # all but the explored requests


def test_sequences_hold_earlier_clicks_only():
    past: dict[int, list[int]] = {}
    seen_any = False
    simulation = Simulation(SMALL)
    for _ in range(SMALL.bootstrap_periods + 3):
        record = simulation.step()
        for _, table in period_tables(simulation, record, SCHEMA):
            first: dict[int, list[int]] = {}
            for user, sequence in zip(table["user_id"].to_pylist(), table["clicked_ads"].to_pylist(), strict=True):
                first.setdefault(user, sequence)
                assert sequence == first[user]
            for user, sequence in first.items():
                assert sequence == past.get(user, [])[-SMALL.history_length :]
                seen_any = seen_any or bool(sequence)
        table = next(table for kind, table in period_tables(simulation, record, SCHEMA) if kind == "impression")
        rows = table.filter(pc.equal(table["click"], 1.0)).select(["user_id", "ad_id"]).to_pylist()
        for row in rows:
            past.setdefault(row["user_id"], []).append(row["ad_id"])
    assert seen_any


def test_counts_hold_earlier_periods_only():
    """Clicks of a period do not move that period's features: with other labels, they are the same."""
    first, second = corrupted_log(None), corrupted_log(2)
    labels = {task.name for task in SCHEMA.tasks}
    others = [name for name in first[0].column_names if name not in labels]
    assert first[0].select(others).equals(second[0].select(others))  # the period itself: features, logged, truth
    assert not first[0]["click"].equals(second[0]["click"])
    for name in ("user_ctr", "ad_ctr", "clicked_ads", "logged/ranking/click", "logged/retrieval/click"):
        assert not first[1][name].equals(second[1][name]), name  # the next one has learnt from them
    for name in ("time", "request_id", "user_id", "traffic", "hour"):
        assert column(first[1], name).tolist() == column(second[1], name).tolist()  # the world does not care


def corrupted_log(period: int | None) -> list[pa.Table]:
    """Impressions of periods 2 and 3 (counted from the bootstrap); the labels of ``period`` are turned around."""
    simulation = Simulation(SMALL)
    found = []
    truth = Truth.sample

    def turned(self: Truth, rng: np.random.Generator) -> dict[str, np.ndarray]:
        labels = truth(self, rng)
        if simulation.world.period == period:
            labels["click"] = 1 - labels["click"]
        return labels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation_module.Truth, "sample", turned)
        for _ in range(4):
            record = simulation.step()
            if simulation.world.period >= 2:
                found.append(dict(period_tables(simulation, record, SCHEMA))["impression"])
    return found


def test_no_feature_is_the_truth():
    table = pa.concat_tables([log()[number, "impression"] for number in range(3)])
    click = column(table, "truth/click")
    logit = np.log(click / (1 - click))
    for name, spec in feature_specs(SMALL).items():
        if spec.kind == "dense":
            assert abs(np.corrcoef(column(table, name), logit)[0, 1]) < 0.8, name
    simulation = Simulation(SMALL)
    record = simulation.step()
    fine = record.observation.request_columns["user_taste_0"]
    hidden = simulation.world.user_latent[record.observation.requests.user, 0]
    assert 0.8 < np.corrcoef(fine, hidden)[0, 1] < 0.97  # seen through noise


def test_features_read_no_truth_and_no_latent_beyond_the_noise(monkeypatch):
    """Features of a period can be made without the world's truth at all."""
    simulation = Simulation(SMALL)
    record = simulation.step()
    monkeypatch.setattr(World, "truth", None)
    observation = simulation.observer.observe(simulation.world, simulation.history, record.observation.requests)
    rows = np.arange(10)
    for name in feature_specs(SMALL):
        assert len(observation.column(name, rows, rows)) == 10


def test_a_million_candidates_pass_through_the_cascade():
    config = SimulatorConfig(requests_per_period=5000, candidates=200, widths=WidthsConfig(), bootstrap_periods=1)
    simulation = Simulation(config)
    record = simulation.step()
    assert record.outcome.pool.size == 1_000_000
    assert [stage.click.size for stage in record.outcome.stages] == [1_000_000, 200_000, 100_000]
    assert np.isfinite(record.outcome.stages[0].click).all()
    served, best = simulation.served_value(record)  # the truth of all of them
    assert 0 < served < best


def test_served_value_of_a_past_period_is_refused():
    simulation = Simulation(SMALL)
    record = simulation.step()
    simulation.step()
    with pytest.raises(ValueError, match="no longer knows"):
        simulation.served_value(record)
    with pytest.raises(ValueError, match="no longer knows"):
        next(period_tables(simulation, record, SCHEMA))


def test_trained_models_serve_more_value_than_chance():
    simulation = Simulation(SMALL)
    shares = []
    for _ in range(5):
        served, best = simulation.served_value(simulation.step())
        shares.append(served / best)
    assert np.mean(shares[2:]) > 1.8 * shares[0]  # the first period shows random candidates


def ratio(tables_: list[pa.Table], stage: str, over: str) -> float:
    known = [table.filter(table["logged/ranking/click"].is_valid()) for table in tables_]
    sums = [sum(float(column(table, name).sum(dtype=np.float64)) for table in known) for name in (stage, over)]
    return sums[0] / sums[1]


def test_selection_makes_considerations_miscalibrated_and_impressions_not():
    """UKDSL table 1's symptom, from models that were trained on impressions alone: two small worlds, pooled."""
    impressions: list[pa.Table] = []
    considerations: list[pa.Table] = []
    for seed in (0, 1):
        config = SimulatorConfig(seed=seed, periods=4, requests_per_period=2500)
        for number, kind, table in tables(config, SCHEMA):
            if number >= 1:
                (impressions if kind == "impression" else considerations).append(table)
    for stage in ("retrieval", "early"):
        name = f"logged/{stage}/click"
        shown, considered = (ratio(part, name, "logged/ranking/click") for part in (impressions, considerations))
        assert 0.8 < shown < 1.1
        assert considered > 1.08
        assert considered / shown > 1.15
    assert 0.85 < ratio(impressions, "logged/ranking/click", "truth/click") < 1.2
    clicks = np.concatenate([column(table, "click") for table in impressions])
    assert 0.04 < clicks.mean() < 0.16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": [{"name": "user_tastes_0", "kind": "dense"}]}, "did you mean 'user_taste_0'"),
        ({"features": [{"name": "user_ctr", "kind": "sparse", "table": "user"}]}, "is dense"),
        ({"features": [{"name": "campaign", "kind": "sparse"}]}, "id_type string"),
        ({"tasks": [{"name": "ltv", "kind": "regression"}]}, "no regression task 'ltv'"),
        ({"tasks": [{"name": "watch_time"}]}, "no binary task 'watch_time'"),
        ({"traffics": ["feed", "video", "sidebars"]}, "did you mean 'sidebars'"),
    ],
)
def test_a_schema_that_asks_for_something_else_is_refused(change, message):
    schema = Schema.model_validate(SCHEMA.dump() | change)
    with pytest.raises(ConfigError, match=message):
        SimulatorSource(SMALL, schema)


def test_periods_and_row_estimate():
    source = SimulatorSource(SMALL, SCHEMA)
    assert [period.name for period in source.periods()] == ["2025-01-01", "2025-01-02", "2025-01-03"]
    hourly = SimulatorSource(SMALL.model_copy(update={"period_hours": 1}), SCHEMA)
    assert [period.name for period in hourly.periods()][1:] == ["2025-01-01T01", "2025-01-01T02"]
    rows = sum(table.num_rows for table in log().values())
    assert source.estimated_rows() == pytest.approx(rows, rel=0.05)


def test_dataset_gives_the_tables_of_the_periods_asked_for(ray_session):
    source = SimulatorSource(SMALL, SCHEMA)
    source.cpus_per_task = 0.25
    wanted = source.periods()[1:2]
    blocks = source.dataset(wanted).iter_batches(batch_size=None, batch_format="pyarrow")
    found = pa.concat_tables([pa.table(block) for block in blocks])
    expected = both(1)
    assert found.column_names == expected.column_names
    assert found.sort_by("example_id").equals(expected.combine_chunks().sort_by("example_id"))


def test_an_unknown_period_is_refused():
    source = SimulatorSource(SMALL, SCHEMA)
    first = source.periods()[0]
    strange = Period(name="2031-01-01", start=first.start, end=first.end)
    with pytest.raises(Exception, match="no period 2031-01-01; it has 2025-01-01 to 2025-01-03"):
        source.dataset([strange])
