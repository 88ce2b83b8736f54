"""The example store: Parquet files by period, kind and lane, and the manifest that declares a period complete.

::

    <root>/examples/period=<p>/kind=impression/lane-0.parquet
                              /kind=consideration/lane-0.parquet
                              /manifest.json                        written last
    <root>/truth/period=<p>/kind=<k>/lane-0.parquet                 simulator only: true probabilities, row by row
    <root>/rejects/period=<p>.parquet                               bad rows with the reason
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayfm.config import Config, DataError
from rayfm.config.durable import write_whole
from rayfm.schema import KINDS, Kind, Schema

MANIFEST = "manifest.json"


class LaneFile(Config):
    """One lane of one kind in a period's manifest."""

    kind: Kind
    lane: int
    rows: int
    bytes: int
    sha256: str


class Marginal(Config):
    """Means over the rows of one kind and traffic in a period, for the report's picture of the data."""

    kind: Kind
    traffic: str
    rows: int
    means: dict[str, float]
    """Column (task, ``logged/...`` or ``truth/...``) -> mean over the rows where it is known."""


class PeriodManifest(Config):
    """Declares a period complete. ``start`` and ``end`` (exclusive) are ISO times in UTC."""

    period: str
    start: str
    end: str
    lanes: int
    files: tuple[LaneFile, ...]
    columns: dict[str, str]
    """Column name -> Arrow type, of every lane file."""
    rejected: dict[str, int] = {}
    """Reason -> rows that went to ``rejects/``."""
    truth: tuple[str, ...] = ()
    """Columns of the truth files beside the lanes; empty where the truth is unknown."""
    marginals: tuple[Marginal, ...] = ()
    source: str = ""
    """Hash of the source's and schema's configuration; a period prepared from another one is not reused."""

    def rows(self, kind: Kind) -> int:
        return sum(file.rows for file in self.files if file.kind == kind)

    def lane_rows(self, kind: Kind, lane: int) -> int:
        return sum(file.rows for file in self.files if file.kind == kind and file.lane == lane)


def period_name(start: datetime.datetime, length: datetime.timedelta) -> str:
    """ISO name of a period: ``2022-04-25`` where periods start at midnight, else ``2022-04-25T13``."""
    whole_days = length % datetime.timedelta(days=1) == datetime.timedelta(0)
    return start.strftime("%Y-%m-%d" if whole_days else "%Y-%m-%dT%H")


def write_json_atomic(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file, the new one, or none: never a part of one.

    Not synced: a trainer writes its progress at every few steps, and whatever else is written here can be made again
    from what it was made of, once a reader has refused what a power cut emptied.

    Raises:
        CapacityError: the disk is full, or the folder cannot be written.
    """
    text = json.dumps(data, indent=1).encode()
    write_whole(path, lambda file: file.write(text))


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ExampleStore:
    """Paths, manifests and integrity of the examples below ``root`` (a local or mounted folder)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def __repr__(self) -> str:
        return f"ExampleStore({str(self.root)!r})"

    def period_dir(self, period: str) -> Path:
        return self.root / "examples" / f"period={period}"

    def lane_path(self, period: str, kind: Kind, lane: int) -> Path:
        return self.period_dir(period) / f"kind={kind}" / f"lane-{lane}.parquet"

    def truth_path(self, period: str, kind: Kind, lane: int) -> Path:
        return self.root / "truth" / f"period={period}" / f"kind={kind}" / f"lane-{lane}.parquet"

    def rejects_path(self, period: str) -> Path:
        return self.root / "rejects" / f"period={period}.parquet"

    def periods(self) -> list[str]:
        """Complete periods, in time order."""
        folders = (self.root / "examples").glob(f"period=*/{MANIFEST}")
        return sorted(path.parent.name.removeprefix("period=") for path in folders)

    def manifest(self, period: str) -> PeriodManifest:
        """The manifest of a complete period.

        Raises:
            DataError: the period was not prepared, or not to its end, or its manifest is unreadable.
        """
        path = self.period_dir(period) / MANIFEST
        try:
            return PeriodManifest.model_validate_json(path.read_text())
        except FileNotFoundError:
            state = "incomplete (no manifest)" if path.parent.exists() else "not in the store"
            raise DataError(f"{self.root}: period {period} is {state}; run `rayfm prepare` for it") from None
        except ValueError as error:
            raise DataError(f"{path}: unreadable manifest ({error}); delete the period and prepare it again") from None

    def commit(self, manifest: PeriodManifest) -> None:
        """Declare a period complete: its manifest is written last."""
        write_json_atomic(self.period_dir(manifest.period) / MANIFEST, manifest.dump())

    def files(self, period: str, kind: Kind) -> Iterator[tuple[LaneFile, Path]]:
        for file in self.manifest(period).files:
            if file.kind == kind:
                yield file, self.lane_path(period, kind, file.lane)

    def open_lane(self, period: str, kind: Kind, lane: int) -> pq.ParquetFile:
        """A lane's Parquet file, ready to read by row group.

        Raises:
            DataError: the file is missing or corrupt.
        """
        path = self.lane_path(period, kind, lane)
        try:
            # Not mapped: mapped pages count as the process's memory, which would grow with the period.
            return pq.ParquetFile(path, memory_map=False, pre_buffer=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{path}: corrupt or missing Parquet file ({error}); prepare period {period} again"
            ) from None

    def verify(self, period: str) -> None:
        """Check every file's hash against the manifest.

        Raises:
            DataError: naming the first file that differs.
        """
        manifest = self.manifest(period)
        for kind in KINDS:
            for file, path in self.files(period, kind):
                if not path.exists() or file_sha256(path) != file.sha256:
                    raise DataError(f"{path}: bytes differ from the manifest; prepare period {manifest.period} again")

    def check_schema(self, period: str, schema: Schema) -> None:
        """Refuse a period that lacks a column of ``schema`` or holds it with another type.

        Raises:
            DataError: naming the column.
        """
        columns = self.manifest(period).columns
        for field in schema.arrow_schema():
            if field.name not in columns:
                raise DataError(f"{self.period_dir(period)}: column {field.name!r} is missing; prepare it again")
            if columns[field.name] != str(field.type):
                raise DataError(
                    f"{self.period_dir(period)}: column {field.name!r} is {columns[field.name]}, the schema wants "
                    f"{field.type}; prepare it again"
                )
