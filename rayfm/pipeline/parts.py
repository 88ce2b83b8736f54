"""The parts of the main job one by one, as functions: what the command line's single commands do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayfm.config import ConfigError, RayfmError, nearest
from rayfm.data.batch import CONSIDERATION, IMPRESSION
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader
from rayfm.data.steps import ReadPlan
from rayfm.data.store import PeriodManifest
from rayfm.labels.columns import has_seen
from rayfm.metrics import IMPRESSION_REFERENCE, MetricState, bootstrap_weights, lines
from rayfm.pipeline.config import PipelineConfig, load_config
from rayfm.pipeline.promotion import Guard
from rayfm.pipeline.session import ray_session
from rayfm.pipeline.stream import Pipeline
from rayfm.schema import LOGGED_PREFIX, Schema
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.manifest import SnapshotManifest

WAIT_S = 1.0
"""A single command does not wait for what another one makes: it says what is missing."""


def _known(wanted: list[str] | None, known: list[str], what: str) -> list[str]:
    for name in wanted or []:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}{nearest(name, known)}")
    return wanted or known


def prepare(config: PipelineConfig) -> list[PeriodManifest]:
    """Bring the schedule's periods into the example store. Periods that stand already are kept.

    Raises:
        DataError: the logs are missing or wrong; CapacityError: too little disk.
    """
    pipeline = Pipeline(config)
    with ray_session(config.ray):
        pipeline.prepare()
    return [pipeline.store.manifest(period) for period in pipeline.periods]


def train(config: PipelineConfig, trainers: list[str] | None = None) -> dict[str, list[str]]:
    """Train teachers (by default), or groups of students whose labels stand, through all periods.

    Training goes on where it stopped. Returns trainer -> newest versions.

    Raises:
        RayfmError: a period is not prepared, a label is missing, or training failed.
    """
    pipeline = Pipeline(config)
    teachers = [spec.name for spec in pipeline.teacher_specs]
    names = _known(trainers, [spec.name for spec in pipeline.specs], "trainer") if trainers else teachers
    if not names:
        raise ConfigError("the config has no teachers; name a group of students with --trainer")
    pipeline.open(resume=True, overwrite=False)
    newest: dict[str, list[str]] = {}
    with ray_session(config.ray):
        for spec in pipeline.specs:
            if spec.name not in names:
                continue
            coordinator = pipeline.coordinator(spec, prepare_timeout=0.0, alone=True)
            pipeline.train(spec, coordinator)
            if spec.guarded:
                Guard(pipeline).watch(spec, wait=False)
            newest[spec.name] = [f"{learner.key}@{pipeline.snapshots.latest(learner.key)}" for learner in spec.learners]
    return newest


def label(
    config: PipelineConfig, teachers: list[str] | None = None, periods: list[str] | None = None
) -> list[dict[str, Any]]:
    """Label prepared periods with published teachers, each with the snapshot trained through the period before.

    Periods labelled already are left alone. Returns the tickets of all that is labelled.

    Raises:
        RayfmError: no snapshot fits a period, or the label store refuses.
    """
    pipeline = Pipeline(config)
    names = _known(teachers, list(config.teachers), "teacher")
    wanted = tuple(_known(periods, list(pipeline.periods), "period"))
    if periods and pipeline.periods[0] in periods:
        raise ConfigError(f"period {pipeline.periods[0]} is the first: no teacher can have been trained before it")
    pipeline.open(resume=True, overwrite=False)
    with ray_session(config.ray):
        for name in names:
            pipeline.serve_and_label(name, wanted, WAIT_S)
    found = [pipeline.tickets.get("labelled", name, period) for name in names for period in wanted]
    return [ticket for ticket in found if ticket is not None]


def evaluate(
    config: PipelineConfig, model: str, periods: tuple[str, ...], version: str | None = None
) -> list[dict[str, Any]]:
    """Score a published version on prepared periods, in this process: metrics lines as in ``metrics.jsonl``.

    Considerations are scored against the model's ``reference`` where that is a logged prediction.

    Raises:
        SnapshotError: no such version; DataError: a period is not prepared; ConfigError: the version saw a period.
    """
    from rayfm.serving.teacher import load_version

    pipeline = Pipeline(config)
    store = SnapshotStore(config.run_dir)
    _known([model], store.models(), "published model")
    chosen = version or store.latest(model)
    if chosen is None:
        raise RayfmError(f"{model} has no published version; run `rayfm train`")
    loaded = load_version(store, model, chosen)
    name, variant, seed = model.rsplit(".", 2)
    part = config.students.get(name) or config.teachers.get(name)
    reference = part.reference if part is not None else {}
    schema = Schema.model_validate(store.manifest(model, chosen).example_schema)
    tasks = [(task.name, task.kind) for task in schema.tasks if task.name in loaded.tasks]
    columns = tuple(dict.fromkeys(c for c in reference.values() if c.startswith(LOGGED_PREFIX)))
    encoder = Encoder(schema, loaded.encoder.features, columns, vocabularies=loaded.encoder.vocabularies)
    rows: list[dict[str, Any]] = []
    for period in periods:
        if has_seen(loaded.trained_through, period):
            raise ConfigError(
                f"{model}@{chosen} was trained through {loaded.trained_through}: scoring {period} would flatter it; "
                "choose an earlier version (rayfm snapshots list) or a later period"
            )
        lanes = pipeline.store.manifest(period).lanes
        plan = ReadPlan(
            pipeline.store,
            (*encoder.columns, "user_id", "sampling_weight", *columns),
            max(1, 4096 // lanes) * lanes,
            columns,
            consideration_share=config.evaluation.consideration_share if columns else 0.0,
        )
        state = MetricState(tasks, schema.traffics, replicates=config.evaluation.replicates)
        for batch in ArrowReader(plan, encoder).batches(period):
            logits = loaded.model.logits(batch)
            copies = bootstrap_weights(batch.user, state.replicates) if state.replicates else None
            for task, _ in tasks:
                label_, known = batch.label(task)
                shown = known & (batch.kind == IMPRESSION)
                arguments = (batch.weight, batch.traffic, batch.user, copies)
                state.update(task, IMPRESSION, logits[task], label_, shown, *arguments)
                if reference.get(task) in columns:
                    value, found = batch.supervised(reference[task])
                    for scored, kind in ((CONSIDERATION, CONSIDERATION), (IMPRESSION_REFERENCE, IMPRESSION)):
                        state.update(task, scored, logits[task], value, found & (batch.kind == kind), *arguments)
        rows += lines(state, period, name, variant, int(seed))
    return rows


def write_report(run_dir: str | Path) -> tuple[dict[str, Any], Path]:
    """Summary and report of a run from what it left.

    Raises:
        ConfigError: the folder holds no run.
    """
    pipeline = Pipeline(load_config(Path(run_dir) / "config.yaml"))
    return pipeline.finish()


def snapshot_manifest(run_dir: str | Path, model: str, version: str | None = None) -> SnapshotManifest:
    """The manifest of a version, by default the newest."""
    store = SnapshotStore(run_dir)
    _known([model], store.models(), "published model")
    return store.manifest(model, version or store.latest(model) or "")


def verify_snapshots(run_dir: str | Path) -> int:
    """Check every version's files; returns how many versions there are.

    Raises:
        SnapshotError: naming the first file that differs.
    """
    store = SnapshotStore(run_dir)
    count = 0
    for model in store.models():
        for version in store.versions(model):
            store.verify(model, version)
            count += 1
    return count
