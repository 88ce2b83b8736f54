"""What is summed up of the predictions of one period: each learner's metrics, and what its calibrator is fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayfm.data.batch import CONSIDERATION, IMPRESSION, Batch
from rayfm.data.store import write_json_atomic
from rayfm.export.calibration import Fits
from rayfm.metrics import IMPRESSION_REFERENCE, MetricState, TaskKind
from rayfm.training.calibration import Calibration, start_calibrations
from rayfm.training.learner import Learner
from rayfm.training.lost_labels import lose_labels
from rayfm.training.spec import TrainerSpec


class PeriodScores:
    """The sums of one period that no learner has trained on.

    Args:
        spec: the trainer's.
        learners: who predicts.
        tasks: (name, kind) of every task that any of them has.
        period: the one that is predicted.
        rank: this worker's.
    """

    def __init__(
        self,
        spec: TrainerSpec,
        learners: Sequence[Learner],
        tasks: tuple[tuple[str, TaskKind], ...],
        period: str,
        rank: int,
    ) -> None:
        self.spec, self.learners, self.period, self.rank = spec, learners, period, rank
        traffics, replicates = spec.schema_.traffics, spec.replicates
        self.states = {
            learner.config.key: MetricState(tasks, traffics, replicates=replicates) for learner in self.learners
        }
        binary = [name for name, kind in tasks if kind == "binary"]
        asked = {
            learner.key: (learner.calibrate, tuple(task for task in learner.tasks if task in binary))
            for learner in spec.learners
        }
        self.calibrations = start_calibrations(asked, spec.schema_, period, spec.periods, rank)

    def add(self, learner: Learner, batch: Batch, logits: dict[str, torch.Tensor], copies: torch.Tensor | None) -> None:
        """Add what a learner says of a batch, all on the CPU; ``copies``: the batch's bootstrap weights."""
        key = learner.config.key
        self.score(self.states[key], learner, batch, logits, copies)
        if learner.config.calibrate:
            _add_shown(self.calibrations[key], learner, batch, logits)

    def score(
        self,
        state: MetricState,
        learner: Learner,
        batch: Batch,
        logits: dict[str, torch.Tensor],
        copies: torch.Tensor | None,
    ) -> None:
        """Add a batch to one learner's metrics."""
        own = learner.own_rows(batch)
        for task in learner.config.tasks:
            label, known = batch.label(task)
            shown = known & (batch.kind == IMPRESSION)
            if own is not None:
                shown &= own
            state.update(
                task, IMPRESSION, logits[task], label, shown, batch.weight, batch.traffic, batch.user, weights=copies
            )
            column = learner.config.reference.get(task)
            if column is None:
                continue
            value, found = batch.supervised(column)
            # Impressions too: against the next stage both kinds show whether two stages agree (UKDSL 4.1.2).
            for scored, kind in ((CONSIDERATION, CONSIDERATION), (IMPRESSION_REFERENCE, IMPRESSION)):
                rows = found & (batch.kind == kind)
                if own is not None:
                    rows &= own
                arguments = (batch.weight, batch.traffic, batch.user)
                state.update(task, scored, logits[task], value, rows, *arguments, weights=copies)

    def finish(self, rates: dict[str, float], before: dict[str, Fits]) -> dict[str, Fits]:
        """Sum over the ranks and store the metrics (a collective call).

        Args:
            rates: task -> positive rate of what was trained, stored beside them.
            before: each learner's calibrator so far.

        Returns:
            The new calibrator of each learner that has one.
        """
        folder = self.spec.folder / "metrics" / self.period
        for learner in self.learners:
            state = self.states[learner.config.key]
            state.reduce_()
            if self.rank == 0:
                state.save(folder / f"{learner.config.key}.npz")
                write_json_atomic(folder / "rates.json", rates)
        fits = {}
        for key, sums in self.calibrations.items():
            sums.reduce_()
            # The same sums on every rank give the same fit, so that any rank's checkpoint would hold it.
            fits[key] = sums.fit(before.get(key, {}))
        return fits


def _add_shown(calibration: Calibration, learner: Learner, batch: Batch, logits: dict[str, torch.Tensor]) -> None:
    """Add the impressions of the learner's traffics, and the labels that its training sees: without the lost ones."""
    lost, seen = learner.config.lost_labels, batch
    if lost is not None:
        seen = lose_labels(batch, lost, learner.schema)
    shown = batch.kind == IMPRESSION
    own = learner.own_rows(batch)
    calibration.add(batch, logits, shown if own is None else shown & own, seen)
