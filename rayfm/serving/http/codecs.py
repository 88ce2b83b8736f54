"""Request bodies as tables, replies as bytes: Arrow IPC and JSON, each checked before anything else sees it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from rayfm.client.wire import ARROW, JSON, VERSION_HEADER, Scored, write_stream
from rayfm.config import DataError, nearest
from rayfm.serving.http.arrow import MAX_COLUMNS, check_values, read_streams, repeated
from rayfm.serving.http.config import LimitsConfig
from rayfm.serving.http.problems import Problem

MAX_JSON_VALUES = 1_000_000
"""Numbers of a JSON reply: some seconds of one core. Arrow has no such limit."""

_JSON_ROWS = 4096
"""Rows that are turned to text at once: other threads have a turn between."""


@dataclasses.dataclass(frozen=True)
class Payload:
    """A request's body, not yet decoded: that is done where a request waits, not where all are received.

    Attributes:
        body: as it came.
        media: ARROW or JSON.
        limits: what it may ask for.
    """

    body: bytes
    media: str
    limits: LimitsConfig

    def rows(self) -> pa.Table:
        """A teacher's rows.

        Raises:
            DataError: the body is malformed; Problem: it asks for too much (413).
        """
        if self.media == ARROW:
            return read_streams(self.body, 1, self.limits.max_rows, self.limits)[0]
        found = _object(self.body, ("rows",), "the body")
        return _columns("rows", found["rows"], self.limits.max_rows, self.limits)

    def student(self) -> tuple[pa.Table, pa.Table]:
        """The user's features (one row), and the candidates'.

        Raises:
            DataError: the body is malformed, or there is more than one user; Problem: it asks for too much (413).
        """
        if self.media == ARROW:
            user, candidates = read_streams(self.body, 2, self.limits.max_candidates, self.limits)
        else:
            found = _object(self.body, ("user", "candidates"), "the body")
            if not isinstance(found["user"], dict):
                raise DataError('"user" is no object; write {"user": {FEATURE: VALUE, ...}, ...}')
            row = {name: [value] for name, value in found["user"].items()}
            user = _columns("user", row, 1, self.limits)
            candidates = _columns("candidates", found["candidates"], self.limits.max_candidates, self.limits)
        check_user(user, candidates)
        return user, candidates

    def retrieval(self) -> tuple[pa.Table, pa.Array]:
        """The user's features (one row), and the ids of items to leave out.

        As Arrow: two streams, the second a table of one column, ``exclude``, of any number of rows.

        Raises:
            DataError: the body is malformed, or there is more than one user; Problem: it asks for too much (413).
        """
        if self.media == ARROW:
            user, excluded = read_streams(self.body, 2, self.limits.max_candidates, self.limits)
            if excluded.column_names != ["exclude"]:
                raise DataError("the second stream has to have one column, 'exclude', of ids; it may have no rows")
        else:
            found = _object(self.body, ("user", "exclude"), "the body")
            if not isinstance(found["user"], dict):
                raise DataError('"user" is no object; write {"user": {FEATURE: VALUE, ...}, "exclude": [ID, ...]}')
            user = _columns("user", {name: [value] for name, value in found["user"].items()}, 1, self.limits)
            excluded = _columns("exclude", {"exclude": found["exclude"]}, self.limits.max_candidates, self.limits)
        check_user(user, excluded)
        return user, excluded["exclude"].combine_chunks()


def check_user(user: pa.Table, candidates: pa.Table) -> None:
    """One user, and no column on both sides.

    Raises:
        DataError: otherwise.
    """
    if user.num_columns and user.num_rows != 1:
        raise DataError(f"the user's table has {user.num_rows} rows; send one user in a request")
    theirs = set(candidates.column_names)
    for name in user.column_names:
        if name in theirs:
            raise DataError(f"column {name!r} is given for the user and for the candidates; send it once")


def media_of(content_type: str | None, encoding: str | None) -> str:
    """ARROW or JSON.

    Raises:
        Problem: another media type, or a compressed body (415).
    """
    if encoding not in (None, "", "identity"):
        raise Problem(415, "the body is compressed; send it without Content-Encoding")
    media = (content_type or "").partition(";")[0].strip().lower()
    if media not in (ARROW, JSON):
        raise Problem(415, f"content type {media[:80]!r}: send {ARROW} or {JSON}")
    return media


def reply_media(accept: str | None, request_media: str) -> str:
    """What to answer in: the first of ours that the ``Accept`` header names, else the request's own."""
    for item in (accept or "").split(","):
        media = item.partition(";")[0].strip().lower()
        if media in (ARROW, JSON):
            return media
    return request_media


def encode(scored: Scored, media: str) -> bytes:
    """A reply's bytes. JSON of many rows takes long: away from the event loop.

    Raises:
        Problem: too much for JSON (413).
    """
    table = scored.predictions
    if media == ARROW:
        return write_stream(table, scored.version)
    if sum(table.num_rows * _width(field.type) for field in table.schema) > MAX_JSON_VALUES:
        raise Problem(413, f"the reply has more than {MAX_JSON_VALUES} numbers; ask for {ARROW}")
    columns = (f"{json.dumps(name)}: {_json(table[name])}" for name in table.column_names)
    return f'{{"version": {json.dumps(scored.version)}, "predictions": {{{", ".join(columns)}}}}}'.encode()


def reply_headers(version: str) -> dict[str, str]:
    """Headers of every reply that holds predictions."""
    return {VERSION_HEADER: version, "Cache-Control": "no-store"}


def check_finite(predictions: pa.Table) -> pa.Table:
    """The table, if all its predictions are numbers.

    Raises:
        DataError: a prediction is infinite or none, as of features far beyond what the model was trained on.
    """
    for name in predictions.column_names:
        column = predictions[name].combine_chunks()
        lists = pa.types.is_fixed_size_list(column.type)
        finite = np.isfinite((column.flatten() if lists else column).to_numpy(zero_copy_only=False))
        if not finite.all():
            row = int(finite.argmin()) // (column.type.list_size if lists else 1)
            raise DataError(f"row {row}: the prediction {name!r} is not finite; its features are out of all proportion")
    return predictions


def _width(type_: pa.DataType) -> int:
    return int(type_.list_size) if pa.types.is_fixed_size_list(type_) else 1


def _json(column: pa.ChunkedArray) -> str:
    """A column as a JSON list."""
    rows = range(0, len(column), _JSON_ROWS)
    parts = (json.dumps(column.slice(start, _JSON_ROWS).to_pylist(), allow_nan=False)[1:-1] for start in rows)
    return f"[{', '.join(parts)}]"


def _object(body: bytes, keys: tuple[str, ...], what: str) -> dict[str, Any]:
    try:
        found = json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise DataError("the JSON is nested too deeply; a column holds values, or lists of values") from None
    except DataError:
        raise
    except ValueError as error:  # malformed, not UTF-8, or a number of thousands of digits
        raise DataError(f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise DataError(f"{what} is no JSON object; write {{{', '.join(json.dumps(key) + ': ...' for key in keys)}}}")
    for key in found:
        if key not in keys:
            raise DataError(f"unknown key {key[:80]!r}{nearest(key[:80], list(keys))}")
    for key in keys:
        if key not in found:
            raise DataError(f"{what} lacks {key!r}")
    return found


def _columns(what: str, columns: Any, max_rows: int, limits: LimitsConfig) -> pa.Table:
    if not isinstance(columns, Mapping):
        raise DataError(f'"{what}" is no object; write {{"{what}": {{COLUMN: [VALUE, ...], ...}}}}')
    if len(columns) > MAX_COLUMNS:
        raise DataError(f'"{what}" has {len(columns)} columns')
    arrays: dict[str, pa.Array] = {}
    rows: int | None = None
    for name, values in columns.items():
        if not isinstance(values, list):
            raise DataError(f"column {name[:80]!r} of {what!r} is no list; write a value per row")
        if len(values) > max_rows:
            raise Problem(413, f"the request has more than {max_rows} rows; send fewer at a time")
        if rows is not None and len(values) != rows:
            raise DataError(f"column {name[:80]!r} of {what!r} has {len(values)} values, the one before it {rows}")
        rows = len(values)
        try:
            arrays[name] = pa.array(values)
        except OverflowError:
            raise DataError(f"column {name[:80]!r} of {what!r} holds a whole number beyond int64") from None
        except (pa.ArrowException, ValueError, TypeError):
            raise DataError(f"column {name[:80]!r} of {what!r} mixes types, or holds text that is no Unicode") from None
        check_values(name[:80], pa.chunked_array([arrays[name]]), limits)
    try:
        return pa.table(arrays)
    except (pa.ArrowException, ValueError):
        raise DataError(f'a column of "{what}" has a name that is no Unicode') from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DataError(f"key {(repeated([name for name, _ in pairs]) or '')[:80]!r} stands twice; send it once")
    return found


def _no_constant(name: str) -> NoReturn:
    raise DataError(f"{name} is no JSON; write null for a missing value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise DataError(f"{text[:40]} is no finite number")
    return value
