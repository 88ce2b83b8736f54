"""Requests served again with other models in some stages: same world, same features, the truth for the value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayfm.config import read_yaml
from rayfm.schema import Schema
from rayfm.simulator.config import SimulatorConfig, WidthsConfig
from rayfm.simulator.log import candidate_rows, period_tables
from rayfm.simulator.replay import Replay
from rayfm.simulator.simulation import Simulation

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCHEMA = Schema.model_validate(read_yaml(EXAMPLES / "simulator_schema.yaml"))
FEATURES = tuple(feature.name for feature in SCHEMA.features)
SMALL = SimulatorConfig(
    periods=3, users=300, ads=150, candidates=60, requests_per_period=200, exploration=0.0,
    widths=WidthsConfig(retrieval=20, early=10, ranking=3),
)  # fmt: skip


def served(period: int = 0) -> tuple[Simulation, object]:
    """A simulation that has just served ``period``, and not learned from it."""
    simulation = Simulation(SMALL)
    for _ in range(SMALL.bootstrap_periods + period):
        simulation.step()
    return simulation, simulation.serve()


def test_a_step_is_serving_and_then_learning() -> None:
    whole, halves = Simulation(SMALL), Simulation(SMALL)
    for _ in range(4):
        record = whole.step()
        other = halves.serve()
        with pytest.raises(ValueError, match="served and not learned from"):
            halves.serve()
        halves.learn(other)
        with pytest.raises(ValueError, match="has been learned from"):
            halves.learn(other)
        if record.number >= 0:
            pairs = zip(period_tables(whole, record, SCHEMA), period_tables(halves, other, SCHEMA), strict=True)
            assert all(one == two for (_, one), (_, two) in pairs)


def test_any_candidate_has_the_features_that_the_log_gives_it() -> None:
    simulation, record = served(1)
    for _, table in period_tables(simulation, record, SCHEMA):
        request, column = np.divmod(table["example_id"].to_numpy(), SMALL.candidates)
        rows = candidate_rows(record, SCHEMA, FEATURES, request, column)
        assert rows == table.select(rows.column_names)
        assert set(rows.column_names) == {"example_id", "time", "traffic", *FEATURES}
    few = candidate_rows(record, SCHEMA, ("ad_id", "user_ctr"), request, column)
    assert few.column_names == ["example_id", "time", "traffic", "user_ctr", "ad_id"]


def test_the_production_models_show_what_they_showed() -> None:
    simulation, record = served(1)
    requests = np.arange(0, 200, 3)
    replay = Replay(simulation, record, requests)
    shown = np.take_along_axis(simulation.true_value(record), record.outcome.shown, axis=1).sum(1)
    assert replay.served({}) == pytest.approx(shown[requests], rel=1e-6)
    # As a stand-in, a production model's own predictions change nothing.
    grids = {stage: record.outcome.grid(place)[requests] for place, stage in enumerate(("retrieval", "early"))}
    assert replay.served(grids) == pytest.approx(shown[requests], rel=1e-6)
    for place, stage in enumerate(("retrieval", "early", "ranking")):
        said, logged = replay.predicted(stage), record.outcome.grid(place)[requests]
        asked = ~np.isnan(logged)
        np.testing.assert_allclose(said[asked], logged[asked], rtol=1e-6)
        assert not np.isnan(said).any(), "of every candidate, not only of those that reached the stage"
    reached = replay.passed(grids["retrieval"])
    assert (reached.sum(1) == 20).all()
    assert np.array_equal(reached, ~np.isnan(grids["early"]))
    total = simulation.served_value(record)
    assert total == pytest.approx((shown.sum(), Replay(simulation, record, np.arange(200)).best.sum()), rel=1e-6)


def test_stages_that_know_the_truth_pick_the_best() -> None:
    simulation, record = served(1)
    replay = Replay(simulation, record, np.arange(200))
    truth = replay.value / simulation.world.ad_bid[replay.pool]
    assert replay.served(dict.fromkeys(("retrieval", "early", "ranking"), truth)) == pytest.approx(
        replay.best, rel=1e-6
    )
    worst = replay.served({"retrieval": 1 / truth}).sum()
    assert worst < 0.7 * replay.served({}).sum() < 0.7 * replay.served({"retrieval": truth}).sum()


def test_what_was_not_scored_cannot_be_ranked() -> None:
    simulation, record = served()
    replay = Replay(simulation, record, np.arange(20))
    click = np.full(replay.pool.shape, 0.1, np.float32)
    click[3, 5] = np.nan
    with pytest.raises(ValueError, match="candidates that its model has not scored"):
        replay.served({"retrieval": click})


def test_serving_again_leaves_the_world_alone() -> None:
    asked, alone = Simulation(SMALL), Simulation(SMALL)
    for _ in range(4):
        record = asked.serve()
        replay = Replay(asked, record, np.arange(50))
        replay.served({"retrieval": np.random.default_rng(0).random(replay.pool.shape, np.float32)})
        replay.rows(SCHEMA, FEATURES, np.ones(replay.pool.shape, np.bool_))
        asked.learn(record)
        other = alone.step()
    tables = [
        pa.concat_tables(table for _, table in period_tables(s, r, SCHEMA))
        for s, r in ((asked, record), (alone, other))
    ]
    assert tables[0] == tables[1]


def test_once_learned_from_a_period_is_not_served_as_it_was() -> None:
    simulation, record = served()
    simulation.learn(record)
    simulation.serve()
    with pytest.raises(ValueError, match="no longer knows the truth"):
        Replay(simulation, record, np.arange(5))
