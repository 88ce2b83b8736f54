"""The teacher as a Ray Serve application: rows in, predictions and the version that made them out."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from starlette.requests import Request
from starlette.responses import Response

from rayfm.config import Config, DataError, RayfmError
from rayfm.data.conform import conform
from rayfm.data.encode import EncodedChunk, Encoder
from rayfm.export.served import ServedModel, export_model
from rayfm.labels.columns import REPRESENTATION
from rayfm.models.base import MODELS, ModelConfig
from rayfm.schema import Schema
from rayfm.snapshots.load import SnapshotStore

KEPT_VERSIONS = 2
"""Versions a replica keeps: the one that answers, and the one before for the job that still names it."""


class TeacherServiceConfig(Config):
    """What a replica needs to find its model."""

    root: str
    """Folder that holds ``snapshots/``."""
    model: str
    """The model's key in the snapshot store."""
    threads: int = 1
    predict_rows: int = 4096
    """Rows of one forward."""


@dataclasses.dataclass
class LoadedVersion:
    """A served snapshot and how its inputs are encoded."""

    version: str
    trained_through: str | None
    model: ServedModel
    encoder: Encoder
    tasks: tuple[str, ...]


def load_version(store: SnapshotStore, model: str, version: str) -> LoadedVersion:
    """Load, verify and build a published version for serving.

    Raises:
        SnapshotError: it is not there, or its bytes differ from its manifest.
    """
    manifest = store.manifest(model, version)
    tensors = store.load(model, version)
    schema = Schema.model_validate(manifest.example_schema)
    config: ModelConfig = MODELS[manifest.config["type"]].Config.model_validate(manifest.config)
    served = export_model(config, schema, manifest.tasks, tensors)
    served.eval()
    histories = tuple((history.name, history.width or 0) for history in config.histories)
    encoder = Encoder(schema, config.features, labels=False, representations=histories)
    return LoadedVersion(version, manifest.trained_through, served, encoder, manifest.tasks)


def score_table(
    loaded: LoadedVersion, table: pa.Table, rows_at_once: int = 4096, representation: bool = False
) -> pa.Table:
    """Predictions for a table of examples: one float32 column per task, in the rows' order.

    With ``representation`` also a column of that name: fixed-size lists of the representation's H float32.
    """
    none = np.zeros((table.num_rows, 0), np.float32)
    chunk = loaded.encoder.encode(table, np.zeros(table.num_rows, np.int64), none, none.astype(np.bool_))
    return score_chunk(loaded, chunk, rows_at_once, representation)


def score_chunk(
    loaded: LoadedVersion, chunk: EncodedChunk, rows_at_once: int = 4096, representation: bool = False
) -> pa.Table:
    """Predictions for examples that are encoded already, as `score_table`."""
    rows = len(chunk)
    parts: dict[str, list[torch.Tensor]] = {task: [] for task in loaded.tasks}
    width = loaded.model.model.representation_dim
    # One array that the forwards fill and Arrow then wraps: representations are wide.
    vectors = np.empty((rows if representation else 0, width), np.float32)
    with torch.inference_mode():
        for start in range(0, rows, rows_at_once):
            stop = min(rows, start + rows_at_once)
            batch = loaded.encoder.batch(chunk, start, stop)
            if representation:
                predictions, representation_BH = loaded.model.predict(batch)
                vectors[start:stop] = representation_BH.float().numpy()
            else:
                predictions = loaded.model(batch)
            for task in loaded.tasks:
                parts[task].append(predictions[task].float())
    columns = {task: torch.cat(part).numpy() if part else np.zeros(0, np.float32) for task, part in parts.items()}
    if representation:
        columns[REPRESENTATION] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    return pa.table(columns)


def read_stream(body: bytes) -> pa.Table:
    """The table of an Arrow IPC stream.

    Raises:
        DataError: it is not one, or it is cut off.
    """
    try:
        return pa.ipc.open_stream(body).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"the request is not an Arrow IPC stream ({error}); send one of the example store's columns"
        ) from None


def conform_request(encoder: Encoder, table: pa.Table) -> pa.Table:
    """What a client sent in the example store's types, without the columns that are not read.

    Raises:
        DataError: a column stands twice, has a type that cannot fit, or holds a value that does not fit.
    """
    types = {field.name: field.type for field in encoder.schema.arrow_schema()}
    columns = {}
    for name in encoder.columns:
        if table.column_names.count(name) > 1:
            raise DataError(f"the request has column {name!r} twice; send it once")
        if name not in table.column_names:
            continue  # the encoder says which one is missing
        columns[name], unfit = conform(name, table[name], types[name])
        if unfit is not None and unfit.any():
            raise DataError(f"row {int(unfit.argmax())}: column {name!r} holds a value that no {types[name]} can")
    for name, width in encoder.representations:
        if name in table.column_names:
            try:
                columns[name] = table[name].cast(pa.list_(pa.float32(), width))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(f"column {name!r}: give lists of {width} floats, or null ({error})") from None
    return pa.table(columns)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response that is there already; looks like the one of a Serve handle."""

    value: tuple[str, pa.Table]

    def result(self) -> tuple[str, pa.Table]:
        """(version, predictions)."""
        return self.value


class TeacherHere:
    """A teacher in this process, asked like its service's handle: ``handle.score.remote(table, version).result()``.

    For data so small that starting a service takes longer than scoring.

    Args:
        root: folder that holds ``snapshots/``.
        model: the model's key in the snapshot store.
    """

    def __init__(self, root: str, model: str) -> None:
        self._store, self._model = SnapshotStore(root), model
        self._loaded: LoadedVersion | None = None
        self.score = self

    def remote(self, table: pa.Table, version: str, representation: bool = False) -> Answer:
        """Predictions of a version for ``table``, as `score_table`.

        Raises:
            SnapshotError: the version cannot be loaded.
        """
        if self._loaded is None or self._loaded.version != version:
            self._loaded = load_version(self._store, self._model, version)
        return Answer((version, score_table(self._loaded, table, representation=representation)))


class TeacherService:
    """One replica. A request names the version that it wants; a replica loads it beside the one that answers.

    Args:
        config: where the model is. Changed through Serve's ``user_config`` without a restart: ``{"version": v}`` makes
            v the version that answers requests that name none.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = TeacherServiceConfig.model_validate(config)
        torch.set_num_threads(self.config.threads)
        self.store = SnapshotStore(self.config.root)
        self._versions: OrderedDict[str, LoadedVersion] = OrderedDict()
        self._lock = threading.Lock()
        # One thread: torch's own threads do the work, and two forwards side by side would only take turns.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rayfm-score")
        self._current: str | None = None

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls this at the start and when ``user_config`` changes; requests go on meanwhile."""
        version = user_config.get("version")
        if version is not None:
            self._load(str(version))
            self._current = str(version)

    async def score(
        self, table: pa.Table, version: str | None = None, representation: bool = False
    ) -> tuple[str, pa.Table]:
        """(version, predictions) for ``table``, with ``representation`` also the teacher's own, as `score_table`.

        Raises:
            SnapshotError: the version cannot be loaded; ValueError: none was named and none is current.
        """
        return await self._answer(table, version, representation)

    async def __call__(self, request: Request) -> Response:
        """HTTP: an Arrow IPC stream of examples in, one of predictions out; ``x-rayfm-version`` names the version.

        ``?version=`` asks for a version, ``?representation=true`` for the representation too.
        """
        try:
            table = read_stream(await request.body())
            asked = request.query_params
            version, predictions = await self._answer(
                table, asked.get("version"), asked.get("representation") == "true", conform_first=True
            )
        except (RayfmError, ValueError) as error:
            return Response(str(error), status_code=400, media_type="text/plain")
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, predictions.schema) as writer:
            writer.write_table(predictions)
        return Response(
            sink.getvalue().to_pybytes(),
            media_type="application/vnd.apache.arrow.stream",
            headers={"x-rayfm-version": version},
        )

    async def _answer(
        self, table: pa.Table, version: str | None, representation: bool, conform_first: bool = False
    ) -> tuple[str, pa.Table]:
        wanted = version or self._current
        if wanted is None:
            raise ValueError("no version is current; name one")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._score, table, wanted, representation, conform_first)

    def _score(self, table: pa.Table, version: str, representation: bool, conform_first: bool) -> tuple[str, pa.Table]:
        loaded = self._load(version)
        if conform_first:
            table = conform_request(loaded.encoder, table)
        return loaded.version, score_table(loaded, table, self.config.predict_rows, representation)

    def _load(self, version: str) -> LoadedVersion:
        with self._lock:
            loaded = self._versions.get(version)
            if loaded is None:
                loaded = load_version(self.store, self.config.model, version)
                self._versions[version] = loaded
                while len(self._versions) > KEPT_VERSIONS:
                    self._versions.popitem(last=False)
            self._versions.move_to_end(version)
            return loaded
