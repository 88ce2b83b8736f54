"""Sampling policies of considerations: probabilities, weights and budgets by hand; equal batches from both readers."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from example_store import every_feature_schema, write_store

from rayfm.config import Config, ConfigError, DataError, validate
from rayfm.data import reader as reader_module
from rayfm.data.batch import Batch
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader, RayDataReader
from rayfm.data.sampling import (
    ByRankSampling,
    ByStageSampling,
    ConsiderationShare,
    ImportanceSampling,
    SamplingPolicy,
    Scale,
    UniformSampling,
    capped_factor,
    policy_of,
)
from rayfm.data.steps import CONSIDERATION_SALT, LaneCache, ReadPlan, reweighted
from rayfm.data.store import ExampleStore
from rayfm.schema import unit_interval

PERIOD = "2024-01-01"
IMPRESSIONS, CONSIDERATIONS, LANES = 501, 1200, 4


class Holder(Config):
    """A config with the key alone."""

    consideration_share: ConsiderationShare = 0.0


def read(share: object) -> float | SamplingPolicy:
    return validate(Holder, {"consideration_share": share}).consideration_share


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ExampleStore:
    """Without stages, ranks and sampling weights."""
    return write_store(tmp_path_factory.mktemp("plain"), [PERIOD], IMPRESSIONS, CONSIDERATIONS, LANES)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExampleStore:
    """Considerations of two stages with ranks, and a sampling weight of 5."""
    store = write_store(tmp_path_factory.mktemp("staged"), [PERIOD], IMPRESSIONS, CONSIDERATIONS, LANES)
    for kind in ("impression", "consideration"):
        for lane in range(LANES):
            path = store.lane_path(PERIOD, kind, lane)
            table = pq.read_table(path)
            rank = np.arange(table.num_rows) % 17 + 4
            stage = np.where(rank > 14, "early", "ranking") if kind == "consideration" else np.full(len(rank), "shown")
            weight = np.full(len(rank), 5 if kind == "consideration" else 1, np.float32)
            table = table.append_column("stage_reached", pa.array(stage.tolist()))
            table = table.append_column("rank", pa.array(rank.astype(np.int32)))
            pq.write_table(table.append_column("sampling_weight", pa.array(weight)), path, row_group_size=64)
    manifest = store.manifest(PERIOD)
    added = {"stage_reached": "string", "rank": "int32", "sampling_weight": "float"}
    store.commit(manifest.model_copy(update={"columns": {**manifest.columns, **added}}))
    return store


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "CHUNK_ROWS", 128)


def plan_of(store: ExampleStore, share: float | SamplingPolicy) -> tuple[ReadPlan, Encoder]:
    encoder = Encoder(every_feature_schema(), supervision=("logged/ranking/click",))
    columns = (*encoder.columns, "user_id", "request_id", "sampling_weight", "logged/ranking/click")
    return ReadPlan(store, columns, 64, ("logged/ranking/click",), (), share), encoder


def batches(store: ExampleStore, share: float | SamplingPolicy, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(ArrowReader(*plan_of(store, share), rank, world).batches(PERIOD))


def considered(found: list[Batch]) -> dict[int, float]:
    """Example id -> weight of every consideration."""
    return {
        int(i): float(w)
        for batch in found
        for i, w, k in zip(batch.example_id, batch.weight, batch.kind, strict=True)
        if k == 1
    }


def rows_of(store: ExampleStore) -> pa.Table:
    return pa.concat_tables([pq.read_table(store.lane_path(PERIOD, "consideration", lane)) for lane in range(LANES)])


def table(stage: list[str] | None = None, **columns: list) -> pa.Table:
    return pa.table({**({"stage_reached": stage} if stage else {}), **columns})


# -- shares -------------------------------------------------------------------------------------------------------


def test_a_number_is_uniform_and_chooses_the_rows_it_always_has(store: ExampleStore) -> None:
    assert read(0.3) == 0.3
    assert policy_of(0.3) == UniformSampling(share=0.3)
    assert read({"type": "uniform", "share": 0.3}) == UniformSampling(share=0.3)
    plan, _ = plan_of(store, 0.3)
    cache = LaneCache(plan)
    for lane in range(LANES):
        shown, rest = (pq.read_table(store.lane_path(PERIOD, kind, lane)) for kind in ("impression", "consideration"))
        rows = np.flatnonzero(unit_interval(rest["example_id"].to_numpy(), 0x5EED) < 0.3)
        position = np.searchsorted(shown["time"].to_numpy(), rest["time"].to_numpy()[rows], "left")
        steps = cache.steps(PERIOD, lane)
        assert steps.considerations.tolist() == rows.tolist()
        assert steps.consideration_steps.tolist() == (np.minimum(position, shown.num_rows - 1) // 16).tolist()
        assert steps.consideration_weights is None
    assert set(considered(batches(store, 0.3)).values()) == {5.0}
    assert not considered(batches(store, UniformSampling(share=0.0)))


def test_shares_by_stage() -> None:
    policy = read({"type": "by_stage", "shares": {"early": 0.25, "ranking": 1, "retrieval": 0}})
    assert isinstance(policy, ByStageSampling)
    rows = table(["ranking", "early", "retrieval", "early"])
    assert policy.probability(rows, Scale()).tolist() == [1.0, 0.25, 0.0, 0.25]
    with pytest.raises(DataError, match=r"shares: considerations reached stage 'rankin', .* did you mean 'ranking'"):
        policy.wanted(table(["early", "rankin"]), Scale())
    with pytest.raises(DataError, match="1 considerations have no 'stage_reached'"):
        policy.wanted(pa.table({"stage_reached": pa.array(["early", None])}), Scale())


def test_shares_by_rank_within_the_stage() -> None:
    bands = {
        "ranking": [{"through": 6, "share": 1}, {"through": 9, "share": 0.5}, {"share": 0.1}],
        "early": [{"share": 0}],
    }
    policy = read({"type": "by_rank", "bands": bands})
    assert isinstance(policy, ByRankSampling)
    stages = ["ranking"] * 5 + ["early"]
    rows = table(stages, rank=[4, 6, 7, 9, 10, 5])
    assert policy.wanted(rows, Scale()).tolist() == [1.0, 1.0, 0.5, 0.5, 0.1, 0.0]
    with pytest.raises(DataError, match="1 considerations have no 'rank'"):
        policy.wanted(table(["early", "early"], rank=[3, None]), Scale())


def test_shares_by_importance() -> None:
    policy = ImportanceSampling(column="logged/early/click", share=0.5, defensive=0.2)
    rows = pa.table({"logged/early/click": pa.array([0.1, 0.3, None], pa.float32())})
    # Importances .1, .3 and 0 of mean 2/15: shares .5 * (.8 * v / mean + .2) = .4, 1, .1, whose sum is .5 * 3.
    scale = policy.scale(lambda: iter([rows.slice(0, 1), rows.slice(1)]), impressions=9, considerations=3)
    assert scale.mean == pytest.approx(2 / 15)
    assert scale.factor == pytest.approx(1.0)
    assert policy.probability(rows, scale).tolist() == pytest.approx([0.4, 1.0, 0.1])


def test_importance_of_a_difference_and_of_a_rank() -> None:
    gap = ImportanceSampling(column="a", minus="b", power=2)
    rows = pa.table({"a": pa.array([0.5, 0.2, None], pa.float32()), "b": pa.array([0.1, 0.5, 0.3], pa.float32())})
    assert gap.importance(rows).tolist() == pytest.approx([0.16, 0.09, 0.0], rel=1e-6)
    ranks = pa.table({"rank": pa.array([1, 4], pa.int32())})
    assert ImportanceSampling(column="rank", power=-1).importance(ranks).tolist() == [1.0, 0.25]


def test_values_that_no_importance_can_be_made_of() -> None:
    with pytest.raises(DataError, match=r"'x' is 0 in a consideration, .* power -1"):
        ImportanceSampling(column="x", power=-1).importance(pa.table({"x": [0.0, 1.0]}))
    with pytest.raises(DataError, match="'x' is -2 in a consideration"):
        ImportanceSampling(column="x").importance(pa.table({"x": [-2.0, 1.0]}))
    with pytest.raises(DataError, match="column 'x' is string; an importance needs numbers"):
        ImportanceSampling(column="x").importance(pa.table({"x": ["a"]}))
    nothing = pa.table({"x": pa.array([None, 0.0])})
    with pytest.raises(DataError, match="no consideration has an importance above 0 by 'x'"):
        ImportanceSampling(column="x").scale(lambda: iter([nothing]), 1, 2)


# -- budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "factor"),
    [
        ({"per_impression": 0.5}, 50 / 90),  # .5 * 100 impressions, and .3 * 300 considerations are wanted
        ({"per_period": 30}, 30 / 90),
        ({"per_period": 90}, 1.0),
        ({"per_impression": 2}, 1.0),  # a budget never raises a share
    ],
)
def test_a_budget_scales_shares_down(budget: dict, factor: float) -> None:
    uniform = read({"type": "uniform", "share": 0.3, "budget": budget})
    assert isinstance(uniform, UniformSampling)
    assert uniform.scale(lambda: iter([]), 100, 300).factor == pytest.approx(factor)
    staged = read({"type": "by_stage", "shares": {"early": 0.6, "ranking": 0.15}, "budget": budget})
    assert isinstance(staged, ByStageSampling)
    rows = table(["early"] * 100 + ["ranking"] * 200)  # .6 * 100 + .15 * 200 = 90
    scale = staged.scale(lambda: iter([rows.slice(0, 170), rows.slice(170)]), 100, 300)
    assert scale.factor == pytest.approx(factor)
    assert staged.probability(rows, scale).sum() == pytest.approx(90 * factor)


def test_no_budget_reads_nothing() -> None:
    def parts():
        raise AssertionError("read")

    assert ByStageSampling(shares={"early": 0.5}).scale(parts, 10, 10) == Scale()


def test_certain_rows_leave_the_rest_to_the_others() -> None:
    # 2 of 3 rows: at c = 2 / 2 the last passes 1; the others share 1, so c = 1 / .4.
    shares = np.array([0.1, 0.3, 1.6])
    factor = capped_factor(lambda: iter([shares[:1], shares[1:]]), 2.0)
    assert factor == pytest.approx(2.5)
    assert np.minimum(1, factor * shares).tolist() == pytest.approx([0.25, 0.75, 1.0])
    assert math.isinf(capped_factor(lambda: iter([np.array([0.5, 1.5])]), 2.0))
    many = np.random.default_rng(1).lognormal(0, 2, 5000)
    for expected in (1.0, 400.0, 2500.0, 4999.0):
        factor = capped_factor(lambda: iter([many]), expected)
        assert np.minimum(1, factor * many).sum() == pytest.approx(expected)


def test_an_importance_meets_its_budget_and_bounds_its_weights() -> None:
    value = np.random.default_rng(2).lognormal(0, 1.5, 4000)
    rows = pa.table({"x": value})
    policy = ImportanceSampling(column="x", defensive=0.2, budget={"per_impression": 0.5})
    scale = policy.scale(lambda: iter([rows]), 1000, 4000)
    probability = policy.probability(rows, scale)
    assert probability.sum() == pytest.approx(500)
    uniform = 500 / 4000
    assert 1 / probability.min() <= 1 / (0.2 * uniform) * (1 + 1e-9)
    # Without a budget and with share 1 every row is certain, however unequal.
    whole = ImportanceSampling(column="x")
    assert whole.probability(rows, whole.scale(lambda: iter([rows]), 1000, 4000)).tolist() == [1.0] * 4000


# -- weights ------------------------------------------------------------------------------------------------------


def test_weighted_sums_have_the_expectation_of_all_rows() -> None:
    rng = np.random.default_rng(3)
    value = rng.lognormal(0, 1, 200_000)
    loss = value / (1 + value) + 0.1 * rng.random(len(value))
    rows = pa.table({"x": value})
    policy = ImportanceSampling(column="x", share=0.05)
    probability = policy.probability(rows, policy.scale(lambda: iter([rows]), 1, len(value)))
    chosen = unit_interval(np.arange(len(value)), CONSIDERATION_SALT) < probability
    spread = math.sqrt(((1 - probability) / probability * loss**2).sum())  # of the Horvitz-Thompson sum
    assert abs((loss[chosen] / probability[chosen]).sum() - loss.sum()) < 3 * spread
    assert loss[chosen].sum() / 0.05 > 1.2 * loss.sum()  # without the weights: of the rows that are chosen more often


def test_weights_multiply_the_logs_own(store: ExampleStore) -> None:
    policy = read({"type": "by_stage", "shares": {"early": 0.5, "ranking": 0.25}, "reweight": True})
    assert isinstance(policy, ByStageSampling)
    rows = rows_of(store)
    stage = dict(zip(rows["example_id"].to_pylist(), rows["stage_reached"].to_pylist(), strict=True))
    found = batches(store, policy)
    weights = considered(found)
    assert {(stage[i], w) for i, w in weights.items()} == {("early", 10.0), ("ranking", 20.0)}
    assert {float(w) for batch in found for w in batch.weight[batch.kind == 0]} == {1.0}
    unweighted = batches(store, policy.model_copy(update={"reweight": False}))
    assert considered(unweighted).keys() == weights.keys()
    assert set(considered(unweighted).values()) == {5.0}


def test_weights_where_the_log_has_none(plain: ExampleStore) -> None:
    policy = UniformSampling(share=0.25, reweight=True)
    found = batches(plain, policy)
    weights = considered(found)
    assert set(weights.values()) == {4.0}
    assert 0.2 * CONSIDERATIONS < len(weights) < 0.3 * CONSIDERATIONS
    assert {float(w) for batch in found for w in batch.weight[batch.kind == 0]} == {1.0}


def test_a_null_sampling_weight_is_one() -> None:
    rows = pa.table({"sampling_weight": pa.array([3.0, None], pa.float32())})
    assert reweighted(rows, np.array([2.0, 4.0], np.float32))["sampling_weight"].to_pylist() == [6.0, 4.0]


# -- readers ------------------------------------------------------------------------------------------------------

BANDS = {
    "early": [{"through": 16, "share": 0.5}, {"share": 0.1}],
    "ranking": [{"through": 8, "share": 1}, {"share": 0.2}],
}
POLICIES = [
    {"type": "by_rank", "bands": BANDS, "budget": {"per_impression": 0.4}},
    {"type": "importance", "column": "logged/ranking/click", "budget": {"per_period": 300}},
]


@pytest.mark.parametrize("config", POLICIES, ids=lambda config: config["type"])
def test_the_choice_depends_on_no_number_of_workers(store: ExampleStore, config: dict) -> None:
    policy = read(config)
    whole = batches(store, policy)
    chosen = considered(whole)
    budget = 0.4 * IMPRESSIONS if config["type"] == "by_rank" else 300
    assert abs(len(chosen) - budget) < 4 * math.sqrt(budget)
    for world in (2, 4):
        parts = [batches(store, policy, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {len(whole)}
        for step, batch in enumerate(whole):
            merged = {key: w for part in parts for key, w in considered([part[step]]).items()}
            assert merged == considered([batch])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_both_readers_give_the_same_batches(store: ExampleStore) -> None:
    plan, encoder = plan_of(store, read(POLICIES[1]))
    other = RayDataReader(plan, encoder, [PERIOD]).batches(PERIOD)
    weights = set()
    for left, right in zip(ArrowReader(plan, encoder).batches(PERIOD), other, strict=True):
        weights |= set(considered([left]).values())
        for name in ("example_id", "kind", "weight", "supervision", "dense", "labels"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert len(weights) > 100


def test_a_period_without_the_column_is_refused(plain: ExampleStore) -> None:
    for config, name in ((POLICIES[0], "stage_reached"), ({"type": "importance", "column": "rank"}, "rank")):
        with pytest.raises(DataError, match=f"period={PERIOD}: column '{name}' is missing, and the policy of consid"):
            batches(plain, read(config))


# -- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (1.5, "'consideration_share': Input should be less than or equal to 1"),
        ("some", "'consideration_share': Input should be a valid number"),
        ({"type": "unifrom", "share": 0.1}, "'consideration_share.type': unknown 'unifrom'; did you mean 'uniform'"),
        ({"share": 0.1}, "'consideration_share': needs a 'type' key"),
        ({"type": "uniform", "shares": 0.1}, "unknown key 'consideration_share.shares'; did you mean 'share'"),
        (
            {"type": "by_stage", "shares": {"early": 2}},
            "'consideration_share.shares.early': .* less than or equal to 1",
        ),
        ({"type": "by_rank", "bands": {"early": [{"through": 9, "share": 1}]}}, "ranks after 9 have no share"),
        (
            {"type": "by_rank", "bands": {"early": [{"through": 9, "share": 1}] * 2 + [{"share": 0}]}},
            "bands.early: 'through' must stand in all bands but the last, and rise",
        ),
        ({"type": "by_rank", "bands": {"early": [{"share": 1}, {"share": 0}]}}, "must stand in all bands but the last"),
        ({"type": "uniform", "share": 1, "budget": {}}, "give one of per_impression and per_period"),
        ({"type": "importance", "column": "truth/click"}, "'truth/click' is the simulator's truth"),
        ({"type": "importance", "column": "rank", "minus": "rank"}, "minus is column itself"),
        (
            {"type": "importance", "column": "rank", "defensive": 0},
            "'consideration_share.defensive': .* greater than 0",
        ),
    ],
)
def test_what_a_policy_cannot_be(share: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(share)


@pytest.mark.parametrize("config", [0.25, {"type": "uniform", "share": 0.5}, *POLICIES])
def test_a_policy_comes_back_from_its_dump(config: object) -> None:
    holder = validate(Holder, {"consideration_share": config})
    assert validate(Holder, holder.dump()) == holder
