"""Work items of Algorithm 1: some features on one lane of one kind, scored in one process and written to a file.

An item's file stands whole or not at all, and its numbers depend on the item alone: a job that was killed goes on with
the items that have none.

Shape letters: F features, N batches, S shuffles, B rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from rayfm.config import CapacityError, DataError, RayfmError
from rayfm.config.durable import write_whole
from rayfm.data.batch import CONSIDERATION, IMPRESSION, Batch
from rayfm.data.encode import Encoder
from rayfm.data.steps import LaneCache, Lookup, ReadPlan
from rayfm.data.store import ExampleStore
from rayfm.data.task_errors import error_block
from rayfm.distill.losses import task_loss
from rayfm.export.served import export_model
from rayfm.models.base import MODELS, ModelConfig, ModelOutput
from rayfm.schema import EXAMPLE_ID, Kind, Schema, Task
from rayfm.selection.importance import Float64, Importance, Int64, batch_bounds, loss_changes, shuffle_orders, summarise
from rayfm.selection.replay import Replay, replayable
from rayfm.selection.shuffle import shuffled
from rayfm.snapshots.ids import load_vocabularies
from rayfm.snapshots.load import SnapshotStore


@dataclasses.dataclass(frozen=True)
class Item:
    """Some features on one lane of one kind."""

    period: str
    kind: Kind
    lane: int
    features: tuple[str, ...]
    block: int
    """Position of the features among the blocks that the candidates are cut into."""

    def path(self, folder: Path) -> Path:
        """Its file."""
        return folder / f"{self.period}.{self.kind}.{self.lane}.{self.block}.npz"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What all items share; travels to the workers."""

    store: ExampleStore
    root: str
    """Folder that holds ``snapshots/``."""
    model: str
    version: str
    teacher: str
    lookups: dict[str, Lookup]
    """Period -> the teacher's labels: columns ``<teacher>/<task>``."""
    batch_size: int
    batches_per_lane: int | None
    shuffles: int
    seed: int
    folder: Path
    """Where items' files go."""


def work_items(
    store: ExampleStore, periods: Sequence[str], features: tuple[str, ...], features_per_item: int
) -> list[Item]:
    """Every lane of both kinds that has rows, times the blocks of features."""
    blocks = [features[start : start + features_per_item] for start in range(0, len(features), features_per_item)]
    kinds: tuple[Kind, ...] = ("impression", "consideration")
    found = []
    for period in periods:
        manifest = store.manifest(period)
        for kind in kinds:
            for lane in range(manifest.lanes):
                if manifest.lane_rows(kind, lane):
                    found += [Item(period, kind, lane, names, block) for block, names in enumerate(blocks)]
    return found


def batch_loss(tasks: Sequence[Task], output: ModelOutput, batch: Batch, teacher: str | None) -> tuple[float, float]:
    """(loss, weight) of a batch: the mean over its rows of each task's loss, summed with the tasks' weights as in
    training; 0 for a task that no row has a label of.

    Args:
        tasks: what is predicted.
        output: the model's.
        batch: the rows.
        teacher: whose predictions are the labels; None: the true ones are.
    """
    total = known = 0.0
    for task in tasks:
        label, mask = batch.label(task.name) if teacher is None else batch.supervised(f"{teacher}/{task.name}")
        weight = (batch.weight * mask).double()
        if (mass := float(weight.sum())) > 0:
            # In double precision: a feature may change the loss by less than the last bits of a sum of floats.
            loss = task_loss(task, output.logits[task.name], label).double()
            total += task.weight * float((loss * weight).sum()) / mass
            known += mass
    return total, known


class ItemScorer:
    """Scores items in this process; the model is loaded once, at the first.

    Args:
        measured: what all items share.
    """

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        self._exact: frozenset[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"measured": self.measured, "_exact": None}

    @functools.cached_property
    def _loaded(self) -> tuple[nn.Module, Schema, tuple[Task, ...], Encoder]:
        store = SnapshotStore(self.measured.root)
        manifest = store.manifest(self.measured.model, self.measured.version)
        schema = Schema.model_validate(manifest.example_schema)
        config: ModelConfig = MODELS[manifest.config["type"]].Config.model_validate(manifest.config)
        tensors = store.load(self.measured.model, self.measured.version)
        model = export_model(config, schema, manifest.tasks, tensors).model
        tasks = tuple(schema.task(name) for name in manifest.tasks)
        supervision = tuple(f"{self.measured.teacher}/{task.name}" for task in tasks)
        vocabularies = load_vocabularies(store, self.measured.model, self.measured.version)
        return model, schema, tasks, Encoder(schema, config.features, supervision, vocabularies=vocabularies)

    def score(self, item: Item) -> None:
        """Score an item and write its file, unless it stands.

        Raises:
            DataError: the lane cannot be read; LabelError: its pseudo-labels cannot.
            SnapshotError: the student cannot be loaded.
            CapacityError: the file cannot be written.
        """
        path = item.path(self.measured.folder)
        if path.exists():
            return
        changes_FNS, losses_N, rows = self.measure(item)
        arrays: dict[str, npt.NDArray[Any]] = {"changes": changes_FNS, "losses": losses_N, "rows": np.array(rows)}
        write_whole(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    @torch.inference_mode()
    def measure(self, item: Item) -> tuple[Float64, Float64, int]:
        """Loss changes ``[F, N, S]``, losses as they are ``[N]``, and the rows in the batches.

        Batches in which no row has a label are left out.
        """
        measured = self.measured
        model, _, tasks, encoder = self._loaded
        columns = (*encoder.columns, "sampling_weight")
        cache = LaneCache(ReadPlan(measured.store, columns, measured.batch_size))
        lane_rows = measured.store.manifest(item.period).lane_rows(item.kind, item.lane)
        replay = Replay(model)
        teacher = measured.teacher if item.kind == "consideration" else None
        changes, losses, rows = [], [], 0
        for position, (start, stop) in enumerate(
            batch_bounds(lane_rows, measured.batch_size, measured.batches_per_lane)
        ):
            batch = self._batch(cache, item, start, stop)
            place = (item.period, item.kind, item.lane, position)
            orders_SB = shuffle_orders(measured.seed, place, measured.shuffles, len(batch))
            recorded = replay.record(batch)
            if batch_loss(tasks, recorded, batch, teacher)[1] == 0:
                continue
            loss = functools.partial(self._loss, replay, recorded, batch, teacher)
            original, changes_FS = loss_changes(loss, item.features, orders_SB)
            changes.append(changes_FS)
            losses.append(original)
            rows += len(batch)
        shape = (len(item.features), 0, measured.shuffles)
        return np.stack(changes, axis=1) if changes else np.zeros(shape), np.array(losses), rows

    def _loss(
        self,
        replay: Replay,
        recorded: ModelOutput,
        batch: Batch,
        teacher: str | None,
        feature: str | None,
        order_B: Int64 | None,
    ) -> float:
        """The batch's loss with a feature's rows in an order; None: as it is."""
        model, _, tasks, encoder = self._loaded
        if feature is None or order_B is None:
            return batch_loss(tasks, recorded, batch, teacher)[0]
        order = torch.from_numpy(order_B)
        if feature in self._replayable(batch):
            output = replay.permuted(feature, order)
        else:
            output = model(shuffled(batch, feature, order, tuple(f.name for f in encoder.dense)))
        return batch_loss(tasks, output, batch, teacher)[0]

    def _replayable(self, batch: Batch) -> frozenset[str]:
        """The features that are permuted after the embeddings, found out on the first batch."""
        if self._exact is None:
            model, _, _, encoder = self._loaded
            names = encoder.features or tuple(feature.name for feature in encoder.schema.features)
            self._exact = replayable(model, batch, names, tuple(feature.name for feature in encoder.dense))
        return self._exact

    def _batch(self, cache: LaneCache, item: Item, start: int, stop: int) -> Batch:
        """Rows of a lane, considerations with the teacher's labels."""
        _, _, _, encoder = self._loaded
        table = cache.read(item.period, item.kind, item.lane, start, stop)
        rows = table.num_rows
        values = np.zeros((rows, len(encoder.supervision)), np.float32)
        mask = np.zeros(values.shape, np.bool_)
        if item.kind == "consideration":
            lookup = self.measured.lookups[item.period]
            ids: Int64 = table[EXAMPLE_ID].to_numpy()
            found, known = lookup.rows(item.period, item.kind, item.lane, start, stop, ids)
            order = [lookup.columns.index(name) for name in encoder.supervision]
            values[:], mask[:] = found[:, order], known[:, order]
        kind = np.full(rows, IMPRESSION if item.kind == "impression" else CONSIDERATION, np.int64)
        return encoder.batch(encoder.encode(table, kind, values, mask), 0, rows)


class ScoreItems:
    """A Ray Data actor: blocks of one row, ``item``, name an item by its place; blocks of the same come back.

    Args:
        measured: what all items share.
        items: what the blocks name.
    """

    def __init__(self, measured: Measured, items: list[Item]) -> None:
        self.scorer, self.items = ItemScorer(measured), items

    def __call__(self, block: pa.Table) -> pa.Table:
        """Scores an item; what is refused comes back as an error's block."""
        try:
            for position in block["item"].to_pylist():
                self.scorer.score(self.items[position])
        except RayfmError as error:
            return error_block(error)
        return block


def gather(items: Sequence[Item], folder: Path, features: tuple[str, ...], kind: Kind) -> Importance:
    """The importance on one kind, from the files of its items.

    Raises:
        DataError: a file is missing or cannot be read, or there are fewer than two batches.
    """
    lanes: dict[tuple[str, int], dict[int, dict[str, npt.NDArray[Any]]]] = {}
    for item in items:
        if item.kind == kind:
            lanes.setdefault((item.period, item.lane), {})[item.block] = _read(item.path(folder))
    if not lanes:
        raise DataError(f"the withheld periods have no {kind}s; withhold others, or log them")
    changes, losses, rows = [], [], 0
    for blocks in lanes.values():
        ordered = [blocks[block] for block in sorted(blocks)]
        changes.append(np.concatenate([part["changes"] for part in ordered], axis=0))
        losses.append(ordered[0]["losses"])
        rows += int(ordered[0]["rows"])
    return summarise(features, np.concatenate(changes, axis=1), np.concatenate(losses), rows)


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it and select with --resume") from None


def check_folder(folder: Path) -> None:
    """Raises CapacityError where the items' folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CapacityError(f"cannot make {folder}: {error.strerror}; choose other 'runs'") from None
