"""The teacher as a Ray Serve application: rows in, predictions and the version that made them out."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from starlette.requests import Request
from starlette.responses import Response

from rayfm.client.wire import ARROW, Scored
from rayfm.config import Config, SnapshotError
from rayfm.data.encode import EncodedChunk, Encoder
from rayfm.export.served import ServedModel, export_model
from rayfm.export.student import ExportedStudent
from rayfm.labels.columns import REPRESENTATION
from rayfm.models.base import MODELS, ModelConfig
from rayfm.operations.logs import configure
from rayfm.schema import Schema
from rayfm.serving.http.codecs import Payload, check_finite, encode, reply_headers
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem, problem_of, unavailable
from rayfm.serving.requests import conform_rows
from rayfm.snapshots.ids import load_vocabularies
from rayfm.snapshots.load import SnapshotStore
from rayfm.snapshots.metadata import open_metadata

if TYPE_CHECKING:
    from rayfm.serving.versions import Follower
    from rayfm.snapshots.loader import Loader

log = logging.getLogger(__name__)

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
    poll_s: float | None = None
    """Seconds between looks for a newer version, which then answers requests that name none. None: Serve's
    ``user_config`` says which does."""
    metadata: str | None = None
    """Follow `current` of this metadata store, as a URL, rather than the newest version: with leases, pins and
    rollbacks. Looks every ``poll_s``, by default every 2 seconds."""


@dataclasses.dataclass
class LoadedVersion:
    """A served snapshot and how its inputs are encoded."""

    version: str
    trained_through: str | None
    model: ServedModel | ExportedStudent
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
    vocabularies = load_vocabularies(store, model, version)
    encoder = Encoder(schema, config.features, labels=False, representations=histories, vocabularies=vocabularies)
    return LoadedVersion(version, manifest.trained_through, served, encoder, manifest.tasks)


def score_table(
    loaded: LoadedVersion, table: pa.Table, rows_at_once: int = 4096, representation: bool = False
) -> pa.Table:
    """Predictions for a table of examples: one float32 column per task, in the rows' order.

    With ``representation`` also a column of that name: fixed-size lists of the representation's H float32.
    """
    return score_chunk(loaded, encode_rows(loaded, table), rows_at_once, representation)


def encode_rows(loaded: LoadedVersion, table: pa.Table) -> EncodedChunk:
    """A table of N examples as a version reads them."""
    none = np.zeros((table.num_rows, 0), np.float32)
    return loaded.encoder.encode(table, np.zeros(table.num_rows, np.int64), none, none.astype(np.bool_))


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
        configure()
        self.config = TeacherServiceConfig.model_validate(config)
        torch.set_num_threads(self.config.threads)
        self.store = SnapshotStore(self.config.root)
        self._versions: OrderedDict[str, LoadedVersion] = OrderedDict()
        self._lock = threading.Lock()
        # One thread scores: torch's own threads do the work, and two forwards side by side would only take turns.
        # Another encodes the next request meanwhile.
        self._encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rayfm-encode")
        self._scoring = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rayfm-score")
        self._current: str | None = None
        self._follower: Follower[LoadedVersion] | None = None
        self._loader: Loader[LoadedVersion] | None = None
        if self.config.metadata is not None:
            from rayfm.serving.follow import follow_current

            metadata, poll_s = open_metadata(self.config.metadata), self.config.poll_s or 2.0
            follower = follow_current(self.store, self.config.model, metadata, poll_s, spare=KEPT_VERSIONS - 1)
            self._follower, self._loader = follower, follower.loader
        elif self.config.poll_s is not None:
            from rayfm.serving.versions import NewestFollower

            self._follower = NewestFollower(self.store, self.config.model, self.config.poll_s)

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

        ``?version=`` asks for a version, ``?representation=true`` for the representation too. For this machine alone:
        there is neither a token nor a queue before it (`rayfm.serving.endpoints` has both).
        """
        asked = request.query_params
        version = asked.get("version")
        try:
            if version is None and self._follower is None and self._current is None:
                raise Problem(400, "no version is current; name one with ?version=")
            table = Payload(await request.body(), ARROW, LimitsConfig()).rows()
            scored = await self.score_request(table, version, asked.get("representation") == "true")
        except SnapshotError as error:
            # What is wrong with a version names files of this machine: that is for the log alone.
            log.error("%s cannot answer: %s", self.config.model, error)
            if version is not None:
                return Problem(404, f"there is no version {version[:80]!r} that can be used").response()
            return unavailable("there is no version that can be served yet", 5).response()
        except Exception as error:
            return problem_of(error).response()
        return Response(encode(scored, ARROW), media_type=ARROW, headers=reply_headers(scored.version))

    async def score_request(self, table: pa.Table, version: str | None = None, representation: bool = False) -> Scored:
        """Predictions for rows from outside, which are conformed to the version's schema first.

        Raises:
            DataError: a column is missing or unknown, or holds what no row may hold; a prediction is not finite.
            SnapshotError, ValueError: as `score`.
        """
        return Scored(*await self._answer(table, version, representation, conform_first=True))

    async def current_version(self) -> str | None:
        """The version that answers requests that name none; None where there is none yet."""
        if self._follower is None:
            return self._current
        try:
            return self._follower.current().version
        except SnapshotError:
            return None

    async def _answer(
        self, table: pa.Table, version: str | None, representation: bool, conform_first: bool = False
    ) -> tuple[str, pa.Table]:
        wanted: str | LoadedVersion | None = version or self._current
        if version is None and self._follower is not None:
            wanted = self._follower.current()  # kept to the request's end, whatever is swapped meanwhile
        if wanted is None:
            raise ValueError("no version is current; name one")
        loop = asyncio.get_running_loop()
        loaded, chunk = await loop.run_in_executor(self._encoding, self._encode, table, wanted, conform_first)
        predictions = await loop.run_in_executor(
            self._scoring, score_chunk, loaded, chunk, self.config.predict_rows, representation
        )
        return loaded.version, check_finite(predictions) if conform_first else predictions

    def _encode(
        self, table: pa.Table, wanted: str | LoadedVersion, conform_first: bool
    ) -> tuple[LoadedVersion, EncodedChunk]:
        loaded = wanted if isinstance(wanted, LoadedVersion) else self._load(wanted)
        return loaded, encode_rows(loaded, conform_rows(loaded.encoder, table) if conform_first else table)

    def _load(self, version: str) -> LoadedVersion:
        if self._loader is not None:
            return self._loader.get(version)
        if self._follower is not None:
            current = self._follower.current()
            if current.version == version:
                return current
        with self._lock:
            loaded = self._versions.get(version)
            if loaded is None:
                loaded = load_version(self.store, self.config.model, version)
                self._versions[version] = loaded
                while len(self._versions) > KEPT_VERSIONS:
                    self._versions.popitem(last=False)
            self._versions.move_to_end(version)
            return loaded
