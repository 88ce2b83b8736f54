from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from rayfm.models.base import MODELS
from rayfm.planning.estimate import ADVICE, estimate
from rayfm.planning.hardware import load_hardware
from rayfm.planning.search import Cluster, Piece, Plan, TablePlan
from rayfm.planning.step import (
    StepTime,
    optimizer_bytes,
    piece_load,
    rank_loads,
    received_bytes,
    reduced_bytes,
    replicated_load,
    step_time,
)
from rayfm.planning.work import Learner, TableWork, Work, count_work, operators, saved_bytes
from rayfm.schema import Schema
from rayfm.training.config import TrainingConfig

TABLE = TableWork(
    path="m", name="ad", rows=100, columns=4, pooled=True, lengths=(1.0, 3.0), optimizer="rowwise_adagrad", parts=1
)


def test_a_whole_tables_load_by_hand():
    load = piece_load(TABLE, "table_wise", Piece(0, 100, 4), batch=5, world=2)
    # 10 examples: 40 ids, 20 vectors, rows of 16 bytes.
    assert load.forward == 40 * (8 + 16) + 20 * 16
    # The gradients; each row and its sum of 4 bytes read and written.
    assert load.backward == 20 * 16 + 40 * (8 + 2 * 16 + 2 * 4)
    # Half of what arrives is the rank's own: ids of 8 bytes, 2 lengths an example of 4.
    assert load.ids == 0.5 * (40 * 8 + 10 * 2 * 4)
    assert load.vectors == 0.5 * 20 * 16
    assert (load.memory, load.state) == (1600, 400)
    assert load.io == 40 * 8 + 20 * 16


def test_a_row_wise_piece_has_its_share_of_ids_and_all_partial_vectors():
    load = piece_load(TABLE, "row_wise", Piece(0, 50, 4), batch=5, world=2)
    assert load.forward == 20 * (8 + 16) + 20 * 16
    assert load.ids == 0.5 * (20 * 8 + 10 * 2 * 4)
    assert load.vectors == 0
    assert (load.memory, load.state) == (800, 200)


def test_a_sequences_row_wise_piece_sends_the_rows_that_it_has():
    table = dataclasses.replace(TABLE, pooled=False)
    load = piece_load(table, "row_wise", Piece(0, 50, 4), batch=5, world=2)
    assert load.vectors == 0.5 * 20 * 16
    assert load.forward == 20 * (8 + 16) + 20 * 16


def test_partial_vectors_are_those_of_all_ranks_examples():
    halves = (Piece(0, 50, 4), Piece(1, 50, 4))
    plan = Plan((TablePlan(TABLE, "row_wise", halves),), "", 0.0)
    assert reduced_bytes(plan, batch=5, world=2) == 5 * 2 * 2 * 16
    assert received_bytes(plan, batch=5) == 5 * 2 * 16
    whole = Plan((TablePlan(TABLE, "table_wise", (Piece(1, 100, 4),)),), "", 0.0)
    assert reduced_bytes(whole, batch=5, world=2) == 0


def test_loads_add_up_on_the_rank_that_has_the_pieces():
    small = dataclasses.replace(TABLE, name="kind", rows=10, optimizer="adam")
    plan = Plan(
        (
            TablePlan(TABLE, "table_wise", (Piece(1, 100, 4),)),
            TablePlan(TABLE, "row_wise", (Piece(0, 50, 4), Piece(1, 50, 4))),
            TablePlan(small, "data_parallel", ()),
        ),
        "",
        0.0,
    )
    first, second = rank_loads(plan, batch=5, world=2)
    half = piece_load(TABLE, "row_wise", Piece(0, 50, 4), 5, 2)
    assert first == half + replicated_load(small, 5)
    assert second == piece_load(TABLE, "table_wise", Piece(1, 100, 4), 5, 2) + half + replicated_load(small, 5)


def work(**changed: object) -> Work:
    plain = {
        "module": nn.Module(),
        "tables": (TABLE,),
        "dense_parameters": 100,
        "matmul_flops": 1000.0,
        "other_flops": 10.0,
        "operators": 3,
        "activation_bytes": 0.0,
        "batch_bytes": 64.0,
    }
    return Work(**{**plain, **changed})  # type: ignore[arg-type]


UNIT = [
    "bf16_tflops=2e-9", "tf32_tflops=1e-9", "fp32_tflops=1e-9", "memory_gbs=1e-6", "nvlink_gbs=1e-6",
    "network_gbs=1e-7", "host_gbs=1e-6", "compute_efficiency=0.5", "memory_efficiency=0.5", "link_efficiency=0.5",
    "operator_us=1000", "hop_us=1e6",
]  # fmt: skip
"""fp32: 500 operations a second got, memory, NVLink and host 500 bytes a second, network 50; a hop of a second."""


def test_a_steps_parts_by_hand():
    cluster = Cluster(2, 1, load_hardware("h100", overrides=UNIT))
    plan = Plan((TablePlan(TABLE, "table_wise", (Piece(1, 100, 4),)),), "", 0.0)
    time = step_time(work(), plan, cluster, 5, "fp32")
    load = piece_load(TABLE, "table_wise", Piece(1, 100, 4), 5, 2)
    assert time.host_to_device == pytest.approx(5 * 64 / 500)
    # One other rank, in another node; two collectives of one hop.
    assert time.ids_all_to_all == pytest.approx(load.ids / 50 + 2)
    assert time.lookup == pytest.approx(load.forward / 500)
    assert time.vectors_forward == time.vectors_backward == pytest.approx(load.vectors / 50 + 1)
    # 5000 operations; 50 elementwise ones of 12 bytes; 3 operators of a millisecond.
    assert time.dense_forward == pytest.approx(5000 / 500 + 50 * 12 / 500 + 0.003)
    assert time.dense_backward == pytest.approx(2 * time.dense_forward)
    assert time.table_update == pytest.approx(load.backward / 500)
    # 400 bytes twice over half of the ring, and one bucket.
    assert time.dense_all_reduce == pytest.approx(2 * 400 / 2 / 50 + 1)
    assert time.dense_optimizer == pytest.approx(optimizer_bytes(100) / 500)
    assert optimizer_bytes(100) == 2800
    assert time.total == pytest.approx(sum(dataclasses.asdict(time).values()))
    half = step_time(work(), plan, cluster, 5, "bf16").dense_forward
    assert half == pytest.approx(5000 / 1000 + 50 * 6 / 500 + 0.003)


def test_row_wise_pooled_vectors_are_reduced_and_gathered():
    cluster = Cluster(2, 1, load_hardware("h100", overrides=UNIT))
    plan = Plan((TablePlan(TABLE, "row_wise", (Piece(0, 50, 4), Piece(1, 50, 4))),), "", 0.0)
    time = step_time(work(), plan, cluster, 5, "fp32")
    assert time.vectors_forward == pytest.approx(reduced_bytes(plan, 5, 2) / 2 / 50 + 1)


def test_a_cpu_has_its_batches_already():
    cluster = Cluster(1, 1, load_hardware("h100", overrides=["device=cpu"]))
    plan = Plan((TablePlan(TABLE, "table_wise", (Piece(0, 100, 4),)),), "", 0.0)
    time = step_time(work(), plan, cluster, 5, "fp32")
    assert (time.host_to_device, time.links) == (0, 0)


def test_the_longest_part_is_the_bottleneck_and_has_advice():
    parts = [field.name for field in dataclasses.fields(StepTime)]
    assert set(ADVICE) == set(parts)
    time = StepTime(*(float(position) for position in range(len(parts))))
    assert time.bottleneck == parts[-1]
    assert time.overlapped == max(time.device, time.links, time.host_to_device + time.host_rows)


SCHEMA = Schema.model_validate(
    {
        "tables": {"user": {"rows": 1000}, "ad": {"rows": 500}},
        "features": [
            {"name": "age", "kind": "dense"},
            {"name": "user", "kind": "sparse"},
            {"name": "ads", "kind": "multi", "table": "ad", "max_len": 5},
            {"name": "ad", "kind": "sparse"},
        ],
        "tasks": [{"name": "click"}],
    }
)


def learner(copies: int = 1, **keys: object) -> Learner:
    config = MODELS["dcnv2"].Config.model_validate({"type": "dcnv2", "embedding_dim": 16, "hidden": [8], **keys})
    return Learner("t", config, ("click",), copies)


def test_tables_are_counted_with_the_features_that_read_them():
    found = count_work([learner()], SCHEMA, TrainingConfig(), bf16=False)
    tables = {table.name: table for table in found.tables}
    assert (tables["user"].lengths, tables["ad"].ids, tables["ad"].vectors) == ((1.0,), 6.0, 2.0)
    assert found.table_parameters == 1500 * 16
    # A batch's row: a dense value, 7 ids and 3 lengths, and 44 bytes of what every batch has.
    few = count_work([learner(features=("age", "user"))], SCHEMA, TrainingConfig(), bf16=False)
    assert found.batch_bytes - few.batch_bytes == 6 * 8 + 2 * 4


def test_copies_multiply_all_but_the_batch():
    one = count_work([learner()], SCHEMA, TrainingConfig(), bf16=False)
    three = count_work([learner(copies=3)], SCHEMA, TrainingConfig(), bf16=False)
    for name in ("dense_parameters", "matmul_flops", "other_flops", "operators", "activation_bytes"):
        assert getattr(three, name) == pytest.approx(3 * getattr(one, name))
    assert (len(three.tables), three.batch_bytes) == (3 * len(one.tables), one.batch_bytes)


def test_what_autograd_keeps_of_two_layers():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    x = torch.rand(10, 4)
    # The input, and what the ReLU gave (for itself and for the second layer); no parameter.
    assert saved_bytes(model, x) == 10 * 4 * 4 + 10 * 3 * 4  # type: ignore[arg-type]
    assert operators(model, x) == 3  # type: ignore[arg-type]


def test_throughput_grows_with_the_cluster_and_shrinks_with_a_slow_network():
    def examples(nodes: int, *changed: str) -> float:
        cluster = Cluster(nodes, 8, load_hardware("h100", overrides=list(changed)))
        return estimate([learner()], SCHEMA, TrainingConfig(), cluster, 4096, "bf16").examples_per_second[0]

    assert examples(2) > examples(1)
    assert examples(2, "network_gbs=5") < examples(2)
