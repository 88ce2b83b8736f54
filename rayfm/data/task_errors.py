"""Errors of Ray Data tasks as rows, since Ray Data keeps neither the type nor the message of what a function raises."""

from __future__ import annotations

import pyarrow as pa

from rayfm.config import RayfmError, errors

ERROR, MESSAGE = "rayfm_error", "rayfm_message"
"""Columns of a block that stands for an error: the error's class in `rayfm.config.errors`, and what it says."""


def error_block(error: RayfmError) -> pa.Table:
    """A block of one row that a task returns in place of its own."""
    return pa.table({ERROR: [type(error).__name__], MESSAGE: [str(error)]})


def raise_error(block: pa.Table) -> None:
    """Raise the error that a block stands for, as itself; nothing where it is a block of data."""
    if ERROR in block.column_names:
        kind = getattr(errors, block[ERROR][0].as_py(), RayfmError)
        raise kind(block[MESSAGE][0].as_py())
