"""Whether the example store's disk can be written and holds what prepare will write."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import pyarrow as pa

from rayfm.config import CapacityError, DataError
from rayfm.schema import Schema

LIST_ITEMS = 24
"""Items that a list is taken to have on average, where its ``max_len`` is not smaller."""

SCALAR_BYTES, ITEM_BYTES = 3.0, 2.5
"""Bytes of a value and of a list's item, on the safe side: KuaiRand, estimated at 760 bytes a row, takes 335 staged
and 165 in its lanes."""


def estimate_bytes(rows: int, schema: Schema) -> int:
    """About how much disk prepare needs at its peak for ``rows`` examples: the staged fragments and the lanes."""
    row_bytes = 0.0
    lists = {feature.name: feature.max_len or LIST_ITEMS for feature in schema.features if feature.is_list}
    for field in schema.arrow_schema():
        if pa.types.is_list(field.type):
            row_bytes += ITEM_BYTES * min(lists.get(field.name, LIST_ITEMS), LIST_ITEMS)
        else:
            row_bytes += SCALAR_BYTES
    return round(2 * rows * row_bytes)


def check_disk(root: Path, need: int) -> None:
    """Refuse a folder that cannot be written or whose disk has less than ``need`` bytes free.

    Raises:
        DataError: the folder cannot be made or written.
        CapacityError: too little disk.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{root}: cannot write the example store here ({reason}); choose another root") from None
    free = shutil.disk_usage(root).free
    if free < need:
        raise CapacityError(
            f"{root}: preparing needs about {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; "
            "free space or choose another example store root"
        )
