"""Tables in the host's memory, with a cache on the device or without: what they take, and what they cost a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, construct_split_state
from torchrec.distributed.planner.shard_estimators import _calculate_cache_aux_state_sizes

from rayfm.config import CapacityError, ConfigError
from rayfm.models.base import MODELS
from rayfm.planning import costs
from rayfm.planning.estimate import Estimate, estimate
from rayfm.planning.hardware import load_hardware
from rayfm.planning.memory import Held, cache_bytes, held_bytes, table_bytes
from rayfm.planning.search import Cluster, Piece, Plan, TablePlan, allowed_kinds, kernels, piece_bytes
from rayfm.planning.step import Load, host_memory, piece_load, step_time
from rayfm.planning.work import Learner, TableWork, count_work, table_work
from rayfm.schema import Schema
from rayfm.training.config import TableMemory, TrainingConfig

UVM, CACHED = TableMemory(kind="uvm"), TableMemory(kind="uvm_caching", cache_load_factor=0.25)
TABLE = TableWork(
    path="m", name="ad", rows=100, columns=4, pooled=True, lengths=(1.0, 3.0), optimizer="rowwise_adagrad", parts=1
)
WHOLE = Piece(0, 100, 4)
GPU: dict[str, Any] = {"gpus_per_worker": 1}


def on(memory: TableMemory, **changed: Any) -> TableWork:
    return dataclasses.replace(TABLE, memory=memory, **changed)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_cache_by_hand_and_as_torchrec_counts_its_books():
    # A quarter of 100 rows of 16 bytes, 16 bytes for each of 25 slots, 4 for each row.
    assert cache_bytes(100, 4, 0.25) == 25 * 16 + 25 * 16 + 400
    books = cache_bytes(1000, 8, 0.2) - 0.2 * table_bytes(1000, 8)
    assert books == _calculate_cache_aux_state_sizes([[1000, 8]], 0.2)[0]


def test_where_a_table_and_its_state_are_by_hand():
    assert held_bytes("rowwise_adagrad", TableMemory(), 100, 4) == Held(1600, 400, 0, 0)
    assert held_bytes("rowwise_adagrad", UVM, 100, 4) == Held(0, 400, 0, 1600)
    assert held_bytes("adagrad", UVM, 100, 4) == Held(0, 0, 0, 3200)
    assert held_bytes("sgd", CACHED, 100, 4) == Held(0, 0, 1200, 1600)
    assert held_bytes("rowwise_adagrad", CACHED, 100, 4).device == 400 + 1200


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_fbgemm_puts_values_and_state_where_it_is_counted(optimizer: str):
    """What fbgemm would allocate, in values of 4 bytes (it takes no memory to ask)."""
    spec = [(100, 4, EmbeddingLocation.MANAGED, ComputeDevice.CUDA)]
    values = construct_split_state(spec, rowwise=False, cacheable=True)
    state = construct_split_state(spec, rowwise=optimizer == "rowwise_adagrad", cacheable=False)
    held = held_bytes(optimizer, UVM, 100, 4)  # type: ignore[arg-type]
    assert held.device == 4 * (values.dev_size + state.dev_size)
    assert held.host == 4 * (values.uvm_size + state.uvm_size)


def test_a_piece_is_as_large_as_what_the_device_holds_of_it():
    assert piece_bytes(on(UVM), "table_wise", 4) == 400
    assert piece_bytes(on(CACHED), "row_wise", 4) == 25 * 4 + cache_bytes(25, 4, 0.25)
    assert "table_wise" in allowed_kinds(on(UVM), TrainingConfig(), 4, 400)
    assert "table_wise" not in allowed_kinds(TABLE, TrainingConfig(), 4, 400)


def test_the_fullest_host_is_that_of_the_node_whose_ranks_have_most():
    assert host_memory([Load(host=float(size)) for size in (1, 2, 4, 0, 5)], per_node=2) == 5
    assert host_memory([Load(host=float(size)) for size in (1, 2, 4, 0, 5)], per_node=3) == 7


# -- time -------------------------------------------------------------------------------------------------------------


def test_hits_of_a_cache_are_those_of_zipfs_law():
    assert costs.cache_hits(0.25, 0.0) == 0.25
    assert costs.cache_hits(1.0, 0.8) == 1.0
    rows, skew, share = 100_000, 0.5, 0.2
    weights = [rank**-skew for rank in range(1, rows + 1)]
    exact = sum(weights[: int(share * rows)]) / sum(weights)
    assert costs.cache_hits(share, skew) == pytest.approx(exact, rel=0.005)


def test_rows_over_the_bus_by_hand():
    load, near = piece_load(on(UVM), "table_wise", WHOLE, 5, 2), piece_load(TABLE, "table_wise", WHOLE, 5, 2)
    # 40 ids: rows of 16 bytes come over the link for the look-up and for the update; the sums stay on the device.
    assert load.host_link == 40 * 2 * 16
    assert load.forward == 40 * 8 + 20 * 16
    assert load.backward == 20 * 16 + 40 * (8 + 2 * 4)
    assert (near.host_link, near.host, near.cache) == (0, 0, 0)
    assert (load.memory, load.state, load.cache, load.host) == (0, 400, 0, 1600)
    assert (load.ids, load.vectors, load.io) == (near.ids, near.vectors, near.io)
    element = piece_load(on(UVM, optimizer="adagrad"), "table_wise", WHOLE, 5, 2)
    assert element.host_link == 40 * 2 * 16 + 40 * 16, "a state of a value an element is on the host as well"


def test_rows_that_the_cache_misses_by_hand():
    load, near = (
        piece_load(table, "table_wise", WHOLE, 5, 2, skew=0.5) for table in (on(CACHED), TABLE)
    )  # half of 40 ids hit
    assert load.host_link == 20 * 16
    assert load.forward == near.forward + 20 * 2 * 16, "a row comes into the cache, and another leaves it"
    assert load.backward == near.backward
    assert piece_load(on(CACHED), "table_wise", WHOLE, 5, 2).host_link == 30 * 16, "all ids alike: a quarter hits"
    full = piece_load(on(TableMemory(kind="uvm_caching", cache_load_factor=1.0)), "table_wise", WHOLE, 5, 2)
    assert (full.host_link, full.forward) == (0, near.forward)


def test_the_host_link_is_a_part_of_the_step_and_overlaps_with_no_copy():
    work = count_work([LEARNER], schema(1000), TrainingConfig(), bf16=False)
    cluster = Cluster(1, 2, load_hardware("h100", overrides=["host_gbs=1e-6", "link_efficiency=0.5", "id_skew=0.5"]))

    def time(memory: TableMemory):
        return step_time(work, Plan((TablePlan(on(memory), "table_wise", (WHOLE,)),), "", 0.0), cluster, 5, "fp32")

    assert time(TableMemory()).host_rows == 0
    assert time(UVM).host_rows == pytest.approx(40 * 2 * 16 / 500)
    assert time(CACHED).host_rows == pytest.approx(20 * 16 / 500)
    assert time(UVM).bottleneck == "host_rows" or time(UVM).host_to_device > time(UVM).host_rows
    assert time(UVM).overlapped == pytest.approx(time(UVM).host_to_device + time(UVM).host_rows)


# -- the plan ---------------------------------------------------------------------------------------------------------

MODEL = MODELS["dcnv2"].Config.model_validate({"type": "dcnv2", "embedding_dim": 16, "hidden": [8]})
LEARNER = Learner("t", MODEL, ("click",))


def schema(rows: int) -> Schema:
    names = ("c0", "c1")
    return Schema.model_validate(
        {
            "tables": {name: {"rows": rows} for name in names},
            "features": [{"name": "age", "kind": "dense"}, *({"name": name, "kind": "sparse"} for name in names)],
            "tasks": [{"name": "click"}],
        }
    )


def planned(rows: int, *changed: str, **training: Any) -> Estimate:
    config = TrainingConfig.model_validate({**GPU, **training})
    cluster = Cluster(1, 2, load_hardware("h100", overrides=list(changed)))
    return estimate([LEARNER], schema(rows), config, cluster, 64, "bf16")


BIG = 1_500_000_000
"""Rows of two tables of 96 GB each, with sums of 6 GB: more than two GPUs of 80 GB."""


def test_the_config_says_which_kernel_and_cache_the_planner_may_take():
    training = TrainingConfig.model_validate(
        {**GPU, "table_memory_overrides": {"c1": {"kind": "uvm_caching", "cache_load_factor": 0.1}}}
    )
    work = count_work([LEARNER], schema(100), training, bf16=False)
    first, second = sorted(table_work(work.module, schema(100), training), key=lambda table: table.name)
    assert kernels(first) == {"compute_kernels": ["fused"]}
    assert kernels(second)["compute_kernels"] == ["fused_uvm_caching"]
    assert kernels(second)["cache_params"].load_factor == 0.1
    assert kernels(dataclasses.replace(first, optimizer="adam")) == {}
    small = TrainingConfig.model_validate({**GPU, "tables": {"type": "adam"}, "table_memory": {"kind": "uvm"}})
    assert all(table.memory.kind == "device" for table in table_work(work.module, schema(100), small))


def test_tables_larger_than_the_gpus_fit_beside_them():
    with pytest.raises(CapacityError, match="tables and their optimiser take 204"):
        planned(BIG)
    cached = planned(BIG, table_memory={"kind": "uvm_caching", "cache_load_factor": 0.1})
    # Both ranks' caches: a tenth of the values, 16 bytes for each of its slots, 4 for each row.
    assert 2 * cached.fullest.cache == pytest.approx(2 * (9.6e9 + 16 * 0.15e9 + 4 * 1.5e9), rel=0.01)
    assert (cached.fullest.tables, cached.host) == (0, pytest.approx(2 * 96e9))
    plain = planned(BIG, table_memory={"kind": "uvm"})
    assert plain.fullest.cache == 0
    assert plain.step.host_rows > cached.step.host_rows > 0
    assert plain.fullest.total < cached.fullest.total


def test_one_table_alone_may_lie_on_the_host():
    mixed = planned(BIG // 3, table_memory_overrides={"c1": {"kind": "uvm"}})
    assert mixed.host == pytest.approx(32e9)
    kinds = {placed.table.name: placed.table.memory.kind for placed in mixed.plan.tables}
    assert kinds == {
        "c0": "device",
        "c1": "uvm",
    }


def test_hosts_that_are_too_small_are_refused():
    with pytest.raises(
        CapacityError,
        match=r"hosts' memory take 192\.0 GB, and 1 nodes have 85\.0 GB: short by 107\.0.*--nodes 3 ",
    ):
        planned(BIG, "host_memory_gb=100", table_memory={"kind": "uvm"})


def test_a_cpu_has_no_memory_beside_its_own():
    with pytest.raises(ConfigError, match="table_memory is beside a GPU's, and the hardware is a cpu"):
        planned(100, "device=cpu", table_memory={"kind": "uvm"})
