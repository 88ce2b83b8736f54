"""The hash that maps an id to a row of a table. It is part of the data format: changing it orphans every trained table.

An id is an int64, or a string that is first folded to 64 bits; the row is ``splitmix64(id + salt) mod rows``.

* Strings: SipHash-2-4 of the UTF-8 bytes with the 16-byte key ``0123456789123456``, as ``pandas.util.hash_array``
  computes it.
* Mixing: the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def salt_of(name: str) -> int:
    """The default salt of a table: 63 bits of the SHA-256 of its name, so that two tables place one id differently."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def mix64(values: npt.NDArray[np.int64] | npt.NDArray[np.uint64], salt: int = 0) -> npt.NDArray[np.uint64]:
    """splitmix64 of ``values + salt``, element by element: ``[n] -> [n]`` uint64."""
    return _mixed(values.view(np.uint64) + _first(salt))


def _first(salt: int) -> np.uint64:
    """What is added to an id before it is mixed."""
    return np.uint64((salt + _GOLDEN) % 2**64)


def _mixed(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser, in place."""
    # In place and with one scratch array: a chunk's column stays in the processor's cache.
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= _MIX_1
    z ^= np.right_shift(z, np.uint64(27), out=shifted)
    z *= _MIX_2
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z


def string_ids(values: pa.Array) -> npt.NDArray[np.int64]:
    """64-bit ids of an Arrow string (or dictionary of strings) array without nulls: ``[n] -> [n]`` int64."""
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    words = values.dictionary.to_numpy(zero_copy_only=False).astype(object)
    hashed: npt.NDArray[np.int64] = pd.util.hash_array(words, categorize=False).view(np.int64)
    rows: npt.NDArray[np.int64] = hashed[values.indices.to_numpy(zero_copy_only=False)]
    return rows


def table_rows(ids: npt.NDArray[np.int64], rows: int, salt: int) -> npt.NDArray[np.int64]:
    """The table row of each id: ``[n] -> [n]`` int64 in ``[0, rows)``."""
    mixed = mix64(ids, salt)
    _remainder(mixed, np.uint64(rows))
    return mixed.view(np.int64)


def table_rows_each(
    ids: npt.NDArray[np.int64], rows: Sequence[int], salts: Sequence[int], out: npt.NDArray[np.int64]
) -> None:
    """`table_rows` of several features at once, into ``out``: ``[F, n] -> [F, n]``, feature f's in ``[0, rows[f])``.

    For few ids: of a thousand a feature, the calls cost more than the hashing.
    """
    mixed = out.view(np.uint64)
    np.add(ids.view(np.uint64), np.array([[_first(salt)] for salt in salts], np.uint64), out=mixed)
    _mixed(mixed)
    for feature, divisor in enumerate(rows):
        _remainder(mixed[feature], np.uint64(divisor))


def _remainder(mixed: npt.NDArray[np.uint64], divisor: np.uint64) -> None:
    """The remainder of the division, in place."""
    # By hand: numpy divides by a scalar without the processor's slow division, but takes remainders with it.
    quotient = mixed // divisor
    quotient *= divisor
    mixed -= quotient


def unit_interval(ids: npt.NDArray[np.int64], salt: int = 0) -> npt.NDArray[np.float64]:
    """A fixed uniform number in ``[0, 1)`` per id; used for sampling that every reader must repeat."""
    return (mix64(ids, salt) >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))
