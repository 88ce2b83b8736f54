"""An index of item vectors by inner product, exact or approximate, with its recall measured when it is built.

Libraries: FAISS (Johnson, Douze, Jegou 2017, arXiv 1702.08734): flat (exact), IVF (inverted lists by k-means) and HNSW
(a graph of near neighbours; Malkov, Yashunin 2016).

Shape letters: N items, V width of a vector, Q queries.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from rayfm.config import Config, ConfigError

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Kind = Literal["exact", "ivf", "hnsw"]


class IndexConfig(Config):
    """What kind of index, and how good it has to be."""

    kind: Kind = "exact"
    """``ivf`` and ``hnsw`` are approximate; they are taken for large catalogues alone."""
    approximate_from: int = Field(100_000, ge=1)
    """Items from which on an approximate index is built; below, the exact one is fast enough."""
    lists: int | None = Field(None, ge=1)
    """Inverted lists of ``ivf``; by default 4 times the square root of the items."""
    probes: int = Field(32, ge=1)
    """Lists that ``ivf`` reads for a query."""
    links: int = Field(32, ge=2)
    """Links of an item in ``hnsw``."""
    breadth: int = Field(128, ge=1)
    """Candidates that ``hnsw`` keeps while it searches, at least as many as are asked for."""
    min_recall: float = Field(0.95, ge=0, le=1)
    """Recall below which an approximate index is thrown away for the exact one."""
    recall_at: int = Field(100, ge=1)
    """Items per query that the recall is measured on."""
    queries: int = Field(256, ge=1)
    """Queries that the recall is measured on."""


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """What was built."""

    items: int
    kind: Kind
    """What answers."""
    recall: float
    """Share of the exact index's items that the configured one also finds; 1 for the exact one."""
    queries: int
    fell_back: bool
    """The configured index found too little, and the exact one answers."""


class VectorIndex:
    """Item vectors, searched by inner product. Made by `build_index`; searching is safe from several threads."""

    def __init__(self, index: Any, config: IndexConfig, report: IndexReport) -> None:
        self._index, self._config, self.report = index, config, report

    def search(self, queries_QV: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Inner products and row numbers of the k nearest items, best first, each ``[Q, k]``; -1 where none is left."""
        return _search(self._index, self.report.kind, self._config, queries_QV, k)


def build_index(vectors_NV: FloatArray, queries_QV: FloatArray, config: IndexConfig) -> VectorIndex:
    """The configured index, or the exact one where that is small enough or finds too little.

    Args:
        vectors_NV: the items.
        queries_QV: what the recall is measured with, as near to real queries as there is.
        config: kind and bars.

    Raises:
        ConfigError: FAISS is not installed.
    """
    faiss = _faiss()
    items, width = vectors_NV.shape
    exact = faiss.IndexFlatIP(width)
    exact.add(vectors_NV)
    if config.kind == "exact" or items < config.approximate_from:
        return VectorIndex(exact, config, IndexReport(items, "exact", 1.0, 0, False))
    if config.kind == "ivf":
        # k-means needs some items a list.
        lists = max(1, min(config.lists or round(4 * math.sqrt(items)), items // 39 or 1))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors_NV)
    else:
        index = faiss.IndexHNSWFlat(width, config.links, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors_NV)
    found = recall(exact, index, config, queries_QV[: config.queries])
    queries = min(config.queries, len(queries_QV))
    if found < config.min_recall:
        log.warning(
            "the %s index finds %.3f of what the exact one does (min_recall %g): the exact one answers; raise 'probes' "
            "or 'breadth', or lower 'min_recall'",
            config.kind,
            found,
            config.min_recall,
        )
        return VectorIndex(exact, config, IndexReport(items, "exact", found, queries, True))
    return VectorIndex(index, config, IndexReport(items, config.kind, found, queries, False))


def recall(exact: Any, index: Any, config: IndexConfig, queries_QV: FloatArray) -> float:
    """Share of the exact index's nearest items that ``index`` finds too, over all queries."""
    k = min(config.recall_at, exact.ntotal)
    _, wanted_QK = _search(exact, "exact", config, queries_QV, k)
    _, found_QK = _search(index, config.kind, config, queries_QV, k)
    hits = sum(len(np.intersect1d(w, f)) for w, f in zip(wanted_QK, found_QK, strict=True))
    return hits / max(1, wanted_QK.size)


def _search(index: Any, kind: Kind, config: IndexConfig, queries_QV: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
    faiss = _faiss()
    parameters = None
    if kind == "ivf":
        parameters = faiss.SearchParametersIVF(nprobe=config.probes)
    elif kind == "hnsw":
        parameters = faiss.SearchParametersHNSW(efSearch=max(config.breadth, k))
    queries = np.ascontiguousarray(queries_QV, np.float32)
    found: tuple[FloatArray, IntArray] = index.search(queries, min(k, index.ntotal), params=parameters)
    return found


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError("retrieval needs FAISS; pip install 'rayfm[retrieval]'") from None
    return faiss
