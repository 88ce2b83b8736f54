"""Publishing the learners of a worker group: each rank writes its slices, rank 0 checks the export and commits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rayfm.data.batch import Batch
from rayfm.export.calibration import Fits
from rayfm.export.calibrator import Calibrator
from rayfm.export.served import CALIBRATOR_PREFIX
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.manifest import FileRecord, version_id
from rayfm.snapshots.promotion import GUARDED
from rayfm.snapshots.publish import SnapshotWriter, TensorSlice
from rayfm.training.export_check import CHECKED_ROWS, check_draft, first_step, trained_rows
from rayfm.training.ids import Vocabularies
from rayfm.training.learner import Learner
from rayfm.training.reading import Reading
from rayfm.training.spec import TrainerSpec


class Publisher:
    """Publishes what one worker group has trained. Its calls are collective.

    Args:
        learners: the group's models.
        reading: reads the rows that an export is checked on.
        ids: the vocabularies, which are published with what reads through them.
        agree: has rank 0 answer and tells every rank.
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        reading: Reading,
        ids: Vocabularies,
        agree: Callable[[Callable[[], list[str]]], list[str]],
    ) -> None:
        self.learners, self.reading, self.ids, self._agree = learners, reading, ids, agree
        self.rank, self.world = reading.rank, reading.world

    def publish(
        self, spec: TrainerSpec, period: str, steps_done: dict[str, int], fits: dict[str, Fits]
    ) -> dict[str, str]:
        """Publish every learner as trained through a period, unless it is published already.

        Args:
            spec: the trainer's.
            period: the last that they have trained on.
            steps_done: learner -> steps that it has made.
            fits: learner -> its calibrator.

        Returns:
            Learner -> version.
        """
        keys = [learner.config.key for learner in self.learners]
        versions = {key: version_id(period, f"{key}/{steps_done[key]}") for key in keys}
        # What a run that stopped right after publishing left is these very weights, perhaps in other slices.
        store = SnapshotStore(spec.run_dir)
        missing = self._agree(lambda: [key for key in keys if versions[key] not in store.versions(key)])
        batch = self._rows_to_check(spec, period) if missing else None
        for learner in self.learners:
            key = learner.config.key
            if key in missing:
                self._publish(spec, learner, versions[key], period, batch, fits.get(key, {}))
        return versions

    def _rows_to_check(self, spec: TrainerSpec, period: str) -> Batch | None:
        """The period's first rows, the same on every rank; None where exports are not checked."""
        if spec.role != "students" or spec.export_tolerance is None:
            return None
        lanes = self.reading.store.manifest(period).lanes
        plan, encoder = self.reading.plan(spec, period, (), {}, max(1, CHECKED_ROWS // lanes) * lanes, 0.0)
        return first_step(plan, encoder, period)

    def _publish(
        self, spec: TrainerSpec, learner: Learner, version: str, period: str, batch: Batch | None, fits: Fits
    ) -> None:
        config = learner.config
        writer = SnapshotWriter(Path(spec.run_dir), config.key, version)
        slices = list(learner.slices())
        if self.rank == 0 and (config.calibrate or config.logit_shift):
            slices += calibrator_slices(spec, learner, fits)
        if self.rank == 0:
            slices += self.ids.slices(config.model.features)
        mine = writer.write(self.rank, slices)
        files: list[Any] = [mine]
        if self.world > 1:
            files = [None] * self.world
            dist.all_gather_object(files, mine)
        rows = trained_rows(learner, batch) if batch is not None else None
        if self.rank == 0:
            meta: dict[str, Any] = {
                "trained_through": period,
                "config": config.model.dump(),
                "example_schema": spec.schema_.dump(),
                "tasks": config.tasks,
            }
            if spec.guarded:
                meta["extra"] = {GUARDED: True}
            others: dict[str, FileRecord] = {}
            if rows is not None and spec.export_tolerance is not None:
                check, others = check_draft(writer, writer.draft(files, **meta), learner, rows, spec.export_tolerance)
                meta["check"] = check
            writer.commit(files, others, **meta)
        if self.world > 1:
            dist.barrier()


def calibrator_slices(spec: TrainerSpec, learner: Learner, fits: Fits) -> list[TensorSlice]:
    """The learner's calibrator as tensors of its snapshot: the identity for a task that has no fit yet."""
    calibrator = Calibrator(spec.schema_, learner.config.tasks)
    added = learner.config.logit_shift
    for task in learner.config.tasks:
        if spec.schema_.task(task).kind == "binary":
            scale, shift = fits.get(task, (1.0, 0.0))
            calibrator.set(task, scale, shift + added)
    return [TensorSlice.whole(CALIBRATOR_PREFIX + name, value) for name, value in calibrator.state_dict().items()]
