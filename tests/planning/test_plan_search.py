from __future__ import annotations

import resource

import pytest
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator

from rayfm.config import CapacityError, ConfigError
from rayfm.models.base import MODELS
from rayfm.planning.estimate import Estimate, estimate
from rayfm.planning.estimators import OncePerSize
from rayfm.planning.hardware import load_hardware
from rayfm.planning.search import Cluster, allowed_kinds, piece_bytes, proposers, topology
from rayfm.planning.work import Learner, TableWork, count_work
from rayfm.schema import Schema
from rayfm.training.config import TrainingConfig
from rayfm.training.sharding import sharders


def schema(rows: int, tables: int = 3) -> Schema:
    return Schema.model_validate(
        {
            "tables": {f"c{i}": {"rows": rows} for i in range(tables)},
            "features": [
                {"name": "age", "kind": "dense"},
                *({"name": f"c{i}", "kind": "sparse"} for i in range(tables)),
            ],
            "tasks": [{"name": "click"}],
        }
    )


def planned(of: Schema, cluster: Cluster, dim: int = 16, batch: int = 256, **training: object) -> Estimate:
    model = MODELS["dcnv2"].Config.model_validate({"type": "dcnv2", "embedding_dim": dim, "hidden": [8]})
    config = TrainingConfig.model_validate(training)
    return estimate([Learner("t", model, ("click",))], of, config, cluster, batch, "bf16")


def cluster(nodes: int = 1, per_node: int = 8, *changed: str) -> Cluster:
    return Cluster(nodes, per_node, load_hardware("h100", overrides=list(changed)))


def table(**changed: object) -> TableWork:
    plain = {"rows": 101, "columns": 16, "pooled": True, "lengths": (1.0,), "optimizer": "rowwise_adagrad", "parts": 4}
    return TableWork("m", "c0", **{**plain, **changed})  # type: ignore[arg-type]


def test_the_largest_piece_of_a_table():
    assert piece_bytes(table(), "table_wise", 4) == 101 * 16 * 4 + 101 * 4
    assert piece_bytes(table(), "row_wise", 4) == 26 * 16 * 4 + 26 * 4
    assert piece_bytes(table(), "column_wise", 4) == 101 * 4 * 4 + 101 * 4


def test_what_does_not_fit_a_device_is_not_proposed():
    free = piece_bytes(table(), "column_wise", 4)
    assert allowed_kinds(table(), TrainingConfig(), 4, 1e9) == ("table_wise", "row_wise", "column_wise")
    assert allowed_kinds(table(), TrainingConfig(), 4, free) == ("row_wise", "column_wise")
    assert allowed_kinds(table(), TrainingConfig(), 4, free - 1) == ("row_wise",)
    assert allowed_kinds(table(parts=1), TrainingConfig(), 4, 1e9) == ("table_wise", "row_wise")
    assert allowed_kinds(table(), TrainingConfig(), 1, 1e9) == ("table_wise",)
    only = TrainingConfig(sharding_overrides={"c0": "column_wise"})
    assert allowed_kinds(table(), only, 4, 1e9) == ("column_wise",)
    assert allowed_kinds(table(optimizer="adam"), only, 4, 0) == ("data_parallel",)


def test_many_ranks_get_a_reduced_search():
    few, name = proposers(tables=4, options=81, world=8)
    assert type(few[0]).__name__ == "GridSearchProposer"
    assert name == "grid, greedy, uniform"
    many, name = proposers(tables=26, options=3**26, world=2048)
    assert "GridSearchProposer" not in [type(one).__name__ for one in many]
    assert name.startswith("reduced greedy")


def test_an_estimate_for_each_size_is_the_estimate_for_each_shard():
    of, there = schema(1001), topology(cluster(2, 4), 1e9)
    model = MODELS["dcnv2"].Config.model_validate({"type": "dcnv2", "embedding_dim": 16, "hidden": [8]})
    work = count_work([Learner("t", model, ("click",))], of, TrainingConfig(), bf16=False)

    def shards(estimators: list[object] | None) -> dict[tuple[str, str], list[object]]:
        options = EmbeddingEnumerator(there, 64, None, estimator=estimators).enumerate(work.module, sharders())
        return {(o.name, o.sharding_type): [(s.size, s.offset, s.perf, s.storage) for s in o.shards] for o in options}

    # 1001 rows on 8 ranks: seven pieces of 126 rows, and one of 119.
    every = shards(None)
    assert {len(found) for found in every.values()} == {1, 8}
    assert shards([OncePerSize(there), EmbeddingStorageEstimator(there)]) == every


def test_tables_lie_on_every_rank_that_their_kind_says():
    found = planned(
        schema(4000), cluster(2, 4), sharding_overrides={"c0": "row_wise", "c1": "column_wise", "c2": "table_wise"}
    )
    kinds = {p.table.name: (p.kind, sorted(piece.rank for piece in p.pieces)) for p in found.plan.tables}
    assert kinds["c0"] == ("row_wise", list(range(8)))
    assert (kinds["c1"][0], len(kinds["c1"][1])) == ("column_wise", 4)
    assert (kinds["c2"][0], len(kinds["c2"][1])) == ("table_wise", 1)
    for placed in found.plan.tables:
        assert sum(piece.rows * piece.columns for piece in placed.pieces) == 4000 * 16


def test_what_is_too_large_says_by_how_much_and_what_would_fit():
    # 3 tables of 1e9 rows, 16 values and a sum of 4 bytes each: 204 GB.
    small = cluster(1, 2, "memory_gb=80")
    with pytest.raises(CapacityError, match=r"take 204\.0 GB.*short by 68\.\d GB.*--nodes 2 at least") as refused:
        planned(schema(10**9), small)
    assert "devices with 120 GB" in str(refused.value)
    assert "67% of the rows" in str(refused.value)
    found = planned(schema(10**9), cluster(2, 2, "memory_gb=80"))
    assert found.fullest.total < found.cluster.usable_bytes


def test_a_table_that_may_not_be_cut_says_so():
    with pytest.raises(CapacityError, match=r"'c0': sharded table_wise.*68\.0 GB, and.*sharding_overrides: \{c0: row_"):
        planned(schema(10**9), cluster(4, 8, "memory_gb=40"), sharding="table_wise")


def test_a_batch_that_no_node_helps():
    with pytest.raises(CapacityError, match=r"more nodes do not help: take a smaller --batch-size"):
        planned(schema(1000), cluster(), batch=10**9)


def test_inputs_and_outputs_that_do_not_fit():
    # Tables fit; vectors of a batch from all ranks do not.
    with pytest.raises(CapacityError, match=r"finds no plan.*a smaller --batch-size than 3000000"):
        planned(schema(10**6), cluster(16, 8, "memory_gb=30"), batch=3_000_000, sharding="row_wise")


def test_a_cluster_has_nodes_and_a_batch_examples():
    with pytest.raises(ConfigError, match="--nodes is 0"):
        cluster(0)
    with pytest.raises(ConfigError, match="--gpus-per-node is 0"):
        cluster(1, 0)
    with pytest.raises(ConfigError, match="--batch-size is 0"):
        planned(schema(10), cluster(), batch=0)


def test_three_trillion_parameters_on_2048_gpus():
    tables, dim = 4, 128
    rows = 3 * 10**12 // (tables * dim) + 1
    found = planned(schema(rows, tables), cluster(256, 8), dim=dim, batch=512)
    assert found.work.table_parameters >= 3 * 10**12
    # 12 TB of values and 94 GB of sums over 2,048 ranks, a table of 3 TB on all of them.
    assert found.fullest.tables == pytest.approx(12e12 / 2048, rel=1e-3)
    assert {p.kind for p in found.plan.tables} == {"row_wise"}
    assert found.fullest.total < found.cluster.usable_bytes
    # Partial vectors of all ranks' examples: what a row-wise table on 2,048 ranks costs.
    assert found.step.bottleneck in ("vectors_forward", "vectors_backward")
    assert found.plan.seconds < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8e6
    with pytest.raises(CapacityError, match="--nodes 23 at least"):
        planned(schema(rows, tables), cluster(16, 8), dim=dim, batch=512)
