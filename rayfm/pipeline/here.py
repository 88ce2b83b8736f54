"""The main job in one process, part after part: for many small runs side by side, each of which is one Ray task."""

from __future__ import annotations

from rayfm.config import RayfmError
from rayfm.data.prepare import missing_periods
from rayfm.pipeline.config import PipelineConfig
from rayfm.pipeline.plan import periods_to_label, teacher_key
from rayfm.pipeline.promotion import Guard
from rayfm.pipeline.stream import Pipeline
from rayfm.serving.teacher import TeacherHere
from rayfm.training.spec import TrainerSpec
from rayfm.training.trainer import fit_here


def run_here(config: PipelineConfig, check_exports: bool = True) -> Pipeline:
    """Train the teachers, label, train the students; the periods must be prepared. Goes on where it was broken off.

    The loops, the label store and the snapshots are those of a run on Ray; only the worker groups and the teacher
    services are not started. Every trainer has one worker.

    Args:
        config: the pipeline's config.
        check_exports: compare what is published of students in the forms that they are served in; for a run whose
            students nobody serves, that is much of its time.

    Raises:
        RayfmError: a period is not prepared, or a part failed.
    """
    pipeline = Pipeline(config)
    pipeline.open(resume=True, overwrite=False)
    missing = missing_periods(pipeline.source, config.schema_, pipeline.store, config.data.lanes)
    absent = [period for period in pipeline.periods if period in {source.name for source in missing}]
    if absent:
        raise RayfmError(f"{pipeline.store.root}: period {absent[0]} is not prepared; run `rayfm prepare` first")
    for spec in pipeline.teacher_specs:  # each after those that it learns from
        _train(pipeline, spec)
        wanted = periods_to_label(config, pipeline.periods, spec.name)
        if wanted:
            handle = TeacherHere(str(pipeline.run_dir), teacher_key(config, spec.name))
            pipeline.label(spec.name, handle, wanted, timeout=0.0)
    for spec in pipeline.student_specs:
        _train(pipeline, spec if check_exports else spec.model_copy(update={"export_tolerance": None}))
    guard = Guard(pipeline, here=True)
    for spec in guard.specs():
        guard.watch(spec, wait=False)
    return pipeline


def _train(pipeline: Pipeline, spec: TrainerSpec) -> None:
    coordinator = pipeline.coordinator(spec, prepare_timeout=0.0, alone=True)
    fit_here(spec, coordinator, pipeline.label_source(spec.name))
    pipeline.tickets.check()
