"""The items of Amazon's reviews and their categories."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfm.config import DataError
from rayfm.data.sources.records import first_record, split_records
from rayfm.data.staging import disk_errors

UNKNOWN = "unknown"
"""The category of an item that the metadata do not have, or have none for."""

CATEGORY_COLUMNS = {"categories": pa.list_(pa.list_(pa.string())), "category": pa.list_(pa.string())}
"""How the metadata of 2014 and of 2018 tell an item's categories."""


@dataclasses.dataclass(frozen=True)
class Items:
    """All items that have reviews."""

    asins: pa.Array
    """Rising ``[I]``."""
    categories: pa.Array | None
    """``[I]``; None where the schema does not need them."""

    def write(self, folder: Path) -> Path:
        """Leave the items where tasks can read them; the file's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "items.arrow"
        categories = pa.nulls(len(self.asins), pa.string()) if self.categories is None else self.categories
        table = pa.table({"asin": self.asins, "category": categories})
        with disk_errors(folder), pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        return path

    @classmethod
    def read(cls, path: Path) -> Items:
        """What `write` left."""
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_file(file).read_all().combine_chunks()
        columns = [table[name].combine_chunks() for name in ("asin", "category")]
        return cls(*columns)

    def find(self, asins: pa.ChunkedArray) -> npt.NDArray[np.int64]:
        """Position of each item ``[N]``, -1 for a missing one."""
        found = pc.index_in(asins, value_set=self.asins)
        positions: npt.NDArray[np.int64] = found.cast(pa.int64()).fill_null(-1).to_numpy()
        return positions


def read_categories(path: Path, asins: pa.Array) -> pa.Array:
    """Category of each of ``asins`` ``[I]``: the last of its last category path, as in DIN's set-up.

    The first record of an item counts.

    Raises:
        DataError: the metadata are corrupt, or know no categories.
    """
    record, _ = first_record(path)
    names = [name for name in CATEGORY_COLUMNS if name in record]
    columns = {"asin": pa.string(), **(CATEGORY_COLUMNS if not names else {names[0]: CATEGORY_COLUMNS[names[0]]})}
    known = pa.array([], pa.string())
    found = pa.array([], pa.string())
    for part in split_records("meta", path, columns, "asin", optional=tuple(CATEGORY_COLUMNS)):
        for table in part.tables():
            paths = [_last_category(table[name]) for name in columns if name != "asin"]
            own = pa.table({"asin": table["asin"], "category": pc.coalesce(*paths)})
            own = own.filter(pc.is_in(own["asin"], value_set=asins))
            known = pa.concat_arrays([known, own["asin"].combine_chunks()])
            found = pa.concat_arrays([found, own["category"].combine_chunks()])
    if len(found) and not pc.any(pc.is_valid(found)).as_py():
        raise DataError(f"{path}: no record of a reviewed item has 'categories' (2014) or 'category' (2018)")
    # index_in finds the first of equal values.
    return pc.fill_null(found.take(pc.index_in(asins, value_set=known)), UNKNOWN)


def _last_category(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    while pa.types.is_list(array.type):
        array = _last(array)
    return pc.if_else(pc.equal(array, ""), pa.scalar(None, pa.string()), array)


def _last(lists: pa.ListArray) -> pa.Array:
    """Last element of each list ``[N]``, null for an empty or missing one."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    return lists.flatten().take(pa.array(ends - 1, mask=lengths == 0))
