"""How lane files are encoded, and rows that are put in order while they are encoded for a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from example_store import every_feature_rows, every_feature_schema

from rayfm.data.encode import Encoder
from rayfm.data.lanes import LaneWriter
from rayfm.data.store import ExampleStore


def test_dictionaries_only_where_values_repeat(tmp_path: Path) -> None:
    schema, rows = every_feature_schema(), every_feature_rows(400, seed=2)
    writer = LaneWriter(ExampleStore(tmp_path), "2024-01-01", "impression", 2, schema, rows.schema)
    writer.write(rows)
    writer.close()
    path = ExampleStore(tmp_path).lane_path("2024-01-01", "impression", 0)
    assert pq.read_table(path, partitioning=None).equals(rows.take(pa.array(np.arange(0, 400, 2))))
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"LZ4"}
    with_dictionary = {name for name, column in columns.items() if column.has_dictionary_page}
    assert {"traffic", "click"} <= with_dictionary
    for feature in schema.features:
        path = f"{feature.name}.list.element" if feature.is_list else feature.name
        assert (path in with_dictionary) == (feature.kind != "dense"), path
    assert not {"example_id", "time", "watch", "logged/ranking/click"} & with_dictionary


def test_a_chunk_in_another_order_is_that_of_the_table_in_that_order() -> None:
    schema = every_feature_schema()
    rows = every_feature_rows(200, seed=3)
    user = pa.array([None if row % 7 == 0 else value for row, value in enumerate(rows["user"].to_pylist())], pa.int64())
    table = rows.set_column(rows.column_names.index("user"), "user", user)
    order = np.random.default_rng(1).permutation(200)
    encoder, kind, none = Encoder(schema), np.zeros(200, np.int64), np.zeros((200, 0), np.float32)
    mask = none.astype(np.bool_)
    parts = pa.concat_tables([table.slice(0, 70), table.slice(70)])  # as lanes come: in pieces
    found = encoder.batch(encoder.encode(parts, kind, none, mask, order=order), 0, 200)
    wanted = encoder.batch(encoder.encode(table.take(pa.array(order)), kind, none, mask), 0, 200)
    for name, value in vars(wanted).items():
        other = getattr(found, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
        elif value is not None and hasattr(value, "lengths"):
            assert torch.equal(other.values(), value.values()), name
            assert torch.equal(other.lengths(), value.lengths()), name
            if value.weights_or_none() is not None:
                assert torch.equal(other.weights(), value.weights()), name
