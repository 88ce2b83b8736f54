"""Vocabularies: ids that were seen often enough get a row of their own, the others share a small hashed part.

Rows of a table of R rows whose first S are shared::

    0 ............ S - 1 | S ................................ R - 1
    shared by hash       | one id each, in order of admission

An id is admitted once it was seen ``min_count`` times in all periods counted so far. It then keeps its row for good:
nothing is evicted, and when all rows are given away, whoever comes later stays in the shared part.

Shape letters: N ids of a batch, V admitted ids, C candidates (seen, not admitted).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfm.config import Config, DataError
from rayfm.schema import Schema, Table, string_ids, table_rows

IntArray = npt.NDArray[np.int64]


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
    """Ids that lost theirs; a vocabulary takes none back."""
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
        ids_V: admitted ids, in order of admission.
        candidates_C: other ids that were seen, ascending.
        counts_C: how often.
    """

    ids_V: IntArray
    candidates_C: IntArray
    counts_C: IntArray

    @classmethod
    def nothing(cls) -> Counted:
        """Before the first period."""
        none = np.zeros(0, np.int64)
        return cls(none, none, none)

    def vocabulary(self, schema: Schema, table: str) -> Vocabulary:
        """The mapping that the admitted ids make."""
        return Vocabulary(self.ids_V, schema.tables[table].shared_rows, schema.salt(table))

    def grown(self, seen_U: IntArray, times_U: IntArray, table: Table) -> tuple[Counted, IdsRecord]:
        """After a period in which the ids ``seen_U`` (ascending, none twice) came ``times_U`` times each.

        Of those that reach ``min_count`` the ones seen more often are admitted first, equals by their id, as long as
        rows are left. Of the rest at most ``max_candidates`` are remembered, the most frequent ones.
        """
        config, free = table.vocabulary, table.rows - table.shared_rows - len(self.ids_V)
        sorted_V = np.sort(self.ids_V)
        new = _absent(seen_U, sorted_V)
        ids_C, counts_C = merge_counts([(self.candidates_C, self.counts_C), (seen_U[new], times_U[new])])
        often = np.flatnonzero(counts_C >= config.min_count)
        often = often[np.lexsort((ids_C[often], -counts_C[often]))]
        admitted = often[:free]
        rest = np.ones(len(ids_C), np.bool_)
        rest[admitted] = False
        ids_V = np.concatenate([self.ids_V, ids_C[admitted]])
        left_C, left_counts_C = ids_C[rest], counts_C[rest]
        if len(left_C) > config.max_candidates:
            kept = np.sort(np.lexsort((left_C, -left_counts_C))[: config.max_candidates])
            left_C, left_counts_C = left_C[kept], left_counts_C[kept]
        own = ~_absent(seen_U, np.sort(ids_V))
        total = int(times_U.sum())
        record = IdsRecord(
            admitted=len(admitted),
            known=len(ids_V),
            candidates=len(left_C),
            refused=len(often) - len(admitted),
            coverage=float(times_U[own].sum()) / total if total else 0.0,
        )
        return Counted(ids_V, left_C, left_counts_C), record


def _absent(ids_N: IntArray, sorted_V: IntArray) -> npt.NDArray[np.bool_]:
    """bool ``[N]``: which ids are not among the sorted ones."""
    if not len(sorted_V):
        return np.ones(len(ids_N), np.bool_)
    found_N = np.minimum(np.searchsorted(sorted_V, ids_N), len(sorted_V) - 1)
    absent: npt.NDArray[np.bool_] = sorted_V[found_N] != ids_N
    return absent


def merge_counts(parts: list[tuple[IntArray, IntArray]]) -> tuple[IntArray, IntArray]:
    """Sum (ids, counts) of several places: ids ascending, none twice, and their counts."""
    ids, inverse = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.zeros(len(ids), np.int64)
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
        raise DataError(f"table {table!r} has id_policy: vocabulary, and its vocabulary was not given")
    return found
