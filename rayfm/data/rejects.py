"""Bad rows as one Parquet file a period, whatever types they came in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.data.staging import Fragment, disk_errors


def write_rejects(path: Path, fragments: Sequence[Fragment]) -> None:
    """Gather staged rejects into the file at ``path``; no rejects, no file.

    Columns keep the source's types; one that came with several types is written as text.
    """
    path.unlink(missing_ok=True)
    schemas = []
    for fragment in fragments:
        with pa.OSFile(fragment.path) as file:
            schemas.append(pa.ipc.open_file(file).schema)
    if not schemas:
        return
    schema = _common(schemas)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with disk_errors(path), pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for fragment in sorted(fragments, key=lambda fragment: fragment.path):
            with pa.OSFile(fragment.path) as file:
                reader = pa.ipc.open_file(file)
                for number in range(reader.num_record_batches):
                    writer.write_table(_fit(pa.Table.from_batches([reader.get_batch(number)]), schema))
    temporary.replace(path)


def _common(schemas: list[pa.Schema]) -> pa.Schema:
    types: dict[str, pa.DataType] = {}
    for field in (field for schema in schemas for field in schema):
        known = types.get(field.name, pa.null())
        if pa.types.is_null(known):
            types[field.name] = field.type
        elif known != field.type and not pa.types.is_null(field.type):
            types[field.name] = _wider(known, field.type)
    return pa.schema(list(types.items()))


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type that holds every value of both; text where that is no number."""
    if pa.types.is_floating(one) and pa.types.is_floating(other):
        return pa.float64()
    if all(pa.types.is_integer(type_) and type_ != pa.uint64() for type_ in (one, other)):
        return pa.int64()
    return pa.string()


def _fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        if field.name not in table.column_names or pa.types.is_null(table[field.name].type):
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table[field.name]
        if column.type != field.type:
            try:
                column = column.cast(field.type)
            except pa.ArrowNotImplementedError:  # Arrow has no text of a list
                column = pa.array(column.to_pandas().map(str, na_action="ignore"), pa.string())
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)
