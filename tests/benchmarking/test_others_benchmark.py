"""The comparison with FuxiCTR and a plain TorchRec loop: everything but the other side itself, and no timing."""

from __future__ import annotations

import dataclasses
import datetime
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.others import __main__ as others
from benchmarks.others import cases, line, plain, planted, table
from benchmarks.others.watch import watch
from benchmarks.run import LINES
from rayfm.data.batch import Batch
from rayfm.models.base import MODELS
from rayfm.models.build import build_model
from rayfm.models.synthetic import synthetic_batch
from rayfm.schema import Schema

ROOT = Path(__file__).resolve().parents[2]
SMALL = cases.Sizes(embedding_dim=4, hidden=(8, 4), cross_layers=2, batch=16)


def test_planted_logits_are_the_sum_of_effects_pairs_and_dense_values(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planted, "effects", lambda feature: np.array([0.0, 0.1 * (feature == 2)]))
    monkeypatch.setattr(planted, "vectors", lambda feature: np.array([[0.0, 0.0], [1.0, 2.0]]))
    ranks_NS = np.zeros((2, planted.SPARSE), np.int64)
    ranks_NS[1, [2, 10, 12]] = 1
    dense_ND = np.zeros((2, planted.DENSE))
    dense_ND[1, 3] = math.e - 1
    nothing = planted.BIAS - planted.LOG_MEAN * (0.3 - 0.2 + 0.2 - 0.15 + 0.1)
    # One effect, one whole pair (1 * 1 + 2 * 2), and log(1 + e - 1) = 1 with weight -0.2.
    assert planted.planted_logits(ranks_NS, dense_ND) == pytest.approx([nothing, nothing + 0.1 + 5.0 - 0.2])


def test_blocks_are_the_same_each_time_and_have_no_more_ids_than_said():
    ids = (3,) * planted.SPARSE
    one = planted.block(500, 65_536, 1, ids)
    assert one.equals(planted.block(500, 65_536, 1, ids))
    assert not one.equals(planted.block(500, 0, 1, ids))
    assert [len(set(one[f"c{i}"].to_pylist())) for i in range(planted.SPARSE)] == [3] * planted.SPARSE
    assert min(one["c0"].to_pylist()) >= 0
    assert one["i0"].null_count > 0
    assert one["i12"].null_count == 0


def test_the_newest_tenth_lies_in_a_day_of_its_own(tmp_path: Path):
    planted.write(tmp_path, 1_000, planted.AS_CRITEO)
    rows = {}
    for part, day in (("train", "2025-01-01"), ("test", "2025-01-02")):
        times = pa.concat_tables(pq.read_table(path) for path in (tmp_path / part).glob("*.parquet"))[
            "time"
        ].to_pylist()
        assert times == sorted(times)
        dates = {f"{datetime.datetime.fromtimestamp(time / 1e6, datetime.UTC):%Y-%m-%d}" for time in times}
        assert dates == {day}
        rows[part] = len(times)
    assert rows == {"train": 900, "test": 100}


def small_schema() -> Schema:
    return Schema.model_validate(
        {
            "tables": {"a": {"rows": 20}, "b": {"rows": 30}},
            "features": [
                {"name": "x", "kind": "dense"},
                {"name": "y", "kind": "dense"},
                {"name": "a", "kind": "sparse"},
                {"name": "b", "kind": "multi"},
            ],
            "tasks": [{"name": "click"}],
        }
    )


RENAMED = {
    "cross.layers.": "crosses.",
    "deep.layers.": "deep.",
    "heads.linear.": "head.",
    "terms.dense_factors.weights_DT": "dense_weights_D",
    "terms.dense_factors.factors_DE": "dense_factors_DE",
    "embeddings.bags.embedding_bags.": "bags.embedding_bags.t_",
    "terms.factors.bags.embedding_bags.": "bags.embedding_bags.t_",
    "terms.weights.bags.embedding_bags.": "weights.embedding_bags.t_",
}


def as_plain(name: str) -> str:
    """What the plain model calls a parameter of rayfm's."""
    for ours, theirs in RENAMED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@pytest.mark.parametrize("name", cases.MODELS)
def test_the_plain_model_computes_what_rayfms_does(name: str):
    schema = small_schema()
    config = MODELS[name].Config.model_validate(cases.model_mapping(name, SMALL))
    ours = build_model(config, schema, ("click",), seed=3)
    theirs = plain.MODELS[name](schema, SMALL).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.5)
        state = {as_plain(key): value for key, value in ours.state_dict().items()}
        # rayfm's bias of the machine has no counterpart: the head's bias is one already.
        if "product_heads.bias_T" in state:
            state["head.bias"] = state["head.bias"] + state.pop("product_heads.bias_T")
        if "dense_weights_D" in state:
            state["dense_weights_D"] = state["dense_weights_D"].squeeze(1)
    theirs.load_state_dict(state)
    batch: Batch = synthetic_batch(schema, rows=16)
    torch.testing.assert_close(theirs(batch.dense, batch.sparse), ours(batch).logits["click"])


def test_kuairand_reads_the_features_of_the_example():
    schema, sizes = cases._kuairand()
    assert len(schema.features) == 38
    assert [task.name for task in schema.tasks] == ["click"]
    assert {feature.table_name for feature in schema.features} == set(schema.tables)
    assert sizes.batch == 256


def test_a_case_is_described_for_a_python_without_rayfm(tmp_path: Path):
    planted.write(tmp_path, 100, planted.AS_CRITEO)
    schema, sizes = cases._criteo()
    described = cases.describe(cases.Case("criteo", tmp_path, schema, sizes), "deepfm")
    for part in (
        '"rows": {"train": 90, "test": 10}',
        '"block_rows": 0',
        '"name": "c25", "kind": "sparse", "type": "int"',
    ):
        assert part in described


PROGRAM = """
import json, subprocess, sys, time
from benchmarks.others.phases import say
burn = "import time\\nwhile time.process_time() < 0.7: pass"
print("something else")
say("start", "work")
subprocess.run([sys.executable, "-c", burn])
say("stop", "work", 20)
say("result", json.dumps({"auc": 0.5}))
"""


def test_a_watched_program_is_charged_for_its_children(tmp_path: Path):
    phases, result = watch([sys.executable, "-c", PROGRAM], ROOT, tmp_path / "log", {})
    assert result == {"auc": 0.5}
    phase = phases["work"]
    assert phase.units == 20
    # The child ends between two looks at it, half a second apart.
    assert 0.1 < phase.cpu - phase.own < 1.5
    assert phase.rate == pytest.approx(20 / phase.cpu)


def test_a_watched_program_that_fails_says_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        watch([sys.executable, "-c", "raise ValueError('no such thing')"], ROOT, tmp_path / "log", {})


def run(units: float, cpu: float, **result: float) -> dict[str, object]:
    return {
        "phases": {"train": {"units": units, "cpu": cpu}, "prepare": {"units": units, "cpu": cpu}},
        "result": result,
    }


def test_seconds_an_example_of_consecutive_phases_add_up():
    # 0.1 and 0.3 seconds an example.
    assert table.rate([{"units": 100, "cpu": 10}, {"units": 10, "cpu": 3}]) == pytest.approx(1 / 0.4)


def test_rows_compare_the_seeds_that_both_have():
    measured = {
        "ours/prepare": run(100, 5),
        "fuxictr/prepare": run(100, 10),
        "ours/train/dcnv2/fp32/1": run(90, 3, auc=0.7),
        "ours/train/dcnv2/fp32/2": run(90, 1, auc=0.9),
        "ours/train/deepfm/fp32/1": run(90, 1, auc=0.9),
        "fuxictr/train/dcnv2/1": run(90, 9, auc=0.6),
    }
    prepare, train, both = table.fuxictr_rows("criteo-1m", "dcnv2", "fp32", measured)
    assert (prepare.ours, prepare.theirs, prepare.ratio) == pytest.approx((20, 10, 2))
    assert (train.ours, train.theirs, train.ratio, train.auc, train.other_auc) == pytest.approx((30, 10, 3, 0.7, 0.6))
    assert (both.ours, both.theirs) == pytest.approx((1 / (1 / 20 + 1 / 30), 5))
    assert table.fuxictr_rows("criteo-1m", "deepfm", "fp32", measured) == []
    assert table.fuxictr_rows("criteo-1m", "dcnv2", "bf16", measured) == []


def test_a_plain_loop_is_one_row():
    result = {"rate": 97.0, "other_rate": 100.0, "cpu": 0.97, "wall": 0.9, "auc": 0.71, "other_auc": 0.7}
    (row,) = table.plain_rows("criteo-1m", "dcnv2", "bf16", {"plain/dcnv2/bf16/1": {"result": result}})
    assert (row.ours, row.theirs, row.ratio, row.auc, row.other_auc) == (97, 100, 0.97, 0.71, 0.7)
    assert not others.short(row)
    assert others.short(dataclasses.replace(row, ratio=0.94))


def test_a_row_against_fuxictr_needs_speed_and_auc():
    row = table.Row("criteo-1m", "dcnv2", "bf16", "FuxiCTR", "train", 30, 10, 3.0, auc=0.7, other_auc=0.7)
    assert not others.short(row)
    assert others.short(dataclasses.replace(row, ratio=2.9))
    assert others.short(dataclasses.replace(row, auc=0.69))
    assert others.short(dataclasses.replace(row, part="both", ratio=2.9))
    assert not others.short(dataclasses.replace(row, part="prepare", ratio=2.9))


def test_the_table_has_80_columns():
    row = table.Row("criteo-100k", "deepfm", "fp32", "TorchRec", "prepare", 999_999, 999_999, 999.99, 0.7, 0.7)
    assert len(table.HEADER) == len(row.text()) == 80


def test_a_store_without_a_figure_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = cases.Case("criteo-100k", tmp_path, *cases._criteo())
    (tmp_path / "store").mkdir()
    found = []

    def watched(*arguments: object) -> tuple[dict[str, object], dict[str, object]]:
        found.append((tmp_path / "store").exists())
        (tmp_path / "store").mkdir(exist_ok=True)
        return {}, {}

    monkeypatch.setattr(others, "watch", watched)
    for _ in range(2):  # the second finds the store with its figure, and leaves both
        others.Bench(case, tmp_path, None).measure("ours", [], [])
    assert found == [False]
    assert (tmp_path / "store").exists()


def test_an_absent_fuxictr_is_named_with_how_to_install_it(tmp_path: Path):
    assert others.missing_fuxictr(None) == others.INSTALL
    assert "No such file" in str(others.missing_fuxictr(str(tmp_path / "python")))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    assert "No module named 'fuxictr'" in str(others.missing_fuxictr(str(python)))
    assert subprocess.run([str(python), "-c", "pass"], check=False).returncode == 0


def test_a_line_against_fuxictr_says_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("FUXICTR_PYTHON", raising=False)
    with pytest.raises(SystemExit, match="not measured: set FUXICTR_PYTHON"):
        line.main(str(tmp_path), "fuxictr", "dcnv2", "fp32")
    assert not list(tmp_path.iterdir())


def test_the_lines_of_make_bench_are_those_bars():
    bars = {one.name: (one.bar, one.at_most) for one in LINES if one.module == "others.line"}
    assert len(bars) == 8
    assert bars["others/torchrec/dcnv2/bf16"] == (0.95, False)
    assert bars["others/fuxictr/deepfm/fp32"] == (3.0, False)
