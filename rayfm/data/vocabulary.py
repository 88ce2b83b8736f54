"""Vocabularies: ids that were seen often enough get a row of their own, the others share a small hashed part.

Rows of a table of R rows whose first S are shared::

    0 ............ S - 1 | S ................................ R - 1
    shared by hash       | one id each, in order of admission

An id is admitted once it was seen ``min_count`` times in the periods counted so far. Under ``id_policy: vocabulary``
it keeps its row for good, and when all rows are given away, whoever comes later stays in the shared part. Under
``managed`` counts fade by ``decay`` from period to period (least frequently used, with aging), and when no row is left,
an id that counts more takes the row of the one that counts least.

Shape letters: N ids of a batch, V admitted ids, C candidates (seen, not admitted).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfm.config import Config, DataError
from rayfm.schema import Schema, Table, string_ids, table_rows

IntArray = npt.NDArray[np.int64]
CountT = TypeVar("CountT", np.int64, np.float64)


class Vocabulary:
    """Maps ids to the rows of one table.

    Args:
        ids_V: admitted ids, in order of admission, none twice.
        shared_rows: S, at least 1.
        salt: of the table; places the others in the shared part.
    """

    def __init__(self, ids_V: IntArray, shared_rows: int, salt: int) -> None:
        self.ids_V, self.shared_rows, self.salt = ids_V, shared_rows, salt
        self._order_V = np.argsort(ids_V, kind="stable")
        self._sorted_V = ids_V[self._order_V]

    def __len__(self) -> int:
        return len(self.ids_V)

    def places(self, ids_N: IntArray) -> IntArray:
        """Place of each id in the order of admission, -1 for one that is not admitted: ``[N]``."""
        if not len(self._sorted_V):
            return np.full(len(ids_N), -1, np.int64)
        found_N = np.minimum(np.searchsorted(self._sorted_V, ids_N), len(self._sorted_V) - 1)
        places_N: IntArray = np.where(self._sorted_V[found_N] == ids_N, self._order_V[found_N], -1)
        return places_N

    def rows(self, ids_N: IntArray) -> IntArray:
        """Row of each id: ``[N]`` in ``[0, S + V)``."""
        places_N = self.places(ids_N)
        rows_N: IntArray = np.where(
            places_N >= 0, self.shared_rows + places_N, table_rows(ids_N, self.shared_rows, self.salt)
        )
        return rows_N


class IdsRecord(Config):
    """What became of a table's ids in a period."""

    admitted: int
    """Ids that got a row of their own before the period was trained on."""
    evicted: int = 0
    """Ids that lost theirs to others; under ``vocabulary`` none does."""
    known: int
    """Ids that have one now."""
    candidates: int
    """Ids that were seen and have none."""
    refused: int
    """Of those, how many were seen often enough: no row is left."""
    coverage: float
    """Share of the period's look-ups that go to a row of their own."""


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a vocabulary is made from, period by period.

    Args:
        ids_V: admitted ids, by their place in the part of rows of one's own.
        scores_V: how often they were seen, as far as it counts still.
        candidates_C: other ids that were seen, ascending.
        counts_C: how often, as far as it counts still.
        replaced_K: places that the newest period gave from one id to another.
    """

    ids_V: IntArray
    scores_V: npt.NDArray[np.float64]
    candidates_C: IntArray
    counts_C: npt.NDArray[np.float64]
    replaced_K: IntArray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def nothing(cls) -> Counted:
        """Before the first period."""
        return cls(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64), np.zeros(0))

    def vocabulary(self, schema: Schema, table: str) -> Vocabulary:
        """The mapping that the admitted ids make."""
        return Vocabulary(self.ids_V, schema.tables[table].shared_rows, schema.salt(table))

    def grown(self, seen_U: IntArray, times_U: IntArray, table: Table) -> tuple[Counted, IdsRecord]:
        """After a period in which the ids ``seen_U`` (ascending, none twice) came ``times_U`` times each.

        Of those that reach ``min_count`` the ones seen more often are admitted first, equals by their id, as long as
        rows are left. Under ``managed`` those that find none left then take, in the same order, the rows of the ids
        that count least, as long as they count more; an evicted id is a candidate again. Of the candidates at most
        ``max_candidates`` are remembered, the most frequent ones.
        """
        config, managed = table.vocabulary, table.id_policy == "managed"
        fade = config.decay if managed else 1.0
        ids_V, scores_V = self.ids_V.copy(), self.scores_V * fade
        places_U = Vocabulary(ids_V, 1, 0).places(seen_U)
        scores_V[places_U[places_U >= 0]] += times_U[places_U >= 0]
        new = places_U < 0
        ids_C, counts_C = merge_counts(
            [(self.candidates_C, self.counts_C * fade), (seen_U[new], times_U[new].astype(np.float64))]
        )
        often = np.flatnonzero(counts_C >= config.min_count)
        often = often[np.lexsort((ids_C[often], -counts_C[often]))]
        free = table.rows - table.shared_rows - len(ids_V)
        admitted, waiting = often[:free], often[free:]
        victims = np.lexsort((ids_V, scores_V)) if managed else np.zeros(0, np.int64)
        pairs = min(len(waiting), len(victims))
        # The strongest newcomer meets the weakest holder: after the first that does not count more none does.
        taken = int((counts_C[waiting[:pairs]] > scores_V[victims[:pairs]]).sum())
        replaced_K, takers = victims[:taken], waiting[:taken]
        evicted, evicted_scores = ids_V[replaced_K], scores_V[replaced_K]
        ids_V[replaced_K], scores_V[replaced_K] = ids_C[takers], counts_C[takers]
        ids_V = np.concatenate([ids_V, ids_C[admitted]])
        scores_V = np.concatenate([scores_V, counts_C[admitted]])
        rest = np.ones(len(ids_C), np.bool_)
        rest[admitted] = rest[takers] = False
        left_C, left_counts_C = merge_counts([(ids_C[rest], counts_C[rest]), (evicted, evicted_scores)])
        if len(left_C) > config.max_candidates:
            kept = np.sort(np.lexsort((left_C, -left_counts_C))[: config.max_candidates])
            left_C, left_counts_C = left_C[kept], left_counts_C[kept]
        own = Vocabulary(ids_V, 1, 0).places(seen_U) >= 0
        total = int(times_U.sum())
        record = IdsRecord(
            admitted=len(admitted) + taken,
            evicted=taken,
            known=len(ids_V),
            candidates=len(left_C),
            refused=len(waiting) - taken,
            coverage=float(times_U[own].sum()) / total if total else 0.0,
        )
        return Counted(ids_V, scores_V, left_C, left_counts_C, replaced_K), record


def merge_counts(parts: list[tuple[IntArray, npt.NDArray[CountT]]]) -> tuple[IntArray, npt.NDArray[CountT]]:
    """Sum (ids, counts) of several places: ids ascending, none twice, and their counts."""
    ids, inverse = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.zeros(len(ids), parts[0][1].dtype)
    np.add.at(counts, inverse, np.concatenate([part[1] for part in parts]))
    return ids, counts


def raw_ids(values: pa.Array) -> IntArray:
    """The 64-bit ids of an Arrow array of integers or strings without nulls, as encoding folds them: ``[N]``."""
    if pa.types.is_integer(values.type):
        ids: IntArray = values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        return ids
    return string_ids(values) if len(values) else np.zeros(0, np.int64)


def vocabulary_of(vocabularies: Mapping[str, Vocabulary], table: str) -> Vocabulary:
    """A table's vocabulary. Raises DataError where there is none: its ids have no rows without it."""
    found = vocabularies.get(table)
    if found is None:
        raise DataError(f"table {table!r} has an id_policy of rows of their own, and its vocabulary was not given")
    return found
