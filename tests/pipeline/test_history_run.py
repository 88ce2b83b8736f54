"""A student that reads its teacher's history (LoopFM): the config, the plan, and a whole run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_pipeline import PERIODS, mapping, merged, small_pipeline

from rayfm.config import ConfigError, validate
from rayfm.labels.history import HistoryStore
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.here import run_here
from rayfm.pipeline.plan import histories, periods_to_label, representation_widths, student_specs
from rayfm.pipeline.stream import Pipeline
from rayfm.serving.labelling import history_spec
from rayfm.serving.requests import conform_rows
from rayfm.serving.teacher import load_version, score_table

HISTORY = {"teacher": "fm", "key": "user"}
NAME = "history/fm/user"


def changes(*read: dict[str, Any], store: bool = True) -> dict[str, Any]:
    vm = {"model": {"histories": list(read)}, "variants": {"none": [], "direct": []}}
    return {"students": {"vm": vm}, "teachers": {"fm": {"store_representation": store}}}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (changes(HISTORY, store=False), "made of representations that are not stored; set teachers.fm.store_repr"),
        (changes({**HISTORY, "teacher": "fmm"}), "vm: history/fmm/user: there is no teacher 'fmm'; did you mean 'fm'?"),
        (changes({**HISTORY, "key": "users"}), "vm: history/fm/users: key 'users' is no sparse feature; did you mean"),
        (changes({**HISTORY, "decay": 0}), "students.vm.model"),
        (
            merged(changes(HISTORY), {"students": {"other": {"model": {"type": "fm", "histories": [
                {**HISTORY, "decay": 0.5}]}}}}),
            "other: history/fm/user differs from that of 'vm'",
        ),
        (
            merged(changes(), {"teachers": {"fm": {"model": {"histories": [HISTORY]}}}}),
            "fm: 'histories' are for students",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_config(tmp_path, changed, expected):
    with pytest.raises(ConfigError) as raised:
        validate(PipelineConfig, merged(mapping(tmp_path), changed), "here")
    assert expected in str(raised.value)


def test_the_plan_labels_what_a_history_needs(tmp_path):
    config = small_pipeline(tmp_path, **changes(HISTORY))
    (history,) = histories(config)
    assert history.width == representation_widths(config)["fm"]
    assert periods_to_label(config, PERIODS, "fm") == PERIODS[1:]
    (spec,) = student_specs(config, PERIODS)
    assert spec.teachers == ("fm",)
    assert [learner.model.histories[0].width for learner in spec.learners] == [history.width] * 2


def test_a_drawn_student_alone_has_its_labels_made(tmp_path):
    drawn = {"none": [], "direct": [], "drawn": [{"type": "representation", "teacher": "fm"}]}
    config = small_pipeline(
        tmp_path, teachers={"fm": {"store_representation": True}}, students={"vm": {"variants": drawn}}
    )
    assert periods_to_label(config, PERIODS, "fm") == PERIODS[1:]


@pytest.mark.ray
def test_a_run_predicts_trains_and_serves_with_it(tmp_path, ray_session):
    config = small_pipeline(tmp_path, **changes(HISTORY))
    Pipeline(config).prepare()
    pipeline = run_here(config)
    spec = history_spec(histories(config)[0])
    width = spec.width
    store = HistoryStore(pipeline.run_dir)
    assert len(store.read(spec, PERIODS[1]).keys) == 0  # nothing was labelled before
    state = store.read(spec, PERIODS[2])
    assert len(state.keys) > 3
    assert np.isfinite(state.vector).all()

    key = student_specs(config, PERIODS)[0].learners[0].key
    versions = pipeline.snapshots.versions(key)
    loaded = load_version(pipeline.snapshots, key, versions[-1])
    projections = [p for name, p in loaded.model.named_parameters() if "projections_ER" in name]
    assert [tuple(p.shape) for p in projections] == [(4, width), (4, width)]
    # The linear weights start at zero: what is not zero was learned, so training saw histories.
    assert sum(float(p.abs().sum() > 0) for p in projections) == 2

    lane = pipeline.store.open_lane(PERIODS[2], "impression", 0).read()
    known = np.array([user in set(state.keys.to_pylist()) for user in lane["user"].to_pylist()])
    assert known.sum() > 0
    values = np.random.default_rng(0).normal(size=(len(lane), width)).tolist()
    given = pa.array(values, pa.list_(pa.float64()))
    without = score_table(loaded, conform_rows(loaded.encoder, lane))
    with_one = score_table(loaded, conform_rows(loaded.encoder, lane.append_column(NAME, given)))
    assert (without["click"].to_numpy() != with_one["click"].to_numpy()).any()
    nowhere = pa.array([None] * len(lane), pa.list_(pa.float32(), width))
    absent = score_table(loaded, conform_rows(loaded.encoder, lane.append_column(NAME, nowhere)))
    assert absent.equals(without)
