"""What an example, a feature, a table and a task are."""

from rayfm.schema.hashing import mix64, salt_of, string_ids, table_rows, table_rows_each, unit_interval
from rayfm.schema.schema import (
    EXAMPLE_ID,
    KINDS,
    LOGGED_PREFIX,
    REQUIRED_COLUMNS,
    RESERVED_COLUMNS,
    TIME,
    TRAFFIC,
    WEIGHTS_SUFFIX,
    Feature,
    Kind,
    Schema,
    Table,
    Task,
)

__all__ = [
    "EXAMPLE_ID",
    "KINDS",
    "LOGGED_PREFIX",
    "REQUIRED_COLUMNS",
    "RESERVED_COLUMNS",
    "TIME",
    "TRAFFIC",
    "WEIGHTS_SUFFIX",
    "Feature",
    "Kind",
    "Schema",
    "Table",
    "Task",
    "mix64",
    "salt_of",
    "string_ids",
    "table_rows",
    "table_rows_each",
    "unit_interval",
]
