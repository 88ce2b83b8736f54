"""What a published version says about itself. The manifest is written last: without it there is no snapshot.

::

    <root>/snapshots/<model>/<version>/rank-00000-<hash>.safetensors    one file for each rank that has slices
                                       manifest.json                    written last
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rayfm.config import Config, SnapshotError
from rayfm.config.names import check_stored_name
from rayfm.export.config import ExportCheck

MANIFEST = "manifest.json"


class SliceRecord(Config):
    """Where a rectangle of a tensor's first two dimensions lies. A dimension that a tensor lacks counts as (0, 1)."""

    file: str
    key: str
    rows: tuple[int, int]
    columns: tuple[int, int]


class TensorRecord(Config):
    """A tensor of the model: its slices tile it exactly."""

    shape: tuple[int, ...]
    dtype: str
    """As torch names it: ``float32``, ``bfloat16``, ``int64``."""

    slices: tuple[SliceRecord, ...]

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns that slices have to tile."""
        return extent(self.shape)


class FileRecord(Config):
    """A file's identity."""

    sha256: str
    bytes: int


class SnapshotManifest(Config):
    """One immutable version of a model."""

    format: Literal[1] = 1
    model: str
    version: str
    created: str
    """ISO time, UTC."""

    trained_through: str | None = None
    """The last period that the model was trained on; None for a model that saw none. The leak rule reads this."""

    config: dict[str, Any] = Field(default_factory=dict)
    """The model's part of the pipeline's config: enough to build it again."""

    example_schema: dict[str, Any] = Field(default_factory=dict)
    """`rayfm.schema.Schema` as plain values."""

    tasks: tuple[str, ...] = ()
    metrics: dict[str, float] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict)
    """What a publisher adds."""
    check: ExportCheck | None = None
    """How far the exported model was from the trained one, and how far it may be; None where that was not checked."""

    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]


def extent(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor's first two dimensions; 1 for a dimension that it lacks."""
    rows, columns = (*shape[:2], 1, 1)[:2]
    return rows, columns


def check_name(what: str, name: str) -> str:
    """``name`` if it is safe as a folder's name and in a URL.

    Raises:
        SnapshotError: it could leave its folder, or has an odd character.
    """
    return check_stored_name(what, name, SnapshotError)


def version_id(trained_through: str, *identity: str) -> str:
    """A version's name: ``<period>-<8 hex>``, which sorts in time. Equal identities (run, seed, ...) give equal names,
    so that a publisher that was killed and runs again publishes the same version instead of a second one.
    """
    digest = hashlib.sha256("\x1f".join((trained_through, *identity)).encode()).hexdigest()
    return check_name("version", f"{trained_through}-{digest[:8]}")


def version_dir(root: Path, model: str, version: str) -> Path:
    """The folder of a version; raises SnapshotError for names that could leave it."""
    return root / "snapshots" / check_name("model", model) / check_name("version", version)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
