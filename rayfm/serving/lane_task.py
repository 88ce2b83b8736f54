"""A Ray Data task that scores lanes and writes their labels. Imports no torch: a task's process would spend seconds on
it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.config import CapacityError, DataError, LabelError, RayfmError, errors
from rayfm.data.store import ExampleStore
from rayfm.labels.lane_file import write_lane_file
from rayfm.labels.storage import Storage
from rayfm.schema import EXAMPLE_ID, Kind, Task
from rayfm.serving.gang.errors import GangBroken

IN_FLIGHT = 2
"""Requests that a task keeps at the service, so that reading and scoring overlap."""

ASK_AGAIN_S = (0.1, 1.0, 5.0, 15.0)
"""Pauses before a request whose replica died is sent again."""


def _requests(path: str, columns: list[str], rows: int) -> Iterator[pa.Table]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(rows, columns=columns):
            yield pa.Table.from_batches([batch])
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: corrupt or missing Parquet file ({error}); prepare its period again") from None


def score_lane(
    handle: Any, path: str, columns: list[str], rows: int, version: str, representation: bool = False
) -> pa.Table:
    """Predictions for every row of a lane file: ``example_id``, a column per task, the ``representation`` if asked for.

    Raises:
        LabelError: the service answered with another version.
        DataError: the file cannot be read.
        CapacityError: the service's replicas died again and again.
    """
    parts: list[pa.Table] = []
    waiting: list[tuple[pa.Table, Any]] = []

    def collect() -> None:
        request, response = waiting.pop(0)
        answered, predictions = _result(response, lambda: ask(request))
        if answered != version:
            raise LabelError(f"{path}: asked {version}, the service answered with {answered}")
        parts.append(predictions.add_column(0, EXAMPLE_ID, request[EXAMPLE_ID]))

    def ask(request: pa.Table) -> Any:
        return handle.score.remote(*((request, version, True) if representation else (request, version)))

    for request in _requests(path, columns, rows):
        waiting.append((request, ask(request)))
        if len(waiting) >= IN_FLIGHT:
            collect()
    while waiting:
        collect()
    return pa.concat_tables(parts)


def _result(response: Any, ask_again: Callable[[], Any]) -> tuple[str, pa.Table]:
    """What the service answers. A replica that dies, or a gang that breaks, takes its requests with it; Ray Serve
    leaves it to the caller to ask again, which scoring allows: it changes nothing.

    Raises:
        CapacityError: several replicas in a row died, or none came back.
    """
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError

    for pause_s in (*ASK_AGAIN_S, None):
        try:
            found: tuple[str, pa.Table] = response.result()
            return found
        except (RayActorError, DeploymentUnavailableError, GangBroken) as error:
            if pause_s is None:
                raise CapacityError(
                    f"the teacher's service was asked {len(ASK_AGAIN_S) + 1} times, and its replica died each time "
                    f"({str(error).splitlines()[0]}); look at its log, give it more memory, and label again"
                ) from None
        time.sleep(pause_s)
        response = ask_again()
    raise AssertionError("unreachable")


@dataclasses.dataclass(frozen=True)
class LaneTask:
    """Scores lanes of one period with one version, and writes their data files.

    Attributes:
        store, storage: where the lanes lie, and where their labels go.
        handle: the teacher service's handle, or a `TeacherHere`.
        teacher, version, trained_through: whose labels they are.
        period: of the lanes.
        columns: of the example store, that the teacher reads.
        tasks: what is labelled.
        rows_per_request: rows of one call to the service.
        store_representation: whether the teacher's representation is stored beside its predictions.
    """

    store: ExampleStore
    storage: Storage
    handle: Any
    teacher: str
    version: str
    trained_through: str | None
    period: str
    columns: tuple[str, ...]
    tasks: tuple[Task, ...]
    rows_per_request: int
    store_representation: bool

    def __call__(self, block: pa.Table) -> pa.Table:
        """Records of the lanes that a block of one row names (``kinds`` and ``lanes``), or why they are refused."""
        kinds, numbers = (block[name].to_pylist()[0] for name in ("kinds", "lanes"))
        try:
            records = self.write(list(zip(kinds, numbers, strict=True)))
        except RayfmError as error:
            # As a row, since Ray Data keeps neither type nor message of what a task raises. What a replica raised
            # comes wrapped in Ray's own.
            own = getattr(error, "cause", error)
            return pa.table({"record": pa.nulls(1, pa.string()), "refused": [type(own).__name__], "why": [str(own)]})
        none = pa.nulls(len(records), pa.string())
        return pa.table({"record": pa.array(records, pa.string()), "refused": none, "why": none})

    def write(self, lanes: Sequence[tuple[Kind, int]]) -> list[str]:
        """Score lanes and write their data files, which no reader sees before they are committed.

        Returns:
            A `LaneRecord` as JSON for each.

        Raises:
            LabelError, DataError, CapacityError: as `score_lane`.
        """
        records = []
        for kind, lane in lanes:
            path = str(self.store.lane_path(self.period, kind, lane))
            labels = score_lane(
                self.handle, path, list(self.columns), self.rows_per_request, self.version, self.store_representation
            )
            record = write_lane_file(
                self.storage,
                teacher=self.teacher,
                version=self.version,
                trained_through=self.trained_through,
                period=self.period,
                kind=kind,
                lane=lane,
                labels=labels,
                tasks=self.tasks,
            )
            records.append(record.model_dump_json())
        return records


def raise_refused(row: dict[str, Any]) -> None:
    """Raise, as itself, the error that a row of `LaneTask`'s output stands for; nothing where it is a record."""
    if row["refused"] is not None:
        raise getattr(errors, row["refused"], RayfmError)(row["why"])
