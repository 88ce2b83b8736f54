"""A run whose students take near-line labels: what is pinned, what is recorded, what a resumed run may change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from example_store import write_store
from small_pipeline import PERIODS, merged, small_pipeline

from rayfm.config import ConfigError, LabelError, validate
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader
from rayfm.data.steps import ReadPlan
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import teacher_key
from rayfm.pipeline.stream import Pipeline
from rayfm.schema import Kind
from rayfm.serving.nearline.labels import NearLineLabels
from rayfm.serving.nearline.tickets import new_ticket
from rayfm.serving.teacher import TeacherHere
from rayfm.training.trainer import fit_here

STUDENT = {
    "tasks": ["click"],
    "model": {"type": "fm", "features": ["user", "ad"], "embedding_dim": 4},
    "variants": {"direct": [{"type": "direct", "teacher": "fm"}]},
}


def opened(folder: Path, near_line: dict[str, Any] | None, resume: bool = False, log: Path | None = None) -> Pipeline:
    """A run over impressions, which are labelled in bulk, and considerations, which are not; two student groups."""
    config = small_pipeline(
        folder,
        teachers={"fm": {"label_considerations": False, "near_line": near_line}},
        students={"vm": {"variants": {"none": []}}, "one": STUDENT, "two": merged(STUDENT, {"group": "others"})},
        groups={"others": {"batch_size": 32}},
        consideration_share=1.0,
        data={"lanes": 2, "source": {"path": str(log or folder / "log")}},
        evaluation={"replicates": 0},
    )
    write_store(Path(config.storage), list(PERIODS), impressions=40, considerations=20, lanes=2)
    pipeline = Pipeline(config)
    pipeline.open(resume=resume, overwrite=False)
    return pipeline


def train(pipeline: Pipeline, *names: str) -> None:
    for spec in pipeline.specs:
        if spec.name in names:
            fit_here(spec, pipeline.coordinator(spec, 0.0, alone=True), pipeline.label_source(spec.name))
            pipeline.tickets.check()


def version_after(pipeline: Pipeline, period: str) -> str:
    ticket = pipeline.tickets.get("trained", "fm", period)
    assert ticket is not None
    return ticket["versions"][teacher_key(pipeline.config, "fm")]


def post(pipeline: Pipeline, period: str, ids: list[int], value: float) -> int:
    """Near-line labels of a period by the snapshot that its bulk labels are of."""
    count, before = len(ids), PERIODS[PERIODS.index(period) - 1]
    columns = {"period": period, "version": version_after(pipeline, before), "ticket": new_ticket()}
    rows = {name: [text] * count for name, text in columns.items()} | {
        "row": pa.array(range(count), pa.int64()),
        "example_id": pa.array(ids, pa.int64()),
        "task_click": pa.array([value] * count, pa.float32()),
        "task_watch": pa.array([value] * count, pa.float32()),
    }
    return NearLineLabels(pipeline.run_dir).append("fm", pa.table(rows)).table_version


def label(pipeline: Pipeline, *periods: str) -> None:
    handle = TeacherHere(str(pipeline.run_dir), teacher_key(pipeline.config, "fm"))
    pipeline.label("fm", handle, periods or None, timeout=0.0)


def considered(pipeline: Pipeline, period: str) -> list[int]:
    return pipeline.store.open_lane(period, "consideration", 0).read()["example_id"].to_pylist()


def ids_of(pipeline: Pipeline, period: str, kind: Kind) -> set[int]:
    lanes = [pipeline.store.open_lane(period, kind, lane).read()["example_id"] for lane in range(2)]
    return {example for lane in lanes for example in lane.to_pylist()}


def supervision(pipeline: Pipeline, group: str, period: str) -> dict[int, tuple[float, bool]]:
    """Example id -> the click's supervision (value, mask) that a group's batches hold."""
    (spec,) = (spec for spec in pipeline.student_specs if spec.name == group)
    pinned = pipeline.coordinator(spec).wait_labels(period)["fm"]
    lookup = pipeline.label_source(group).lookup("fm", pinned, ("click",))
    encoder = Encoder(pipeline.config.schema_, supervision=("fm/click",))
    plan = ReadPlan(pipeline.store, tuple(encoder.columns), 16, ("fm/click",), (lookup,), consideration_share=1.0)
    found = {}
    for batch in ArrowReader(plan, encoder).batches(period):
        values, mask = batch.supervised("fm/click")
        found |= dict(zip(batch.example_id.tolist(), zip(values.tolist(), mask.tolist(), strict=True), strict=True))
    return found


def test_students_train_with_bulk_labels_and_near_line_ones_of_a_recorded_version(tmp_path):
    pipeline = opened(tmp_path, {})
    train(pipeline, "fm")
    label(pipeline, PERIODS[1])  # nobody has posted yet
    ids = considered(pipeline, PERIODS[2])
    first = post(pipeline, PERIODS[2], ids[:4], 0.75)
    label(pipeline, PERIODS[2])
    post(pipeline, PERIODS[2], ids[4:], 0.5)  # too late for this period
    tickets = [pipeline.tickets.get("labelled", "fm", period) for period in PERIODS[1:]]
    assert [ticket["near_line"] for ticket in tickets if ticket] == [None, first]

    found = supervision(pipeline, "students", PERIODS[2])
    assert found == supervision(pipeline, "others", PERIODS[2]), "all students read the same labels, bit by bit"
    shown = ids_of(pipeline, PERIODS[2], "impression")
    assert all(found[example][1] for example in shown)
    others = {example: entry for example, entry in found.items() if example not in shown}
    assert len(others) == 20
    assert {example: entry for example, entry in others.items() if entry[1]} == dict.fromkeys(ids[:4], (0.75, True))
    earlier = supervision(pipeline, "students", PERIODS[1])
    assert {example for example, (_, mask) in earlier.items() if mask} == ids_of(pipeline, PERIODS[1], "impression")

    pipeline.records.events()
    lines = [json.loads(line) for line in (pipeline.run_dir / "progress.jsonl").read_text().splitlines()]
    recorded = {line["period"]: line["near_line"] for line in lines if line["event"] == "labelled"}
    assert recorded == {PERIODS[1]: None, PERIODS[2]: first}


def test_training_sees_them(tmp_path):
    """One teacher, and its student with and without: weights differ only where something was posted and is read."""
    base = tmp_path / "base"
    base.mkdir()
    trained = opened(base, None)
    train(trained, "fm")
    trained.metadata.close()

    def weights(near_line: dict[str, Any] | None, posts: bool) -> np.ndarray:
        folder = tmp_path / f"{near_line}-{posts}"
        shutil.copytree(base, folder)
        pipeline = opened(folder, near_line, resume=True, log=base / "log")
        if posts:
            post(pipeline, PERIODS[2], considered(pipeline, PERIODS[2]), 0.99)
        label(pipeline)
        train(pipeline, "others")
        key = next(spec.learners[0].key for spec in pipeline.student_specs if spec.name == "others")
        tensors = pipeline.snapshots.load(key, pipeline.snapshots.versions(key)[-1])
        return np.concatenate([tensors[name].numpy().ravel() for name in sorted(tensors)])

    plain = weights(None, posts=True)
    assert (weights({}, posts=False) == plain).all()
    assert (weights({}, posts=True) != plain).any()


def test_without_it_tickets_say_nothing_of_it(tmp_path):
    pipeline = opened(tmp_path, None)
    train(pipeline, "fm")
    post(pipeline, PERIODS[2], considered(pipeline, PERIODS[2]), 0.75)
    label(pipeline)
    ticket = pipeline.tickets.get("labelled", "fm", PERIODS[2])
    assert ticket is not None
    assert "near_line" not in ticket
    (spec,) = (spec for spec in pipeline.student_specs if spec.name == "others")
    assert pipeline.coordinator(spec).wait_labels(PERIODS[2])["fm"].near_line is None


def test_a_stated_version_is_taken_from_then_on(tmp_path):
    pipeline = opened(tmp_path, {"table_version": 1})
    with pytest.raises(LabelError, match=r"no version 1 of near-line labels \(nothing was labelled near-line yet\)"):
        label(pipeline)  # at once: not after the teacher was trained
    train(pipeline, "fm")
    first = post(pipeline, PERIODS[1], considered(pipeline, PERIODS[1])[:1], 0.5)
    post(pipeline, PERIODS[1], considered(pipeline, PERIODS[1])[1:], 0.5)
    pipeline.metadata.close()
    resumed = opened(tmp_path, {"table_version": first}, resume=True)
    label(resumed, PERIODS[1])
    resumed.metadata.close()
    again = opened(tmp_path, {}, resume=True)
    label(again)
    tickets = [again.tickets.get("labelled", "fm", period) for period in PERIODS[1:]]
    assert [ticket["near_line"] for ticket in tickets if ticket] == [first, first + 1]


@pytest.mark.parametrize("given", [{"table_version": -1}, {"version": 3}])
def test_what_is_no_table_version_is_refused_with_the_config(tmp_path, given):
    plain = small_pipeline(tmp_path).dump()
    with pytest.raises(ConfigError, match=r"teachers\.fm\.near_line\.(table_version|version)"):
        validate(PipelineConfig, merged(plain, {"teachers": {"fm": {"near_line": given}}}), "here")
