"""Two-tower retrieval: the user's tower and an index of item vectors that were made by the same version.

Both are parts of one object, which is built beside the one that answers and takes its place in one assignment; a
request takes it once. So a user's vector is never compared with items of another version.

Shape letters: N items, V width of the towers' vectors, T tasks.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from rayfm.client.wire import TIMEOUT_HEADER, Scored
from rayfm.config import ConfigError, DataError, nearest
from rayfm.data.batch import Batch
from rayfm.data.store import ExampleStore
from rayfm.export.student import ExportedStudent
from rayfm.models.fm import ProductHeads
from rayfm.models.two_tower import TwoTower
from rayfm.schema import EXAMPLE_ID, TRAFFIC, WEIGHTS_SUFFIX
from rayfm.serving.catalogue import latest_items, read_catalogue
from rayfm.serving.http.app import NAME, RESPONSES, read_body, reply, score_operation
from rayfm.serving.http.codecs import Payload, media_of
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem
from rayfm.serving.http.queue import Deadline, Queue
from rayfm.serving.item_index import FloatArray, VectorIndex, build_index
from rayfm.serving.requests import check_complete, conform_columns, fill_columns
from rayfm.serving.retrieval_config import RetrievalConfig
from rayfm.serving.teacher import LoadedVersion, load_version
from rayfm.snapshots.load import SnapshotStore

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 8192


class Retrieved(NamedTuple):
    """A reply."""

    ids: pa.Array
    """Items as the catalogue names them, best first: at most k."""
    scores: FloatArray
    """Of one task: the calibrated prediction. Of several: the weighted sum of calibrated logits."""
    version: str
    """The version that made the user's vector and all items' vectors."""


@dataclasses.dataclass
class ItemIndex:
    """One version's towers with the index of its item vectors.

    Attributes:
        loaded: the version.
        ids: ``[N]``: the items' names, in the index's order.
        index: the item vectors.
        item_columns: columns that the user's request has not.
        config: what was asked for.
        seconds: what building took.
    """

    loaded: LoadedVersion
    ids: pa.Array
    index: VectorIndex
    item_columns: tuple[str, ...]
    config: RetrievalConfig
    seconds: float

    @property
    def version(self) -> str:
        """The version of user tower and items alike."""
        return self.loaded.version

    def retrieve(self, user: pa.Table, k: int, exclude: pa.Array | None = None, task: str | None = None) -> Retrieved:
        """The k best items for one user.

        Args:
            user: one row of all features but the item tower's.
            k: how many, 1 to ``max_k``; fewer come back where the catalogue has no more.
            exclude: ids to leave out; those that are no items are passed over.
            task: rank by this task alone; by default as the config's ``weights`` say.

        Raises:
            DataError: the user's row, k or the task is wrong.
        """
        if not 1 <= k <= self.config.max_k:
            raise DataError(f"k is {k}: ask for 1 to {self.config.max_k} items")
        weights = self._weights(task)
        user_V = self._user_vector(user)
        query_V, bias = _query(_two_tower(self.loaded), _calibration(self.loaded), user_V, weights)
        # FAISS finds nothing for what is no number, which would look like an empty catalogue.
        if not torch.isfinite(query_V).all():
            raise DataError("the user's vector is not finite; the user's features are out of all proportion")
        left_out = _left_out(exclude, self.ids.type)
        found = k + (0 if left_out is None else len(left_out))
        products_1K, rows_1K = self.index.search(query_V.numpy()[None], found)
        kept = rows_1K[0] >= 0
        products, rows = products_1K[0][kept], rows_1K[0][kept]
        ids = self.ids.take(pa.array(rows))
        if left_out is not None:
            keep = pc.invert(pc.is_in(ids, value_set=left_out)).to_numpy(zero_copy_only=False)
            ids, products = ids.filter(pa.array(keep)), products[keep]
        scores = products[:k] + np.float32(bias)
        if len(weights) == 1 and self._is_binary(next(iter(weights))):
            scores = 1 / (1 + np.exp(-scores))
        if not np.isfinite(scores).all():
            raise DataError("a score is not finite; the user's features are out of all proportion")
        return Retrieved(ids[:k], scores.astype(np.float32), self.version)

    def _is_binary(self, task: str) -> bool:
        return self.loaded.encoder.schema.task(task).kind == "binary"

    def _weights(self, task: str | None) -> dict[str, float]:
        if task is None:
            return {name: w for name, w in self.config.weights.items() if w} or {self.loaded.tasks[0]: 1.0}
        if task not in self.loaded.tasks:
            raise DataError(
                f"task {task[:80]!r} is not one of the model's{nearest(task[:80], list(self.loaded.tasks))}"
            )
        return {task: 1.0}

    def _user_vector(self, user: pa.Table) -> Tensor:
        """``[V]``."""
        encoder = self.loaded.encoder
        if user.num_columns and user.num_rows != 1:
            raise DataError(f"the user's table has {user.num_rows} rows; send one user in a request")
        for name in user.column_names:
            if name in self.item_columns:
                raise DataError(f"column {name!r} is the items', which are in the index; leave it out")
        arrays = conform_columns(encoder, user)
        fill_columns(encoder.schema, arrays, 1)
        check_complete([name for name in encoder.columns if name not in self.item_columns], set(arrays))
        batch = next(_batches(self.loaded, arrays, 1))
        return _vectors(self.loaded, batch)[0][0]


class Retriever:
    """Answers with whatever index is current; what builds and swaps it is given.

    Args:
        current: gives the index that answers from now on, such as `SnapshotFollower.current`. Called once a request.
    """

    def __init__(self, current: Callable[[], ItemIndex]) -> None:
        self.current = current

    def retrieve(self, user: pa.Table, k: int, exclude: pa.Array | None = None, task: str | None = None) -> Retrieved:
        """As `ItemIndex.retrieve`.

        Raises:
            SnapshotError: no version can answer yet.
        """
        return self.current().retrieve(user, k, exclude, task)


def load_index(
    store: SnapshotStore,
    model: str,
    version: str,
    config: RetrievalConfig,
    examples: ExampleStore | None = None,
    load: Callable[[SnapshotStore, str, str], LoadedVersion] = load_version,
) -> ItemIndex:
    """Load a version and build the index of its items: what a follower of versions calls for each new one.

    Args:
        store, model, version: which snapshot.
        config: which items.
        examples: where items are found, if not in a catalogue.
        load: loads and verifies the version.

    Raises:
        ConfigError, DataError: as `build_items`; SnapshotError: the version cannot be loaded.
    """
    rows = store.check_rows(model, version)
    return build_items(load(store, model, version), config, examples, None if rows is None else rows.batch)


def build_items(
    loaded: LoadedVersion,
    config: RetrievalConfig,
    examples: ExampleStore | None = None,
    users: Batch | None = None,
) -> ItemIndex:
    """Item vectors of a whole catalogue in batches, and their index.

    Args:
        loaded: a two-tower with the top ``dot``.
        config: which items.
        examples: where items are found, if not in a catalogue.
        users: real rows, whose users the recall of an approximate index is measured with; by default the items' own
            vectors stand in for them.

    Raises:
        ConfigError: the model cannot be indexed, or the config does not fit it.
        DataError: there are no items, a column is missing or wrong, or an item's vector is not finite.
    """
    started = time.perf_counter()
    model = _two_tower(loaded)
    for task in config.weights:
        if task not in loaded.tasks:
            raise ConfigError(
                f"retrieval.weights: {task!r} is not a task of the model{nearest(task, list(loaded.tasks))}"
            )
    columns = item_columns(loaded)
    item = _item(loaded, config)
    wanted = list(dict.fromkeys([item, *(name for name in columns if not name.startswith("history/"))]))
    if config.catalogue is not None:
        table, where = read_catalogue(config.catalogue, item, wanted), config.catalogue
    elif examples is not None:
        table, where = latest_items(examples, item, wanted, config.periods), str(examples.root)
    else:
        raise ConfigError(
            "retrieval.catalogue: name a Parquet file of items; there is no example store to take them from"
        )
    ids = table[item].combine_chunks()
    arrays = _conformed(loaded, table, where)
    vectors_NV = np.concatenate([_vectors(loaded, batch)[1].numpy() for batch in _batches(loaded, arrays, len(ids))])
    finite = np.isfinite(vectors_NV).all(axis=1)
    if not finite.all():
        raise DataError(f"{where}: item {ids[int(finite.argmin())].as_py()!r} has a vector that is not finite")
    queries_QV = _queries(loaded, model, config, vectors_NV, users)
    index = build_index(vectors_NV, queries_QV, config.index)
    seconds = time.perf_counter() - started
    log.info("%s: %d items indexed (%s) in %.1f s", loaded.version, len(ids), index.report.kind, seconds)
    return ItemIndex(loaded, ids, index, columns, config, seconds)


def item_columns(loaded: LoadedVersion) -> tuple[str, ...]:
    """Columns that the item tower reads."""
    config = _two_tower(loaded).config
    assert isinstance(config, TwoTower.Config)
    histories = [history.name for history in config.histories if history.key in config.item_features]
    weighted = [f.name + WEIGHTS_SUFFIX for f in loaded.encoder.weighted if f.name in config.item_features]
    return (*config.item_features, *weighted, *histories)


def _two_tower(loaded: LoadedVersion) -> TwoTower:
    model = loaded.model.model
    if not isinstance(model, TwoTower):
        raise ConfigError(f"a {vars(model.config)['type']} has no item vectors to retrieve by; take a two_tower")
    if model.top is not None:
        raise ConfigError("a two_tower with top 'mlp' has no inner product to retrieve by; train one with top 'dot'")
    return model


def _item(loaded: LoadedVersion, config: RetrievalConfig) -> str:
    features = _two_tower(loaded).config
    assert isinstance(features, TwoTower.Config)
    sparse = [f.name for f in loaded.encoder.single if f.name in features.item_features]
    if config.item is not None:
        if config.item not in sparse:
            raise ConfigError(
                f"retrieval.item: {config.item!r} is no sparse feature of the item tower{nearest(config.item, sparse)}"
            )
        return config.item
    if len(sparse) != 1:
        listed = ", ".join(sparse) or "none"
        raise ConfigError(f"retrieval.item: say which feature names an item; the item tower's sparse ones are {listed}")
    return sparse[0]


def _conformed(loaded: LoadedVersion, table: pa.Table, where: str) -> dict[str, pa.Array]:
    try:
        return conform_columns(loaded.encoder, table)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _batches(loaded: LoadedVersion, arrays: Mapping[str, pa.Array], rows: int) -> Iterator[Batch]:
    """Rows of which one tower's columns are known; the other's are null, and what it makes of them is not used."""
    encoder = loaded.encoder
    types = encoder.schema.arrow_schema()
    for start in range(0, rows, ROWS_AT_ONCE):
        size = min(ROWS_AT_ONCE, rows - start)
        columns = {name: array.slice(start, size) for name, array in arrays.items()}
        columns[EXAMPLE_ID] = pa.array(np.arange(size))
        if TRAFFIC not in columns:
            columns[TRAFFIC] = pa.repeat(pa.scalar(encoder.schema.traffics[0], pa.string()), size)
        for name in encoder.columns:
            if name not in columns:
                columns[name] = pa.nulls(size, types.field(name).type)
        none = np.zeros((size, 0), np.float32)
        chunk = encoder.encode(pa.table(columns), np.zeros(size, np.int64), none, none.astype(np.bool_))
        yield encoder.batch(chunk, 0, size)


def _vectors(loaded: LoadedVersion, batch: Batch) -> tuple[Tensor, Tensor]:
    """User and item vectors, each ``[B, V]``."""
    if isinstance(loaded.model, ExportedStudent):
        return loaded.model.vectors(batch)
    with torch.inference_mode():
        return _two_tower(loaded).vectors(batch)


def _calibration(loaded: LoadedVersion) -> dict[str, tuple[float, float]]:
    """Task -> slope and shift; the identity for a task without."""
    calibrator = loaded.model.calibrator
    found = dict.fromkeys(loaded.tasks, (1.0, 0.0))
    if calibrator is not None:
        values = {name: float(value) for name, value in calibrator.state_dict().items()}
        found |= {t: (values[f"{t}.scale"], values[f"{t}.shift"]) for t in loaded.tasks if f"{t}.scale" in values}
    return found


def _query(
    model: TwoTower, calibration: Mapping[str, tuple[float, float]], user_V: Tensor, weights: Mapping[str, float]
) -> tuple[Tensor, float]:
    """The vector whose inner product with an item's, plus a number, is the weighted sum of calibrated logits.

    ``sum_t w_t (s_t (u * a_t / temperature . v + b_t) + c_t)`` with slopes s and shifts c of the calibrator.
    """
    heads = model.heads
    assert isinstance(heads, ProductHeads)
    query_V, bias = torch.zeros_like(user_V), 0.0
    for task, weight in weights.items():
        position = model.tasks.index(task)
        scale, shift = calibration[task]
        own_V = user_V if heads.scale_TE is None else user_V * heads.scale_TE[position].detach()
        query_V = query_V + weight * scale / model.temperature * own_V
        bias += weight * (scale * float(heads.bias_T[position].detach()) + shift)
    return query_V, bias


def _queries(
    loaded: LoadedVersion, model: TwoTower, config: RetrievalConfig, vectors_NV: FloatArray, users: Batch | None
) -> FloatArray:
    """Queries of real users, or items in their place."""
    size = config.index.queries
    if users is not None and len(users):
        found_UV = _vectors(loaded, users)[0][:size]
    else:
        picked = np.random.default_rng(0).choice(len(vectors_NV), min(size, len(vectors_NV)), replace=False)
        found_UV = torch.from_numpy(vectors_NV[picked])
    weights = {name: w for name, w in config.weights.items() if w} or {loaded.tasks[0]: 1.0}
    calibration = _calibration(loaded)
    queries = [_query(model, calibration, user_V, weights)[0] for user_V in found_UV]
    stacked: FloatArray = torch.stack(queries).numpy()
    return stacked


def _left_out(exclude: pa.Array | None, kind: pa.DataType) -> pa.Array | None:
    """Distinct ids in the catalogue's type; None where there are none.

    Raises:
        DataError: they are of another type.
    """
    if exclude is None or not len(exclude):
        return None
    try:
        return exclude.cast(kind).drop_null().unique()
    except (pa.ArrowException, ValueError):
        raise DataError(f"'exclude' holds {exclude.type}, and items are named by {kind}") from None


# -- endpoint ---------------------------------------------------------------------------------------------------------


def retrieve_router(retrievers: Mapping[str, Retriever], limits: LimitsConfig, queue: Queue) -> APIRouter:
    """``POST /v1/models/{model}:retrieve`` for the app's ``routers``.

    Args:
        retrievers: model -> what answers; no other name is ever looked up.
        limits: what a request may ask for.
        queue: where retrieving runs.
    """
    router = APIRouter(tags=["retrieve"], responses=RESPONSES)
    body = {
        "type": "object",
        "required": ["user", "exclude"],
        "additionalProperties": False,
        "properties": {
            "user": {"type": "object", "description": "Feature -> value."},
            "exclude": {"type": "array", "items": {}, "description": "Ids of items to leave out."},
        },
    }
    arrow = "As Arrow: two IPC streams back to back, the user's (one row), then the column `exclude`."
    operation = score_operation(body, arrow, "Columns `id` and `score`, best first.")

    @router.post("/v1/models/{model}:retrieve", response_class=Response, openapi_extra=operation)
    async def retrieve(
        request: Request,
        model: Annotated[str, Path(pattern=NAME, description="The model's key.")],
        k: Annotated[int, Query(ge=1, le=10_000, description="How many items.")] = 100,
        task: Annotated[str | None, Query(max_length=128, description="Rank by this task alone.")] = None,
    ) -> Response:
        """The k best items of the catalogue for one user: columns ``id`` and ``score``, best first."""
        retriever = retrievers.get(model)
        if retriever is None:
            raise Problem(404, f"no retrieval by {model[:80]!r}{nearest(model[:80], list(retrievers))}")
        deadline = Deadline.of_header(request.headers.get(TIMEOUT_HEADER), limits.timeout_s)
        media = media_of(request.headers.get("content-type"), request.headers.get("content-encoding"))
        payload = Payload(await read_body(request, deadline), media, limits)

        def work() -> Scored:
            user, exclude = payload.retrieval()
            found = retriever.retrieve(user, k, exclude, task)
            return Scored(found.version, pa.table({"id": found.ids, "score": pa.array(found.scores)}))

        return await reply(request, payload, await queue.run(deadline, work), deadline)

    return router
