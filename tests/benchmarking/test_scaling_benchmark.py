"""`benchmarks.scaling`: the arithmetic against hand-computed values, the plan, and what two processes really send."""

from __future__ import annotations

import time
from pathlib import Path

import processes
import pytest
import torch

from benchmarks import collectives, scaling
from benchmarks.collectives import EXCHANGES, Clock, Sent, closed_form, written_bytes
from benchmarks.data import BATCH, EMBEDDING_DIM, SHORT, SPARSE, model_config, schema, write_store
from benchmarks.scaling import Case, Rank
from rayfm.models.build import build_model


def test_closed_forms_by_hand():
    # 4 examples a rank, 3 features of 4 columns; half of everything is for the other rank.
    table_wise = closed_form("table_wise", 2, batch=8, features=3, columns=4, dense_parameters=10)
    assert table_wise == {
        "ids": 4 * 3 * (8 + 4) / 2,
        "vectors forward": 4 * 3 * 16 / 2,
        "vectors backward": 4 * 3 * 16 / 2,
        "gradients": 2 * 40 / 2,
    }
    # On four ranks: 2 examples a rank; each sends its lengths three times, and partial sums of all 8 examples.
    row_wise = closed_form("row_wise", 4, batch=8, features=3, columns=4, dense_parameters=10)
    assert row_wise == {
        "ids": 2 * 3 * 8 * 3 / 4 + 3 * 2 * 3 * 4,
        "vectors forward": 8 * 3 * 16 * 3 / 4,
        "vectors backward": 8 * 3 * 16 * 3 / 4,
        "gradients": 2 * 40 * 3 / 4,
    }


@pytest.mark.parametrize("sharding", scaling.SHARDINGS)
def test_one_worker_sends_nothing(sharding: str):
    assert set(closed_form(sharding, 1, 8, 3, 4, 10).values()) == {0.0}


def test_other_shardings_have_no_closed_form():
    with pytest.raises(ValueError, match="no closed form for column_wise"):
        closed_form("column_wise", 2, 8, 3, 4, 10)


@pytest.mark.parametrize("sharding", scaling.SHARDINGS)
def test_the_plan_says_what_the_closed_form_says(sharding: str):
    """On two ranks the 26 tables are dealt evenly, so that the busiest rank is the mean one."""
    model = build_model(model_config("dlrm"), schema(), ("click",), device=torch.device("meta"))
    dense = sum(p.numel() for name, p in model.named_parameters() if "embedding_bags" not in name)
    expected = closed_form(sharding, 2, BATCH, SPARSE, EMBEDDING_DIM, dense)
    assert scaling.planned("dlrm", sharding, 2) == pytest.approx(expected)


def test_two_workers_send_the_closed_form(tmp_path: Path):
    """And gloo's sockets carry it, but for a reduce-scatter, which this gloo makes from an all-reduce: twice."""
    write_store(tmp_path / "store", {SHORT: BATCH * (scaling.WARM + 1)})
    cases = [("dlrm", sharding) for sharding in scaling.SHARDINGS]
    processes.start(scaling.work, (2, str(tmp_path), str(tmp_path / "store"), cases), 2)
    for model, sharding in cases:
        ranks = [scaling.load_rank(tmp_path / f"{model}.{sharding}.{rank}.json") for rank in range(2)]
        case = Case(model, sharding, 2, ranks)
        expected = closed_form(sharding, 2, BATCH, SPARSE, EMBEDDING_DIM, ranks[0].dense_parameters)
        for kind in EXCHANGES:
            # Beside ids and lengths go a few counts; hashed ids are not spread quite evenly over the rows.
            assert case.sent(kind)[0] == pytest.approx(expected[kind], rel=2e-3), (sharding, kind)
            twice = 2 if (sharding, kind) == ("row_wise", "vectors forward") else 1
            assert case.sent(kind, "wire")[0] == pytest.approx(twice * expected[kind], rel=1e-2), (sharding, kind)
        for part in scaling.PARTS:
            assert case.critical[part] > 0, (sharding, part)


def test_the_clock_charges_the_innermost_part(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    clock = Clock()

    def spend(seconds: float) -> None:
        now[0] += seconds

    clock.turn("forward")
    spend(1)
    clock.enter("look-up")
    spend(2)
    with clock.paused():
        spend(100)
    clock.leave()
    spend(4)
    clock.turn("backward")
    spend(8)
    clock.enter("gradients")
    assert clock.inside("backward")
    assert not clock.inside("forward")
    spend(16)
    clock.leave()
    clock.turn("other")
    assert dict(clock.seconds) == {"other": 0, "forward": 5, "look-up": 2, "backward": 8, "gradients": 16}


def test_the_critical_path_is_the_longest_rank_of_each_part():
    one = Case("dlrm", "table_wise", 1, [Rank({"dense forward": 6.0, "look-up": 6.0}, {}, 0)])
    ranks = [Rank({"dense forward": 3.0, "look-up": 1.8}, {}, 0), Rank({"dense forward": 2.0, "look-up": 2.0}, {}, 0)]
    two = Case("dlrm", "table_wise", 2, ranks)
    assert (two.critical["dense forward"], two.critical["look-up"], two.critical["ids"]) == (3.0, 2.0, 0.0)
    assert scaling.speed_up(one.critical, two.critical) == pytest.approx(12 / 5)
    assert two.imbalance == pytest.approx({"dense forward": 3 / 2.5 - 1, "look-up": 2 / 1.9 - 1})
    assert scaling.cost_of_waiting(two) == ("dense forward", pytest.approx(0.5))


def test_bytes_of_ranks_are_a_mean_and_a_most():
    ranks = [Rank({}, {"ids": Sent(3, 100.0, 120)}, 0), Rank({}, {"ids": Sent(3, 300.0, 320)}, 0)]
    case = Case("dlrm", "table_wise", 2, ranks)
    assert case.sent("ids") == (200.0, 300.0)
    assert case.sent("ids", "wire") == (220, 320)
    assert case.sent("gradients") == (0.0, 0.0)


def test_written_bytes_are_read_from_the_kernels_file():
    assert written_bytes("rchar: 7\nwchar: 42\nsyscr: 1\n") == 42
    with pytest.raises(KeyError):
        written_bytes("rchar: 7\n")


def test_size_counts_values():
    assert collectives.size_of(torch.zeros(3, 5, dtype=torch.int64)) == 120
