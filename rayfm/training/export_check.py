"""The check of an exported student against the one in the workers, before its version stands.

What is checked is read back from the files that were written: slices that were mixed up or lost would show too.
"""

from __future__ import annotations

import dataclasses

import torch

from rayfm.data.batch import Batch
from rayfm.data.encode import Encoder
from rayfm.data.steps import LaneCache, ReadPlan, count_steps, read_steps
from rayfm.export.config import ExportCheck, Tolerance
from rayfm.export.rows import CheckRows, only_inputs
from rayfm.export.student import check_export
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.manifest import FileRecord, SnapshotManifest
from rayfm.snapshots.publish import SnapshotWriter
from rayfm.training.device import full_float32
from rayfm.training.learner import Learner

CHECKED_ROWS = 1024
"""Rows of a period that a version is checked on."""


def first_step(plan: ReadPlan, encoder: Encoder, period: str) -> Batch | None:
    """The first step's rows of all lanes, the same on every rank, and no others read; None in a period without rows."""
    cache = LaneCache(plan)
    manifest = cache.manifest(period)
    if not count_steps(plan, manifest):
        return None
    rows = read_steps(plan, cache, period, range(manifest.lanes), 0, 1)
    return encoder.batch(encoder.encode_steps(rows), 0, len(rows.step))


@torch.no_grad()
def trained_rows(learner: Learner, batch: Batch) -> CheckRows:
    """What the model under training says of ``batch``, in fp32. A collective call: all ranks give the same rows."""
    batch = _with_histories(batch)
    learner.dmp.eval()
    # Not through `predict`, which runs in bf16 where training does: an export is compared with the weights in fp32.
    with full_float32():
        logits = learner.module.model(batch.to(learner.device)).logits
    own = only_inputs(batch, learner.config.model.features, len(batch), learner.config.histories())
    return CheckRows(own, {task: z.float().cpu() for task, z in logits.items()})


def check_draft(
    writer: SnapshotWriter, draft: SnapshotManifest, learner: Learner, rows: CheckRows, tolerance: Tolerance
) -> tuple[ExportCheck, dict[str, FileRecord]]:
    """Check the version that the files of ``draft`` make, and write the rows beside them.

    Returns:
        What the manifest says of it, and the file of the rows.

    Raises:
        SnapshotError: it differs from the trained one; the version is not to be committed.
    """
    tensors = SnapshotStore(writer.root).tensors(draft)
    config, period = learner.config, draft.trained_through or ""
    check = check_export(config.model, learner.schema, config.tasks, tensors, rows, period, tolerance)
    name, record = writer.write_file("check", rows.save)
    return check.model_copy(update={"file": name}), {name: record}


def _with_histories(batch: Batch) -> Batch:
    """The batch with random histories in half of its rows: they are not read where a version is only checked."""
    if batch.representation is None or batch.representation_mask is None:
        return batch
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(batch.representation_mask.shape, generator=generator) < 0.5
    values = torch.randn(batch.representation.shape, generator=generator)
    return dataclasses.replace(batch, representation=values, representation_mask=mask)
