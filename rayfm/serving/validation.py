"""The guard's figures: a published version and its predecessor, in the form that answers, scored on one period.

Both are read back from their files, calibrators and vocabularies included, so that what is judged is what would be
served. Neither was trained on the period, so it is the honest metric of progressive validation for both; whether the
trainer has gone on to train on it meanwhile changes nothing, as snapshots are immutable.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

import numpy as np
import torch

from rayfm.config import LabelError, SnapshotError
from rayfm.data.batch import IMPRESSION
from rayfm.data.encode import Encoder
from rayfm.data.reader import ArrowReader
from rayfm.data.steps import ReadPlan, RepresentationLookup
from rayfm.data.store import ExampleStore
from rayfm.labels.columns import has_seen
from rayfm.metrics import MetricState, TaskKind
from rayfm.metrics.pool import metric_values
from rayfm.operations.promotion import PromotionConfig, Verdict, judge
from rayfm.schema import Schema
from rayfm.serving.teacher import load_version
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.promotion import GUARD, Promotion, decide, now

SCORED_ROWS = 4096
"""Rows of one forward."""

Representations = Callable[[str], tuple[RepresentationLookup, ...]]
"""Period -> look-ups of the histories that a model reads."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A model whose versions are guarded.

    Args:
        root: folder that holds ``snapshots/``.
        examples: root of the example store.
        model: its key.
        config: the rules.
        traffics: whose rows it is scored on; none named: all.
    """

    root: str
    examples: str
    model: str
    config: PromotionConfig
    traffics: tuple[str, ...] = ()

    def first(self, version: str) -> tuple[Promotion, bool]:
        """Promote a version that there is none to compare with. Returns as `rayfm.snapshots.promotion.decide`."""
        folder = SnapshotStore(self.root).folder(self.model, version)
        reason = "there is no older version to compare it with"
        return decide(folder, Promotion(decision="promoted", by=GUARD, reason=reason, at=now()))

    def predecessors(self, version: str) -> list[str]:
        """The older versions that were promoted, or were never guarded, newest first."""
        return [other for other in reversed(SnapshotStore(self.root).takeable(self.model)) if other < version]

    def compare(
        self, version: str, period: str, representations: Representations | None = None
    ) -> tuple[Promotion, bool]:
        """Score a version and its predecessor on ``period`` and decide, unless that was decided.

        A version that cannot be loaded is refused; a predecessor that cannot gives its place to the one before it.
        Returns as `rayfm.snapshots.promotion.decide`.

        Raises:
            LabelError: the version was trained on the period.
            DataError: the period cannot be read.
        """
        store = SnapshotStore(self.root)
        standing = store.promotion(self.model, version)
        if standing is not None:
            return standing, False
        manifest = store.manifest(self.model, version)
        if has_seen(manifest.trained_through, period):
            raise LabelError(
                f"{self.model}@{version} was trained through {manifest.trained_through}: {period} says nothing of it"
            )
        for before in self.predecessors(version):
            try:
                old, old_rows = self.score(before, period, representations)
            except SnapshotError as error:
                log.warning("%s@%s cannot be compared with %s: %s", self.model, version, before, error)
                continue
            break
        else:
            return self.first(version)
        try:
            new, rows = self.score(version, period, representations)
        except SnapshotError as error:
            verdict, rows = Verdict(False, f"it cannot be loaded: {error}", ()), old_rows
        else:
            schema = Schema.model_validate(manifest.example_schema)
            verdict = judge(self.config.rules, {task: schema.task(task).kind for task in manifest.tasks}, new, old)
        return decide(
            store.folder(self.model, version),
            Promotion(
                decision="promoted" if verdict.promoted else "refused",
                by=GUARD,
                reason=verdict.reason,
                at=now(),
                predecessor=before,
                period=period,
                rows=rows,
                figures=verdict.figures,
            ),
        )

    def score(
        self, version: str, period: str, representations: Representations | None = None
    ) -> tuple[dict[tuple[str, str], float], int]:
        """Metrics of a version on a period's impressions: (task, metric) -> value, and how many rows were scored.

        Raises:
            SnapshotError: the version cannot be loaded; DataError: the period cannot be read.
        """
        store, examples = SnapshotStore(self.root), ExampleStore(self.examples)
        loaded = load_version(store, self.model, version)
        schema, served = loaded.encoder.schema, loaded.encoder
        names = served.representations
        encoder = Encoder(schema, served.features, representations=names, vocabularies=served.vocabularies)
        lookups = representations(period) if representations is not None and names else ()
        lanes = examples.manifest(period).lanes
        size = max(1, SCORED_ROWS // lanes) * lanes
        columns = (*encoder.columns, "user_id", "sampling_weight")
        plan = ReadPlan(examples, columns, size, representations=names, representation_lookups=lookups)
        kinds: list[tuple[str, TaskKind]] = [(task, schema.task(task).kind) for task in loaded.tasks]
        state = MetricState(kinds, schema.traffics, replicates=0)
        own = torch.tensor([schema.traffics.index(name) for name in self.traffics])
        rows = 0
        with torch.inference_mode():
            for batch in ArrowReader(plan, encoder).batches(period):
                logits = loaded.model.logits(batch)
                shown = batch.kind == IMPRESSION
                if self.traffics:
                    shown &= torch.isin(batch.traffic, own)
                for task, _ in kinds:
                    label, known = batch.label(task)
                    arguments = (batch.weight, batch.traffic, batch.user)
                    state.update(task, IMPRESSION, logits[task], label, known & shown, *arguments)
                rows += int(shown.sum())
                if self.config.rows is not None and rows >= self.config.rows:
                    break
        return values_of(state), rows


def values_of(state: MetricState) -> dict[tuple[str, str], float]:
    """(task, metric) -> value, of the impressions that were scored; a task without a labelled row is left out."""
    found: dict[tuple[str, str], float] = {}
    for task, kind in state.tasks.items():
        cell = state.cell(IMPRESSION, task)
        sums, histogram = cell.sums.numpy().sum(0), cell.histogram.numpy().sum(0)
        if sums[0] > 0:
            values = metric_values(kind, sums, histogram, np.float64(math.nan))
            found |= {(task, metric): float(value) for metric, value in values.items() if metric != "ne_train"}
    return found
