"""Near-line labels as a student's supervision: they fill what the label store leaves masked."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayfm.config import LabelError
from rayfm.data.steps import Lookup
from rayfm.schema import Kind
from rayfm.serving.nearline.labels import NearLineLabels, PeriodLabels


class FilledLookup:
    """A look-up whose masked cells are filled from one version of the near-line label table, by example id.

    Both sides are one snapshot's labels, so what fills a cell is what the bulk job would have written there. Pickles
    without what it has read; one prefetching thread may use it beside the training thread.

    Args:
        bulk: the label store's look-up.
        root: folder that holds ``nearline/``.
        teacher, version: whose labels ``bulk`` gives.
        tasks: which predictions, in the order of ``bulk.columns``.
        table_version: of the near-line label table.

    Raises:
        LabelError: no such table version.
    """

    def __init__(
        self, bulk: Lookup, root: str | Path, teacher: str, version: str, tasks: tuple[str, ...], table_version: int
    ) -> None:
        self.bulk, self.columns = bulk, bulk.columns
        self.teacher, self.version, self.tasks, self.table_version = teacher, version, tasks, table_version
        self._labels = NearLineLabels(root)
        if self._labels.open(table_version) is None:
            raise LabelError(
                f"{self._labels.folder}: version {table_version} of the near-line labels, which the run recorded, is "
                "gone; put the folder back"
            )
        self._lock = threading.Lock()
        self._period: tuple[str, PeriodLabels] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {"_period": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def rows(
        self, period: str, kind: Kind, lane: int, start: int, stop: int, ids: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """As the bulk look-up's, the masked cells filled where there is a near-line label."""
        values, mask = self.bulk.rows(period, kind, lane, start, stop, ids)
        if mask.all():
            return values, mask
        near = self._of(period).of(ids)
        filled = near.mask & ~mask
        return np.where(filled, near.values, values), mask | filled

    def _of(self, period: str) -> PeriodLabels:
        """The period's labels, read once: reads go through the periods in order."""
        with self._lock:
            if self._period is None or self._period[0] != period:
                found = self._labels.of_period(self.teacher, self.version, period, self.tasks, self.table_version)
                self._period = period, found
            return self._period[1]
